"""Keeps the flow of jobs in step with what the API lets the worker do: no process sits on jobs that wait."""

import asyncio
from collections import deque
from typing import Protocol

import structlog

from worker.jobs.in_flight_jobs import InFlightJobs
from worker.resilience.concurrency_limiter import ConcurrencyLimiter

log = structlog.get_logger(__name__)

TICK_S = 0.5
TICKS_REMEMBERED = 5
# The limit goes up and down all the time, by a third; the flow follows what goes beyond that.
LOWER = 0.5
RAISE = 1.2


class Tap(Protocol):
    """Where jobs come from."""

    async def allow(self, prefetch: int) -> None:
        """Let so many be here unsettled, beside those of what was allowed before; 0: none come."""


def next_allowance(allowed: int, wanted: int, unsettled: int, maximum: int) -> int:
    """How many jobs may come: as now, none for a while, or another number.

    Fewer than before only after most of what is here has gone: what is here is not counted again. Never are
    there more than `maximum` in all.
    """
    if wanted < allowed * LOWER:
        return 0
    if allowed == 0 and unsettled > wanted:
        return 0
    if wanted < allowed * RAISE and not allowed < wanted == maximum:
        return allowed
    left_over = max(0, unsettled - allowed)
    return max(allowed, min(wanted, maximum - left_over))


class FlowKeeper:
    """Watches what the gate wants, and lets as many jobs come."""

    def __init__(self, gate: ConcurrencyLimiter, tap: Tap, in_flight: InFlightJobs, maximum: int) -> None:
        self._gate = gate
        self._tap = tap
        self._in_flight = in_flight
        self._maximum = maximum
        self._allowed = maximum
        # Lately, jobs that were read or published: they take a place, and no part in what the API does. The
        # fewest count, since many that are given back at once are soon gone.
        self._elsewhere: deque[int] = deque([0], maxlen=TICKS_REMEMBERED)

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            self._gate.publish_limit()
            await self._adjust()

    async def _adjust(self) -> None:
        unsettled, wanted = self._in_flight.unsettled, self._gate.wanted()
        self._elsewhere.append(max(0, unsettled - self._gate.present()))
        if wanted:
            wanted = min(wanted + min(self._elsewhere), self._maximum)
        allowed = next_allowance(self._allowed, wanted, unsettled, self._maximum)
        if allowed != self._allowed:
            log.debug("prefetch_changed", allowed=allowed, before=self._allowed, wanted=wanted)
            self._allowed = allowed
            await self._tap.allow(allowed)
