"""Decode images and name their main colours."""

import hashlib
import io
from collections import Counter
from functools import cache

from PIL import Image, UnidentifiedImageError

from deploy.local.model_simulator.calls import Picture
from deploy.local.model_simulator.request import InlinePicture, RefusedError

_FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 100_000_000
# Colours are counted in a small version of the image.
_SAMPLE_SIZE = (96, 96)
_MAX_COLOURS = 3
_MIN_SHARE = 0.06
# The distance of the corners' sample points from the sides, as a part of these.
_CORNER = 8
# Each pixel counts for the nearest of these.
_SHADES = {
    "black": ("#000000", "#202024"),
    "grey": ("#505050", "#808080", "#b0b0b0"),
    "white": ("#ffffff", "#e8e8e8"),
    "red": ("#ff0000", "#be1622", "#800000"),
    "orange": ("#ff8c00", "#ffa500", "#e27420", "#ffb05c"),
    "brown": ("#8b4513", "#704a2c", "#583820"),
    "yellow": ("#ffff00", "#ffe600", "#fff4ce"),
    "green": ("#008000", "#00ff00", "#0e6e46", "#90ee90"),
    "cyan": ("#00ffff", "#00c8d2"),
    "blue": ("#0000ff", "#2c66b2", "#609ed6", "#a8cdea", "#3e5496", "#122c54"),
    "purple": ("#800080", "#9b59b6"),
    "pink": ("#ffc0cb", "#ffa0be", "#ff69b4"),
}
_NAMES = [name for name, shades in _SHADES.items() for _ in shades]


def look_at(picture: InlinePicture, where: str, *, decode: bool) -> Picture:
    """Return what there is to know of an image. Takes CPU time: run it in a thread.

    Args:
        picture: The image as it came.
        where: Its place in the request, for error messages.
        decode: Whether to decode it completely, or to read its header only.

    Raises:
        RefusedError: It cannot be decoded, or is too large.
    """
    try:
        with Image.open(io.BytesIO(picture.content), formats=_FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise RefusedError(f"{where}: {width}x{height} pixels are too many", code="image_too_large")
            pixels = _decoded(image) if decode else None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RefusedError(f"{where}: the image cannot be decoded ({error})", code="invalid_image") from None
    return Picture(
        sha256=hashlib.sha256(picture.content).hexdigest(),
        bytes=len(picture.content),
        declared_type=picture.declared_type,
        format=image.format or "",
        width=width,
        height=height,
        colours=[] if pixels is None else main_colours(pixels),
        corners=[] if pixels is None else _corners(pixels),
        detail=picture.detail,
    )


def _decoded(image: Image.Image) -> Image.Image:
    """Return the pixels as RGB, perhaps in a smaller size."""
    # Makes JPEGs decode faster, and still reads all of their data.
    image.draft("RGB", _SAMPLE_SIZE)
    image.load()
    if image.has_transparency_data:
        # Transparent pixels count as white.
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        return opaque.convert("RGB")
    return image.convert("RGB")


def _corners(image: Image.Image) -> list[str]:
    sides = [(side // _CORNER, side - 1 - side // _CORNER) for side in image.size]
    pixels = [image.getpixel((x, y)) for y in sides[1] for x in sides[0]]
    return [f"#{bytes(pixel).hex()}" for pixel in pixels if isinstance(pixel, tuple)]


def main_colours(image: Image.Image) -> list[str]:
    """Return the names of the colours that fill most of an RGB image, the most frequent first."""
    sample = image.resize(_SAMPLE_SIZE, Image.Resampling.BOX)
    shares: Counter[str] = Counter()
    indexed = sample.quantize(palette=_palette(), dither=Image.Dither.NONE)
    for name, count in zip(_NAMES, indexed.histogram(), strict=False):
        shares[name] += count
    return [name for name, count in shares.most_common(_MAX_COLOURS) if count >= _MIN_SHARE * shares.total()]


@cache
def _palette() -> Image.Image:
    palette = Image.new("P", (1, 1))
    palette.putpalette(bytes.fromhex("".join(shade[1:] for shades in _SHADES.values() for shade in shades)))
    return palette
