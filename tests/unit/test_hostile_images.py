"""Hostile and damaged images: each ends in a picture or a refusal, soon and with bounded memory."""

import random
import re
import struct
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.unit.conversions import Conversion, pool_of, saved
from worker.images.conversion import PDF, ConversionError
from worker.images.conversion_pool import ConversionPool

MEMORY_BYTES = 200_000_000
# One and a half times the memory, the base, and what the interpreter and its libraries map.
MAX_RESIDENT_BYTES = MEMORY_BYTES * 3 // 2 + 260_000_000
MUTATIONS = 250

JPEG, PNG, GIF, TIFF, WEBP, HEIC = (
    f"image/{name}" for name in ("jpeg", "png", "gif", "tiff", "webp", "heic")
)


@pytest.fixture(scope="module")
async def pool() -> AsyncIterator[ConversionPool]:
    async with pool_of(memory_bytes=MEMORY_BYTES) as pool:
        yield pool


async def outcome(pool: ConversionPool, content: bytes, media_type: str) -> str:
    """Convert; return the message of the refusal, or "picture". Check the memory, and that it ends."""
    try:
        await Conversion(pool, content, media_type, max_edge=40).run()
        result = "picture"
    except ConversionError as error:
        result = error.message
    assert "takes more than" not in result
    for pid in pool.process_ids:
        assert peak_resident_bytes(pid) < MAX_RESIDENT_BYTES, result
    return result


def peak_resident_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(peak[1]) * 1024 if peak else 0


def noise(size: tuple[int, int] = (64, 48), mode: str = "RGB") -> Image.Image:
    numbers = random.Random(16)  # noqa: S311 - repeatable
    bands = [Image.frombytes("L", size, numbers.randbytes(size[0] * size[1])) for _ in range(3)]
    return Image.merge("RGB", bands).convert(mode)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes, size: tuple[int, int] = (64, 48), depth: int = 8, colour: int = 2) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IEND", b"")


PIXELS = chunk(b"IDAT", zlib.compress(bytes((64 * 3 + 1) * 48)))
ZEROS = zlib.compress(bytes(200_000_000), 9)


def tiff(entries: list[tuple[int, int, int, int]], *, next_ifd: int = 0, data: bytes = b"") -> bytes:
    """Return a TIFF with one directory at 8; an entry is tag, type, count, value."""
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<I", next_ifd) + data


def tiff_of(width: int, height: int, *more: tuple[int, int, int, int], next_ifd: int = 0) -> bytes:
    base = {256: (4, 1, width), 257: (4, 1, height), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1)}
    base |= {273: (4, 1, 8), 277: (3, 1, 1), 278: (4, 1, height), 279: (4, 1, 64)}
    base |= {tag: (kind, count, value) for tag, kind, count, value in more}
    return tiff([(tag, *rest) for tag, rest in sorted(base.items())], next_ifd=next_ifd, data=bytes(64))


def chained_tiff(count: int) -> bytes:
    """Return a TIFF with many directories."""
    entries = [(256, 4, 1, 1), (257, 4, 1, 1), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 8), (279, 4, 1, 1)]
    body = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    size = len(body) + 4
    directories = (
        body + struct.pack("<I", 8 + size * (index + 1) if index + 1 < count else 0) for index in range(count)
    )
    return b"II*\0" + struct.pack("<I", 8) + b"".join(directories)


def exif_loop() -> bytes:
    """Return EXIF whose sub-directories are itself."""
    return b"Exif\0\0" + tiff([(34665, 4, 1, 8), (34853, 4, 1, 8), (40965, 4, 1, 8)], next_ifd=8)


def resized(content: bytes, old: bytes, new: bytes) -> bytes:
    assert old in content
    return content.replace(old, new)


def large_jpeg(width: int, height: int) -> bytes:
    size, large = struct.pack(">BHH", 8, 48, 64), struct.pack(">BHH", 8, height, width)
    return resized(saved(noise(), "JPEG"), size, large)


def jpeg_of_many_scans() -> bytes:
    content = saved(noise((1024, 1024)), "JPEG", progressive=True)
    start, end = content.rindex(b"\xff\xda"), len(content) - 2
    return content[:start] + content[start:end] * 1000 + content[end:]


def jpeg_with_segments(marker: int, data: bytes, count: int) -> bytes:
    content = saved(noise(), "JPEG")
    segment = struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data
    return content[:2] + segment * count + content[2:]


def heic(kind: str = "HEIF", size: tuple[int, int] = (4_000_000_000, 4_000_000_000)) -> bytes:
    content, count = re.subn(rb"ispe\0{4}.{8}", b"ispe" + struct.pack(">III", 0, *size), saved(noise(), kind))
    assert count
    return content


