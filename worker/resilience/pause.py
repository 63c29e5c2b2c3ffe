"""What happens while a dependency is down: stop consuming, give back, try single jobs, resume."""

import asyncio
import time
from typing import Protocol

import structlog

from worker.errors import Dependency
from worker.jobs.delivery import Delivery
from worker.jobs.in_flight_jobs import InFlightJobs
from worker.jobs.outcome import Requeued
from worker.resilience.concurrency_limiter import ConcurrencyLimiter
from worker.resilience.outage_detector import Health

log = structlog.get_logger(__name__)

FIRST_TRIAL_S = 1.0
LONGEST_TRIAL_S = 30.0
NEXT_TRIAL_S = 0.05


class Flow(Protocol):
    """Where jobs come from."""

    async def hold(self) -> None:
        """Stop it."""

    async def resume(self) -> None:
        """Start it again."""

    async def take_one(self) -> Delivery | None:
        """Take a single job while it is stopped."""


class PauseKeeper:
    """Watches the dependencies' health and holds the flow of jobs while one is down."""

    def __init__(self, health: Health, gate: ConcurrencyLimiter, flow: Flow, in_flight: InFlightJobs) -> None:
        self._health = health
        self._gate = gate
        self._flow = flow
        self._in_flight = in_flight
        self._interval_s = FIRST_TRIAL_S

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            await self._health.changed.wait()
            self._health.changed.clear()
            if self._health.outages:
                await self._pause()

    async def _pause(self) -> None:
        began = time.monotonic()
        self._gate.close("the worker is paused")
        told = self._tell_outages(set())
        # What was hardly up is not tried as often as if it were down for the first time.
        is_relapse = any(outage.is_relapse for outage in self._health.outages.values())
        self._interval_s = _longer(self._interval_s) if is_relapse else FIRST_TRIAL_S
        await self._flow.hold()
        await self._until_up(told)
        self._gate.open()
        await self._flow.resume()
        log.info("consumption_resumed", after_s=round(time.monotonic() - began, 3))

    def _tell_outages(self, told: set[Dependency]) -> set[Dependency]:
        """Log the outages that are not told yet; returns those that there are."""
        outages = self._health.outages
        for dependency in outages.keys() - told:
            log.error("consumption_paused", dependency=dependency.label, reason=outages[dependency].reason)
        return set(outages)

    async def _until_up(self, told: set[Dependency]) -> None:
        """Try with a different single job at growing intervals, until one succeeds."""
        wait_s = self._interval_s
        while self._health.outages:
            await asyncio.sleep(wait_s)
            delivery = await self._flow.take_one()
            if delivery is None:
                # The interval is over: whatever comes may be tried without another one.
                wait_s = FIRST_TRIAL_S
            elif await self._comes_to_an_end(delivery):
                # Either the outage is over, or the job never met what is down: then the next one may.
                wait_s = NEXT_TRIAL_S
            else:
                # Given back, it went to the end of the queue: the next trial takes another.
                self._interval_s = wait_s = _longer(self._interval_s)
            told = self._tell_outages(told)

    async def _comes_to_an_end(self, delivery: Delivery) -> bool:
        """Try one job; returns whether it was not given back."""
        self._gate.allow_trial()
        trial = self._in_flight.accept(delivery)
        await asyncio.wait({trial})
        return not trial.cancelled() and not isinstance(trial.result(), Requeued)


def _longer(interval_s: float) -> float:
    return min(interval_s * 2, LONGEST_TRIAL_S)
