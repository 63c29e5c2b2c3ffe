"""Reading objects from S3 as streams, by signed requests of the event loop's own client."""

import asyncio
import random
import re
import ssl
from collections.abc import AsyncIterable, AsyncIterator, Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, Self

import aiohttp
from yarl import URL

from worker.errors import Dependency, TransientError
from worker.http.client import open_session, proxy_options
from worker.s3.aws import REMEMBERED_BUCKETS, Aws, S3ConfigurationError, S3Object, ca_bundle
from worker.s3.boto_client import BotoClient, is_directory_bucket
from worker.s3.errors import FAILURES, S3ResponseError, translate

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 30.0
# Quick retries until an answer has begun; beyond them the worker decides.
ATTEMPTS = 3
LONGEST_RETRY_DELAY_S = 1.0
# Of an error's body; its code stands in the first few hundred bytes.
MAX_ERROR_BYTES = 16 * 1024

_OK, _NO_CONTENT, _PARTIAL, _NO_SUCH_RANGE = 200, 204, 206, 416
_CODE = re.compile(rb"<Code>\s*([A-Za-z0-9.]{1,100})\s*</Code>")
_REGION = re.compile(rb"<Region>\s*([a-z0-9-]{1,50})\s*</Region>")
_TOTAL = re.compile(r"bytes (?:\d+-\d+|\*)/(\d+)")


@dataclass(frozen=True, slots=True)
class Request:
    """A request for an object; one to its bucket, if the key is empty and there is a `query`."""

    method: str
    source: S3Object
    headers: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def welcome(self) -> Collection[int]:
        """The statuses that are not errors."""
        if self.method == "DELETE":
            return (_OK, _NO_CONTENT)
        return (_OK, _PARTIAL, _NO_SUCH_RANGE) if "Range" in self.headers else (_OK,)


