"""Give a decoded picture the form in which it is sent: size, colours, PNG or JPEG."""

from io import BytesIO
from math import sqrt
from typing import cast

from PIL import Image, ImageCms

from worker.images.conversion import ConversionError, ConversionOptions, ConvertedImage
from worker.images.pages import fitted

JPEG, PNG = "image/jpeg", "image/png"
# A larger colour profile is ignored; those of printers have up to 3 MB.
MAX_PROFILE_BYTES = 4 * 1024 * 1024
# The smallest picture that is sent to meet the limit of bytes.
MIN_EDGE = 64

_QUALITIES = (90, 80, 70)
# A picture of few colours is a drawing or a screenshot, for which PNG can be smaller.
_FEW_COLOURS, _FEW_GREYS = 256, 64
# How much smaller than with the lowest level of compression a PNG of noise becomes, at most.
_PNG_GAIN = 1.25
_HIGH_BYTES = [value >> 8 for value in range(1 << 16)]
_SRGB = ImageCms.createProfile("sRGB")
_LAB = ImageCms.createProfile("LAB")
# EXIF 2.32, 4.6.4 A, Orientation.
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def encode(
    image: Image.Image,
    orientation: int,
    *,
    lossless: bool,
    options: ConversionOptions,
    page: int | None = None,
) -> ConvertedImage:
    """Return the picture upright, in sRGB and within the limits, without metadata.

    Args:
        image: the decoded picture; its `info` has the colour profile and the transparent colour.
        orientation: as in EXIF, 1 to 8.
        lossless: whether the source was compressed without loss.
        options: the limits.
        page: of the result.

    Raises:
        ConversionError: the picture does not fit even if it is tiny.
    """
    profile = image.info.get("icc_profile")
    is_drawing = lossless and image.mode in {"1", "P"}
    picture = _resized(_in_plain_mode(image, keep_palette=not profile), fitted(image.size, options.max_edge))
    if orientation in _TRANSPOSES:
        picture = _bare(picture.transpose(_TRANSPOSES[orientation]), picture)
    picture = _without_opaque_alpha(_in_srgb(picture, profile))
    return _smallest(
        picture, try_png=is_drawing or (lossless and _has_few_colours(picture)), options=options, page=page
    )


def _in_plain_mode(image: Image.Image, *, keep_palette: bool) -> Image.Image:
    """Return the picture with 8 bits per channel: 1, L, LA, P, RGB, RGBA, CMYK or LAB."""
    mode = image.mode
    if mode.startswith("I;16"):
        # The high byte, as Pillow does for 16-bit RGB.
        plain = image.convert("I").point(_HIGH_BYTES, "L")
    elif mode in {"I", "F"}:
        # These have no agreed range: the darkest value becomes black and the brightest white.
        low, high = cast("tuple[float, float]", image.getextrema())
        span = (high - low) or 1
        plain = image.convert("F").point(lambda value: value * (255 / span) - low * 255 / span).convert("L")
    elif mode == "P" and not keep_palette:
        plain = image.convert("RGBA" if "transparency" in image.info else "RGB")
    elif mode in {"1", "P", "L", "LA", "RGB", "RGBA", "CMYK", "LAB"} and not (
        "transparency" in image.info and mode != "P"
    ):
        plain = image
    else:
        has_alpha = "transparency" in image.info or mode in {"PA", "La", "RGBa"}
        plain = image.convert("RGBA" if has_alpha else "RGB")
    return _bare(plain, image)


def _bare(picture: Image.Image, source: Image.Image) -> Image.Image:
    """Remove metadata, which savers would write; keep the transparent colour of a palette."""
    transparent = source.info.get("transparency")
    picture.info = {"transparency": transparent} if picture.mode == "P" and transparent is not None else {}
    return picture


def _resized(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    if picture.size == size:
        return picture
    if picture.mode == "1":
        picture = picture.convert("L")
    elif picture.mode == "P":
        picture = _bare(picture.convert("RGBA" if "transparency" in picture.info else "RGB"), picture)
    return picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)


