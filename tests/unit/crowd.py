"""Workers with the real limit against an API with limited capacity, in virtual time.

A discrete event simulation: its results depend on the seed only, and minutes take milliseconds.
"""

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from worker.resilience.adaptive_limit import AdaptiveLimit

# The network's round trip, and the time from the end of a call to the start of the next; seconds.
NETWORK_S = 0.01
TURNAROUND_S = 0.003


@dataclass
class Provider:
    """Accepts `capacity` concurrent calls, or `per_minute` calls a minute, and answers 429 to the others."""

    capacity: int
    latency_s: float
    retry_after_s: float | None = None
    per_minute: int | None = None
    busy: int = 0
    accepted: list[float] = field(default_factory=list)

    def accepts(self, now: float) -> bool:
        """Accept a call; return False if it meets a 429."""
        if self.busy >= self.capacity or self._is_over_the_rate(now):
            return False
        self.busy += 1
        self.accepted.append(now)
        return True

    def _is_over_the_rate(self, now: float) -> bool:
        if self.per_minute is None:
            return False
        return sum(moment > now - 60 for moment in self.accepted[-self.per_minute :]) >= self.per_minute


@dataclass
class Worker:
    """One worker: its limit and its calls."""

    limit: AdaptiveLimit
    in_flight: int = 0
    leaves: bool = False
    wakes_at: float = -1.0
    succeeded: list[float] = field(default_factory=list)
    rate_limited: list[float] = field(default_factory=list)


class Crowd:
    """Workers that consume one queue; a job that meets a 429 returns to the queue."""

    def __init__(
        self,
        provider: Provider,
        *,
        workers: int = 1,
        jobs: int = 10**9,
        seed: int = 0,
        maximum: int = 200,
    ) -> None:
        self.provider = provider
        self.now = 0.0
        self.workers: list[Worker] = []
        self._jobs = jobs
        self._maximum = maximum
        self._turn = 0
        self._chance = random.Random(seed)  # noqa: S311 - no secret
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        for _ in range(workers):
            self.add()

    def add(self) -> Worker:
        """Start one more worker."""
        worker = Worker(AdaptiveLimit(self._maximum, 32, random.Random(self._chance.random())))  # noqa: S311
        self.workers.append(worker)
        self._admit(worker)
        return worker

    def publish(self, count: int) -> None:
        """Publish `count` jobs; free workers take them in turn."""
        self._jobs += count
        for _ in self.workers:
            if not self._jobs:
                break
            self._turn += 1
            self._admit(self.workers[self._turn % len(self.workers)])

    def dismiss(self, worker: Worker) -> None:
        """Let a worker finish its calls and take no more jobs."""
        worker.leaves = True

    def run(self, seconds: float = float("inf")) -> None:
        """Advance the time by a number of seconds, or until all jobs are finished."""
        ends = self.now + seconds
        while self._events and self._events[0][0] <= ends:
            self.now, _, happen = heapq.heappop(self._events)
            happen()
        self.now = max(self.now, ends) if ends < float("inf") else self.now

    def succeeded(self, since: float = 0.0) -> int:
        """Return how many calls were answered."""
        return sum(moment >= since for worker in self.workers for moment in worker.succeeded)

    def rate_limited(self, since: float = 0.0) -> int:
        """Return how many calls met a 429."""
        return sum(moment >= since for worker in self.workers for moment in worker.rate_limited)

    def _in(self, seconds: float, happen: Callable[[], None]) -> None:
        spread = self._chance.uniform(0.8, 1.2)
        heapq.heappush(self._events, (self.now + seconds * spread, next(self._numbers), happen))

    def _admit(self, worker: Worker) -> None:
        if worker.leaves:
            return
        backoff_until = worker.limit.backoff_until
        if self.now < backoff_until:
            if worker.wakes_at != backoff_until:
                worker.wakes_at = backoff_until
                wake = (backoff_until, next(self._numbers), lambda: self._admit(worker))
                heapq.heappush(self._events, wake)
            return
        while self._jobs and worker.in_flight < worker.limit.value:
            self._jobs -= 1
            worker.in_flight += 1
            self._call(worker, self.now)

    def _call(self, worker: Worker, started: float) -> None:
        def arrive() -> None:
            if self.provider.accepts(self.now):
                self._in(self.provider.latency_s, answer)
            else:
                self._in(NETWORK_S / 2, refuse)

        def answer() -> None:
            self.provider.busy -= 1
            self._in(NETWORK_S / 2, succeed)

        def succeed() -> None:
            worker.limit.succeeded(worker.in_flight, self.now - started)
            worker.in_flight -= 1
            worker.succeeded.append(self.now)
            self._admit(worker)

        def refuse() -> None:
            worker.in_flight -= 1
            self._jobs += 1
            worker.rate_limited.append(self.now)
            worker.limit.rate_limited(worker.in_flight, started, self.now, self.provider.retry_after_s)
            self._admit(worker)

        self._in(TURNAROUND_S + NETWORK_S / 2, arrive)
