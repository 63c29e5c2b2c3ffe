"""What the worker's own HTTP clients share: sessions that change nothing on the way, TLS, proxies."""

import ssl
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal, TypedDict
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from yarl import URL

# Bytes that a response may have waiting before its sender is asked to stop; twice as much at most.
READ_BUFFER_BYTES = 64 * 1024
# Idle connections are given up before the usual load balancers do it (60 s): a request on a connection that
# is just being closed fails, and nobody knows whether it was worked on.
KEEP_ALIVE_S = 30.0


class ProxyOptions(TypedDict, total=False):
    """Return the proxy headers of a request; nothing if there is no proxy."""

    proxy: str
    proxy_headers: Mapping[str, str]


def open_session(
    *, connect_timeout_s: float, read_timeout_s: float | None, tls: ssl.SSLContext | Literal[True] = True
) -> aiohttp.ClientSession:
    """A session without cookies, redirects' memory, decompression or its own headers.

    The number of connections is not bounded here: the number of jobs is. `tls`: True is the library's own
    context, which trusts what the operating system trusts, or `SSL_CERT_FILE`. To be called in an event loop.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, ssl=tls, keepalive_timeout=KEEP_ALIVE_S, ttl_dns_cache=60),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s, sock_read=read_timeout_s),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent", "Content-Type"),
        read_bufsize=READ_BUFFER_BYTES,
    )


@lru_cache(maxsize=1024)
def proxy_options(origin: str) -> ProxyOptions:
    """The proxy that `HTTP_PROXY`, `HTTPS_PROXY` and `NO_PROXY` name for `scheme://host:port`."""
    parts = urlsplit(origin)
    proxies = getproxies()
    address = proxies.get(parts.scheme) or proxies.get("all")
    if not address or not parts.hostname or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return {}
    url = URL(address if "://" in address else f"http://{address}")
    if url.user is None:
        return {"proxy": str(url)}
    credentials = aiohttp.encode_basic_auth(unquote(url.raw_user or ""), unquote(url.raw_password or ""))
    # Under this name the client itself makes it the proxy's: for a tunnel, and for a plain request too.
    return {"proxy": str(url.with_user(None)), "proxy_headers": {"Authorization": credentials}}
