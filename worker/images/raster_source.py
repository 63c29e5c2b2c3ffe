"""Decode pictures with Pillow and pillow-heif: header first, then limits and memory, then pixels."""

from collections.abc import Callable, Iterator
from io import BytesIO
from itertools import count

from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from worker.images.conversion import HEIC, ConversionError, ConversionOptions, ConvertedImage
from worker.images.output_form import MAX_PROFILE_BYTES, encode
from worker.images.pages import check_dimensions, chosen_pages, fitted
from worker.images.scan import Scan, scan_for

Reserve = Callable[[int], None]
Progress = Callable[[], None]

# The classes themselves: `Image.open` can hand a JPEG to the plugin for MPO, and registers every format.
_FORMATS: dict[str, type[ImageFile.ImageFile]] = {
    "image/jpeg": JpegImagePlugin.JpegImageFile,
    "image/png": PngImagePlugin.PngImageFile,
    "image/webp": WebPImagePlugin.WebPImageFile,
    "image/avif": AvifImagePlugin.AvifImageFile,
    "image/gif": GifImagePlugin.GifImageFile,
    "image/tiff": TiffImagePlugin.TiffImageFile,
    "image/bmp": BmpImagePlugin.BmpImageFile,
    "image/jp2": Jpeg2KImagePlugin.Jpeg2KImageFile,
}
# Peak memory of decoding in bytes per pixel, apart from the decoded picture: measured with `VmPeak`.
_CODEC_BYTES = {"image/webp": 12, "image/avif": 8, HEIC: 8, "image/jp2": 20, "image/tiff": 5, "image/gif": 2}
_MODE_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}
# The picture in its final size, a copy in another mode, and the encoded result.
_OUTPUT_BYTES = 6
# libjpeg decodes all scans of a progressive JPEG to coefficients of 16 bits before the first line.
_COEFFICIENT_BYTES = 2
# Encoders write about 10; each costs a pass over all coefficients.
_MAX_SCANS = 200
_MAX_TIFF_PAGES = 1000
# Pillow 13 reads its header as that of a TIFF.
_BIG_ENDIAN_BIGTIFF = b"MM\0+"
# libjpeg decodes to 1/2, 1/4 or 1/8 of the size.
_MAX_DCT_SCALE = 8
_NEW_SUBFILE_TYPE, _BITS_PER_SAMPLE, _PHOTOMETRIC, _ORIENTATION = 254, 258, 262, 274
_SUB_IFDS, _DNG_VERSION = 330, 50706
# A mask or a smaller version of another page (TIFF 6.0, section 8, NewSubfileType).
_NOT_A_PAGE = 0b101
# TIFF 6.0, section 8, PhotometricInterpretation.
_WHITE_IS_ZERO = 0
_FROM_12_BITS = [min(value >> 4, 255) for value in range(1 << 16)]
_FROM_INVERTED_16_BITS = [255 - (value >> 8) for value in range(1 << 16)]

# The limits of pixels are checked here, with the job's own.
Image.MAX_IMAGE_PIXELS = None
PngImagePlugin.MAX_TEXT_CHUNK = MAX_PROFILE_BYTES
# Threads multiply the memory, and the processes already use all processors.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1


def convert_raster(
    content: bytes, media_type: str, options: ConversionOptions, reserve: Reserve, progress: Progress
) -> list[ConvertedImage]:
    """Convert a picture, or the pages of a TIFF; see `converter.convert`."""
    image = _open(content, media_type)
    check_dimensions(image.size, options)
    frames = _frames(image, media_type, options)
    _seek(image, frames[0][0])
    if len(frames) == 1 and _needs_no_change(image, content, media_type, options):
        return [ConvertedImage(media_type, content, *image.size, None)]
    need = 0
    for frame, _ in frames:
        _seek(image, frame)
        check_dimensions(image.size, options)
        need = max(need, _need(image, len(content), media_type, options))
    reserve(len(content) + need + sum(_result_bytes(image.size, options) for _ in frames[1:]))
    results = []
    for frame, page in frames:
        _seek(image, frame)
        orientation = _orientation(image, content, media_type)
        picture = _decoded(image)
        lossless = media_type != "image/jpeg"
        results.append(encode(picture, orientation, lossless=lossless, options=options, page=page))
        progress()
    return results


