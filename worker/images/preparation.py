"""Decide what is sent of an image: its content as it is, or what the conversion makes of it."""

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Self

from vqa_worker.messages.error_codes import ErrorCode
from vqa_worker.messages.image_types import COMMON_TYPES, SIGNATURE_BYTES, describe, media_type
from vqa_worker.messages.result import SentImage
from worker.errors import JobError, TransientError
from worker.images.content import Content
from worker.images.conversion import ConversionError, ConversionOptions, ConvertedImage
from worker.images.conversion_pool import ConversionPool
from worker.images.encoding import encode, iterate_async
from worker.images.open_images import OpenImages, Prepared
from worker.images.scan import Scan, scan_for
from worker.images.source import ImageSource
from worker.images.urls import BufferedUrl, PagesUrl, PageUrl, StreamedUrl
from worker.observability import metrics

# An image of at most this size is read before the request and sent in one write; larger ones are streamed.
SMALL_BYTES: Final = 256 * 1024
_UPRIGHT: Final = 1


@dataclass(frozen=True, slots=True)
class ImageRules:
    """What may be sent, and how to convert the rest; the fields have the names of the settings.

    Attributes:
        types: media types that the model API takes.
        takes_cmyk, takes_16_bit: whether it decodes CMYK JPEGs, and 16 bits a channel.
        why_not_converted: why nothing is converted and what to do; empty if images are converted.
    """

    max_image_bytes: int
    max_source_bytes: int = 0
    max_edge: int | None = None
    max_pixels: int = 200_000_000
    pdf_dpi: int = 150
    pdf_max_pages: int = 20
    types: Sequence[str] = COMMON_TYPES
    takes_cmyk: bool = False
    takes_16_bit: bool = False
    why_not_converted: str = ""

    @property
    def converts(self) -> bool:
        """Whether images are converted."""
        return not self.why_not_converted

    @property
    def max_read_bytes(self) -> int:
        """The largest content that is read."""
        return max(self.max_image_bytes, self.max_source_bytes) if self.converts else self.max_image_bytes


