"""The converter in this process; hostile content is in test_conversion_pool.py."""

import re
import struct
import zlib
from dataclasses import replace
from functools import cache
from io import BytesIO
from typing import Any

import pillow_heif
import pytest
from PIL import Image, ImageChops, ImageCms

from tests.unit.conversions import LYING
from vqa_worker.messages.error_codes import ErrorCode
from worker.images import converter
from worker.images.conversion import (
    CONVERTIBLE_TYPES,
    PDF,
    ConversionError,
    ConversionOptions,
    ConvertedImage,
    is_installed,
    missing,
)

pillow_heif.register_heif_opener()

JPEG, PNG = "image/jpeg", "image/png"
OPTIONS = ConversionOptions(
    types=(JPEG, PNG, "image/webp"),
    max_bytes=5_000_000,
    max_edge=None,
    max_pixels=100_000_000,
    pages=None,
    max_pages=5,
    pdf_dpi=72,
)
FORMATS = {
    "JPEG": JPEG,
    "PNG": PNG,
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "TIFF": "image/tiff",
    "BMP": "image/bmp",
    "JPEG2000": "image/jp2",
    "AVIF": "image/avif",
    "HEIF": "image/heic",
    "PDF": PDF,
}
RED, GREEN, BLUE, WHITE, BLACK = (230, 20, 20), (20, 200, 40), (30, 40, 220), (255, 255, 255), (0, 0, 0)
Colour = tuple[int, int, int]
# Top left, top right, bottom left, bottom right.
CORNERS = (RED, GREEN, BLUE, WHITE)
SIZE = (96, 64)