def _open(content: bytes, media_type: str) -> ImageFile.ImageFile:
    if media_type == "image/jpeg":
        _check_jpeg(content)
    if content.startswith(_BIG_ENDIAN_BIGTIFF):
        text = "the content is a BigTIFF of big-endian byte order: convert it to JPEG or PNG"
        raise ConversionError("image_unsupported_type", text)
    file_type = _heif() if media_type == HEIC else _FORMATS.get(media_type)
    if file_type is None:
        raise ConversionError("image_unsupported_type", "this type cannot be decoded")
    return file_type(BytesIO(content))


def _check_jpeg(content: bytes) -> None:
    if content.count(b"\xff\xda") > _MAX_SCANS:
        raise ConversionError("image_corrupt", "the JPEG has too many scans")
    if _scanned(content, "image/jpeg").is_lossless:
        text = "the content is a lossless or hierarchical JPEG: convert it to JPEG or PNG"
        raise ConversionError("image_unsupported_type", text)


def _scanned(content: bytes, media_type: str) -> Scan:
    scan = scan_for(media_type)
    scan.feed(content)
    return scan


def _heif() -> type[ImageFile.ImageFile]:
    # Late: it is optional, and most processes do not need its memory.
    try:
        import pillow_heif  # noqa: PLC0415
    except ImportError:
        text = "the content is HEIC, which needs pillow-heif: install the extra `images`"
        raise ConversionError("image_unsupported_type", text) from None
    pillow_heif.options.DECODE_THREADS = 1
    # Thumbnails would be decoded instead of the picture.
    pillow_heif.options.THUMBNAILS = False
    pillow_heif.options.DEPTH_IMAGES = False
    pillow_heif.options.AUX_IMAGES = False
    return pillow_heif.HeifImageFile


def _frames(
    image: ImageFile.ImageFile, media_type: str, options: ConversionOptions
) -> list[tuple[int | None, int | None]]:
    """Return the frames to send, each with its page; None: the first one of a source without pages."""
    if media_type != "image/tiff":
        if options.pages is not None:
            raise ConversionError("invalid_job", "`pages` is only for PDF and TIFF")
        return [(None, None)]
    is_dng, has_sub_images = (_tag(image, tag, None) is not None for tag in (_DNG_VERSION, _SUB_IFDS))
    frames = [frame for frame in _tiff_frames(image) if not _is_secondary(image)]
    if is_dng or (has_sub_images and not frames):
        # Only a thumbnail could be decoded.
        text = "the content is a camera's raw file: export it as JPEG"
        raise ConversionError("image_unsupported_type", text)
    frames = frames or [0]
    pages = chosen_pages(len(frames), options)
    if len(frames) == 1:
        return [(frames[0], None) for _ in pages]
    return [(frames[page - 1], page) for page in pages]


def _tiff_frames(image: ImageFile.ImageFile) -> Iterator[int]:
    """Yield the number of each image of a TIFF, after seeking to it."""
    for frame in count():
        if frame > _MAX_TIFF_PAGES:
            raise ConversionError("too_many_images", f"has more than {_MAX_TIFF_PAGES} pages")
        try:
            image.seek(frame)
        except EOFError:
            return
        yield frame


def _is_secondary(image: ImageFile.ImageFile) -> bool:
    kind = _tag(image, _NEW_SUBFILE_TYPE, 0)
    return isinstance(kind, int) and bool(kind & _NOT_A_PAGE)


def _tag(image: ImageFile.ImageFile, number: int, default: object) -> object:
    return image.tag_v2.get(number, default) if isinstance(image, TiffImagePlugin.TiffImageFile) else default


def _seek(image: ImageFile.ImageFile, frame: int | None) -> None:
    if frame is not None:
        image.seek(frame)


def _needs_no_change(
    image: ImageFile.ImageFile, content: bytes, media_type: str, options: ConversionOptions
) -> bool:
    return (
        media_type in options.types
        and len(content) <= options.max_bytes
        and fitted(image.size, options.max_edge) == image.size
        and not getattr(image, "is_animated", False)
        and _orientation(image, content, media_type) == 1
        and not (media_type == "image/jpeg" and _scanned(content, media_type).is_arithmetic)
        and (options.takes_cmyk or image.mode != "CMYK")
        and (options.takes_16_bit or not _is_16_bit(image, content, media_type))
    )


def _is_16_bit(image: ImageFile.ImageFile, content: bytes, media_type: str) -> bool:
    if media_type == "image/png":
        # PNG (third edition), 11.2.1 IHDR: the bit depth follows signature, chunk header, width and height.
        return content[24:25] == b"\x10"
    return image.mode.startswith("I")


