"""Which pages of a document are sent, and how large an image may be."""

from worker.images.conversion import ConversionError, ConversionOptions

# libjpeg (jmorecfg.h, JPEG_MAX_DIMENSION) encodes no longer side.
MAX_EDGE = 65_500


def chosen_pages(count: int, options: ConversionOptions) -> list[int]:
    """Return the pages to send, from 1, of a document with `count` pages.

    Raises:
        ConversionError: there are too many, or one does not exist.
    """
    ranges = options.pages
    if ranges is None:
        if count > options.max_pages:
            raise _too_many(f"has {count} pages", options)
        return list(range(1, count + 1))
    for first, last in ranges:
        for page in (first, last):
            if not 1 <= page <= count:
                text = f"has {count} page{'s' * (count != 1)}; `pages` asks for {page}"
                raise ConversionError("invalid_job", text)
    total = sum(last - first + 1 for first, last in ranges)
    if total > options.max_pages:
        raise _too_many(f"`pages` asks for {total} pages", options)
    return [page for first, last in ranges for page in range(first, last + 1)]


def _too_many(subject: str, options: ConversionOptions) -> ConversionError:
    hint = ": choose some with `pages`" if options.pages is None else ""
    return ConversionError(
        "too_many_images", f"{subject}; VQA_PDF_MAX_PAGES allows {options.max_pages}{hint}"
    )


def check_dimensions(size: tuple[int, int], options: ConversionOptions) -> None:
    """Check the dimensions that a header declares.

    Raises:
        ConversionError: they are zero, or exceed the limit of pixels.
    """
    width, height = size
    if width < 1 or height < 1:
        raise ConversionError("image_corrupt", "its width or height is zero")
    if width * height > options.max_pixels:
        raise ConversionError(
            "image_too_large",
            f"is {width} × {height} pixels; VQA_IMAGE_MAX_PIXELS allows {options.max_pixels}",
        )


def fitted(size: tuple[int, int], max_edge: int | None) -> tuple[int, int]:
    """Return the size with the same proportions whose longest side is at most `max_edge`."""
    longest = max(size)
    edge = min(max_edge or MAX_EDGE, MAX_EDGE)
    if longest <= edge:
        return size
    width, height = (max(1, round(side * edge / longest)) for side in size)
    return width, height
