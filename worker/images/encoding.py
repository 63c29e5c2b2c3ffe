"""Convert images to base64 and back in pieces, so that no large image is in memory as a whole."""

import re
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Self

import pybase64
import pydantic_core

_WHITE_SPACE = bytes(range(9, 14)) + b" "
# The alphabet of URLs and file names (RFC 4648 §5).
_FROM_URL_SAFE = bytes.maketrans(b"-_", b"+/")
# What percent-encoding makes of base64 in a data URL.
_PERCENT_ENCODED = {
    b"%2B": b"+", b"%2b": b"+", b"%2F": b"/", b"%2f": b"/", b"%3D": b"=", b"%3d": b"=",
    b"%0A": b"\n", b"%0a": b"\n", b"%0D": b"\r", b"%0d": b"\r", b"%20": b" ",
}  # fmt: skip
_WRONG = re.compile(rb"[^A-Za-z0-9+/_=%\t-\r -]|%(?!2[BbFf]|3[Dd]|0[ADad]|20)")
_AFTER_PADDING = re.compile(rb"(?:=|%3[Dd])(?:[\t-\r ]|%0[ADad]|%20)*+(?!=|%3[Dd]|\Z)")
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
    """Decode base64 with JSON escapes, slice by slice.

    Like browsers, accept white space, no padding and percent-encoding; accept the URL-safe alphabet too.

    Raises:
        ValueError: the base64 is invalid; the message names the first wrong character and its position.
    """
    remainder, is_padded, position = b"", False, 0
    for escaped in _slices(text):
        plain = _unescape(escaped)
        part = remainder + _unquote(plain).translate(_FROM_URL_SAFE, _WHITE_SPACE)
        length = len(part) - len(part) % 4
        if is_padded and part:
            raise ValueError(_describe(plain, position, is_padded=True))
        whole, remainder = part[:length], part[length:]
        is_padded = is_padded or whole.endswith(b"=")
        try:
            piece = pybase64.b64decode(whole, validate=True)
        except ValueError:
            raise ValueError(_describe(plain, position)) from None
        if is_padded and remainder:
            raise ValueError(_describe(plain, position))
        yield piece
        position += len(plain)
    try:
        yield pybase64.b64decode(remainder + b"=" * (-len(remainder) % 4), validate=True)
    except ValueError:
        raise ValueError(_describe(remainder, max(0, position - len(remainder)))) from None


def _unquote(text: bytes) -> bytes:
    if b"%" in text:
        for encoded, character in _PERCENT_ENCODED.items():
            text = text.replace(encoded, character)
    return text


def _describe(text: bytes, position: int, *, is_padded: bool = False) -> str:
    """Say what is wrong in a slice that begins at a position; `is_padded`: padding comes before it."""
    wrong = _WRONG.search(text)
    after = re.search(rb"[^\t-\r ]", text) if is_padded else _AFTER_PADDING.search(text)
    if wrong is not None and (after is None or wrong.start() <= after.end()):
        character = text[wrong.start() : wrong.start() + 4].decode(errors="replace")[0]
        return f"character {position + wrong.start() + 1} is {character!r}"
    if after is not None:
        start = after.start() if is_padded else after.end()
        return f"character {position + start + 1} comes after the padding"
    return "its end is missing or its padding is wrong"


def _slices(text: memoryview) -> Iterator[bytes]:
    """Yield slices that end between JSON escapes and percent-encoded characters."""
    position = 0
    while position < len(text):
        part = bytes(text[position : position + _SLICE_CHARS])
        if len(part) == _SLICE_CHARS:
            part = part[: _last_escape(part)]
        position += len(part)
        yield part


def _last_escape(part: bytes) -> int:
    """Return where an escape begins that may be incomplete; the length if there is none."""
    escape = part.rfind(b"\\", len(part) - _ESCAPE_CHARS)
    if escape < 0:
        escape = part.rfind(b"%", len(part) - 2)
    return escape if escape >= 0 else len(part)


def _unescape(text: bytes) -> bytes:
    if b"\\" not in text:
        return text
    # PHP escapes slashes, .NET plus signs, MIME encoders insert line breaks: far faster than parsing them.
    for escape, character in ((rb"\/", b"/"), (rb"\u002B", b"+"), (rb"\n", b""), (rb"\r", b"")):
        text = text.replace(escape, character)
    if text.count(b"\\") > _MAX_OTHER_ESCAPES:
        raise ValueError("it has too many JSON escapes")
    return str(pydantic_core.from_json(b'"%s"' % text)).encode() if b"\\" in text else text


async def iterate_async(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    """Yield the pieces of an ordinary iterable."""
    for piece in pieces:
        yield piece