def _orientation(image: ImageFile.ImageFile, content: bytes, media_type: str) -> int:
    """Return the orientation from EXIF, 1 to 8, that the decoder does not apply itself."""
    if media_type == "image/png":
        # Pillow finds EXIF that comes after the pixels only when it decodes them.
        return _scanned(content, media_type).orientation
    if media_type == HEIC:
        return 1
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        # Pillow turns it when it decodes it.
        return 1
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif", b""))
        orientation = exif.get(_ORIENTATION)
    except Exception:  # noqa: BLE001 - the parser raises many kinds; a picture is not refused for its metadata
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1  # noqa: PLR2004


def _decoded(image: ImageFile.ImageFile) -> Image.Image:
    """Decode a picture; correct what Pillow leaves to the caller."""
    frame = image.tile[0].extents if image.tile and isinstance(image, GifImagePlugin.GifImageFile) else None
    bits = _tag(image, _BITS_PER_SAMPLE, ())
    image.load()
    if frame is not None and frame != (0, 0, *image.size) and "transparency" not in image.info:
        return _on_canvas(image, frame)
    if image.mode.startswith("I;16") and bits == (12,):
        # Pillow does not scale them to 16 bits.
        return image.convert("I").point(_FROM_12_BITS, "L")
    if image.mode.startswith("I;16") and _tag(image, _PHOTOMETRIC, None) == _WHITE_IS_ZERO:
        # Pillow inverts only up to 8 bits.
        return image.convert("I").point(_FROM_INVERTED_16_BITS, "L")
    return image


def _on_canvas(image: Image.Image, frame: tuple[int, int, int, int]) -> Image.Image:
    """Leave what the frame of a GIF does not cover transparent, like browsers; Pillow gives it a colour."""
    canvas = Image.new("RGBA", image.size)
    canvas.paste(image.crop(frame).convert("RGBA"), frame)
    return canvas


def _need(image: ImageFile.ImageFile, size: int, media_type: str, options: ConversionOptions) -> int:
    """Choose the scale of a JPEG; return the estimated memory of decoding and encoding, in bytes.

    `size`: of the source in bytes, which are in memory too.
    """
    coefficients = 0
    if media_type == "image/jpeg":
        if image.info.get("progressive"):
            width, height = image.size
            coefficients = width * height * len(image.getbands()) * _COEFFICIENT_BYTES
        _scale_jpeg(image, size + coefficients, options)
    target = fitted(image.size, options.max_edge)
    pixel_bytes = _MODE_BYTES.get(image.mode, 4) + _CODEC_BYTES.get(media_type, 0)
    if image.mode in {"P", "1", "LA", "RGBA"} or image.mode.startswith("I;16"):
        pixel_bytes += 4  # a copy as RGB, as 32-bit grey, or with colours multiplied by alpha
    decoded = image.size[0] * image.size[1]
    return decoded * pixel_bytes + coefficients + target[0] * target[1] * _OUTPUT_BYTES


def _scale_jpeg(image: ImageFile.ImageFile, other_bytes: int, options: ConversionOptions) -> None:
    """Let libjpeg scale a picture that is larger than wanted, or than the memory allows, while it decodes it.

    A photo of 200 megapixels is rather scaled down than refused: no model looks at so many.
    """
    width, height = image.size
    target = fitted(image.size, options.max_edge)
    scale = 1
    while scale < _MAX_DCT_SCALE:
        # Scaling in the decoder is a little coarse: leave something to the resampling.
        is_larger = all(2 * scale * it * 5 <= side * 4 for it, side in zip(target, image.size, strict=True))
        pixels, sent = width * height // scale**2, min(width * height // scale**2, target[0] * target[1])
        need = other_bytes + pixels * _MODE_BYTES.get(image.mode, 4) + sent * _OUTPUT_BYTES
        if not is_larger and (options.max_decode_bytes is None or need <= options.max_decode_bytes):
            break
        scale *= 2
    if scale > 1:
        image.draft(None, (max(1, width // scale), max(1, height // scale)))


def _result_bytes(size: tuple[int, int], options: ConversionOptions) -> int:
    """Return the estimated size of an encoded page: half a byte per pixel."""
    width, height = fitted(size, options.max_edge)
    return min(width * height // 2, options.max_bytes)
