"""The dashboard is valid, and its queries return data after every kind of failure."""

import json
import math
import re
import time
from collections.abc import AsyncIterator
from itertools import combinations
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.__main__ import main
from deploy.grafana.build import dashboard_json
from deploy.local.stack import Stack
from docs.generate import BROKER_METRICS
from tests.observability import dashboard
from tests.observability.load import NAMESPACE, TENANTS, Durations, ObservedWorker
from tests.observability.prometheus import RELEASES, Series
from tests.running import until

BOARD = dashboard.load()
TARGETS = list(dashboard.targets(BOARD))
WINDOW_S = 8


def test_the_file_is_up_to_date() -> None:
    assert dashboard.FILE.read_text() == dashboard_json()
    assert main(["--check"]) == 0


def test_grafana_s_types_have_every_field() -> None:
    register_default_plugins()
    again = json.loads(json.dumps(Dashboard.from_json(dashboard.load()), cls=JSONEncoder))
    assert again == BOARD


def test_an_unknown_field_is_detected() -> None:
    register_default_plugins()
    changed = dashboard.load()
    changed["panels"][1]["fieldConfig"]["defaults"]["unitt"] = "s"
    assert json.loads(json.dumps(Dashboard.from_json(changed), cls=JSONEncoder)) != changed


def test_panel_ids_are_unique() -> None:
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)


def test_panels_are_within_the_grid_and_do_not_overlap() -> None:
    places = [panel["gridPos"] for panel in BOARD["panels"]]
    assert all(place["x"] >= 0 and place["x"] + place["w"] <= 24 for place in places)
    covering = [pair for pair in combinations(places, 2) if _overlap(*pair)]
    assert covering == []


def _overlap(one: dict[str, int], other: dict[str, int]) -> bool:
    return (
        one["x"] < other["x"] + other["w"]
        and other["x"] < one["x"] + one["w"]
        and one["y"] < other["y"] + other["h"]
        and other["y"] < one["y"] + one["h"]
    )


def test_the_rows() -> None:
    rows = [panel["title"] for panel in BOARD["panels"] if panel["type"] == "row"]
    assert rows == [
        *("Service level", "Queue", "Jobs", "Stages", "Tokens and cost"),
        *("Provider", "Retries and dead letters", "Process"),
    ]