def gif(canvas: tuple[int, int], left: int, frame: tuple[int, int]) -> bytes:
    head = b"GIF89a" + struct.pack("<HHBBB", *canvas, 0xF0, 0, 0) + bytes(6)
    return head + b"," + struct.pack("<HHHHB", left, 0, *frame, 0) + b"\2\2\x44\1\0;"


def webp(width: int, height: int) -> bytes:
    canvas = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + canvas + saved(noise(), "WEBP")[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


def bmp(width: int, height: int, compression: int = 0, bits: int = 24) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 64, 0, 0, 54) + info + bytes(64)


def jp2(width: int, height: int, tile: tuple[int, int]) -> bytes:
    content = bytearray(saved(noise(), "JPEG2000"))
    # ISO 15444-1, A.5.1 (marker FF51): size after marker, length and capabilities; then offsets, tile size.
    at = content.index(b"\xff\x51") + 6
    content[at : at + 8] = struct.pack(">II", width, height)
    content[at + 16 : at + 24] = struct.pack(">II", *tile)
    return bytes(content)


def pdf(page: str, *objects: bytes, kids: str = "[3 0 R]", count: int = 1) -> bytes:
    parts = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        f"<</Type/Pages/Kids{kids}/Count {count}>>".encode(),
        f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 100 100]{page}>>".encode(),
        *objects,
    ]
    body = b"%PDF-1.7\n"
    offsets = []
    for number, part in enumerate(parts, 1):
        offsets.append(len(body))
        body += b"%d 0 obj\n%b\nendobj\n" % (number, part)
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    size = len(offsets) + 1
    end = f"trailer<</Size {size}/Root 1 0 R>>\nstartxref\n{len(body)}\n%%EOF"
    return body + f"xref\n0 {size}\n0000000000 65535 f \n{table}{end}".encode()


def stream(attributes: str, data: bytes) -> bytes:
    return b"<<%b/Length %d>>stream\n%b\nendstream" % (attributes.encode(), len(data), data)


def pdf_image(width: int, height: int, data: bytes) -> bytes:
    attributes = (
        f"/Type/XObject/Subtype/Image/Width {width}/Height {height}/BitsPerComponent 8/ColorSpace/DeviceRGB"
    )
    image = stream(f"{attributes}/Filter/FlateDecode", data)
    drawing = stream("", b"100 0 0 100 0 0 cm /I Do")
    return pdf("/Contents 4 0 R/Resources<</XObject<</I 5 0 R>>>>", drawing, image)


