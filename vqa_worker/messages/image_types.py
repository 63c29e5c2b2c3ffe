"""Detect what a file is from its first bytes, not its name."""

import codecs
import re
from collections.abc import Mapping
from typing import Final

# Enough bytes for each function of this module.
SIGNATURE_BYTES: Final = 512
# Every provider accepts them.
COMMON_TYPES: Final = ("image/jpeg", "image/png", "image/webp")
# Suffixes of file names, by media type: every type that `media_type` returns.
SUFFIXES: Final[Mapping[str, str]] = {
    "image/jpeg": "jpg", "image/png": "png", "image/webp": "webp", "image/heic": "heic", "image/avif": "avif",
    "image/gif": "gif", "image/tiff": "tif", "image/bmp": "bmp", "image/jp2": "jp2", "application/pdf": "pdf",
}  # fmt: skip

# JPEG: ISO/IEC 10918-1 B.2.1 (start of image, then a marker). PNG: PNG 3rd edition, 5.2. GIF: GIF89a, 17.
# TIFF: TIFF 6.0, section 2; BigTIFF has version 43. JPEG 2000: ISO/IEC 15444-1, I.5.1 and A.4.1.
_SIGNATURES: Final = {
    b"\xff\xd8\xff": "image/jpeg",
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"GIF87a": "image/gif", b"GIF89a": "image/gif",
    b"II*\0": "image/tiff", b"MM\0*": "image/tiff", b"II+\0": "image/tiff", b"MM\0+": "image/tiff",
    b"\0\0\0\x0cjP  \r\n\x87\n": "image/jp2", b"\xff\x4f\xff\x51": "image/jp2",
}  # fmt: skip
# Lengths of the header that follows the file header of a BMP, which begins with its length.
_BMP_HEADERS: Final = (12, 16, 40, 52, 56, 64, 108, 124)
# Brands of HEIF: ISO/IEC 23008-12, 10.2 and annexes B to L. AVIF: AV1 Image File Format, 6.
_HEVC: Final = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"))
_HEIF: Final = _HEVC | {b"mif1", b"mif2", b"msf1", b"miaf", b"avci", b"avcs", b"jpeg", b"jpgs", b"j2ki"}
_AVIF: Final = frozenset((b"avif", b"avis"))

_HTML: Final = "an HTML page: check the URL or the key"
_ARCHIVE: Final = "an archive: store the files in it one by one"
_OFFICE: Final = "an Office document: export it as PDF"
_VIDEO: Final = "a video: extract a frame"
_MP4: Final = "a video (MP4/QuickTime): extract a frame"
_RAW: Final = "a camera's raw file: export it as JPEG"
_JPEG_XL: Final = "a JPEG XL image: convert it to PNG or JPEG"
_POSTSCRIPT: Final = "a PostScript (EPS) file: convert it to PDF or PNG"
_AS_TEXT: Final = "binary data that was converted as if it were text: store the file unchanged"
_OTHER_IMAGE: Final = "an image of a rare type: convert it to PNG or JPEG"

