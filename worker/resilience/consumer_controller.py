"""Set the consumer's prefetch: the jobs that can start soon; in an outage 0, with single probes."""

import asyncio
from collections import deque
from contextlib import suppress
from typing import Protocol

import structlog

from worker.clock import Clock
from worker.errors import REASONS_OF_BAD_JOBS, Dependency
from worker.jobs.delivery import Delivery
from worker.jobs.outcome import DeadLettered, Outcome, Requeued, Retried
from worker.resilience.concurrency_limiter import LASTING_LIMIT_S, ConcurrencyLimiter
from worker.resilience.outage_detector import Outage, OutageDetector

log = structlog.get_logger(__name__)

ADJUST_INTERVAL_S = 0.5
# The target prefetch fluctuates by up to a third; follow larger changes only.
LOWER_BELOW = 0.5
RAISE_FROM = 1.2
# How many of the last adjustments show how many jobs are being decoded or published.
REMEMBERED_ADJUSTMENTS = 5

FIRST_PROBE_DELAY_S = 1.0
MAX_PROBE_INTERVAL_S = 30.0
NEXT_PROBE_DELAY_S = 0.05


class Consumer(Protocol):
    """The source of jobs."""

    async def set_prefetch(self, prefetch: int) -> None:
        """Let at most `prefetch` jobs be unsettled, not counting those delivered before; 0: deliver none."""

    async def get_one(self) -> Delivery | None:
        """Get a single job while the prefetch is 0; None if there is none."""


class Jobs(Protocol):
    """The jobs in this process."""

    @property
    def unsettled(self) -> int:
        """How many deliveries are not yet acked."""

    def accept(self, delivery: Delivery) -> "asyncio.Task[Outcome | None]":
        """Start a job; the task ends when its delivery is settled."""


