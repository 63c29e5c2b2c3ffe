"""`top`: figures of a fleet from the metrics of its workers."""

import json
from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.cli.shell import UsageError
from worker.cli.top import render
from worker.cli.top.fleet import (
    COUNTERS,
    DEFAULT_PORT,
    WINDOW_S,
    Fleet,
    Sample,
    parse_url,
    quantile,
    read_sample,
)
from worker.observability import metrics
from worker.settings import Settings

MODEL = "meta-llama/Llama-3.2-90B-Vision-Instruct"


def sample(
    *,
    jobs: float = 0,
    failed: float = 0,
    cost: float = 0,
    in_flight: int = 0,
    limit: int = 8,
    paused: Sequence[str] = (),
    model: str = "m/a",
) -> Sample:
    counts: dict[str | float, float] = {
        "jobs_succeeded": jobs,
        "jobs_failed": failed,
        "prompt_tokens": jobs * 100,
        "cost_usd": cost,
        1.0: jobs / 2,
        2.0: jobs,
        inf: jobs,
    }
    return Sample(
        {(model, name): value for name, value in counts.items()},
        in_flight,
        limit,
        list(paused),
    )


def fleet_of(*observed: tuple[float, Mapping[str, Sample | str]]) -> Fleet:
    fleet = Fleet()
    for now, found in observed:
        fleet.observe(now, found)
    return fleet


def total_of(*observed: tuple[float, Mapping[str, Sample | str]]) -> dict[str, Any]:
    return fleet_of(*observed).total()


def figures(queues: Mapping[str, int | None] | None, fleet: Fleet | None, error: str = "") -> dict[str, Any]:
    """Return what `top --json` prints."""
    return {
        "at": "2030-01-31T12:00:00.000Z",
        "queue": "vqa.jobs",
        "queues": queues,
        "error": error,
        "fleet": fleet and fleet.total(),
        "workers": fleet and fleet.workers(),
        "models": fleet and fleet.models(),
    }


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
    for model in ("m/a", "m/b"):
        added = {
            name: value - before.counts.get((of, name), 0.0)
            for (of, name), value in after.counts.items()
            if of == model
        }
        assert [added[name] for name in COUNTERS] == pytest.approx([1, 1, 100, 7, 0.5])
        assert (added[0.1], added[0.25], added[inf]) == (0, 1, 1)
    assert (after.in_flight, after.limit) == (3, 32)
    assert "s3" in after.paused
    assert "model" not in after.paused


@pytest.mark.parametrize("text", ["", "<html></html>", "up 1\n", "vqa_jobs_in_flight 1\n"])
def test_a_server_that_is_not_a_worker_is_reported(text: str) -> None:
    with pytest.raises(ValueError, match=r"no metrics|."):
        read_sample(text)


# The fleet


def test_rates_are_computed_between_readings_by_worker_by_model_and_in_total() -> None:
    fleet = fleet_of(
        (0.0, {"a": sample(jobs=10, cost=1), "b": sample(jobs=0, model="m/b")}),
        (
            10.0,
            {
                "a": sample(jobs=30, cost=3, in_flight=2),
                "b": sample(jobs=5, in_flight=1, limit=4, model="m/b"),
            },
        ),
    )
    total = fleet.total()
    assert total["per_s"]["jobs_succeeded"] == pytest.approx(2.5)
    assert total["per_s"]["prompt_tokens"] == pytest.approx(250)
    assert total["per_s"]["cost_usd"] == pytest.approx(0.2)
    assert total["cost_usd"] == pytest.approx(3.0)
    assert total["latency_s"] == {"p50": 1.0, "p90": 1.8, "p99": 1.98}
    assert (total["up"], total["in_flight"], total["limit"]) == (2, 3, 12)
    workers = [(it["address"], it["per_s"]["jobs_succeeded"], it["in_flight"]) for it in fleet.workers()]
    assert workers == [("a", 2.0, 2), ("b", 0.5, 1)]
    models = {it["model"]: (it["per_s"]["jobs_succeeded"], it["cost_usd"]) for it in fleet.models()}
    assert models == {"m/a": (2.0, 3.0), "m/b": (0.5, 0.0)}


def test_one_reading_gives_no_rate() -> None:
    total = total_of((0.0, {"a": sample(jobs=10, cost=1)}))
    assert (total["per_s"], set(total["latency_s"].values())) == (None, {None})
    assert total["cost_usd"] == 1.0


def test_old_readings_are_forgotten() -> None:
    observed = [(float(second), {"a": sample(jobs=1000 if second else 0)}) for second in range(0, 100, 5)]
    total = total_of(*observed)
    assert total["per_s"] is not None
    assert total["per_s"]["jobs_succeeded"] == 0
    fleet = fleet_of(*((float(second), {"a": sample(jobs=second)}) for second in range(1000)))
    assert fleet.total()["per_s"]["jobs_succeeded"] == pytest.approx(1.0)
    assert len(fleet.windows["a"]) <= WINDOW_S + 2


def test_a_restarted_worker_counts_from_zero() -> None:
    total = total_of(
        (0.0, {"a": sample(jobs=100, cost=5)}),
        (10.0, {"a": sample(jobs=110, cost=6)}),
        (20.0, {"a": sample(jobs=4, cost=0.5)}),
        (30.0, {"a": sample(jobs=14, cost=0.75)}),
    )
    assert total["per_s"]["jobs_succeeded"] == pytest.approx(1.0)
    assert total["cost_usd"] == pytest.approx(0.75)


