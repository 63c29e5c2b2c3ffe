"""What an image is, detected from its first bytes and never from its name."""

# JPEG: ISO/IEC 10918-1 (start of image, then a marker). PNG: RFC 2083 §3.1. WebP: RFC 9649 §2.4.
_JPEG = b"\xff\xd8\xff"
_PNG = b"\x89PNG\r\n\x1a\n"
_RIFF, _WEBP = b"RIFF", b"WEBP"
# Bytes that are needed to detect any type.
SIGNATURE_BYTES = 12


def media_type(content: bytes) -> str | None:
    """`image/jpeg`, `image/png` or `image/webp` by the content's signature, else None."""
    if content.startswith(_JPEG):
        return "image/jpeg"
    if content.startswith(_PNG):
        return "image/png"
    if content.startswith(_RIFF) and content[8:12] == _WEBP:
        return "image/webp"
    return None
