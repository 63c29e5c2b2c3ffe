"""Messages out, each confirmed by the broker before it counts as sent."""

import asyncio
import re
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from weakref import WeakValueDictionary

import aio_pika
import structlog
from aio_pika.abc import AbstractChannel, AbstractConnection
from aio_pika.exceptions import (
    CONNECTION_EXCEPTIONS,
    ChannelClosed,
    DeliveryError,
    PublishError,
)
from pamqp.common import FieldValue

from worker.errors import Dependency
from worker.observability.metrics import DEPENDENCY_UP
from worker.observability.tracing import spans
from worker.rabbitmq import properties
from worker.rabbitmq.rate_limited_warnings import RateLimitedWarnings
from worker.rabbitmq.session import (
    DIAL_TIMEOUT_S,
    Broker,
    connection_losses,
    explain,
    raise_if_cancelled,
)
from worker.rabbitmq.topology import Topology, TopologyError, establish

log = structlog.get_logger(__name__)

FIRST_DELAY_S = 0.25
LONGEST_DELAY_S = 3.0
# The library waits for ever for a channel on a connection that is lost while the broker blocks it.
RESTORE_TIMEOUT_S = 60.0
# Each restore declares every queue; the jobs that settle at the same time share one.
RESTORE_INTERVAL_S = 5.0
# The broker's words when it closes the channel over a message's size (`max_message_size`: 16 MiB by default
# in RabbitMQ 4, 128 MiB before). It closes it for the messages beside that one as well.
_TOO_LARGE = re.compile(r"message size (\d+) is larger than configured max size (\d+)")


class UnroutableError(Exception):
    """No queue is bound for this message; the broker returned it."""


class PublishAbandonedError(UnroutableError):
    """The message's `tries` are used up; what went wrong was logged."""


class RefusedError(Exception):
    """The broker lets nobody publish there, or not this user; the message says why."""


class TooLargeError(Exception):
    """The broker takes no message of this size, however often it is tried."""

    def __init__(self, most_bytes: int) -> None:
        super().__init__(f"the broker takes no message over {most_bytes} bytes (its max_message_size)")


@dataclass(frozen=True, slots=True, kw_only=True)
class OutgoingMessage:
    """A message to publish, always persistent.

    Attributes:
        mandatory: whether the broker must say if no queue takes it.
        tries: after how many refusals and lost connections to give up; None: it is tried without end.
        message_id: of the message; each publish gets a new one unless it is given.
    """

    body: bytes
    routing_key: str
    exchange: str = ""
    mandatory: bool = True
    tries: int | None = None
    content_type: str | None = None
    type: str | None = None
    app_id: str | None = None
    message_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    correlation_id: str | None = None
    reply_to: str | None = None
    timestamp: datetime | None = None
    headers: Mapping[str, FieldValue] = field(default_factory=dict)


