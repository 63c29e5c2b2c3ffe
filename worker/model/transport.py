"""The openai SDK's way to the network: the event loop's own client, in the place of the SDK's HTTP library.

The SDK comes with a client of this kind (`openai[aiohttp]`). This one does less, since a worker needs neither
cookies nor redirects nor several transports; and it reports of a failure what a worker must know: whether the
request can have been worked on, and so be paid for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import aiohttp
import httpx2
from yarl import URL

from worker.http.client import proxy_options

# The first that fits. The first five are from before anything was sent.
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
    """What the SDK asks of its HTTP client: to build requests and to send them. It closes the session."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        super().__init__(transport=_NoTransport(), trust_env=False)
        self._session = session

    def build_request(self, method: str, url: httpx2.URL | str, **parts: Any) -> httpx2.Request:
        """A request with what the SDK has put together, and nothing else; content, if any, is a stream."""
        return httpx2.Request(method, parsed(url), headers=parts["headers"], stream=parts.get("content"))

    async def send(self, request: httpx2.Request, **_: Any) -> httpx2.Response:
        """Send a request, streaming its body, and read the whole answer. Redirects are not followed.

        Raises:
            httpx2.TransportError: it failed; ConnectError, ConnectTimeout, ProxyError and UnsupportedProtocol
                say that nothing was sent.
        """
        url = URL(str(request.url), encoded=True)
        with _translated():
            response = await self._session.request(
                request.method,
                url,
                headers=[(name.decode(), value.decode()) for name, value in request.headers.raw],
                # The library's own empty stream stands where there is no content.
                data=None if isinstance(request.stream, httpx2.ByteStream) else request.stream,
                allow_redirects=False,
                **proxy_options(f"{url.scheme}://{url.authority}"),
            )
            try:
                content = await response.read()
            finally:
                # Read to its end, the connection has been kept for the next call already. One whose answer
                # came before the request's end is of no use to anybody.
                response.close()
        return httpx2.Response(
            response.status,
            headers=response.raw_headers,
            content=content,
            request=request,
            extensions={"reason_phrase": (response.reason or "").encode()},
        )

    async def aclose(self) -> None:
        """Close the connections."""
        await self._session.close()
        await super().aclose()


@lru_cache(maxsize=16)
def parsed(url: httpx2.URL | str) -> httpx2.URL:
    """A URL; the worker has but one, and the library takes it apart at every step of a call."""
    return httpx2.URL(url)


class _NoTransport(httpx2.AsyncBaseTransport):
    """In the place of the one that the client would make."""


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        for kind, translation in _ERRORS:
            if isinstance(error, kind):
                raise translation(str(error)) from error
        raise
