"""Read objects from S3 as streams, with signed requests of aiohttp."""

import asyncio
import random
import re
import ssl
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

import aiohttp
from yarl import URL

from worker.errors import Dependency, TransientError
from worker.http.client import open_session, proxy_options
from worker.s3.aws import MAX_CACHED_BUCKETS, Aws, S3ConfigurationError, S3Object, ca_bundle
from worker.s3.boto_client import BotoClient, is_directory_bucket
from worker.s3.errors import FAILURES, S3ResponseError, translate
from worker.s3.object_stream import CheckedStream, ObjectStream, ResponseStream, first_bytes

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 30.0
# Quick attempts until a response begins; after these, the job is retried.
MAX_ATTEMPTS = 3
MAX_RETRY_DELAY_S = 1.0
# Of an error response; its code is in the first few hundred bytes.
MAX_ERROR_BYTES = 16 * 1024

_OK, _NO_CONTENT, _PARTIAL_CONTENT, _RANGE_NOT_SATISFIABLE = 200, 204, 206, 416
_CODE = re.compile(rb"<Code>\s*([A-Za-z0-9.]{1,100})\s*</Code>")
_REGION = re.compile(rb"<Region>\s*([a-z0-9-]{1,50})\s*</Region>")
_TOTAL = re.compile(r"bytes (?:\d+-\d+|\*)/(\d+)")


@dataclass(frozen=True, slots=True)
class Request:
    """A request for an object, or for its bucket if the key is empty and there is a `query`."""

    method: str
    source: S3Object
    headers: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def success_statuses(self) -> Collection[int]:
        """The HTTP statuses that are not errors."""
        if self.method == "DELETE":
            return (_OK, _NO_CONTENT)
        return (_OK, _PARTIAL_CONTENT, _RANGE_NOT_SATISFIABLE) if "Range" in self.headers else (_OK,)


