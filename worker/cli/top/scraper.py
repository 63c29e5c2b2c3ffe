"""Scrape the `/metrics` of all workers concurrently."""

import asyncio
import socket
from collections.abc import Iterable
from typing import Final

import aiohttp
from yarl import URL

from worker.cli.shell import UsageError
from worker.cli.top.figures import Sample, read_sample
from worker.http.client import describe_failure, open_session, proxy_options

# The default of `VQA_HTTP_PORT`.
DEFAULT_PORT: Final = 8080
CONNECT_TIMEOUT_S: Final = 2.0
READ_TIMEOUT_S: Final = 5.0


def parse_url(text: str) -> URL:
    """Parse the URL of a worker, or of all workers behind one name: `http://host:port/path`.

    Scheme, port and path are optional.

    Raises:
        UsageError: the text is not such a URL.
    """
    try:
        url = URL(text if "://" in text else f"http://{text}")
    except ValueError:
        url = URL()
    if url.scheme != "http" or not url.host:
        raise UsageError(f"--worker: {text!r} is not a URL of a worker such as http://host:8080.")
    url = url.with_path("/metrics") if url.path == "/" else url
    return url.with_port(url.explicit_port or DEFAULT_PORT)


def open_http() -> aiohttp.ClientSession:
    """Open the session for `scrape`. Call it in an event loop."""
    return open_session(connect_timeout_s=CONNECT_TIMEOUT_S, read_timeout_s=READ_TIMEOUT_S)


async def scrape(http: aiohttp.ClientSession, urls: Iterable[URL]) -> dict[str, Sample | str]:
    """Scrape every address of every URL; return samples, and errors of unreachable workers, by address."""
    found: dict[str, Sample | str] = {}
    targets: dict[str, URL] = {}
    for url in urls:
        try:
            # For each scrape, as pods change.
            resolved = await asyncio.get_running_loop().getaddrinfo(
                url.host, url.port, type=socket.SOCK_STREAM
            )
            each = {url.with_host(str(address[0])) for *_, address in resolved}
            targets |= {_address(it): it for it in each}
        except OSError as error:
            found[_address(url)] = (error.strerror or type(error).__name__).lower()
    answers = await asyncio.gather(*(_scrape_one(http, str(url)) for url in targets.values()))
    return found | dict(zip(targets, answers, strict=True))


def _address(url: URL) -> str:
    return f"{url.host_subcomponent}:{url.port}"


async def _scrape_one(http: aiohttp.ClientSession, url: str) -> Sample | str:
    try:
        async with (
            asyncio.timeout(READ_TIMEOUT_S),
            http.get(url, allow_redirects=False, **proxy_options(url)) as response,
        ):
            if response.status != 200:  # noqa: PLR2004 - HTTP 200 OK
                return f"HTTP {response.status}"
            return read_sample(await response.text())
    except ValueError:
        return "no metrics of a vqa-worker"
    except TimeoutError:
        return f"no response in {READ_TIMEOUT_S:g} s"
    except (aiohttp.ClientError, OSError) as error:
        return describe_failure(error).lower()
