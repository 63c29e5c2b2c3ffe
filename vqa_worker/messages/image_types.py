"""Detect the type of an image from its first bytes, not its name."""

# JPEG: ISO/IEC 10918-1 (start of image, then a marker). PNG: RFC 2083 §3.1. WebP: RFC 9649 §2.4.
_JPEG = b"\xff\xd8\xff"
_PNG = b"\x89PNG\r\n\x1a\n"
_RIFF, _WEBP = b"RIFF", b"WEBP"
# Enough bytes to detect each of them.
SIGNATURE_BYTES = 12


def media_type(content: bytes) -> str | None:
    """Return `image/jpeg`, `image/png` or `image/webp` from the signature, or None."""
    if content.startswith(_JPEG):
        return "image/jpeg"
    if content.startswith(_PNG):
        return "image/png"
    if content.startswith(_RIFF) and content[8:12] == _WEBP:
        return "image/webp"
    return None
