"""The type of a file is detected from its first bytes; a refused file is named, with what to do."""

import base64
import bz2
import codecs
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Iterator
from typing import Any

import pillow_heif
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import picture
from vqa_worker.messages.image_types import COMMON_TYPES, SIGNATURE_BYTES, SUFFIXES, describe, media_type

PDF = b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n"


def saved(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (48, 32)).save(buffer, kind, **options)
    return buffer.getvalue()


def heif(*, frames: int = 1, **options: Any) -> bytes:
    buffer = io.BytesIO()
    file = pillow_heif.from_pillow(Image.new("RGB", (64, 64)))
    for _ in range(frames - 1):
        file.add_from_pillow(Image.new("RGB", (64, 64)))
    file.save(buffer, **options)
    return buffer.getvalue()


def ftyp(*brands: bytes) -> bytes:
    """Return the first box of a file, with its major brand and its compatible brands."""
    content = brands[0] + bytes(4) + b"".join(brands[1:])
    return (8 + len(content)).to_bytes(4, "big") + b"ftyp" + content + b"\0\0\0\x08free"


RED = Image.new("RGB", (48, 32), "red")
IMAGES = {
    "jpeg": (picture("JPEG"), "image/jpeg"),
    "jpeg cmyk": (saved("JPEG", "CMYK"), "image/jpeg"),
    "jpeg mpf": (saved("MPO"), "image/jpeg"),
    "png": (picture("PNG"), "image/png"),
    "webp": (picture("WEBP"), "image/webp"),
    "webp lossless": (saved("WEBP", lossless=True), "image/webp"),
    "gif": (saved("GIF"), "image/gif"),
    "gif 87a": (b"GIF87a" + saved("GIF")[6:], "image/gif"),
    "tiff": (saved("TIFF"), "image/tiff"),
    "tiff big endian": (b"MM\0*\0\0\0\x08", "image/tiff"),
    "bigtiff": (saved("TIFF", big_tiff=True), "image/tiff"),
    "bigtiff big endian": (b"MM\0+\0\x08\0\0", "image/tiff"),
    "bmp": (saved("BMP"), "image/bmp"),
    "bmp of os/2": (b"BM" + bytes(12) + b"\x0c\0\0\0", "image/bmp"),
    "jp2": (saved("JPEG2000"), "image/jp2"),
    "jp2 codestream": (saved("JPEG2000", no_jp2=True), "image/jp2"),
    "heic": (heif(), "image/heic"),
    "heic with two images": (heif(frames=2), "image/heic"),
    "avif": (saved("AVIF"), "image/avif"),
    "avif sequence": (saved("AVIF", save_all=True, append_images=[RED]), "image/avif"),
    "pdf": (saved("PDF"), "application/pdf"),
    "pdf after junk": (b"\x1b%-12345X@PJL ENTER LANGUAGE=PDF\r\n" + PDF, "application/pdf"),
    "pdf after a byte order mark": (codecs.BOM_UTF8 + PDF, "application/pdf"),
    "pdf after white space": (b"\r\n \t" + PDF, "application/pdf"),
    "pdf at the last place": (b"\n" * (SIGNATURE_BYTES - 6) + PDF, "application/pdf"),
    **{
        f"brands {b'/'.join(brands).decode()}": (ftyp(*brands), kind)
        for kind, several in {
            "image/heic": (
                (b"heic", b"mif1", b"heic"), (b"mif1", b"heic", b"mif1"), (b"heix", b"mif1"), (b"heim",),
                (b"heis",), (b"hevc", b"msf1", b"iso8"), (b"hevx",), (b"msf1", b"hevc"), (b"mif1",),
                (b"MiHB", b"mif1", b"heic"),
                (b"heic", b"mif1", b"avif"), (b"avci", b"mif1"),
            ),
            "image/avif": (
                (b"avif", b"mif1", b"miaf"), (b"avis", b"msf1", b"iso8"), (b"mif1", b"miaf", b"avif"),
                (b"miaf", b"avif"),
            ),
        }.items()
        for brands in several
    },
}  # fmt: skip


@pytest.mark.parametrize(("content", "kind"), IMAGES.values(), ids=IMAGES.keys())
def test_an_image_is_detected_from_its_first_bytes(content: bytes, kind: str) -> None:
    assert media_type(content) == media_type(content[:SIGNATURE_BYTES]) == kind
    assert describe(content) == f"of the type {kind}: convert it to JPEG, PNG or WebP"


def test_each_type_has_a_suffix() -> None:
    assert set(SUFFIXES) == {kind for _, kind in IMAGES.values()}
    assert set(COMMON_TYPES) < set(SUFFIXES)


