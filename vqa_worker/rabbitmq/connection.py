"""Connect to the broker once, and distinguish its refusals from lost connections."""

import asyncio
import random
import ssl
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import cast
from urllib.parse import parse_qs, urlsplit

import aio_pika
import pamqp.commands
from aio_pika.abc import AbstractChannel, AbstractConnection
from aio_pika.exceptions import (
    CONNECTION_EXCEPTIONS,
    AuthenticationError,
    ConnectionClosed,
    ProbableAuthenticationError,
)

from vqa_worker.rabbitmq.addresses import host_and_port, split_urls

CONNECT_TIMEOUT_S = 15.0
# With several addresses: a silent node delays the next one by no more.
NODE_TIMEOUT_S = 5.0
# aiormq closes a connection after a silence of three heartbeats; a minute is long for a queue of paid work.
HEARTBEAT_S = 20
CONSUMER_CANCELLED = (
    "the broker cancelled the consumer: the queue was deleted, or a delivery exceeded the consumer timeout"
)
# AMQP 0-9-1: the code for a virtual host that does not exist or may not be used. RabbitMQ also sends it for
# too many connections, which is a transient error.
_NOT_ALLOWED = 530
# Without this, aiormq takes the refusal of a virtual host for a broken frame and drops its reason.
pamqp.commands.Connection.Open.valid_responses = ["Connection.OpenOk", "Connection.Close"]


class BrokerRefusedError(Exception):
    """The broker refuses the connection; the message names the setting."""


class BrokerUnreachableError(Exception):
    """The broker cannot be reached; the message gives the reason."""


class TopologyError(Exception):
    """Queues or exchanges are missing, or have other arguments than the worker needs.

    Attributes:
        faults: one line each, naming the queue or exchange and what to do.
    """

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("; ".join(faults))
        self.faults = list(faults)


class ConnectionLostError(Exception):
    """The connection was lost during a request; the message is aio-pika's error."""


class _Connection(aio_pika.Connection):
    """A connection that is closed explicitly."""

    def __del__(self) -> None:
        # aio-pika would close it here, also after a failed attempt to connect. Outside of the event loop,
        # such as in another thread of the caller, Python then warns of a coroutine that nobody awaits.
        pass


