"""Send the requests of the openai SDK with aiohttp, which takes less CPU time than its HTTP library.

Unlike the client in `openai[aiohttp]`, this one has no cookies, redirects or transports, and its errors show
whether a failed request was sent and so may have been billed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import aiohttp
import httpx2
from yarl import URL

from worker.http.client import proxy_options
from worker.model.content_encoding import MAX_RESPONSE_BYTES, check_size, decode_content
from worker.model.response_body import is_complete

_ENCODING = b"content-encoding"

# The first match counts. After the first five errors, nothing was sent.
_ERRORS: tuple[tuple[type[Exception], type[httpx2.TransportError]], ...] = (
    (aiohttp.ClientProxyConnectionError, httpx2.ProxyError),
    (aiohttp.ClientHttpProxyError, httpx2.ProxyError),
    (aiohttp.ClientConnectorError, httpx2.ConnectError),
    (aiohttp.ConnectionTimeoutError, httpx2.ConnectTimeout),
    (aiohttp.InvalidURL, httpx2.UnsupportedProtocol),
    (TimeoutError, httpx2.ReadTimeout),
    (aiohttp.ServerDisconnectedError, httpx2.RemoteProtocolError),
    (aiohttp.ClientResponseError, httpx2.RemoteProtocolError),
    (aiohttp.ClientError, httpx2.ReadError),
)


class AiohttpClient(httpx2.AsyncClient):
    """The HTTP client of the SDK: builds and sends requests, and owns the session."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        super().__init__(transport=_NoTransport(), trust_env=False)
        self._session = session

    def build_request(self, method: str, url: httpx2.URL | str, **parts: Any) -> httpx2.Request:
        """Build a request from the headers and the content stream of the SDK, and nothing else."""
        return httpx2.Request(method, parse_url(url), headers=parts["headers"], stream=parts.get("content"))

    async def send(self, request: httpx2.Request, **_: Any) -> httpx2.Response:
        """Send a request with a streamed body, and read the whole response; redirects are not followed.

        Raises:
            httpx2.TransportError: it failed; after ConnectError, ConnectTimeout, ProxyError and
                UnsupportedProtocol, nothing was sent.
            httpx2.DecodingError: the body of a 2xx response cannot be decoded.
        """
        url = URL(str(request.url), encoded=True)
        with _translated():
            response = await self._session.request(
                request.method,
                url,
                headers=[(name.decode(), value.decode()) for name, value in request.headers.raw],
                # A request without content has an empty ByteStream.
                data=None if isinstance(request.stream, httpx2.ByteStream) else request.stream,
                allow_redirects=False,
                **proxy_options(f"{url.scheme}://{url.authority}"),
            )
            try:
                content = await _read(response)
            finally:
                # This closes only a connection that cannot be reused: one whose response came before the end
                # of the request. Others are already back in the pool.
                response.close()
        return httpx2.Response(
            response.status,
            headers=[(name, value) for name, value in response.raw_headers if name.lower() != _ENCODING],
            content=_decode(response, content),
            request=request,
            extensions={"reason_phrase": (response.reason or "").encode()},
        )

    async def aclose(self) -> None:
        """Close the connections."""
        await self._session.close()
        await super().aclose()


@lru_cache(maxsize=16)
def parse_url(url: httpx2.URL | str) -> httpx2.URL:
    """Return a parsed URL; cached, because the SDK parses it several times for each request."""
    return httpx2.URL(url)


class _NoTransport(httpx2.AsyncBaseTransport):
    """Keeps the base class from creating its own transport."""


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """Return the body as it was received.

    If the connection is lost within it, a body that is complete all the same is used (a server closed the
    connection too early, or announced a wrong length), and of an error the part that has arrived.

    Raises:
        httpx2.DecodingError: the body of a 2xx response is larger than MAX_RESPONSE_BYTES.
    """
    body = bytearray()
    try:
        # `response.read` would wait until the whole request is sent, also after an early answer.
        async for piece in response.content.iter_any():
            body += piece
            if len(body) > MAX_RESPONSE_BYTES:
                break
    except aiohttp.ClientError:
        if response.ok and not is_complete(bytes(body)):
            raise
    if response.ok:
        check_size(body)
    return bytes(body)


def _decode(response: aiohttp.ClientResponse, content: bytes) -> bytes:
    try:
        return decode_content(content, response.headers.get("Content-Encoding", ""))
    except httpx2.DecodingError:
        if response.ok:
            raise
        # The status says enough.
        return b""


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        for kind, translation in _ERRORS:
            if isinstance(error, kind):
                raise translation(str(error)) from error
        raise