# Position, bytes there, what it is. The first match counts.
_LOOK_ALIKES: Final = (
    (4, b"ftypcrx ", _RAW), (4, b"ftypM4A ", "an audio file"),
    (4, b"ftyp", _MP4), (4, b"moov", _MP4), (4, b"mdat", _MP4), (4, b"wide", _MP4),
    (0, b"\x1a\x45\xdf\xa3", _VIDEO), (8, b"AVI LIST", _VIDEO),
    (0, b"\0\0\x01\xba", _VIDEO), (0, b"FLV\x01", _VIDEO),
    (8, b"WAVE", "an audio file"), (0, b"ID3", "an audio file"), (0, b"OggS", "an audio file"),
    (0, b"fLaC", "an audio file"),
    (0, b"\x1f\x8b", "a gzip file: decompress it, or store it with Content-Encoding: gzip"),
    (0, b"\x28\xb5\x2f\xfd", "a Zstandard file: decompress it before storing"),
    (0, b"BZh", "a bzip2 file: decompress it before storing"),
    (0, b"\xfd7zXZ\0", "an xz file: decompress it before storing"),
    (0, b"7z\xbc\xaf\x27\x1c", _ARCHIVE), (0, b"Rar!\x1a\x07", _ARCHIVE), (257, b"ustar", _ARCHIVE),
    (30, b"[Content_Types].xml", _OFFICE), (30, b"_rels/", _OFFICE), (30, b"docProps/", _OFFICE),
    (30, b"mimetypeapplication/vnd.oasis", _OFFICE), (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", _OFFICE),
    (0, b"{\\rtf", _OFFICE), (0, b"PK\x03\x04", "a ZIP archive: store the files in it one by one"),
    (0, b"PK\x05\x06", "an empty ZIP archive"),
    (0, b"\xff\x0a", _JPEG_XL), (0, b"\0\0\0\x0cJXL \r\n\x87\n", _JPEG_XL),
    (0, b"8BPS", "a Photoshop file: export it as PNG or JPEG"),
    (0, b"gimp xcf", "a GIMP file: export it as PNG or JPEG"),
    (0, b"\0\0\x01\0", "an icon (ICO): convert it to PNG"),
    (0, b"%!PS", _POSTSCRIPT), (0, b"\xc5\xd0\xd3\xc6", _POSTSCRIPT),
    (128, b"DICM", "a DICOM file: export its frames as PNG"),
    (8, b"CR\x02", _RAW), (0, b"FUJIFILMCCD-RAW", _RAW), (0, b"IIRO", _RAW), (0, b"IIU\0", _RAW),
    (0, b"AT&TFORM", "a DjVu document: convert it to PDF"),
    (0, b"II\xbc\x01", _OTHER_IMAGE), (0, b"\x76\x2f\x31\x01", _OTHER_IMAGE),
    (0, b"#?RADIANCE", _OTHER_IMAGE),
    (0, b"qoif", _OTHER_IMAGE), (0, b"DDS ", _OTHER_IMAGE), (0, b"\xd7\xcd\xc6\x9a", _OTHER_IMAGE),
    (40, b" EMF", _OTHER_IMAGE), (0, b"\x97JB2\r\n\x1a\n", _OTHER_IMAGE), (0, b"SIMPLE  =", _OTHER_IMAGE),
    # An image that was decoded as UTF-8 or Latin-1 and encoded as UTF-8, or whose line ends were changed.
    (0, b"\xef\xbf\xbd\xef\xbf\xbd", _AS_TEXT), (0, b"\xef\xbf\xbdPNG", _AS_TEXT),
    (0, b"\xc3\xbf\xc3\x98\xc3\xbf", _AS_TEXT), (0, b"\xc2\x89PNG", _AS_TEXT), (0, b"\x89PNG", _AS_TEXT),
)  # fmt: skip
# The same for text in lower case, without a byte order mark and leading white space.
_TEXTS: Final = (
    (r"<!doctype html|<(html|head|body|title|meta|script)\b", _HTML),
    (r"<[^>]*>?\s*<?error\b|<error\b|<\?xml[^>]*>\s*<error\b",
     "an XML error document (as S3 sends it): check the URL, the key and the permissions"),
    (r"<(.*<)?svg\b", "an SVG drawing: render it to PNG"),
    (r"<(.*<)?html\b", _HTML),
    (r"<[?!a-z]", "an XML document: check the URL or the key"),
    (r"(--[^\r\n]*\r?\n)?content-(disposition|type):", "a multipart form: store only the file in it"),
    (r"data:[a-z]+/", "a data URL: decode it before storing"),
    (r"version https://git-lfs", "a Git LFS pointer: store the file that it stands for"),
    (r"[{\[]", "JSON: check the URL or the key"),
    (r"p[1-6]\s+(#.*\s)?\d+\s", _OTHER_IMAGE),
)  # fmt: skip
_TEXT_PATTERNS: Final = tuple((re.compile(p.encode(), re.DOTALL), phrase) for p, phrase in _TEXTS)
_HEX: Final = re.compile(rb"[0-9A-Fa-f]{32,}")
_BASE64: Final = re.compile(rb"[A-Za-z0-9+/_-]{64,}={0,2}")
_PDF: Final = re.compile(rb"%PDF-\d")


def media_type(content: bytes) -> str | None:
    """Return the media type of an image or a PDF from its first `SIGNATURE_BYTES`; None for others."""
    if content[8:11] == b"CR\x02":  # a raw file of Canon, which looks like a TIFF
        return None
    for signature, kind in _SIGNATURES.items():
        if content.startswith(signature):
            return kind
    # RFC 9649 §2.4.
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return "image/webp"
    if content.startswith(b"BM") and int.from_bytes(content[14:18], "little") in _BMP_HEADERS:
        return "image/bmp"
    if content[4:8] == b"ftyp":
        return _heif_type(content)
    return "application/pdf" if _is_pdf(content) else None


def describe(content: bytes) -> str:
    """Return what a refused file is, and what to do; the phrase follows "the content is ".

    It never quotes the content, which may be confidential, except for four bytes of an unknown type.
    `content`: the whole file, or its first `SIGNATURE_BYTES`.
    """
    if not content:
        return "empty: the upload failed"
    if content.count(0) == len(content):
        return "only zero bytes: the upload failed"
    content = content[:SIGNATURE_BYTES]
    kind = media_type(content)
    if kind is not None:
        return f"of the type {kind}: convert it to JPEG, PNG or WebP"
    unknown = f"of an unknown type (it begins with {content[:4].hex(' ').upper()})"
    return _look_alike(content) or _encoded_text(content) or unknown


def _heif_type(content: bytes) -> str | None:
    """Return the type from the brands in the `ftyp` box (ISO/IEC 14496-12, 4.3); None for a video."""
    length = min(int.from_bytes(content[:4], "big"), SIGNATURE_BYTES)
    major = content[8:12]
    brands = {major, *(content[start : start + 4] for start in range(16, length - 3, 4))}
    if major not in _HEVC and brands & _AVIF:
        return "image/avif"
    return "image/heic" if brands & _HEIF else None


def _is_pdf(content: bytes) -> bool:
    """Return whether it is a PDF; readers accept bytes before the header (ISO 32000-1, annex H, note 13)."""
    header = _PDF.search(content, 0, SIGNATURE_BYTES)
    return header is not None and (header.start() == 0 or _look_alike(content[:SIGNATURE_BYTES]) is None)


def _look_alike(content: bytes) -> str | None:
    for position, signature, phrase in _LOOK_ALIKES:
        if content.startswith(signature, position):
            return phrase
    text = _normalized(content)
    return next((phrase for pattern, phrase in _TEXT_PATTERNS if pattern.match(text)), None)


def _normalized(content: bytes) -> bytes:
    """Return text in UTF-8 and lower case, without a byte order mark and leading white space."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        content = content.decode("utf-16", "ignore").encode("utf-8", "ignore")
    return content.removeprefix(codecs.BOM_UTF8).lstrip().lower()


def _encoded_text(content: bytes) -> str | None:
    compact = content.translate(None, b"\r\n").strip(b" \t\"'")
    if _HEX.fullmatch(compact):
        return "hexadecimal text: decode it before storing"
    if _BASE64.fullmatch(compact):
        return "base64 text: decode it before storing"
    try:
        # The last character may be incomplete.
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(content)
    except UnicodeDecodeError:
        return None
    is_text = "".join(text.split()).isprintable() and len(text) > 3  # noqa: PLR2004 a BOM or a marker is not text
    return "plain text: check the URL or the key" if is_text else None
