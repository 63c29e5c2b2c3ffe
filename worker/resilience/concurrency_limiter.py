"""Admit jobs in order of arrival, within each model's concurrency limit and a maximum for the process."""

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from worker.clock import TIMER_SLACK_S, Clock
from worker.errors import NotAdmittedError, RateLimitedError
from worker.observability import metrics
from worker.resilience.adaptive_limit import AdaptiveLimit

# Prefetch jobs that can start within this time.
PREFETCH_HORIZON_S = 5.0
# Minimum prefetch beyond the limit, as a fraction of it; the maximum is 1 after a 429.
MIN_PREFETCH_FRACTION = 0.25
# During the backoff of one of several models, this many jobs are prefetched to find those for the others.
PREFETCH_DURING_BACKOFF = 8
# A model without jobs for this long does not count in the prefetch and in the gauge of the limit.
IDLE_MODEL_S = 60.0
# A rate limit is reported if nothing succeeds for so long.
LASTING_LIMIT_S = 30.0


class ModelPausedError(NotAdmittedError):
    """The job's model is paused, while others are available."""


class _ModelQueue:
    """One model: its limit, its slots in use and the jobs that wait for a slot."""

    def __init__(self, limit: AdaptiveLimit, clock: Clock) -> None:
        self._clock = clock
        self.limit = limit
        self.slots_in_use = 0
        # Each with its sequence number, over all models.
        self.waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self.timer: asyncio.Task[None] | None = None
        self.used_at = clock.monotonic()
        # Since when the API refuses requests for their rate without a success, and what it said at last.
        self.limited_since: float | None = None
        self.limit_message = ""

    def limited_by(self, message: str) -> None:
        """Record what the API said when it limited the rate of requests."""
        if self.limited_since is None:
            self.limited_since = self._clock.monotonic()
        self.limit_message = message

    @property
    def backoff_left_s(self) -> float:
        """Return the seconds until a request may be admitted; 0 if it may be now."""
        return max(0.0, self.limit.backoff_until - self._clock.monotonic())

    @property
    def has_free_slot(self) -> bool:
        return self.slots_in_use < self.limit.value

    def may_admit(self) -> bool:
        """Return whether a waiting job may start."""
        return bool(self.waiting) and self.has_free_slot and not self.backoff_left_s

    def runnable_within_horizon(self) -> float:
        """Return how many jobs run now or can start within PREFETCH_HORIZON_S."""
        if self.backoff_left_s > PREFETCH_HORIZON_S:
            return self.slots_in_use
        max_fraction = 1.0 if self.limit.was_rate_limited else math.inf
        request_s = self.limit.request_s
        in_time = math.inf if request_s is None else PREFETCH_HORIZON_S / max(request_s, 1e-3)
        return self.limit.value * (1 + min(max(in_time, MIN_PREFETCH_FRACTION), max_fraction))


class Slot:
    """Held while a job waits for image memory, opens its images and waits for the model API."""

    def __init__(self, limiter: "ConcurrencyLimiter", queue: _ModelQueue, clock: Clock) -> None:
        self._limiter = limiter
        self._queue = queue
        self._clock = clock
        self.started = clock.monotonic()

    @property
    def must_wait(self) -> bool:
        """Return whether a Retry-After received since admission is still in effect."""
        return self._queue.limit.retry_after_until > self._clock.monotonic()

    def restart(self) -> None:
        """Begin another request of the same job."""
        self.started = self._clock.monotonic()

    def succeeded(self) -> None:
        """Record that the API answered the request."""
        self._queue.limited_since = None
        self._queue.limit.succeeded(self._queue.slots_in_use, self._clock.monotonic() - self.started)
        self._limiter.limit_changed()

    def rate_limited(self, error: RateLimitedError) -> None:
        """Record that the API takes no more requests now."""
        others = self._queue.slots_in_use - 1
        self._queue.limit.rate_limited(others, self.started, self._clock.monotonic(), error.retry_after_s)
        self._queue.limited_by(error.message)
        self._limiter.limit_changed()