def test_a_stopped_worker_counts_no_more_and_its_cost_is_kept() -> None:
    fleet = fleet_of(
        (0.0, {"a": sample(jobs=0, cost=1), "b": sample(jobs=0, cost=2)}),
        (10.0, {"a": sample(jobs=10, cost=1), "b": "connection refused"}),
    )
    up, away = fleet.workers()
    assert up["address"] == "a"
    assert away == {"address": "b", "error": "connection refused"}
    total = fleet.total()
    assert (total["up"], total["cost_usd"]) == (1, 3.0)
    assert total["per_s"]["jobs_succeeded"] == pytest.approx(1.0)


def test_paused_workers_are_counted_by_dependency() -> None:
    paused = ["model"]
    fleet = fleet_of((0.0, {"a": sample(paused=paused), "b": sample(paused=[*paused, "s3"]), "c": sample()}))
    assert fleet.total()["paused"] == {"model": 2, "s3": 1}
    assert [it["paused"] for it in fleet.workers()] == [["model"], ["model", "s3"], []]


def test_a_fleet_without_workers_has_figures_too() -> None:
    total = total_of((0.0, {}))
    assert (total["up"], total["per_s"], total["cost_usd"]) == (0, None, 0)


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


QUEUES = {"jobs": 1200, "retries": 3, "results": 1, "dead_letters": 2, "consumers": 4}
FLEET = fleet_of(
    (0.0, {"10.0.0.7:8080": sample(model=MODEL, cost=1.4)}),
    (
        100.0,
        {
            "10.0.0.7:8080": sample(jobs=1000, failed=50, model=MODEL, cost=1.5, in_flight=60, limit=64),
            "10.0.0.8:8080": sample(model=MODEL, limit=32, paused=["model"]),
            "10.0.0.9:8080": "connection refused",
        },
    ),
)


def test_the_tables_have_a_row_for_each_worker_and_each_model_and_fit_80_columns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = render.text(figures(QUEUES, FLEET)).split("\n")
    assert max(map(len, lines)) <= 80
    models, workers = (number for number, line in enumerate(lines) if line.startswith(("MODEL", "WORKER")))
    assert lines[models].split() == ["MODEL", "JOBS/S", "FAILED/S", "TOKENS/S", "P90", "COST", "$/H"]
    (model,) = lines[models + 1 : workers - 1]
    assert model.startswith("meta-llama/Llama")
    assert model.split()[1:] == ["10.0", "0.5", "1,000", "1.8", "s", "1.50", "3.60"]
    assert [line.split() for line in lines[workers:]] == [
        ["WORKER", "JOBS/S", "FAILED/S", "IN", "FLIGHT", "P90", "STATE"],
        ["10.0.0.7:8080", "10.0", "0.5", "60", "of", "64", "1.8", "s", "up"],
        ["10.0.0.8:8080", "0.0", "0.0", "0", "of", "32", "-", "paused", "for", "model"],
        ["10.0.0.9:8080", "-", "-", "-", "-", "unreachable:", "connection"],
        ["refused"],
    ]


def text(queues: Mapping[str, int | None] | None, fleet: Fleet | None, error: str = "") -> list[str]:
    return render.text(figures(queues, fleet, error)).split("\n")[1:]


def test_the_first_lines_are_the_queues_and_the_totals() -> None:
    assert text(QUEUES, FLEET)[:7] == [
        "queues   1,200 ready, 3 in retry, 2 dead-lettered, 1 results, 4 consumers",
        "workers  2 up, 1 unreachable",
        "jobs     10.0/s, 0.5/s failed, 60 in flight of 96, ETA 0:02:00",
        "latency  p50 1.0 s, p90 1.8 s, p99 2.0 s",
        "tokens   1,000 + 0/s",
        "cost     $1.5000 so far, $3.60/h",
        "paused   for model (1 of 2)",
    ]


def test_without_workers_only_the_queues_are_shown_and_a_broker_error_is_shown() -> None:
    hidden = dict.fromkeys(("retries", "results", "dead_letters"))
    assert text({"jobs": 7, **hidden, "consumers": 0}, None) == [
        "queues  7 ready, ? in retry, ? dead-lettered, ? results, 0 consumers"
    ]
    lines = text(None, FLEET, "it is away")
    assert lines[0] == "queues   it is away"
    assert "ETA" not in "".join(lines)


def test_json_output_has_numbers() -> None:
    printed = json.loads(json.dumps(figures(QUEUES, FLEET)))
    fleet = printed["fleet"]
    assert (fleet["up"], fleet["in_flight"], fleet["limit"], fleet["paused"]) == (2, 60, 96, {"model": 1})
    assert fleet["latency_s"] == {"p50": 1.0, "p90": 1.8, "p99": 1.98}
    assert [it["model"] for it in printed["models"]] == [MODEL]
    assert printed["models"][0]["per_s"]["jobs_failed"] == 0.5
    busy, paused, away = printed["workers"]
    assert (busy["error"], busy["in_flight"], busy["cost_usd"]) == (None, 60, 1.5)
    assert (paused["per_s"], paused["paused"]) == (None, ["model"])
    assert away == {"address": "10.0.0.9:8080", "error": "connection refused"}


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://host:1", "http://host:1/metrics"),
        ("host", f"http://host:{DEFAULT_PORT}/metrics"),
        ("host:9/some/where", "http://host:9/some/where"),
        ("http://[::1]:9/", "http://[::1]:9/metrics"),
    ],
)
def test_a_worker_s_url_may_be_short(text: str, url: str) -> None:
    assert str(parse_url(text)) == url


@pytest.mark.parametrize("text", ["", "https://host", "http://", "host:port", "http://host:99999", "[::1"])
def test_an_invalid_worker_url_is_reported(text: str) -> None:
    with pytest.raises(UsageError, match="is not a URL of a worker"):
        parse_url(text)


def test_the_default_port_is_the_worker_s() -> None:
    assert Settings.model_fields["http_port"].default == DEFAULT_PORT
