"""Scrape the `/metrics` of all workers concurrently."""

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import aiohttp

from worker.cli.top.figures import Sample, read_sample
from worker.cli.top.workers import WorkerUrl
from worker.http.client import open_session, proxy_options

CONNECT_TIMEOUT_S: Final = 2.0
READ_TIMEOUT_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Scrape:
    """Samples by address, and the errors of unreachable workers."""

    samples: Mapping[str, Sample]
    unreachable: Mapping[str, str]


class Scraper:
    """Scrape all workers concurrently. Create it in an event loop."""

    def __init__(self, urls: Sequence[WorkerUrl]) -> None:
        self._urls = urls
        self._session = open_session(connect_timeout_s=CONNECT_TIMEOUT_S, read_timeout_s=READ_TIMEOUT_S)

    async def scrape(self) -> Scrape:
        """Scrape every address of every URL; errors are returned, not raised."""
        targets: dict[str, str] = {}
        unreachable: dict[str, str] = {}
        for url in self._urls:
            try:
                for address in await url.addresses():
                    name = f"{f'[{address}]' if ':' in address else address}:{url.port}"
                    targets[name] = f"http://{name}{url.path}"
            except OSError as error:
                unreachable[f"{url.host}:{url.port}"] = (error.strerror or type(error).__name__).lower()
        answers = await asyncio.gather(*map(self._scrape_one, targets.values()))
        samples = {}
        for name, answer in zip(targets, answers, strict=True):
            if isinstance(answer, Sample):
                samples[name] = answer
            else:
                unreachable[name] = answer
        return Scrape(samples, unreachable)

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def _scrape_one(self, url: str) -> Sample | str:
        try:
            async with (
                asyncio.timeout(READ_TIMEOUT_S),
                self._session.get(url, allow_redirects=False, **proxy_options(url)) as response,
            ):
                if response.status != 200:  # noqa: PLR2004 - HTTP 200 OK
                    return f"HTTP {response.status}"
                return read_sample(await response.text())
        except ValueError:
            return "no metrics of a vqa-worker"
        except TimeoutError:
            return f"no response in {READ_TIMEOUT_S:g} s"
        except (aiohttp.ClientError, OSError) as error:
            number = getattr(error, "errno", None)
            return os.strerror(number).lower() if number else type(error).__name__
