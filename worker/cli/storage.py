"""S3 access for commands: a client, and uploads of local files. Import it late; it loads the SDK."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from vqa_worker.messages.image_types import media_type
from worker.cli.shell import CommandError
from worker.s3.aws import Aws, Endpoint, S3Object
from worker.s3.client import S3
from worker.s3.uploads import upload_if_missing
from worker.settings import CommandSettings

MAX_CONCURRENT_UPLOADS: Final = 16


@asynccontextmanager
async def open_s3(settings: CommandSettings) -> AsyncIterator[S3]:
    """Open an S3 client.

    Raises:
        S3ConfigurationError: the AWS configuration is invalid.
    """
    endpoint = Endpoint(settings.s3_endpoint_url, settings.s3_addressing_style)
    s3 = S3(await asyncio.to_thread(Aws, endpoint))
    try:
        yield s3
    finally:
        await s3.close()


class Uploads:
    """Upload files to S3, each once."""

    def __init__(self, files: Mapping[str, Path], s3: S3) -> None:
        """`files`: by the URL of the object."""
        self._files = files
        self._s3 = s3
        self._done = 0
        self._new = 0

    def progress(self) -> tuple[int, int, str]:
        """Return the numbers of finished and of all uploads, and a note with the number of new objects."""
        return self._done, len(self._files), f"{self._new:,} new"

    async def run(self) -> None:
        """Upload all files that are not in S3 yet.

        Raises:
            CommandError: a file is unreadable or has changed.
            DependencyDownError: S3 is unreachable or refuses access.
        """
        todo = iter(self._files.items())
        async with asyncio.TaskGroup() as group:
            for _ in range(MAX_CONCURRENT_UPLOADS):
                group.create_task(self._work(todo))

    async def _work(self, todo: Iterator[tuple[str, Path]]) -> None:
        for url, path in todo:
            bucket, _, key = url.removeprefix("s3://").partition("/")
            content = await asyncio.to_thread(_read, path, key)
            kind = media_type(content) or "application/octet-stream"
            is_new = await upload_if_missing(self._s3, S3Object(bucket, key), content, kind)
            self._new += is_new
            self._done += 1


def _read(path: Path, key: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}.") from None
    if hashlib.sha256(content).hexdigest() not in key:
        raise CommandError(f"{path} is being changed. Run the command again when it is complete.")
    return content
