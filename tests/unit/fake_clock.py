"""A clock that only a test advances."""

import asyncio
import heapq
import itertools
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from tests.unit.fakes import turns_of_the_loop
from worker.clock import Clock

STARTED_AT = datetime(2030, 1, 1, tzinfo=UTC)


class FakeClock(Clock):
    """Time passes only in `advance`, which wakes each sleeper at its own moment."""

    def __init__(self, monotonic: float = 1000.0) -> None:
        self._started = self._monotonic = monotonic
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def monotonic(self) -> float:
        return self._monotonic

    def now(self) -> datetime:
        return STARTED_AT + timedelta(seconds=self._monotonic - self._started)

    async def sleep(self, seconds: float) -> None:
        woken = asyncio.Event()
        self._at(seconds, woken.set)
        await woken.wait()

    def timeout(self, seconds: float) -> asyncio.Timeout:
        timeout = asyncio.timeout(seconds if seconds <= 0 else None)

        def expire() -> None:
            # The block may have ended or not have been entered.
            with suppress(RuntimeError):
                timeout.reschedule(0.0)

        self._at(seconds, expire)
        return timeout

    async def advance(self, seconds: float) -> None:
        """Advance the time; run each sleeper that becomes due."""
        await turns_of_the_loop()
        ends = self._monotonic + seconds
        while self._timers and self._timers[0][0] <= ends:
            due, _, wake = heapq.heappop(self._timers)
            self._monotonic = max(self._monotonic, due)
            wake()
            await turns_of_the_loop()
        self._monotonic = ends

    def jump(self, seconds: float) -> None:
        """Advance the time without running anything: sleepers wake at the next `advance`."""
        self._monotonic += seconds

    def expire(self, seconds: float) -> None:
        """Advance the time and expire the timers that become due, but run no task yet."""
        self._monotonic += seconds
        while self._timers and self._timers[0][0] <= self._monotonic:
            heapq.heappop(self._timers)[2]()

    def _at(self, seconds: float, wake: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (self._monotonic + seconds, next(self._numbers), wake))
