"""Ask the other workers about jobs that the broker delivered again, so that no running call is paid twice.

When a worker loses its connection, the broker gives its jobs to other workers, while its model requests still
run. The worker that gets such a job asks over the control exchange who has it. As long as another worker
answers that it works on the job, it waits; once that worker has published the outcome, it only acks the job.
Without an answer it processes the job: the other worker is dead or has no connection.

With a result store this is not used: its leases do the same, also for workers that cannot reach each other.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from worker.clock import Clock
from worker.jobs.delivery import Delivery
from worker.observability import metrics

# How long to wait for an answer: a worker that lost its connection can only answer on its next one.
SILENCE_S: Final = 5.0
ASK_INTERVAL_S: Final = 1.0
# Jobs that are delivered together are asked for together.
COLLECT_S: Final = 0.05
# In one message, which all workers receive.
MAX_ASKED: Final = 500


class JobState(StrEnum):
    """What a worker answers about a job."""

    RUNNING = "running"
    PUBLISHED = "published"


@dataclass
class _Wait:
    """The wait for the answers about one job."""

    delivery: Delivery
    heard_at: float
    ends: float
    is_published: asyncio.Future[bool]


class OtherWorkers:
    """Wait while other workers have a job. Jobs are identified by `Delivery.key`, in hexadecimal."""

    def __init__(self, *, max_s: float, clock: Clock) -> None:
        """`max_s`: the longest wait for one job."""
        self._max_s = max_s
        self._clock = clock
        self._waits: dict[str, _Wait] = {}
        self._has_waits = asyncio.Event()
        self._is_closed = False

    async def run(self, ask: Callable[[Sequence[str]], Awaitable[bool]]) -> None:
        """Ask about the jobs that wait, until cancelled; `ask` returns whether it could."""
        while True:
            await self._has_waits.wait()
            await self._clock.sleep(COLLECT_S)
            while self._waits:
                self._end_waits()
                for start in range(0, len(keys := list(self._waits)), MAX_ASKED):
                    if not await ask(keys[start : start + MAX_ASKED]):
                        self._end_all()
                await self._clock.sleep(ASK_INTERVAL_S)
            self._has_waits.clear()

    async def have_published(self, delivery: Delivery) -> bool:
        """Return whether another worker has published the outcome of a job; wait while one works on it.

        Also returns False if the delivery is lost meanwhile.
        """
        if self._is_closed:
            return False
        key, now = delivery.key.hex(), self._clock.monotonic()
        is_published = asyncio.get_running_loop().create_future()
        wait = self._waits.setdefault(key, _Wait(delivery, now, now + self._max_s, is_published))
        # The same job delivered once more: the earlier delivery is lost.
        wait.delivery = delivery
        self._has_waits.set()
        result = await asyncio.shield(wait.is_published)
        metrics.series(metrics.REDELIVERED_JOBS, "published_elsewhere" if result else "processed").inc()
        return result

    def answered(self, states: Mapping[str, JobState]) -> None:
        """Take the answer of another worker: the states of the jobs that it has."""
        for key, state in states.items():
            if (wait := self._waits.get(key)) is None:
                continue
            if state is JobState.PUBLISHED:
                self._end(key, is_published=True)
            else:
                wait.heard_at = self._clock.monotonic()

    def close(self) -> None:
        """Let all jobs that wait be processed, or requeued, now."""
        self._is_closed = True
        self._end_all()

    def _end_waits(self) -> None:
        """End the waits for which nobody answers any more, and those that took too long or are pointless."""
        now = self._clock.monotonic()
        for key, wait in list(self._waits.items()):
            if now >= min(wait.heard_at + SILENCE_S, wait.ends) or not wait.delivery.can_ack():
                self._end(key)

    def _end_all(self) -> None:
        for key in list(self._waits):
            self._end(key)

    def _end(self, key: str, *, is_published: bool = False) -> None:
        self._waits.pop(key).is_published.set_result(is_published)
