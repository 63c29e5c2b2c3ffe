"""From the workers' metrics to a fleet's figures: rates, latencies, sums. Times are seconds of any clock."""

from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from typing import Final, TypeVar

from prometheus_client.parser import text_string_to_metric_families

Key = TypeVar("Key")

# Rates and latencies are those of so many seconds.
WINDOW_S: Final = 30.0
QUANTILES: Final = (0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True)
class Sample:
    """What one worker says at one moment.

    Attributes:
        counts: what only grows: `succeeded`, `failed` (jobs), `prompt_tokens`, `completion_tokens`,
            `cost_usd`.
        buckets: how many jobs took no longer than so many seconds.
        down: the dependencies that it pauses for.
    """

    counts: Mapping[str, float]
    buckets: Mapping[float, float]
    in_flight: float
    limit: float
    down: frozenset[str]


def read_sample(exposition: str) -> Sample:
    """A worker's `/metrics`.

    Raises:
        ValueError: it is not the text of a worker.
    """
    counts: dict[str, float] = defaultdict(float)
    buckets: dict[float, float] = defaultdict(float)
    gauges: dict[str, float] = {}
    down = set()
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
                    down.add(labels["dependency"])
    if "vqa_concurrency_limit" not in gauges:
        raise ValueError("no metrics of a vqa-worker")
    in_flight, limit = gauges.get("vqa_jobs_in_flight", 0.0), gauges["vqa_concurrency_limit"]
    return Sample(dict(counts), dict(buckets), in_flight, limit, frozenset(down))


@dataclass(frozen=True, slots=True)
class Latencies:
    """How long jobs took, from delivery to ack, in seconds; None where none has come to its end."""

    p50: float | None
    p90: float | None
    p99: float | None


@dataclass(frozen=True, slots=True)
class FleetFigures:
    """All workers together.

    Attributes:
        workers: how many answer.
        silent: the addresses that do not.
        per_s: of each count, how much a second; None before there are two samples.
        cost_usd: since the workers were started, those included that were seen and are gone.
        down: how many workers pause for each dependency.
    """

    workers: int
    silent: Sequence[str]
    per_s: Mapping[str, float] | None
    latencies: Latencies
    in_flight: int
    limit: int
    cost_usd: float
    down: Mapping[str, int]


@dataclass(slots=True)
class _Worker:
    samples: deque[tuple[float, Sample]] = field(default_factory=deque)
    # Before its restarts.
    spent_usd: float = 0.0


class Fleet:
    """The workers that have been seen, by address."""

    def __init__(self) -> None:
        self._workers: dict[str, _Worker] = {}
        self._answering: set[str] = set()
        self._silent: Collection[str] = ()

    def observe(self, now: float, samples: Mapping[str, Sample], silent: Collection[str]) -> None:
        """What the workers say now, and which of them say nothing."""
        self._answering, self._silent = set(samples), silent
        for address, sample in samples.items():
            worker = self._workers.setdefault(address, _Worker())
            if worker.samples and _cost(sample) < _cost(worker.samples[-1][1]):
                worker.spent_usd += _cost(worker.samples[-1][1])
            worker.samples.append((now, sample))
            # One from before the window stays, for what grew since.
            while len(worker.samples) > 1 and worker.samples[1][0] <= now - WINDOW_S:
                worker.samples.popleft()

    def figures(self) -> FleetFigures:
        """What comes of it."""
        seen = [self._workers[address] for address in self._answering]
        last = [worker.samples[-1][1] for worker in seen]
        measured = [worker.samples for worker in seen if len(worker.samples) > 1]
        down = Counter(name for sample in last for name in sample.down)
        return FleetFigures(
            workers=len(seen),
            silent=sorted(self._silent),
            per_s=_sum(map(_per_s, measured)) if measured else None,
            latencies=_latencies(_sum(_increase(s.buckets for _, s in samples) for samples in measured)),
            in_flight=round(sum(sample.in_flight for sample in last)),
            limit=round(sum(sample.limit for sample in last)),
            cost_usd=sum(it.spent_usd + _cost(it.samples[-1][1]) for it in self._workers.values()),
            down=dict(down),
        )


def _cost(sample: Sample) -> float:
    return sample.counts.get("cost_usd", 0.0)


def _per_s(samples: Sequence[tuple[float, Sample]]) -> Mapping[str, float]:
    seconds = samples[-1][0] - samples[0][0]
    grown = _increase(sample.counts for _, sample in samples)
    return {name: value / seconds for name, value in grown.items()}


def _increase(counts: Iterable[Mapping[Key, float]]) -> Mapping[Key, float]:
    """By how much each has grown; one that is less than before has begun anew, as in a restarted worker."""
    grown: dict[Key, float] = {}
    for before, after in pairwise(counts):
        for key, value in after.items():
            old = before.get(key, 0.0)
            grown[key] = grown.get(key, 0.0) + (value - old if value >= old else value)
    return grown


def _sum(parts: Iterable[Mapping[Key, float]]) -> Mapping[Key, float]:
    whole: dict[Key, float] = {}
    for part in parts:
        for key, value in part.items():
            whole[key] = whole.get(key, 0.0) + value
    return whole


def _latencies(buckets: Mapping[float, float]) -> Latencies:
    return Latencies(*(quantile(share, buckets) for share in QUANTILES))


def quantile(share: float, buckets: Mapping[float, float]) -> float | None:
    """As Prometheus' `histogram_quantile`: linear within a bucket; what is beyond the last is its bound."""
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