class ConcurrencyLimiter:
    """Admit jobs in order of arrival, as far as the limits of their models allow.

    While it is closed, it rejects all jobs, also those that wait, except single probes.

    Args:
        maximum: most slots in use, over all models.
        initial: the limit of each model at the start.
        models: the number of models.
        clock: the source of the time.
    """

    def __init__(
        self,
        maximum: int,
        *,
        initial: int,
        models: int = 1,
        clock: Clock | None = None,
    ) -> None:
        self._maximum = maximum
        self._initial = initial
        self._model_count = models
        self._clock = clock or Clock()
        self._queues: dict[str, _ModelQueue] = {}
        self._sequence = 0
        self._slots_in_use = 0
        self._held: set[Slot] = set()
        self._closed: str | None = None
        self._probes = 0
        self.update_gauge()
        metrics.CONCURRENCY_IN_USE.set_function(lambda: self._slots_in_use)

    @property
    def slots_in_use(self) -> int:
        """Return how many jobs hold a slot."""
        return self._slots_in_use

    def oldest_request(self) -> float:
        """Return when the slot that is held for the longest time was taken; infinity if none is held."""
        return min((slot.started for slot in self._held), default=math.inf)

    @asynccontextmanager
    async def slot(self, model: str) -> AsyncIterator[Slot]:
        """Wait for a slot and hold it.

        Raises:
            NotAdmittedError: the limiter is closed, or was closed during the wait.
        """
        queue = self._queue(model)
        await self._enter(queue)
        slot = Slot(self, queue, self._clock)
        self._held.add(slot)
        try:
            yield slot
        finally:
            self._held.remove(slot)
            self._leave(queue)

    def close(self, reason: str) -> None:
        """Reject all jobs until `open`."""
        self._closed = reason
        self._probes = 0
        for queue in self._queues.values():
            while queue.waiting:
                _, waiter = queue.waiting.popleft()
                if not waiter.done():
                    waiter.set_exception(NotAdmittedError(reason))

    def check(self, *, allow_probe: bool = False) -> None:
        """Raise if closed. With `allow_probe`, pass if a probe is allowed.

        Raises:
            NotAdmittedError: the limiter is closed.
        """
        if self._closed is not None and not (allow_probe and self._probes):
            raise NotAdmittedError(self._closed)

    def open(self) -> None:
        """Admit jobs again."""
        self._closed = None
        self._probes = 0
        self._admit()

    def allow_probe(self) -> None:
        """Admit one job although the limiter is closed."""
        self._probes = 1

    def backoff_left_s(self, model: str) -> float:
        """Return the seconds until requests for this model may be admitted; 0 if they may be now."""
        return self._queues[model].backoff_left_s if model in self._queues else 0.0

    def backoffs(self) -> dict[str, float]:
        """Return the models whose backoff is longer than PREFETCH_HORIZON_S, with the seconds left."""
        waits = {name: queue.backoff_left_s for name, queue in self._queues.items()}
        return {name: seconds for name, seconds in waits.items() if seconds > PREFETCH_HORIZON_S}

    def lasting_limits(self) -> dict[str, str]:
        """Return the models of which every request was limited for LASTING_LIMIT_S, and what the API said."""
        since = self._clock.monotonic() - LASTING_LIMIT_S
        return {
            name: queue.limit_message
            for name, queue in self._queues.items()
            if queue.limited_since is not None and queue.limited_since <= since
        }

    def slots_and_waiting(self) -> int:
        """Return how many jobs hold a slot or wait for one."""
        return self._slots_in_use + sum(len(queue.waiting) for queue in self._queues.values())

    def target_prefetch(self) -> int:
        """Return how many jobs the worker should have, running and waiting: those that can start soon.

        The maximum until the first job; the slots in use while all models are in a backoff.
        """
        if not self._queues:
            return self._maximum
        target = sum(queue.runnable_within_horizon() for queue in self._in_use())
        if len(self.backoffs()) < self._model_count:
            target = max(target, PREFETCH_DURING_BACKOFF if self.backoffs() else 1)
        return math.ceil(min(target, self._maximum))

    def limit_changed(self) -> None:
        """Update the gauge and admit the jobs that the new limit allows."""
        self.update_gauge()
        self._admit()

    def update_gauge(self) -> None:
        """Set the gauge to the sum of the limits of all models in use, the maximum at most."""
        limits = [queue.limit.value for queue in self._in_use()] or [self._initial]
        metrics.CONCURRENCY_LIMIT.set(min(self._maximum, sum(limits)))

    def _queue(self, name: str) -> _ModelQueue:
        queue = self._queues.get(name)
        if queue is None:
            limit = AdaptiveLimit(self._maximum, self._initial)
            queue = self._queues[name] = _ModelQueue(limit, self._clock)
            self.update_gauge()
        queue.used_at = self._clock.monotonic()
        return queue

    def _in_use(self) -> list[_ModelQueue]:
        """Return the models that have jobs, or had one lately; all of them if there is none."""
        since, queues = self._clock.monotonic() - IDLE_MODEL_S, list(self._queues.values())
        used = [queue for queue in queues if queue.slots_in_use or queue.waiting or queue.used_at > since]
        return used or queues

    async def _enter(self, queue: _ModelQueue) -> None:
        if self._closed is not None:
            if not self._probes:
                raise NotAdmittedError(self._closed)
            self._probes -= 1
            self._take_slot(queue)
            return
        waiter = asyncio.get_running_loop().create_future()
        self._sequence += 1
        entry = (self._sequence, waiter)
        queue.waiting.append(entry)
        self._admit()
        try:
            await waiter
        except asyncio.CancelledError:
            if entry in queue.waiting:
                queue.waiting.remove(entry)
            elif not waiter.cancelled() and waiter.exception() is None:
                self._leave(queue)
            raise

    def _take_slot(self, queue: _ModelQueue) -> None:
        queue.slots_in_use += 1
        self._slots_in_use += 1

    def _leave(self, queue: _ModelQueue) -> None:
        queue.slots_in_use -= 1
        self._slots_in_use -= 1
        queue.used_at = self._clock.monotonic()
        self._admit()

    def _admit(self) -> None:
        while self._slots_in_use < self._maximum:
            ready = [queue for queue in self._queues.values() if queue.may_admit()]
            if not ready:
                self._schedule_admission()
                return
            queue = min(ready, key=lambda queue: queue.waiting[0][0])
            _, waiter = queue.waiting.popleft()
            if not waiter.done():
                self._take_slot(queue)
                waiter.set_result(None)

    def _schedule_admission(self) -> None:
        """Admit waiting jobs at the end of their model's backoff."""
        for queue in self._queues.values():
            # With a free slot a job waits only for the end of the backoff, which may be now.
            if queue.waiting and queue.timer is None and queue.has_free_slot:
                queue.timer = asyncio.create_task(self._admit_after_backoff(queue), name="rate-limit-backoff")

    async def _admit_after_backoff(self, queue: _ModelQueue) -> None:
        await self._clock.sleep(queue.backoff_left_s + TIMER_SLACK_S)
        queue.timer = None
        self._admit()
