"""Connections to the broker: dialled, and waited for while it cannot be reached."""

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import parse_qs, urlsplit

import aio_pika
import pamqp.commands
import structlog
from aio_pika.abc import AbstractConnection
from aio_pika.exceptions import (
    CONNECTION_EXCEPTIONS,
    AuthenticationError,
    ConnectionClosed,
    ProbableAuthenticationError,
)

log = structlog.get_logger(__name__)

T = TypeVar("T")

DIAL_TIMEOUT_S = 15.0
FIRST_DELAY_S = 0.25
LONGEST_DELAY_S = 3.0
# aiormq ends a connection after three times as long a silence; a minute is long for a queue of paid work.
HEARTBEAT_S = 20
# AMQP 0-9-1: the code for a virtual host that doesn't exist or may not be used. RabbitMQ has it for too many
# connections, too, which pass.
_NOT_ALLOWED = 530
# Without this, aiormq takes the refusal of a virtual host for a broken frame, and its reason is lost.
pamqp.commands.Connection.Open.valid_responses = ["Connection.OpenOk", "Connection.Close"]


class BrokerRefusedError(Exception):
    """The broker is there and refuses the worker; the message names the setting."""


class BrokerUnreachableError(Exception):
    """No broker answered for as long as one was waited for; the message says why, and names the setting."""


@contextmanager
def connection_losses() -> Iterator[None]:
    """Tell losses of the connection from cancellations, which the library takes for one another.

    It cancels what waits for the broker's answer when the connection is lost: let through, that would end a
    task in silence. And what is cancelled fails with the error of the channel that it closes thereby: let
    through, the task would try again and never end.

    Raises:
        ConnectionError: the connection or channel was lost before the answer came.
        CancelledError: this task was told to end.
    """
    try:
        yield
    except asyncio.CancelledError:
        raise_if_cancelled()
        raise ConnectionError("the connection was lost before the broker answered") from None
    except Exception:
        raise_if_cancelled()
        raise


