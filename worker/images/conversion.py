"""What the worker and the processes that convert its images exchange. Loads no library."""

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from vqa_worker.messages.error_codes import ErrorCode

Code = Literal["image_corrupt", "image_too_large", "image_unsupported_type", "too_many_images", "invalid_job"]

PDF: Final = "application/pdf"
HEIC: Final = "image/heic"
# The media types that can be converted.
CONVERTIBLE_TYPES: Final = (
    "image/jpeg",
    "image/png",
    "image/webp",
    HEIC,
    "image/avif",
    "image/gif",
    "image/tiff",
    "image/bmp",
    "image/jp2",
    PDF,
)


@dataclass(frozen=True, slots=True)
class ConversionOptions:
    """What may be sent, and what a source may be.

    Attributes:
        types: media types that may be sent; JPEG or PNG is among them.
        max_bytes: of one sent image.
        max_edge: the longest side that is sent, in pixels; None: any.
        max_pixels: that a source may declare.
        pages: inclusive ranges of pages from 1, in the order in which they are sent; None: all.
        max_pages: that are sent.
        pdf_dpi: resolution of a rendered page.
        takes_cmyk: whether CMYK JPEGs may be sent.
        takes_16_bit: whether 16-bit PNGs may be sent.
        max_decode_bytes: memory for decoding; a JPEG that would need more is scaled down. None: any.
    """

    types: tuple[str, ...]
    max_bytes: int
    max_edge: int | None
    max_pixels: int
    pages: tuple[tuple[int, int], ...] | None
    max_pages: int
    pdf_dpi: int
    takes_cmyk: bool = False
    takes_16_bit: bool = False
    max_decode_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class ConvertedImage:
    """An image to send.

    Attributes:
        page: the page of the source, from 1; None: the source has no pages, or is a TIFF with one page.
    """

    media_type: str
    content: bytes
    width: int
    height: int
    page: int | None


class ConversionError(Exception):
    """An image cannot be converted; another attempt would fail the same way.

    Attributes:
        message: what is wrong, as a phrase that follows the image's name; never its content or metadata.
    """

    def __init__(self, code: "Code | ErrorCode", message: str) -> None:
        super().__init__(message)
        self.message = message
        self.raw_code: str = code

    @property
    def code(self) -> "ErrorCode":
        """The `error.code` of the result."""
        # Late: the package loads the client's libraries, which the converting processes do without.
        from vqa_worker.messages.error_codes import ErrorCode  # noqa: PLC0415

        return ErrorCode(self.raw_code)


@cache
def missing(media_type: str) -> str | None:
    """Return the library that is not installed but needed to convert this type; None: none is missing."""
    needed = {"PIL": "Pillow"}
    if media_type == HEIC:
        needed["pillow_heif"] = "pillow-heif"
    if media_type == PDF:
        needed["pypdfium2"] = "pypdfium2"
    return next((name for module, name in needed.items() if find_spec(module) is None), None)


def is_installed() -> bool:
    """Return whether the extra `images` is installed, at least Pillow."""
    return missing("image/jpeg") is None
