"""`top`: figures of a fleet from the metrics of its workers."""

from datetime import UTC, datetime
from math import inf

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from worker.cli.top import render
from worker.cli.top.figures import (
    WINDOW_S,
    Fleet,
    FleetFigures,
    Latencies,
    Load,
    Sample,
    WorkerFigures,
    quantile,
    read_sample,
)
from worker.cli.top.workers import DEFAULT_PORT, WorkerUrl
from worker.observability import metrics
from worker.settings import Settings

NOW = datetime(2030, 1, 31, 12, 0, tzinfo=UTC)


def sample(
    *,
    jobs: float = 0,
    cost: float = 0,
    in_flight: float = 0,
    limit: float = 8,
    paused: frozenset[str] = frozenset(),
    model: str = "m/a",
) -> Sample:
    counts = {"succeeded": jobs, "failed": 0.0, "prompt_tokens": jobs * 100, "cost_usd": cost}
    return Sample(
        {(model, name): value for name, value in counts.items()},
        {(model, 1.0): jobs / 2, (model, 2.0): jobs, (model, inf): jobs},
        in_flight,
        limit,
        paused,
    )


def figures_of(*observed: tuple[float, dict[str, Sample]]) -> FleetFigures:
    fleet = Fleet()
    for now, samples in observed:
        fleet.observe(now, samples, {})
    return fleet.figures()


# One worker


def test_the_figures_of_a_worker_are_by_model() -> None:
    before = read_sample(metrics.exposition()[0].decode())
    for model in ("m/a", "m/b"):
        metrics.JOBS.labels("succeeded", "", model).inc()
        metrics.JOBS.labels("failed", "empty_answer", model).inc()
        metrics.JOB_DURATION.labels("succeeded", model).observe(0.2)
        metrics.TOKENS.labels(model, "prompt").inc(100)
        metrics.TOKENS.labels(model, "completion").inc(7)
        metrics.COST.labels(model).inc(0.5)
    metrics.JOBS_IN_FLIGHT.set_function(lambda: 3)
    metrics.CONCURRENCY_LIMIT.set(32)
    metrics.DEPENDENCY_UP.labels("s3").set(0)
    metrics.DEPENDENCY_UP.labels("model").set(1)
    after = read_sample(metrics.exposition()[0].decode())
    added = {key: value - before.counts.get(key, 0.0) for key, value in after.counts.items()}
    for model in ("m/a", "m/b"):
        assert {name: value for (of, name), value in added.items() if of == model} == pytest.approx(
            {"succeeded": 1, "failed": 1, "prompt_tokens": 100, "completion_tokens": 7, "cost_usd": 0.5}
        )
        grown = {
            bound: count - before.buckets.get((of, bound), 0.0)
            for (of, bound), count in after.buckets.items()
            if of == model
        }
        assert (grown[0.1], grown[0.25], grown[inf]) == (0, 1, 1)
    assert (after.in_flight, after.limit) == (3, 32)
    assert "s3" in after.paused
    assert "model" not in after.paused


@pytest.mark.parametrize("text", ["", "<html></html>", "up 1\n", "vqa_jobs_in_flight 1\n"])
def test_a_server_that_is_not_a_worker_is_reported(text: str) -> None:
    with pytest.raises(ValueError, match=r"no metrics|."):
        read_sample(text)


# The fleet


def test_rates_are_computed_between_readings_by_worker_by_model_and_in_total() -> None:
    figures = figures_of(
        (0.0, {"a": sample(jobs=10, cost=1), "b": sample(jobs=0, model="m/b")}),
        (
            10.0,
            {
                "a": sample(jobs=30, cost=3, in_flight=2),
                "b": sample(jobs=5, in_flight=1, limit=4, model="m/b"),
            },
        ),
    )
    total = figures.total
    assert total.rate("succeeded") == pytest.approx(2.5)
    assert total.rate("prompt_tokens") == pytest.approx(250)
    assert total.rate("cost_usd") == pytest.approx(0.2)
    assert total.cost_usd == pytest.approx(3.0)
    assert total.latencies == Latencies(1.0, 1.8, 1.98)
    assert (len(figures.up), figures.in_flight, figures.limit) == (2, 3, 12)
    workers = [(it.address, round(it.load.rate("succeeded"), 6), it.in_flight) for it in figures.workers]
    assert workers == [("a", 2.0, 2), ("b", 0.5, 1)]
    models = {name: (round(it.rate("succeeded"), 6), it.cost_usd) for name, it in figures.models.items()}
    assert models == {"m/a": (2.0, 3.0), "m/b": (0.5, 0.0)}


