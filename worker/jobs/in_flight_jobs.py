"""The jobs of this process: each worked on once, however often the broker delivers it.

A lost connection makes the broker deliver every unsettled job again. The work that runs (or has just
ended) here is then used for the new delivery too, and not paid for again.
"""

import asyncio
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn, Protocol

import structlog
from structlog.contextvars import bind_contextvars

from worker.jobs.delivery import Delivery, Progress
from worker.jobs.outcome import Outcome, Requeued, Retried
from worker.observability import metrics
from worker.observability.logs import describe_exception
from worker.observability.tracing import spans

log = structlog.get_logger(__name__)

# Jobs that ended and are remembered in case their ack was lost. A few hundred bytes each; far more than
# a broker can have unsettled with this process.
REMEMBERED = 10_000
# Of messages that the publisher sent several times: how many of them.
REMEMBERED_TWINS = 100
# A lost ack is found out with its connection, and a quorum queue hands out first what came back. What says
# the same after so long a time has been submitted again.
LOST_ACK_S = 1800.0
EXIT_FAILURE = 1


class Settlement(Protocol):
    """Who publishes and acks."""

    async def publish(self, delivery: Delivery, outcome: Outcome) -> Outcome | None:
        """Publish what the outcome calls for, confirmed, or something in its place, which is returned.

        None: the broker has the job itself back.
        """

    async def finish(self, delivery: Delivery, outcome: Outcome) -> None:
        """Ack, count and log."""


@dataclass(eq=False)
class _Work:
    """One job's work: the task that does it, how far it is, and whether its outcome has been published."""

    task: asyncio.Task[Outcome | Exception]
    progress: Progress
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    is_published: bool = False


class _Ack(NamedTuple):
    """When a message was acked, and whether the connection that the ack went over still lives."""

    is_alive: Callable[[], bool]
    at: float


