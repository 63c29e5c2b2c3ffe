"""Publish messages; each counts as sent when the broker has confirmed it."""

import asyncio
from collections import Counter
from dataclasses import replace
from weakref import WeakValueDictionary

import aio_pika
import structlog
from aio_pika.abc import AbstractChannel, AbstractConnection
from aio_pika.exceptions import CONNECTION_EXCEPTIONS, ChannelClosed, DeliveryError, PublishError

from vqa_worker.rabbitmq.connection import (
    CONNECT_TIMEOUT_S,
    Broker,
    close,
    connection_losses,
    raise_if_cancelled,
)
from vqa_worker.rabbitmq.outgoing import (
    OutgoingMessage,
    PublishAbandonedError,
    UnroutableError,
    explain_failure,
    raise_if_refused,
    raise_if_too_large,
    send,
)
from vqa_worker.rabbitmq.rate_limited_warnings import RateLimitedWarnings
from vqa_worker.rabbitmq.session import FIRST_DELAY_S, LONGEST_DELAY_S, Session
from worker.errors import Dependency
from worker.observability.metrics import DEPENDENCY_UP
from worker.observability.tracing import spans
from worker.rabbitmq import properties
from worker.rabbitmq.redeclaration import Redeclaration
from worker.rabbitmq.topology import Topology

log = structlog.get_logger(__name__)

# For a message that is only useful now. An alarm delays confirms.
TRY_TIMEOUT_S = 5.0
# A publish that waits longer for its confirm is reported.
CONFIRM_WARNING_S = 10.0
UNCONFIRMED = (
    f"no confirm for {CONFIRM_WARNING_S:g} s: the broker has an alarm,"
    " or a majority of the queue's nodes is down"
)