DEFLATED = "/Filter/FlateDecode"
REFUSED = "refused"
TOO_MANY_PIXELS = " pixels; VQA_IMAGE_MAX_PIXELS allows 100000000"
TOO_MUCH_MEMORY = " bytes; VQA_IMAGE_DECODE_BYTES allows 200000000"
# Content, type, and the end of the refusal; "picture"; or any refusal.
NASTIES: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "PNG of 3.6 gigapixels": (lambda: png(PIXELS, size=(60_000, 60_000)), PNG, TOO_MANY_PIXELS),
    "PNG of 100 megapixels": (lambda: png(PIXELS, size=(10_000, 10_000)), PNG, TOO_MUCH_MEMORY),
    "PNG without pixels": (lambda: png(size=(0, 10)), PNG, REFUSED),
    "PNG with more pixels than declared": (lambda: png(chunk(b"IDAT", ZEROS)), PNG, "picture"),
    "PNG with a bomb of text": (lambda: png(chunk(b"zTXt", b"a\0\0" + ZEROS), PIXELS), PNG, REFUSED),
    "PNG with a bomb of international text": (
        lambda: png(chunk(b"iTXt", b"a\0\1\0\0\0" + ZEROS), PIXELS),
        PNG,
        REFUSED,
    ),
    "PNG with a bomb of a profile": (lambda: png(chunk(b"iCCP", b"a\0\0" + ZEROS), PIXELS), PNG, REFUSED),
    "PNG of many chunks": (lambda: png(chunk(b"tEXt", b"a\0b") * 100_000, PIXELS), PNG, "picture"),
    "JPEG of 4 gigapixels": (lambda: large_jpeg(65_500, 65_500), JPEG, TOO_MANY_PIXELS),
    "JPEG of 100 megapixels with few of them": (lambda: large_jpeg(10_000, 10_000), JPEG, "picture"),
    "JPEG of many scans": (jpeg_of_many_scans, JPEG, "the JPEG has too many scans"),
    "JPEG of many segments": (lambda: jpeg_with_segments(0xE5, b"a" * 8, 300_000), JPEG, "picture"),
    "JPEG with a huge profile": (
        lambda: saved(noise((900, 600)), "JPEG", icc_profile=bytes(16_000_000)),
        JPEG,
        "picture",
    ),
    "JPEG with EXIF in a loop": (lambda: saved(noise((900, 600)), "JPEG", exif=exif_loop()), JPEG, "picture"),
    "TIFF of 10 gigapixels": (lambda: tiff_of(100_000, 100_000), TIFF, TOO_MANY_PIXELS),
    "TIFF of 100 megapixels": (lambda: tiff_of(10_000, 10_000), TIFF, TOO_MUCH_MEMORY),
    "TIFF with a directory in a loop": (lambda: tiff_of(8, 8, next_ifd=8), TIFF, "picture"),
    "TIFF with sub-directories in a loop": (
        lambda: tiff_of(8, 8, (330, 4, 1, 8), (34665, 4, 1, 8), (34853, 4, 1, 8)),
        TIFF,
        "picture",
    ),
    "TIFF of 100,000 pages": (lambda: chained_tiff(100_000), TIFF, "has more than 1000 pages"),
    "TIFF with a huge tag": (lambda: tiff_of(8, 8, (34675, 7, 0xFFFFFFFF, 8)), TIFF, ""),
    "TIFF with a huge bit depth": (lambda: tiff_of(8, 8, (258, 3, 1, 65_535)), TIFF, REFUSED),
    "TIFF of a huge strip": (lambda: tiff_of(8, 8, (259, 3, 1, 8), (279, 4, 1, 0xFFFFFFF0)), TIFF, REFUSED),
    "TIFF with a tile of 4 gigapixels": (
        lambda: tiff_of(8, 8, (259, 3, 1, 8), (322, 4, 1, 65_536), (323, 4, 1, 65_536), (324, 4, 1, 8)),
        TIFF,
        REFUSED,
    ),
    "GIF of 4 gigapixels": (lambda: gif((65_535, 65_535), 0, (4, 4)), GIF, TOO_MANY_PIXELS),
    "GIF with a frame far outside": (lambda: gif((4, 4), 60_000, (5_000, 60_000)), GIF, TOO_MANY_PIXELS),
    "WebP of 268 megapixels": (lambda: webp(16_384, 16_384), WEBP, REFUSED),
    "WebP whose canvas differs": (lambda: webp(9_000, 9_000), WEBP, REFUSED),
    "HEIC of 16 exapixels": (heic, HEIC, REFUSED),
    "HEIC of 64 megapixels": (lambda: heic(size=(8_000, 8_000)), HEIC, ""),
    "AVIF of 16 exapixels": (lambda: heic("AVIF"), "image/avif", REFUSED),
    "AVIF of 64 megapixels": (lambda: heic("AVIF", (8_000, 8_000)), "image/avif", REFUSED),
    "BMP of 4 exapixels": (lambda: bmp(2**31 - 1, 2**31 - 1), "image/bmp", TOO_MANY_PIXELS),
    "BMP of negative size": (lambda: bmp(-(2**31), -(2**31)), "image/bmp", REFUSED),
    "BMP with run lengths": (lambda: bmp(10_000, 5_000, 1, 8), "image/bmp", REFUSED),
    "JPEG 2000 of 16 exapixels": (lambda: jp2(2**32 - 1, 2**32 - 1, (64, 48)), "image/jp2", REFUSED),
    "JPEG 2000 of many tiles": (lambda: jp2(2_000, 2_000, (1, 1)), "image/jp2", REFUSED),
    "JPEG 2000 of one huge tile": (lambda: jp2(64, 48, (2**31, 2**31)), "image/jp2", ""),
    "PDF with an image of 10 gigapixels": (lambda: pdf_image(100_000, 100_000, b""), PDF, TOO_MANY_PIXELS),
    "PDF with an image of 64 megapixels": (lambda: pdf_image(8_000, 8_000, ZEROS), PDF, TOO_MUCH_MEMORY),
    "PDF with a bomb of pixels": (lambda: pdf_image(10, 10, ZEROS), PDF, "picture"),
    "PDF with a bomb of drawing": (lambda: pdf("/Contents 4 0 R", stream(DEFLATED, ZEROS)), PDF, ""),
    "PDF with a double bomb": (
        lambda: pdf("/Contents 4 0 R", stream("/Filter[/FlateDecode/FlateDecode]", zlib.compress(ZEROS))),
        PDF,
        "",
    ),
    "PDF with a huge page": (lambda: pdf("/MediaBox[0 0 1e9 1e9]"), PDF, "picture"),
    "PDF with an empty page": (lambda: pdf("/MediaBox[0 0 0 0]"), PDF, ""),
    "PDF whose form draws itself": (
        lambda: pdf(
            "/Contents 4 0 R/Resources<</XObject<</F 5 0 R>>>>",
            stream("", b"/F Do " * 50),
            stream(
                "/Type/XObject/Subtype/Form/BBox[0 0 9 9]/Resources<</XObject<</F 5 0 R>>>>", b"/F Do " * 50
            ),
        ),
        PDF,
        "",
    ),
    "PDF whose pages contain themselves": (lambda: pdf("", kids="[2 0 R]"), PDF, ""),
    "PDF of a billion pages": (lambda: pdf("", count=10**9), PDF, "picture"),
    "PDF of deep arrays": (lambda: pdf("/A" + "[" * 100_000 + "]" * 100_000), PDF, ""),
}


