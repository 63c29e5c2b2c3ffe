"""What is written down of a run, real or simulated, and the figures that are made of it."""

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Self

NEVER: Final = float("nan")


@dataclass(frozen=True)
class Sample:
    """How things stood at one moment; all times are seconds since the beginning.

    Attributes:
        messages: jobs in the queue, waiting and in work, as the broker's endpoint shows them.
        replicas: pods that the autoscaler wants.
        ready: pods that take jobs.
        ending: pods that were asked to stop and still finish what they have.
        published: jobs up to now; and so on.
        refused: calls that met a 429, up to now.
    """

    at: float
    messages: int
    replicas: int
    ready: int
    ending: int
    published: int
    answered: int
    refused: int = 0

    @property
    def backlog(self) -> int:
        """Jobs that are published and not answered."""
        return self.published - self.answered


@dataclass(frozen=True)
class Summary:
    """A run in figures.

    Attributes:
        first_pod_s: from the first job to the first pod that takes jobs.
        most_s: from the first job to as many ready pods as there ever were.
        drain_s: from the last job's coming to the last answer.
        ideal_drain_s: the same if all pods that there may be had been there: jobs × time of a call ÷ calls at
            once.
        wait_s: from a job's coming to its answer, on average, beyond the time of its call.
        empty_s: from the last answer to the last pod's end.
        pod_s: seconds of pods, from the wish for each to its end.
        busy_s: seconds of pods that full work would have taken: calls × their time ÷ concurrency.
        starts: pods that were called for.
        refused: calls that met a 429.
    """

    jobs: int
    most_backlog: int
    most_replicas: int
    first_pod_s: float
    most_s: float
    drain_s: float
    ideal_drain_s: float
    wait_s: float
    empty_s: float
    pod_s: float
    busy_s: float
    starts: int
    refused: int

    @property
    def idle(self) -> float:
        """The share of the pods' time in which they might have worked on more."""
        return 1 - self.busy_s / self.pod_s

    @classmethod
    def of(cls, samples: Sequence[Sample], *, call_s: float, concurrency: int, maximum: int) -> Self:
        """Those of a run that began and ended without pods."""
        last, most = samples[-1], max(it.ready for it in samples)
        began = _first(samples, lambda it: it.published > 0)
        last_job = _first(samples, lambda it: it.published == last.published)
        last_answer = _first(samples, lambda it: it.answered == last.published)
        backlog = next(it.backlog for it in samples if it.at == last_job)
        return cls(
            jobs=last.published,
            most_backlog=max(it.backlog for it in samples),
            most_replicas=max(it.replicas for it in samples),
            first_pod_s=_first(samples, lambda it: it.ready > 0) - began,
            most_s=_first(samples, lambda it: it.ready == most) - began,
            drain_s=last_answer - last_job,
            ideal_drain_s=backlog * call_s / (maximum * concurrency),
            wait_s=area(samples, lambda it: it.backlog) / last.published - call_s,
            empty_s=_last(samples, lambda it: it.replicas + it.ending > 0) - last_answer,
            pod_s=area(samples, lambda it: it.replicas + it.ending),
            busy_s=last.answered * call_s / concurrency,
            starts=sum(max(0, it) for it in _changes(samples)),
            refused=last.refused,
        )


def area(samples: Iterable[Sample], figure: Callable[[Sample], float]) -> float:
    """A figure times the seconds that it held."""
    return sum(figure(before) * (after.at - before.at) for before, after in itertools.pairwise(samples))


def difference(one: Sequence[Sample], other: Sequence[Sample], figure: Callable[[Sample], float]) -> float:
    """The area between the curves of a figure of two runs, as a share of the area under the first."""
    times = sorted({it.at for it in one} | {it.at for it in other})
    apart = [abs(figure(at_time(one, at)) - figure(at_time(other, at))) for at in times]
    between = sum(
        it * (after - at) for it, (at, after) in zip(apart, itertools.pairwise(times), strict=False)
    )
    return between / area(one, figure)


def at_time(samples: Sequence[Sample], at: float) -> Sample:
    """How things stood then, by the last sample before."""
    return samples[max(0, bisect_right(samples, at, key=lambda it: it.at) - 1)]


def seen(samples: Sequence[Sample]) -> list[tuple[float, float]]:
    """At each moment, the one that the broker's figure was of: the last that fits it, in their order."""
    found, of = [], 0
    for number, sample in enumerate(samples):
        of = min(range(of, number + 1), key=lambda it: (abs(samples[it].backlog - sample.messages), -it))
        # It was looked at before it was written down.
        found.append((samples[max(0, number - 1)].at, samples[of].at))
    return found


def rates(samples: Sequence[Sample], figure: Callable[[Sample], int], over_s: float) -> list[float]:
    """How fast a count grows at each sample, a second, over the seconds before it."""
    grown, first = [], 0
    for sample in samples:
        while samples[first].at < sample.at - over_s:
            first += 1
        seconds = sample.at - samples[first].at
        grown.append((figure(sample) - figure(samples[first])) / seconds if seconds else 0.0)
    return grown


def _changes(samples: Iterable[Sample]) -> Iterable[int]:
    return (after.replicas - before.replicas for before, after in itertools.pairwise(samples))


def _first(samples: Iterable[Sample], is_so: Callable[[Sample], bool]) -> float:
    return next((it.at for it in samples if is_so(it)), NEVER)


def _last(samples: Sequence[Sample], is_so: Callable[[Sample], bool]) -> float:
    return next((it.at for it in reversed(samples) if is_so(it)), NEVER)