def test_one_reading_gives_no_rate() -> None:
    figures = figures_of((0.0, {"a": sample(jobs=10, cost=1)}))
    assert (figures.total.per_s, figures.total.latencies) == (None, Latencies(None, None, None))
    assert figures.total.cost_usd == 1.0


def test_old_readings_are_forgotten() -> None:
    readings = [(float(second), {"a": sample(jobs=1000 if second else 0)}) for second in range(0, 100, 5)]
    figures = figures_of(*readings)
    assert figures.total.per_s is not None
    assert figures.total.rate("succeeded") == 0
    busy = figures_of(*((float(second), {"a": sample(jobs=second)}) for second in range(100)))
    assert busy.total.rate("succeeded") == pytest.approx(1.0)
    fleet = Fleet()
    for second in range(1000):
        fleet.observe(float(second), {"a": sample(jobs=second)}, {})
    assert len(fleet._workers["a"].samples) <= WINDOW_S + 2  # noqa: SLF001


def test_a_restarted_worker_counts_from_zero_and_its_cost_is_kept() -> None:
    figures = figures_of(
        (0.0, {"a": sample(jobs=100, cost=5)}),
        (10.0, {"a": sample(jobs=110, cost=6)}),
        (20.0, {"a": sample(jobs=4, cost=0.5)}),
        (30.0, {"a": sample(jobs=4, cost=0.25)}),
    )
    assert figures.total.rate("succeeded") == pytest.approx(14 / 30)
    assert figures.total.cost_usd == pytest.approx(6.75)
    assert figures.models["m/a"].cost_usd == pytest.approx(6.75)


def test_a_stopped_worker_counts_no_more_and_its_cost_is_kept() -> None:
    fleet = Fleet()
    fleet.observe(0.0, {"a": sample(jobs=0, cost=1), "b": sample(jobs=0, cost=2)}, {})
    fleet.observe(10.0, {"a": sample(jobs=10, cost=1)}, {"b": "connection refused"})
    figures = fleet.figures()
    assert [(it.address, it.error) for it in figures.workers] == [("a", ""), ("b", "connection refused")]
    assert (len(figures.up), figures.total.cost_usd) == (1, 3.0)
    assert figures.total.rate("succeeded") == pytest.approx(1.0)


def test_paused_workers_are_counted_by_dependency() -> None:
    paused = frozenset({"model"})
    figures = figures_of(
        (0.0, {"a": sample(paused=paused), "b": sample(paused=paused | {"s3"}), "c": sample()})
    )
    assert figures.paused == {"model": 2, "s3": 1}
    assert [it.paused for it in figures.workers] == [["model"], ["model", "s3"], []]


def test_a_fleet_without_workers_has_figures_too() -> None:
    figures = figures_of((0.0, {}))
    assert (figures.up, figures.total.per_s, figures.total.cost_usd) == ([], None, 0)


# Quantiles


def test_quantiles_are_computed_as_in_prometheus() -> None:
    buckets = {0.1: 10.0, 0.5: 30.0, 1.0: 30.0, inf: 40.0}
    assert quantile(0.25, buckets) == pytest.approx(0.1)
    assert quantile(0.5, buckets) == pytest.approx(0.3)
    # Above the last bound the quantile is that bound.
    assert quantile(0.99, buckets) == 1.0
    assert quantile(0.5, {}) is None
    assert quantile(0.5, {1.0: 0.0, inf: 0.0}) is None


@given(st.lists(st.floats(0.001, 99.0), min_size=1, max_size=30), st.floats(0.01, 0.99))
def test_a_quantile_lies_in_its_bucket(values: list[float], share: float) -> None:
    bounds = [0.01, 0.1, 1.0, 10.0, 100.0]
    buckets = {bound: float(sum(value <= bound for value in values)) for bound in bounds}
    found = quantile(share, {**buckets, inf: float(len(values))})
    assert found is not None
    rank = share * len(values)
    upper = next(bound for bound in bounds if buckets[bound] >= rank)
    lower = max([0.0, *(bound for bound in bounds if bound < upper)])
    assert lower <= found <= upper * (1 + 1e-9)


# Output


QUEUES = render.QueueFigures(jobs=1200, retries=3, results=1, dead_letters=2, consumers=4)


RATES = {"succeeded": 10.0, "failed": 0.5, "prompt_tokens": 1234.4, "cost_usd": 0.001}
BUSY = Load(RATES, Latencies(0.25, 1.25, None), 1.5)
WORKERS = (
    WorkerFigures(address="10.0.0.7:8080", load=BUSY, in_flight=60, limit=64),
    WorkerFigures(address="10.0.0.8:8080", limit=32, paused=("model",)),
    WorkerFigures(address="10.0.0.9:8080", error="connection refused"),
)
MODEL = "meta-llama/Llama-3.2-90B-Vision-Instruct"
FLEET = FleetFigures(BUSY, WORKERS, {MODEL: BUSY})


