"""Deliveries in: one connection that consumes, made anew whenever it is lost."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime

import structlog
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage, AbstractQueue
from aio_pika.exceptions import CONNECTION_EXCEPTIONS

from worker.delivery import Delivery
from worker.rabbit import wire
from worker.rabbit.connection import Broker
from worker.rabbit.topology import Topology, TopologyError, establish

log = structlog.get_logger(__name__)

FIRST_DELAY_S = 0.25
LONGEST_DELAY_S = 10.0
# A session that lasted so long was a good one: the next trouble starts with a short delay again.
GOOD_SESSION_S = 30.0
GET_TIMEOUT_S = 10.0


class Consumer:
    """Hands deliveries to `on_delivery`, which must not block; `hold` stops the flow, `resume` starts it."""

    def __init__(
        self, broker: Broker, topology: Topology, *, prefetch: int, on_delivery: Callable[[Delivery], None]
    ) -> None:
        self._broker = broker
        self._topology = topology
        self._prefetch = prefetch
        self._on_delivery = on_delivery
        self._queue: AbstractQueue | None = None
        self._consumer_tag: str | None = None
        self._cancelled_by_broker = asyncio.Event()
        self._held = False
        self._turn = asyncio.Lock()

    @property
    def is_connected(self) -> bool:
        """Whether there is a channel on which jobs can come."""
        return self._queue is not None

    async def run(self) -> None:
        """Keep a session with the broker up until cancelled.

        Raises:
            BrokerRefusedError: at the first connection, the broker refuses the credentials.
            TopologyError: at the first connection, the queues are not as they must be.
        """
        delay_s, first = FIRST_DELAY_S, True
        while True:
            async with self._broker.connection("consume", refusal_is_final=first) as connection:
                started = time.monotonic()
                try:
                    await self._serve(connection)
                except TopologyError as error:
                    if first:
                        raise
                    log.error("topology_wrong", faults=error.faults)  # noqa: TRY400 - the faults say it all
                except (*CONNECTION_EXCEPTIONS, TimeoutError) as error:
                    log.warning("rabbitmq_lost", purpose="consume", reason=f"{type(error).__name__}: {error}")
                first = False
            delay_s = (
                FIRST_DELAY_S
                if time.monotonic() - started > GOOD_SESSION_S
                else min(delay_s * 2, LONGEST_DELAY_S)
            )
            await asyncio.sleep(delay_s)

    async def hold(self) -> None:
        """Stop the flow at once; deliveries that are on their way may still come."""
        async with self._turn:
            self._held = True
            queue, tag, self._consumer_tag = self._queue, self._consumer_tag, None
            if queue is not None and tag is not None:
                await _ignoring_loss(queue.cancel(tag))

    async def resume(self) -> None:
        """Let jobs flow again, now or with the next connection."""
        async with self._turn:
            self._held = False
            if self._queue is not None and self._consumer_tag is None:
                await _ignoring_loss(self._consume(self._queue))

    async def take_one(self) -> Delivery | None:
        """One job from the queue while the flow is held; None if there is none or no connection."""
        queue = self._queue
        if queue is None:
            return None
        try:
            message = await queue.get(fail=False, timeout=GET_TIMEOUT_S)
        except (*CONNECTION_EXCEPTIONS, TimeoutError):
            return None
        return None if message is None else _to_delivery(message)

    async def _serve(self, connection: AbstractConnection) -> None:
        """One session: from the declared queues to the loss of the channel or of the consumer."""
        await establish(connection, self._topology)
        channel = await connection.channel(publisher_confirms=False)
        await channel.set_qos(prefetch_count=self._prefetch)
        queue = await channel.get_queue(self._topology.jobs, ensure=False)
        await self._watch_for_cancel(channel)
        try:
            async with self._turn:
                if not self._held:
                    await self._consume(queue)
                self._queue = queue
            log.info("rabbitmq_connected", queue=self._topology.jobs, prefetch=self._prefetch)
            await self._until_lost(channel)
        finally:
            self._queue = self._consumer_tag = None

    async def _consume(self, queue: AbstractQueue) -> None:
        self._consumer_tag = await queue.consume(self._receive)

    async def _receive(self, message: AbstractIncomingMessage) -> None:
        # The library cancels this coroutine with the channel: nothing may be awaited here.
        self._on_delivery(_to_delivery(message))

    async def _watch_for_cancel(self, channel: AbstractChannel) -> None:
        self._cancelled_by_broker.clear()
        underlay = await channel.get_underlay_channel()
        underlay.on_consumer_cancel_callbacks.add(lambda _: self._cancelled_by_broker.set())

    async def _until_lost(self, channel: AbstractChannel) -> None:
        cancelled = asyncio.create_task(self._cancelled_by_broker.wait(), name="consumer-cancelled")
        closed = asyncio.ensure_future(channel.closed())
        try:
            await asyncio.wait({cancelled, closed}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            cancelled.cancel()
            closed.cancel()
        raise ConnectionError(
            "the broker cancelled the consumer: the queue was deleted, or a delivery took too long"
            if self._cancelled_by_broker.is_set()
            else "the channel was closed"
        )


async def _ignoring_loss(operation: Awaitable[object]) -> None:
    try:
        await operation
    except CONNECTION_EXCEPTIONS:
        # The session's own loop sees the loss too, and makes a new one.
        log.debug("rabbitmq_operation_lost")


def _to_delivery(message: AbstractIncomingMessage) -> Delivery:
    headers = message.headers or {}
    enqueued_ms = wire.count(headers.get(wire.ENQUEUED_HEADER), 2**53) or None
    timestamp = message.timestamp if isinstance(message.timestamp, datetime) else None
    # Quorum queues count the deliveries before this one; copies that the worker gave back carry the sum.
    before = wire.count(headers.get("x-delivery-count"), wire.MAX_DELIVERIES_BELIEVED)
    carried = wire.count(headers.get(wire.DELIVERIES_HEADER), wire.MAX_DELIVERIES_BELIEVED)
    return Delivery(
        body=message.body,
        message_id=wire.text(message.message_id),
        correlation_id=wire.text(message.correlation_id),
        reply_to=wire.text(message.reply_to),
        content_type=wire.text(message.content_type),
        timestamp=timestamp,
        trace=wire.trace_headers(headers),
        enqueued_ms=enqueued_ms,
        queued_s=wire.queued_s(enqueued_ms, timestamp, datetime.now(UTC)),
        attempts=_attempts(headers),
        deliveries=carried + before + 1,
        redelivered=bool(message.redelivered),
        copy=wire.text(headers.get(wire.COPY_HEADER)),
        received=time.monotonic(),
        ack=lambda: _ignoring_loss(message.ack()),
        reject=lambda: _ignoring_loss(message.reject(requeue=False)),
        is_alive=lambda: not _is_closed(message),
    )


def _attempts(headers: Mapping[str, object]) -> int:
    """Counted attempts so far; a dead letter that somebody put back starts anew."""
    if wire.DIED_AT_HEADER in headers:
        return 0
    return wire.count(headers.get(wire.ATTEMPTS_HEADER), wire.MAX_ATTEMPTS_BELIEVED)


def _is_closed(message: AbstractIncomingMessage) -> bool:
    try:
        return message.channel.is_closed
    except CONNECTION_EXCEPTIONS:
        return True
