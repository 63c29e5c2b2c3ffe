"""Admit jobs in order of arrival, within each model's concurrency limit and a maximum for the process."""

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from worker.clock import Clock
from worker.observability import metrics
from worker.resilience.adaptive_limit import AdaptiveLimit

# Added to the wait for the end of a pause: event loops fire timers some milliseconds early.
TIMER_SLACK_S = 0.001

# The worker prefetches the jobs that can start within this time …
PREFETCH_HORIZON_S = 5.0
# … but at least this fraction of the limit, to replace finished calls, and at most as many jobs as calls.
MIN_RESERVE = 0.25
# While one of several models is paused, this many jobs are prefetched to find those for the other models.
JOBS_WHILE_ONE_MODEL_PAUSES = 8
# A model without jobs for this long does not count in the prefetch and in the published limit.
IDLE_MODEL_S = 60.0


class AdmissionClosedError(Exception):
    """No job may start now: the worker is paused or stopping. The message says why."""


class _Model:
    """One model: its limit, its calls in flight and the jobs that wait for a slot."""

    def __init__(self, limit: AdaptiveLimit, clock: Clock) -> None:
        self._clock = clock
        self.limit = limit
        self.in_flight = 0
        # Each with its number in the order of arrival, over all models.
        self.waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self.timer: asyncio.Task[None] | None = None
        self.used_at = clock.monotonic()

    @property
    def pause_left_s(self) -> float:
        """Return the seconds until a call may be admitted; 0 if it may be now."""
        return max(0.0, self.limit.paused_until - self._clock.monotonic())

    @property
    def has_free_slot(self) -> bool:
        return self.in_flight < self.limit.value

    def may_admit(self) -> bool:
        """Return whether a waiting job may start."""
        return bool(self.waiting) and self.has_free_slot and not self.pause_left_s

    def startable_soon(self) -> float:
        """Return how many jobs run now or can start within PREFETCH_HORIZON_S."""
        if self.pause_left_s > PREFETCH_HORIZON_S:
            return self.in_flight
        most = 1.0 if self.limit.was_rate_limited else math.inf
        in_time = math.inf if self.limit.call_s is None else PREFETCH_HORIZON_S / max(self.limit.call_s, 1e-3)
        return self.limit.value * (1 + min(max(in_time, MIN_RESERVE), most))


class Slot:
    """The right to one call, from the fetch of its images to the API's answer."""

    def __init__(self, limiter: "ConcurrencyLimiter", model: _Model, clock: Clock) -> None:
        self._limiter = limiter
        self._model = model
        self._clock = clock
        self.started = clock.monotonic()

    @property
    def must_wait(self) -> bool:
        """Return whether a Retry-After in the answer to another call forbids to begin this call now."""
        return self._model.limit.retry_after_until > self._clock.monotonic()

    def succeeded(self) -> None:
        """Record that the API answered the call."""
        self._model.limit.succeeded(self._model.in_flight, self._clock.monotonic() - self.started)
        self._limiter.limit_changed()

    def rate_limited(self, retry_after_s: float | None) -> None:
        """Record that the call met a 429."""
        others = self._model.in_flight - 1
        self._model.limit.rate_limited(others, self.started, self._clock.monotonic(), retry_after_s)
        self._limiter.limit_changed()


