"""Looks at pictures: decodes them in full, names their colours, reads their text where OCR is installed."""

import functools
import hashlib
import io
import re
import threading
from collections import Counter
from dataclasses import dataclass
from typing import Any

from PIL import Image, UnidentifiedImageError

from deploy.local.model_simulator.calls import Picture
from deploy.local.model_simulator.request import InlinePicture, RefusedError

_FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 100_000_000
_REMEMBERED_PICTURES = 256

# Colours are counted in a small version of the picture, with few enough colours to name each.
_SAMPLE_SIZE = (96, 96)
_SAMPLE_COLOURS = 24
_NAMED_COLOURS = 3
_SMALLEST_SHARE = 0.06

# Where a hue ends, in degrees, and its name.
_HUES = (
    (14, "red"),
    (42, "orange"),
    (66, "yellow"),
    (165, "green"),
    (196, "cyan"),
    (258, "blue"),
    (312, "purple"),
    (340, "pink"),
    (361, "red"),
)


@dataclass(frozen=True)
class _Look:
    """What is worth remembering of a picture by its digest."""

    format: str
    width: int
    height: int
    colours: tuple[str, ...]
    text: tuple[str, ...] | None


def look_at(picture: InlinePicture, where: str, *, decode: bool, read_text: bool) -> Picture:
    """Return what there is to see in a picture. Takes CPU time: run it in a thread.

    Args:
        picture: The picture as it came.
        where: How to call it in an error message.
        decode: Whether to decode all of it, or to read its header only.
        read_text: Whether to look for text, where OCR is installed.

    Raises:
        RefusedError: It cannot be decoded, or is too large.
    """
    digest = hashlib.sha256(picture.content).hexdigest()
    try:
        look = _look(digest, picture.content, decode=decode, read_text=read_text and can_read_text())
    except RefusedError as refused:
        raise RefusedError(f"{where}: {refused}", code=refused.code) from None
    return Picture(
        sha256=digest,
        bytes=len(picture.content),
        declared_type=picture.declared_type,
        format=look.format,
        width=look.width,
        height=look.height,
        colours=list(look.colours),
        text=None if look.text is None else list(look.text),
        detail=picture.detail,
    )


# The looks at the latest pictures, oldest first: tests and measurements send the same ones again and again.
_remembered: dict[tuple[str, bool, bool], _Look] = {}
_remembered_lock = threading.Lock()


def _look(digest: str, content: bytes, *, decode: bool, read_text: bool) -> _Look:
    key = (digest, decode, read_text)
    with _remembered_lock:
        known = _remembered.get(key)
    if known is not None:
        return known
    look = _look_anew(content, decode=decode, read_text=read_text)
    with _remembered_lock:
        _remembered[key] = look
        if len(_remembered) > _REMEMBERED_PICTURES:
            del _remembered[next(iter(_remembered))]
    return look


def _look_anew(content: bytes, *, decode: bool, read_text: bool) -> _Look:
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            width, height, kind = image.width, image.height, image.format or ""
            _check_size(width, height)
            if not decode:
                return _Look(kind, width, height, (), None)
            if not read_text:
                # Makes JPEGs decode faster, and still reads all of their data.
                image.draft("RGB", _SAMPLE_SIZE)
            image.load()
            rgb = _on_white(image)
    except RefusedError:
        raise
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RefusedError(f"the image cannot be decoded ({error})", code="invalid_image") from None
    return _Look(kind, width, height, main_colours(rgb), tuple(_read(rgb)) if read_text else None)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise RefusedError(f"{width}x{height} pixels are too many", code="image_too_large")


def _on_white(image: Image.Image) -> Image.Image:
    """Return the picture in RGB, what is transparent shown as white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    opaque = Image.new("RGBA", image.size, "white")
    opaque.alpha_composite(image.convert("RGBA"))
    return opaque.convert("RGB")


def main_colours(image: Image.Image) -> tuple[str, ...]:
    """Return the names of the colours that fill most of an RGB picture, the most frequent first."""
    sample = image.resize(_SAMPLE_SIZE, Image.Resampling.BOX)
    few = sample.quantize(_SAMPLE_COLOURS, dither=Image.Dither.NONE).convert("RGB")
    shares: Counter[str] = Counter()
    for count, pixel in few.getcolors() or []:
        if isinstance(pixel, tuple):
            shares[name_of(*pixel[:3])] += count
    total = shares.total()
    common = [name for name, count in shares.most_common(_NAMED_COLOURS) if count >= _SMALLEST_SHARE * total]
    return tuple(common)


def name_of(red: int, green: int, blue: int) -> str:
    """Return the plain name of a colour given by its channels from 0 to 255."""
    brightest, darkest = max(red, green, blue), min(red, green, blue)
    value = brightest / 255
    saturation = (brightest - darkest) / brightest if brightest else 0.0
    if value < 0.16:  # noqa: PLR2004 - these thresholds are the definition of the names
        return "black"
    if saturation < 0.14:  # noqa: PLR2004
        return "white" if value > 0.86 else "grey"  # noqa: PLR2004
    hue = _hue(red, green, blue)
    name = next(name for end, name in _HUES if hue < end)
    if name == "orange" and value < 0.72:  # noqa: PLR2004
        return "brown"
    if name == "red" and saturation < 0.55 and value > 0.8:  # noqa: PLR2004
        return "pink"
    return name


def _hue(red: int, green: int, blue: int) -> float:
    """Return the angle on the colour wheel in degrees; the channels must not all be equal."""
    brightest, spread = max(red, green, blue), max(red, green, blue) - min(red, green, blue)
    if brightest == red:
        return 60 * ((green - blue) / spread) % 360
    if brightest == green:
        return 60 * ((blue - red) / spread + 2)
    return 60 * ((red - green) / spread + 4)


# One engine, made at the first use and used by one thread at a time: it takes a second to load.
_ocr_lock = threading.Lock()


@functools.cache
def _ocr() -> Any:
    try:
        from rapidocr_onnxruntime import RapidOCR  # noqa: PLC0415
    except ImportError:
        # Not installed, or a system library of its dependencies is missing: the stand-in works without.
        return None
    return RapidOCR()


def can_read_text() -> bool:
    """Tell whether OCR is installed."""
    with _ocr_lock:
        return _ocr() is not None


def _read(image: Image.Image) -> list[str]:
    import numpy as np  # noqa: PLC0415 - comes with the OCR

    # OCR engines expect the channels in OpenCV's order.
    pixels = np.asarray(image)[:, :, ::-1]
    with _ocr_lock:
        found, _ = _ocr()(pixels)
    return in_reading_order([(line[0], str(line[1])) for line in found or []])


def in_reading_order(found: list[tuple[list[list[float]], str]]) -> list[str]:
    """Join pieces of text that stand side by side into lines, from top to bottom.

    Args:
        found: For each piece the four corners of its box, from the upper left one clockwise, and its text.
    """
    rows: list[list[tuple[list[list[float]], str]]] = []
    for box, text in sorted(found, key=lambda piece: _middle(piece[0])):
        if rows and _middle(box) - _middle(rows[-1][0][0]) < (box[3][1] - box[0][1]) / 2:
            rows[-1].append((box, text))
        else:
            rows.append([(box, text)])
    lines = (" ".join(text for _, text in sorted(row, key=lambda piece: piece[0][0][0])) for row in rows)
    return [re.sub(r"\s+", " ", line).strip() for line in lines]


def _middle(box: list[list[float]]) -> float:
    return (box[0][1] + box[3][1]) / 2
