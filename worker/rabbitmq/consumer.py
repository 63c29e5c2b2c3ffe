"""Consume deliveries over one session, with a prefetch that can be changed at any time."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import structlog
from aio_pika.abc import AbstractConnection, AbstractIncomingMessage, AbstractQueue
from aio_pika.exceptions import CONNECTION_EXCEPTIONS

from vqa_worker.rabbitmq.connection import Broker, channel_lost, connection_losses, raise_if_cancelled
from vqa_worker.rabbitmq.session import Session
from worker.jobs.delivery import Delivery
from worker.rabbitmq.control import Control
from worker.rabbitmq.deliveries import ignoring_loss, to_delivery
from worker.rabbitmq.topology import Topology, establish

log = structlog.get_logger(__name__)

T = TypeVar("T")

# Longer than the broker takes to confirm that a consumer is cancelled, if it does.
CALM_TIMEOUT_S = 5.0


class Consumer:
    """Pass deliveries to `on_delivery`, which must not block; `resume` starts the flow, `hold` stops it."""

    def __init__(
        self,
        broker: Broker,
        topology: Topology,
        control: Control,
        *,
        prefetch: int,
        on_delivery: Callable[[Delivery], None],
    ) -> None:
        self._session = Session(broker, "consume")
        self._topology = topology
        self._control = control
        self._prefetch = prefetch
        self._on_delivery = on_delivery
        self._queue: AbstractQueue | None = None
        # RabbitMQ's consumers, and the sum of their prefetch counts.
        self._consumer_tags: list[str] = []
        self._granted = 0
        self._held = True
        self._turn = asyncio.Lock()
        # The number of requests under way that stop the flow, and whether there are none.
        self._stops = 0
        self._calm = asyncio.Event()
        self._calm.set()
        self._requests: set[asyncio.Task[Any]] = set()

    @property
    def is_connected(self) -> bool:
        """Whether there is a channel on which jobs can arrive."""
        return self._queue is not None

    async def run(self) -> None:
        """Keep the session connected until cancelled.

        Raises:
            BrokerRefusedError: at the first connection, the broker refuses the credentials.
            TopologyError: at the first connection, the queues are missing or have other arguments.
        """
        await self._session.run(self._serve)

    async def hold(self) -> None:
        """Stop the flow at once; deliveries that were already sent can still arrive."""
        await asyncio.shield(self._start_stopping(self._hold()))

    async def resume(self) -> None:
        """Start the flow, now or with the next connection."""
        await asyncio.shield(self._start(self._resume()))

    async def set_prefetch(self, prefetch: int) -> None:
        """Set the number of unsettled jobs that may be here while the flow is on; 0: no more arrive.

        RabbitMQ fixes the prefetch count of a consumer when it starts: for a higher number another consumer
        is added, for a lower one a new consumer replaces all. Jobs of cancelled consumers stay, in addition.
        """
        start = self._start_stopping if prefetch < self._granted else self._start
        await asyncio.shield(start(self._set_prefetch(prefetch)))

    async def get_one(self) -> Delivery | None:
        """Return one job from the queue while the flow is held; None if there is none or no connection."""
        taking = self._start(self._get_one())
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:
            taking.add_done_callback(self._pass_on)
            raise

    def _start(self, request: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a request to the broker in its own task, which callers shield from their cancellation.

        A request that is cancelled closes the channel, and every job on it would be delivered again.
        """
        task = asyncio.create_task(request)
        self._requests.add(task)
        task.add_done_callback(self._requests.discard)
        return task

    def _start_stopping(self, request: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        # Not calm from this moment on, before any job can learn of the stop and be requeued.
        self._stops += 1
        self._calm.clear()
        task = self._start(request)
        task.add_done_callback(self._has_stopped)
        return task

    def _has_stopped(self, _: asyncio.Task[Any]) -> None:
        self._stops -= 1
        if not self._stops:
            self._calm.set()

    async def _until_calm(self) -> None:
        """Wait, in bounded time, until no request is stopping the flow.

        A message that enters the queue at that moment can be sent to a consumer that was just cancelled: a
        quorum queue takes it back and counts a delivery (rabbitmq-server#3729; up to RabbitMQ 4.2).
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(CALM_TIMEOUT_S):
                await self._calm.wait()

    def _pass_on(self, taking: asyncio.Task[Delivery | None]) -> None:
        """Treat a job that arrived after its taker was cancelled like every other delivery."""
        if not taking.cancelled() and taking.exception() is None and (delivery := taking.result()):
            self._on_delivery(delivery)

    async def _hold(self) -> None:
        async with self._turn:
            self._held = True
            if self._queue is not None:
                await ignoring_loss(self._cancel(self._queue))

    async def _set_prefetch(self, prefetch: int) -> None:
        async with self._turn:
            self._prefetch = prefetch
            if self._queue is None or self._held:
                return
            if prefetch < self._granted:
                await ignoring_loss(self._cancel(self._queue))
            await ignoring_loss(self._consume(self._queue))

    async def _resume(self) -> None:
        async with self._turn:
            self._held = False
            if self._queue is not None:
                await ignoring_loss(self._consume(self._queue))

    async def _get_one(self) -> Delivery | None:
        async with self._turn:
            queue = self._queue
            if queue is None:
                return None
            try:
                with connection_losses():
                    # No timeout: that would close the channel. A dead connection ends it.
                    message = await queue.get(fail=False, timeout=None)
            except CONNECTION_EXCEPTIONS:
                return None
            return None if message is None else self._to_delivery(message, queue)

    async def _consume(self, queue: AbstractQueue) -> None:
        """Add a consumer for the part of the prefetch that was not granted yet."""
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
        # aio-pika cancels this coroutine with the channel: nothing may be awaited here.
        self._on_delivery(self._to_delivery(message, queue))

    def _to_delivery(self, message: AbstractIncomingMessage, queue: AbstractQueue) -> Delivery:
        channel = message.channel
        # The lambda must not keep the message: it outlives the job. A session can end before its channel.
        return to_delivery(
            message,
            can_ack=lambda: self._queue is queue and not channel.is_closed,
            wait_until_requeue_is_safe=self._until_calm,
        )

    async def _serve(self, connection: AbstractConnection) -> None:
        """Declare, listen for cancellations and consume, until the channel or the consumer is lost."""
        await establish(connection, self._topology)
        await self._control.listen(connection)
        channel = await connection.channel(publisher_confirms=False)
        queue = await channel.get_queue(self._topology.jobs, ensure=False)
        lost = await channel_lost(channel)
        try:
            async with self._turn:
                self._queue = queue
                if not self._held:
                    await self._consume(queue)
            self._session.mark_ready()
            log.info("rabbitmq_connected", queue=self._topology.jobs, prefetch=self._prefetch)
            raise_if_cancelled()
            await self._until_lost(lost, connection)
        finally:
            lost.cancel()
            self._queue, self._granted = None, 0
            self._consumer_tags.clear()

    async def _until_lost(self, lost: "asyncio.Future[str]", connection: AbstractConnection) -> None:
        control = asyncio.create_task(self._control.keep_bound(connection), name="control")
        try:
            waiting: set[asyncio.Future[Any]] = {lost, control}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            control.cancel()
        if control.done():
            control.result()
        raise ConnectionError(lost.result())
