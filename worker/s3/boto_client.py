"""Read objects with boto3 in threads, which is slower than aiohttp.

It is used for buckets that need more than a signed request: buckets in another region, which boto3 finds, and
directory buckets (`--x-s3`), which need a session.
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
    """boto3 clients for one S3 endpoint; created, and boto3 imported, when first needed."""

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
        # By region, and whether they are for directory buckets.
        self._clients: dict[tuple[str | None, bool], Any] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="s3-boto")

    async def open(self, source: S3Object) -> "SdkReading":
        """Start to read an object.

        Raises:
            S3ResponseError: S3 answered with an error.
            BotoCoreError, OSError: S3 did not answer.
        """
        response = await self._in_thread(self._get, source)
        return SdkReading(self, response["Body"], response["ContentLength"])

    async def link(self, source: S3Object, expires_s: int, region: str | None) -> str:
        """Return a presigned URL of an object in a region, valid for `expires_s` seconds.

        Raises:
            S3ResponseError, BotoCoreError: there are no credentials, or no session for the bucket.
        """
        return str(await self._in_thread(self._presign, source, expires_s, region))

    def close_in_thread(self, body: Any) -> None:
        """Close a response in a thread, because this waits for a running read."""
        with suppress(RuntimeError):  # the thread pool was shut down
            self._pool.submit(body.close)

    def close(self) -> None:
        """Shut the thread pool down without waiting for running reads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, function: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)

    def _get(self, source: S3Object) -> Any:
        client = self._client(self._region, source)
        with _translated_errors():
            return client.get_object(Bucket=source.bucket, Key=source.key)

    def _presign(self, source: S3Object, expires_s: int, region: str | None) -> str:
        client = self._client(region or self._region, source)
        params = {"Bucket": source.bucket, "Key": source.key}
        with _translated_errors():
            return str(client.generate_presigned_url("get_object", Params=params, ExpiresIn=expires_s))

    def _client(self, region: str | None, source: S3Object) -> Any:
        kind = region, is_directory_bucket(source.bucket)
        with self._lock:
            if kind not in self._clients:
                self._clients[kind] = self._create(*kind)
            return self._clients[kind]

    def _create(self, region: str | None, is_directory: bool) -> Any:
        """Create a client. A client without credentials would not find them later."""
        if self._session is None:
            # Imported here because most workers do not need boto3.
            import boto3  # noqa: PLC0415

            session = boto3.Session(region_name=self._region)
            if session.get_credentials() is None:
                raise NoCredentialsError
            self._session = session
        # A signature version prevents the sessions that directory buckets need; without one, boto3 presigns
        # URLs with version 2.
        version = {} if is_directory else {"signature_version": "s3v4"}
        config = self._endpoint.client_config(region_name=region, **version, **self._options)
        return self._session.client("s3", endpoint_url=self._endpoint.url, config=config, verify=ca_bundle())


@contextmanager
def _translated_errors() -> Iterator[None]:
    """Distinguish the errors of S3 from those of STS, which boto3 may ask for credentials."""
    try:
        yield
    except ClientError as error:
        if error.operation_name not in ("GetObject", "CreateSession"):
            raise role_denied(error) from None
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        raise S3ResponseError(status, error.response.get("Error", {}).get("Code", "")) from None


def is_directory_bucket(bucket: str) -> bool:
    """Return whether a bucket is a directory bucket, which needs a session."""
    return bucket.endswith("--x-s3")


class SdkReading:
    """An object that boto3 reads in chunks."""

    def __init__(self, client: BotoClient, body: Any, size: int) -> None:
        self._client = client
        self._body = body
        self.size = size

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while chunk := await self._client._in_thread(self._body.read, CHUNK_BYTES):  # noqa: SLF001 - its pool
            yield chunk

    def close(self) -> None:
        """Stop reading."""
        self._client.close_in_thread(self._body)