@pytest.mark.parametrize("name", NASTIES)
async def test_a_nasty_image_ends_soon(name: str, pool: ConversionPool) -> None:
    make, media_type, expected = NASTIES[name]
    result = await outcome(pool, make(), media_type)
    if expected == REFUSED:
        assert result != "picture"
    else:
        assert result.endswith(expected), result


SAMPLES: dict[str, tuple[Callable[[], bytes], str]] = {
    "JPEG": (lambda: saved(noise(), "JPEG", exif=exif_loop()), JPEG),
    "progressive JPEG": (lambda: saved(noise(), "JPEG", progressive=True), JPEG),
    "PNG": (lambda: saved(noise(), "PNG"), PNG),
    "palette PNG": (lambda: saved(noise(mode="P"), "PNG"), PNG),
    "WebP": (lambda: saved(noise(), "WEBP"), WEBP),
    "lossless WebP": (lambda: saved(noise(), "WEBP", lossless=True), WEBP),
    "GIF": (lambda: saved(noise(), "GIF", save_all=True, append_images=[noise(mode="L")]), GIF),
    "TIFF": (lambda: saved(noise(), "TIFF", save_all=True, append_images=[noise(mode="1")]), TIFF),
    "LZW TIFF": (lambda: saved(noise(), "TIFF", compression="tiff_lzw"), TIFF),
    "JPEG TIFF": (lambda: saved(noise(), "TIFF", compression="jpeg"), TIFF),
    "G4 TIFF": (lambda: saved(noise(mode="1"), "TIFF", compression="group4"), TIFF),
    "BMP": (lambda: saved(noise(), "BMP"), "image/bmp"),
    "JPEG 2000": (lambda: saved(noise(), "JPEG2000"), "image/jp2"),
    "AVIF": (lambda: saved(noise(), "AVIF"), "image/avif"),
    "HEIC": (lambda: saved(noise(), "HEIF"), HEIC),
    "PDF": (lambda: saved(noise(), "PDF"), PDF),
}


def mutations(content: bytes, seed: str, count: int) -> list[bytes]:
    """Return damaged versions: half of them only in the headers, where damage reaches further."""
    numbers = random.Random(seed)  # noqa: S311 - repeatable
    results = []
    for index in range(count):
        mutated = bytearray(content)
        reach = len(content) if index % 2 else min(len(content), 600)
        for _ in range(numbers.choice((1, 1, 2, 4, 16))):
            at = numbers.randrange(reach)
            kind = numbers.randrange(5)
            if kind == 0:
                mutated[at : at + 1] = (
                    bytes([mutated[at] ^ 1 << numbers.randrange(8)]) if at < len(mutated) else b""
                )
            elif kind == 1:
                mutated[at : at + 1] = numbers.randbytes(1)
            elif kind == 2:
                mutated[at : at + 4] = numbers.choice((b"\xff\xff\xff\xff", bytes(4), b"\x7f\xff\xff\xff"))
            elif kind == 3:
                del mutated[at : at + numbers.randrange(1, 64)]
            else:
                mutated[at:at] = mutated[numbers.randrange(reach) :][: numbers.randrange(1, 64)]
        results.append(bytes(mutated))
    return results


@pytest.mark.parametrize("name", SAMPLES)
async def test_damaged_images_end_soon(name: str, pool: ConversionPool) -> None:
    make, media_type = SAMPLES[name]
    content = make()
    truncated = [content[: len(content) * share // 40] for share in range(40)]
    results: dict[str, int] = {}
    for damaged in [content, *truncated, *mutations(content, name, MUTATIONS)]:
        result = await outcome(pool, damaged, media_type)
        results[result] = results.get(result, 0) + 1
    assert results["picture"]
    assert "decoding it takes more than 20 s" not in results
