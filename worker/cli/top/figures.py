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
        counts: by model and counter: `succeeded` and `failed` (jobs), `prompt_tokens`, `completion_tokens`,
            `cost_usd`.
        buckets: the job duration histogram: cumulative counts by model and upper bound in seconds.
        paused: the dependencies that it has paused consumption for.
    """

    counts: Mapping[tuple[str, str], float]
    buckets: Mapping[tuple[str, float], float]
    in_flight: float
    limit: float
    paused: frozenset[str]

    @property
    def costs(self) -> Mapping[str, float]:
        """The cost in USD by model."""
        return {model: value for (model, name), value in self.counts.items() if name == "cost_usd"}


def read_sample(exposition: str) -> Sample:
    """Parse the text of a worker's `/metrics`.

    Raises:
        ValueError: it has no metrics of a vqa-worker.
    """
    counts: dict[tuple[str, str], float] = defaultdict(float)
    buckets: dict[tuple[str, float], float] = defaultdict(float)
    gauges: dict[str, float] = {}
    paused = set()
    for family in text_string_to_metric_families(exposition):
        for name, labels, value, *_ in family.samples:
            match name:
                case "vqa_jobs_total":
                    counts[labels["model"], labels["status"]] += value
                case "vqa_tokens_total":
                    counts[labels["model"], f"{labels['type']}_tokens"] += value
                case "vqa_cost_usd_total":
                    counts[labels["model"], "cost_usd"] += value
                case "vqa_job_duration_seconds_bucket":
                    buckets[labels["model"], float(labels["le"])] += value
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

    p50: float | None = None
    p90: float | None = None
    p99: float | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """The figures of one worker, of one model, or of all.

    Attributes:
        per_s: the rate of each counter per second; None before the second sample.
        cost_usd: the cost since the workers' start; of models and of all, including stopped workers.
    """

    per_s: Mapping[str, float] | None = None
    latencies: Latencies = Latencies()
    cost_usd: float = 0.0

    def rate(self, name: str) -> float:
        """Return the rate of a counter; 0 if it is unknown."""
        return (self.per_s or {}).get(name, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFigures:
    """The figures of one worker.

    Attributes:
        error: why it is unreachable; empty if it is up.
        paused: the dependencies that it has paused consumption for.
    """

    address: str
    error: str = ""
    load: Load = Load()
    in_flight: int = 0
    limit: int = 0
    paused: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class FleetFigures:
    """The figures of all workers together, of each worker, and of each model."""

    total: Load
    workers: Sequence[WorkerFigures]
    models: Mapping[str, Load]

    @property
    def up(self) -> Sequence[WorkerFigures]:
        """The workers that are reachable."""
        return [it for it in self.workers if not it.error]

    @property
    def in_flight(self) -> int:
        """The jobs in flight."""
        return sum(it.in_flight for it in self.workers)

    @property
    def limit(self) -> int:
        """The sum of the concurrency limits."""
        return sum(it.limit for it in self.workers)

    @property
    def paused(self) -> Mapping[str, int]:
        """The number of workers that have paused for each dependency."""
        return Counter(name for it in self.workers for name in it.paused)


@dataclass(slots=True)
class _Worker:
    samples: deque[tuple[float, Sample]] = field(default_factory=deque)
    # The cost by model before its restarts.
    spent: Mapping[str, float] = field(default_factory=dict)

    def add(self, now: float, sample: Sample) -> None:
        """Add a sample; a lower cost means a restart."""
        if self.samples and sum(sample.costs.values()) < sum(self.samples[-1][1].costs.values()):
            self.spent = self.costs
        self.samples.append((now, sample))
        # The last sample before the window stays, as the base of increases.
        while len(self.samples) > 1 and self.samples[1][0] <= now - WINDOW_S:
            self.samples.popleft()

    @property
    def costs(self) -> Mapping[str, float]:
        return _sum([self.spent, self.samples[-1][1].costs])

    @property
    def rates(self) -> Mapping[tuple[str, str], float] | None:
        """The rate of each counter per second, by model; None before the second sample."""
        if len(self.samples) < 2:  # noqa: PLR2004 - a rate needs two
            return None
        seconds = self.samples[-1][0] - self.samples[0][0]
        return {key: value / seconds for key, value in _increase(it.counts for _, it in self.samples).items()}

    @property
    def buckets(self) -> Mapping[tuple[str, float], float]:
        return _increase(it.buckets for _, it in self.samples)


class Fleet:
    """The workers seen so far, by address."""

    def __init__(self) -> None:
        self._workers: dict[str, _Worker] = {}
        self._up: Collection[str] = ()
        self._unreachable: Mapping[str, str] = {}

    def observe(self, now: float, samples: Mapping[str, Sample], unreachable: Mapping[str, str]) -> None:
        """Add the samples of one scrape, and the errors of unreachable workers by address."""
        self._up, self._unreachable = set(samples), unreachable
        for address, sample in samples.items():
            self._workers.setdefault(address, _Worker()).add(now, sample)

    def figures(self) -> FleetFigures:
        """Return the figures of the window."""
        up = [self._workers[address] for address in self._up]
        rates = [it.rates for it in up if it.rates is not None]
        by_key = _sum(rates) if rates else None
        buckets = _sum(it.buckets for it in up)
        costs = _sum(it.costs for it in self._workers.values())
        models = sorted({*costs, *(model for model, _ in by_key or ())})
        workers = [*map(self._worker, self._up), *self._errors()]
        return FleetFigures(
            total=_load(by_key, buckets, costs),
            workers=sorted(workers, key=lambda it: it.address),
            models={model: _load(by_key, buckets, costs, model) for model in models},
        )

    def _worker(self, address: str) -> WorkerFigures:
        worker = self._workers[address]
        last = worker.samples[-1][1]
        return WorkerFigures(
            address=address,
            load=_load(worker.rates, worker.buckets, worker.costs),
            in_flight=round(last.in_flight),
            limit=round(last.limit),
            paused=sorted(last.paused),
        )

    def _errors(self) -> Iterable[WorkerFigures]:
        return (WorkerFigures(address=it, error=error) for it, error in self._unreachable.items())


def _load(
    rates: Mapping[tuple[str, str], float] | None,
    buckets: Mapping[tuple[str, float], float],
    costs: Mapping[str, float],
    only: str | None = None,
) -> Load:
    """Return the figures of one model, or of all."""

    def of_model(values: Mapping[tuple[str, Key], float]) -> Mapping[Key, float]:
        return _sum({key: value} for (model, key), value in values.items() if only in (None, model))

    shares = of_model(buckets)
    return Load(
        per_s=None if rates is None else of_model(rates),
        latencies=Latencies(*(quantile(share, shares) for share in QUANTILES)),
        cost_usd=sum(value for model, value in costs.items() if only in (None, model)),
    )


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
