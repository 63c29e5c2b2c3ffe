"""Read objects from S3 as streams, with signed requests of aiohttp."""

import asyncio
import random
import re
import ssl
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

import aiohttp
from yarl import URL

from worker.http.client import open_session, proxy_options
from worker.s3.aws import (
    Aws,
    S3ConfigurationError,
    S3Object,
    SignedRequest,
    ca_bundle,
    is_access_point,
)
from worker.s3.boto_client import BotoClient, is_directory_bucket
from worker.s3.checksums import CHECKSUM_MODE, checksum_of
from worker.s3.errors import (
    FAILURES,
    S3ResponseError,
    checksum_mismatch,
    not_s3,
    read_response,
    region_in,
    translate,
)
from worker.s3.object_stream import BufferedStream, CheckedStream, ObjectStream, ResponseStream, first_bytes

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 30.0
# Quick attempts until a response begins; after these, the job is retried.
MAX_ATTEMPTS = 3
MAX_RETRY_DELAY_S = 1.0
# Of an error response; its code is in the first few hundred bytes.
MAX_ERROR_BYTES = 16 * 1024

# Of an object without Content-Length, what is kept in memory. A larger one is read twice.
MAX_BUFFERED_BYTES = 256 * 1024
DEFAULT_MAX_UNSIZED_BYTES: Final = 20_000_000

_OK, _NO_CONTENT, _PARTIAL_CONTENT, _RANGE_NOT_SATISFIABLE = 200, 204, 206, 416
_CONFLICT = 409
_TOTAL = re.compile(r"bytes (?:\d+-\d+|\*)/(\d+)")