class ObjectStream(Protocol):
    """An object that is being read; iterated over once.

    Attributes:
        size: of the object in bytes, known before they are read.
    """

    size: int

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Its bytes, in pieces. Raises TransientError unless they are `size` in the end."""

    def close(self) -> None:
        """End the read; what is left of it is not fetched."""


class S3:
    """Objects of one S3 endpoint. Must be made in an event loop.

    Raises:
        S3ConfigurationError: the authorities that S3 is to be checked against cannot be read.
    """

    def __init__(self, aws: Aws) -> None:
        self._aws = aws
        self._sdk = BotoClient(
            aws.endpoint, aws.region, connect_timeout_s=CONNECT_TIMEOUT_S, read_timeout_s=READ_TIMEOUT_S
        )
        self._session = open_session(
            connect_timeout_s=CONNECT_TIMEOUT_S,
            read_timeout_s=READ_TIMEOUT_S,
            tls=_tls(),
        )
        # Buckets that are not where plain requests go, and the region that they are in, as far as is known.
        self._elsewhere: dict[str, str | None] = {}

    async def open(self, source: S3Object) -> ObjectStream:
        """Begin to read an object.

        Raises:
            JobError: there is no such object, or it may not be read. Messages don't name the image.
            TransientError: the read was interrupted or took too long.
            DependencyDownError: S3 is unreachable, failing, or refuses these credentials.
        """
        try:
            if not self._is_elsewhere(source.bucket):
                try:
                    return _Checked(await self._get(source))
                except S3ResponseError as error:
                    self._only_if_elsewhere(source.bucket, error)
            return _Checked(await self._sdk.open(source))
        except FAILURES as error:
            raise translate(error) from None

    async def read_beginning(self, source: S3Object, length: int) -> tuple[int, bytes]:
        """The size of an object and its first `length` bytes, without reading more of it.

        Raises:
            JobError, TransientError, DependencyDownError: as `open`.
        """
        try:
            if not self._is_elsewhere(source.bucket):
                return await self._get_beginning(source, length)
        except S3ResponseError as error:
            if not error.is_elsewhere:
                raise translate(error) from None
            # `open` will find out.
        except FAILURES as error:
            raise translate(error) from None
        reading = await self.open(source)
        try:
            return reading.size, await _beginning(reading, length)
        finally:
            reading.close()

    async def link(self, source: S3Object, expires_s: int) -> str:
        """A presigned URL of the object, good for `expires_s` seconds; S3 is not asked for it.

        Raises:
            DependencyDownError: there are no credentials to sign with.
        """
        try:
            if self._is_elsewhere(source.bucket):
                return await self._sdk.link(source, expires_s, self._elsewhere.get(source.bucket))
            return await self._aws.link(source, expires_s)
        except FAILURES as error:
            raise translate(error) from None

    async def exchange(self, request: Request) -> tuple[Mapping[str, str], bytes]:
        """Send a small request and read all of its answer: the headers and the body.

        Raises:
            S3ResponseError, ClientError, BotoCoreError, OSError: those of FAILURES, for `translate`.
        """
        async with await self._request(request) as response:
            return response.headers, await response.read()

    async def close(self) -> None:
        """Close the connections."""
        self._sdk.close()
        await self._session.close()

    async def _get(self, source: S3Object) -> "_Response":
        response = await self._request(Request("GET", source))
        if response.content_length is None:
            response.close()
            raise TransientError(Dependency.S3, "connection_error", "S3 did not report the object's size")
        return _Response(response, response.content_length)

    async def _get_beginning(self, source: S3Object, length: int) -> tuple[int, bytes]:
        headers = {"Range": f"bytes=0-{length - 1}"}
        async with await self._request(Request("GET", source, headers)) as response:
            if response.status == _NO_SUCH_RANGE:
                return 0, b""
            total = _TOTAL.fullmatch(response.headers.get("Content-Range", ""))
            size = int(total[1]) if total else response.content_length or 0
            return size, await _beginning(response.content.iter_any(), length)

    async def _request(self, request: Request) -> aiohttp.ClientResponse:
        """Ask until there is an answer, a few times if need be; an error page is never an object."""
        attempt = 0
        while True:
            attempt += 1
            try:
                return await self._request_once(request)
            except (S3ResponseError, aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
                is_passing = error.is_busy if isinstance(error, S3ResponseError) else True
                if attempt == ATTEMPTS or not is_passing:
                    raise
            await asyncio.sleep(random.uniform(0, LONGEST_RETRY_DELAY_S))  # noqa: S311 - no secret

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
        if response.status in request.welcome:
            return response
        async with response:
            page = await _beginning(response.content.iter_any(), MAX_ERROR_BYTES)
        region = response.headers.get("x-amz-bucket-region") or _word(_REGION, page)
        raise S3ResponseError(response.status, _word(_CODE, page), region or None)

    def _is_elsewhere(self, bucket: str) -> bool:
        return is_directory_bucket(bucket) or bucket in self._elsewhere

    def _only_if_elsewhere(self, bucket: str, error: S3ResponseError) -> None:
        """Remember where the bucket is not, if S3 says so permanently; raise any other answer again."""
        if not error.is_elsewhere:
            raise error
        if error.is_passing:
            return
        if len(self._elsewhere) >= REMEMBERED_BUCKETS:
            self._elsewhere.clear()
        self._elsewhere[bucket] = error.region


def _tls() -> ssl.SSLContext | Literal[True]:
    bundle = ca_bundle()
    if bundle is None:
        return True
    try:
        return ssl.create_default_context(cafile=bundle)
    except OSError as error:
        text = f"AWS_CA_BUNDLE, REQUESTS_CA_BUNDLE or SSL_CERT_FILE: {bundle}: {error.strerror or error}"
        raise S3ConfigurationError(text) from None


class _Response:
    """An object that the event loop's client reads."""

    def __init__(self, response: aiohttp.ClientResponse, size: int) -> None:
        self._response = response
        self.size = size

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._response.content.iter_any()

    def close(self) -> None:
        # Read to its end, the connection is already in the pool again.
        self._response.close()


class _Checked:
    """A reading that ends with an error unless it gave what was announced."""

    def __init__(self, reading: ObjectStream) -> None:
        self._reading = reading
        self._pieces = aiter(reading)
        self._got = 0
        self.size = reading.size

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        try:
            piece = await anext(self._pieces, b"")
        except FAILURES as error:
            raise translate(error) from None
        self._got += len(piece)
        if piece:
            return piece
        if self._got != self.size:
            text = f"S3 announced {self.size} bytes and sent {self._got}"
            raise TransientError(Dependency.S3, "connection_error", text)
        raise StopAsyncIteration

    def close(self) -> None:
        self._reading.close()


async def _beginning(pieces: AsyncIterable[bytes], length: int) -> bytes:
    begun = b""
    async for piece in pieces:
        begun += piece
        if len(begun) >= length:
            break
    return begun[:length]


def _word(pattern: re.Pattern[bytes], page: bytes) -> str:
    found = pattern.search(page)
    return found[1].decode() if found else ""
