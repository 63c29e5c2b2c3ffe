"""Report request results to the outage detector, and wait for pending diagnoses."""

import asyncio
from collections import defaultdict
from collections.abc import Iterable

from worker.clock import Clock
from worker.errors import Dependency, DependencyDownError, RateLimitedError, TransientError
from worker.resilience.concurrency_limiter import ConcurrencyLimiter
from worker.resilience.outage_detector import Diagnosis, OutageDetector, RequestResult, Success

# How long a failed job waits for the results of other requests. Its retry is delayed anyway.
MAX_WAIT_S = 2.0
# Maximum wait if no other request runs; requests of the same batch may be about to start.
MAX_WAIT_ALONE_S = 0.25


class OutageReports:
    """Report request results to the detector; resolve jobs that wait for a diagnosis."""

    def __init__(self, detector: OutageDetector, limiter: ConcurrencyLimiter, clock: Clock) -> None:
        self._detector = detector
        self._limiter = limiter
        self._clock = clock
        # The jobs that wait, with the times of their failures.
        self._waiting: defaultdict[tuple[Dependency, str], dict[asyncio.Future[Diagnosis], float]]
        self._waiting = defaultdict(dict)
        self._is_stopped = False

    def report_success(self, dependency: Dependency, job: str, started: float, model: str = "") -> None:
        """Report that a request begun at `started` showed that the dependency, and the model, works."""
        self._observe(dependency, job, Success(started, model))

    def report_overload(self, job: str, error: RateLimitedError) -> Diagnosis:
        """Report that the model API says that it is overloaded; return the diagnosis."""
        return self._observe(Dependency.MODEL, job, error)

    def report_unavailable(self, job: str, error: DependencyDownError) -> Diagnosis:
        """Report that a dependency is unreachable or rejects every request; return the diagnosis."""
        return self._observe(error.dependency, job, error)

    async def diagnose(self, job: str, error: TransientError, max_wait_s: float) -> Diagnosis:
        """Report a failed request and return the diagnosis; wait for it for at most `max_wait_s`."""
        failed_at = self._clock.monotonic()
        diagnosis = self._observe(error.dependency, job, error)
        if diagnosis is Diagnosis.PENDING:
            return await self._wait(error.dependency, error.model, failed_at, max_wait_s)
        return diagnosis

    def may_request(self, model: str) -> bool:
        """Return whether a job may use a model: it is not paused, or this job is its next probe."""
        return self._detector.may_request(model, self._clock.monotonic())

    def stop(self) -> None:
        """End all waits, now and in future."""
        self._is_stopped = True
        for waiting in self._waiting.values():
            _resolve(waiting, Diagnosis.PENDING)

    def _observe(self, dependency: Dependency, job: str, result: RequestResult) -> Diagnosis:
        diagnosis = self._detector.observe(dependency, job, result, self._clock.monotonic())
        for (waits_for, model), waiting in self._waiting.items():
            for waiter, failed_at in waiting.items() if waits_for is dependency else ():
                known = self._detector.diagnosis(dependency, failed_at, model)
                if known is not Diagnosis.PENDING:
                    _resolve([waiter], known)
        return diagnosis

    async def _wait(
        self, dependency: Dependency, model: str, failed_at: float, max_wait_s: float
    ) -> Diagnosis:
        """Return what requests begun after a failure show about it; pending if they show nothing in time."""
        waiting = self._waiting[dependency, model]
        # Jobs that fail together are retried together: each of them waits for the others.
        is_alone = not waiting and not self._limiter.slots_in_use
        max_wait_s = min(max_wait_s, MAX_WAIT_ALONE_S if is_alone else MAX_WAIT_S)
        if max_wait_s <= 0 or self._is_stopped:
            return Diagnosis.PENDING
        waiter: asyncio.Future[Diagnosis] = asyncio.get_running_loop().create_future()
        waiting[waiter] = failed_at
        try:
            async with self._clock.timeout(max_wait_s):
                return await waiter
        except TimeoutError:
            # An outage may have begun after the timer expired and before this task ran.
            return self._detector.diagnosis(dependency, failed_at, model)
        finally:
            del waiting[waiter]


def _resolve(waiters: Iterable[asyncio.Future[Diagnosis]], diagnosis: Diagnosis) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(diagnosis)
