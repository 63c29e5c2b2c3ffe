"""When jobs come: phases in which the rate changes steadily."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from tests.scaling.record import Sample

Until = Callable[[Sequence[Sample]], bool]


@dataclass(frozen=True)
class Phase:
    """So many seconds in which the rate goes from one number of jobs a second to another.

    Attributes:
        until: the last rate is held until what was written down so far fulfils this.
    """

    seconds: float
    rate_from: float
    rate_to: float
    until: Until | None = None

    @property
    def jobs(self) -> float:
        """How many come in those seconds."""
        return self.seconds * (self.rate_from + self.rate_to) / 2

    def at(self, jobs: float) -> float:
        """The second of the phase in which so many have come."""
        if jobs > self.jobs:
            return self.seconds + (jobs - self.jobs) / self.rate_to if self.rate_to else math.inf
        growth = (self.rate_to - self.rate_from) / self.seconds if self.seconds else 0.0
        # The root of: jobs = rate_from × t + growth × t² / 2, in the form that bears a growth of nought.
        root = math.sqrt(max(0.0, self.rate_from**2 + 2 * growth * jobs))
        return 2 * jobs / (self.rate_from + root) if jobs else 0.0


def arrivals(phases: Iterable[Phase]) -> list[float]:
    """The second in which each job comes, if nothing is waited for."""
    return list(_arrivals(phases))


def _arrivals(phases: Iterable[Phase]) -> Iterator[float]:
    began, before, numbers = 0.0, 0.0, itertools.count(1)
    number = next(numbers)
    for phase in phases:
        while number <= before + phase.jobs:
            yield began + phase.at(number - before)
            number = next(numbers)
        began, before = began + phase.seconds, before + phase.jobs
