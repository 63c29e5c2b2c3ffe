"""Compute rates, latencies and costs of a fleet from the workers' metrics. Times are monotonic seconds.

The dataclasses have the names of the JSON output.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Final, TypeAlias

from prometheus_client.parser import text_string_to_metric_families

# The window of rates and latencies.
WINDOW_S: Final = 30.0
QUANTILES: Final = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
COUNTERS: Final = ("jobs_succeeded", "jobs_failed", "prompt_tokens", "completion_tokens", "cost_usd")
COST: Final = "cost_usd"


@dataclass(frozen=True, slots=True)
class Sample:
    """The metrics of one worker at one time.

    Attributes:
        counts: by model, and name of `COUNTERS` or upper bound of the job duration in seconds (cumulative).
        paused: the dependencies that it has paused consumption for.
    """

    counts: Mapping[tuple[str, str | float], float]
    in_flight: float
    limit: float
    paused: frozenset[str]


# The samples of one worker in the window; the first one is the base of increases.
Window: TypeAlias = deque[tuple[float, Sample]]


def read_sample(exposition: str) -> Sample:
    """Parse the text of a worker's `/metrics`.

    Raises:
        ValueError: it has no metrics of a vqa-worker.
    """
    counts: dict[tuple[str, str | float], float] = defaultdict(float)
    gauges: dict[str, float] = {}
    paused = set()
    for family in text_string_to_metric_families(exposition):
        for name, labels, value, *_ in family.samples:
            match name:
                case "vqa_jobs_total":
                    counts[labels["model"], f"jobs_{labels['status']}"] += value
                case "vqa_tokens_total":
                    counts[labels["model"], f"{labels['type']}_tokens"] += value
                case "vqa_cost_usd_total":
                    counts[labels["model"], COST] += value
                case "vqa_job_duration_seconds_bucket":
                    counts[labels["model"], float(labels["le"])] += value
                case "vqa_jobs_in_flight" | "vqa_concurrency_limit":
                    gauges[name] = value
                case "vqa_dependency_up" if not value:
                    paused.add(labels["dependency"])
    if "vqa_concurrency_limit" not in gauges:
        raise ValueError("no metrics of a vqa-worker")
    in_flight, limit = gauges.get("vqa_jobs_in_flight", 0.0), gauges["vqa_concurrency_limit"]
    return Sample(dict(counts), in_flight, limit, frozenset(paused))


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The figures of one worker, of one model, or of all.

    Attributes:
        per_s: the rates of `COUNTERS` per second; None before the second sample.
        latency_s: `QUANTILES` of the job duration, from delivery to ack; None without jobs.
        cost_usd: the cost since the workers' start; of models and of all, including stopped workers.
    """

    per_s: Mapping[str, float] | None = None
    latency_s: Mapping[str, float | None]
    cost_usd: float = 0.0

    def rate(self, *names: str) -> float:
        """Return the sum of rates; 0 if they are unknown."""
        return sum((self.per_s or {}).get(name, 0.0) for name in names)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLoad(Load):
    """The figures of one worker that is up."""

    address: str
    in_flight: int
    limit: int
    paused: Sequence[str]
    error: None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLoad(Load):
    """The figures of one model."""

    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetLoad(Load):
    """The figures of all workers; `paused`: the number of workers that have paused for each dependency."""

    up: int
    in_flight: int
    limit: int
    paused: Mapping[str, int]


class Fleet:
    """The workers seen so far, by address."""

    def __init__(self) -> None:
        self.windows: dict[str, Window] = {}
        self.up: Sequence[str] = ()
        # The errors by address.
        self.unreachable: Mapping[str, str] = {}

    def observe(self, now: float, found: Mapping[str, Sample | str]) -> None:
        """Add what one scrape found: samples, and errors of unreachable workers, by address."""
        self.up = sorted(address for address, it in found.items() if isinstance(it, Sample))
        self.unreachable = {it: error for it in sorted(found) if isinstance(error := found[it], str)}
        for address, sample in found.items():
            if isinstance(sample, Sample):
                self._add(now, self.windows.setdefault(address, deque()), sample)

    def _add(self, now: float, window: Window, sample: Sample) -> None:
        if window and any(sample.counts.get(key, 0.0) < value for key, value in window[-1][1].counts.items()):
            # The worker was restarted.
            window.clear()
        window.append((now, sample))
        while len(window) > 1 and window[1][0] <= now - WINDOW_S:
            window.popleft()

    def workers(self) -> list[WorkerLoad]:
        """Return the figures of each worker that is up."""
        return [_worker(address, self.windows[address]) for address in self.up]

    def models(self) -> list[ModelLoad]:
        """Return the figures of each model that had a job."""
        counts = (item for window in self.windows.values() for item in window[-1][1].counts.items())
        names = {name for (name, _), count in counts if count}
        return [ModelLoad(model=name, **self._load(name)) for name in sorted(names)]

    def total(self) -> FleetLoad:
        """Return the figures of all workers."""
        workers = self.workers()
        return FleetLoad(
            up=len(workers),
            in_flight=sum(it.in_flight for it in workers),
            limit=sum(it.limit for it in workers),
            paused=dict(Counter(name for it in workers for name in it.paused)),
            **self._load(),
        )

    def _load(self, model: str | None = None) -> dict[str, Any]:
        return _load([self.windows[it] for it in self.up], self.windows.values(), model)


def _worker(address: str, window: Window) -> WorkerLoad:
    last = window[-1][1]
    return WorkerLoad(
        address=address,
        in_flight=round(last.in_flight),
        limit=round(last.limit),
        paused=sorted(last.paused),
        **_load([window], [window]),
    )


def _load(up: Iterable[Window], seen: Iterable[Window], model: str | None = None) -> dict[str, Any]:
    """Return the fields of `Load`, of one model or all: rates of workers `up`, costs of those `seen`."""
    rates: dict[str | float, float] | None = None
    for window in up:
        if len(window) > 1:
            (start, first), (end, last) = window[0], window[-1]
            rates = defaultdict(float) if rates is None else rates
            for (of, name), value in last.counts.items():
                if model in (None, of):
                    rates[name] += (value - first.counts.get((of, name), 0.0)) / (end - start)
    buckets = {bound: rate for bound, rate in (rates or {}).items() if isinstance(bound, float)}
    counts = (item for window in seen for item in window[-1][1].counts.items())
    return {
        "per_s": None if rates is None else {name: round(rates[name], 6) for name in COUNTERS},
        "latency_s": {name: quantile(share, buckets) for name, share in QUANTILES.items()},
        "cost_usd": sum(value for (of, name), value in counts if name == COST and model in (None, of)),
    }


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
