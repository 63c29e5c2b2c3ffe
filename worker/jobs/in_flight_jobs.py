"""The jobs in flight in this process: each is processed once, however often the broker delivers it.

If a connection is lost, the broker redelivers every unsettled job. The new delivery reuses the running or
finished work; no second model request is sent.
"""

import asyncio
import os
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn, Protocol

import structlog
from structlog.contextvars import bind_contextvars

from worker.clock import Clock
from worker.jobs.attempt import Attempt
from worker.jobs.delivery import Delivery
from worker.jobs.other_workers import JobState, OtherWorkers
from worker.jobs.outcome import Outcome, Requeued, Retried
from worker.jobs.outcome_builder import requeued
from worker.observability import metrics
from worker.observability.logs import describe_exception
from worker.observability.tracing import spans

log = structlog.get_logger(__name__)

# Settled jobs that are remembered in case their ack was lost, at a few hundred bytes each: far more than a
# broker has unsettled with one process.
REMEMBERED = 10_000
# The same for duplicates of one message.
REMEMBERED_DUPLICATES = 100
# Redelivery follows a lost ack quickly; an equal message after this time is a new submission.
LOST_ACK_S = 1800.0
EXIT_FAILURE = 1


class Settlement(Protocol):
    """Publish outcomes and ack deliveries."""

    async def publish(self, delivery: Delivery, outcome: Outcome) -> Outcome | None:
        """Publish the outcome, or one in its place, and return it once the broker has confirmed.

        None: the original was nacked (requeued).
        """

    async def finish(self, delivery: Delivery, outcome: Outcome) -> None:
        """Ack, count and log."""


@dataclass(eq=False)
class _Work:
    """The work on one job: its task, its attempt, and whether its outcome is published."""

    task: asyncio.Task[Outcome | Exception]
    attempt: Attempt
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    is_published: bool = False


class _Ack(NamedTuple):
    """When a message was acked, and whether the connection of that ack is still open."""

    can_ack: Callable[[], bool]
    at: float

    def is_lost(self, now: float) -> bool:
        """Return whether the broker may not have received it, and may deliver the message again."""
        return not self.can_ack() and now - self.at < LOST_ACK_S


