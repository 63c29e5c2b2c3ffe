"""How many jobs may call the API at once: a limit that moves with what the API answers.

Additive increase, multiplicative decrease (Chiu and Jain, 1989): each success at a full house adds a
little, a 429 takes a share away. Until the first 429 each success adds a whole one, which doubles the limit
with each round of calls (slow start, RFC 5681 §3.1): nothing is known of the provider's limit yet, and calls
that take a quarter of a minute would keep a worker small for an hour. The decisions are pure; `Gate` makes
jobs wait for them.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from worker import metrics

STARTING_LIMIT = 32
DECREASE = 0.7
# Where the API gives no Retry-After, the pause after a 429 grows from the first to the last.
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0


class AdaptiveLimit:
    """The limit itself; times are seconds of a monotonic clock, passed in."""

    def __init__(self, maximum: int) -> None:
        self._maximum = maximum
        self._limit = float(min(STARTING_LIMIT, maximum))
        self._decreased_at = float("-inf")
        self._pause_s = FIRST_PAUSE_S
        self._was_refused = False
        self.closed_until = float("-inf")

    @property
    def value(self) -> int:
        """How many calls may run at once; at least 1."""
        return int(self._limit)

    def succeeded(self, in_flight: int) -> None:
        """A call was answered while `in_flight` calls ran; a limit that isn't reached says nothing."""
        self._pause_s = FIRST_PAUSE_S
        if in_flight >= self.value:
            step = 1 / self._limit if self._was_refused else 1.0
            self._limit = min(self._limit + step, float(self._maximum))

    def refused(self, started: float, now: float, retry_after_s: float | None) -> None:
        """A call begun at `started` met a 429. Calls begun before the last decrease say nothing new."""
        is_news = started >= self._decreased_at
        # An API that asks for no pause at all would be called without end.
        own_pause_s = self._pause_s if is_news else 0.0
        self.closed_until = max(self.closed_until, now + (retry_after_s or own_pause_s))
        if not is_news:
            return
        self._was_refused = True
        self._decreased_at = now
        self._limit = max(1.0, self._limit * DECREASE)
        self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)


class GateClosedError(Exception):
    """No job may start now: the worker is paused or stopping. The message says why."""


class Gate:
    """Lets jobs pass, in the order in which they came, as far as the limit allows.

    While closed it turns everybody away, those who wait included, but for single trials.
    """

    def __init__(self, limit: AdaptiveLimit) -> None:
        self._limit = limit
        self._in_flight = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._closed: str | None = None
        self._trials = 0
        self._timer: asyncio.TimerHandle | None = None
        self._publish_limit()

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Wait for a place and hold it.

        Raises:
            GateClosedError: the gate is closed, or was closed while waiting.
        """
        await self._enter()
        try:
            yield
        finally:
            self._in_flight -= 1
            self._admit()

    def succeeded(self) -> None:
        """A call was answered."""
        self._limit.succeeded(self._in_flight)
        self._publish_limit()
        self._admit()

    def refused(self, started: float, retry_after_s: float | None) -> None:
        """A call begun at `started` (`time.monotonic`) met a 429."""
        self._limit.refused(started, time.monotonic(), retry_after_s)
        self._publish_limit()

    def close(self, reason: str) -> None:
        """Turn everybody away until `open`."""
        self._closed = reason
        self._trials = 0
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_exception(GateClosedError(reason))

    def open(self) -> None:
        """Let jobs pass again."""
        self._closed = None
        self._trials = 0
        self._admit()

    def allow_trial(self) -> None:
        """Let one job pass although the gate is closed."""
        self._trials = 1

    async def _enter(self) -> None:
        if self._closed is not None:
            if not self._trials:
                raise GateClosedError(self._closed)
            self._trials -= 1
            self._in_flight += 1
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        self._admit()
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._in_flight -= 1
                self._admit()
            raise

    def _admit(self) -> None:
        loop = asyncio.get_running_loop()
        if (wait_s := self._limit.closed_until - time.monotonic()) > 0:
            if self._waiting and self._timer is None:
                self._timer = loop.call_later(wait_s, self._admit_later)
            return
        while self._waiting and self._in_flight < self._limit.value:
            waiter = self._waiting.popleft()
            if not waiter.done():
                self._in_flight += 1
                waiter.set_result(None)

    def _admit_later(self) -> None:
        self._timer = None
        self._admit()

    def _publish_limit(self) -> None:
        metrics.CONCURRENCY_LIMIT.set(self._limit.value)
