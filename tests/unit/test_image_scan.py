"""The scan of an image agrees with Pillow, reports an incomplete file, and never raises."""

import random
import struct
import time
import warnings
import zlib
from functools import cache
from io import BytesIO
from typing import Any, NamedTuple

import pybase64
import pytest
from PIL import Image

from vqa_worker.messages.image_types import media_type
from worker.images.end_search import WHOLE_BYTES
from worker.images.exif import read_orientation
from worker.images.scan import HEADER_BYTES, Scan, scan_for

SIZE = (37, 23)
WHOLE = 2**40
PIECES = (1, 7, 100, 4096, WHOLE)
SOI = b"\xff\xd8\xff"
EOI = b"\xff\xd9"
EXIF = b"Exif\0\0"
ORIENTATION = 0x0112


class Result(NamedTuple):
    """All that a scan returns."""

    width: int | None
    height: int | None
    orientation: int = 1
    is_cmyk: bool = False
    is_16_bit: bool = False
    is_animated: bool = False
    has_header: bool = True
    is_orientation_unknown: bool = False
    checked: str | None = None
    fault: str | None = None


def scan(content: bytes, piece: int = WHOLE, kind: str | None = None) -> Result:
    """Scan a file in pieces, again if needed, as the loader does; check that the header does not change."""
    kind = kind or media_type(content)
    assert kind is not None
    found = scan_for(kind)
    header: tuple[Any, ...] | None = None
    for start in range(0, len(content), piece):
        found.feed(content[start : start + piece])
        if header is None and found.has_header:
            header = header_of(found)
    assert header is None or header == header_of(found)
    checked, fault = found.check(len(content)), found.finish()
    if found.needs_search:
        assert fault is not None
        again = scan_for(kind, thorough=True)
        for start in range(0, len(content), piece):
            again.feed(content[start : start + piece])
        fault = again.finish()
        assert not again.needs_search
    return Result(
        found.width, found.height, found.orientation, found.is_cmyk, found.is_16_bit, found.is_animated,
        found.has_header, found.is_orientation_unknown, checked, fault,
    )  # fmt: skip


def header_of(found: Scan) -> tuple[Any, ...]:
    """Return the attributes that are final once there is a header."""
    orientation = None if media_of(found) == "webp" else found.orientation
    return found.width, found.height, found.is_cmyk, found.is_16_bit, found.is_animated, orientation


def media_of(found: Scan) -> str:
    return "webp" if type(found) is type(scan_for("image/webp")) else "other"


def randomness(seed: int | str) -> random.Random:
    return random.Random(seed)  # noqa: S311 the same each time


def exif(orientation: int, order: str = "<", *, thumbnail: bytes = b"") -> bytes:
    """Return EXIF with an orientation after another entry, and a thumbnail in IFD1."""
    start = b"II*\0" if order == "<" else b"MM\0*"
    entries = struct.pack(order + "HHIHH", 0x0100, 3, 1, 37, 0)
    entries += struct.pack(order + "HHIHH", ORIENTATION, 3, 1, orientation, 0)
    second = 8 + 2 + len(entries) + 4
    content = start + struct.pack(order + "IH", 8, 2) + entries
    if not thumbnail:
        return content + bytes(4)
    content += struct.pack(order + "IH", second, 2)
    content += struct.pack(order + "HHII", 0x0201, 4, 1, second + 30)
    content += struct.pack(order + "HHII", 0x0202, 4, 1, len(thumbnail))
    return content + bytes(4) + thumbnail


def noise(mode: str = "RGB", size: tuple[int, int] = SIZE) -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    return Image.frombytes(mode, size, randomness(1).randbytes(size[0] * size[1] * bands))


