"""Read objects with boto3 in threads, which is slower than aiohttp.

It is used for directory buckets (`--x-s3`), which need a session.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

from botocore.exceptions import ClientError, NoCredentialsError

from worker.s3.aws import Endpoint, S3Object, ca_bundle
from worker.s3.credentials import role_denied
from worker.s3.errors import S3ResponseError, read_sdk_error
from worker.s3.object_stream import BufferedStream, ObjectStream

THREADS = 16
CHUNK_BYTES = 256 * 1024


class BotoClient:
    """boto3 clients for one S3 endpoint; created, and boto3 imported, when first needed."""

    def __init__(
        self,
        endpoint: Endpoint,
        region: str | None,
        *,
        connect_timeout_s: float,
        read_timeout_s: float,
        max_unsized_bytes: int,
    ) -> None:
        self._endpoint = endpoint
        self._region = region
        self._max_unsized_bytes = max_unsized_bytes
        self._options: dict[str, Any] = {
            "retries": {"mode": "standard", "total_max_attempts": 3},
            "connect_timeout": connect_timeout_s,
            "read_timeout": read_timeout_s,
            "max_pool_connections": THREADS,
        }
        self._client: Any = None
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="s3-boto")

    async def open(self, source: S3Object) -> ObjectStream:
        """Start to read an object.

        Raises:
            S3ResponseError: S3 answered with an error.
            BotoCoreError, OSError: S3 did not answer.
        """
        response = await self._in_thread(self._get, source)
        size = response.get("ContentLength")
        if size is not None:
            return SdkReading(self, response, size)
        content = await self._in_thread(self._read_unsized, response["Body"])
        return BufferedStream(content, len(content), response.get("ContentEncoding", ""))

    async def link(self, source: S3Object, expires_s: int) -> str:
        """Return a presigned URL of an object, valid for `expires_s` seconds.

        Raises:
            S3ResponseError, BotoCoreError: there are no credentials, or no session for the bucket.
        """
        return str(await self._in_thread(self._presign, source, expires_s))

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
        return self._call(source, lambda client: client.get_object(**_parameters(source)))

    def _read_unsized(self, body: Any) -> bytes:
        """Return the content, or more than the limit of it."""
        content = bytearray()
        while len(content) <= self._max_unsized_bytes and (piece := body.read(CHUNK_BYTES)):
            content += piece
        return bytes(content)

    def _presign(self, source: S3Object, expires_s: int) -> str:
        def presign(client: Any) -> str:
            parameters = _parameters(source)
            return str(client.generate_presigned_url("get_object", Params=parameters, ExpiresIn=expires_s))

        return str(self._call(source, presign))

    def _call(self, source: S3Object, function: Callable[[Any], Any]) -> Any:
        """Call a function with a client; if S3 rejects the credentials, once more with a new client."""
        client = self._current_client()
        try:
            with _translated_errors(source):
                return function(client)
        except S3ResponseError as error:
            if not error.rejects_credentials:
                raise
        with _translated_errors(source):
            return function(self._current_client(rejected=client))

    def _current_client(self, rejected: Any = None) -> Any:
        with self._lock:
            if self._client is None or self._client is rejected:
                self._client = self._create()
            return self._client

    def _create(self) -> Any:
        """Create a client. A client without credentials would not find them later."""
        # Imported here because most workers do not need boto3.
        import boto3  # noqa: PLC0415

        session = boto3.Session(region_name=self._region)
        if session.get_credentials() is None:
            raise NoCredentialsError
        # Without a signature version, which would prevent the sessions that directory buckets need.
        config = self._endpoint.client_config(region_name=self._region, **self._options)
        client = session.client("s3", endpoint_url=self._endpoint.url, config=config, verify=ca_bundle())
        client.meta.events.register("before-call.s3", _mark_redirected)
        return client


def _parameters(source: S3Object) -> dict[str, str]:
    version = {} if source.version_id is None else {"VersionId": source.version_id}
    return {"Bucket": source.bucket, "Key": source.key, **version}


def _mark_redirected(context: dict[str, Any], **_: Any) -> None:
    """Mark a request as redirected already, or boto3 looks for the bucket's region again and again.

    It sends a HEAD request after each redirect, also if that one was redirected, until the stack overflows.
    """
    context.setdefault("s3_redirect", {})["redirected"] = True


@contextmanager
def _translated_errors(source: S3Object) -> Iterator[None]:
    """Distinguish the errors of S3 from those of STS, which boto3 may ask for credentials."""
    try:
        yield
    except ClientError as error:
        if error.operation_name not in ("GetObject", "CreateSession"):
            raise role_denied(error) from None
        raise read_sdk_error(error, source) from None


def is_directory_bucket(bucket: str) -> bool:
    """Return whether a bucket is a directory bucket, which needs a session."""
    return bucket.endswith("--x-s3")


class SdkReading:
    """An object that boto3 reads in chunks."""

    def __init__(self, client: BotoClient, response: Any, size: int) -> None:
        self._client = client
        self._body = response["Body"]
        self.size = size
        self.encoding = response.get("ContentEncoding", "")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while chunk := await self._client._in_thread(self._body.read, CHUNK_BYTES):  # noqa: SLF001 - its pool
            yield chunk

    def close(self) -> None:
        """Stop reading."""
        self._client.close_in_thread(self._body)
