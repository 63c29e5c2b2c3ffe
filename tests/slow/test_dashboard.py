"""The dashboard: its form, and what each of its queries finds after every kind of failure."""

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
from tests import debian
from tests.running import until
from tests.seeing import board
from tests.seeing.prometheus import PACKAGES, Series
from tests.seeing.scene import NAMESPACE, TENANTS, Pace, Scene

BOARD = board.load()
TARGETS = list(board.targets(BOARD))
WINDOW_S = 8


def test_the_file_is_what_its_description_makes() -> None:
    assert board.FILE.read_text() == dashboard_json()
    assert main(["--check"]) == 0


def test_grafana_s_own_types_know_every_field_of_it() -> None:
    register_default_plugins()
    again = json.loads(json.dumps(Dashboard.from_json(board.load()), cls=JSONEncoder))
    assert again == BOARD


def test_the_types_would_tell_of_a_field_that_grafana_does_not_know() -> None:
    register_default_plugins()
    changed = board.load()
    changed["panels"][1]["fieldConfig"]["defaults"]["unitt"] = "s"
    assert json.loads(json.dumps(Dashboard.from_json(changed), cls=JSONEncoder)) != changed


def test_every_panel_has_an_id_of_its_own() -> None:
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)


def test_no_panel_covers_another_or_leaves_the_grid() -> None:
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


def test_the_rows_are_those_that_somebody_on_call_asks_for() -> None:
    rows = [panel["title"] for panel in BOARD["panels"] if panel["type"] == "row"]
    assert rows == [
        *("Service level", "Queue", "Jobs", "Stages", "Tokens and cost"),
        *("Provider", "Retries and dead letters", "Process"),
    ]


@pytest.mark.parametrize("panel", board.panels(BOARD), ids=lambda panel: f"{panel['id']} {panel['title']}")
def test_a_panel_has_title_meaning_unit_and_source(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert len(panel["description"]) > 10
    known = {value for name, value in vars(units).items() if name[0].isupper() and isinstance(value, str)}
    assert panel["fieldConfig"]["defaults"]["unit"] in known
    for place in (panel, *panel["targets"]):
        assert place["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    letters = [target["refId"] for target in panel["targets"]]
    assert len(set(letters)) == len(letters)


def test_queries_use_no_variable_that_the_dashboard_does_not_have() -> None:
    texts = [target.expr for target in TARGETS]
    used = {name for text in texts for name in re.findall(r"\$(\w+)", text)}
    grafana_s_own = {"__rate_interval", "__range"}
    assert used - grafana_s_own == set(board.variables(BOARD)) - {"datasource"}


@pytest.fixture(scope="module")
async def scene(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    """After half a minute of everything that can happen; Prometheus has scraped the end of it too."""
    debian.install(PACKAGES)
    async with Scene.set_up(stack, tmp_path_factory.mktemp("scene")) as scene:
        await scene.play(Pace())
        ended = time.time()
        await until(lambda: scene.prometheus.now(f"min(timestamp(up)) > {ended + 1}"), "the end was scraped")
        yield scene


def _values(scene: Scene) -> dict[str, str]:
    """What the variables are, with everything chosen that can be."""
    return {
        **dict.fromkeys(("namespace", "instance", "model"), ".*"),
        "queue": scene.worker.jobs_queue,
        "__rate_interval": f"{WINDOW_S}s",
        "__range": f"{time.time() - scene.began:.0f}s",
    }


def _found(scene: Scene, expr: str, *, is_instant: bool) -> list[Series]:
    asked = board.with_values(expr, _values(scene))
    if is_instant:
        return scene.prometheus.now(asked)
    return scene.prometheus.over(asked, scene.began, time.time())


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.title)
async def test_a_query_finds_something(scene: Scene, target: board.Target) -> None:
    found = _found(scene, target.expr, is_instant=target.is_instant)
    values = [value for series in found for _, value in series.points]
    assert any(map(math.isfinite, values)), "no data"
    assert min(value for value in values if math.isfinite(value)) >= 0
    names = [board.named(target.legend, series.labels) for series in found]
    if target.legend and target.legend != "__auto":
        assert all(names), "a series without a name"
        assert len(set(names)) == len(names), "series of one name"


# What the load must have brought about: a query that finds only zeros would show nothing else.
SEEN = {
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


@pytest.mark.parametrize("title", SEEN)
async def test_the_induced_failures_are_visible(scene: Scene, title: str) -> None:
    values = [
        value
        for target in TARGETS
        if target.panel["title"] == title
        for series in _found(scene, target.expr, is_instant=target.is_instant)
        for _, value in series.points
    ]
    assert any(map(SEEN[title], values))


async def test_the_variables_offer_what_there_is(scene: Scene) -> None:
    values, offered = _values(scene), {}
    for name, variable in board.variables(BOARD).items():
        if variable["type"] == "query":
            asked = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"])
            assert asked is not None
            selector = board.with_values(asked[1], values)
            offered[name] = scene.prometheus.values_of(asked[2], selector)
    assert offered["namespace"] == [NAMESPACE]
    assert offered["instance"] == [f"127.0.0.1:{scene.worker.port}"]
    assert set(offered["model"]) == {*scene.stack.model.models, "unknown"}
    own = board.variables(BOARD)["queue"]["regex"].strip("/")
    prefix = scene.worker.jobs_queue.removesuffix(".jobs")
    queues = [queue for queue in offered["queue"] if queue.startswith(prefix) and re.search(own, queue)]
    assert queues == [scene.worker.jobs_queue, scene.worker.results_queue]


async def test_costs_by_tenant_are_all_that_was_spent(scene: Scene) -> None:
    (total,) = scene.prometheus.now("sum(vqa_cost_usd_total)")
    by_tenant = {
        series.labels["tenant"]: series.points[0][1]
        for series in scene.prometheus.now("sum by (tenant) (vqa_tenant_cost_usd_total)")
    }
    assert by_tenant.keys() == {*TENANTS, "other"}
    assert min(by_tenant.values()) > 0
    assert sum(by_tenant.values()) == pytest.approx(total.points[0][1])


async def test_the_broker_shows_the_metrics_that_are_listed(scene: Scene) -> None:
    for name in BROKER_METRICS:
        assert scene.prometheus.now(f'{name}{{queue="{scene.worker.jobs_queue}"}}'), name


async def test_the_recording_rules_find_something_and_all_rules_are_well(scene: Scene) -> None:
    rules = scene.prometheus.rules()
    assert {rule["name"]: rule["health"] for rule in rules if rule["health"] != "ok"} == {}
    for rule in rules:
        if rule["type"] == "recording":
            assert scene.prometheus.now(rule["name"]), rule["name"]


async def test_an_alert_fires_for_what_happened(scene: Scene) -> None:
    def reasons() -> set[str]:
        firing = scene.prometheus.now('ALERTS{alertname="VqaWorkerDeadLetters", alertstate="firing"}')
        return {series.labels["reason"] for series in firing}

    await until(lambda: reasons() == {"attempts_exhausted", "invalid_job"}, "it fires for both")
    (rule,) = [rule for rule in scene.prometheus.rules() if rule["name"] == "VqaWorkerDeadLetters"]
    assert rule["state"] == "firing"
