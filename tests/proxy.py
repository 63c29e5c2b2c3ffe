"""A TCP proxy that injects network faults."""

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import urlsplit

CHUNK_BYTES = 1 << 16
REMEMBERED_BYTES = 1 << 16
LOCALHOST = "127.0.0.1"


@dataclass(eq=False)
class Link:
    """One client's connection through the proxy."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    sent: bytearray = field(default_factory=bytearray)
    """The first bytes that the client sent."""
    swallows_sent: bool = False
    """Whether further bytes from the client are discarded."""
    flows: asyncio.Event = field(default_factory=asyncio.Event)
    """Not set while bytes from the client are held."""

    hears: asyncio.Event = field(default_factory=asyncio.Event)
    """Not set while bytes from the server are held."""

    def __post_init__(self) -> None:
        self.flows.set()
        self.hears.set()

    def reset(self) -> None:
        """Reset the connection on both sides."""
        for side in (self.client, self.server):
            _reset(side)


class Proxy:
    """Forward connections from a local port to `host:port`. All faults can be changed at any time."""

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> None:
        self._target = host, port
        self._tls = tls
        self._listener: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._flows = asyncio.Event()
        self._flows.set()
        self.port = 0
        self.accepted = 0
        self.links: list[Link] = []
        self.held = 0
        """The number of connections with bytes that are held because the proxy is frozen."""
        self.freezes_on: bytes | None = None
        """Freeze once, before these bytes from a client are forwarded."""
        self.passes = 0
        """How many chunks with the bytes of `freezes_on` are forwarded before."""
        self.holds_up: bytes | None = None
        """Hold once the bytes of a client, starting with these."""
        self.deafens_on: bytes | None = None
        """Hold once the bytes from the server, after a client has sent these."""
        self.delay_s = 0.0
        """The delay of each chunk in seconds, in both directions."""
        self.cut_after: int | None = None
        """Reset new connections after this number of bytes from the server; None: never."""
        self.cuts_politely = False
        """Whether `cut_after` closes connections instead of resetting them."""
        self.answers: bytes | None = None
        """The response to the first request of a new connection; None: the server's."""

    @classmethod
    @contextlib.asynccontextmanager
    async def before(
        cls, url: str, *, tls: ssl.SSLContext | None = None, listens: bool = True
    ) -> AsyncIterator[Self]:
        """Run a proxy for the server in a URL. With `tls` it terminates TLS."""
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        proxy = cls(parts.hostname, parts.port, tls)
        await proxy.accept()
        if not listens:
            await proxy.refuse()
        try:
            yield proxy
        finally:
            await proxy.refuse()
            proxy.reset()
            for task in proxy._tasks:
                task.cancel()
            await asyncio.gather(*proxy._tasks, return_exceptions=True)

    def url(self, like: str) -> str:
        """Return the URL with the address of the proxy."""
        parts = urlsplit(like)
        userinfo, at, _ = parts.netloc.rpartition("@")
        return parts._replace(netloc=f"{userinfo}{at}{LOCALHOST}:{self.port}").geturl()

    async def accept(self) -> None:
        """Accept connections, always on the same port."""
        if self._listener is None:
            self._listener = await asyncio.start_server(
                self._on_connection, LOCALHOST, self.port, ssl=self._tls, reuse_address=True
            )
            self.port = self._listener.sockets[0].getsockname()[1]

    async def refuse(self) -> None:
        """Refuse new connections, like a closed port; keep existing ones."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def freeze(self) -> None:
        """Keep connections open and hold all bytes."""
        self._flows.clear()

    def thaw(self) -> None:
        """Forward bytes again, including the held ones."""
        self._flows.set()
        for link in self.links:
            link.flows.set()
            link.hears.set()

    def reset(self) -> None:
        """Reset every connection."""
        for link in list(self.links):
            link.reset()

    async def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.accepted += 1
        # The proxy can be closed while connections are open.
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await self._serve(reader, writer)

    async def _serve(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        if self.answers is not None:
            with contextlib.suppress(asyncio.IncompleteReadError):
                await from_client.readuntil(b"\r\n\r\n")
                await _pass_on(self.answers, to_client)
            to_client.close()
            return
        try:
            await self._passage()
            from_server, to_server = await asyncio.open_connection(*self._target)
        except (OSError, asyncio.CancelledError):
            _reset(to_client)
            return
        link = Link(to_client, to_server)
        self.links.append(link)
        up = asyncio.create_task(self._pump_up(link, from_client))
        down = asyncio.create_task(self._pump_down(link, from_server, self.cut_after))
        try:
            await asyncio.gather(up, down)
        finally:
            for pump in (up, down):
                pump.cancel()
            self.links.remove(link)
            for side in (to_client, to_server):
                side.close()

    async def _pump_up(self, link: Link, reader: asyncio.StreamReader) -> None:
        while chunk := await self._next(reader, self._watch_out):
            link.sent += chunk[: REMEMBERED_BYTES - len(link.sent)]
            if self.holds_up is not None and self.holds_up in chunk:
                self.holds_up = None
                link.flows.clear()
            await link.flows.wait()
            if self.deafens_on is not None and self.deafens_on in chunk:
                self.deafens_on = None
                link.hears.clear()
            if not link.swallows_sent:
                await _pass_on(chunk, link.server)
        _end(link.server)

    async def _pump_down(self, link: Link, reader: asyncio.StreamReader, left: int | None) -> None:
        while chunk := await self._next(reader):
            await link.hears.wait()
            if left is not None and len(chunk) >= left:
                await _pass_on(chunk[:left], link.client)
                if not self.cuts_politely:
                    link.reset()
                break
            left = None if left is None else left - len(chunk)
            await _pass_on(chunk, link.client)
        _end(link.client)

    async def _next(
        self, reader: asyncio.StreamReader, look_at: Callable[[bytes], None] = lambda _: None
    ) -> bytes:
        chunk = await reader.read(CHUNK_BYTES)
        look_at(chunk)
        await asyncio.sleep(self.delay_s)
        # A held end of stream does not count as held bytes.
        await (self._passage() if chunk else self._flows.wait())
        return chunk

    def _watch_out(self, chunk: bytes) -> None:
        if self.freezes_on is not None and self.freezes_on in chunk:
            self.passes -= 1
            if self.passes < 0:
                self.freezes_on = None
                self.freeze()

    async def _passage(self) -> None:
        self.held += 1
        try:
            await self._flows.wait()
        finally:
            self.held -= 1


async def _pass_on(chunk: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(chunk)
    await writer.drain()


def _end(writer: asyncio.StreamWriter) -> None:
    if writer.can_write_eof():
        writer.write_eof()
    else:
        # TLS does not support half-closed connections.
        writer.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    if connection is not None and connection.fileno() >= 0:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