def _in_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert to sRGB; a profile that is broken or does not fit is ignored."""
    if picture.mode == "LAB":
        converted = ImageCms.profileToProfile(picture, _LAB, _SRGB, outputMode="RGB")
        return _bare(converted or picture, picture)
    if profile and len(profile) <= MAX_PROFILE_BYTES and picture.mode in {"L", "RGB", "RGBA", "CMYK"}:
        try:
            source = ImageCms.ImageCmsProfile(BytesIO(profile))
            if "sRGB" not in (source.profile.profile_description or ""):
                output = "RGBA" if picture.mode == "RGBA" else "RGB"
                converted = ImageCms.profileToProfile(picture, source, _SRGB, outputMode=output)
                if converted is not None:
                    was_grey = picture.mode == "L"
                    picture = _bare(converted.convert("L") if was_grey else converted, picture)
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass
    return picture.convert("RGB") if picture.mode == "CMYK" else picture


def _without_opaque_alpha(picture: Image.Image) -> Image.Image:
    if picture.mode in {"LA", "RGBA"} and picture.getextrema()[-1] == (255, 255):
        return picture.convert(picture.mode[:-1])
    return picture


def _has_few_colours(picture: Image.Image) -> bool:
    return picture.getcolors(_FEW_GREYS if picture.mode in {"L", "LA"} else _FEW_COLOURS) is not None


def _smallest(
    picture: Image.Image, *, try_png: bool, options: ConversionOptions, page: int | None
) -> ConvertedImage:
    """Return the smaller of PNG and JPEG; if it is over the limit, lower the quality, then the size."""
    use_jpeg = JPEG in options.types
    flat = _on_white(picture) if use_jpeg else picture
    smallest = None
    for quality in _QUALITIES if use_jpeg else ():
        jpeg = _jpeg(flat, quality, page)
        if smallest is None and try_png and PNG in options.types and _may_be_smaller(picture, jpeg):
            smallest = _png(picture, page)
        smallest = min(smallest or jpeg, jpeg, key=lambda form: len(form.content))
        if len(smallest.content) <= options.max_bytes:
            return smallest
    if not use_jpeg and PNG in options.types:
        smallest = _png(picture, page)
    while smallest is None or len(smallest.content) > options.max_bytes:
        if smallest is None or max(smallest.width, smallest.height) <= MIN_EDGE:
            text = f"does not fit into {options.max_bytes} bytes even with {MIN_EDGE} pixels"
            raise ConversionError("image_too_large", text)
        factor = min(0.9, max(0.3, 0.95 * sqrt(options.max_bytes / len(smallest.content))))
        edge = max(MIN_EDGE, int(max(smallest.width, smallest.height) * factor))
        smaller = _resized(flat, fitted(flat.size, edge))
        smallest = _jpeg(smaller, _QUALITIES[-1], page) if use_jpeg else _png(smaller, page)
    return smallest


def _may_be_smaller(picture: Image.Image, jpeg: ConvertedImage) -> bool:
    """Return whether it is worth to compress a PNG well, which takes far longer than the JPEG for noise."""
    if picture.mode == "1":
        return True
    quick = len(_png(picture, None, level=1).content)
    return quick <= _PNG_GAIN * len(jpeg.content)


def _on_white(picture: Image.Image) -> Image.Image:
    if picture.mode == "P":
        picture = picture.convert("RGBA" if "transparency" in picture.info else "RGB")
    if picture.mode not in {"LA", "RGBA"}:
        return _bare(picture.convert("L") if picture.mode == "1" else picture, picture)
    flat = Image.new(picture.mode[:-1], picture.size, "white")
    flat.paste(picture.convert(flat.mode), mask=picture.getchannel("A"))
    return flat


def _png(picture: Image.Image, page: int | None, *, level: int = 6) -> ConvertedImage:
    """Return a PNG; `level`: of zlib's compression."""
    buffer = BytesIO()
    picture.save(buffer, "PNG", compress_level=level)
    return ConvertedImage(PNG, buffer.getvalue(), *picture.size, page)


def _jpeg(picture: Image.Image, quality: int, page: int | None) -> ConvertedImage:
    buffer = BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return ConvertedImage(JPEG, buffer.getvalue(), *picture.size, page)