def saved(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = BytesIO()
    (image or noise()).save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(*chunks: bytes, depth: int = 8, interlace: int = 0, pixels: bytes | None = None) -> bytes:
    """Return a truecolour PNG with chunks before its pixels."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", *SIZE, depth, 2, 0, 0, interlace))
    if pixels is None:
        pixels = (b"\0" + bytes(SIZE[0] * 3 * depth // 8)) * SIZE[1]
    end = png_chunk(b"IDAT", zlib.compress(pixels)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + end


def frame_control() -> bytes:
    """Return a chunk before the pixels of the first frame (PNG 3rd edition, 11.3.6.2)."""
    return png_chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, *SIZE, 0, 0, 1, 10, 0, 0))


def interlaced_png() -> bytes:
    """Return a PNG with the passes of PNG 3rd edition, 8.1."""
    passes = (
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    )
    sizes = ((len(range(x, SIZE[0], dx)), len(range(y, SIZE[1], dy))) for x, y, dx, dy in passes)
    return png(interlace=1, pixels=b"".join((b"\0" + bytes(3 * width)) * height for width, height in sizes))


def insert(jpeg: bytes, *segments: bytes) -> bytes:
    """Return a JPEG with more at its beginning."""
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


@cache
def files() -> dict[str, bytes]:
    """Return files by name; an `@` precedes the length of what follows the end of the image."""
    frames = [noise().rotate(90 * turn) for turn in range(3)]
    several: dict[str, Any] = {"save_all": True, "append_images": frames[1:]}
    jpeg = saved("JPEG")
    movie = b"\0\0\0\x18ftypmp42" + randomness(2).randbytes(3000).replace(b"\xff", b"")
    thumbnail = saved("JPEG", noise(size=(16, 16)))
    mpo = saved("MPO", frames[0], **several)
    made = {
        "jpeg baseline": jpeg,
        "jpeg progressive": saved("JPEG", progressive=True),
        "jpeg restart markers": saved("JPEG", restart_marker_blocks=1),
        "jpeg grey": saved("JPEG", noise("L")),
        "jpeg cmyk with APP14": saved("JPEG", noise("CMYK")),
        "jpeg rgb with APP14": saved("JPEG", keep_rgb=True),
        "jpeg comment": saved("JPEG", comment=b"\xff\xd8\xff\xd9" * 9),
        "jpeg icc of 300 KB": saved("JPEG", icc_profile=randomness(3).randbytes(300_000)),
        "jpeg exif with thumbnail": saved("JPEG", exif=EXIF + exif(6, thumbnail=thumbnail)),
        "jpeg xmp before exif": insert(
            jpeg, segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x/>"), segment(0xE1, EXIF + exif(8))
        ),
        "jpeg fill bytes": insert(jpeg, b"\xff" * 70, segment(0xFE, b"text")[1:], b"\xff\xff\xff"),
        f"jpeg with an MP4 @{len(movie)}": jpeg + movie,
        f"jpeg with zeros @{2**12}": jpeg + bytes(2**12),
        f"jpeg mpf @{len(mpo) - mpo.index(EOI + SOI) - 2}": mpo,
        "png": saved("PNG"),
        "png palette": saved("PNG", noise().quantize(16), transparency=3),
        "png 1 bit": saved("PNG", noise("L").convert("1")),
        "png 16-bit grey": saved("PNG", Image.new("I;16", SIZE, 40_000)),
        "png 16-bit colour": png(depth=16),
        "png interlaced": interlaced_png(),
        "png apng": saved("PNG", frames[0], **several),
        "png apng of one frame": png(png_chunk(b"acTL", struct.pack(">II", 1, 0)), frame_control()),
        "png exif with prefix": png(png_chunk(b"eXIf", EXIF + exif(7))),
        "png icc and text": saved("PNG", icc_profile=bytes(5000)),
        "png with trailing data @500": saved("PNG") + bytes(500),
        "webp lossy": saved("WEBP"),
        "webp lossless": saved("WEBP", lossless=True),
        "webp alpha": saved("WEBP", noise("RGBA")),
        "webp alpha lossless": saved("WEBP", noise("RGBA"), lossless=True),
        "webp animated": saved("WEBP", frames[0], **several),
        "webp icc": saved("WEBP", icc_profile=bytes(3001)),
        "webp exif and icc": saved("WEBP", icc_profile=bytes(3001), exif=exif(5), xmp=b"<x/>"),
        "webp animated with exif": saved("WEBP", frames[0], exif=exif(3), **several),
        "webp with trailing data @77": saved("WEBP") + bytes(77),
    }  # fmt: skip
    for kind in ("jpeg", "png", "webp"):
        for order in "<>":
            for turn in range(1, 9):
                made[f"{kind} orientation {turn}{order}"] = saved(kind.upper(), exif=EXIF + exif(turn, order))
    return made


def names() -> list[str]:
    return list(files())


def complete_size(name: str) -> int:
    return len(files()[name]) - int(name.partition("@")[2] or 0)


# Complete files


@pytest.mark.parametrize("name", names())
def test_a_complete_file_scans_as_pillow_reads_it_whatever_the_pieces(name: str) -> None:
    content = files()[name]
    with Image.open(BytesIO(content)) as image:
        image.load()
        size, mode = image.size, image.mode
        orientation = image.getexif().get(ORIENTATION, 1)
        # What follows the first image of an MPO is not animation.
        is_animated = getattr(image, "is_animated", False) and image.format != "MPO"
    expected = Result(
        *size, orientation, is_cmyk=mode == "CMYK", is_16_bit="16-bit" in name, is_animated=is_animated
    )
    assert [scan(content, piece) for piece in PIECES] == [expected] * len(PIECES)
    assert orientation == int(name.partition("orientation ")[2][:-1] or orientation)


def test_the_header_is_known_early() -> None:
    for name, content in files().items():
        found = scan_for(f"image/{name.partition(' ')[0]}")
        pixels = content.find(b"IDAT") + 4 if "png" in name else 30 if "webp" in name else None
        found.feed(content[: pixels or content.rindex(b"\xff\xda") + 4])
        if pixels is not None or "progressive" not in name:
            assert found.has_header, name
            assert (found.width, found.height) == SIZE, name


def test_an_orientation_at_the_end_of_a_webp_is_unknown_until_it_was_fed() -> None:
    content = files()["webp exif and icc"]
    found, position = scan_for("image/webp"), content.index(b"EXIF")
    found.feed(content[:position])
    assert (found.has_header, found.is_orientation_unknown, found.orientation) == (True, True, 1)
    found.feed(content[position:])
    assert (found.is_orientation_unknown, found.orientation) == (False, 5)
    without = bytearray(saved("WEBP", noise("RGBA")))
    without[20] |= 0x08  # the flag of EXIF that is not there
    assert scan(bytes(without)).is_orientation_unknown is False


def test_a_jpeg_of_12_bits_counts_as_16_bit() -> None:
    content = bytearray(files()["jpeg baseline"])
    content[content.index(b"\xff\xc0") + 4] = 12
    assert scan(bytes(content)).is_16_bit


# Incomplete files


@pytest.mark.parametrize("name", names())
def test_every_cut_is_reported(name: str) -> None:
    end = complete_size(name)
    content = files()[name][:end]
    step = 1 if end < 6000 else 251
    for cut in {*range(0, end, step), *range(max(0, end - 300), end)}:
        kind = f"image/{name.partition(' ')[0]}"
        for piece in (WHOLE, 1000):
            assert scan(content[:cut], piece, kind).fault is not None, cut
    assert scan(content).fault is None


@pytest.mark.parametrize("name", [name for name in names() if "@" in name])
def test_what_follows_the_end_may_be_cut(name: str) -> None:
    for size in range(complete_size(name), len(files()[name]), 37):
        assert [scan(files()[name][:size], piece).fault for piece in (7, 100, WHOLE)] == [None] * 3


def test_a_webp_that_is_too_short_is_reported_with_its_header() -> None:
    content = files()["webp lossy"]
    found = scan_for("image/webp")
    found.feed(content[:30])
    assert found.check(len(content)) is None
    expected = f"the end of the image is missing (it has {len(content) - 1} of {len(content)} bytes)"
    assert found.check(len(content) - 1) == expected


def with_size(content: bytes, position: int, length: int) -> bytes:
    return content[:position] + bytes(length) + content[position + length :]


def test_dimensions_of_zero_are_reported_with_the_header() -> None:
    jpeg, plain, webp = (files()[name] for name in ("jpeg baseline", "png", "webp lossy"))
    for content in (
        with_size(jpeg, jpeg.index(b"\xff\xc0") + 5, 2),
        with_size(plain, 16, 4),
        with_size(webp, 26, 2),
    ):
        assert scan(content).checked == "its width or height is zero"


@pytest.mark.parametrize(
    ("content", "kind", "fault"),
    [
        (b"", "jpeg", "the end of the image is missing (the file ends in its header)"),
        (b"\xff\xd8\xff", "jpeg", "the end of the image is missing (the file ends in its header)"),
        (b"\xff\xd8\xff\xd9", "jpeg", "the image data is missing (no SOS marker)"),
        (b"\xff\xd8" + segment(0xDA, bytes(6)) + EOI, "jpeg", "its header is damaged (no SOF marker)"),
        (b"GIF89a", "jpeg", "it does not begin with a JPEG header"),
        (b"", "png", "the end of the image is missing (no IEND chunk)"),
        (b"\xff" * 99, "png", "it does not begin with a PNG header"),
        (png().replace(b"IHDR", b"CgBI"), "png", "it does not begin with a PNG header"),
        (png().replace(b"IDAT", b"I\0AT"), "png", "its structure is damaged (an invalid chunk)"),
        (png().replace(b"IDAT", b"tEXt"), "png", "the image data is missing (no IDAT chunk)"),
        (b"", "webp", "the end of the image is missing (the file ends in its header)"),
        (b"\xff" * 99, "webp", "it does not begin with a WebP header"),
        (saved("WEBP").replace(b"\x9d\x01\x2a", b"\x9d\x01\x2b"), "webp", "its header is damaged"),
        (saved("WEBP").replace(b"VP8 ", b"VP8Y"), "webp", "it does not begin with a WebP header"),
        (saved("WEBP", lossless=True, icc_profile=bytes(9)).replace(b"VP8L", b"VP8M"), "webp",
         "the image data is missing (no VP8 or VP8L chunk)"),
        (saved("WEBP")[:4] + bytes(4) + saved("WEBP")[8:], "webp",
         "its structure is damaged (a chunk is longer than the file)"),
    ],
)  # fmt: skip
def test_a_damaged_structure_is_named(content: bytes, kind: str, fault: str) -> None:
    assert {scan(content, piece, f"image/{kind}").fault for piece in PIECES} == {fault}


def test_only_these_types_can_be_scanned() -> None:
    with pytest.raises(KeyError):
        scan_for("image/gif")


# Large files


def test_the_end_of_a_large_jpeg_is_searched_for_only_if_it_is_not_last() -> None:
    large = noise(size=(700, 700))
    complete = saved("JPEG", large, quality=95)
    assert len(complete) > WHOLE_BYTES
    for content, needs_search in ((complete, False), (complete + bytes(99), True), (complete[:-2], True)):
        for piece in (WHOLE, 65536, 1000):
            found = scan_for("image/jpeg")
            for start in range(0, len(content), piece):
                found.feed(content[start : start + piece])
            assert (found.finish() is not None, found.needs_search) == (needs_search, needs_search)
            assert (scan(content, piece).fault is None) is (content[:-2] != complete[:-4] and EOI in content)


def test_the_end_is_found_across_pieces() -> None:
    content = files()["jpeg baseline"] + bytes(200)
    for piece in range(complete_size("jpeg baseline") - 3, complete_size("jpeg baseline") + 3):
        assert scan(content, piece).fault is None
        assert scan(content[: complete_size("jpeg baseline") - 1] + bytes(200), piece).fault is not None


def test_an_empty_piece_changes_nothing() -> None:
    content = files()[next(name for name in names() if "MP4" in name)]
    found = scan_for("image/jpeg")
    for piece in (b"", content, b""):
        found.feed(piece)
    assert found.finish() is None


def test_a_header_of_more_than_a_mebibyte_is_given_up() -> None:
    jpeg = saved("JPEG", exif=EXIF + exif(6), icc_profile=bytes(HEADER_BYTES + 1))
    assert jpeg.index(b"\xff\xc0") > HEADER_BYTES
    expected = Result(None, None, 6)
    for piece in (1000, 65536, WHOLE):
        assert scan(jpeg, piece) == expected
        assert scan(jpeg[:-2], piece).fault is not None
    found = scan_for("image/jpeg")
    found.feed(jpeg[: HEADER_BYTES - 1])
    assert not found.has_header
    found.feed(jpeg[HEADER_BYTES - 1 : HEADER_BYTES])
    assert found.has_header
    text = [png_chunk(b"tEXt", bytes(HEADER_BYTES)), png_chunk(b"eXIf", exif(6))]
    for piece in (1000, 65536, WHOLE):
        assert scan(png(*text), piece) == Result(*SIZE)
        assert scan(png(*text)[:-1], piece).fault is not None


def test_exif_after_the_pixels_of_a_png_is_read() -> None:
    content, chunk = png(), png_chunk(b"eXIf", exif(6))
    content = content[:-12] + chunk + content[-12:]
    for piece in (50, WHOLE):
        found = scan_for("image/png")
        for start in range(0, len(content), piece):
            found.feed(content[start : start + piece])
        assert found.finish() is None
        assert found.orientation == 6


@pytest.mark.parametrize(
    ("marker", "is_arithmetic", "is_lossless"),
    [
        *((marker, False, False) for marker in (0xC0, 0xC1, 0xC2)),
        *((marker, False, True) for marker in (0xC3, 0xC5, 0xC6, 0xC7)),
        *((marker, True, False) for marker in (0xC9, 0xCA)),
        *((marker, True, True) for marker in (0xCB, 0xCD, 0xCE, 0xCF)),
    ],
)
def test_the_process_of_a_jpeg_is_read(marker: int, is_arithmetic: bool, is_lossless: bool) -> None:
    found = scan_for("image/jpeg")
    found.feed(saved("JPEG").replace(b"\xff\xc0", bytes([0xFF, marker])))
    assert found.has_header
    assert (found.is_arithmetic, found.is_lossless) == (is_arithmetic, is_lossless)


def test_exif_of_any_length_is_read() -> None:
    long = exif(6) + bytes(3 * 2**16)
    for content in (png(png_chunk(b"eXIf", long)), saved("WEBP", exif=long)):
        assert [scan(content, piece)[2] for piece in PIECES] == [6] * len(PIECES)
        assert scan(content[:-1]).fault is not None


def large_files() -> dict[str, bytes]:
    """Return files of about 10 MB."""
    image, side = noise(size=(1870, 1870)), 1870
    pixels = randomness(4).randbytes(10_000_000)
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    # libpng writes chunks of this size.
    chunks = [png_chunk(b"IDAT", pixels[start : start + 8192]) for start in range(0, len(pixels), 8192)]
    return {
        "jpeg": saved("JPEG", image, quality=98, subsampling=0),
        "png": b"".join((png()[:8], header, *chunks, png_chunk(b"IEND", b""))),
        "webp": saved("WEBP", image, lossless=True, quality=0, method=0),
    }


def test_the_time_to_scan_10_mb_is_measured() -> None:
    for kind, content in large_files().items():
        pieces = [content[start : start + 65536] for start in range(0, len(content), 65536)]
        started = time.process_time()
        found = scan_for(f"image/{kind}")
        for piece in pieces:
            found.feed(piece)
        assert (found.finish(), found.needs_search, found.width) == (None, False, 1870)
        scanned = time.process_time()
        for piece in pieces:
            pybase64.b64encode(piece)
        times = (
            f"scan {1e3 * (scanned - started):.2f} ms, base64 {1e3 * (time.process_time() - scanned):.2f} ms"
        )
        print(f"{kind}, {len(content) / 1e6:.1f} MB: {times}")  # noqa: T201 to read with `pytest -s`


# Any content


@pytest.mark.parametrize(
    "content", [b"\xff\xd8" + b"\xff\xfe\0\2" * 300_000, b"\xff\xd8" + b"\xff" * 1_200_000]
)
def test_a_jpeg_of_nothing_but_markers_is_given_up(content: bytes) -> None:
    for piece in (65536, WHOLE):
        assert scan(content, piece).fault is not None
        assert scan(content + EOI, piece)[:2] == (None, None)


def test_chunks_without_end_are_given_up() -> None:
    webp, chunk = files()["webp alpha"], b"abcd" + bytes(4)
    size = len(webp) - 8 + 150_000 * len(chunk)
    cases = (
        png(*[png_chunk(b"abCd", b"")] * 150_000),
        webp[:4] + struct.pack("<I", size) + webp[8:] + chunk * 150_000,
    )
    for content in cases:
        assert scan(content, 65536) == scan(content)
        assert scan(content).has_header


@pytest.mark.parametrize("name", names())
def test_mutated_files_scan_alike_in_any_pieces(name: str) -> None:
    chance, original = randomness(name), files()[name]
    kind = f"image/{name.partition(' ')[0]}"
    for _ in range(100):
        content = mutated(original[:8000], chance)
        found = [scan(content, piece, kind) for piece in (WHOLE, chance.randrange(1, 500), 97)]
        assert found[0] == found[1] == found[2]
        assert found[0].has_header or found[0].fault
        assert 1 <= found[0].orientation <= 8


def mutated(content: bytes, chance: random.Random) -> bytes:
    """Change, remove, repeat or insert bytes, most often near the beginning."""
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 5, 30))):
        limit = chance.choice((40, 400, len(changed)))
        start = chance.randrange(max(1, min(limit, len(changed))))
        length = chance.choice((1, 2, 4, 100))
        match chance.randrange(5):
            case 0:
                changed[start : start + 1] = bytes(
                    (chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256))),)
                )
            case 1:
                del changed[start : start + length]
            case 2:
                changed[start:start] = changed[start : start + length]
            case 3:
                changed[start:start] = chance.randbytes(length)
            case _:
                del changed[len(changed) - chance.randrange(len(changed) // 2 + 1) :]
    return bytes(changed)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_random_bytes_after_a_signature_raise_nothing(kind: str) -> None:
    chance, start = randomness(kind), files()[f"{kind} orientation 1<"]
    for _ in range(500):
        content = start[: chance.choice((0, 2, 8, 12, 16, 20, 30))] + chance.randbytes(chance.randrange(3000))
        assert scan(content, WHOLE, f"image/{kind}") == scan(content, 50, f"image/{kind}")


# EXIF


def test_mutated_exif_has_an_orientation() -> None:
    chance = randomness(5)
    for _ in range(3000):
        content = mutated(exif(chance.randrange(9), chance.choice("<>"), thumbnail=bytes(50)), chance)
        assert 1 <= read_orientation(content) <= 8
        with warnings.catch_warnings(action="ignore"):
            read = Image.Exif()
            try:
                read.load(content)
                expected = read.get(ORIENTATION)
            except (SyntaxError, struct.error, ValueError, KeyError, TypeError, OSError):
                continue
        if expected in range(2, 9):
            assert read_orientation(content) in {expected, 1}


@pytest.mark.parametrize(
    ("content", "orientation"),
    [
        (b"", 1),
        (b"II*\0", 1),
        (exif(0), 1),
        (exif(9), 1),
        (exif(6, ">"), 6),
        (exif(6)[:-8], 1),
        (b"II*\0\xff\xff\xff\xff" + bytes(99), 1),
        (b"MM\0*\0\0\0\x08\xff\xff" + bytes(2**17), 1),
        (b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", ORIENTATION, 4, 1, 3), 3),
        (b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", ORIENTATION, 2, 1, 3), 1),
    ],
)
def test_the_orientation_is_1_if_the_exif_does_not_have_a_valid_one(content: bytes, orientation: int) -> None:
    assert read_orientation(content) == orientation
