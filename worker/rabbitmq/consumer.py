"""Deliveries in: one connection that consumes, made anew whenever it is lost."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

import structlog
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage, AbstractQueue
from aio_pika.exceptions import CONNECTION_EXCEPTIONS

from worker.jobs.delivery import Delivery
from worker.rabbitmq import properties
from worker.rabbitmq.control import Control
from worker.rabbitmq.rate_limited_warnings import RateLimitedWarnings
from worker.rabbitmq.session import (
    Broker,
    connection_losses,
    explain,
    raise_if_cancelled,
)
from worker.rabbitmq.topology import Topology, TopologyError, establish

log = structlog.get_logger(__name__)

T = TypeVar("T")

FIRST_DELAY_S = 0.25
LONGEST_DELAY_S = 3.0
# A session that lasted so long was a good one: the next trouble starts with a short delay again.
GOOD_SESSION_S = 2.0
# Longer than the broker takes to say that it has stopped the flow, if it says anything at all.
CALM_TIMEOUT_S = 5.0


class Consumer:
    """Hands deliveries to `on_delivery`, which must not block; `resume` starts the flow, `hold` stops it."""

    def __init__(
        self,
        broker: Broker,
        topology: Topology,
        control: Control,
        *,
        prefetch: int,
        on_delivery: Callable[[Delivery], None],
    ) -> None:
        self._broker = broker
        self._topology = topology
        self._control = control
        self._prefetch = prefetch
        self._on_delivery = on_delivery
        self._queue: AbstractQueue | None = None
        # RabbitMQ's consumers, and how many jobs they let come in all.
        self._consumer_tags: list[str] = []
        self._granted = 0
        self._cancelled_by_broker = asyncio.Event()
        self._held = True
        self._was_established = False
        self._warnings = RateLimitedWarnings()
        self._turn = asyncio.Lock()
        # How many of its questions ask to stop the flow, and whether there are none.
        self._stops = 0
        self._calm = asyncio.Event()
        self._calm.set()
        self._asking: set[asyncio.Task[Any]] = set()

    @property
    def is_connected(self) -> bool:
        """Whether there is a channel on which jobs can come."""
        return self._queue is not None

    async def run(self) -> None:
        """Keep a session with the broker up until cancelled.

        Raises:
            BrokerRefusedError: at the first connection, the broker refuses the credentials.
            TopologyError: at the start, the queues are not as they must be.
        """
        delay_s, first = FIRST_DELAY_S, True
        while True:
            async with self._broker.connection("consume", refusal_is_final=first) as connection:
                started = time.monotonic()
                try:
                    with connection_losses():
                        await self._serve(connection)
                except TopologyError as error:
                    if not self._was_established:
                        raise
                    if self._warnings.should_log("topology", str(error)):
                        log.error("topology_mismatch", faults=error.faults)  # noqa: TRY400 - they say it all
                except (*CONNECTION_EXCEPTIONS, TimeoutError) as error:
                    if self._warnings.should_log("session", reason := explain(error)):
                        log.warning("rabbitmq_connection_lost", purpose="consume", reason=reason)
                first = False
            delay_s = (
                FIRST_DELAY_S
                if time.monotonic() - started > GOOD_SESSION_S
                else min(delay_s * 2, LONGEST_DELAY_S)
            )
            await asyncio.sleep(delay_s)

    async def hold(self) -> None:
        """Stop the flow at once; deliveries that are on their way may still come."""
        await asyncio.shield(self._ask_to_stop(self._hold()))

    async def resume(self) -> None:
        """Let jobs flow again, now or with the next connection."""
        await asyncio.shield(self._ask(self._resume()))

    async def allow(self, prefetch: int) -> None:
        """Let so many jobs be here unsettled while they flow, now or when they do; 0: no more come.

        RabbitMQ fixes the number when a consumer starts: for more another one is put beside it, for fewer a
        new one takes the place of all. Jobs that are here stay, and those of ended consumers come on top.
        """
        ask = self._ask_to_stop if prefetch < self._granted else self._ask
        await asyncio.shield(ask(self._allow(prefetch)))

    async def take_one(self) -> Delivery | None:
        """One job from the queue while the flow is held; None if there is none or no connection."""
        taking = self._ask(self._take_one())
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:
            taking.add_done_callback(self._pass_on)
            raise

    def _ask(self, question: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Ask the broker in a task of its own: callers shield it from their own cancellation.

        A question that is cancelled closes the channel, and every job on it would be delivered again.
        """
        task = asyncio.create_task(question)
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)
        return task

    def _ask_to_stop(self, question: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        # There is no calm from this very moment on, before a job can hear of the stop and go back.
        self._stops += 1
        self._calm.clear()
        task = self._ask(question)
        task.add_done_callback(self._has_stopped)
        return task

    def _has_stopped(self, _: asyncio.Task[Any]) -> None:
        self._stops -= 1
        if not self._stops:
            self._calm.set()

    async def _until_calm(self) -> None:
        """Wait, in bounded time, until the flow is not just being stopped.

        What comes into the queue at that moment is on its way to a consumer that is no more: a quorum queue
        takes it back and counts it as delivered (rabbitmq-server#3729; up to RabbitMQ 4.2).
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(CALM_TIMEOUT_S):
                await self._calm.wait()

    def _pass_on(self, taking: asyncio.Task[Delivery | None]) -> None:
        """A job that came when nobody waited for it any more goes the way of every other."""
        if not taking.cancelled() and taking.exception() is None and (delivery := taking.result()):
            self._on_delivery(delivery)

    async def _hold(self) -> None:
        async with self._turn:
            self._held = True
            if self._queue is not None:
                await _ignoring_loss(self._cancel(self._queue))

    async def _allow(self, prefetch: int) -> None:
        async with self._turn:
            self._prefetch = prefetch
            if self._queue is None or self._held:
                return
            if prefetch < self._granted:
                await _ignoring_loss(self._cancel(self._queue))
            await _ignoring_loss(self._consume(self._queue))

    async def _resume(self) -> None:
        async with self._turn:
            self._held = False
            if self._queue is not None:
                await _ignoring_loss(self._consume(self._queue))

    async def _take_one(self) -> Delivery | None:
        async with self._turn:
            queue = self._queue
            if queue is None:
                return None
            try:
                with connection_losses():
                    # No timeout of its own: that would close the channel. A dead connection ends it.
                    message = await queue.get(fail=False, timeout=None)
            except CONNECTION_EXCEPTIONS:
                return None
            return None if message is None else self._to_delivery(message, queue)

    async def _serve(self, connection: AbstractConnection) -> None:
        """One session: from the declared queues to the loss of the channel or of the consumer."""
        await establish(connection, self._topology)
        self._was_established = True
        await self._control.listen(connection)
        channel = await connection.channel(publisher_confirms=False)
        queue = await channel.get_queue(self._topology.jobs, ensure=False)
        await self._watch_for_cancel(channel)
        try:
            async with self._turn:
                self._queue = queue
                if not self._held:
                    await self._consume(queue)
            self._warnings.recovered("topology")
            self._warnings.recovered("session")
            log.info("rabbitmq_connected", queue=self._topology.jobs, prefetch=self._prefetch)
            raise_if_cancelled()
            await self._until_lost(channel, connection)
        finally:
            self._queue, self._granted = None, 0
            self._consumer_tags.clear()

    async def _consume(self, queue: AbstractQueue) -> None:
        """Let as many jobs come as are allowed and did not yet."""
        more = self._prefetch - self._granted
        if more > 0:
            await queue.channel.set_qos(prefetch_count=more)
            self._consumer_tags.append(await queue.consume(partial(self._receive, queue)))
            self._granted += more

    async def _cancel(self, queue: AbstractQueue) -> None:
        self._granted = 0
        while self._consumer_tags:
            await queue.cancel(self._consumer_tags.pop())

    async def _receive(self, queue: AbstractQueue, message: AbstractIncomingMessage) -> None:
        # The library cancels this coroutine with the channel: nothing may be awaited here.
        self._on_delivery(self._to_delivery(message, queue))

    def _to_delivery(self, message: AbstractIncomingMessage, queue: AbstractQueue) -> Delivery:
        channel = message.channel
        # It must not hold on to the message: this outlives the job. A session may end before its channel.
        return to_delivery(
            message,
            is_alive=lambda: self._queue is queue and not channel.is_closed,
            may_go_back=self._until_calm,
        )

    async def _watch_for_cancel(self, channel: AbstractChannel) -> None:
        self._cancelled_by_broker.clear()
        underlay = await channel.get_underlay_channel()
        underlay.on_consumer_cancel_callbacks.add(lambda _: self._cancelled_by_broker.set())

    async def _until_lost(self, channel: AbstractChannel, connection: AbstractConnection) -> None:
        cancelled = asyncio.create_task(self._cancelled_by_broker.wait(), name="consumer-cancelled")
        control = asyncio.create_task(self._control.keep_bound(connection), name="control")
        closed = asyncio.ensure_future(channel.closed())
        waiting: set[asyncio.Future[Any]] = {cancelled, control, closed}
        try:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for future in waiting:
                future.cancel()
        if control in done:
            control.result()
        raise ConnectionError(
            "the broker cancelled the consumer: the queue was deleted, or a delivery took too long"
            if self._cancelled_by_broker.is_set()
            else "the channel was closed"
        )


async def _ignoring_loss(operation: Awaitable[object]) -> None:
    try:
        with connection_losses():
            await operation
    except CONNECTION_EXCEPTIONS:
        # The session's own loop sees the loss too, and makes a new one.
        log.debug("rabbitmq_request_lost")


def to_delivery(
    message: AbstractIncomingMessage,
    *,
    is_alive: Callable[[], bool],
    may_go_back: Callable[[], Awaitable[None]],
) -> Delivery:
    """A message as the rest of the worker knows it."""
    headers = message.headers or {}
    enqueued_ms = properties.count(headers.get(properties.ENQUEUED_HEADER), 2**53) or None
    timestamp = message.timestamp if isinstance(message.timestamp, datetime) else None
    # Quorum queues count the deliveries before this one; copies that the worker gave back carry the sum.
    before = properties.count(headers.get("x-delivery-count"), properties.MAX_DELIVERIES_BELIEVED)
    carried = properties.count(headers.get(properties.DELIVERIES_HEADER), properties.MAX_DELIVERIES_BELIEVED)
    # The publisher of a message gave it no id if the worker's copy of it goes by the copy's own.
    message_id, copy = (
        properties.text(message.message_id),
        properties.text(headers.get(properties.COPY_HEADER)),
    )
    return Delivery(
        body=message.body,
        message_id=message_id if message_id != copy else None,
        correlation_id=properties.text(message.correlation_id),
        reply_to=properties.text(message.reply_to),
        content_type=properties.text(message.content_type),
        timestamp=timestamp,
        trace=properties.trace_headers(headers),
        enqueued_ms=enqueued_ms,
        queued_s=properties.queued_s(enqueued_ms, timestamp, datetime.now(UTC)),
        attempts=_attempts(headers),
        deliveries=carried + before + 1,
        redelivered=bool(message.redelivered),
        copy=copy,
        received=time.monotonic(),
        ack=lambda: _ignoring_loss(message.ack()),
        reject=lambda: _ignoring_loss(message.reject(requeue=False)),
        requeue=lambda: _ignoring_loss(message.nack(requeue=True)),
        is_alive=is_alive,
        may_go_back=may_go_back,
    )


def _attempts(headers: Mapping[str, object]) -> int:
    """Counted attempts so far; a dead letter that somebody put back starts anew."""
    if properties.DIED_AT_HEADER in headers:
        return 0
    return properties.count(headers.get(properties.ATTEMPTS_HEADER), properties.MAX_ATTEMPTS_BELIEVED)
