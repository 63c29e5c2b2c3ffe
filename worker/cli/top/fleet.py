"""Read the metrics of all workers; compute rates, latencies and costs. Times are monotonic seconds."""

import asyncio
import socket
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping
from math import inf
from typing import Any, Final, NamedTuple, TypeAlias

import aiohttp
from prometheus_client.parser import text_string_to_metric_families
from yarl import URL

from worker.cli.shell import UsageError
from worker.http.client import describe_failure, proxy_options

# The default of `VQA_HTTP_PORT`.
DEFAULT_PORT: Final = 8080
CONNECT_TIMEOUT_S: Final = 2.0
READ_TIMEOUT_S: Final = 5.0
# The window of rates and latencies.
WINDOW_S: Final = 30.0
QUANTILES: Final = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
COUNTERS: Final = ("jobs_succeeded", "jobs_failed", "prompt_tokens", "completion_tokens", "cost_usd")


class Sample(NamedTuple):
    """The metrics of one worker at one time.

    `counts` are by model, and name of `COUNTERS` or upper bound of the job duration in seconds (cumulative).
    `paused` are the dependencies that the worker has paused consumption for.
    """

    counts: Mapping[tuple[str, str | float], float]
    in_flight: int
    limit: int
    paused: list[str]


# The samples of one worker in the window, with their times.
Window: TypeAlias = deque[tuple[float, Sample]]


def parse_url(text: str) -> URL:
    """Parse the URL of a worker, or of all workers behind one name: `http://host:port/path`.

    Scheme, port and path are optional.

    Raises:
        UsageError: the text is not such a URL.
    """
    try:
        url = URL(text if "://" in text else f"http://{text}")
    except ValueError:
        url = URL()
    if url.scheme != "http" or not url.host:
        raise UsageError(f"--worker: {text!r} is not a URL of a worker such as http://host:8080.")
    url = url.with_path("/metrics") if url.path == "/" else url
    return url.with_port(url.explicit_port or DEFAULT_PORT)


async def scrape(http: aiohttp.ClientSession, urls: Iterable[URL]) -> dict[str, Sample | str]:
    """Read the metrics of every address of every URL; return samples, or errors, by address."""
    found: dict[str, Sample | str] = {}
    targets: dict[str, URL] = {}
    for url in urls:
        try:
            # For each scrape, as pods change.
            resolved = await asyncio.get_running_loop().getaddrinfo(
                url.host, url.port, type=socket.SOCK_STREAM
            )
            each = {url.with_host(str(address[0])) for *_, address in resolved}
            targets |= {_address(it): it for it in each}
        except OSError as error:
            found[_address(url)] = (error.strerror or type(error).__name__).lower()
    answers = await asyncio.gather(*(_scrape_one(http, str(url)) for url in targets.values()))
    return found | dict(zip(targets, answers, strict=True))


def _address(url: URL) -> str:
    return f"{url.host_subcomponent}:{url.port}"


async def _scrape_one(http: aiohttp.ClientSession, url: str) -> Sample | str:
    try:
        async with (
            asyncio.timeout(READ_TIMEOUT_S),
            http.get(url, allow_redirects=False, **proxy_options(url)) as response,
        ):
            if response.status != 200:  # noqa: PLR2004 - HTTP 200 OK
                return f"HTTP {response.status}"
            return read_sample(await response.text())
    except ValueError:
        return "no metrics of a vqa-worker"
    except TimeoutError:
        return f"no response in {READ_TIMEOUT_S:g} s"
    except (aiohttp.ClientError, OSError) as error:
        return describe_failure(error).lower()