@dataclass(frozen=True)
class Broker:
    """The broker's addresses and the client's credentials.

    Attributes:
        url: one URL, or a comma-separated list with the URLs of the nodes of one cluster.
        name: the connection name that the broker shows.
        setting: what error messages call the URL.
    """

    url: str
    ssl_context: ssl.SSLContext | None
    name: str
    setting: str = "VQA_RABBITMQ_URL"

    def nodes(self) -> "list[Broker]":
        """Return a broker for each address."""
        return [replace(self, url=url) for url in split_urls(self.url)]

    async def connect(self, *, last: str = "") -> AbstractConnection:
        """Connect once: try the addresses in random order until one accepts.

        Args:
            last: `host:port` of the node to try after all others.

        Raises:
            BrokerRefusedError: every node that answers refuses the credentials, the virtual host or TLS.
            BrokerUnreachableError: any other failure; names each node with its reason.
        """
        nodes = self.nodes()
        if len(nodes) == 1:
            return await self._connect(CONNECT_TIMEOUT_S)
        # Random, so that the clients of a node that fails do not all connect to the same other node.
        random.shuffle(nodes)
        nodes.sort(key=lambda node: host_and_port(node.url) == last)
        reasons, refusal = [], None
        for node in nodes:
            address = host_and_port(node.url)
            try:
                return await node._connect(NODE_TIMEOUT_S)  # noqa: SLF001 - of the same class
            except BrokerRefusedError as error:
                # It can be an error of this node, such as of its authentication backend.
                refusal = BrokerRefusedError(f"{error} ({address})")
            except BrokerUnreachableError as error:
                reasons.append(f"{address}: {error}")
        raise refusal or BrokerUnreachableError("; ".join(reasons))

    async def _connect(self, timeout_s: float) -> AbstractConnection:
        """Connect to the only address.

        Raises:
            BrokerRefusedError, BrokerUnreachableError: as `connect`.
        """
        try:
            with connection_losses():
                connection = await self._open(timeout_s)
                if is_cancelled():
                    await close(connection)
                    raise asyncio.CancelledError
                return connection
        except (*CONNECTION_EXCEPTIONS, TimeoutError) as error:
            raise BrokerUnreachableError(_explain_unreachable(self.url, error, timeout_s)) from None

    async def _open(self, timeout_s: float) -> AbstractConnection:
        try:
            return await aio_pika.connect(
                self.url,
                ssl_context=self.ssl_context,
                timeout=timeout_s,
                heartbeat=_heartbeat_s(self.url),
                client_properties={"connection_name": self.name},
                connection_class=_Connection,
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


def url_of(connection: AbstractConnection) -> str:
    """Return the URL that a connection was made with; it has credentials."""
    return str(cast("aio_pika.Connection", connection).url)


def node_of(connection: AbstractConnection) -> str:
    """Return `host:port` of the node that a connection was made to."""
    return host_and_port(url_of(connection))


def _heartbeat_s(url: str) -> int:
    """Return the seconds between heartbeats: `heartbeat=` in the URL, which aio-pika would overwrite."""
    value = parse_qs(urlsplit(url).query).get("heartbeat", [""])[-1]
    return int(value) if value.isdecimal() else HEARTBEAT_S


def _explain_unreachable(url: str, error: BaseException, timeout_s: float) -> str:
    if isinstance(error, TimeoutError) and not str(error):
        return f"no answer within {timeout_s:g} s"
    text = f"{type(error).__name__}: {error}"
    if "unexpectedly closed" in text and url.startswith("amqp:"):
        return f"{text}: is it RabbitMQ, and does the port need amqps://?"
    return text


def _explain_tls(setting: str, error: ssl.SSLError) -> str:
    reason = getattr(error, "verify_message", "") or error.reason or "no agreement"
    return (
        f"{setting}: no TLS with the broker ({reason}): check VQA_RABBITMQ_CA_FILE, "
        "VQA_RABBITMQ_CERT_FILE and that the port speaks TLS"
    )


@contextmanager
def connection_losses() -> Iterator[None]:
    """Distinguish a lost connection from a cancelled task, which aio-pika mixes up.

    When a connection is lost, aio-pika cancels the tasks that wait for the broker, which would end the
    task silently. When a task is cancelled, aio-pika can raise the error of the channel that it closes for
    that reason, which would make the task try again and never end.

    Raises:
        ConnectionError: the connection or channel was lost before the broker answered.
        CancelledError: this task was cancelled.
    """
    try:
        yield
    except asyncio.CancelledError:
        raise_if_cancelled()
        raise ConnectionError("the connection was lost before the broker answered") from None
    except Exception:
        raise_if_cancelled()
        raise


def is_cancelled() -> bool:
    """Return whether this task was cancelled.

    aio-pika can swallow that, and so can the `asyncio.wait_for` of Python 3.11, which it uses: if the result
    comes in the same moment, it returns the result.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def raise_if_cancelled() -> None:
    """Raise if this task was cancelled: see `is_cancelled`.

    Raises:
        CancelledError: this task was cancelled.
    """
    if is_cancelled():
        raise asyncio.CancelledError


def explain(error: BaseException) -> str:
    """Explain why the broker closed a channel or a connection, for the person who can fix it."""
    reason = broker_reason(error)
    if reason.endswith("in exclusive use"):
        return f"another consumer has the exclusive use of the queue: {reason}"
    if reason.startswith("ACCESS_REFUSED"):
        return f"the user of VQA_RABBITMQ_URL lacks a permission: {reason}"
    return f"{type(error).__name__}: {error}"


def broker_reason(error: BaseException) -> str:
    """Return the broker's text; aio-pika keeps the reply code only where it has no class for it."""
    return str(error.args[-1]) if error.args else ""


@asynccontextmanager
async def short_lived_channel(
    connection: AbstractConnection, *, confirms: bool = False
) -> AsyncIterator[AbstractChannel]:
    """Open a channel for a request that may be refused: a refusal closes the channel.

    `confirms`: with publisher confirms, and with returned messages raised.

    Raises:
        CONNECTION_EXCEPTIONS: the connection was lost, or, as ChannelClosed, the request was refused.
    """
    with connection_losses():
        channel = await connection.channel(publisher_confirms=confirms, on_return_raises=confirms)
        yield channel
        await channel.close()


async def channel_lost(channel: AbstractChannel) -> "asyncio.Future[str]":
    """Return a future for the reason why the channel was closed or the broker cancelled a consumer on it.

    Cancel it when it is no longer needed.
    """
    lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    why = ["the channel was closed"]

    def resolve(reason: str) -> None:
        if not lost.done():
            lost.set_result(reason)

    underlay = await channel.get_underlay_channel()
    underlay.on_consumer_cancel_callbacks.add(lambda _: resolve(CONSUMER_CANCELLED))
    channel.close_callbacks.add(lambda _, error: why.extend([explain(error)] if error else []))
    closed = asyncio.ensure_future(channel.closed())
    closed.add_done_callback(lambda _: resolve(why[-1]))
    lost.add_done_callback(lambda _: closed.cancel())
    return lost


async def close(resource: AbstractConnection | AbstractChannel) -> None:
    """Close a connection or a channel in bounded time: a silent broker does not confirm that either."""
    with suppress(*CONNECTION_EXCEPTIONS, TimeoutError):
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            with connection_losses():
                await resource.close()
