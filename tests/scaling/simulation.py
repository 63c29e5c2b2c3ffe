"""A cluster in virtual time: the control loop, pods with the worker's concurrency limiter, a provider.

Not simulated: scheduling and image pulls (included in `start_s`), a cluster without
capacity for a pod, an overloaded broker or S3 server, failing requests.
"""

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tests.scaling.autoscaler import Autoscaler, Ticker
from tests.scaling.record import Sample
from tests.scaling.scaled_object import ScalerConfig
from tests.unit.crowd import NETWORK_S, TURNAROUND_S, Crowd, Provider, Worker

NO_LIMIT: Final = 10**9
_MAX_DURATION_FACTOR: Final = 50


@dataclass(frozen=True)
class ClusterModel:
    """The parameters of the cluster; times in seconds.

    Attributes:
        concurrency: maximum of concurrent model requests per pod.
        call_s: duration of a job from delivery to result.
        start_s: durations from a pod's creation to its readiness, used in turn.
        report_s: interval at which a queue reports its length (`quorum_tick_interval`).
        sampling_s: interval of the management API's statistics (`sample_retention_policies`).
        provider: the provider's limit of concurrent requests.
        statistics_age: pairs of times, when a statistic is read and when it was correct.
    """

    scaler: ScalerConfig
    concurrency: int
    call_s: float
    start_s: Sequence[float]
    report_s: float = 5.0
    sampling_s: float = 5.0
    provider: int = NO_LIMIT
    statistics_age: Sequence[tuple[float, float]] = ()


def simulate(
    model: ClusterModel, arrivals: Sequence[float], *, step_s: float, sample_s: float, seed: int = 0
) -> list[Sample]:
    """Simulate from zero pods at second 0 to zero pods after the last job.

    Args:
        model: The cluster.
        arrivals: The arrival time of each job.
        step_s: The time step.
        sample_s: The sampling interval.
        seed: The seed for the duration of requests (± 20 %).

    Raises:
        RuntimeError: The run does not finish.
    """
    pods = Pods(model, seed)
    autoscaler = Autoscaler(model.scaler)
    figures = (
        RecordedStatistics(model.statistics_age)
        if model.statistics_age
        else Statistics(model.report_s, model.sampling_s)
    )
    samples, sampling = [], Ticker(sample_s, 0.0)
    longest_s = arrivals[-1] * _MAX_DURATION_FACTOR + 10 * model.scaler.cooldown_s
    for step in itertools.count():
        now = step * step_s
        published = bisect_right(arrivals, now)
        pods.publish(published - pods.published)
        messages = figures.at(now, pods.published - pods.answered)
        if autoscaler.next_at <= now:
            pods.scale(now, autoscaler.decide(now, messages, pods.replicas))
        pods.run_until(now + step_s)
        is_over = published == len(arrivals) == pods.answered and not pods.replicas and not pods.terminating
        if sampling.is_due(now) or is_over:
            samples.append(pods.sample(now, messages))
        if is_over:
            return samples
        if now > longest_s:
            raise RuntimeError(f"not finished after {now:.0f} s: {samples[-1]}")
    raise AssertionError


class Statistics:
    """The queue length as the management API reports it, some seconds old."""

    def __init__(self, report_s: float, sampling_s: float) -> None:
        # Two independent intervals.
        self._reporting, self._sampling = Ticker(report_s, report_s / 2), Ticker(sampling_s, 0.0)
        self._reported = self._shown = 0

    def at(self, now: float, messages: int) -> int:
        """Return the reported length; call this at every step."""
        if self._reporting.is_due(now):
            self._reported = messages
        if self._sampling.is_due(now):
            self._shown = self._reported
        return self._shown


class RecordedStatistics:
    """The queue length with the age recorded in a real run."""

    def __init__(self, statistics_age: Sequence[tuple[float, float]]) -> None:
        self._at, self._of = zip(*statistics_age, strict=True)
        self._times: list[float] = []
        self._messages: list[int] = []

    def at(self, now: float, messages: int) -> int:
        """Return the reported length; call this at every step."""
        self._times.append(now)
        self._messages.append(messages)
        place = max(0, bisect_right(self._at, now) - 1)
        of = self._of[place] + max(0.0, now - self._at[-1])
        return self._messages[max(0, bisect_right(self._times, of) - 1)]


class Pods:
    """The Deployment: pods that start, work and terminate."""

    def __init__(self, model: ClusterModel, seed: int) -> None:
        latency_s = model.call_s - NETWORK_S - TURNAROUND_S
        provider = Provider(model.provider, latency_s)
        self._crowd = Crowd(provider, workers=0, jobs=0, seed=seed, maximum=model.concurrency)
        self._start_s = itertools.cycle(model.start_s)
        # Times of readiness.
        self._starting: list[float] = []
        self._ready: list[Worker] = []
        self.terminating: list[Worker] = []
        self.published = 0

    @property
    def replicas(self) -> int:
        """The number of starting and ready pods."""
        return len(self._starting) + len(self._ready)

    @property
    def answered(self) -> int:
        """The number of answered jobs."""
        return sum(len(it.succeeded) for it in self._crowd.workers)

    def publish(self, count: int) -> None:
        """Publish more jobs."""
        self.published += count
        self._crowd.publish(count)

    def scale(self, now: float, replicas: int) -> None:
        """Start or stop pods; stop first those that are not ready, then the youngest."""
        while self.replicas < replicas:
            self._starting.append(now + next(self._start_s))
        while self.replicas > replicas:
            if self._starting:
                self._starting.pop()
                continue
            youngest = self._ready.pop()
            self._crowd.dismiss(youngest)
            self.terminating.append(youngest)

    def run_until(self, now: float) -> None:
        """Advance the time."""
        for ready_at in [it for it in self._starting if it <= now]:
            self._starting.remove(ready_at)
            self._ready.append(self._crowd.add())
        self._crowd.run(now - self._crowd.now)
        self.terminating = [it for it in self.terminating if it.in_flight]

    def sample(self, now: float, messages: int) -> Sample:
        """Return the current state."""
        return Sample(
            at=now,
            messages=messages,
            replicas=self.replicas,
            ready=len(self._ready),
            terminating=len(self.terminating),
            published=self.published,
            answered=self.answered,
            rate_limited=self._crowd.rate_limited(),
        )
