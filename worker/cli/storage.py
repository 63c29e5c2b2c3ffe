"""The S3 that commands use, and how local files come to it. Loaded where it is used: it brings the SDK."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from worker.cli.shell import CommandError
from worker.cli.submit.manifest import Manifest
from worker.images.content import media_type
from worker.s3.aws import Aws, Endpoint, S3Object
from worker.s3.client import S3
from worker.s3.uploads import upload_if_missing
from worker.settings import CommandSettings

UPLOADS_AT_ONCE: Final = 16


@asynccontextmanager
async def open_s3(settings: CommandSettings) -> AsyncIterator[S3]:
    """A client for as long as the context lasts.

    Raises:
        S3ConfigurationError: the AWS configuration makes no sense.
    """
    endpoint = Endpoint(settings.s3_endpoint_url, settings.s3_addressing_style)
    s3 = S3(await asyncio.to_thread(Aws, endpoint))
    try:
        yield s3
    finally:
        await s3.close()


class Uploads:
    """Puts the files that a manifest names into S3, each once."""

    def __init__(self, manifest: Manifest, s3: S3) -> None:
        self._manifest = manifest
        self._s3 = s3
        self._todo = manifest.uploads_to_do()
        self._done = 0
        self._put = 0

    def progress(self) -> tuple[int, int, str]:
        """How many files are there, of how many, and how many had to be put there."""
        return self._done, len(self._todo), f"{self._put:,} new"

    async def run(self) -> None:
        """Put all that is not known to be there.

        Raises:
            CommandError: a file is not what it was.
            DependencyDownError: S3 is out of reach or refuses.
        """
        todo = iter(self._todo)
        async with asyncio.TaskGroup() as group:
            for _ in range(UPLOADS_AT_ONCE):
                group.create_task(self._work(todo))

    async def _work(self, todo: Iterator[tuple[str, str]]) -> None:
        for url, path in todo:
            bucket, _, key = url.removeprefix("s3://").partition("/")
            content = await asyncio.to_thread(_read, path, key)
            kind = media_type(content) or "application/octet-stream"
            is_new = await upload_if_missing(self._s3, S3Object(bucket, key), content, kind)
            self._put += is_new
            self._manifest.is_uploaded(url)
            self._done += 1


def _read(path: str, key: str) -> bytes:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() not in key:
        raise CommandError(f"{path}: has changed since the jobs about it were planned")
    return content
