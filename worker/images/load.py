"""From the images of a job to what the API is given for them."""

import asyncio
import base64
import binascii
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import assert_never

from worker import metrics
from worker.errors import ErrorCode, JobError
from worker.images.content import media_type
from worker.images.s3 import S3
from worker.images.source import Embedded, Link, S3Object, Source, SourcePolicy, parse_source
from worker.job import ImageRef
from worker.redact import display_url

_WHITE_SPACE = bytes(range(9, 14)) + b" "


class Images:
    """Checks and loads images; the blocking work is done in threads of its own."""

    def __init__(
        self,
        s3: S3,
        policy: SourcePolicy,
        *,
        max_bytes: int,
        max_per_job: int,
        threads: int,
        link_expires_s: int | None,
    ) -> None:
        """`link_expires_s`: with a number, S3 objects go to the API as presigned URLs good for so long."""
        self._s3 = s3
        self._link_expires_s = link_expires_s
        self._policy = policy
        self._max_bytes = max_bytes
        self._max_per_job = max_per_job
        # asyncio's default pool has a handful of threads, which would be the bottleneck.
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="images")

    def check(self, refs: Sequence[ImageRef]) -> list[Source]:
        """Tell where each image is, before anything is fetched or paid for.

        Raises:
            JobError: there are too many, or one is malformed or not allowed.
        """
        if len(refs) > self._max_per_job:
            raise JobError(
                ErrorCode.TOO_MANY_IMAGES,
                f"the job has {len(refs)} images; VQA_MAX_IMAGES_PER_JOB allows {self._max_per_job}",
            )
        return [parse_source(ref.url, name_of(ref), self._policy) for ref in refs]

    async def load(self, refs: Sequence[ImageRef], sources: Sequence[Source]) -> list[str]:
        """The URLs that the request names, in order: links as they are, all else as data URLs.

        Raises:
            JobError: an image is missing, forbidden, too large, or not one that the API takes.
            TransientError: reading from S3 failed in a way that may pass.
            DependencyDownError: S3 is out of reach or refuses the worker.
        """
        loop = asyncio.get_running_loop()
        tasks = [
            loop.run_in_executor(self._pool, self._load_one, source, name_of(ref))
            for ref, source in zip(refs, sources, strict=True)
        ]
        urls = await asyncio.gather(*tasks, return_exceptions=True)
        # Of several faults the first image's is told, whichever came first in time.
        for url in urls:
            if isinstance(url, BaseException):
                raise url
        return [url for url in urls if isinstance(url, str)]

    def close(self) -> None:
        """Let go of the threads, without waiting for reads that nobody needs any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _load_one(self, source: Source, name: str) -> str:
        match source:
            case Link(url):
                return url
            case S3Object() if self._link_expires_s is not None:
                return self._s3.link(source, self._link_expires_s)
            case S3Object():
                content = self._s3.read(source, name, self._max_bytes)
            case Embedded():
                content = self._decode(source, name)
            case _:
                assert_never(source)
        return self._data_url(content, name)

    def _decode(self, source: Embedded, name: str) -> bytes:
        """The bytes of a data URL; as browsers do, white space and missing padding are forgiven."""
        if len(source.url) - source.start > 2 * self._max_bytes + 1024:
            raise self._too_large(name, (len(source.url) - source.start) * 3 // 4)
        try:
            encoded = source.url[source.start :].encode("ascii").translate(None, _WHITE_SPACE)
            return base64.b64decode(encoded + b"=" * (-len(encoded) % 4), validate=True)
        except (binascii.Error, ValueError):
            raise JobError(ErrorCode.IMAGE_CORRUPT, f"{name}: its base64 cannot be decoded") from None

    def _data_url(self, content: bytes, name: str) -> str:
        if len(content) > self._max_bytes:
            raise self._too_large(name, len(content))
        if not content:
            raise JobError(ErrorCode.IMAGE_CORRUPT, f"{name}: is empty")
        kind = media_type(content)
        if kind is None:
            raise JobError(
                ErrorCode.IMAGE_UNSUPPORTED_TYPE,
                f"{name}: its content is not JPEG, PNG or WebP; convert it to one of them",
            )
        metrics.IMAGE_BYTES.labels("inline").inc(len(content))
        return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"

    def _too_large(self, name: str, size: int) -> JobError:
        return JobError(
            ErrorCode.IMAGE_TOO_LARGE,
            f"{name}: has {size} bytes; VQA_MAX_IMAGE_BYTES allows {self._max_bytes}",
        )


def name_of(ref: ImageRef) -> str:
    """How messages call an image: its place in the job and its URL, without what is secret in it."""
    return f"{ref.where} ({display_url(ref.url)})"
