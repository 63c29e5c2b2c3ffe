"""From the images of a job to what the API is given for them."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Self, assert_never

from worker.errors import ErrorCode, JobError, TransientError
from worker.images.coalesced_reads import CoalescedReads
from worker.images.content import SIGNATURE_BYTES, media_type
from worker.images.encoding import EncodedStream, decode_slices, encode, encoded_length, later
from worker.images.memory_budget import MemoryBudget, Reservation
from worker.images.source import Embedded, Link, MessageBody, Source, SourcePolicy, parse_source
from worker.messages.job import ImageRef, json_text
from worker.observability import metrics
from worker.observability.redaction import display_url
from worker.observability.tracing import spans
from worker.s3.aws import S3Object
from worker.s3.client import S3, ObjectStream
from worker.settings.model import IMAGE_ON_ITS_WAY_BYTES

# An image up to this size is read before the call is made and goes out in one write; larger ones are read
# while they are sent.
SMALL_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class ImageSource:
    """An image of a job: how messages call it, and where it is."""

    name: str
    source: Source

    @property
    def where(self) -> str:
        """Its place in the job, which tells nothing of what the job asks for."""
        return self.name.partition(" ")[0]


@dataclass(frozen=True, slots=True)
class LinkPolicy:
    """How S3 images are given as links: for how many seconds, and whether the worker looks at them first."""

    expires_s: int
    look: bool


class UrlText:
    """An image's URL as it stands between the quotes of the request, all of it at hand."""

    def __init__(self, text: bytes) -> None:
        self.length = len(text)
        self._text = text

    def pieces(self) -> AsyncIterator[bytes]:
        """The text, in one piece."""
        return later((self._text,))


class UrlStream:
    """A data URL that is made while it is sent."""

    def __init__(self, prefix: bytes, size: int, content: AsyncIterator[bytes]) -> None:
        self.length = len(prefix) + encoded_length(size)
        self._prefix = prefix
        self._content = content

    async def pieces(self) -> AsyncIterator[bytes]:
        """The text, piece by piece; once."""
        yield self._prefix
        encoded = EncodedStream(self._content)
        with suppress(StopAsyncIteration):
            while True:
                # Held in no variable: the next piece would be made while this one is still there.
                yield await anext(encoded)


class OpenImages:
    """The images of one call, ready to be sent."""

    def __init__(self, share: Reservation) -> None:
        self.urls: list[UrlText | UrlStream] = []
        self.readings: list[ObjectStream] = []
        self.inline_bytes = 0
        self._share = share

    def sent(self) -> None:
        """All of them have been handed to the API: nothing of them is held any more."""
        self.urls.clear()
        self._share.release()
        metrics.series(metrics.IMAGE_BYTES, "inline").inc(self.inline_bytes)
        self.close()

    def close(self) -> None:
        """End what is still being read; may be called again."""
        for reading in self.readings:
            reading.close()


