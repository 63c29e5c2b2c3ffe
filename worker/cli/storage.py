"""S3 access for commands: a client, and uploads of local files. Import it late; it loads the SDK."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from vqa_worker.messages.image_types import media_type
from worker.cli.progress import Bar, show_progress
from worker.cli.shell import CommandError, Screen
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


async def upload(files: Mapping[str, Path], settings: CommandSettings, screen: Screen) -> None:
    """Upload files, by the URL of the object, that are not in S3 yet.

    Raises:
        CommandError: a file is unreadable or has changed.
        DependencyDownError: S3 is unreachable or refuses access.
    """
    done, limit = 0, asyncio.Semaphore(MAX_CONCURRENT_UPLOADS)

    async def upload_one(url: str, path: Path) -> None:
        nonlocal done
        async with limit:
            bucket, _, key = url.removeprefix("s3://").partition("/")
            content = await asyncio.to_thread(_read, path, key)
            kind = media_type(content) or "application/octet-stream"
            await upload_if_missing(s3, S3Object(bucket, key), content, kind)
            done += 1

    with show_progress(screen, Bar("uploaded", lambda: (done, len(files), ""))):
        async with open_s3(settings) as s3, asyncio.TaskGroup() as group:
            for url, path in files.items():
                group.create_task(upload_one(url, path))


def _read(path: Path, key: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}.") from None
    if hashlib.sha256(content).hexdigest() not in key:
        raise CommandError(f"{path} is being changed. Run the command again when it is complete.")
    return content
