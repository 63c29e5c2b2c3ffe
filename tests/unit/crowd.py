"""Workers with the real limit before a provider that takes so many calls at once, in virtual time.

A simulation of discrete events: what happens when depends on the seed alone, and minutes take milliseconds.
"""

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from worker.resilience.concurrency_limiter import AdaptiveLimit

# There and back again, and from one call's end to the next one's start; seconds.
NETWORK_S = 0.01
TURNAROUND_S = 0.003


@dataclass
class Provider:
    """Takes `capacity` calls at once, or so many a minute, and refuses what is beyond."""

    capacity: int
    latency_s: float
    retry_after_s: float | None = None
    per_minute: int | None = None
    busy: int = 0
    taken: list[float] = field(default_factory=list)

    def takes(self, now: float) -> bool:
        """Whether it takes one more call."""
        if self.busy >= self.capacity or self._is_over_the_rate(now):
            return False
        self.busy += 1
        self.taken.append(now)
        return True

    def _is_over_the_rate(self, now: float) -> bool:
        if self.per_minute is None:
            return False
        return sum(moment > now - 60 for moment in self.taken[-self.per_minute :]) >= self.per_minute


@dataclass
class Worker:
    """One worker: its limit, and what has happened to it."""

    limit: AdaptiveLimit
    in_flight: int = 0
    leaves: bool = False
    wakes_at: float = -1.0
    answered: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)


class Crowd:
    """Workers at one queue; whoever has room takes the next job, and a refused job goes back to it."""

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
        """One more worker, from now on."""
        worker = Worker(AdaptiveLimit(self._maximum, random.Random(self._chance.random())))  # noqa: S311
        self.workers.append(worker)
        self._admit(worker)
        return worker

    def publish(self, count: int) -> None:
        """So many jobs more; they go round among those who have room."""
        self._jobs += count
        for _ in self.workers:
            if not self._jobs:
                break
            self._turn += 1
            self._admit(self.workers[self._turn % len(self.workers)])

    def dismiss(self, worker: Worker) -> None:
        """Let a worker end what it has begun, and take no more."""
        worker.leaves = True

    def run(self, seconds: float = float("inf")) -> None:
        """Let time pass, until there is nothing more to do at the latest."""
        ends = self.now + seconds
        while self._events and self._events[0][0] <= ends:
            self.now, _, happen = heapq.heappop(self._events)
            happen()
        self.now = max(self.now, ends) if ends < float("inf") else self.now

    def answers(self, since: float = 0.0) -> int:
        """How many calls were answered."""
        return sum(moment >= since for worker in self.workers for moment in worker.answered)

    def refusals(self, since: float = 0.0) -> int:
        """How many calls were refused."""
        return sum(moment >= since for worker in self.workers for moment in worker.refused)

    def _in(self, seconds: float, happen: Callable[[], None]) -> None:
        spread = self._chance.uniform(0.8, 1.2)
        heapq.heappush(self._events, (self.now + seconds * spread, next(self._numbers), happen))

    def _admit(self, worker: Worker) -> None:
        if worker.leaves:
            return
        closed_until = worker.limit.closed_until
        if self.now < closed_until:
            if worker.wakes_at != closed_until:
                worker.wakes_at = closed_until
                wake = (closed_until, next(self._numbers), lambda: self._admit(worker))
                heapq.heappush(self._events, wake)
            return
        while self._jobs and worker.in_flight < worker.limit.value:
            self._jobs -= 1
            worker.in_flight += 1
            self._call(worker, self.now)

    def _call(self, worker: Worker, started: float) -> None:
        def arrive() -> None:
            if self.provider.takes(self.now):
                self._in(self.provider.latency_s, answer)
            else:
                self._in(NETWORK_S / 2, refuse)

        def answer() -> None:
            self.provider.busy -= 1
            self._in(NETWORK_S / 2, succeed)

        def succeed() -> None:
            worker.limit.succeeded(worker.in_flight, self.now - started)
            worker.in_flight -= 1
            worker.answered.append(self.now)
            self._admit(worker)

        def refuse() -> None:
            worker.in_flight -= 1
            self._jobs += 1
            worker.refused.append(self.now)
            worker.limit.refused(worker.in_flight, started, self.now, self.provider.retry_after_s)
            self._admit(worker)

        self._in(TURNAROUND_S + NETWORK_S / 2, arrive)
