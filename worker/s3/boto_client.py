"""Reading objects with Amazon's own blocking client, in threads: slower, and able to do everything.

It is kept for the buckets that plain signed requests cannot read: those of another region, which it finds by
itself, and directory buckets (`--x-s3`), which want a session first.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

from botocore.exceptions import ClientError, NoCredentialsError

from worker.s3.aws import Endpoint, S3Object, ca_bundle
from worker.s3.credentials import role_denied
from worker.s3.errors import S3ResponseError

THREADS = 16
CHUNK_BYTES = 256 * 1024


class BotoClient:
    """boto3's clients for one S3; made, and the library loaded, when they are first needed."""

    def __init__(
        self, endpoint: Endpoint, region: str | None, *, connect_timeout_s: float, read_timeout_s: float
    ) -> None:
        self._endpoint = endpoint
        self._region = region
        self._options = {
            "retries": {"mode": "standard", "total_max_attempts": 3},
            "connect_timeout": connect_timeout_s,
            "read_timeout": read_timeout_s,
            "max_pool_connections": THREADS,
        }
        self._session: Any = None
        # By region, and by whether they are for directory buckets.
        self._clients: dict[tuple[str | None, bool], Any] = {}
        self._making = threading.Lock()
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="s3-boto")

    async def open(self, source: S3Object) -> "SdkReading":
        """Begin to read an object.

        Raises:
            S3ResponseError: S3 answered with an error.
            BotoCoreError, OSError: it did not answer.
        """
        response = await self._in_thread(self._get, source)
        return SdkReading(self, response["Body"], response["ContentLength"])

    async def link(self, source: S3Object, expires_s: int, region: str | None) -> str:
        """A presigned URL of the object, good for `expires_s` seconds; `region`: where its bucket is.

        Raises:
            S3ResponseError, BotoCoreError: there are no credentials, or no session for the bucket.
        """
        return str(await self._in_thread(self._presign, source, expires_s, region))

    def close_later(self, body: Any) -> None:
        """Close a response in a thread: it waits for a read that is under way."""
        with suppress(RuntimeError):  # the threads are let go of, and the connections with them
            self._pool.submit(body.close)

    def close(self) -> None:
        """Let go of the threads, without waiting for reads that nobody needs any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, function: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)

    def _get(self, source: S3Object) -> Any:
        client = self._client(self._region, source)
        with _refusals():
            return client.get_object(Bucket=source.bucket, Key=source.key)

    def _presign(self, source: S3Object, expires_s: int, region: str | None) -> str:
        client = self._client(region or self._region, source)
        params = {"Bucket": source.bucket, "Key": source.key}
        with _refusals():
            return str(client.generate_presigned_url("get_object", Params=params, ExpiresIn=expires_s))

    def _client(self, region: str | None, source: S3Object) -> Any:
        kind = region, is_directory_bucket(source.bucket)
        with self._making:
            if kind not in self._clients:
                self._clients[kind] = self._make(*kind)
            return self._clients[kind]

    def _make(self, region: str | None, is_for_directories: bool) -> Any:
        """A client. One that is made without credentials would never have any."""
        if self._session is None:
            # Loaded late: most workers never need it.
            import boto3  # noqa: PLC0415

            session = boto3.Session(region_name=self._region)
            if session.get_credentials() is None:
                raise NoCredentialsError
            self._session = session
        # Named, it would keep the SDK from asking for the sessions that directory buckets want; not named,
        # the SDK makes links with signatures of version 2.
        version = {} if is_for_directories else {"signature_version": "s3v4"}
        config = self._endpoint.client_config(region_name=region, **version, **self._options)
        return self._session.client("s3", endpoint_url=self._endpoint.url, config=config, verify=ca_bundle())


@contextmanager
def _refusals() -> Iterator[None]:
    """Distinguish S3's errors about an object from errors of STS."""
    try:
        yield
    except ClientError as error:
        if error.operation_name not in ("GetObject", "CreateSession"):
            raise role_denied(error) from None
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        raise S3ResponseError(status, error.response.get("Error", {}).get("Code", "")) from None


def is_directory_bucket(bucket: str) -> bool:
    """Return whether a bucket requires a session (directory buckets), by its name."""
    return bucket.endswith("--x-s3")


class SdkReading:
    """An object that the client reads, chunk by chunk."""

    def __init__(self, boto: BotoClient, body: Any, size: int) -> None:
        self._sdk = boto
        self._body = body
        self.size = size

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while chunk := await self._sdk._in_thread(self._body.read, CHUNK_BYTES):  # noqa: SLF001 - its own pool
            yield chunk

    def close(self) -> None:
        """End the read; what is left of it is not fetched."""
        self._sdk.close_later(self._body)
