"""Render the pages of a PDF with PDFium."""

from math import isfinite, sqrt
from typing import TYPE_CHECKING

from worker.images.conversion import ConversionError, ConversionOptions, ConvertedImage
from worker.images.output_form import encode
from worker.images.pages import MAX_EDGE, check_dimensions, chosen_pages
from worker.images.raster_source import Progress, Reserve

if TYPE_CHECKING:
    from pypdfium2 import PdfDocument

# PDF 2.0 (ISO 32000-2), 8.3.2.3: the default unit is 1/72 inch.
_UNITS_PER_INCH = 72
# PDFium's bitmap, Pillow's picture, a copy in another mode, and the encoded result.
_RENDER_BYTES = 16
# Of an image on a page: decoded, and converted for the page.
_IMAGE_BYTES = 8


def convert_pdf(
    content: bytes, options: ConversionOptions, reserve: Reserve, progress: Progress
) -> list[ConvertedImage]:
    """Render the chosen pages, with annotations and the values of forms; see `converter.convert`."""
    try:
        # Late: it is optional, and most processes do not need its memory.
        import pypdfium2  # noqa: PLC0415
    except ImportError:
        text = "the content is a PDF, which needs pypdfium2: install the extra `images`"
        raise ConversionError("image_unsupported_type", text) from None
    try:
        with pypdfium2.PdfDocument(content) as document:
            return _convert_document(document, len(content), options, reserve, progress)
    except pypdfium2.PdfiumError as error:
        is_encrypted = error.err_code == pypdfium2.raw.FPDF_ERR_PASSWORD
        text = "is encrypted: remove the password" if is_encrypted else "cannot be read"
        raise ConversionError("image_corrupt", f"the PDF {text}") from None


def _convert_document(
    document: "PdfDocument", size: int, options: ConversionOptions, reserve: Reserve, progress: Progress
) -> list[ConvertedImage]:
    document.init_forms()
    if not len(document):
        raise ConversionError("image_corrupt", "the PDF has no pages")
    pages = chosen_pages(len(document), options)
    scales = {page: _scale(document.get_page_size(page - 1), options) for page in pages}
    need = results = 0
    for page, scale in scales.items():
        width, height = document.get_page_size(page - 1)
        pixels = int((width * scale + 1) * (height * scale + 1))
        need = max(need, pixels * _RENDER_BYTES + _image_bytes(document, page, options))
        results += min(pixels // 2, options.max_bytes)
    reserve(size + need + results)
    converted = []
    for page in pages:
        converted.append(_render(document, page, scales[page], options))
        progress()
    return converted


def _scale(size: tuple[float, float], options: ConversionOptions) -> float:
    """Return the pixels per unit at which a page is sent."""
    width, height = size
    if not (isfinite(width) and isfinite(height) and width > 0 and height > 0):
        raise ConversionError("image_corrupt", "a page of the PDF has no size")
    edge = min(options.max_edge or MAX_EDGE, MAX_EDGE)
    wanted = min(
        options.pdf_dpi / _UNITS_PER_INCH,
        edge / max(width, height),
        sqrt(options.max_pixels / (width * height)),
    )
    # pypdfium2 rounds the number of pixels up, also if only a rounding error is above a whole number.
    return wanted * (1 - 1e-6)


def _image_bytes(document: "PdfDocument", page: int, options: ConversionOptions) -> int:
    """Return the memory of the largest image on a page."""
    from pypdfium2.raw import FPDF_PAGEOBJ_IMAGE  # noqa: PLC0415 - see convert_pdf

    largest = 0
    loaded = document[page - 1]
    try:
        for image in loaded.get_objects(filter=[FPDF_PAGEOBJ_IMAGE]):
            width, height = image.get_px_size()
            if width and height:
                check_dimensions((width, height), options)
            largest = max(largest, width * height)
    finally:
        loaded.close()
    return largest * _IMAGE_BYTES


def _render(document: "PdfDocument", page: int, scale: float, options: ConversionOptions) -> ConvertedImage:
    loaded = document[page - 1]
    try:
        picture = loaded.render(scale=scale, rev_byteorder=True).to_pil()
    finally:
        loaded.close()
    return encode(picture, 1, lossless=True, options=options, page=page)
