"""HTTP sessions and proxies for the S3 and model clients."""

import os
import ssl
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal, TypedDict
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from yarl import URL

from worker.http.connection import Connector
from worker.http.resolver import Resolver

# The receive buffer of a response; aiohttp stops reading at twice this size.
READ_BUFFER_BYTES = 64 * 1024
# Close idle connections before common load balancers do (60 s). A request on a connection that is being
# closed fails, and may have been processed.
KEEP_ALIVE_S = 30.0
# Gateways add long headers, and S3 objects may have hundreds of metadata headers.
MAX_HEADER_BYTES = 64 * 1024
MAX_HEADERS = 1000


class ProxyOptions(TypedDict, total=False):
    """The proxy arguments of an aiohttp request; empty without a proxy."""

    proxy: str
    proxy_headers: Mapping[str, str]


def open_session(
    *, connect_timeout_s: float, read_timeout_s: float | None, tls: ssl.SSLContext | Literal[True] = True
) -> aiohttp.ClientSession:
    """Open a session without cookies, decompression or default headers. Call it in an event loop.

    Args:
        connect_timeout_s: for a connection.
        read_timeout_s: between two reads; None: unlimited.
        tls: True: trust the CAs of the operating system or of `SSL_CERT_FILE`.

    Returns:
        A session with an unlimited number of connections, because the number of jobs is limited.
    """
    return aiohttp.ClientSession(
        connector=Connector(
            limit=0, ssl=tls, keepalive_timeout=KEEP_ALIVE_S, ttl_dns_cache=60, resolver=Resolver()
        ),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s, sock_read=read_timeout_s),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent", "Content-Type"),
        read_bufsize=READ_BUFFER_BYTES,
        max_line_size=MAX_HEADER_BYTES,
        max_field_size=MAX_HEADER_BYTES,
        max_headers=MAX_HEADERS,
    )


def describe_failure(error: BaseException) -> str:
    """Say in words why a request got no answer; without the URL, which may name an image."""
    cause: BaseException | None = error
    while cause is not None:
        match cause:
            case aiohttp.ClientProxyConnectionError():
                return "the proxy cannot be reached"
            case aiohttp.ClientConnectorCertificateError():
                reason = getattr(cause.certificate_error, "verify_message", "") or "verification failed"
                return f"its certificate is not trusted ({reason}): set SSL_CERT_FILE"
            case aiohttp.ClientConnectorSSLError():
                return "no TLS at this port: does it need http://?"
            case aiohttp.ClientConnectorDNSError():
                return "the host name cannot be resolved"
            case aiohttp.ClientConnectorError():
                code = cause.os_error.errno
                return os.strerror(code) if code else "none of its addresses can be reached"
            case aiohttp.ClientHttpProxyError():
                return f"the proxy answered {cause.status}"
            case aiohttp.ClientResponseError():
                return "the answer is not HTTP"
        cause = cause.__cause__
    return type(error).__name__


@lru_cache(maxsize=1024)
def proxy_options(origin: str) -> ProxyOptions:
    """Return the proxy of `scheme://host:port` from `HTTP_PROXY`, `HTTPS_PROXY` and `NO_PROXY`."""
    parts = urlsplit(origin)
    proxies = getproxies()
    address = proxies.get(parts.scheme) or proxies.get("all")
    if not address or not parts.hostname or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return {}
    url = URL(address if "://" in address else f"http://{address}")
    if url.user is None:
        return {"proxy": str(url)}
    credentials = aiohttp.encode_basic_auth(unquote(url.raw_user or ""), unquote(url.raw_password or ""))
    # aiohttp sends this as Proxy-Authorization, with and without a tunnel.
    return {"proxy": str(url.with_user(None)), "proxy_headers": {"Authorization": credentials}}