def archive(kind: str, name: str, content: bytes = b"x") -> bytes:
    buffer = io.BytesIO()
    if kind == "tar":
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    else:
        with zipfile.ZipFile(buffer, "w") as zipped:
            zipped.writestr(name, content)
    return buffer.getvalue()


S3_ERROR = b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>NoSuchKey</Code><Key>secret</Key></Error>'
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9"/>'
HTML = b"<!DOCTYPE html>\n<html lang=en><svg></svg>"
FORM = b'------WebKitFormBoundaryx\r\nContent-Disposition: form-data; name="file"\r\n\r\n'
JPEG = picture("JPEG")
OTHERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty: the upload failed"),
    "zeros": (bytes(9), "only zero bytes: the upload failed"),
    "many zeros": (bytes(9999), "only zero bytes: the upload failed"),
    "zeros, then more": (bytes(999) + b"x", "of an unknown type (it begins with 00 00 00 00)"),
    "html": (HTML, "an HTML page: check"),
    "html in upper case": (b"<HTML><BODY>", "an HTML page: check"),
    "html after a byte order mark": (codecs.BOM_UTF8 + b"\r\n" + HTML, "an HTML page: check"),
    "html after a comment": (b"<!-- saved --><html>", "an HTML page: check"),
    "html in UTF-16": (HTML.decode().encode("utf-16"), "an HTML page: check"),
    "html in UTF-16 of big endian": (codecs.BOM_UTF16_BE + HTML.decode().encode("utf-16-be"), "an HTML"),
    "xhtml": (b'<?xml version="1.0"?><html xmlns="x">', "an HTML page: check"),
    "html with a PDF": (HTML + PDF, "an HTML page: check"),
    "head": (b" <head><title>502</title>", "an HTML page: check"),
    "s3 error": (S3_ERROR, "an XML error document"),
    "error without declaration": (b"<Error><Code>AccessDenied", "an XML error document"),
    "svg": (SVG, "an SVG drawing: render it to PNG"),
    "svg with declaration": (b'<?xml version="1.0"?>\n<!DOCTYPE svg PUBLIC "x">' + SVG, "an SVG drawing"),
    "svg with prefix in capitals": (codecs.BOM_UTF8 + b" <SVG>", "an SVG drawing"),
    "xml": (b"<?xml version='1.0'?><rss/>", "an XML document"),
    "multipart": (FORM + JPEG, "a multipart form: store only the file in it"),
    "multipart with a PDF": (FORM + PDF, "a multipart form"),
    "multipart without boundary": (b"content-type: image/jpeg\r\n\r\n" + JPEG, "a multipart form"),
    "base64 of a JPEG": (base64.b64encode(JPEG), "base64 text: decode it before storing"),
    "base64 in lines": (base64.encodebytes(JPEG), "base64 text"),
    "base64 in quotes": (b'"' + base64.b64encode(JPEG)[:92] + b'"\n', "base64 text"),
    "base64 for URLs": (base64.urlsafe_b64encode(b"\xff\xef" * 99), "base64 text"),
    "hexadecimal": (JPEG.hex().encode(), "hexadecimal text"),
    "data URL": (b"data:image/jpeg;base64," + base64.b64encode(JPEG), "a data URL"),
    "gzip": (gzip.compress(JPEG), "a gzip file: "),
    "bzip2": (bz2.compress(JPEG), "a bzip2 file: "),
    "xz": (lzma.compress(JPEG), "an xz file: "),
    "zstandard": (b"\x28\xb5\x2f\xfd" + bytes(9), "a Zstandard file: "),
    "zip": (archive("zip", "a.jpg"), "a ZIP archive: store the files"),
    "zip with a PDF": (archive("zip", "a.pdf", PDF), "a ZIP archive: store the files"),
    "docx": (archive("zip", "[Content_Types].xml"), "an Office document: export it as PDF"),
    "odt": (archive("zip", "mimetype", b"application/vnd.oasis.opendocument.text"), "an Office document"),
    "doc": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(504), "an Office document"),
    "rtf": (rb"{\rtf1\ansi", "an Office document"),
    "tar": (archive("tar", "a.jpg"), "an archive: "),
    "json": (json.dumps({"error": "secret"}).encode(), "JSON: check the URL or the key"),
    "json after white space": (b"\n [1]", "JSON: "),
    "mp4": (ftyp(b"isom", b"iso2", b"avc1", b"mp41"), "a video (MP4/QuickTime): extract a frame"),
    "quicktime": (ftyp(b"qt  "), "a video (MP4/QuickTime)"),
    "old quicktime": (b"\0\0\x10\0moov", "a video (MP4/QuickTime)"),
    "matroska": (b"\x1a\x45\xdf\xa3\x01", "a video: extract a frame"),
    "avi": (b"RIFF\x24\0\0\0AVI LIST", "a video: "),
    "wave": (b"RIFF\x24\0\0\0WAVEfmt ", "an audio file"),
    "mp3": (b"ID3\x04", "an audio file"),
    "m4a": (ftyp(b"M4A "), "an audio file"),
    "jpeg xl": (b"\xff\x0a\xfa\x1f", "a JPEG XL image: "),
    "jpeg xl in boxes": (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL image: "),
    "psd": (b"8BPS\0\1", "a Photoshop file: "),
    "ico": (picture("ICO"), "an icon (ICO): convert it to PNG"),
    "eps": (saved("EPS"), "a PostScript (EPS) file: "),
    "eps with preview": (b"\xc5\xd0\xd3\xc6" + bytes(9), "a PostScript (EPS) file: "),
    "dicom": (bytes(128) + b"DICM\x02", "a DICOM file: "),
    "cr2": (b"II*\0\x10\0\0\0CR\x02\0", "a camera's raw file: "),
    "cr3": (ftyp(b"crx ", b"crx ", b"isom"), "a camera's raw file: "),
    "dds": (saved("DDS"), "an image of a rare type: "),
    "ppm": (saved("PPM"), "an image of a rare type: "),
    "jpeg as text": (JPEG.decode("utf-8", "replace").encode(), "binary data that was converted"),
    "png as text": (picture().decode("utf-8", "replace").encode(), "binary data that was converted"),
    "jpeg as latin-1": (JPEG.decode("latin-1").encode(), "binary data that was converted"),
    "png with changed line ends": (picture().replace(b"\r\n", b"\n"), "binary data that was converted"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer: "),
    "text": (b"Not found: secret", "plain text: check the URL or the key"),
    "text in other scripts": ("Страница не найдена".encode() * 20, "plain text: "),
    "text with a byte order mark": (codecs.BOM_UTF8 + "für später".encode(), "plain text: "),
    "text about a PDF": (b"%PDF- is the beginning", "plain text: "),
    "pdf too far": (b"\n" * (SIGNATURE_BYTES - 5) + PDF, "plain text: "),
    "bytes": (b"\x01\x02\x03\x04secret", "of an unknown type (it begins with 01 02 03 04)"),
    "cut signature": (b"\xff\xd8", "of an unknown type (it begins with FF D8)"),
    "white space before a JPEG": (b" \xff\xd8\xff", "of an unknown type (it begins with 20 FF D8 FF)"),
    "tga": (saved("TGA"), "of an unknown type (it begins with 00 00 "),
}  # fmt: skip


@pytest.mark.parametrize(("content", "expected"), OTHERS.values(), ids=OTHERS.keys())
def test_other_content_is_named_and_not_quoted(content: bytes, expected: str) -> None:
    assert media_type(content) is None
    assert describe(content).startswith(expected)
    assert "secret" not in describe(content)
    if any(content[:SIGNATURE_BYTES]):
        assert describe(content[:SIGNATURE_BYTES]) == describe(content)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff", b"\xff\xd8", b"\x89PNG", b"\x89PNG\r\n\x1a", b"\x89PNG\n\x1a\n12345678",
        b"RIFF", b"WEBP", b"RIFF\0\0\0\0", b"RIFF\0\0\0\0WEB", b"RIFFWEBP", b"RIFX\0\0\0\0WEBP",
        b"GIF88a", b"II*", b"BMW is a brand of cars", b"%PDF-", b" \xff\xd8\xff", b"\0\0\0\x18ftyp",
    ],
)  # fmt: skip
def test_an_incomplete_signature_is_not_an_image(content: bytes) -> None:
    assert media_type(content) is None
    assert describe(content)


def beginnings() -> Iterator[bytes]:
    for content, _ in [*IMAGES.values(), *OTHERS.values()]:
        yield from (content[:length] for length in (*range(1, 40), 128, 300))


def test_every_beginning_has_a_description_of_one_line() -> None:
    for content in beginnings():
        text = describe(content)
        assert text.isascii()
        assert text.isprintable()
        assert len(text) < 100
        kind = media_type(content)
        assert kind is None or kind in SUFFIXES


@given(start=st.sampled_from([b"", *set(beginnings())]), rest=st.binary(max_size=600))
def test_any_bytes_are_accepted(start: bytes, rest: bytes) -> None:
    kind, text = media_type(start + rest), describe(start + rest)
    assert (kind is not None) == text.startswith("of the type ")
    assert media_type((start + rest)[:SIGNATURE_BYTES]) == kind
