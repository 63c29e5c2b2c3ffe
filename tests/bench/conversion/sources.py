"""Make the pictures of the benchmark: photos of several noises, pages of text, drawings."""

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from io import BytesIO
from typing import Any, Final

import pillow_heif
from PIL import Image, ImageDraw

pillow_heif.register_heif_opener()

MP_8, MP_12, MP_50 = (3264, 2448), (4032, 3024), (8160, 6144)
FULL_HD, A4_200, A4_300 = (1920, 1080), (1654, 2339), (2480, 3508)
TINY: Final = (64, 48)
# The common recommendation for Claude and others: no side above 1568 pixels.
EDGE: Final = 1568
PDF_DPI: Final = 150

_ORIENTATION: Final = 0x0112
_ON_ITS_SIDE: Final = 6
_SCAN_QUALITY: Final = 85
_PHOTO_QUALITY: Final = 92
# Size of the spots of each noise as a part of the width, and its standard deviation.
_NOISES: Final = ((1 / 6, 200.0), (1 / 40, 110.0), (1 / 200, 60.0), (1 / 1000, 30.0))
_GRAIN: Final = 9.0
_TEXT: Final = "The quick brown fox jumps over the lazy dog, 0123456789. " * 4

Make = Callable[[tuple[int, int]], bytes]


@dataclass(frozen=True)
class Source:
    """A file to convert.

    Attributes:
        content: of the measured size.
        tiny: a small picture of the same kind, which makes a process load its libraries.
    """

    name: str
    media_type: str
    content: bytes
    tiny: bytes
    max_edge: int | None = None


@dataclass(frozen=True)
class Recipe:
    """How to make a source."""

    name: str
    media_type: str
    make: Make
    size: tuple[int, int]
    max_edge: int | None = None

    @property
    def pixels(self) -> int:
        """The number of pixels."""
        return self.size[0] * self.size[1]

    def source(self) -> Source:
        """Make it; takes up to 20 seconds for large ones."""
        content, tiny = _made(self.make, self.size), _made(self.make, TINY)
        return Source(self.name, self.media_type, content, tiny, self.max_edge)


@cache
def _made(make: Make, size: tuple[int, int]) -> bytes:
    return make(size)


@cache
def photo(size: tuple[int, int]) -> Image.Image:
    """Return a picture with details of all sizes, which compresses about as well as a photo."""
    luma, *chroma = (_noise(size, _NOISES if channel == 0 else _NOISES[:2]) for channel in range(3))
    grain = Image.effect_noise(size, _GRAIN)
    luma = Image.blend(luma, grain, 0.25)
    return Image.merge("YCbCr", (luma, *chroma)).convert("RGB")


