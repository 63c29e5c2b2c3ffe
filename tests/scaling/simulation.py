"""A cluster in virtual time: the control loop's decisions, pods with the worker's real limit, a provider.

Not in it: how pods are scheduled and their images pulled (`start_s` stands for all of it), a cluster that has
no room for a pod, a broker or an S3 server at its limit, calls that fail.
"""

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tests.scaling.autoscaler import Autoscaler, Clock
from tests.scaling.record import Sample
from tests.scaling.scaled_object import Numbers
from tests.unit.crowd import NETWORK_S, TURNAROUND_S, Crowd, Provider, Worker

NO_LIMIT: Final = 10**9
_LONGEST: Final = 50


@dataclass(frozen=True)
class World:
    """What the cluster is like; times in seconds.

    Attributes:
        concurrency: calls that one pod makes at once, at most.
        call_s: what a job takes from its delivery to its result.
        start_s: from the wish for a pod until it takes jobs, for one pod after the other and then again.
        report_s: how often a queue reports its length to the broker's statistics (`quorum_tick_interval`).
        sampling_s: how often the endpoint takes it from there (`sample_retention_policies`).
        provider: calls that the API takes at once, from all pods together.
        seen: instead of the broker's clocks: at which second the figures were of which second.
    """

    numbers: Numbers
    concurrency: int
    call_s: float
    start_s: Sequence[float]
    report_s: float = 5.0
    sampling_s: float = 5.0
    provider: int = NO_LIMIT
    seen: Sequence[tuple[float, float]] = ()


def simulate(
    world: World, arrivals: Sequence[float], *, step_s: float, sample_s: float, seed: int = 0
) -> list[Sample]:
    """From no pod at second 0 to no pod after the last job.

    Args:
        world: The cluster.
        arrivals: The second in which each job comes.
        step_s: How exact it is.
        sample_s: How often it is written down.
        seed: Of chance, which makes calls last up to a fifth longer or shorter.

    Raises:
        RuntimeError: It does not complete.
    """
    pods = Pods(world, seed)
    autoscaler = Autoscaler(world.numbers)
    figures = OldFigures(world.seen) if world.seen else Figures(world.report_s, world.sampling_s)
    samples, sampling = [], Clock(sample_s, 0.0)
    longest_s = arrivals[-1] * _LONGEST + 10 * world.numbers.cooldown_s
    for step in itertools.count():
        now = step * step_s
        published = bisect_right(arrivals, now)
        pods.publish(published - pods.published)
        messages = figures.look(now, pods.published - pods.answered)
        if autoscaler.next_at <= now:
            pods.scale(now, autoscaler.decide(now, messages, pods.replicas))
        pods.run_until(now + step_s)
        is_over = published == len(arrivals) == pods.answered and not pods.replicas and not pods.ending
        if sampling.strikes(now) or is_over:
            samples.append(pods.sample(now, messages))
        if is_over:
            return samples
        if now > longest_s:
            raise RuntimeError(f"after {now:.0f} s it is not over: {samples[-1]}")
    raise AssertionError


class Figures:
    """The queue's length as the management endpoint shows it: some seconds old."""

    def __init__(self, report_s: float, sampling_s: float) -> None:
        # Two clocks of the broker that know nothing of each other.
        self._reporting, self._sampling = Clock(report_s, report_s / 2), Clock(sampling_s, 0.0)
        self._reported = self._shown = 0

    def look(self, now: float, messages: int) -> int:
        """What is shown now; to be asked at every step."""
        if self._reporting.strikes(now):
            self._reported = messages
        if self._sampling.strikes(now):
            self._shown = self._reported
        return self._shown


class OldFigures:
    """The queue's length as old as it was seen to be in a real run."""

    def __init__(self, seen: Sequence[tuple[float, float]]) -> None:
        self._at, self._of = zip(*seen, strict=True)
        self._times: list[float] = []
        self._messages: list[int] = []

    def look(self, now: float, messages: int) -> int:
        """What is shown now; to be asked at every step."""
        self._times.append(now)
        self._messages.append(messages)
        place = max(0, bisect_right(self._at, now) - 1)
        of = self._of[place] + max(0.0, now - self._at[-1])
        return self._messages[max(0, bisect_right(self._times, of) - 1)]


class Pods:
    """The Deployment: pods that start, work and end."""

    def __init__(self, world: World, seed: int) -> None:
        latency_s = world.call_s - NETWORK_S - TURNAROUND_S
        provider = Provider(world.provider, latency_s)
        self._crowd = Crowd(provider, workers=0, jobs=0, seed=seed, maximum=world.concurrency)
        self._start_s = itertools.cycle(world.start_s)
        # When each of them will take jobs.
        self._starting: list[float] = []
        self._ready: list[Worker] = []
        self.ending: list[Worker] = []
        self.published = 0

    @property
    def replicas(self) -> int:
        """Those that start or are ready."""
        return len(self._starting) + len(self._ready)

    @property
    def answered(self) -> int:
        """Jobs that are answered."""
        return sum(len(it.succeeded) for it in self._crowd.workers)

    def publish(self, count: int) -> None:
        """So many jobs more."""
        self.published += count
        self._crowd.publish(count)

    def scale(self, now: float, replicas: int) -> None:
        """Start pods, or tell some to stop: first those that are not ready, then the youngest."""
        while self.replicas < replicas:
            self._starting.append(now + next(self._start_s))
        while self.replicas > replicas:
            if self._starting:
                self._starting.pop()
                continue
            youngest = self._ready.pop()
            self._crowd.dismiss(youngest)
            self.ending.append(youngest)

    def run_until(self, now: float) -> None:
        """Let the time pass."""
        for ready_at in [it for it in self._starting if it <= now]:
            self._starting.remove(ready_at)
            self._ready.append(self._crowd.add())
        self._crowd.run(now - self._crowd.now)
        self.ending = [it for it in self.ending if it.in_flight]

    def sample(self, now: float, messages: int) -> Sample:
        """How things stand."""
        return Sample(
            at=now,
            messages=messages,
            replicas=self.replicas,
            ready=len(self._ready),
            ending=len(self.ending),
            published=self.published,
            answered=self.answered,
            refused=self._crowd.rate_limited(),
        )