class InFlightJobs:
    """Start work for deliveries, and settle each delivery when its work has ended."""

    def __init__(
        self,
        tasks: asyncio.TaskGroup,
        process: Callable[[Delivery, Attempt], Coroutine[None, None, Outcome]],
        settlement: Settlement,
        clock: Clock | None = None,
        other_workers: OtherWorkers | None = None,
    ) -> None:
        self._tasks = tasks
        self._process = process
        self._settlement = settlement
        self._clock = clock or Clock()
        self._other_workers = other_workers
        self._running: dict[bytes, _Work] = {}
        # The acks of published messages.
        self._acked: OrderedDict[bytes, list[_Ack]] = OrderedDict()
        self._handlers: dict[asyncio.Task[Outcome | None], Delivery] = {}
        # Deliveries of the same job share its attempt.
        self._attempts: dict[Delivery, Attempt] = {}
        metrics.JOBS_IN_FLIGHT.set_function(lambda: len(set(self._attempts.values())))

    @property
    def is_idle(self) -> bool:
        """Whether every delivery is settled."""
        return not self._handlers

    @property
    def unsettled(self) -> int:
        """The number of unsettled deliveries."""
        return len(self._handlers)

    def accept(self, delivery: Delivery) -> asyncio.Task[Outcome | None]:
        """Accept a delivery; return the task that settles it and returns the published outcome."""
        self._attempts[delivery] = Attempt.from_delivery(delivery)
        task = self._tasks.create_task(self._handle(delivery), name="delivery")
        self._handlers[task] = delivery
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[Outcome | None]) -> None:
        del self._attempts[self._handlers.pop(task)]

    def snapshot(self) -> list[dict[str, Any]]:
        """Return the fields of a log line for each delivery, oldest first; nothing of the jobs' content."""
        now = self._clock.monotonic()
        deliveries = sorted(self._handlers.values(), key=lambda delivery: delivery.received_at)
        return [_log_fields(delivery, self._attempts[delivery], now) for delivery in deliveries]

    async def wait_until_drained(self) -> None:
        """Return when every delivery is settled, including those that arrive meanwhile."""
        while self._handlers:
            await asyncio.wait(set(self._handlers))

    def cancel_all(self) -> None:
        """Cancel the running work; its jobs are requeued and the attempts do not count."""
        for work in self._running.values():
            work.task.cancel()

    def abandon_all(self) -> None:
        """Leave all deliveries unsettled; the broker delivers them again when the connection closes."""
        for task in self._handlers:
            task.cancel()

    async def _handle(self, delivery: Delivery) -> Outcome | None:
        attempt = self._attempts[delivery]
        with spans().process(delivery) as span:
            attempt.trace_id = span.trace_id or attempt.trace_id
            if attempt.trace_id is not None:
                # On every line that this task and the job's task log from here on.
                bind_contextvars(trace_id=attempt.trace_id)
            outcome = await self._work_and_settle(delivery)
            span.set_outcome(outcome)
        return outcome

    async def _work_and_settle(self, delivery: Delivery) -> Outcome | None:
        if self._claim_lost_ack(delivery) or await self._is_done_elsewhere(delivery):
            await delivery.ack()
            return None
        work = self._running.get(delivery.key) or self._start(delivery)
        self._attempts[delivery] = work.attempt
        try:
            return await self._settle(work, delivery)
        except MemoryError:
            _exit_without_memory()
        except Exception as error:  # noqa: BLE001 - no message may stop the worker
            log.error("settlement_failed", exception=describe_exception(error))  # noqa: TRY400 - described without the job's content
            # The broker dead-letters it itself: nothing is lost.
            await delivery.reject()
            return None
        finally:
            if self._running.get(delivery.key) is work:
                del self._running[delivery.key]

    async def _is_done_elsewhere(self, delivery: Delivery) -> bool:
        """Return whether there is nothing to do but the ack, which has no effect on a lost connection."""
        if self._other_workers is None or not delivery.redelivered or delivery.key in self._running:
            return False
        if await self._other_workers.have_published(delivery):
            log.info("job_published_elsewhere", message_id=delivery.message_id)
            return True
        return not delivery.can_ack()

    def states_of(self, keys: Iterable[str]) -> dict[str, JobState]:
        """Return the states of those jobs that this worker works on, or whose ack was lost."""
        states = {}
        for key in keys:
            if (raw := bytes.fromhex(key)) in self._running:
                states[key] = JobState.RUNNING
            elif any(ack.is_lost(self._clock.monotonic()) for ack in self._acked.get(raw, ())):
                states[key] = JobState.PUBLISHED
        return states

    def _start(self, delivery: Delivery) -> _Work:
        if delivery.queued_s is not None:
            metrics.waited_in_queue(delivery.queued_s)
        attempt = self._attempts[delivery]
        task = self._tasks.create_task(_return_exception(self._process(delivery, attempt)), name="job")
        work = self._running[delivery.key] = _Work(task, attempt)
        return work

    async def _settle(self, work: _Work, delivery: Delivery) -> Outcome | None:
        outcome = await _outcome_of(work, delivery)
        async with work.lock:
            # If the connection is lost, the broker redelivers; do not publish the outcome again. A duplicate
            # from the publisher gets its own result.
            if self._claim_lost_ack(delivery) or (work.is_published and not delivery.can_ack()):
                await delivery.ack()
                return None
            # The broker may have delivered the job elsewhere: a copy would be a duplicate.
            if isinstance(outcome, Requeued | Retried) and not delivery.can_ack():
                return None
            work.attempt.enter("publish", self._clock.monotonic())
            published = await self._settlement.publish(delivery, outcome)
            if published is None:
                return None
            work.is_published = True
            self._remember(delivery)
        await self._settlement.finish(delivery, published)
        return published

    def _claim_lost_ack(self, delivery: Delivery) -> bool:
        """If only the ack of this message was lost, transfer the record to this delivery and return True.

        An ack is lost only with its connection: on an open one, this is another message with equal content.
        """
        if delivery.redelivered:
            acks = self._acked.get(delivery.key, [])
            for nth, ack in enumerate(acks):
                if ack.is_lost(delivery.received_at):
                    acks[nth] = _Ack(delivery.can_ack, delivery.received_at)
                    return True
        return False

    def _remember(self, delivery: Delivery) -> None:
        self._running.pop(delivery.key, None)
        # A list, since there are seldom duplicates, and a deque takes ten times as much memory.
        duplicates = self._acked.setdefault(delivery.key, [])
        duplicates.append(_Ack(delivery.can_ack, self._clock.monotonic()))
        del duplicates[:-REMEMBERED_DUPLICATES]
        self._acked.move_to_end(delivery.key)
        if len(self._acked) > REMEMBERED:
            self._acked.popitem(last=False)


def _log_fields(delivery: Delivery, attempt: Attempt, now: float) -> dict[str, Any]:
    return {
        "job_id": attempt.job_id or delivery.message_id,
        "stage": attempt.stage,
        "age_s": round(now - delivery.received_at, 3),
        "stage_s": round(now - attempt.stage_started_at, 3),
        "attempts": attempt.number,
        "model": attempt.allowed_model,
        "trace_id": attempt.trace_id,
    }


async def _return_exception(work: Coroutine[None, None, Outcome]) -> Outcome | Exception:
    """Return the outcome, or the exception: raised in the task group, it would cancel all jobs."""
    try:
        return await work
    except MemoryError:
        _exit_without_memory()
    except Exception as bug:  # noqa: BLE001 - raised again by `_outcome_of`
        return bug


async def _outcome_of(work: _Work, delivery: Delivery) -> Outcome:
    """Wait for the outcome of a job; a job whose task was cancelled is requeued."""
    await asyncio.wait({work.task})
    if work.task.cancelled():
        work.attempt.job_id = work.attempt.job_id or delivery.message_id
        return requeued(work.attempt, "the worker is shutting down")
    result = work.task.result()
    if isinstance(result, Exception):
        raise result
    return result


def _exit_without_memory() -> NoReturn:
    """Exit at once: nothing works reliably without memory, and the broker still has all jobs."""
    try:
        log.critical("out_of_memory")
    finally:
        os._exit(EXIT_FAILURE)