@dataclass(frozen=True, slots=True)
class Request:
    """A request for an object, or for its bucket if the key is empty and there is a `query`."""

    method: str
    source: S3Object
    headers: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    unsigned: bool = False

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

    def __init__(self, aws: Aws, *, max_unsized_bytes: int = DEFAULT_MAX_UNSIZED_BYTES) -> None:
        """`max_unsized_bytes`: an object is not read further to find its size."""
        self._aws = aws
        self._max_unsized_bytes = max_unsized_bytes
        self._boto = BotoClient(
            aws.endpoint,
            aws.region,
            connect_timeout_s=CONNECT_TIMEOUT_S,
            read_timeout_s=READ_TIMEOUT_S,
            max_unsized_bytes=max_unsized_bytes,
        )
        self._session = open_session(
            connect_timeout_s=CONNECT_TIMEOUT_S,
            read_timeout_s=READ_TIMEOUT_S,
            tls=_tls(),
        )

    async def open(self, source: S3Object) -> ObjectStream:
        """Start to read an object.

        An object whose response has no Content-Length is read to find its size, at most a byte more than
        `max_unsized_bytes`.

        Raises:
            JobError: the object does not exist or access is denied. The message does not name the image.
            TransientError: the connection was lost or timed out, or S3 refuses for an unknown reason.
            DependencyDownError: S3 is unreachable, failing, or rejects the credentials.
        """
        try:
            if is_directory_bucket(source.bucket):
                return CheckedStream(await self._boto.open(source))
            response = await self._read(source)
            if response.content_length is not None:
                return _checked(response, response.content_length)
            return await self._open_unsized(source, response)
        except FAILURES as error:
            raise translate(error, is_access_point=is_access_point(source.bucket)) from None

    async def read_beginning(self, source: S3Object, length: int) -> tuple[int, bytes]:
        """Return the size of an object and its first `length` bytes.

        Raises:
            JobError, TransientError, DependencyDownError: as `open`.
        """
        if not is_directory_bucket(source.bucket):
            try:
                found = await self._read_range(source, length)
            except FAILURES as error:
                raise translate(error, is_access_point=is_access_point(source.bucket)) from None
            if found is not None:
                return found
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
            if is_directory_bucket(source.bucket):
                return await self._boto.link(source, expires_s)
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

    async def _open_unsized(self, source: S3Object, response: aiohttp.ClientResponse) -> ObjectStream:
        """Read an object to find its size; keep a small one, and open a larger one again."""
        checksum = checksum_of(response.headers)
        pieces, size = list[bytes](), 0
        async with response:
            async for piece in response.content.iter_any():
                size += len(piece)
                if size > self._max_unsized_bytes:
                    # The caller sees that it is too large.
                    return BufferedStream(b"", size)
                pieces.append(piece)
                if size > MAX_BUFFERED_BYTES:
                    pieces.clear()
                if checksum is not None:
                    checksum.update(piece)
        if checksum is not None and not checksum.is_right:
            raise checksum_mismatch()
        if size <= MAX_BUFFERED_BYTES:
            return BufferedStream(b"".join(pieces), size, response.headers.get("Content-Encoding", ""))
        again = await self._read(source)
        return _checked(again, size if again.content_length is None else again.content_length)

    async def _read_range(self, source: S3Object, length: int) -> tuple[int, bytes] | None:
        """Return the size of an object and its beginning; None if the response does not have the size."""
        async with await self._read(source, {"Range": f"bytes=0-{length - 1}"}) as response:
            if response.status == _RANGE_NOT_SATISFIABLE:
                return 0, b""
            total = _TOTAL.fullmatch(response.headers.get("Content-Range", ""))
            if total is None and (response.status != _OK or response.content_length is None):
                return None
            size = int(total[1]) if total else response.content_length or 0
            return size, await first_bytes(response.content.iter_any(), length)

    async def _read(
        self, source: S3Object, headers: Mapping[str, str] = CHECKSUM_MODE
    ) -> aiohttp.ClientResponse:
        """Start to read an image, in the region of its bucket.

        Raises:
            DependencyDownError: the response is not an object of S3.
        """
        endpoint = self._aws.endpoint
        unsigned = endpoint.is_unsigned(source.bucket)
        request = Request("GET", source, {**headers, **endpoint.payer_header}, unsigned=unsigned)
        region = (await self._aws.address(source.bucket)).region
        try:
            response = await self._request(request)
        except S3ResponseError as error:
            found = await self._find_region(request, error) if error.is_wrong_endpoint else None
            if found is None or found == region:
                raise
            await self._aws.move(source.bucket, found)
            # Once only: a redirect may lead back.
            response = await self._request(request)
        if _is_page(response.headers):
            response.close()
            raise not_s3("the server answered with a web page instead of an object")
        return response

    async def _find_region(self, request: Request, error: S3ResponseError) -> str | None:
        """Return the region of a bucket that is elsewhere, if S3 reports it."""
        if error.region is not None:
            return error.region
        head = Request("HEAD", S3Object(request.source.bucket, ""), unsigned=request.unsigned)
        try:
            async with await self._request(head) as response:
                return region_in(response.headers)
        except S3ResponseError as answer:
            return answer.region

    async def _request(self, request: Request) -> aiohttp.ClientResponse:
        """Send a request, with a few quick retries, and once more if there are new credentials."""
        attempt, is_renewed = 0, False
        while True:
            attempt += 1
            signed = await self._aws.sign(
                request.source,
                request.method,
                query=request.query,
                headers=request.headers,
                body=request.body,
                unsigned=request.unsigned,
            )
            try:
                return await self._send(request, signed)
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                if attempt == MAX_ATTEMPTS:
                    raise
            except S3ResponseError as error:
                if error.rejects_credentials and not is_renewed and await self._aws.renew(signed.credentials):
                    is_renewed = True
                    continue
                # The result store reads the object after a conflict with another write.
                is_conflict = error.status == _CONFLICT and request.method != "GET"
                if attempt == MAX_ATTEMPTS or is_conflict or not error.is_unavailable:
                    raise
            await asyncio.sleep(random.uniform(0, MAX_RETRY_DELAY_S))  # noqa: S311 - not cryptographic

    async def _send(self, request: Request, signed: SignedRequest) -> aiohttp.ClientResponse:
        url = URL(signed.url, encoded=True)
        response = await self._session.request(
            request.method,
            url,
            headers=signed.headers,
            data=request.body or None,
            allow_redirects=False,
            **proxy_options(f"{url.scheme}://{url.authority}"),
        )
        if response.status in request.success_statuses:
            return response
        async with response:
            page = await first_bytes(response.content.iter_any(), MAX_ERROR_BYTES)
        raise read_response(response.status, response.headers, page, request.source)


def _checked(response: aiohttp.ClientResponse, size: int) -> CheckedStream:
    return CheckedStream(ResponseStream(response, size), checksum_of(response.headers))


def _is_page(headers: Mapping[str, str]) -> bool:
    """Return whether a server that is not S3 answers with a web page, such as the console of a store."""
    is_html = headers.get("Content-Type", "").lower().startswith("text/html")
    return is_html and not any(name.lower().startswith("x-amz-") for name in headers)


def _tls() -> ssl.SSLContext | Literal[True]:
    bundle = ca_bundle()
    if bundle is None:
        return True
    try:
        return ssl.create_default_context(cafile=bundle)
    except OSError as error:
        text = f"AWS_CA_BUNDLE, REQUESTS_CA_BUNDLE or SSL_CERT_FILE: {bundle}: {error.strerror or error}"
        raise S3ConfigurationError(text) from None
