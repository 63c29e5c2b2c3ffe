"""Code, docs, dashboard, alerts and runbook use the same metric names."""

import re
import subprocess
import urllib.request
from collections.abc import Iterator, Mapping

import pytest
from prometheus_client.parser import text_string_to_metric_families

from deploy.local.stack import Stack
from docs.generate import BROKER_METRICS, PROCESS_METRICS
from tests.observability import dashboard, promql, rules
from tests.observability.prometheus import installed
from tests.running import ROOT, Worker, until
from worker.errors import NEUTRAL_FAILURES, SERVICE_FAILURES
from worker.observability.metrics import DECLARED

PAGE = (ROOT / "docs" / "metrics.md").read_text()
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()

# The names on /metrics if the broker is configured to return metrics per object.
PER_OBJECT = {name.replace("_detailed", "") for name in BROKER_METRICS}
OF_KUBERNETES = {"container_cpu_cfs_throttled_periods_total"}
# Labels that Prometheus adds to each scraped target.
ADDED_LABELS = {"job", "instance", "namespace"}


def _queries() -> Iterator[tuple[str, str]]:
    """Yield every query of the project and its location."""
    loaded = dashboard.load()
    for target in dashboard.targets(loaded):
        yield f"panel {target.panel['title']}", target.expr
    for annotation in loaded["annotations"]["list"]:
        yield f"annotation {annotation['name']}", annotation["expr"]
    for name, variable in dashboard.variables(loaded).items():
        asked = re.fullmatch(r"label_values\((\w.*), \w+\)", variable["query"])
        if asked is not None:
            yield f"variable {name}", asked[1]
    for rule in rules.all_rules():
        yield f"rule {rule.get('alert') or rule['record']}", rule["expr"]
    for block in re.findall(r"```promql\n(.*?)```", RUNBOOK, re.DOTALL):
        for line in block.splitlines():
            yield "runbook", line


QUERIES = sorted({f"{where}: {expr}": expr for where, expr in _queries()}.items())


def test_there_are_queries_of_every_kind() -> None:
    kinds = {where.split(":")[0].split(" ")[0] for where, _ in QUERIES}
    assert kinds == {"panel", "annotation", "variable", "rule", "runbook"}


@pytest.mark.parametrize("expr", [expr for _, expr in QUERIES], ids=[where for where, _ in QUERIES])
def test_every_query_uses_existing_metrics(expr: str) -> None:
    names = {promql.family_of(name) if name not in DECLARED else name for name in promql.names_in(expr)}
    others = {*PROCESS_METRICS, *BROKER_METRICS, *PER_OBJECT, *OF_KUBERNETES, *promql.BUILT_IN}
    assert names <= {*DECLARED, *others, *rules.records()}


@pytest.mark.parametrize("expr", [expr for _, expr in QUERIES], ids=[where for where, _ in QUERIES])
def test_every_query_uses_existing_labels_of_its_metrics(expr: str) -> None:
    for name, used in promql.labels_in(expr).items():
        metric = DECLARED.get(promql.family_of(name))
        if metric is not None:
            own = {label.name for label in metric.labels}
            assert used <= own | ADDED_LABELS, name


def test_queries_use_histogram_suffixes_for_histograms_only() -> None:
    for _, expr in QUERIES:
        for name in promql.names_in(expr):
            metric = DECLARED.get(promql.family_of(name))
            if metric is not None:
                assert (metric.kind == "histogram") == (name != metric.name), name


def test_an_unknown_name_is_detected() -> None:
    assert promql.names_in("sum(rate(no_such_total[$__rate_interval])) / up offset 5m") == {
        "no_such_total",
        "up",
    }
    with pytest.raises(ValueError, match="without a name"):
        promql.names_in('{queue="x"}')


def test_error_codes_in_queries_are_those_that_the_code_attributes_to_the_service() -> None:
    """Alert rules and dashboard contain the codes as text."""
    bad, nothing = "|".join(sorted(SERVICE_FAILURES)), "|".join(sorted(NEUTRAL_FAILURES))
    allowed = {bad, f"({bad})?", nothing, f"{bad}|{nothing}"}
    shown = {code for _, expr in QUERIES for code in re.findall(r'\berror[!=~]+"([^"]+)"', expr)}
    assert shown == allowed


def test_every_metric_is_documented_once() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert rows == [*DECLARED, *PROCESS_METRICS, *BROKER_METRICS]


def test_the_values_of_every_label_are_documented() -> None:
    for metric in DECLARED.values():
        assert metric.meaning, metric.name
        for label in metric.labels:
            assert label.values, (metric.name, label.name)
            assert f"`{label.name}`: {label.values}" in PAGE


def _families(exposition: str) -> Mapping[str, str]:
    """Return the names and types of the exposed metrics, in the form of the docs."""
    families = text_string_to_metric_families(exposition)
    return {family.name + ("_total" if family.type == "counter" else ""): family.type for family in families}


def test_a_worker_exposes_exactly_the_documented_metrics(worker: Worker) -> None:
    expected = {
        **{name: metric.kind.replace("info", "gauge") for name, metric in DECLARED.items()},
        **{name: kind for name, (kind, *_) in PROCESS_METRICS.items()},
    }
    assert _families(worker.get("/metrics")[1]) == expected


def test_promtool_accepts_the_exposition_of_a_worker(worker: Worker) -> None:
    exposition = worker.get("/metrics")[1]
    done = subprocess.run(  # noqa: S603 - of Prometheus
        [installed().promtool, "check", "metrics"],
        input=exposition,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


async def test_the_broker_also_exposes_the_other_names(stack: Stack, worker: Worker) -> None:
    url = f"{stack.rabbitmq.prometheus_url}/metrics/per-object"

    def missing() -> list[str]:
        with urllib.request.urlopen(url, timeout=30) as response:  # noqa: S310 - on this machine
            exposition = response.read().decode()
        of_the_queue = rf'{{[^}}]*queue="{worker.jobs_queue}"'
        return [it for it in PER_OBJECT if not re.search(f"^{it}{of_the_queue}", exposition, re.MULTILINE)]

    # The broker collects them every few seconds.
    await until(lambda: not missing(), "all names are exposed")