def test_the_tables_have_a_row_for_each_worker_and_each_model_and_fit_80_columns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = render.text(render.Figures("vqa.jobs", QUEUES, "", FLEET), NOW).split("\n")
    assert max(map(len, lines)) <= 80
    models, workers = (number for number, line in enumerate(lines) if line.startswith(("MODEL", "WORKER")))
    assert lines[models].split() == ["MODEL", "JOBS/S", "FAILED/S", "TOKENS/S", "P90", "COST", "$/H"]
    (model,) = lines[models + 1 : workers - 1]
    assert model.startswith("meta-llama/Llama")
    assert model.split()[1:] == ["10.0", "0.5", "1,234", "1.2", "s", "1.50", "3.60"]
    assert [line.split() for line in lines[workers:]] == [
        ["WORKER", "JOBS/S", "FAILED/S", "IN", "FLIGHT", "P90", "STATE"],
        ["10.0.0.7:8080", "10.0", "0.5", "60", "of", "64", "1.2", "s", "up"],
        ["10.0.0.8:8080", "0.0", "0.0", "0", "of", "32", "-", "paused", "for", "model"],
        ["10.0.0.9:8080", "-", "-", "-", "-", "unreachable:", "connection"],
        ["refused"],
    ]


def text(queues: render.QueueFigures | None, fleet: FleetFigures | None, error: str = "") -> list[str]:
    return render.text(render.Figures("vqa.jobs", queues, error, fleet), NOW).split("\n")[1:]


def test_the_first_lines_are_the_queues_and_the_totals() -> None:
    assert text(QUEUES, FLEET)[:7] == [
        "queues   1,200 ready, 3 in retry, 2 dead-lettered, 1 results, 4 consumers",
        "workers  2 up, 1 unreachable",
        "jobs     10.0/s, 0.5/s failed, 60 in flight of 96, ETA 2 min",
        "latency  p50 250 ms, p90 1.2 s, p99 -",
        "tokens   1,234 + 0/s",
        "cost     $1.5000 so far, $3.60/h",
        "paused   for model (1 of 2)",
    ]


def test_without_workers_only_the_queues_are_shown_and_a_broker_error_is_shown() -> None:
    assert text(render.QueueFigures(jobs=7), None) == [
        "queues  7 ready, ? in retry, ? dead-lettered, ? results, 0 consumers"
    ]
    lines = text(None, FLEET, "it is away")
    assert lines[0] == "queues   it is away"
    assert "ETA" not in "".join(lines)


def test_json_output_has_numbers() -> None:
    printed = render.in_json(render.Figures("q", QUEUES, "", FLEET), NOW)
    assert printed["at"] == "2030-01-31T12:00:00.000Z"
    assert printed["queues"] == {"jobs": 1200, "retries": 3, "results": 1, "dead_letters": 2, "consumers": 4}
    fleet = printed["fleet"]
    assert (fleet["up"], fleet["in_flight"], fleet["limit"], fleet["paused"]) == (2, 60, 96, {"model": 1})
    assert fleet["latency_s"] == {"p50": 0.25, "p90": 1.25, "p99": None}
    assert [it["model"] for it in printed["models"]] == [MODEL]
    assert printed["models"][0]["per_s"]["jobs_failed"] == 0.5
    busy, paused, away = printed["workers"]
    assert (busy["error"], busy["in_flight"], busy["cost_usd"]) == (None, 60, 1.5)
    assert (paused["per_s"], paused["paused"]) == (None, ["model"])
    assert away == {"address": "10.0.0.9:8080", "error": "connection refused"}


@pytest.mark.parametrize(
    ("text", "host", "port", "path"),
    [
        ("http://host:1", "host", 1, "/metrics"),
        ("host", "host", DEFAULT_PORT, "/metrics"),
        ("host:9/some/where", "host", 9, "/some/where"),
        ("http://[::1]:9/", "::1", 9, "/metrics"),
    ],
)
def test_a_worker_s_url_may_be_short(text: str, host: str, port: int, path: str) -> None:
    assert WorkerUrl.parse(text) == WorkerUrl(host, port, path)


@pytest.mark.parametrize("text", ["", "https://host", "http://", "host:port", "http://host:99999", "[::1"])
def test_an_invalid_worker_url_is_reported(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is not a worker URL"):
        WorkerUrl.parse(text)


def test_the_default_port_is_the_worker_s() -> None:
    assert Settings.model_fields["http_port"].default == DEFAULT_PORT