class Preparation:
    """Prepares images for the model request."""

    def __init__(self, rules: ImageRules, pool: ConversionPool) -> None:
        self._rules = rules
        self._pool = pool

    async def prepare(self, image: ImageSource, content: Content, opened: OpenImages) -> Prepared:
        """Return what is sent of an image.

        Raises:
            JobError: it is too large, corrupt, or of a type that can neither be sent nor converted.
            TransientError, DependencyDownError: it cannot be read.
        """
        self.check_size(content.size)
        is_small = content.size <= SMALL_BYTES
        # A small one to its end, where the content is checked.
        beginning = await _read(content, content.size + 1 if is_small else SIGNATURE_BYTES)
        kind = self.check_type(beginning)
        if kind not in COMMON_TYPES:
            if self._rules.converts:
                return await self._converted(image, kind, [beginning], content, opened)
            return self._unread(image, kind, [beginning], content)
        scan = scan_for(kind)
        pieces = await _read_header(scan, beginning, content)
        # A whole file without a header is not worth a decoder.
        is_read = is_small and scan.width is None
        if fault := scan.finish() if is_read else scan.check(content.size):
            raise JobError(ErrorCode.IMAGE_CORRUPT, fault)
        if self._must_convert(image, kind, scan, content.size):
            return await self._converted(image, kind, pieces, content, opened)
        return self._unchanged(image, kind, scan, pieces, content)

    def check_size(self, size: int) -> None:
        """Check the size of the content in bytes.

        Raises:
            JobError: it is too large, or empty.
        """
        if size > self._rules.max_read_bytes:
            raise self._too_large(size)
        if not size:
            raise JobError(ErrorCode.IMAGE_CORRUPT, "is empty")

    def check_type(self, beginning: bytes) -> str:
        """Return the media type of content that can be sent or converted.

        Raises:
            JobError: it can be neither.
        """
        rules, kind = self._rules, media_type(beginning)
        if kind is None:
            raise JobError(ErrorCode.IMAGE_UNSUPPORTED_TYPE, f"the content is {describe(beginning)}")
        if kind in rules.types or rules.converts:
            return kind
        text = f"the content is {kind}, which the model API does not take, and {rules.why_not_converted}"
        raise JobError(ErrorCode.IMAGE_UNSUPPORTED_TYPE, text)

    def is_sent_unchanged(self, kind: str, size: int) -> bool:
        """Return whether content of this type and size can be sent as it is, as far as that is known."""
        return kind in self._rules.types and size <= self._rules.max_image_bytes

    def _must_convert(self, image: ImageSource, kind: str, scan: Scan, size: int) -> bool:
        """Return whether a JPEG, PNG or WebP must be converted.

        Raises:
            JobError: it must be, and cannot.
        """
        rules = self._rules
        if image.pages is not None:
            raise JobError(ErrorCode.INVALID_JOB, f"`pages` is only for PDF and TIFF, and this is {kind}")
        pixels, edge = (scan.width or 0) * (scan.height or 0), self._max_edge(image)
        if rules.converts and pixels > rules.max_pixels:
            text = f"is {scan.width} × {scan.height} pixels; VQA_IMAGE_MAX_PIXELS allows {rules.max_pixels}"
            raise JobError(ErrorCode.IMAGE_TOO_LARGE, text)
        is_over_edge = edge is not None and max(scan.width or 0, scan.height or 0) > edge
        if not rules.converts:
            if is_over_edge:
                text = f"is {scan.width} × {scan.height} pixels, {edge} are wanted"
                raise JobError(ErrorCode.IMAGE_TOO_LARGE, f"{text}, and {rules.why_not_converted}")
            return False
        return (
            is_over_edge
            # The header is damaged or far behind metadata: only a decoder knows more.
            or scan.width is None
            or size > rules.max_image_bytes
            or kind not in rules.types
            or scan.orientation != _UPRIGHT
            or scan.is_orientation_unknown
            or (kind == "image/webp" and scan.is_animated)
            or scan.is_arithmetic
            or scan.is_lossless
            or (scan.is_cmyk and not rules.takes_cmyk)
            or (scan.is_16_bit and not rules.takes_16_bit)
        )

    def _unchanged(
        self, image: ImageSource, kind: str, scan: Scan, pieces: list[bytes], content: Content
    ) -> Prepared:
        size = content.size
        sent = _sent_unchanged(image, kind, size, scan.width, scan.height)
        if size > SMALL_BYTES:
            stream = _CheckedImage(image.name, scan, pieces, content)
            return Prepared(StreamedUrl(_prefix(kind), size, stream), [sent])
        if fault := scan.finish():
            raise JobError(ErrorCode.IMAGE_CORRUPT, fault)
        (whole,) = pieces
        return Prepared(BufferedUrl(_prefix(kind) + encode(whole)), [sent])

    def _unread(self, image: ImageSource, kind: str, pieces: list[bytes], content: Content) -> Prepared:
        """Return an image that the model API takes, and of which only a decoder knows the size in pixels.

        Raises:
            JobError: pages of it are wanted.
        """
        if image.pages is not None:
            text = f"`pages` of {kind} are sent only after a conversion, and {self._rules.why_not_converted}"
            raise JobError(ErrorCode.INVALID_JOB, text)
        sent = _sent_unchanged(image, kind, content.size)
        stream = _named(image.name, _rest(pieces, content.pieces))
        return Prepared(StreamedUrl(_prefix(kind), content.size, stream), [sent])

    async def _converted(
        self, image: ImageSource, kind: str, pieces: list[bytes], content: Content, opened: OpenImages
    ) -> Prepared:
        # Wait for memory before a process is held: a job that holds one then never waits for memory. The
        # content of photos becomes up to twice as large.
        expected, asked_at = min(2 * content.size, self._rules.max_image_bytes), time.monotonic()

        async def reserve(size: int) -> None:
            more = max(0, size - expected)
            # Only pages together are larger than an image may be, which always fits.
            if size > self._rules.max_image_bytes and not opened.reservation.fits(more):
                text = f"its pages have {size} bytes, more than VQA_IMAGE_BUFFER_BYTES allows for a job"
                hint = "choose some with `pages`, or set `max_edge`"
                raise ConversionError("image_too_large", f"{text}: {hint}")
            opened.reservation.grow(more)

        with opened.converting():
            await opened.reservation.extend(expected)
            try:
                images = await self._pool.convert(
                    kind,
                    _rest(pieces, content.pieces),
                    self._options(image),
                    again=content.again,
                    reserve=reserve,
                    asked_at=asked_at,
                    on_start=opened.start,
                )
            except ConversionError as error:
                raise JobError(error.code, error.message) from None
        size = content.size
        is_changed = len(images) > 1 or images[0].media_type != kind or len(images[0].content) != size
        for it in images if is_changed else ():
            metrics.series(metrics.IMAGES_CONVERTED, kind, it.media_type).inc()
            saved = max(0, size // len(images) - len(it.content))
            metrics.series(metrics.IMAGE_BYTES_SAVED, kind, it.media_type).inc(saved)
        urls = [_url(it) for it in images]
        sent = [
            SentImage(
                url=image.url,
                page=it.page,
                source_type=kind,
                source_bytes=size,
                sent_type=it.media_type,
                sent_bytes=len(it.content),
                width=it.width,
                height=it.height,
            )
            for it in images
        ]
        return Prepared(urls[0] if len(urls) == 1 else PagesUrl(urls, image.separator), sent)

    def _options(self, image: ImageSource) -> ConversionOptions:
        rules = self._rules
        return ConversionOptions(
            types=tuple(rules.types),
            max_bytes=rules.max_image_bytes,
            max_edge=self._max_edge(image),
            max_pixels=rules.max_pixels,
            pages=image.pages,
            max_pages=rules.pdf_max_pages,
            pdf_dpi=rules.pdf_dpi,
            takes_cmyk=rules.takes_cmyk,
            takes_16_bit=rules.takes_16_bit,
        )

    def _max_edge(self, image: ImageSource) -> int | None:
        return min((it for it in (image.max_edge, self._rules.max_edge) if it is not None), default=None)

    def _too_large(self, size: int) -> JobError:
        rules, text = self._rules, f"has {size} bytes"
        if rules.converts and rules.max_source_bytes >= rules.max_image_bytes:
            text = f"{text}; VQA_MAX_SOURCE_BYTES allows {rules.max_source_bytes}"
        else:
            why = "" if rules.converts else f", and {rules.why_not_converted}"
            text = f"{text}; VQA_MAX_IMAGE_BYTES allows {rules.max_image_bytes}{why}"
        return JobError(ErrorCode.IMAGE_TOO_LARGE, text)


class _CheckedImage:
    """The content of an image that is sent as it is.

    At its end an error is raised if the image is incomplete: the API gets no whole request then, and bills
    nothing.
    """

    def __init__(self, name: str, scan: Scan, pieces: list[bytes], content: Content) -> None:
        """`pieces`: those that the scan has seen."""
        self._name = name
        self._scan = scan
        self._pieces = pieces
        self._content = content

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if self._pieces:
            return self._pieces.pop(0)
        with errors_name(self._name):
            piece = await anext(self._content.pieces, None)
            if piece is None:
                await self._check_end()
                raise StopAsyncIteration
        self._scan.feed(piece)
        return piece

    async def _check_end(self) -> None:
        fault = self._scan.finish()
        if fault and self._scan.needs_search:
            # Something comes after the image: only a search of the whole content finds the image's end.
            scan = scan_for("image/jpeg", thorough=True)
            async for piece in await self._content.again():
                scan.feed(piece)
            fault = scan.finish()
        if fault:
            raise JobError(ErrorCode.IMAGE_CORRUPT, fault)


@contextmanager
def errors_name(name: str) -> Iterator[None]:
    """Prefix error messages with the image's name."""
    try:
        yield
    except JobError as error:
        message, log_message = error.explanation.about_image(name)
        raise JobError(error.code, message, log_message=log_message) from None
    except TransientError as error:
        message, log_message = error.explanation.about_image(name)
        named = TransientError(
            error.dependency,
            error.reason,
            message,
            log_message=log_message,
            refused=error.refused,
            is_duplicate=error.is_duplicate,
        )
        # The reason of an outage is not about one image.
        named.cause = error.cause
        raise named from None


def _sent_unchanged(
    image: ImageSource, kind: str, size: int, width: int | None = None, height: int | None = None
) -> SentImage:
    return SentImage(
        url=image.url,
        source_type=kind,
        source_bytes=size,
        sent_type=kind,
        sent_bytes=size,
        width=width,
        height=height,
    )


async def _read(content: Content, size: int) -> bytes:
    """Return at least the first `size` bytes, or all if there are fewer."""
    beginning = b""
    # A piece may be empty.
    while len(beginning) < size and (piece := await anext(content.pieces, None)) is not None:
        beginning = beginning + piece if beginning else piece
    return beginning


async def _read_header(scan: Scan, beginning: bytes, content: Content) -> list[bytes]:
    """Read until the scan knows the header; return the pieces so far."""
    pieces = [beginning]
    scan.feed(beginning)
    while not scan.has_header and (piece := await anext(content.pieces, None)) is not None:
        pieces.append(piece)
        scan.feed(piece)
    return pieces


async def _rest(pieces: list[bytes], rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    while pieces:
        yield pieces.pop(0)
    async for piece in rest:
        yield piece


async def _named(name: str, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    with errors_name(name):
        async for piece in pieces:
            yield piece


def _url(image: ConvertedImage) -> PageUrl:
    prefix, content = _prefix(image.media_type), image.content
    if len(content) <= SMALL_BYTES:
        return BufferedUrl(prefix + encode(content))
    slices = (content[start : start + SMALL_BYTES] for start in range(0, len(content), SMALL_BYTES))
    return StreamedUrl(prefix, len(content), iterate_async(slices), is_buffered=True)


def _prefix(kind: str) -> bytes:
    """Return a data URL up to its base64."""
    return b"data:%s;base64," % kind.encode()
