"""Convert images to base64 and back in pieces, so that no large image is in memory as a whole."""

from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Self

import pybase64
import pydantic_core

_WHITE_SPACE = bytes(range(9, 14)) + b" "
_SLICE_CHARS = 256 * 1024
# Longer than any JSON escape.
_ESCAPE_CHARS = 6
# JSON escapes of base64, in a slice, other than of slashes, plus signs and line breaks.
_MAX_OTHER_ESCAPES = 1000


def encoded_length(size: int) -> int:
    """Return the length of the base64 of `size` bytes, with padding (RFC 4648 §4)."""
    return (size + 2) // 3 * 4


def encode(content: bytes) -> bytes:
    """Return `content` as base64."""
    return pybase64.b64encode(content)


class EncodedStream:
    """The base64 of a stream of pieces.

    This is not a generator, which would keep a piece in memory while its base64 is sent.
    """

    def __init__(self, pieces: AsyncIterator[bytes]) -> None:
        self._pieces = pieces
        self._remainder = b""
        self._is_complete = False

    def __aiter__(self) -> Self:
        """Return itself: it can be iterated over once."""
        return self

    async def __anext__(self) -> bytes:
        """Return the base64 of the next piece."""
        while not self._is_complete:
            # A piece may be empty, for example white space in a data URL.
            piece = await anext(self._pieces, None)
            self._is_complete = piece is None
            piece = self._remainder + (piece or b"")
            # Three bytes become four characters.
            length = len(piece) if self._is_complete else len(piece) - len(piece) % 3
            self._remainder = piece[length:]
            if length:
                return pybase64.b64encode(memoryview(piece)[:length])
        raise StopAsyncIteration


def decode_slices(text: memoryview) -> Iterator[bytes]:
    """Decode base64 with JSON escapes, slice by slice; like browsers, accept white space and no padding.

    Raises:
        ValueError: the base64 is invalid.
    """
    remainder, is_padded = b"", False
    for escaped in _slices(text):
        part = remainder + _unescape(escaped).translate(None, _WHITE_SPACE)
        if is_padded and part:
            raise ValueError("text after the padding")
        length = len(part) - len(part) % 4
        part, remainder = part[:length], part[length:]
        is_padded = is_padded or part.endswith(b"=")
        yield pybase64.b64decode(part, validate=True)
    if remainder:
        if is_padded:
            raise ValueError("text after the padding")
        yield pybase64.b64decode(remainder + b"=" * (-len(remainder) % 4), validate=True)


def _slices(text: memoryview) -> Iterator[bytes]:
    """Yield slices that end between JSON escapes."""
    position = 0
    while position < len(text):
        part = bytes(text[position : position + _SLICE_CHARS])
        if len(part) == _SLICE_CHARS and (escape := part.rfind(b"\\", len(part) - _ESCAPE_CHARS)) >= 0:
            part = part[:escape]
        position += len(part)
        yield part


def _unescape(text: bytes) -> bytes:
    if b"\\" not in text:
        return text
    # PHP escapes slashes, .NET plus signs, MIME encoders insert line breaks: far faster than parsing them.
    for escape, character in ((rb"\/", b"/"), (rb"\u002B", b"+"), (rb"\n", b""), (rb"\r", b"")):
        text = text.replace(escape, character)
    if text.count(b"\\") > _MAX_OTHER_ESCAPES:
        raise ValueError("not base64")
    return str(pydantic_core.from_json(b'"%s"' % text)).encode() if b"\\" in text else text


async def iterate_async(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    """Yield the pieces of an ordinary iterable."""
    for piece in pieces:
        yield piece
