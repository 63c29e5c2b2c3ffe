"""Decompress the body of a message by its `content_encoding`, within a size limit."""

import re
import zlib
from typing import Final

# Many clients name a character set here (Celery: "utf-8"); the others are MIME's for "not encoded".
_NOT_ENCODED: Final = frozenset({"identity", "utf-8", "utf8", "us-ascii", "ascii", "binary", "8bit", "7bit"})
# RFC 9110, §8.4.1: x-gzip is the same as gzip.
_GZIP: Final = frozenset({"gzip", "x-gzip"})
_DEFLATE: Final = "deflate"
ACCEPTED: Final = "gzip, deflate, identity and utf-8"
MAX_NAME_CHARS = 40
# A gzip file can have several members (RFC 1952, §2.2); each one costs a copy of the rest of the body.
MAX_GZIP_MEMBERS = 16
# zlib's window sizes for gzip, zlib (RFC 1950) and raw deflate (RFC 1951).
_GZIP_WBITS, _ZLIB_WBITS, _RAW_WBITS = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS, -zlib.MAX_WBITS
# Neither a gzip header nor the first byte of a compressed JSON object.
_PLAIN_OBJECT = re.compile(rb"(\xef\xbb\xbf)?[ \t\r\n]{0,64}\{")


class ContentEncodingError(Exception):
    """The body cannot be decompressed; the message says why.

    Attributes:
        beginning: of the decompressed body, if that is only too large.
    """

    def __init__(self, message: str, beginning: bytes = b"") -> None:
        super().__init__(message)
        self.beginning = beginning


def is_encoded(content_encoding: str | None) -> bool:
    """Return whether `decompress` has to look at a body with this `content_encoding`."""
    return content_encoding is not None and _normal(content_encoding) not in _NOT_ENCODED


def decompress(body: bytes, content_encoding: str, max_bytes: int) -> bytes:
    """Return the decompressed body. It takes up to 0.1 s for 16 MB, most of it without Python's lock.

    A JSON object with the name of a compression is returned unchanged: it was never compressed.

    Args:
        body: of the message.
        content_encoding: of the message; case does not matter.
        max_bytes: of the decompressed body; decompression stops there.

    Raises:
        ContentEncodingError: the encoding is unknown, the body is damaged, or it has more than `max_bytes`.
    """
    encoding = _normal(content_encoding)
    if encoding not in _GZIP and encoding != _DEFLATE:
        shown = encoding[:MAX_NAME_CHARS] if encoding.isprintable() else "unprintable"
        raise ContentEncodingError(f"content_encoding {shown} is not supported: {ACCEPTED} are")
    if _PLAIN_OBJECT.match(body):
        return body
    try:
        return _gunzip(body, max_bytes) if encoding in _GZIP else _inflate(body, max_bytes)
    except zlib.error:
        raise ContentEncodingError(f"the body is not valid {encoding}, its content_encoding") from None


def _normal(content_encoding: str) -> str:
    return content_encoding.strip().lower()


def _inflate(body: bytes, max_bytes: int) -> bytes:
    """Decompress zlib, as RFC 9110 defines deflate, or raw deflate, which some clients send."""
    try:
        text, rest = _decompress(body, _ZLIB_WBITS, max_bytes)
    except zlib.error:
        text, rest = _decompress(body, _RAW_WBITS, max_bytes)
    if rest:
        raise ContentEncodingError("the body has more data after the end of its deflate stream")
    return text


def _gunzip(body: bytes, max_bytes: int) -> bytes:
    text, rest = _decompress(body, _GZIP_WBITS, max_bytes)
    for _ in range(MAX_GZIP_MEMBERS - 1):
        if not rest:
            return text
        text, rest = _decompress(rest, _GZIP_WBITS, max_bytes, text)
    if rest:
        raise ContentEncodingError(f"the body has more than {MAX_GZIP_MEMBERS} gzip members")
    return text


def _decompress(data: bytes, wbits: int, max_bytes: int, before: bytes = b"") -> tuple[bytes, bytes]:
    """Return `before` followed by the decompressed data, and the data after the end of the stream."""
    stream = zlib.decompressobj(wbits)
    text = before + stream.decompress(data, max_bytes - len(before) + 1)
    if len(text) > max_bytes:
        message = f"the decompressed body has more than {max_bytes} bytes, which VQA_MAX_JOB_BYTES allows"
        raise ContentEncodingError(message, text[:max_bytes])
    if not stream.eof:
        raise ContentEncodingError("the compressed body is incomplete")
    return text, stream.unused_data
