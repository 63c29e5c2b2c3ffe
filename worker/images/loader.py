"""Check the images of a job and open them for the model request."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import assert_never

from vqa_worker.messages.conversation import ImageRef
from vqa_worker.messages.error_codes import ErrorCode
from vqa_worker.messages.image_types import SIGNATURE_BYTES
from vqa_worker.messages.job import parse_pages
from vqa_worker.messages.serialization import escape_json
from worker.errors import Dependency, JobError, NotAdmittedError, TransientError
from worker.images.coalesced_reads import CoalescedReads
from worker.images.content import Content, content_of_object
from worker.images.conversion_pool import ConversionPool
from worker.images.encoding import decode_slices, iterate_async
from worker.images.memory_budget import MemoryBudget, Reservation
from worker.images.open_images import OpenImages, Prepared
from worker.images.preparation import ImageRules, Preparation, errors_name
from worker.images.source import (
    Embedded,
    ImageSource,
    Link,
    Source,
    SourcePolicy,
    of_version,
    parse_source,
)
from worker.images.urls import BufferedUrl
from worker.observability.redaction import display_url
from worker.observability.tracing import spans
from worker.s3.aws import S3Object
from worker.s3.client import S3
from worker.s3.object_stream import ObjectStream
from worker.settings.model import IMAGE_ON_ITS_WAY_BYTES


@dataclass(frozen=True, slots=True)
class LinkPolicy:
    """How to send S3 images as presigned links.

    Attributes:
        expires_s: seconds until a link expires.
        check_content: whether the worker checks size and type of the image first.
    """

    expires_s: int
    check_content: bool


class ImageLoader:
    """Checks images and opens them."""

    def __init__(
        self,
        s3: S3,
        policy: SourcePolicy,
        rules: ImageRules,
        pool: ConversionPool,
        *,
        max_per_job: int,
        buffer_bytes: int,
        links: LinkPolicy | None,
    ) -> None:
        """`buffer_bytes`: memory for images; `links`: how to send S3 images as links; None: as data URLs."""
        self._s3 = s3
        self._links = links
        self._policy = policy
        self._rules = rules
        self._preparation = Preparation(rules, pool)
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
        return [self._check_one(ref, body) for ref in refs]

    def _check_one(self, ref: ImageRef, body: bytes) -> ImageSource:
        name = display_name(ref)
        source = of_version(parse_source(ref.url, name, self._policy, body), ref.version_id, name)
        if ref.pages is not None and isinstance(source, Link):
            text = f"{name}: `pages` is only for s3:// and data: documents, not for links"
            raise JobError(ErrorCode.INVALID_JOB, text, log_message=f"{ref.location}: `pages` of a link")
        return ImageSource(
            name,
            source,
            url=ref.url if isinstance(source, S3Object) else display_url(ref.url),
            max_edge=ref.max_edge,
            pages=None if ref.pages is None else parse_pages(ref.pages),
        )

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
            NotAdmittedError: the images of other jobs are converted meanwhile.
        """
        opened = OpenImages(reservation)
        try:
            opened.add(await self._open_in_time(images, opened, time_left_s))
            reservation.shrink_to(sum(url.memory for url in opened.urls))
            yield opened
        finally:
            opened.close()

    def _is_link(self, source: Source) -> bool:
        return isinstance(source, Link) or (self._links is not None and isinstance(source, S3Object))

    async def _open_in_time(
        self, images: Sequence[ImageSource], opened: OpenImages, time_left_s: float | None
    ) -> list[Prepared]:
        try:
            async with asyncio.timeout(time_left_s):
                return await self._open_all(images, opened)
        except TimeoutError:
            if opened.converted_s > (time_left_s or 0.0) / 2:
                if not opened.has_process:
                    text = "no process to convert the images within half of VQA_JOB_TIMEOUT"
                    raise NotAdmittedError(text) from None
                # It says nothing about S3.
                text = "the images could not be converted in time"
                raise TransientError(Dependency.S3, "timeout", text, is_duplicate=True) from None
            raise TransientError(Dependency.S3, "timeout", "the images could not be read in time") from None

    async def _open_all(self, images: Sequence[ImageSource], opened: OpenImages) -> list[Prepared]:
        if len(images) == 1:
            return [await self._open_one(images[0], opened)]
        opening = [self._open_one(image, opened) for image in images]
        prepared = await asyncio.gather(*opening, return_exceptions=True)
        # Of several errors, raise that of the first image, not the first in time.
        for it in prepared:
            if isinstance(it, BaseException):
                raise it
        return [it for it in prepared if not isinstance(it, BaseException)]

    async def _open_one(self, image: ImageSource, opened: OpenImages) -> Prepared:
        with errors_name(image.name):
            match image.source:
                case Link(url):
                    return Prepared(BufferedUrl(escape_json(url)))
                case S3Object() as source:
                    with spans().fetch(image.location):
                        return await self._open_object(source, image, opened)
                case Embedded(text):
                    return await self._preparation.prepare(image, await self._decoded(text), opened)
                case _ as never:
                    assert_never(never)

    async def _open_object(self, source: S3Object, image: ImageSource, opened: OpenImages) -> Prepared:
        if self._links is not None:
            if await self._may_be_linked(source, image, self._links):
                return Prepared(BufferedUrl(escape_json(await self._s3.link(source, self._links.expires_s))))
            await opened.reservation.extend(IMAGE_ON_ITS_WAY_BYTES, holds=False)

        async def reopen() -> ObjectStream:
            again = await self._s3.open(source)
            opened.streams.append(again)
            return again

        stream = await self._reads.open(source)
        opened.streams.append(stream)
        content = await content_of_object(stream, reopen, max_bytes=self._rules.max_read_bytes)
        return await self._preparation.prepare(image, content, opened)

    async def _may_be_linked(self, source: S3Object, image: ImageSource, policy: LinkPolicy) -> bool:
        """Return whether a link to the object can be sent; what must be converted is read by the worker.

        Raises:
            JobError: it can be neither sent nor converted, as far as the worker looks into it.
        """
        is_wanted = image.pages is not None or image.max_edge is not None
        if policy.check_content:
            size, beginning = await self._s3.read_beginning(source, SIGNATURE_BYTES)
            self._preparation.check_size(size)
            kind = self._preparation.check_type(beginning)
            return not is_wanted and self._preparation.is_sent_unchanged(kind, size)
        return not is_wanted

    async def _decoded(self, text: memoryview) -> Content:
        """Check the base64 of a data URL; it is decoded again when the image is read."""
        if len(text) > 2 * self._rules.max_read_bytes + 1024:
            self._preparation.check_size(len(text) * 3 // 4)
        size = 0
        try:
            for piece in decode_slices(text):
                size += len(piece)
                await asyncio.sleep(0)
        except ValueError as error:
            raise JobError(ErrorCode.IMAGE_CORRUPT, f"the base64 is invalid: {error}") from None

        async def again() -> AsyncIterator[bytes]:
            return iterate_async(decode_slices(text))

        return Content(size, await again(), again)


def display_name(ref: ImageRef) -> str:
    """Return the name of an image in error messages: its place in the job and its URL without secrets."""
    return f"{ref.location} ({display_url(ref.url)})"