def raise_if_cancelled() -> None:
    """End this task if it was told to end: the library can swallow that without a trace.

    Raises:
        CancelledError: it was.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


@dataclass(frozen=True)
class Broker:
    """How to reach the broker."""

    url: str
    ssl_context: ssl.SSLContext | None
    name: str
    setting: str = "VQA_RABBITMQ_URL"
    """What a person who reads of a refusal knows the URL by."""

    @asynccontextmanager
    async def connection(self, purpose: str, *, refusal_is_final: bool) -> AsyncIterator[AbstractConnection]:
        """A fresh connection, waited for while the broker cannot be reached.

        Raises:
            BrokerRefusedError: it refuses the credentials or the virtual host, and `refusal_is_final`.
        """
        connection = await self._dial_until_connected(purpose, refusal_is_final=refusal_is_final)
        try:
            yield connection
        finally:
            await _close(connection)

    @asynccontextmanager
    async def try_connection(self) -> AsyncIterator[AbstractConnection]:
        """A fresh connection, tried for once.

        Raises:
            BrokerRefusedError: it refuses the credentials or the virtual host.
            CONNECTION_EXCEPTIONS: it cannot be reached.
        """
        with connection_losses():
            connection = await self._dial()
        try:
            yield connection
        finally:
            await _close(connection)

    async def within(self, patience_s: float, task: Callable[[AbstractConnection], Awaitable[T]]) -> T:
        """Do something with a connection of its own; again, if the broker goes away or is not there yet.

        Raises:
            BrokerRefusedError: it refuses the credentials or the virtual host.
            BrokerUnreachableError: so many seconds were not enough.
        """
        return await self._until(patience_s, lambda: self._once(task))

    @asynccontextmanager
    async def reached(self, patience_s: float) -> AsyncIterator[AbstractConnection]:
        """A fresh connection for as long as the block lasts; a broker out of reach is waited for so long.

        Raises:
            BrokerRefusedError, BrokerUnreachableError: as `within`.
        """
        connection = await self._until(patience_s, self._dial_heeding)
        try:
            yield connection
        finally:
            await _close(connection)

    async def _until(self, patience_s: float, attempt: Callable[[], Awaitable[T]]) -> T:
        ends, reason, delay_s = time.monotonic() + patience_s, "", FIRST_DELAY_S
        while (left_s := ends - time.monotonic()) > 0:
            try:
                async with asyncio.timeout(left_s):
                    return await attempt()
            except TimeoutError:
                reason = reason or "it does not answer"
            except CONNECTION_EXCEPTIONS as error:
                reason = f"{type(error).__name__}: {error}"
            await asyncio.sleep(min(delay_s, max(0.0, ends - time.monotonic())))
            delay_s = min(delay_s * 2, LONGEST_DELAY_S)
        raise BrokerUnreachableError(
            f"{self.setting}: the broker was out of reach for {patience_s:g} s ({reason})"
        )

    async def _once(self, task: Callable[[AbstractConnection], Awaitable[T]]) -> T:
        with connection_losses():
            async with self.try_connection() as connection:
                return await task(connection)

    async def _dial_heeding(self) -> AbstractConnection:
        with connection_losses():
            return await self._dial()

    async def _dial_until_connected(self, purpose: str, *, refusal_is_final: bool) -> AbstractConnection:
        delay_s = FIRST_DELAY_S
        while True:
            try:
                return await self._dial_heeding()
            except BrokerRefusedError as error:
                if refusal_is_final:
                    raise
                reason = str(error)
            except (*CONNECTION_EXCEPTIONS, TimeoutError) as error:
                reason = f"{type(error).__name__}: {error}"
            log.warning("rabbitmq_unreachable", purpose=purpose, reason=reason, next_try_s=delay_s)
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, LONGEST_DELAY_S)

    async def _dial(self) -> AbstractConnection:
        try:
            return await aio_pika.connect(
                self.url,
                ssl_context=self.ssl_context,
                timeout=DIAL_TIMEOUT_S,
                heartbeat=_heartbeat_s(self.url),
                client_properties={"connection_name": self.name},
            )
        except (ProbableAuthenticationError, AuthenticationError):
            text = f"{self.setting}: the broker refuses this user name and password"
            raise BrokerRefusedError(text) from None
        except ConnectionClosed as error:
            code, reason = (*error.args, "", "")[:2]
            if code == _NOT_ALLOWED and "limit" not in str(reason):
                text = f"{self.setting}: the virtual host does not exist, or this user may not use it"
                raise BrokerRefusedError(text) from None
            raise
        except ssl.SSLError as error:
            raise BrokerRefusedError(_explain_tls(self.setting, error)) from None
        except aio_pika.exceptions.AMQPConnectionError as error:
            if isinstance(error.__cause__, ssl.SSLError):
                raise BrokerRefusedError(_explain_tls(self.setting, error.__cause__)) from None
            raise


def explain(error: BaseException) -> str:
    """Why the broker closed a channel or a connection, for the person who can put it right."""
    words = str(error.args[-1]) if error.args else ""
    if words.startswith("ACCESS_REFUSED"):
        return f"the user of VQA_RABBITMQ_URL lacks a permission: {words}"
    return f"{type(error).__name__}: {error}"


def _heartbeat_s(url: str) -> int:
    """Seconds between heartbeats: `heartbeat=` in the URL's query, which the library would overwrite."""
    asked = parse_qs(urlsplit(url).query).get("heartbeat", [""])[-1]
    return int(asked) if asked.isdecimal() else HEARTBEAT_S


def _explain_tls(setting: str, error: ssl.SSLError) -> str:
    reason = getattr(error, "verify_message", "") or error.reason or "no agreement"
    return (
        f"{setting}: no TLS with the broker ({reason}): check VQA_RABBITMQ_CA_FILE, "
        "VQA_RABBITMQ_CERT_FILE and that the port speaks TLS"
    )


async def _close(connection: AbstractConnection) -> None:
    """Close in bounded time: a broker that has gone quiet doesn't answer to that either."""
    try:
        async with asyncio.timeout(DIAL_TIMEOUT_S):
            with connection_losses():
                await connection.close()
    except (*CONNECTION_EXCEPTIONS, TimeoutError) as error:
        log.debug("rabbitmq_close_failed", reason=type(error).__name__)
