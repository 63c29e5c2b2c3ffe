"""HTTP connections that use an answer that the server sends before it has read the whole request."""

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, Final

import aiohttp
from aiohttp.client_proto import ResponseHandler

_READ_BYTES: Final = 64 * 1024
_MAX_READS: Final = 64


class Connection(ResponseHandler):
    """A connection that reads what is left to read before it gives up.

    A server answers 413, 429 or 401 to the head of a request and closes the connection. Its operating system
    then resets the connection, because a part of the request is unread. If the next write notices this before
    the event loop reads the answer, the loop closes the socket with the answer in it.

    Not with TLS, where the socket has encrypted data that only the loop's TLS layer can read.
    """

    _is_reading_rest = False

    def connection_lost(self, exc: BaseException | None) -> None:
        """Read the rest after a failed write, then close."""
        if exc is not None:
            self._read_rest()
        super().connection_lost(exc)

    def set_exception(self, exc: BaseException, exc_cause: BaseException | None = None) -> None:
        """Read the rest after a failed write, then report the failure to the request."""
        if isinstance(exc, OSError) and not isinstance(exc, TimeoutError):
            self._read_rest()
        super().set_exception(exc, exc if exc_cause is None else exc_cause)

    def _read_rest(self) -> None:
        transport = self.transport
        # Without a transport the socket is closed, and its number may belong to another one.
        if self._is_reading_rest or transport is None or transport.get_extra_info("sslcontext") is not None:
            return
        self._is_reading_rest = True
        with suppress(OSError):
            for data in _pending(transport):
                self.data_received(data)
        self._is_reading_rest = False


def _pending(transport: asyncio.BaseTransport) -> Iterator[bytes]:
    """Yield what the operating system has received for a connection.

    Raises:
        OSError: there is nothing left, or the connection was reset.
    """
    descriptor = transport.get_extra_info("socket").fileno()
    for _ in range(_MAX_READS):
        if not (data := os.read(descriptor, _READ_BYTES)):
            return
        yield data


class Connector(aiohttp.TCPConnector):
    """A connector that opens such connections; aiohttp has no public way to choose their class."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        make: Callable[..., ResponseHandler] = Connection
        self._factory = partial(make, loop=self._loop)
