"""Which workers are asked for their figures."""

import asyncio
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self
from urllib.parse import urlsplit

import typer

# That of `VQA_HTTP_PORT`.
DEFAULT_PORT: Final = 8080


@dataclass(frozen=True, slots=True)
class WorkerUrl:
    """Where one worker, or all behind one name, tell their metrics."""

    host: str
    port: int
    path: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """`http://host:port/path`; scheme, port and path may be left out.

        Raises:
            BadParameter: it is no such URL.
        """
        try:
            parts = urlsplit(text if "://" in text else f"http://{text}")
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme != "http" or not parts.hostname:
            raise typer.BadParameter(f"{text!r} is no http:// URL of a worker")
        path = parts.path if parts.path not in ("", "/") else "/metrics"
        return cls(parts.hostname, DEFAULT_PORT if port is None else port, path)

    async def addresses(self) -> Sequence[str]:
        """The addresses behind the name, each for a worker; looked up anew each time, as pods come and go.

        Raises:
            OSError: it has none.
        """
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        return sorted({str(address[0]) for *_, address in found})
