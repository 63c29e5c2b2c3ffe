"""Images as data URLs, made piece by piece: nothing here ever holds a whole large image."""

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator

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


async def encode_stream(pieces: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """The base64 of all pieces together. Three bytes make four characters: what is over waits."""
    over = b""
    async for piece in pieces:
        if over:
            piece = over + piece  # noqa: PLW2901 - the piece with what was over
        whole = len(piece) - len(piece) % 3
        over = piece[whole:]
        if whole:
            yield pybase64.b64encode(memoryview(piece)[:whole] if over else piece)
    if over:
        yield pybase64.b64encode(over)


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
        padded = part.endswith(b"=")
        yield pybase64.b64decode(part, validate=True)
    if over:
        if padded:
            raise ValueError("there is more after the padding")
        yield pybase64.b64decode(over + b"=" * (-len(over) % 4), validate=True)


async def later(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    """Pieces that are at hand, for those who wait for theirs."""
    for piece in pieces:
        yield piece