class ConcurrencyLimiter:
    """Admit jobs in order of arrival, as far as the limits of their models allow.

    While it is closed, it rejects all jobs, also those that wait, except single trials.

    Args:
        maximum: most jobs in flight, over all models.
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
        self._models: dict[str, _Model] = {}
        self._arrivals = 0
        self._in_flight = 0
        self._closed: str | None = None
        self._trials = 0
        self.publish_limit()
        metrics.CONCURRENCY_IN_USE.set_function(lambda: self._in_flight)

    @property
    def in_flight(self) -> int:
        """Return how many jobs hold a slot."""
        return self._in_flight

    @asynccontextmanager
    async def slot(self, model: str) -> AsyncIterator[Slot]:
        """Wait for a slot and hold it.

        Raises:
            AdmissionClosedError: the limiter is closed, or was closed during the wait.
        """
        state = self._state(model)
        await self._enter(state)
        try:
            yield Slot(self, state, self._clock)
        finally:
            self._leave(state)

    def close(self, reason: str) -> None:
        """Reject all jobs until `open`."""
        self._closed = reason
        self._trials = 0
        for model in self._models.values():
            while model.waiting:
                _, waiter = model.waiting.popleft()
                if not waiter.done():
                    waiter.set_exception(AdmissionClosedError(reason))

    def check(self, *, also_trials: bool = True) -> None:
        """Check that the limiter is open, before a wait for something else.

        Raises:
            AdmissionClosedError: it is closed; with `also_trials` false, only if no trial is allowed either.
        """
        if self._closed is not None and (also_trials or not self._trials):
            raise AdmissionClosedError(self._closed)

    def open(self) -> None:
        """Admit jobs again."""
        self._closed = None
        self._trials = 0
        self._admit()

    def allow_trial(self) -> None:
        """Admit one job although the limiter is closed."""
        self._trials = 1

    def closed_s(self, model: str) -> float:
        """Return the seconds until the API may be called for this model; 0 if it may be now."""
        return self._models[model].pause_left_s if model in self._models else 0.0

    def pauses(self) -> dict[str, float]:
        """Return the models that are paused for longer than PREFETCH_HORIZON_S, with the seconds left."""
        waits = {name: model.pause_left_s for name, model in self._models.items()}
        return {name: seconds for name, seconds in waits.items() if seconds > PREFETCH_HORIZON_S}

    def present(self) -> int:
        """Return how many jobs hold a slot or wait for one."""
        return self._in_flight + sum(len(model.waiting) for model in self._models.values())

    def wanted(self) -> int:
        """Return how many jobs the worker should have, running and waiting: those that can start soon.

        The maximum until the first job; 0 while all models are paused.
        """
        if not self._models:
            return self._maximum
        wanted = sum(model.startable_soon() for model in self._in_use())
        if len(self.pauses()) < self._model_count:
            wanted = max(wanted, JOBS_WHILE_ONE_MODEL_PAUSES if self.pauses() else 1)
        return math.ceil(min(wanted, self._maximum))

    def limit_changed(self) -> None:
        """Publish the new limit and admit the jobs that it allows."""
        self.publish_limit()
        self._admit()

    def publish_limit(self) -> None:
        """Set the metric: the sum of the limits of all models in use, the maximum at most."""
        limits = [model.limit.value for model in self._in_use()] or [self._initial]
        metrics.CONCURRENCY_LIMIT.set(min(self._maximum, sum(limits)))

    def _state(self, name: str) -> _Model:
        model = self._models.get(name)
        if model is None:
            limit = AdaptiveLimit(self._maximum, self._initial)
            model = self._models[name] = _Model(limit, self._clock)
            self.publish_limit()
        model.used_at = self._clock.monotonic()
        return model

    def _in_use(self) -> list[_Model]:
        """Return the models that have jobs, or had one lately; all of them if there is none."""
        since, models = self._clock.monotonic() - IDLE_MODEL_S, list(self._models.values())
        used = [model for model in models if model.in_flight or model.waiting or model.used_at > since]
        return used or models

    async def _enter(self, model: _Model) -> None:
        if self._closed is not None:
            if not self._trials:
                raise AdmissionClosedError(self._closed)
            self._trials -= 1
            self._take_slot(model)
            return
        waiter = asyncio.get_running_loop().create_future()
        self._arrivals += 1
        place = (self._arrivals, waiter)
        model.waiting.append(place)
        self._admit()
        try:
            await waiter
        except asyncio.CancelledError:
            if place in model.waiting:
                model.waiting.remove(place)
            elif not waiter.cancelled() and waiter.exception() is None:
                self._leave(model)
            raise

    def _take_slot(self, model: _Model) -> None:
        model.in_flight += 1
        self._in_flight += 1

    def _leave(self, model: _Model) -> None:
        model.in_flight -= 1
        self._in_flight -= 1
        model.used_at = self._clock.monotonic()
        self._admit()

    def _admit(self) -> None:
        while self._in_flight < self._maximum:
            models = [model for model in self._models.values() if model.may_admit()]
            if not models:
                self._schedule_admission()
                return
            model = min(models, key=lambda model: model.waiting[0][0])
            _, waiter = model.waiting.popleft()
            if not waiter.done():
                self._take_slot(model)
                waiter.set_result(None)

    def _schedule_admission(self) -> None:
        """Admit waiting jobs at the end of their model's pause."""
        for model in self._models.values():
            # With a free slot a job waits for the end of the pause only, which may be this very moment.
            if model.waiting and model.timer is None and model.has_free_slot:
                model.timer = asyncio.create_task(self._admit_after_pause(model), name="rate-limit-pause")

    async def _admit_after_pause(self, model: _Model) -> None:
        await self._clock.sleep(model.pause_left_s + TIMER_SLACK_S)
        model.timer = None
        self._admit()