def _noise(size: tuple[int, int], noises: tuple[tuple[float, float], ...]) -> Image.Image:
    picture = Image.new("L", size, 128)
    for part, deviation in noises:
        spots = max(2, round(1 / part))
        small = Image.effect_noise((spots, max(2, spots * size[1] // size[0])), deviation)
        picture = Image.blend(picture, small.resize(size, Image.Resampling.BICUBIC), 0.4)
    return picture


def page(size: tuple[int, int]) -> Image.Image:
    """Return a page of text in black on white."""
    picture = Image.new("L", size, 255)
    draw, step = ImageDraw.Draw(picture), max(12, size[1] // 70)
    for line in range(2 * step, size[1] - 2 * step, step):
        draw.text((2 * step, line), _TEXT[line % 7 :], fill=0, font_size=step * 0.7)
    return picture


def scan(size: tuple[int, int]) -> Image.Image:
    """Return a page of text on paper with some noise, in colour."""
    ink = page(size).point(lambda value: 255 - value)
    channels = []
    for brightness in (240, 236, 225):
        channel = Image.blend(Image.new("L", size, brightness), Image.effect_noise(size, 20), 0.1)
        channel.paste(40, mask=ink)
        channels.append(channel)
    return Image.merge("RGB", channels)


def drawing(size: tuple[int, int]) -> Image.Image:
    """Return a window with text, as in a screenshot."""
    picture = Image.new("RGB", size, "#f4f6f8")
    picture.paste(page((size[0] * 3 // 4, size[1] * 3 // 4)).convert("RGB"), (size[0] // 5, size[1] // 6))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 0, size[0], size[1] // 12), fill="#2050a0")
    for number in range(8):
        top = size[1] * (number + 2) // 12
        draw.rectangle(
            (size[0] // 50, top, size[0] // 6, top + size[1] // 20), fill=f"hsl({number * 40},60%,70%)"
        )
    return picture


def encoded(picture: Image.Image, form: str, **options: Any) -> bytes:
    """Return the picture in a format of Pillow."""
    buffer = BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def jpeg(size: tuple[int, int], *, on_its_side: bool = False, mode: str = "RGB") -> bytes:
    """Return a photo as JPEG."""
    exif = Image.Exif()
    if on_its_side:
        exif[_ORIENTATION] = _ON_ITS_SIDE
    return encoded(photo(size).convert(mode), "JPEG", quality=_PHOTO_QUALITY, exif=exif)


def heic(size: tuple[int, int]) -> bytes:
    """Return a photo as HEIC."""
    return encoded(photo(size), "HEIF", quality=60)


def avif(size: tuple[int, int]) -> bytes:
    """Return a photo as AVIF."""
    return encoded(photo(size), "AVIF", quality=70, speed=9)


def jpeg_2000(size: tuple[int, int]) -> bytes:
    """Return a photo as JPEG 2000, about one bit per pixel and channel."""
    return encoded(photo(size), "JPEG2000", quality_mode="rates", quality_layers=[10], irreversible=True)


def png_of_16_bits(size: tuple[int, int]) -> bytes:
    """Return a photo as PNG with 16 bits per channel, which Pillow does not write."""
    samples = photo(size).tobytes()
    pixels = bytearray(2 * len(samples))
    pixels[0::2] = pixels[1::2] = samples
    row = 6 * size[0]
    lines = b"".join(b"\0" + pixels[start : start + row] for start in range(0, len(pixels), row))
    header = struct.pack(">IIBBBBB", *size, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def tiff(size: tuple[int, int], *, mode: str) -> bytes:
    """Return a scan as TIFF with LZW."""
    picture = page(size).convert("1", dither=Image.Dither.NONE) if mode == "1" else scan(size)
    return encoded(picture, "TIFF", compression="tiff_lzw")


def gif(size: tuple[int, int]) -> bytes:
    """Return a drawing as GIF."""
    return encoded(drawing(size), "GIF")


def gif_photo(size: tuple[int, int]) -> bytes:
    """Return a photo in 256 colours as GIF."""
    return encoded(photo(size).quantize(256), "GIF")


def bmp(size: tuple[int, int]) -> bytes:
    """Return a photo as BMP."""
    return encoded(photo(size), "BMP")


def pdf(size: tuple[int, int]) -> bytes:
    """Return three scanned pages as PDF, each a JPEG."""
    pages = [scan(size) for _ in range(3)]
    dots = size[1] / 11.69  # the height of A4 in inches
    return encoded(
        pages[0], "PDF", save_all=True, append_images=pages[1:], resolution=dots, quality=_SCAN_QUALITY
    )


_LYING: Final = partial(jpeg, on_its_side=True)
RECIPES: Final = (
    Recipe("JPEG on its side, 12 MP", "image/jpeg", _LYING, MP_12),
    Recipe("JPEG on its side, 50 MP", "image/jpeg", _LYING, MP_50),
    Recipe(f"JPEG 12 MP, to {EDGE} pixels", "image/jpeg", jpeg, MP_12, EDGE),
    Recipe(f"JPEG 50 MP, to {EDGE} pixels", "image/jpeg", jpeg, MP_50, EDGE),
    Recipe("JPEG in CMYK, 12 MP", "image/jpeg", partial(jpeg, mode="CMYK"), MP_12),
    Recipe("HEIC, 12 MP", "image/heic", heic, MP_12),
    Recipe(f"HEIC 12 MP, to {EDGE} pixels", "image/heic", heic, MP_12, EDGE),
    Recipe("AVIF, 12 MP", "image/avif", avif, MP_12),
    Recipe("PNG of 16 bits, 8 MP", "image/png", png_of_16_bits, MP_8),
    Recipe("JPEG 2000, 8 MP", "image/jp2", jpeg_2000, MP_8),
    Recipe("BMP, 8 MP", "image/bmp", bmp, MP_8),
    Recipe("GIF, a screenshot, 2 MP", "image/gif", gif, FULL_HD),
    Recipe("GIF, a photo, 2 MP", "image/gif", gif_photo, FULL_HD),
    Recipe("TIFF (LZW), A4 at 300 dpi, 1 bit", "image/tiff", partial(tiff, mode="1"), A4_300),
    Recipe("TIFF (LZW), A4 at 300 dpi, colour", "image/tiff", partial(tiff, mode="RGB"), A4_300),
    Recipe("PDF, 3 scanned pages", "application/pdf", pdf, A4_200),
)
QUICK: Final = tuple(
    it
    for it in RECIPES
    if it.name.startswith(("JPEG on its side, 12", "JPEG 12", "PNG", "TIFF (LZW), A4 at 300 dpi, 1", "PDF"))
)
# Typical pictures for `VQA_IMAGE_MAX_EDGE`, which are sent unchanged without it.
TYPICAL: Final = (
    Recipe("photo, 12 MP", "image/jpeg", jpeg, MP_12),
    Recipe("photo, 50 MP", "image/jpeg", jpeg, MP_50),
    Recipe("screenshot, 2 MP", "image/png", lambda size: encoded(drawing(size), "PNG"), FULL_HD),
    Recipe(
        "scan, A4 at 300 dpi",
        "image/jpeg",
        lambda size: encoded(scan(size), "JPEG", quality=_SCAN_QUALITY),
        A4_300,
    ),
)


def padded(media_type: str, size: int) -> bytes:
    """Return a noisy JPEG, PNG or WebP of about `size` bytes."""
    form, per_pixel = {"image/jpeg": ("JPEG", 1.1), "image/png": ("PNG", 3.0), "image/webp": ("WEBP", 1.0)}[
        media_type
    ]
    edge = max(16, round((size / per_pixel) ** 0.5))
    noise = Image.merge("RGB", [Image.effect_noise((edge, edge), 90) for _ in range(3)])
    options = {"quality": 90, "method": 0} if form == "WEBP" else {"quality": 92, "compress_level": 1}
    return encoded(noise, form, **options)
