"""Reading objects with Amazon's own blocking client, in threads: dearer, and able to do everything.

It is kept for the buckets that plain signed requests cannot read: those of another region, which it finds by
itself, and directory buckets (`--x-s3`), which want a session first.
"""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from botocore.exceptions import ClientError

from worker.images.aws import Endpoint, ca_bundle
from worker.images.refusals import S3Refusal
from worker.images.source import S3Object

THREADS = 16
CHUNK_BYTES = 256 * 1024


class Sdk:
    """boto3's client for one S3 endpoint; made, and its library loaded, when it is first needed."""

    def __init__(
        self, endpoint: Endpoint, region: str | None, *, connect_timeout_s: float, read_timeout_s: float
    ) -> None:
        self._endpoint_url = endpoint.url
        self._config = endpoint.client_config(
            region_name=region,
            retries={"mode": "standard", "total_max_attempts": 3},
            connect_timeout=connect_timeout_s,
            read_timeout=read_timeout_s,
            max_pool_connections=THREADS,
        )
        self._client: Any = None
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="s3-sdk")

    async def open(self, source: S3Object) -> "SdkReading":
        """Begin to read an object.

        Raises:
            S3Refusal: S3 answered with an error.
            BotoCoreError, OSError: it did not answer.
        """
        response = await self._in_thread(self._get, source)
        return SdkReading(self, response["Body"], response["ContentLength"])

    def close(self) -> None:
        """Let go of the threads, without waiting for reads that nobody needs any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, function: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)

    def _get(self, source: S3Object) -> Any:
        if self._client is None:
            # Loaded late: most workers never need it.
            import boto3  # noqa: PLC0415

            self._client = boto3.client(
                "s3", endpoint_url=self._endpoint_url, config=self._config, verify=ca_bundle()
            )
        try:
            return self._client.get_object(Bucket=source.bucket, Key=source.key)
        except ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            raise S3Refusal(status, error.response.get("Error", {}).get("Code", "")) from None


class SdkReading:
    """An object that the client reads, chunk by chunk."""

    def __init__(self, sdk: Sdk, body: Any, size: int) -> None:
        self._sdk = sdk
        self._body = body
        self.size = size

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while chunk := await self._sdk._in_thread(self._body.read, CHUNK_BYTES):  # noqa: SLF001 - its own pool
            yield chunk

    def close(self) -> None:
        """End the read; what is left of it is not fetched."""
        self._body.close()
