"""Samples of a run, real or simulated, and the figures computed from them."""

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Self

NEVER: Final = float("nan")


@dataclass(frozen=True)
class Sample:
    """The state at one time, in seconds since the start.

    Attributes:
        messages: ready and unacknowledged messages, as reported by the broker.
        replicas: desired pods.
        ready: ready pods.
        terminating: pods that finish their jobs after SIGTERM.
        published: jobs published so far.
        answered: jobs answered so far.
        rate_limited: model requests with a 429 so far.
    """

    at: float
    messages: int
    replicas: int
    ready: int
    terminating: int
    published: int
    answered: int
    rate_limited: int = 0

    @property
    def backlog(self) -> int:
        """Jobs published and not yet answered."""
        return self.published - self.answered


@dataclass(frozen=True)
class Summary:
    """The figures of a run.

    Attributes:
        first_pod_s: from the first job to the first ready pod.
        all_ready_s: from the first job to the maximum of ready pods.
        drain_s: from the last job to the last answer.
        ideal_drain_s: the same with all pods ready: jobs × request duration ÷ concurrency of all pods.
        wait_s: mean time from a job to its answer, without the model request.
        scale_down_s: from the last answer to the exit of the last pod.
        pod_s: pod-seconds, from the creation of each pod to its exit.
        busy_s: pod-seconds at full utilisation: requests × request duration ÷ concurrency.
        starts: created pods.
        rate_limited: model requests with a 429.
    """

    jobs: int
    max_backlog: int
    max_replicas: int
    first_pod_s: float
    all_ready_s: float
    drain_s: float
    ideal_drain_s: float
    wait_s: float
    scale_down_s: float
    pod_s: float
    busy_s: float
    starts: int
    rate_limited: int

    @property
    def idle(self) -> float:
        """The unused fraction of pod-seconds."""
        return 1 - self.busy_s / self.pod_s

    @classmethod
    def of(cls, samples: Sequence[Sample], *, call_s: float, concurrency: int, maximum: int) -> Self:
        """Compute the figures of a run that started and ended with zero pods."""
        last, most = samples[-1], max(it.ready for it in samples)
        started = _first(samples, lambda it: it.published > 0)
        last_job = _first(samples, lambda it: it.published == last.published)
        last_answer = _first(samples, lambda it: it.answered == last.published)
        backlog = next(it.backlog for it in samples if it.at == last_job)
        return cls(
            jobs=last.published,
            max_backlog=max(it.backlog for it in samples),
            max_replicas=max(it.replicas for it in samples),
            first_pod_s=_first(samples, lambda it: it.ready > 0) - started,
            all_ready_s=_first(samples, lambda it: it.ready == most) - started,
            drain_s=last_answer - last_job,
            ideal_drain_s=backlog * call_s / (maximum * concurrency),
            wait_s=area(samples, lambda it: it.backlog) / last.published - call_s,
            scale_down_s=_last(samples, lambda it: it.replicas + it.terminating > 0) - last_answer,
            pod_s=area(samples, lambda it: it.replicas + it.terminating),
            busy_s=last.answered * call_s / concurrency,
            starts=sum(max(0, it) for it in _changes(samples)),
            rate_limited=last.rate_limited,
        )


def area(samples: Iterable[Sample], figure: Callable[[Sample], float]) -> float:
    """Return the integral of a figure over time."""
    return sum(figure(before) * (after.at - before.at) for before, after in itertools.pairwise(samples))


def difference(one: Sequence[Sample], other: Sequence[Sample], figure: Callable[[Sample], float]) -> float:
    """Return the area between the curves of a figure of two runs, relative to the area under the first."""
    times = sorted({it.at for it in one} | {it.at for it in other})
    apart = [abs(figure(at_time(one, at)) - figure(at_time(other, at))) for at in times]
    between = sum(
        it * (after - at) for it, (at, after) in zip(apart, itertools.pairwise(times), strict=False)
    )
    return between / area(one, figure)


def at_time(samples: Sequence[Sample], at: float) -> Sample:
    """Return the last sample at or before this time."""
    return samples[max(0, bisect_right(samples, at, key=lambda it: it.at) - 1)]


def statistics_age(samples: Sequence[Sample]) -> list[tuple[float, float]]:
    """Return pairs of times: when a statistic was read, and when it was correct; estimated by the backlog."""
    found, of = [], 0
    for number, sample in enumerate(samples):
        of = min(range(of, number + 1), key=lambda it: (abs(samples[it].backlog - sample.messages), -it))
        # The statistic was read before the sample was taken.
        found.append((samples[max(0, number - 1)].at, samples[of].at))
    return found


def rates(samples: Sequence[Sample], figure: Callable[[Sample], int], over_s: float) -> list[float]:
    """Return the rate per second of a counter at each sample, over a window before it."""
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
