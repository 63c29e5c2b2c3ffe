"""Check the images of a job and open them for the model request."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Self, assert_never

from vqa_worker.messages.conversation import ImageRef
from vqa_worker.messages.error_codes import ErrorCode
from vqa_worker.messages.image_types import SIGNATURE_BYTES, media_type
from vqa_worker.messages.serialization import escape_json
from worker.errors import Dependency, JobError, TransientError
from worker.images.coalesced_reads import CoalescedReads
from worker.images.encoding import decode_slices, encode, iterate_async
from worker.images.memory_budget import MemoryBudget, Reservation
from worker.images.source import (
    Embedded,
    ImageSource,
    Link,
    Source,
    SourcePolicy,
    of_version,
    parse_source,
)
from worker.images.urls import BufferedUrl, StreamedUrl
from worker.observability import metrics
from worker.observability.redaction import display_url
from worker.observability.tracing import spans
from worker.s3.aws import S3Object
from worker.s3.client import S3
from worker.s3.object_stream import ObjectStream
from worker.settings.model import IMAGE_ON_ITS_WAY_BYTES

# An image of at most this size is read before the request and sent in one write; larger ones are streamed.
SMALL_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class LinkPolicy:
    """How to send S3 images as presigned links.

    Attributes:
        expires_s: seconds until a link expires.
        check_content: whether the worker checks size and type of the image first.
    """

    expires_s: int
    check_content: bool


class OpenImages:
    """The images of one model request.

    Attributes:
        urls: the URLs in the request, in order.
        streams: the S3 objects that are being read.
        inline_bytes: the total size of the images in data URLs.
    """

    def __init__(self, reservation: Reservation) -> None:
        self.urls: list[BufferedUrl | StreamedUrl] = []
        self.streams: list[ObjectStream] = []
        self.inline_bytes = 0
        self._reservation = reservation

    def mark_sent(self) -> None:
        """Count the images and release their memory, after the request was sent."""
        self.urls.clear()
        self._reservation.release()
        metrics.series(metrics.IMAGE_BYTES, "inline").inc(self.inline_bytes)
        self.close()

    def close(self) -> None:
        """Stop reading; can be called again."""
        for stream in self.streams:
            stream.close()


class ImageLoader:
    """Checks images and opens them."""

    def __init__(
        self,
        s3: S3,
        policy: SourcePolicy,
        *,
        max_bytes: int,
        max_per_job: int,
        buffer_bytes: int,
        links: LinkPolicy | None,
    ) -> None:
        """`buffer_bytes`: memory for images; `links`: how to send S3 images as links; None: as data URLs."""
        self._s3 = s3
        self._links = links
        self._policy = policy
        self._max_bytes = max_bytes
        self._max_per_job = max_per_job
        self._budget = MemoryBudget(buffer_bytes)
        self._reads = CoalescedReads(s3.open, self._budget, own_bytes=IMAGE_ON_ITS_WAY_BYTES)

    def check(self, refs: Sequence[ImageRef], body: bytes) -> list[ImageSource]:
        """Return the source of each image without reading any.

        The result refers to the message's `body` instead of copying data URLs.

        Raises:
            JobError: there are too many images, or one is malformed or not allowed.
        """
        if len(refs) > self._max_per_job:
            raise JobError(
                ErrorCode.TOO_MANY_IMAGES,
                f"the job has {len(refs)} images; VQA_MAX_IMAGES_PER_JOB allows {self._max_per_job}",
            )
        names = [display_name(ref) for ref in refs]
        return [
            ImageSource(
                name, of_version(parse_source(ref.url, name, self._policy, body), ref.version_id, name)
            )
            for ref, name in zip(refs, names, strict=True)
        ]

    def reserve(self, images: Sequence[ImageSource]) -> AbstractAsyncContextManager[Reservation]:
        """Wait for memory for the images of a job, and reserve it."""
        inline = sum(not self._is_link(image.source) for image in images)
        return self._budget.reserve(inline * IMAGE_ON_ITS_WAY_BYTES)

    @asynccontextmanager
    async def open(
        self, images: Sequence[ImageSource], reservation: Reservation, *, time_left_s: float | None = None
    ) -> AsyncIterator[OpenImages]:
        """Open all images of a job, in order; shrink the reservation to what they need.

        `time_left_s`: a transient error ends opening after so many seconds.

        Raises:
            JobError: an image is missing, forbidden, too large, or of an unsupported type.
            TransientError: reading failed with a transient error; so can sending a large image.
            DependencyDownError: S3 is unreachable or denies access to the worker.
        """
        opened = OpenImages(reservation)
        try:
            opened.urls.extend(await self._open_in_time(images, opened, time_left_s))
            if not any(isinstance(url, StreamedUrl) for url in opened.urls):
                reservation.shrink_to(sum(url.length for url in opened.urls))
            yield opened
        finally:
            opened.close()

    def _is_link(self, source: Source) -> bool:
        return isinstance(source, Link) or (self._links is not None and isinstance(source, S3Object))

    async def _open_in_time(
        self, images: Sequence[ImageSource], opened: OpenImages, time_left_s: float | None
    ) -> list[BufferedUrl | StreamedUrl]:
        try:
            async with asyncio.timeout(time_left_s):
                return await self._open_all(images, opened)
        except TimeoutError:
            raise TransientError(Dependency.S3, "timeout", "the images could not be read in time") from None

    async def _open_all(
        self, images: Sequence[ImageSource], opened: OpenImages
    ) -> list[BufferedUrl | StreamedUrl]:
        if len(images) == 1:
            return [await self._open_one(images[0], opened)]
        opening = [self._open_one(image, opened) for image in images]
        urls = await asyncio.gather(*opening, return_exceptions=True)
        # Of several errors, raise that of the first image, not the first in time.
        for url in urls:
            if isinstance(url, BaseException):
                raise url
        return [url for url in urls if not isinstance(url, BaseException)]

    async def _open_one(self, image: ImageSource, opened: OpenImages) -> BufferedUrl | StreamedUrl:
        with _errors_name(image.name):
            match image.source:
                case Link(url):
                    return BufferedUrl(escape_json(url))
                case S3Object() as source:
                    with spans().fetch(image.location):
                        return await self._open_object(source, image.name, opened)
                case Embedded(text):
                    return await self._open_embedded(text, opened)
                case _ as never:
                    assert_never(never)

    async def _open_object(
        self, source: S3Object, name: str, opened: OpenImages
    ) -> BufferedUrl | StreamedUrl:
        if self._links is not None:
            return BufferedUrl(escape_json(await self._link(source, self._links)))
        stream = await self._reads.open(source)
        opened.streams.append(stream)
        return await self._read(stream, name, opened)

    async def _link(self, source: S3Object, policy: LinkPolicy) -> str:
        if policy.check_content:
            size, beginning = await self._s3.read_beginning(source, SIGNATURE_BYTES)
            self._check_size(size)
            _data_url_prefix(beginning)
        return await self._s3.link(source, policy.expires_s)

    async def _read(self, stream: ObjectStream, name: str, opened: OpenImages) -> BufferedUrl | StreamedUrl:
        """Read all of a small image, or the first bytes of a large one."""
        self._check_size(stream.size)
        opened.inline_bytes += stream.size
        is_small = stream.size <= SMALL_BYTES
        pieces, beginning = aiter(stream), b""
        while is_small or len(beginning) < SIGNATURE_BYTES:
            piece = await anext(pieces, b"")
            if not piece:
                break
            beginning = beginning + piece if beginning else piece
        prefix = _data_url_prefix(beginning)
        if is_small:
            return BufferedUrl(prefix + encode(beginning))
        return StreamedUrl(prefix, stream.size, _ImageStream(name, beginning, pieces))

    async def _open_embedded(self, text: memoryview, opened: OpenImages) -> BufferedUrl | StreamedUrl:
        """Check the base64 of a data URL; a large image is decoded again when it is sent."""
        if len(text) > 2 * self._max_bytes + 1024:
            raise self._too_large(len(text) * 3 // 4)
        try:
            size, beginning = 0, b""
            for piece in decode_slices(text):
                beginning = beginning or piece
                size += len(piece)
                await asyncio.sleep(0)
        except ValueError as error:
            raise JobError(ErrorCode.IMAGE_CORRUPT, f"the base64 is invalid: {error}") from None
        self._check_size(size)
        opened.inline_bytes += size
        prefix = _data_url_prefix(beginning)
        if size <= SMALL_BYTES:
            return BufferedUrl(prefix + encode(b"".join(decode_slices(text))))
        return StreamedUrl(prefix, size, iterate_async(decode_slices(text)))

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise self._too_large(size)
        if not size:
            raise JobError(ErrorCode.IMAGE_CORRUPT, "is empty")

    def _too_large(self, size: int) -> JobError:
        return JobError(
            ErrorCode.IMAGE_TOO_LARGE,
            f"has {size} bytes; VQA_MAX_IMAGE_BYTES allows {self._max_bytes}",
        )


class _ImageStream:
    """The content of an image whose beginning was already read; errors name the image."""

    def __init__(self, name: str, beginning: bytes, rest: AsyncIterator[bytes]) -> None:
        self._name = name
        self._beginning = beginning
        self._rest = rest

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if self._beginning:
            beginning, self._beginning = self._beginning, b""
            return beginning
        with _errors_name(self._name):
            return await anext(self._rest)


def display_name(ref: ImageRef) -> str:
    """Return the name of an image in error messages: its place in the job and its URL without secrets."""
    return f"{ref.location} ({display_url(ref.url)})"


@contextmanager
def _errors_name(name: str) -> Iterator[None]:
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


def _data_url_prefix(beginning: bytes) -> bytes:
    """Return a data URL up to its base64."""
    kind = media_type(beginning)
    if kind is None:
        raise JobError(
            ErrorCode.IMAGE_UNSUPPORTED_TYPE,
            "the content is not JPEG, PNG or WebP; convert it to one of these",
        )
    return b"data:%s;base64," % kind.encode()