class ConsumerController:
    """Apply the target prefetch to the consumer. Nothing else may control the consumer.

    The prefetch follows the limiter's target, so that no job waits here that another worker could start. In
    an outage it is 0 and the limiter is closed; probes, single jobs at growing intervals, show when it ends.

    Args:
        maximum: the most unsettled jobs, which is the consumer's prefetch at first.
    """

    def __init__(
        self,
        detector: OutageDetector,
        limiter: ConcurrencyLimiter,
        *,
        consumer: Consumer,
        jobs: Jobs,
        maximum: int,
        clock: Clock,
    ) -> None:
        self._detector = detector
        self._limiter = limiter
        self._consumer = consumer
        self._jobs = jobs
        self._maximum = maximum
        self._clock = clock
        self._prefetch = maximum
        # Jobs that neither hold nor await a slot: they are being decoded or published. The fewest of the last
        # adjustments count, because many jobs that are requeued at once are soon settled.
        self._without_slot: deque[int] = deque([0], maxlen=REMEMBERED_ADJUSTMENTS)
        self._probe_interval_s = FIRST_PROBE_DELAY_S
        # As logged.
        self._paused_models: dict[str, Outage] = {}
        self._limited_models: set[str] = set()

    async def run(self) -> None:
        """Control the consumer until cancelled."""
        while True:
            with suppress(TimeoutError):
                async with self._clock.timeout(ADJUST_INTERVAL_S):
                    await self._detector.changed.wait()
            self._detector.changed.clear()
            self._log_models()
            if self._detector.outages:
                await self._pause()
            self._limiter.update_gauge()
            await self._adjust()

    async def _adjust(self) -> None:
        unsettled, wanted = self._jobs.unsettled, self._limiter.target_prefetch()
        self._without_slot.append(max(0, unsettled - self._limiter.slots_and_waiting()))
        if wanted:
            wanted = min(wanted + min(self._without_slot), self._maximum)
        await self._apply(next_prefetch(self._prefetch, wanted, unsettled, self._maximum))

    async def _apply(self, prefetch: int) -> None:
        if prefetch != self._prefetch:
            log.debug("prefetch_changed", allowed=prefetch, before=self._prefetch)
            self._prefetch = prefetch
            await self._consumer.set_prefetch(prefetch)

    async def _pause(self) -> None:
        """Stop consuming until no outage is left."""
        started = self._clock.monotonic()
        self._limiter.close("the worker is paused")
        logged = self._log_outages(set())
        # After a relapse, keep the previous probe interval and double it.
        is_relapse = any(outage.is_relapse for outage in self._detector.outages.values())
        self._probe_interval_s = _longer(self._probe_interval_s) if is_relapse else FIRST_PROBE_DELAY_S
        await self._apply(0)
        await self._probe_until_recovered(logged)
        self._limiter.open()
        log.info("consumption_resumed", after_s=self._clock.monotonic() - started)

    def _log_outages(self, logged: set[Dependency]) -> set[Dependency]:
        """Log the outages that are not yet logged; return all of them."""
        outages = self._detector.outages
        for dependency in outages.keys() - logged:
            log.error("consumption_paused", dependency=dependency.label, reason=outages[dependency].reason)
        return set(outages)

    def _log_models(self) -> None:
        """Log which models were paused or resumed, or are limited without an end."""
        paused = self._detector.paused_models
        for model in paused.keys() - self._paused_models.keys():
            log.error("model_paused", model=model, reason=paused[model].reason)
        for model in self._paused_models.keys() - paused.keys():
            after_s = self._clock.monotonic() - self._paused_models[model].since
            log.info("model_resumed", model=model, after_s=after_s)
        self._paused_models = dict(paused)
        limits = self._limiter.lasting_limits()
        for model in limits.keys() - self._limited_models:
            log.warning("rate_limit_lasts", model=model, after_s=LASTING_LIMIT_S, reason=limits[model])
        self._limited_models = set(limits)

    async def _probe_until_recovered(self, logged: set[Dependency]) -> None:
        """Probe with one job after another at growing intervals, until no outage is left."""
        wait_s = self._probe_interval_s
        while self._detector.outages:
            await self._clock.sleep(wait_s)
            delivery = await self._consumer.get_one()
            if delivery is None:
                # No job available: poll every second.
                wait_s = FIRST_PROBE_DELAY_S
            elif await self._is_settled_by_probe(delivery):
                # The outage is over, or this job does not use the dependency and the next one may.
                wait_s = NEXT_PROBE_DELAY_S
            else:
                # The job was requeued at the end of the queue: the next probe takes another one.
                self._probe_interval_s = wait_s = _longer(self._probe_interval_s)
            logged = self._log_outages(logged)

    async def _is_settled_by_probe(self, delivery: Delivery) -> bool:
        """Process one job; return False if it was requeued or left to the broker, or may show the outage."""
        self._limiter.allow_probe()
        probe = self._jobs.accept(delivery)
        await asyncio.wait({probe})
        outcome = None if probe.cancelled() else probe.result()
        if isinstance(outcome, Retried):
            # Its attempt counts, but the outage lasts.
            return outcome.reason not in REASONS_OF_BAD_JOBS
        return outcome is not None and not isinstance(outcome, Requeued | DeadLettered)


def next_prefetch(prefetch: int, wanted: int, unsettled: int, maximum: int) -> int:
    """Return the next prefetch. Small changes are ignored.

    To lower it, return 0 until at most `wanted` jobs are unsettled, then `wanted`; RabbitMQ applies a new
    prefetch to new deliveries only. There are never more than `maximum` unsettled jobs.
    """
    if wanted < prefetch * LOWER_BELOW or (prefetch == 0 and unsettled > wanted):
        return 0
    reaches_maximum = prefetch < wanted and wanted == maximum
    if wanted < prefetch * RAISE_FROM and not reaches_maximum:
        return prefetch
    delivered_before = max(0, unsettled - prefetch)
    return max(prefetch, min(wanted, maximum - delivered_before))


def _longer(interval_s: float) -> float:
    return min(interval_s * 2, MAX_PROBE_INTERVAL_S)
