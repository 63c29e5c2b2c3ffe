"""The S3 that commands use: the one that the settings name."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from worker.s3.aws import Aws, Endpoint
from worker.s3.client import S3
from worker.settings import CommandSettings


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