def read_sample(exposition: str) -> Sample:
    """Parse the text of a worker's `/metrics`.

    Raises:
        ValueError: it has no metrics of a vqa-worker.
    """
    counts: dict[tuple[str, str | float], float] = defaultdict(float)
    gauges: dict[str, float] = {}
    paused = []
    for family in text_string_to_metric_families(exposition):
        for name, labels, value, *_ in family.samples:
            match name:
                case "vqa_jobs_total":
                    counts[labels["model"], f"jobs_{labels['status']}"] += value
                case "vqa_tokens_total":
                    counts[labels["model"], f"{labels['type']}_tokens"] += value
                case "vqa_cost_usd_total":
                    counts[labels["model"], "cost_usd"] += value
                case "vqa_job_duration_seconds_bucket":
                    counts[labels["model"], float(labels["le"])] += value
                case "vqa_jobs_in_flight" | "vqa_concurrency_limit":
                    gauges[name] = value
                case "vqa_dependency_up" if not value:
                    paused.append(labels["dependency"])
    if "vqa_concurrency_limit" not in gauges:
        raise ValueError("no metrics of a vqa-worker")
    in_flight = round(gauges.get("vqa_jobs_in_flight", 0.0))
    return Sample(dict(counts), in_flight, round(gauges["vqa_concurrency_limit"]), sorted(paused))


class Fleet:
    """The workers seen so far. Its figures have the names of the JSON output.

    All have `per_s`, the rates of `COUNTERS` (None before the second sample), `latency_s`, the `QUANTILES`
    of the time from delivery to ack (None without jobs), and `cost_usd` since the workers' start.
    """

    def __init__(self) -> None:
        self.windows: dict[str, Window] = {}
        self.found: Mapping[str, Sample | str] = {}

    def observe(self, now: float, found: Mapping[str, Sample | str]) -> None:
        """Add the result of one `scrape`."""
        self.found = dict(sorted(found.items()))
        for address, sample in self._up().items():
            window = self.windows.setdefault(address, deque())
            if window and any(
                sample.counts.get(key, 0.0) < value for key, value in window[-1][1].counts.items()
            ):
                # The worker was restarted.
                window.clear()
            window.append((now, sample))
            while len(window) > 1 and window[1][0] <= now - WINDOW_S:
                window.popleft()

    def _up(self) -> dict[str, Sample]:
        return {address: it for address, it in self.found.items() if isinstance(it, Sample)}

    def workers(self) -> list[dict[str, Any]]:
        """Return the figures of each worker, or the `error` of one that is unreachable."""
        return [
            {"address": address, "error": it}
            if isinstance(it, str)
            else {"address": address, "error": None, **_load(it), **self._rates([address], [address])}
            for address, it in self.found.items()
        ]

    def models(self) -> list[dict[str, Any]]:
        """Return the figures of each model that had a job, including the costs of stopped workers."""
        counts = (item for window in self.windows.values() for item in window[-1][1].counts.items())
        names = {name for (name, _), count in counts if count}
        return [{"model": name, **self._rates(self._up(), self.windows, name)} for name in sorted(names)]

    def total(self) -> dict[str, Any]:
        """Return the figures of all workers; `paused`: how many have paused for each dependency."""
        up = self._up()
        return {
            "up": len(up),
            "in_flight": sum(it.in_flight for it in up.values()),
            "limit": sum(it.limit for it in up.values()),
            "paused": dict(Counter(name for it in up.values() for name in it.paused)),
            **self._rates(up, self.windows),
        }

    def _rates(self, up: Iterable[str], seen: Iterable[str], model: str | None = None) -> dict[str, Any]:
        """Return rates of the workers `up` and costs of those `seen`, of one model or of all."""
        rates: dict[str | float, float] | None = None
        for window in (self.windows[address] for address in up):
            if len(window) > 1:
                (start, first), (end, last) = window[0], window[-1]
                rates = defaultdict(float) if rates is None else rates
                for (of, name), value in last.counts.items():
                    if model in (None, of):
                        rates[name] += (value - first.counts.get((of, name), 0.0)) / (end - start)
        buckets = {bound: rate for bound, rate in (rates or {}).items() if isinstance(bound, float)}
        counts = (item for address in seen for item in self.windows[address][-1][1].counts.items())
        return {
            "per_s": None if rates is None else {name: round(rates[name], 6) for name in COUNTERS},
            "latency_s": {name: quantile(share, buckets) for name, share in QUANTILES.items()},
            "cost_usd": sum(it for (of, name), it in counts if name == "cost_usd" and model in (None, of)),
        }


def _load(sample: Sample) -> dict[str, Any]:
    return {"in_flight": sample.in_flight, "limit": sample.limit, "paused": sample.paused}


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