def corners(size: tuple[int, int] = SIZE, mode: str = "RGB") -> Image.Image:
    """Return a picture with a different colour in each quarter."""
    image = Image.new("RGB", size)
    width, height = size
    for index, colour in enumerate(CORNERS):
        left, top = index % 2 * width // 2, index // 2 * height // 2
        image.paste(colour, (left, top, left + width // 2, top + height // 2))
    return image.convert(mode)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def oriented(kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    image = corners() if orientation == 1 else corners().transpose(LYING[orientation])
    return saved(image, kind, exif=exif.tobytes() if kind != "TIFF" else exif)


def convert(
    content: bytes, media_type: str, options: ConversionOptions = OPTIONS, needs: list[int] | None = None
) -> list[ConvertedImage]:
    return converter.convert(content, media_type, options, ([] if needs is None else needs).append)


def convert_one(content: bytes, media_type: str, **changes: Any) -> tuple[ConvertedImage, Image.Image]:
    (converted,) = convert(content, media_type, replace(OPTIONS, **changes))
    image = Image.open(BytesIO(converted.content))
    image.load()
    assert image.size == (converted.width, converted.height)
    if converted.content != content:
        assert image.get_format_mimetype() == converted.media_type
        assert not {"exif", "icc_profile", "xmp", "comment"} & set(image.info)
    return converted, image


def refusal(content: bytes, media_type: str, **changes: Any) -> tuple[ErrorCode, str]:
    with pytest.raises(ConversionError) as caught:
        convert(content, media_type, replace(OPTIONS, **changes))
    return caught.value.code, caught.value.message


def assert_colours(image: Image.Image, expected: tuple[Colour, ...] = CORNERS, tolerance: int = 14) -> None:
    width, height = image.size
    rgb = image.convert("RGB")
    for index, colour in enumerate(expected):
        point = (width * (1 + index % 2 * 4) // 6, height * (1 + index // 2 * 4) // 6)
        actual = rgb.getpixel(point)
        assert isinstance(actual, tuple)
        assert max(abs(a - b) for a, b in zip(actual, colour, strict=True)) <= tolerance, (
            point,
            actual,
            colour,
        )


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF"])
def test_a_picture_is_turned_upright(kind: str, orientation: int) -> None:
    _, image = convert_one(oriented(kind, orientation), FORMATS[kind])
    assert image.size == SIZE
    assert_colours(image)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF"])
def test_a_turned_picture_is_scaled_down(kind: str, orientation: int) -> None:
    _, image = convert_one(oriented(kind, orientation), FORMATS[kind], max_edge=48)
    assert image.size == (48, 32)
    assert_colours(image)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_picture_that_may_be_sent_is_not_changed(kind: str) -> None:
    content, needs = oriented(kind, 1), list[int]()
    assert convert(content, FORMATS[kind], needs=needs) == [
        ConvertedImage(FORMATS[kind], content, *SIZE, None),
    ]
    assert not needs


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind not in {"JPEG", "PNG", "WEBP", "PDF"}])
def test_other_types_are_converted(kind: str) -> None:
    converted, image = convert_one(saved(corners(), kind), FORMATS[kind])
    assert converted.page is None
    assert image.size == SIZE
    assert_colours(image)


def png(size: tuple[int, int], depth: int, colour: int, row: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG of equal rows."""
    head = (b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
    data = (b"IDAT", zlib.compress((b"\0" + row) * size[1]))
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(chunk, (head, *chunks, data, (b"IEND", b""))))


def chunk(parts: tuple[bytes, bytes]) -> bytes:
    kind, data = parts
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def grey_16(kind: str) -> bytes:
    """Return a 16-bit grey picture: dark left, light right."""
    row = struct.pack("<H", 0x4000) * 48 + struct.pack("<H", 0xC000) * 48
    return saved(Image.frombytes("I;16", SIZE, row * 64), kind)


GREY_16 = ((64, 64, 64), (192, 192, 192)) * 2


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled(kind: str) -> None:
    _, image = convert_one(grey_16(kind), FORMATS[kind])
    assert image.mode == "L"
    assert_colours(image, GREY_16, 3)


def test_16_bit_tiffs_of_both_byte_orders_are_scaled() -> None:
    image = Image.new("I;16B", SIZE, 0x8000)
    _, converted = convert_one(saved(image, "TIFF"), "image/tiff")
    assert_colours(converted, ((128, 128, 128),) * 4, 3)


def test_16_bit_colours_are_scaled() -> None:
    row = struct.pack(">3H", 0xE600, 0x1414, 0x14FF) * 48 + struct.pack(">3H", 0x1400, 0xC800, 0x2828) * 48
    content = png(SIZE, 16, 2, row)
    _, image = convert_one(content, PNG)
    assert_colours(image, (RED, GREEN) * 2)
    assert convert_one(content, PNG, takes_16_bit=True)[0].content == content


@pytest.mark.parametrize(("mode", "values"), [("I", (-1000, 70000)), ("F", (0.0, 1.0))])
def test_values_without_a_range_are_stretched(mode: str, values: tuple[float, float]) -> None:
    image = Image.new(mode, SIZE, values[0])
    image.paste(values[1], (48, 0, 96, 64))
    _, converted = convert_one(saved(image, "TIFF"), "image/tiff")
    assert_colours(converted, (BLACK, WHITE) * 2, 3)


def test_cmyk_is_converted_to_rgb() -> None:
    content = saved(corners(mode="CMYK"), "JPEG", quality=95)
    _, image = convert_one(content, JPEG)
    assert image.mode == "RGB"
    assert_colours(image)
    assert convert_one(content, JPEG, takes_cmyk=True)[0].content == content


def test_an_adobe_ycck_jpeg_is_converted_to_rgb() -> None:
    # Pillow cannot write one: store YCC values inverted, and say so in Adobe's marker (transform 2).
    luma, cb, cr = ImageChops.invert(corners()).convert("YCbCr").split()
    black = Image.new("L", SIZE, 255)
    content = saved(Image.merge("CMYK", [luma, cb, cr, black]).point(lambda v: 255 - v), "JPEG", quality=95)
    at = content.index(b"Adobe")
    assert content[at + 11] == 0
    content = content[: at + 11] + b"\2" + content[at + 12 :]
    _, image = convert_one(content, JPEG)
    assert image.mode == "RGB"
    assert_colours(image, tolerance=30)


def test_a_cmyk_tiff_is_converted() -> None:
    assert_colours(convert_one(saved(corners(mode="CMYK"), "TIFF"), "image/tiff")[1])


def test_a_lab_tiff_is_converted() -> None:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(corners(), *profiles, outputMode="LAB")
    assert lab is not None
    assert_colours(convert_one(saved(lab, "TIFF"), "image/tiff")[1])


def with_hole(mode: str) -> Image.Image:
    """Return a picture whose first quarter is transparent."""
    image = corners(mode="RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 48, 32))
    return image.convert(mode)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG2000", "AVIF", "HEIF"])
def test_transparency_becomes_white_in_a_jpeg(kind: str) -> None:
    _, image = convert_one(saved(with_hole("RGBA"), kind), FORMATS[kind], types=(JPEG,))
    assert image.mode == "RGB"
    assert_colours(image, (WHITE, GREEN, BLUE, WHITE))


def test_grey_transparency_becomes_white_in_a_jpeg() -> None:
    _, image = convert_one(saved(with_hole("LA"), "PNG"), PNG, types=(JPEG,))
    assert image.mode == "L"
    assert image.getpixel((10, 10)) == 255


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_colour_of_a_palette_becomes_white_in_a_jpeg(kind: str) -> None:
    image = corners().quantize(4)
    content = saved(image, kind, transparency=image.getpixel((10, 10)))
    _, converted = convert_one(content, FORMATS[kind], types=(JPEG,))
    assert_colours(converted, (WHITE, GREEN, BLUE, WHITE), 30)


@pytest.mark.parametrize("max_edge", [None, 48])
def test_a_png_keeps_transparency(max_edge: int | None) -> None:
    image = corners().quantize(4)
    content = saved(image, "GIF", transparency=image.getpixel((10, 10)))
    converted, shown = convert_one(content, "image/gif", types=(PNG,), max_edge=max_edge)
    alpha = shown.convert("RGBA").getchannel("A")
    assert alpha.getpixel((5, 5)) == 0
    assert alpha.getpixel((converted.width - 5, 5)) == 255


def test_a_png_with_a_transparent_colour_is_converted() -> None:
    content = png(SIZE, 8, 2, bytes(RED) * 48 + bytes(GREEN) * 48, (b"tRNS", struct.pack(">3H", *RED)))
    _, image = convert_one(content, PNG, types=(JPEG,))
    assert_colours(image, (WHITE, GREEN) * 2)


def test_opaque_alpha_is_dropped() -> None:
    _, image = convert_one(saved(corners(mode="RGBA"), "TIFF"), "image/tiff")
    assert image.mode == "RGB"


def test_a_scan_of_1_bit_stays_a_small_png() -> None:
    image = Image.effect_noise((400, 300), 100).convert("1")
    converted, shown = convert_one(saved(image, "TIFF", compression="group4"), "image/tiff")
    assert converted.media_type == PNG
    assert shown.mode == "1"
    assert shown.tobytes() == image.tobytes()


def test_a_palette_stays_a_palette() -> None:
    converted, image = convert_one(saved(corners().quantize(4), "GIF"), "image/gif")
    assert (converted.media_type, image.mode) == (PNG, "P")


def test_a_photo_becomes_a_jpeg() -> None:
    noise = Image.merge("RGB", [Image.effect_noise((200, 100), 50) for _ in "RGB"])
    assert convert_one(saved(noise, "BMP"), "image/bmp")[0].media_type == JPEG


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_sent(kind: str) -> None:
    second = Image.new("RGB", SIZE, BLACK)
    content = saved(corners(), kind, save_all=True, append_images=[second], duration=100)
    converted, image = convert_one(content, FORMATS[kind], types=(JPEG, PNG, "image/gif", "image/webp"))
    assert converted.content != content
    assert_colours(image)


# Swaps red and green, which shows whether a profile is applied; as large as a display's.
@cache
def swapping_profile() -> bytes:
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    # ICC.1:2022, 7.3: a table of tags after the header of 128 bytes.
    entries = {
        bytes(profile[at : at + 4]): at for at in range(132, 132 + 12 * int.from_bytes(profile[128:132]), 12)
    }
    red, green = entries[b"rXYZ"], entries[b"gXYZ"]
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    return (
        bytes(profile)
        .replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))
        .replace(b"sRGB", b"swap")
    )


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        *(("RGB", kind) for kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF")),
        *(("RGBA", kind) for kind in ("PNG", "WEBP", "TIFF", "AVIF", "HEIF")),
        *(("P", kind) for kind in ("PNG", "TIFF")),
    ],
)
def test_colours_are_converted_to_srgb(kind: str, mode: str) -> None:
    image = corners().quantize(4) if mode == "P" else corners(mode=mode)
    content = saved(image, kind, icc_profile=swapping_profile())
    _, converted = convert_one(content, FORMATS[kind], max_edge=48)
    (red, green) = (converted.convert("RGB").getpixel(point) for point in ((8, 8), (40, 8)))
    assert isinstance(red, tuple)
    assert isinstance(green, tuple)
    assert red[1] > 150 > red[0]
    assert green[0] > 150 > green[1]


@pytest.mark.parametrize("profile", [b"", b"garbage" * 100, bytes(5_000_000), swapping_profile()[:-400]])
def test_a_broken_or_huge_profile_is_ignored(profile: bytes) -> None:
    image = convert_one(saved(corners(), "TIFF", icc_profile=profile), "image/tiff", max_edge=48)[1]
    assert_colours(image)


def test_a_profile_for_other_colours_is_ignored() -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert_colours(convert_one(saved(corners(), "JPEG", icc_profile=lab), JPEG, max_edge=48)[1])


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*" + b"\0" * 40]
)
def test_garbage_in_exif_is_ignored(exif: bytes) -> None:
    assert_colours(convert_one(saved(corners(), "JPEG", exif=exif), JPEG, max_edge=48)[1])


def test_a_phones_jpeg_with_a_second_image_is_one_picture() -> None:
    content = saved(corners(), "MPO", save_all=True, append_images=[Image.new("RGB", SIZE, BLACK)])
    assert convert_one(content, JPEG)[0].content == content
    assert_colours(convert_one(content, JPEG, max_edge=48)[1])


def test_a_jpeg_in_the_limits_of_bytes_is_not_changed_and_one_over_it_is_smaller() -> None:
    noise = Image.merge("RGB", [Image.effect_noise((400, 300), 60) for _ in "RGB"])
    content = saved(noise, "JPEG", quality=95)
    assert convert_one(content, JPEG, max_bytes=len(content))[0].content == content
    widths = []
    for limit in (len(content) - 1, len(content) // 3, 4_000):
        converted, _ = convert_one(content, JPEG, max_bytes=limit)
        assert len(converted.content) <= limit
        widths.append(converted.width)
    assert widths[0] == 400
    assert widths[0] > widths[1] > widths[2]
    code, message = refusal(content, JPEG, max_bytes=300)
    assert code == ErrorCode.IMAGE_TOO_LARGE
    assert message == "does not fit into 300 bytes even with 64 pixels"


def test_a_png_over_the_limit_of_bytes_is_shrunk_if_only_png_may_be_sent() -> None:
    noise = Image.merge("RGB", [Image.effect_noise((400, 300), 60) for _ in "RGB"])
    converted, _ = convert_one(saved(noise, "BMP"), "image/bmp", types=(PNG,), max_bytes=50_000)
    assert converted.media_type == PNG
    assert len(converted.content) <= 50_000


def test_a_narrow_picture_keeps_a_pixel() -> None:
    assert convert_one(saved(Image.new("RGB", (3000, 1)), "PNG"), PNG, max_edge=100)[1].size == (100, 1)


def test_a_picture_longer_than_a_jpeg_can_be_is_scaled() -> None:
    assert convert_one(saved(Image.new("RGB", (70_000, 2)), "BMP"), "image/bmp", types=(JPEG,))[1].size == (
        65_500,
        2,
    )


def test_a_huge_jpeg_is_scaled_while_it_is_decoded() -> None:
    content, needs = saved(Image.new("L", (12_000, 9_000), 90), "JPEG"), list[int]()
    options = replace(OPTIONS, max_edge=2048, max_pixels=200_000_000)
    (converted,) = convert(content, JPEG, options, needs)
    assert (converted.width, converted.height) == (2048, 1536)
    # A quarter of the width and height, not 108 MB.
    assert needs[0] < 30_000_000 + len(content)


def test_a_jpeg_that_needs_more_memory_than_there_is_is_scaled_down_instead_of_refused() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content, needs = saved(Image.new("L", (12_000, 9_000), 90), "JPEG", exif=exif), list[int]()
    options = replace(OPTIONS, max_edge=None, max_pixels=200_000_000, max_decode_bytes=100_000_000)
    (converted,) = convert(content, JPEG, options, needs)
    assert (converted.width, converted.height) == (2250, 3000)
    assert needs[0] < 100_000_000


def test_coefficients_of_a_progressive_jpeg_are_counted() -> None:
    image = Image.new("RGB", (2000, 1500), RED)
    baseline, progressive = list[int](), list[int]()
    options = replace(OPTIONS, max_edge=500)
    convert(saved(image, "JPEG"), JPEG, options, baseline)
    convert(saved(image, "JPEG", progressive=True), JPEG, options, progressive)
    assert progressive[0] - baseline[0] == pytest.approx(2000 * 1500 * 3 * 2, rel=0.01)


def test_a_tiff_has_pages() -> None:
    pages = [Image.new("RGB", (60 + page, 40), CORNERS[page]) for page in range(3)]
    content = saved(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    converted = convert(content, "image/tiff")
    assert [(image.page, image.width) for image in converted] == [(1, 60), (2, 61), (3, 62)]
    for image, colour in zip(converted, CORNERS, strict=False):
        assert_colours(Image.open(BytesIO(image.content)), (colour,) * 4)
    chosen = convert(content, "image/tiff", replace(OPTIONS, pages=((3, 3), (1, 2))))
    assert [image.page for image in chosen] == [3, 1, 2]
    assert refusal(content, "image/tiff", max_pages=2) == (
        ErrorCode.TOO_MANY_IMAGES,
        "has 3 pages; VQA_PDF_MAX_PAGES allows 2: choose some with `pages`",
    )
    assert refusal(content, "image/tiff", pages=((2, 7),)) == (
        ErrorCode.INVALID_JOB,
        "has 3 pages; `pages` asks for 7",
    )
    assert refusal(content, "image/tiff", pages=((1, 3), (1, 3))) == (
        ErrorCode.TOO_MANY_IMAGES,
        "`pages` asks for 6 pages; VQA_PDF_MAX_PAGES allows 5",
    )


def test_the_thumbnail_in_a_tiff_is_not_a_page() -> None:
    thumbnail = corners((12, 8))
    thumbnail.encoderinfo = {"tiffinfo": {254: 1}}
    content = saved(corners(), "TIFF", save_all=True, append_images=[thumbnail])
    assert convert_one(content, "image/tiff")[0].page is None


def test_pages_are_refused_for_a_picture() -> None:
    assert refusal(saved(corners(), "GIF"), "image/gif", pages=((1, 1),)) == (
        ErrorCode.INVALID_JOB,
        "`pages` is only for PDF and TIFF",
    )


def pdf(*pages: Image.Image) -> bytes:
    return saved(pages[0], "PDF", save_all=True, append_images=pages[1:], resolution=72)


def test_a_pdf_has_pages() -> None:
    content = pdf(*(Image.new("RGB", (60 + page, 40), CORNERS[page]) for page in range(3)))
    converted = convert(content, PDF)
    assert [(image.page, image.width) for image in converted] == [(1, 60), (2, 61), (3, 62)]
    for image, colour in zip(converted, CORNERS, strict=False):
        assert_colours(Image.open(BytesIO(image.content)), (colour,) * 4)
    chosen = convert(content, PDF, replace(OPTIONS, pages=((2, 3), (1, 1))))
    assert [image.page for image in chosen] == [2, 3, 1]
    assert refusal(content, PDF, max_pages=2)[0] == ErrorCode.TOO_MANY_IMAGES
    assert refusal(content, PDF, pages=((0, 1),)) == (
        ErrorCode.INVALID_JOB,
        "has 3 pages; `pages` asks for 0",
    )


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({"pdf_dpi": 144}, (192, 128)),
        ({"pdf_dpi": 144, "max_edge": 100}, (100, 67)),
        ({"pdf_dpi": 7200, "max_pixels": 60_000}, (300, 200)),
    ],
)
def test_a_page_is_rendered_at_the_size_that_is_sent(changes: dict[str, int], size: tuple[int, int]) -> None:
    _, image = convert_one(pdf(corners()), PDF, **changes)
    assert max(abs(a - b) for a, b in zip(image.size, size, strict=True)) <= 1
    assert_colours(image)


def raw_pdf(page: str, *objects: str) -> bytes:
    parts = [
        "<</Type/Catalog/Pages 2 0 R>>",
        "<</Type/Pages/Kids[3 0 R]/Count 1>>",
        f"<</Type/Page/Parent 2 0 R{page}>>",
    ]
    body = b"%PDF-1.7\n"
    offsets = []
    for number, part in enumerate((*parts, *objects), 1):
        offsets.append(len(body))
        body += f"{number} 0 obj\n{part}\nendobj\n".encode("latin-1")
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    size = len(offsets) + 1
    return (
        body
        + (
            f"xref\n0 {size}\n0000000000 65535 f \n{table}trailer<</Size {size}/Root 1 0 R>>\n"
            f"startxref\n{len(body)}\n%%EOF"
        ).encode()
    )


def test_a_rotated_page_with_an_annotation_is_drawn() -> None:
    form = (
        "<</Type/XObject/Subtype/Form/BBox[0 0 48 32]/Length 24>>stream\n1 0 0 rg 0 0 48 32 re f \nendstream"
    )
    annotation = "<</Type/Annot/Subtype/Stamp/F 4/Rect[0 32 48 64]/AP<</N 5 0 R>>>>"
    content = raw_pdf("/MediaBox[0 0 96 64]/Rotate 90/Annots[4 0 R]", annotation, form)
    _, image = convert_one(content, PDF)
    assert image.size == (64, 96)
    # The top left corner of the page is at the top right after a turn to the right.
    assert_colours(image, (WHITE, (255, 0, 0), WHITE, WHITE))


def test_an_encrypted_pdf_is_refused() -> None:
    encrypt = f"/Encrypt<</Filter/Standard/V 1/R 2/P -4/O<{'11' * 32}>/U<{'22' * 32}>>>/ID[<00><00>]"
    content = raw_pdf("/MediaBox[0 0 96 64]").replace(b"/Root 1 0 R", f"/Root 1 0 R{encrypt}".encode())
    assert refusal(content, PDF) == (ErrorCode.IMAGE_CORRUPT, "the PDF is encrypted: remove the password")


@pytest.mark.parametrize("content", [b"%PDF-1.7", b"%PDF-1.7\n" + b"\0" * 1000, raw_pdf("")[:100]])
def test_a_broken_pdf_is_refused(content: bytes) -> None:
    assert refusal(content, PDF)[0] == ErrorCode.IMAGE_CORRUPT


def test_a_picture_with_too_many_pixels_is_refused() -> None:
    for kind in set(FORMATS) - {"PDF"}:
        assert refusal(saved(corners(), kind), FORMATS[kind], max_pixels=96 * 64 - 1) == (
            ErrorCode.IMAGE_TOO_LARGE,
            "is 96 × 64 pixels; VQA_IMAGE_MAX_PIXELS allows 6143",
        )


def test_an_image_in_a_pdf_with_too_many_pixels_is_refused() -> None:
    code, message = refusal(pdf(corners()), PDF, max_pixels=6_000)
    assert code == ErrorCode.IMAGE_TOO_LARGE
    assert "96 × 64" in message


@pytest.mark.parametrize("kind", sorted(set(FORMATS) - {"PDF"}))
def test_a_truncated_picture_is_corrupt(kind: str) -> None:
    noise = Image.merge("RGB", [Image.effect_noise((200, 160), 60) for _ in "RGB"])
    content = saved(noise, kind)
    for share in (0.02, 0.3, 0.6, 0.9):
        code, message = refusal(content[: int(len(content) * share)], FORMATS[kind], max_edge=100)
        assert code == ErrorCode.IMAGE_CORRUPT
        assert re.fullmatch(r"the image is (incomplete|damaged: it cannot be decoded)", message)


def test_one_format_is_not_opened_as_another() -> None:
    for kind in set(FORMATS) - {"PNG", "PDF"}:
        assert refusal(saved(corners(), "PNG"), FORMATS[kind])[0] == ErrorCode.IMAGE_CORRUPT
    for media_type in ("image/x-icon", "image/svg+xml", "application/postscript"):
        assert refusal(b"%!PS-Adobe-3.0", media_type)[0] == ErrorCode.IMAGE_UNSUPPORTED_TYPE


def test_heic_and_pdf_name_the_extra_if_their_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, media_type in (("pillow_heif", "image/heic"), ("pypdfium2", PDF)):
        monkeypatch.setitem(__import__("sys").modules, module, None)
        code, message = refusal(b"", media_type)
        assert code == ErrorCode.IMAGE_UNSUPPORTED_TYPE
        assert "the extra `images`" in message


def test_missing_libraries_are_found_without_loading_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_installed()
    assert all(missing(media_type) is None for media_type in CONVERTIBLE_TYPES)
    monkeypatch.setattr("worker.images.conversion.find_spec", {"PIL": object()}.get)
    missing.cache_clear()
    assert missing("image/heic") == "pillow-heif"
    assert missing(PDF) == "pypdfium2"
    assert missing(JPEG) is None
    missing.cache_clear()