class Images:
    """Checks and opens images."""

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
        """`buffer_bytes`: of images on their way; `links`: if given, S3 objects go to the API as links."""
        self._s3 = s3
        self._links = links
        self._policy = policy
        self._max_bytes = max_bytes
        self._max_per_job = max_per_job
        self._budget = MemoryBudget(buffer_bytes)
        self._reads = CoalescedReads(s3.open, self._budget, own_bytes=IMAGE_ON_ITS_WAY_BYTES)

    def check(self, refs: Sequence[ImageRef], body: bytes) -> list[ImageSource]:
        """Return where each image is, before anything is fetched or paid for.

        What is returned refers to the message's `body` and holds no copy of a data URL in it.

        Raises:
            JobError: there are too many, or one is malformed or not allowed.
        """
        if len(refs) > self._max_per_job:
            raise JobError(
                ErrorCode.TOO_MANY_IMAGES,
                f"the job has {len(refs)} images; VQA_MAX_IMAGES_PER_JOB allows {self._max_per_job}",
            )
        message = MessageBody(body)
        sources = []
        for ref in refs:
            name = name_of(ref)
            sources.append(ImageSource(name, parse_source(ref.url, name, self._policy, message)))
        return sources

    def room(self, images: Sequence[ImageSource]) -> AbstractAsyncContextManager[Reservation]:
        """Wait for room in the buffer for a job's images, and hold it."""
        inline = sum(not self._is_link(image.source) for image in images)
        return self._budget.share(inline * IMAGE_ON_ITS_WAY_BYTES)

    @asynccontextmanager
    async def open(self, images: Sequence[ImageSource], room: Reservation) -> AsyncIterator[OpenImages]:
        """Open all images of a job, in order; what they don't need of their room is given back.

        Raises:
            JobError: an image is missing, forbidden, too large, or not one that the API takes.
            TransientError: reading failed in a way that may pass; sending a large image raises it too.
            DependencyDownError: S3 is out of reach or refuses the worker.
        """
        opened = OpenImages(room)
        try:
            opened.urls.extend(await self._open_all(images, opened))
            if not any(isinstance(url, UrlStream) for url in opened.urls):
                room.shrink_to(sum(url.length for url in opened.urls))
            yield opened
        finally:
            opened.close()

    def _is_link(self, source: Source) -> bool:
        return isinstance(source, Link) or (self._links is not None and isinstance(source, S3Object))

    async def _open_all(self, images: Sequence[ImageSource], opened: OpenImages) -> list[UrlText | UrlStream]:
        if len(images) == 1:
            return [await self._open_one(images[0], opened)]
        opening = [self._open_one(image, opened) for image in images]
        urls = await asyncio.gather(*opening, return_exceptions=True)
        # Of several faults the first image's is told, whichever came first in time.
        for url in urls:
            if isinstance(url, BaseException):
                raise url
        return [url for url in urls if not isinstance(url, BaseException)]

    async def _open_one(self, image: ImageSource, opened: OpenImages) -> UrlText | UrlStream:
        with named(image.name):
            match image.source:
                case Link(url):
                    return UrlText(json_text(url))
                case S3Object() as source:
                    with spans().fetch(image.where):
                        return await self._open_object(source, image.name, opened)
                case Embedded(text):
                    return self._decode(text, opened)
                case _ as never:
                    assert_never(never)

    async def _open_object(self, source: S3Object, name: str, opened: OpenImages) -> UrlText | UrlStream:
        if self._links is not None:
            return UrlText(json_text(await self._link(source, self._links)))
        reading = await self._reads.open(source)
        opened.readings.append(reading)
        return await self._read(reading, name, opened)

    async def _link(self, source: S3Object, policy: LinkPolicy) -> str:
        if policy.look:
            size, beginning = await self._s3.look(source, SIGNATURE_BYTES)
            self._check_size(size)
            _prefix(beginning)
        return await self._s3.link(source, policy.expires_s)

    async def _read(self, reading: ObjectStream, name: str, opened: OpenImages) -> UrlText | UrlStream:
        """Begin to read; what is small is read to its end."""
        self._check_size(reading.size)
        opened.inline_bytes += reading.size
        is_small = reading.size <= SMALL_BYTES
        pieces, begun = aiter(reading), b""
        while is_small or len(begun) < SIGNATURE_BYTES:
            piece = await anext(pieces, b"")
            if not piece:
                break
            begun = begun + piece if begun else piece
        prefix = _prefix(begun)
        if is_small:
            return UrlText(prefix + encode(begun))
        return UrlStream(prefix, reading.size, _Named(name, begun, pieces))

    def _decode(self, text: memoryview, opened: OpenImages) -> UrlText | UrlStream:
        """Look through the base64 that a job carries; a large one is decoded again when it is sent."""
        if len(text) > 2 * self._max_bytes + 1024:
            raise self._too_large(len(text) * 3 // 4)
        try:
            size, beginning = 0, b""
            for piece in decode_slices(text):
                beginning = beginning or piece
                size += len(piece)
        except ValueError:
            raise JobError(ErrorCode.IMAGE_CORRUPT, "its base64 cannot be decoded") from None
        self._check_size(size)
        opened.inline_bytes += size
        prefix = _prefix(beginning)
        if size <= SMALL_BYTES:
            return UrlText(prefix + encode(b"".join(decode_slices(text))))
        return UrlStream(prefix, size, later(decode_slices(text)))

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


def name_of(ref: ImageRef) -> str:
    """How messages call an image: its place in the job and its URL, without what is secret in it."""
    return f"{ref.where} ({display_url(ref.url)})"


@contextmanager
def named(name: str) -> Iterator[None]:
    """Put the image's name before what went wrong with it."""
    try:
        yield
    except JobError as error:
        raise JobError(error.code, f"{name}: {error.message}") from None
    except TransientError as error:
        text = f"{name}: {error.message}"
        raise TransientError(error.dependency, error.reason, text, is_echo=error.is_echo) from None


class _Named:
    """The pieces of an image, of which one was read already; its name stands in what goes wrong with it."""

    def __init__(self, name: str, begun: bytes, rest: AsyncIterator[bytes]) -> None:
        self._name = name
        self._begun = begun
        self._rest = rest

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if self._begun:
            begun, self._begun = self._begun, b""
            return begun
        with named(self._name):
            return await anext(self._rest)


def _prefix(beginning: bytes) -> bytes:
    """What stands before the base64 in a data URL."""
    kind = media_type(beginning)
    if kind is None:
        raise JobError(
            ErrorCode.IMAGE_UNSUPPORTED_TYPE,
            "its content is not JPEG, PNG or WebP; convert it to one of them",
        )
    return b"data:%s;base64," % kind.encode()