class Publisher:
    """One connection for publishing, kept up by `run`; `publish` waits for it as long as it takes."""

    def __init__(self, broker: Broker, topology: Topology, *, bears_refusals: bool = True) -> None:
        """`bears_refusals`: what this user may not do is tried until it may, as all other trouble is."""
        self._broker = broker
        self._bears_refusals = bears_refusals
        self._topology = topology
        DEPENDENCY_UP.labels(Dependency.RABBITMQ).set(0)
        self._connection: AbstractConnection | None = None
        self._channel: AbstractChannel | None = None
        self._connected = asyncio.Event()
        # aio-pika tells by the message_id whose verdict came: one publish at a time for each.
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._warnings = RateLimitedWarnings()
        # Exchanges over which the broker has closed a channel: their messages go alone, one after the other.
        self._suspects: set[str] = set()
        self._alone = asyncio.Lock()
        # How many messages wait for their confirm on a channel; whether one was refused on the present one.
        self._waiting: Counter[AbstractChannel] = Counter()
        self._refused = asyncio.Event()
        # The restore of the topology under way or last done, and when it began.
        self._restore: asyncio.Task[None] | None = None
        self._restore_began = 0.0

    @property
    def is_connected(self) -> bool:
        """Whether there is a channel to publish on."""
        return self._connected.is_set()

    async def run(self) -> None:
        """Keep the connection up until cancelled.

        Raises:
            BrokerRefusedError: at the first connection, the broker refuses the credentials.
        """
        first = True
        while True:
            async with self._broker.connection("publish", refusal_is_final=first) as connection:
                first = False
                try:
                    with connection_losses():
                        await self._serve(connection)
                except CONNECTION_EXCEPTIONS as error:
                    log.warning(
                        "rabbitmq_connection_lost",
                        purpose="publish",
                        reason=f"{type(error).__name__}: {error}",
                    )
            # A broker that takes connections only to drop them is not to be called in a busy loop.
            await asyncio.sleep(FIRST_DELAY_S)

    async def publish(self, message: OutgoingMessage) -> None:
        """Publish and wait for the confirm, over lost connections and refusals, until it has come.

        Raises:
            UnroutableError: `message` is mandatory and no queue takes it.
            GivenUpError: its `tries` are used up.
            TooLargeError: the broker takes no message of this size.
            RefusedError: this user may not publish there, and that is not to be borne.
        """
        with spans().publish(message.exchange, message.routing_key, message.message_id) as span:
            if span.headers:
                message = replace(message, headers=properties.with_trace(message.headers, span.headers))
            # Outside the loop that publishes again: an error in building the message is not the broker's.
            await self._until_confirmed(message, to_amqp(message))

    async def _until_confirmed(self, message: OutgoingMessage, amqp: aio_pika.Message) -> None:
        delay_s, tried = FIRST_DELAY_S, 0
        async with self._turns.setdefault(message.message_id, asyncio.Lock()):
            while True:
                await self._connected.wait()
                try:
                    await self._publish_once(message, amqp)
                except PublishError:
                    raise UnroutableError(message.routing_key) from None
                except (DeliveryError, *CONNECTION_EXCEPTIONS) as error:
                    raise_if_too_large(error, message)
                    if not self._bears_refusals:
                        raise_if_refused(error)
                    self._complain(error, message)
                else:
                    return self._praise(message)
                tried += 1
                if tried == message.tries:
                    raise PublishAbandonedError(message.routing_key)
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, LONGEST_DELAY_S)

    async def restore_topology(self) -> None:
        """Declare the queues again after one of them went missing.

        One restore at a time, shared by all callers: within `RESTORE_INTERVAL_S` of its start callers get the
        outcome of the last one. A failure is logged, at most once a minute, and not raised.
        """
        now = time.monotonic()
        if self._restore is None or (self._restore.done() and now - self._restore_began > RESTORE_INTERVAL_S):
            self._restore_began = now
            self._restore = asyncio.create_task(self._declare_again(), name="restore-topology")
        await asyncio.shield(self._restore)

    async def _declare_again(self) -> None:
        if self._connection is None:
            return
        try:
            async with asyncio.timeout(RESTORE_TIMEOUT_S):
                with connection_losses():
                    await establish(self._connection, self._topology)
        except TopologyError as error:
            if self._warnings.should_log("topology", str(error)):
                log.error("topology_mismatch", faults=error.faults)  # noqa: TRY400 - the faults say it all
        except CONNECTION_EXCEPTIONS as error:
            if self._warnings.should_log("topology", type(error).__name__):
                log.warning("topology_redeclare_failed", reason=explain(error))
        else:
            self._warnings.recovered("topology")

    async def _serve(self, connection: AbstractConnection) -> None:
        self._connection = connection
        try:
            while not connection.is_closed:
                # A publish to a missing exchange closes the channel only: open another.
                async with asyncio.timeout(DIAL_TIMEOUT_S):
                    channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
                self._channel = channel
                self._connected.set()
                DEPENDENCY_UP.labels(Dependency.RABBITMQ).set(1)
                raise_if_cancelled()
                await self._until_left(channel)
                if connection.transport is None or connection.transport.connection.is_closed:
                    break
        finally:
            self._connected.clear()
            self._connection = self._channel = None
            DEPENDENCY_UP.labels(Dependency.RABBITMQ).set(0)

    async def _until_left(self, channel: AbstractChannel) -> None:
        """Return when the channel is closed, or when the broker has refused a message on it.

        A queue that was full tells those to whom it said so when it has room again, but not when its limit is
        lifted: on that channel it would refuse for ever (measured on 3.10.8). Another one finds out.
        """
        self._refused.clear()
        closed = asyncio.ensure_future(channel.closed())
        refused = asyncio.create_task(self._refused.wait(), name="publish-refused")
        try:
            await asyncio.wait({closed, refused}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            closed.cancel()
            refused.cancel()
        self._connected.clear()
        self._channel = None
        await self._close_if_idle(channel)

    async def _close_if_idle(self, channel: AbstractChannel) -> None:
        """Close a channel that is used no more; who waits for a confirm on it has to get that first."""
        if channel is not self._channel and not self._waiting[channel]:
            del self._waiting[channel]
            await _close(channel)

    def _complain(self, error: BaseException, message: OutgoingMessage) -> None:
        """Say it once, though each job may meet it, each few seconds."""
        reason = _reason(error)
        if isinstance(error, ChannelClosed | DeliveryError):
            is_news = self._warnings.should_log(_subject(message), reason)
        else:
            # The connection was lost, which says nothing about this queue. The text can name the channel.
            is_news = self._warnings.should_log("the connection", type(error).__name__)
        tell = log.warning if is_news else log.debug
        tell("publish_failed", exchange=message.exchange, routing_key=message.routing_key, reason=reason)

    def _praise(self, message: OutgoingMessage) -> None:
        if self._warnings.recovered(_subject(message)):
            log.info("publish_recovered", exchange=message.exchange, routing_key=message.routing_key)

    async def _publish_once(self, message: OutgoingMessage, amqp: aio_pika.Message) -> None:
        if message.exchange in self._suspects:
            return await self._publish_alone(message, amqp)
        channel = self._channel
        if channel is None or channel.is_closed:
            self._connected.clear()
            raise ConnectionError("the channel is closed")
        self._waiting[channel] += 1
        try:
            return await self._publish_on(channel, message, amqp)
        except DeliveryError as error:
            if channel is self._channel and not isinstance(error, PublishError):
                self._refused.set()
            raise
        finally:
            self._waiting[channel] -= 1
            await self._close_if_idle(channel)

    async def _publish_alone(self, message: OutgoingMessage, amqp: aio_pika.Message) -> None:
        """On a channel of its own: closed over this message, it takes no other's confirm with it."""
        async with self._alone:
            if self._connection is None:
                raise ConnectionError("the connection was lost")
            async with asyncio.timeout(DIAL_TIMEOUT_S):
                with connection_losses():
                    channel = await self._connection.channel(publisher_confirms=True, on_return_raises=True)
            try:
                await self._publish_on(channel, message, amqp)
            finally:
                await _close(channel)

    async def _publish_on(
        self, channel: AbstractChannel, message: OutgoingMessage, amqp: aio_pika.Message
    ) -> None:
        try:
            await send(channel, message, amqp)
        except ChannelClosed:
            self._suspects.add(message.exchange)
            raise
        self._suspects.discard(message.exchange)


async def send(channel: AbstractChannel, message: OutgoingMessage, amqp: aio_pika.Message) -> None:
    """Publish `amqp`, which is `message` as built by `to_amqp`, once and wait for the confirm.

    The channel must have publisher confirms and raise returned messages.

    Raises:
        PublishError: no queue takes it.
        DeliveryError, CONNECTION_EXCEPTIONS: the broker refuses it, or went away before it said anything.
    """
    exchange = (
        await channel.get_exchange(message.exchange, ensure=False)
        if message.exchange
        else channel.default_exchange
    )
    with connection_losses():
        await exchange.publish(amqp, message.routing_key, mandatory=message.mandatory)


async def _close(channel: AbstractChannel) -> None:
    with suppress(TimeoutError, *CONNECTION_EXCEPTIONS):
        async with asyncio.timeout(DIAL_TIMEOUT_S):
            with connection_losses():
                await channel.close()


def _subject(message: OutgoingMessage) -> str:
    return f"{message.exchange}/{message.routing_key}"


def raise_if_too_large(error: BaseException, message: OutgoingMessage) -> None:
    """Tell a message that the broker will never take from one that met with other trouble.

    Raises:
        TooLargeError: the broker closed the channel over this message's size.
    """
    found = _TOO_LARGE.search(str(error)) if isinstance(error, ChannelClosed) else None
    if found and len(message.body) == int(found[1]):
        raise TooLargeError(int(found[2]))


def raise_if_refused(error: BaseException, user: str = "the user of VQA_RABBITMQ_URL") -> None:
    """Tell what the broker will not take from this user, or to this exchange, from what passes.

    Raises:
        RefusedError: the broker closed the channel over that.
    """
    words = str(error.args[-1]) if isinstance(error, ChannelClosed) and error.args else ""
    if words.startswith("ACCESS_REFUSED"):
        raise RefusedError(f"{user} may not publish jobs: {words}")
    if words.startswith("NOT_FOUND"):
        raise RefusedError(f"jobs cannot be published: {words}")


def _reason(error: BaseException) -> str:
    """What is wrong, for the person who can put it right."""
    if isinstance(error, DeliveryError):
        return "the broker refuses the message: the queue is full, or cannot work"
    return explain(error)


def to_amqp(message: OutgoingMessage) -> aio_pika.Message:
    """The message in the library's form."""
    return aio_pika.Message(
        message.body,
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        content_type=message.content_type,
        type=message.type,
        app_id=message.app_id,
        message_id=message.message_id,
        correlation_id=message.correlation_id,
        reply_to=message.reply_to,
        timestamp=message.timestamp,
        headers=dict(message.headers),
    )
