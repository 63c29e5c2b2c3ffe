"""Compute rates, latencies and sums of a fleet from the workers' metrics. Times are monotonic seconds."""

from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from typing import Final, TypeVar

from prometheus_client.parser import text_string_to_metric_families

Key = TypeVar("Key")

# The window of rates and latencies.
WINDOW_S: Final = 30.0
QUANTILES: Final = (0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True)
class Sample:
    """The metrics of one worker at one time.

    Attributes:
        counts: counters `succeeded` and `failed` (jobs), `prompt_tokens`, `completion_tokens`, `cost_usd`.
        buckets: the job duration histogram: cumulative counts by upper bound in seconds.
        paused: the dependencies that it has paused consumption for.
    """

    counts: Mapping[str, float]
    buckets: Mapping[float, float]
    in_flight: float
    limit: float
    paused: frozenset[str]


def read_sample(exposition: str) -> Sample:
    """Parse the text of a worker's `/metrics`.

    Raises:
        ValueError: it has no metrics of a vqa-worker.
    """
    counts: dict[str, float] = defaultdict(float)
    buckets: dict[float, float] = defaultdict(float)
    gauges: dict[str, float] = {}
    paused = set()
    for family in text_string_to_metric_families(exposition):
        for name, labels, value, *_ in family.samples:
            match name:
                case "vqa_jobs_total":
                    counts[labels["status"]] += value
                case "vqa_tokens_total":
                    counts[f"{labels['type']}_tokens"] += value
                case "vqa_cost_usd_total":
                    counts["cost_usd"] += value
                case "vqa_job_duration_seconds_bucket":
                    buckets[float(labels["le"])] += value
                case "vqa_jobs_in_flight" | "vqa_concurrency_limit":
                    gauges[name] = value
                case "vqa_dependency_up" if not value:
                    paused.add(labels["dependency"])
    if "vqa_concurrency_limit" not in gauges:
        raise ValueError("no metrics of a vqa-worker")
    in_flight, limit = gauges.get("vqa_jobs_in_flight", 0.0), gauges["vqa_concurrency_limit"]
    return Sample(dict(counts), dict(buckets), in_flight, limit, frozenset(paused))


@dataclass(frozen=True, slots=True)
class Latencies:
    """Quantiles of the job duration, from delivery to ack, in seconds; None without jobs."""

    p50: float | None
    p90: float | None
    p99: float | None


@dataclass(frozen=True, slots=True)
class FleetFigures:
    """The figures of all workers together.

    Attributes:
        workers: the number of workers that are up.
        unreachable: the addresses of the others.
        per_s: the rate of each counter per second; None before the second sample.
        cost_usd: the cost since the workers' start, including workers that have stopped meanwhile.
        paused: the number of workers that have paused for each dependency.
    """

    workers: int
    unreachable: Sequence[str]
    per_s: Mapping[str, float] | None
    latencies: Latencies
    in_flight: int
    limit: int
    cost_usd: float
    paused: Mapping[str, int]


@dataclass(slots=True)
class _Worker:
    samples: deque[tuple[float, Sample]] = field(default_factory=deque)
    # The cost before its restarts.
    spent_usd: float = 0.0


class Fleet:
    """The workers seen so far, by address."""

    def __init__(self) -> None:
        self._workers: dict[str, _Worker] = {}
        self._up: set[str] = set()
        self._unreachable: Collection[str] = ()

    def observe(self, now: float, samples: Mapping[str, Sample], unreachable: Collection[str]) -> None:
        """Add the samples of one scrape."""
        self._up, self._unreachable = set(samples), unreachable
        for address, sample in samples.items():
            worker = self._workers.setdefault(address, _Worker())
            if worker.samples and _cost(sample) < _cost(worker.samples[-1][1]):
                worker.spent_usd += _cost(worker.samples[-1][1])
            worker.samples.append((now, sample))
            # The last sample before the window stays, as the base of increases.
            while len(worker.samples) > 1 and worker.samples[1][0] <= now - WINDOW_S:
                worker.samples.popleft()

    def figures(self) -> FleetFigures:
        """Return the figures of the window."""
        seen = [self._workers[address] for address in self._up]
        last = [worker.samples[-1][1] for worker in seen]
        measured = [worker.samples for worker in seen if len(worker.samples) > 1]
        paused = Counter(name for sample in last for name in sample.paused)
        return FleetFigures(
            workers=len(seen),
            unreachable=sorted(self._unreachable),
            per_s=_sum(map(_per_s, measured)) if measured else None,
            latencies=_latencies(_sum(_increase(s.buckets for _, s in samples) for samples in measured)),
            in_flight=round(sum(sample.in_flight for sample in last)),
            limit=round(sum(sample.limit for sample in last)),
            cost_usd=sum(it.spent_usd + _cost(it.samples[-1][1]) for it in self._workers.values()),
            paused=dict(paused),
        )


def _cost(sample: Sample) -> float:
    return sample.counts.get("cost_usd", 0.0)


def _per_s(samples: Sequence[tuple[float, Sample]]) -> Mapping[str, float]:
    seconds = samples[-1][0] - samples[0][0]
    increases = _increase(sample.counts for _, sample in samples)
    return {name: value / seconds for name, value in increases.items()}


def _increase(counts: Iterable[Mapping[Key, float]]) -> Mapping[Key, float]:
    """Return the increase of each counter; a lower value means a restart, as in Prometheus' `increase`."""
    increases: dict[Key, float] = {}
    for before, after in pairwise(counts):
        for key, value in after.items():
            old = before.get(key, 0.0)
            increases[key] = increases.get(key, 0.0) + (value - old if value >= old else value)
    return increases


def _sum(parts: Iterable[Mapping[Key, float]]) -> Mapping[Key, float]:
    whole: dict[Key, float] = {}
    for part in parts:
        for key, value in part.items():
            whole[key] = whole.get(key, 0.0) + value
    return whole


def _latencies(buckets: Mapping[float, float]) -> Latencies:
    return Latencies(*(quantile(share, buckets) for share in QUANTILES))


def quantile(share: float, buckets: Mapping[float, float]) -> float | None:
    """Estimate a quantile as Prometheus' `histogram_quantile`: linear in a bucket, at most the last bound."""
    total = buckets.get(inf, 0.0)
    if not total:
        return None
    rank = share * total
    lower, below = 0.0, 0.0
    for bound, count in sorted(buckets.items()):
        if count >= rank:
            if bound == inf:
                return lower
            return lower + (bound - lower) * (rank - below) / (count - below) if count > below else bound
        lower, below = bound, count
    return lower
