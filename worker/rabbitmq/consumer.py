"""Consume deliveries over one session, with a prefetch that can be changed at any time."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import structlog
from aio_pika.abc import AbstractConnection, AbstractIncomingMessage, AbstractQueue
from aio_pika.exceptions import CONNECTION_EXCEPTIONS, ChannelClosed

from vqa_worker.rabbitmq.connection import (
    Broker,
    TopologyError,
    channel_lost,
    connection_losses,
    explain,
    node_of,
    raise_if_cancelled,
)
from vqa_worker.rabbitmq.session import Session
from worker.jobs.delivery import Delivery
from worker.rabbitmq.control import Control
from worker.rabbitmq.deliveries import ignoring_loss, to_delivery
from worker.rabbitmq.single_jobs import SingleJobs
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
        self._prefetch = self._maximum = prefetch
        self._on_delivery = on_delivery
        self._queue: AbstractQueue | None = None
        self._single_jobs: SingleJobs | None = None
        self._lost: asyncio.Future[str] | None = None
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
        """Start the flow, now or with the next connection.

        Raises:
            TopologyError: the jobs queue is a stream, which only shows now (`VQA_DECLARE_TOPOLOGY=false`).
        """
        await asyncio.shield(self._start(self._resume()))

    async def set_prefetch(self, prefetch: int) -> None:
        """Set the number of unsettled jobs that may be here while the flow is on; 0: no more arrive.

        RabbitMQ fixes the prefetch count of a consumer when it starts: for a higher number another consumer
        is added, for a lower one a new consumer replaces all. Jobs of cancelled consumers stay, in addition.

        A queue with a single active consumer has no other workers to share its jobs with, and gives nothing
        to a second consumer: there, every number but 0 means the first one.
        """
        start = self._start_stopping if self._target(prefetch) < self._granted else self._start
        await asyncio.shield(start(self._set_prefetch(prefetch)))

    async def get_one(self) -> Delivery | None:
        """Return one job from the queue while the flow is held; None if there is none or no connection."""
        # Through a consumer that is cancelled, if basic.get is refused.
        start = self._start_stopping if self._has_single_active_consumer else self._start
        taking = start(self._get_one())
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
            if self._target(prefetch) < self._granted:
                await ignoring_loss(self._cancel(self._queue))
            await ignoring_loss(self._consume(self._queue))

    async def _resume(self) -> None:
        async with self._turn:
            self._held = False
            if self._queue is not None:
                await ignoring_loss(self._consume(self._queue))

    async def _get_one(self) -> Delivery | None:
        async with self._turn:
            queue, single_jobs = self._queue, self._single_jobs
            if queue is None or single_jobs is None:
                return None
            try:
                with connection_losses():
                    message = await single_jobs.get()
            except ChannelClosed as error:
                # The next session finds out why, and declares a missing queue again.
                self._end_session(explain(error))
                return None
            except (TopologyError, *CONNECTION_EXCEPTIONS):
                return None
            return None if message is None else self._to_delivery(message, queue)

    async def _consume(self, queue: AbstractQueue) -> None:
        """Add a consumer for the part of the prefetch that was not granted yet."""
        if self._prefetch > self._granted:
            await self._identify(queue)
        more = self._target(self._prefetch) - self._granted
        if more > 0:
            await queue.channel.set_qos(prefetch_count=more)
            self._consumer_tags.append(await queue.consume(partial(self._receive, queue)))
            self._granted += more

    def _target(self, prefetch: int) -> int:
        return self._maximum if prefetch and self._has_single_active_consumer else prefetch

    @property
    def _has_single_active_consumer(self) -> bool:
        return self._single_jobs is not None and self._single_jobs.has_single_active_consumer

    async def _identify(self, queue: AbstractQueue) -> None:
        """Find out what kind of queue it is, once a connection, unless the worker declares it itself."""
        if self._topology.declare or self._single_jobs is None or self._single_jobs.is_identified:
            return
        try:
            with connection_losses():
                message = await self._single_jobs.identify()
        except ChannelClosed:
            # Consuming is refused too.
            return
        if message is not None:
            # One job more than the prefetch allows, until it is settled.
            self._on_delivery(self._to_delivery(message, queue))

    async def _cancel(self, queue: AbstractQueue) -> None:
        self._granted = 0
        while self._consumer_tags:
            await queue.cancel(self._consumer_tags.pop())

    async def _receive(self, queue: AbstractQueue, message: AbstractIncomingMessage) -> None:
        # aio-pika cancels this coroutine with the channel: nothing may be awaited here.
        self._on_delivery(self._to_delivery(message, queue))

    def _pass_late(self, queue: AbstractQueue, message: AbstractIncomingMessage) -> None:
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
        self._lost = lost = await channel_lost(channel)
        try:
            async with self._turn:
                self._queue = queue
                self._single_jobs = SingleJobs(
                    connection, self._topology.jobs, partial(self._pass_late, queue)
                )
                if not self._held:
                    await self._consume(queue)
            self._session.mark_ready()
            log.info(
                "rabbitmq_connected",
                queue=self._topology.jobs,
                prefetch=self._prefetch,
                node=node_of(connection),
            )
            raise_if_cancelled()
            await self._until_lost(lost, connection)
        finally:
            lost.cancel()
            self._queue, self._single_jobs, self._granted = None, None, 0
            self._consumer_tags.clear()

    def _end_session(self, reason: str) -> None:
        if self._lost is not None and not self._lost.done():
            self._lost.set_result(reason)

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