@pytest.mark.parametrize(
    "panel", dashboard.panels(BOARD), ids=lambda panel: f"{panel['id']} {panel['title']}"
)
def test_a_panel_has_a_title_a_description_a_unit_and_a_data_source(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert len(panel["description"]) > 10
    known = {value for name, value in vars(units).items() if name[0].isupper() and isinstance(value, str)}
    assert panel["fieldConfig"]["defaults"]["unit"] in known
    for place in (panel, *panel["targets"]):
        assert place["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    ref_ids = [target["refId"] for target in panel["targets"]]
    assert len(set(ref_ids)) == len(ref_ids)


def test_queries_use_only_variables_of_the_dashboard() -> None:
    texts = [target.expr for target in TARGETS]
    used = {name for text in texts for name in re.findall(r"\$(\w+)", text)}
    grafana_s_own = {"__rate_interval", "__range"}
    assert used - grafana_s_own == set(dashboard.variables(BOARD)) - {"datasource"}


@pytest.fixture(scope="module", params=RELEASES, ids=lambda name: f"Prometheus {name}")
async def observed(
    request: pytest.FixtureRequest, stack: Stack, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[ObservedWorker]:
    """A worker after a load with all kinds of failures, scraped until its end."""
    release = RELEASES[request.param]()
    async with ObservedWorker.set_up(stack, tmp_path_factory.mktemp("observed"), release) as observed:
        await observed.run(Durations())
        ended = time.time()
        await until(
            lambda: observed.prometheus.query(f"min(timestamp(up)) > {ended + 1}"), "the end was scraped"
        )
        yield observed


def _values(observed: ObservedWorker) -> dict[str, str]:
    """Return the values of the variables, with all options selected."""
    return {
        **dict.fromkeys(("namespace", "instance", "model"), ".*"),
        "queue": observed.worker.jobs_queue,
        "__rate_interval": f"{WINDOW_S}s",
        "__range": f"{time.time() - observed.started:.0f}s",
    }


def _found(observed: ObservedWorker, expr: str, *, is_instant: bool) -> list[Series]:
    query = dashboard.with_values(expr, _values(observed))
    if is_instant:
        return observed.prometheus.query(query)
    return observed.prometheus.query_range(query, observed.started, time.time())


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.title)
async def test_a_query_returns_data(observed: ObservedWorker, target: dashboard.Target) -> None:
    found = _found(observed, target.expr, is_instant=target.is_instant)
    values = [value for series in found for _, value in series.points]
    assert any(map(math.isfinite, values)), "no data"
    assert min(value for value in values if math.isfinite(value)) >= 0
    names = [dashboard.named(target.legend, series.labels) for series in found]
    if target.legend and target.legend != "__auto":
        assert all(names), "a series without a name"
        assert len(set(names)) == len(names), "series of one name"


# Conditions on values that the load must have caused.
EXPECTED = {
    "Success ratio": lambda value: 0 < value < 1,
    "Jobs by outcome": lambda value: value > 0,
    "Rate-limited requests (429)": lambda value: value > 0,
    "Retries by reason": lambda value: value > 0,
    "Dead letters by reason": lambda value: value > 0,
    "Dependency status": lambda value: value == 0,
    "Messages": lambda value: value > 0,
    "Requests with unknown outcome": lambda value: value > 0,
    "Requeued jobs; result store": lambda value: value > 0,
    "Cost per hour, by tenant": lambda value: value > 0,
}


@pytest.mark.parametrize("title", EXPECTED)
async def test_the_induced_failures_are_visible(observed: ObservedWorker, title: str) -> None:
    values = [
        value
        for target in TARGETS
        if target.panel["title"] == title
        for series in _found(observed, target.expr, is_instant=target.is_instant)
        for _, value in series.points
    ]
    assert any(map(EXPECTED[title], values))


async def test_the_variables_list_existing_values(observed: ObservedWorker) -> None:
    values, offered = _values(observed), {}
    for name, variable in dashboard.variables(BOARD).items():
        if variable["type"] == "query":
            query = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"])
            assert query is not None
            selector = dashboard.with_values(query[1], values)
            offered[name] = observed.prometheus.values_of(query[2], selector)
    assert offered["namespace"] == [NAMESPACE]
    assert offered["instance"] == [f"127.0.0.1:{observed.worker.port}"]
    assert set(offered["model"]) == {*observed.stack.model.models, "unknown"}
    own = dashboard.variables(BOARD)["queue"]["regex"].strip("/")
    prefix = observed.worker.jobs_queue.removesuffix(".jobs")
    queues = [queue for queue in offered["queue"] if queue.startswith(prefix) and re.search(own, queue)]
    assert queues == [observed.worker.jobs_queue, observed.worker.results_queue]


async def test_costs_by_tenant_add_up_to_the_total(observed: ObservedWorker) -> None:
    (total,) = observed.prometheus.query("sum(vqa_cost_usd_total)")
    by_tenant = {
        series.labels["tenant"]: series.points[0][1]
        for series in observed.prometheus.query("sum by (tenant) (vqa_tenant_cost_usd_total)")
    }
    assert by_tenant.keys() == {*TENANTS, "other"}
    assert min(by_tenant.values()) > 0
    assert sum(by_tenant.values()) == pytest.approx(total.points[0][1])


async def test_the_broker_exposes_the_listed_metrics(observed: ObservedWorker) -> None:
    for name in BROKER_METRICS:
        assert observed.prometheus.query(f'{name}{{queue="{observed.worker.jobs_queue}"}}'), name


async def test_all_rules_are_healthy_and_recording_rules_return_data(observed: ObservedWorker) -> None:
    rules = observed.prometheus.rules()
    assert {rule["name"]: rule["health"] for rule in rules if rule["health"] != "ok"} == {}
    for rule in rules:
        if rule["type"] == "recording":
            assert observed.prometheus.query(rule["name"]), rule["name"]


async def test_an_alert_fires_for_dead_letters(observed: ObservedWorker) -> None:
    def reasons() -> set[str]:
        firing = observed.prometheus.query('ALERTS{alertname="VqaWorkerDeadLetters", alertstate="firing"}')
        return {series.labels["reason"] for series in firing}

    await until(lambda: reasons() == {"attempts_exhausted", "invalid_job"}, "it fires for both")
    (rule,) = [rule for rule in observed.prometheus.rules() if rule["name"] == "VqaWorkerDeadLetters"]
    assert rule["state"] == "firing"
