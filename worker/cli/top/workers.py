"""Addresses of workers."""

import asyncio
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self
from urllib.parse import urlsplit

import typer

# The default of `VQA_HTTP_PORT`.
DEFAULT_PORT: Final = 8080


@dataclass(frozen=True, slots=True)
class WorkerUrl:
    """The metrics URL of one worker, or of all workers behind one name."""

    host: str
    port: int
    path: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse `http://host:port/path`; scheme, port and path are optional.

        Raises:
            BadParameter: the text is not such a URL.
        """
        try:
            parts = urlsplit(text if "://" in text else f"http://{text}")
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme != "http" or not parts.hostname:
            raise typer.BadParameter(f"{text!r} is not a worker URL such as http://host:8080.")
        path = parts.path if parts.path not in ("", "/") else "/metrics"
        return cls(parts.hostname, DEFAULT_PORT if port is None else port, path)

    async def addresses(self) -> Sequence[str]:
        """Resolve the name to the addresses of all workers; call it for each scrape, as pods change.

        Raises:
            OSError: the name does not resolve.
        """
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        return sorted({str(address[0]) for *_, address in found})
