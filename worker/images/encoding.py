"""Images as data URLs, made piece by piece: nothing here ever holds a whole large image."""

from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Self

import pybase64

_WHITE_SPACE = bytes(range(9, 14)) + b" "
# Of base64 text that a job carries, looked at in one go: long enough to be quick, and whole groups of four.
_SLICE_CHARS = 256 * 1024


def encoded_length(size: int) -> int:
    """How many characters of base64 `size` bytes make, padding included (RFC 4648 §4)."""
    return (size + 2) // 3 * 4


def encode(content: bytes) -> bytes:
    """`content` as base64."""
    return pybase64.b64encode(content)


class EncodedStream:
    """The base64 of all pieces together. Three bytes make four characters: what is over waits.

    No generator, which would hold on to a piece while its base64 is sent.
    """

    def __init__(self, pieces: AsyncIterator[bytes]) -> None:
        self._pieces = pieces
        self._over = b""
        self._is_over = False

    def __aiter__(self) -> Self:
        """It iterates once."""
        return self

    async def __anext__(self) -> bytes:
        """The base64 of the next piece."""
        while not self._is_over:
            # A piece may be empty (blanks in a data URL): only the source's end is the end.
            given = await anext(self._pieces, None)
            self._is_over = given is None
            piece = self._over + (given or b"")
            whole = len(piece) if self._is_over else len(piece) - len(piece) % 3
            self._over = piece[whole:]
            if whole:
                return pybase64.b64encode(memoryview(piece)[:whole])
        raise StopAsyncIteration


def decode_slices(text: memoryview) -> Iterator[bytes]:
    """The bytes that base64 text stands for, slice by slice.

    As browsers do, white space and missing padding are forgiven.

    Raises:
        ValueError: it is not base64.
    """
    over, padded = b"", False
    for start in range(0, len(text), _SLICE_CHARS):
        part = over + bytes(text[start : start + _SLICE_CHARS]).translate(None, _WHITE_SPACE)
        if padded and part:
            raise ValueError("there is more after the padding")
        whole = len(part) - len(part) % 4
        part, over = part[:whole], part[whole:]
        padded = padded or part.endswith(b"=")
        yield pybase64.b64decode(part, validate=True)
    if over:
        if padded:
            raise ValueError("there is more after the padding")
        yield pybase64.b64decode(over + b"=" * (-len(over) % 4), validate=True)


async def iterate_async(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    """Pieces that are at hand, for those who wait for theirs."""
    for piece in pieces:
        yield piece
