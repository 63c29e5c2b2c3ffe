"""Decode compressed responses. The worker announces what it can decode; not every gateway keeps to it."""

import zlib
from typing import Final

import httpx2

ACCEPT_ENCODING: Final = "gzip, deflate"
# Twice what RabbitMQ takes in a message by default (16 MiB); it is decoded in less than 0.2 s.
MAX_RESPONSE_BYTES: Final = 32 * 1024 * 1024

_IDENTITY: Final = frozenset({"", "identity", "none", "utf-8"})
_GZIP: Final = frozenset({"gzip", "x-gzip", "deflate"})
_GZIP_START: Final = b"\x1f\x8b"
# zlib.decompressobj: gzip or zlib by its header; deflate without a header, as some servers send it.
_ANY_HEADER, _NO_HEADER = 47, -15
_JSON_STARTS: Final = (b"{", b"[", b"data:", b":")


def decode_content(content: bytes, encodings: str) -> bytes:
    """Return the body of a response without its content encodings.

    Args:
        content: the body as it was received.
        encodings: the header `Content-Encoding`, a comma-separated list; the last one was applied last.

    Raises:
        httpx2.DecodingError: the body is not encoded as the header says, or not in a way that can be decoded,
            or it is larger than MAX_RESPONSE_BYTES.
    """
    for name in reversed([encoding.strip().lower() for encoding in encodings.split(",")]):
        if name in _IDENTITY:
            continue
        # A proxy may have decoded the body and left the header.
        if content.lstrip().startswith(_JSON_STARTS):
            return content
        if name not in _GZIP:
            raise httpx2.DecodingError(f"the body is encoded as {name[:20]!r}, which was not requested")
        content = _inflate(content, name)
    # One may also have dropped the header. No text begins like this.
    return _inflate(content, "gzip") if content.startswith(_GZIP_START) else content


def check_size(content: bytes | bytearray) -> None:
    """Raise DecodingError if a body is too large."""
    if len(content) > MAX_RESPONSE_BYTES:
        raise httpx2.DecodingError(f"the body has more than {MAX_RESPONSE_BYTES} bytes")


def _inflate(content: bytes, name: str) -> bytes:
    for header in (_ANY_HEADER, _NO_HEADER):
        decoder = zlib.decompressobj(header)
        try:
            decoded = decoder.decompress(content, MAX_RESPONSE_BYTES + 1)
        except zlib.error:
            continue
        check_size(decoded)
        if decoder.eof:
            return decoded
    raise httpx2.DecodingError(f"the body cannot be decoded as {name}")