class Publisher:
    """Publish over one session, which `run` keeps connected; `publish` waits for a connection."""

    def __init__(self, broker: Broker, topology: Topology, *, retry_refusals: bool = True) -> None:
        """`retry_refusals`: whether a missing permission is retried until it is granted, or raised."""
        self._session = Session(broker, "publish")
        self._redeclaration = Redeclaration(self._session, topology)
        self._retry_refusals = retry_refusals
        self._channel: AbstractChannel | None = None
        self._connected = asyncio.Event()
        # aio-pika assigns confirms by message_id: one publish at a time for each.
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._warnings = RateLimitedWarnings()
        # Exchanges whose last message made the broker close a channel. Their messages go one by one, each on
        # a separate channel, so that no other message's confirm is lost.
        self._isolated_exchanges: set[str] = set()
        self._isolation = asyncio.Lock()
        # The number of unconfirmed messages on each channel, and whether one was refused on the current one.
        self._unconfirmed: Counter[AbstractChannel] = Counter()
        self._refused = asyncio.Event()
        # Why messages wait, by message_id.
        self._delayed: dict[str, str] = {}
        DEPENDENCY_UP.labels(Dependency.RABBITMQ).set(0)

    @property
    def is_connected(self) -> bool:
        """Whether there is a channel to publish on."""
        return self._connected.is_set()

    @property
    def delay_reason(self) -> str:
        """How many messages wait although there is a connection, and why; empty if none."""
        if not self._delayed:
            return ""
        *_, reason = self._delayed.values()
        return f"{len(self._delayed)} not published: {reason}"

    async def run(self) -> None:
        """Keep the session connected until cancelled.

        Raises:
            BrokerRefusedError: at the first connection, the broker refuses the credentials.
        """
        await self._session.run(self._serve)

    async def publish(self, message: OutgoingMessage) -> None:
        """Publish and wait for the confirm; repeat after lost connections and refusals.

        Raises:
            UnroutableError: `message` is mandatory and no queue takes it.
            PublishAbandonedError: it was tried `tries` times.
            TooLargeError: it is larger than the broker accepts.
            RefusedError: this user may not publish there (only without `retry_refusals`).
        """
        with spans().publish(message.exchange, message.routing_key, message.message_id) as span:
            if span.headers:
                message = replace(message, headers=properties.with_trace(message.headers, span.headers))
            # Outside the loop that publishes again: an error in building the message is not the broker's.
            await self._until_confirmed(message, message.to_amqp())

    async def try_publish(self, message: OutgoingMessage) -> bool:
        """Publish once, on a separate channel; return whether it was confirmed soon. Failures are logged."""
        try:
            async with asyncio.timeout(TRY_TIMEOUT_S):
                await self._connected.wait()
                await self._publish_isolated(message, message.to_amqp())
        except (TimeoutError, DeliveryError, *CONNECTION_EXCEPTIONS) as error:
            self._log_failure(error, message)
            return False
        return True

    async def restore_topology(self) -> None:
        """Declare the queues again after one of them went missing, see `Redeclaration`."""
        await self._redeclaration.run()

    async def _until_confirmed(self, message: OutgoingMessage, amqp: aio_pika.Message) -> None:
        delay_s, tried = FIRST_DELAY_S, 0
        async with self._turns.setdefault(message.message_id, asyncio.Lock()):
            try:
                while not await self._is_confirmed(message, amqp):
                    tried += 1
                    if tried == message.tries:
                        raise PublishAbandonedError(message.routing_key)
                    await asyncio.sleep(delay_s)
                    delay_s = min(delay_s * 2, LONGEST_DELAY_S)
            finally:
                self._delayed.pop(message.message_id, None)

    async def _is_confirmed(self, message: OutgoingMessage, amqp: aio_pika.Message) -> bool:
        """Publish once; return False if another try can succeed."""
        await self._connected.wait()
        late = asyncio.get_running_loop().call_later(CONFIRM_WARNING_S, self._report_unconfirmed, message)
        try:
            await self._publish_once(message, amqp)
        except PublishError:
            raise UnroutableError(message.routing_key) from None
        except (DeliveryError, *CONNECTION_EXCEPTIONS) as error:
            raise_if_too_large(error, message)
            if not self._retry_refusals:
                raise_if_refused(error)
            self._log_failure(error, message)
            return False
        finally:
            late.cancel()
        if self._warnings.recovered(_destination(message)):
            log.info("publish_recovered", exchange=message.exchange, routing_key=message.routing_key)
        return True

    def _report_unconfirmed(self, message: OutgoingMessage) -> None:
        """Report a message that still waits for its confirm: to publish it again would not help."""
        self._delayed[message.message_id] = UNCONFIRMED
        if self._warnings.should_log(_destination(message), UNCONFIRMED):
            log.warning(
                "publish_unconfirmed",
                exchange=message.exchange,
                routing_key=message.routing_key,
                reason=UNCONFIRMED,
            )

    def _log_failure(self, error: BaseException, message: OutgoingMessage) -> None:
        reason = explain_failure(error)
        if isinstance(error, ChannelClosed | DeliveryError):
            self._delayed[message.message_id] = reason
            is_due = self._warnings.should_log(_destination(message), reason)
        else:
            # The connection was lost, which has nothing to do with this queue. The text can name the channel.
            is_due = self._warnings.should_log("connection", type(error).__name__)
        fields = {"exchange": message.exchange, "routing_key": message.routing_key, "reason": reason}
        if is_due:
            log.warning("publish_failed", **fields)
        else:
            log.debug("publish_failed", **fields)

    async def _publish_once(self, message: OutgoingMessage, amqp: aio_pika.Message) -> None:
        if message.exchange in self._isolated_exchanges:
            return await self._publish_isolated(message, amqp)
        channel = self._channel
        if channel is None or channel.is_closed:
            self._connected.clear()
            raise ConnectionError("the channel is closed")
        self._unconfirmed[channel] += 1
        try:
            return await self._publish_on(channel, message, amqp)
        except DeliveryError as error:
            if channel is self._channel and not isinstance(error, PublishError):
                self._refused.set()
            raise
        finally:
            self._unconfirmed[channel] -= 1
            await self._close_if_idle(channel)

    async def _publish_isolated(self, message: OutgoingMessage, amqp: aio_pika.Message) -> None:
        async with self._isolation:
            if self._session.connection is None:
                raise ConnectionError("the connection was lost")
            channel = await _open_channel(self._session.connection)
            try:
                await self._publish_on(channel, message, amqp)
            finally:
                await close(channel)

    async def _publish_on(
        self, channel: AbstractChannel, message: OutgoingMessage, amqp: aio_pika.Message
    ) -> None:
        try:
            await send(channel, message, amqp)
        except ChannelClosed:
            self._isolated_exchanges.add(message.exchange)
            raise
        self._isolated_exchanges.discard(message.exchange)

    async def _serve(self, connection: AbstractConnection) -> None:
        self._session.mark_ready()
        try:
            while not _is_closed(connection):
                # A publish to a missing exchange closes only the channel: open another.
                self._channel = channel = await _open_channel(connection)
                self._connected.set()
                DEPENDENCY_UP.labels(Dependency.RABBITMQ).set(1)
                raise_if_cancelled()
                await self._until_unusable(channel)
        finally:
            self._connected.clear()
            self._channel = None
            DEPENDENCY_UP.labels(Dependency.RABBITMQ).set(0)

    async def _until_unusable(self, channel: AbstractChannel) -> None:
        """Return when the channel is closed, or when the broker refused a message on it.

        A full queue informs the channels that it refused when there is space again, but not when its limit is
        lifted: such a channel would be refused forever (measured on 3.10.8), a new one is not.
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
        """Close a channel that was replaced, once no message waits for its confirm on it."""
        if channel is not self._channel and not self._unconfirmed[channel]:
            del self._unconfirmed[channel]
            await close(channel)


async def _open_channel(connection: AbstractConnection) -> AbstractChannel:
    async with asyncio.timeout(CONNECT_TIMEOUT_S):
        with connection_losses():
            return await connection.channel(publisher_confirms=True, on_return_raises=True)


def _is_closed(connection: AbstractConnection) -> bool:
    transport = connection.transport
    return connection.is_closed or transport is None or transport.connection.is_closed


def _destination(message: OutgoingMessage) -> str:
    return f"{message.exchange}/{message.routing_key}"