class S3:
    """A client for one S3 endpoint. Create it in an event loop.

    Raises:
        S3ConfigurationError: the CA bundle cannot be read.
    """

    def __init__(self, aws: Aws) -> None:
        self._aws = aws
        self._boto = BotoClient(
            aws.endpoint, aws.region, connect_timeout_s=CONNECT_TIMEOUT_S, read_timeout_s=READ_TIMEOUT_S
        )
        self._session = open_session(
            connect_timeout_s=CONNECT_TIMEOUT_S,
            read_timeout_s=READ_TIMEOUT_S,
            tls=_tls(),
        )
        # Buckets that need boto3, with their region if S3 has reported it.
        self._boto_buckets: dict[str, str | None] = {}

    async def open(self, source: S3Object) -> ObjectStream:
        """Start to read an object.

        Raises:
            JobError: the object does not exist or access is denied. The message does not name the image.
            TransientError: the connection was lost or timed out.
            DependencyDownError: S3 is unreachable, failing, or rejects the credentials.
        """
        try:
            if not self._needs_boto(source.bucket):
                try:
                    return CheckedStream(await self._get(source))
                except S3ResponseError as error:
                    self._remember_region(source.bucket, error)
            return CheckedStream(await self._boto.open(source))
        except FAILURES as error:
            raise translate(error) from None

    async def read_beginning(self, source: S3Object, length: int) -> tuple[int, bytes]:
        """Return the size of an object and its first `length` bytes.

        Raises:
            JobError, TransientError, DependencyDownError: as `open`.
        """
        try:
            if not self._needs_boto(source.bucket):
                return await self._get_beginning(source, length)
        except S3ResponseError as error:
            # `open` handles buckets at another endpoint.
            if not error.is_wrong_endpoint:
                raise translate(error) from None
        except FAILURES as error:
            raise translate(error) from None
        stream = await self.open(source)
        try:
            return stream.size, await first_bytes(stream, length)
        finally:
            stream.close()

    async def link(self, source: S3Object, expires_s: int) -> str:
        """Return a presigned URL of the object, valid for `expires_s` seconds, without a request to S3.

        Raises:
            DependencyDownError: there are no credentials.
        """
        try:
            if self._needs_boto(source.bucket):
                return await self._boto.link(source, expires_s, self._boto_buckets.get(source.bucket))
            return await self._aws.link(source, expires_s)
        except FAILURES as error:
            raise translate(error) from None

    async def exchange(self, request: Request) -> tuple[Mapping[str, str], bytes]:
        """Send a small request; return the headers and the body of the response.

        Raises:
            S3ResponseError, ClientError, BotoCoreError, OSError: those of FAILURES, for `translate`.
        """
        async with await self._request(request) as response:
            return response.headers, await response.read()

    async def close(self) -> None:
        """Close the connections."""
        self._boto.close()
        await self._session.close()

    async def _get(self, source: S3Object) -> ResponseStream:
        response = await self._request(Request("GET", source))
        if response.content_length is None:
            response.close()
            raise TransientError(Dependency.S3, "connection_error", "the S3 response has no Content-Length")
        return ResponseStream(response, response.content_length)

    async def _get_beginning(self, source: S3Object, length: int) -> tuple[int, bytes]:
        headers = {"Range": f"bytes=0-{length - 1}"}
        async with await self._request(Request("GET", source, headers)) as response:
            if response.status == _RANGE_NOT_SATISFIABLE:
                return 0, b""
            total = _TOTAL.fullmatch(response.headers.get("Content-Range", ""))
            size = int(total[1]) if total else response.content_length or 0
            return size, await first_bytes(response.content.iter_any(), length)

    async def _request(self, request: Request) -> aiohttp.ClientResponse:
        """Send a request, with a few quick retries."""
        attempt = 0
        while True:
            attempt += 1
            try:
                return await self._request_once(request)
            except (S3ResponseError, aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
                is_transient = error.is_unavailable if isinstance(error, S3ResponseError) else True
                if attempt == MAX_ATTEMPTS or not is_transient:
                    raise
            await asyncio.sleep(random.uniform(0, MAX_RETRY_DELAY_S))  # noqa: S311 - not cryptographic

    async def _request_once(self, request: Request) -> aiohttp.ClientResponse:
        signed = await self._aws.sign(request.source, request.method, query=request.query, body=request.body)
        url = URL(signed.url, encoded=True)
        response = await self._session.request(
            request.method,
            url,
            headers={**signed.headers, **request.headers},
            data=request.body or None,
            allow_redirects=False,
            **proxy_options(f"{url.scheme}://{url.authority}"),
        )
        if response.status in request.success_statuses:
            return response
        async with response:
            page = await first_bytes(response.content.iter_any(), MAX_ERROR_BYTES)
        region = response.headers.get("x-amz-bucket-region") or _find(_REGION, page)
        raise S3ResponseError(response.status, _find(_CODE, page), region or None)

    def _needs_boto(self, bucket: str) -> bool:
        return is_directory_bucket(bucket) or bucket in self._boto_buckets

    def _remember_region(self, bucket: str, error: S3ResponseError) -> None:
        """Remember that the bucket is permanently at another endpoint; raise any other error again."""
        if not error.is_wrong_endpoint:
            raise error
        if error.is_temporary_redirect:
            return
        if len(self._boto_buckets) >= MAX_CACHED_BUCKETS:
            self._boto_buckets.clear()
        self._boto_buckets[bucket] = error.region


def _tls() -> ssl.SSLContext | Literal[True]:
    bundle = ca_bundle()
    if bundle is None:
        return True
    try:
        return ssl.create_default_context(cafile=bundle)
    except OSError as error:
        text = f"AWS_CA_BUNDLE, REQUESTS_CA_BUNDLE or SSL_CERT_FILE: {bundle}: {error.strerror or error}"
        raise S3ConfigurationError(text) from None


def _find(pattern: re.Pattern[bytes], page: bytes) -> str:
    found = pattern.search(page)
    return found[1].decode() if found else ""