class InFlightJobs:
    """Starts work for deliveries, and settles each delivery when its work has ended."""

    def __init__(
        self,
        tasks: asyncio.TaskGroup,
        process: Callable[[Delivery], Coroutine[None, None, Outcome]],
        settlement: Settlement,
    ) -> None:
        self._tasks = tasks
        self._process = process
        self._settlement = settlement
        self._running: dict[bytes, _Work] = {}
        # Messages whose outcome is out, and their acks.
        self._acked: OrderedDict[bytes, list[_Ack]] = OrderedDict()
        self._handlers: dict[asyncio.Task[Outcome | None], Delivery] = {}

    @property
    def is_idle(self) -> bool:
        """Whether every delivery has been settled."""
        return not self._handlers

    @property
    def unsettled(self) -> int:
        """How many deliveries there are of which the broker does not yet know what became."""
        return len(self._handlers)

    def accept(self, delivery: Delivery) -> asyncio.Task[Outcome | None]:
        """Take a delivery; the task ends when it is settled, with the outcome that was published for it."""
        task = self._tasks.create_task(self._handle(delivery), name="delivery")
        self._handlers[task] = delivery
        task.add_done_callback(self._handlers.pop)
        return task

    def look(self) -> list[dict[str, Any]]:
        """What is in flight, the oldest first, as log lines say it: no job's question, and no image."""
        now = time.monotonic()
        deliveries = sorted(self._handlers.values(), key=lambda delivery: delivery.received)
        return [_facts(delivery, now) for delivery in deliveries]

    async def drained(self) -> None:
        """Return when every delivery accepted so far, and since, has been settled."""
        while self._handlers:
            await asyncio.wait(set(self._handlers))

    def cut_off(self) -> None:
        """Stop the work that still runs; its jobs go back to the queue, uncounted."""
        for work in self._running.values():
            work.task.cancel()

    def abandon(self) -> None:
        """Let go of what cannot even be given back; the broker delivers it again."""
        for task in self._handlers:
            task.cancel()

    async def _handle(self, delivery: Delivery) -> Outcome | None:
        with spans().process(delivery) as span:
            trace_id = delivery.progress.trace_id = span.trace_id or delivery.progress.trace_id
            if trace_id is not None:
                # On every line that is logged from here on, in this task and in the job's.
                bind_contextvars(trace_id=trace_id)
            outcome = await self._see_to_its_end(delivery)
            span.became(outcome)
        return outcome

    async def _see_to_its_end(self, delivery: Delivery) -> Outcome | None:
        if self._lost_its_ack(delivery):
            await delivery.ack()
            return None
        work = self._running.get(delivery.key) or self._start(delivery)
        delivery.progress = work.progress
        try:
            return await self._settle(work, delivery)
        except MemoryError:
            _end_without_memory()
        except Exception as error:  # noqa: BLE001 - whatever a message does, the worker goes on
            log.error("settlement_failed", exception=describe_exception(error))  # noqa: TRY400
            # The broker itself moves it to the dead-letter queue: nothing is lost.
            await delivery.reject()
            return None
        finally:
            if self._running.get(delivery.key) is work:
                del self._running[delivery.key]

    def _start(self, delivery: Delivery) -> _Work:
        if delivery.queued_s is not None:
            metrics.waited_in_queue(delivery.queued_s)
        task = self._tasks.create_task(_caught(self._process(delivery)), name="job")
        metrics.JOBS_IN_FLIGHT.inc()
        task.add_done_callback(lambda _: metrics.JOBS_IN_FLIGHT.dec())
        work = self._running[delivery.key] = _Work(task, delivery.progress)
        return work

    async def _settle(self, work: _Work, delivery: Delivery) -> Outcome | None:
        outcome = await _outcome_of(work.task, delivery)
        async with work.turn:
            # A delivery whose connection is gone adds nothing to an outcome that is out: it comes again.
            # A message that the publisher sent twice gets its own.
            if self._lost_its_ack(delivery) or (work.is_published and not delivery.is_alive()):
                await delivery.ack()
                return None
            # The broker has the job back, and may have given it to another worker: a copy would double it.
            if isinstance(outcome, Requeued | Retried) and not delivery.is_alive():
                return None
            delivery.progress.enters("publish")
            published = await self._settlement.publish(delivery, outcome)
            if published is None:
                return None
            work.is_published = True
            self._remember(delivery)
        await self._settlement.finish(delivery, published)
        return published

    def _lost_its_ack(self, delivery: Delivery) -> bool:
        """Whether this message's outcome is out and only the ack was lost, with the connection.

        An ack on a connection that lives cannot be lost: then it is another message that says the same.
        """
        if delivery.redelivered:
            acks = self._acked.get(delivery.key, [])
            for nth, ack in enumerate(acks):
                if not ack.is_alive() and delivery.received - ack.at < LOST_ACK_S:
                    # From now on it is this delivery's ack that can be lost.
                    acks[nth] = _Ack(delivery.is_alive, delivery.received)
                    return True
        return False

    def _remember(self, delivery: Delivery) -> None:
        self._running.pop(delivery.key, None)
        # A list: hardly ever are there several, and a deque takes ten times as much memory.
        twins = self._acked.setdefault(delivery.key, [])
        twins.append(_Ack(delivery.is_alive, time.monotonic()))
        del twins[:-REMEMBERED_TWINS]
        self._acked.move_to_end(delivery.key)
        if len(self._acked) > REMEMBERED:
            self._acked.popitem(last=False)


def _facts(delivery: Delivery, now: float) -> dict[str, Any]:
    progress = delivery.progress
    return {
        "job_id": progress.job_id or delivery.message_id,
        "stage": progress.stage,
        "age_s": round(now - delivery.received, 3),
        "stage_s": round(now - progress.since, 3),
        "attempts": progress.attempts,
        "model": progress.model,
        "trace_id": progress.trace_id,
    }


async def _caught(work: Coroutine[None, None, Outcome]) -> Outcome | Exception:
    """What the work came to. A bug is a value too: raised in the task group, it would end all jobs."""
    try:
        return await work
    except MemoryError:
        _end_without_memory()
    except Exception as bug:  # noqa: BLE001 - raised again by `_outcome_of`
        return bug


async def _outcome_of(task: asyncio.Task[Outcome | Exception], delivery: Delivery) -> Outcome:
    """Return the outcome of a job's task; a job whose task was cancelled is requeued."""
    await asyncio.wait({task})
    if task.cancelled():
        return _requeued_at_shutdown(delivery)
    outcome = task.result()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _requeued_at_shutdown(delivery: Delivery) -> Requeued:
    progress = delivery.progress
    return Requeued(
        job_id=progress.job_id or delivery.message_id,
        model=progress.model or metrics.UNKNOWN_MODEL,
        reason="the worker stops",
        restored_attempts=delivery.attempts + 1 - progress.attempts,
    )


def _end_without_memory() -> NoReturn:
    """End the process as it is: nothing it does can be relied on now, and the broker has all its jobs."""
    try:
        log.critical("out_of_memory")
    finally:
        os._exit(EXIT_FAILURE)
