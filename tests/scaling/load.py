"""Arrival times of jobs, in phases with a linearly changing rate."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from tests.scaling.record import Sample

Until = Callable[[Sequence[Sample]], bool]


@dataclass(frozen=True)
class Phase:
    """A number of seconds in which the rate, in jobs per second, changes linearly.

    Attributes:
        until: keep the last rate until this condition on the samples is true.
    """

    seconds: float
    rate_from: float
    rate_to: float
    until: Until | None = None

    @property
    def jobs(self) -> float:
        """The number of jobs in this phase."""
        return self.seconds * (self.rate_from + self.rate_to) / 2

    def at(self, jobs: float) -> float:
        """Return the time in the phase at which this number of jobs has arrived."""
        if jobs > self.jobs:
            return self.seconds + (jobs - self.jobs) / self.rate_to if self.rate_to else math.inf
        growth = (self.rate_to - self.rate_from) / self.seconds if self.seconds else 0.0
        # Solve jobs = rate_from × t + growth × t² / 2 for t, in a form without a division by the growth.
        root = math.sqrt(max(0.0, self.rate_from**2 + 2 * growth * jobs))
        return 2 * jobs / (self.rate_from + root) if jobs else 0.0


def arrivals(phases: Iterable[Phase]) -> list[float]:
    """Return the arrival time of each job, ignoring `until`."""
    return list(_arrivals(phases))


def _arrivals(phases: Iterable[Phase]) -> Iterator[float]:
    started, before, numbers = 0.0, 0.0, itertools.count(1)
    number = next(numbers)
    for phase in phases:
        while number <= before + phase.jobs:
            yield started + phase.at(number - before)
            number = next(numbers)
        started, before = started + phase.seconds, before + phase.jobs
