"""Each of the chart's `ci/` files, rendered and linted by Helm itself."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.slow.helm import goldens
from tests.slow.helm.rendering import (
    CHART,
    CI_FILES,
    CRDS,
    CUSTOM_KINDS,
    KUBERNETES_VERSIONS,
    Rendered,
    ci_values,
    faults,
    helm,
    minimal,
    objects_in,
    render,
)
from worker import __version__

NAMES = [path.name.removesuffix("-values.yaml") for path in CI_FILES]
every_ci_file = pytest.mark.parametrize("name", NAMES)


def test_there_is_a_file_of_values_for_every_way_to_run_it() -> None:
    assert NAMES == ["airgapped", "full", "hpa", "keda", "minimal"]


@every_ci_file
def test_lint_has_nothing_to_say(name: str) -> None:
    report = helm.chart.lint(CHART, ci_values(name), strict=True)
    assert report["errors"] == []
    # There is no icon, and none is needed.
    assert [message["error"] for message in report["messages"]] == ["icon is recommended"]


@every_ci_file
def test_kubernetes_knows_every_field_of_every_object(name: str) -> None:
    objects = render(ci_values(name)).objects
    assert [fault for found in objects for fault in faults(found)] == []


def test_all_kinds_are_among_what_is_checked() -> None:
    kinds = {found["kind"] for name in NAMES for found in render(ci_values(name)).objects}
    assert kinds == {
        "ConfigMap",
        "Deployment",
        "HorizontalPodAutoscaler",
        "Job",
        "NetworkPolicy",
        "PodDisruptionBudget",
        "PodMonitor",
        "PrometheusRule",
        "ScaledObject",
        "Secret",
        "ServiceAccount",
        "TriggerAuthentication",
    }


@pytest.mark.skipif(
    not CRDS.is_dir(), reason="the definitions of KEDA's and Prometheus' kinds are not next to this copy"
)
@pytest.mark.parametrize("kind", CUSTOM_KINDS)
def test_a_field_that_a_custom_kind_does_not_know_is_found(kind: str) -> None:
    found = render(ci_values("full")).one(kind)
    assert faults(found) == []
    found["spec"]["replicaz"] = 1
    assert any("replicaz" in fault for fault in faults(found))


def test_a_field_that_kubernetes_does_not_know_is_found() -> None:
    found = render(minimal()).one("Deployment")
    found["spec"]["template"]["spec"]["containers"][0]["livenessProb"] = {}
    assert [fault.split()[2] for fault in faults(found)] == list(KUBERNETES_VERSIONS)


def test_the_oldest_version_that_is_checked_is_the_oldest_that_the_chart_allows() -> None:
    assert helm.Chart.load(CHART).metadata["kubeVersion"] == f">={KUBERNETES_VERSIONS[0]}.0-0"


def test_the_chart_is_of_the_workers_version() -> None:
    assert helm.Chart.load(CHART).metadata["appVersion"] == __version__
    assert render(minimal()).container["image"] == f"vqa-worker:{__version__}"


@every_ci_file
def test_what_comes_out_is_what_was_reviewed(name: str) -> None:
    """After a change on purpose: `make golden`, and look at the difference."""
    for path, text in goldens.of(name).items():
        assert path.is_file(), f"{path.name} is missing: run `make golden`"
        assert path.read_text() == text, (
            f"{path.name} differs: run `make golden` and look at what has changed"
        )


def test_there_is_no_golden_file_too_many() -> None:
    wanted = {path for name in NAMES for path in goldens.of(name)}
    assert set(goldens.FOLDER.iterdir()) == wanted


def test_a_key_that_is_given_twice_would_be_noticed() -> None:
    with pytest.raises(AssertionError, match=r"given twice: \{'name'\}"):
        list(objects_in("metadata:\n  name: one\n  name: two\n"))


@every_ci_file
def test_all_objects_are_in_the_namespace_and_no_two_of_one_kind_have_one_name(name: str) -> None:
    objects = [
        found for found in render(ci_values(name)).objects if "-extra" not in found["metadata"]["name"]
    ]
    own = [found for found in objects if "namespace" in found["metadata"]]
    assert {found["metadata"]["namespace"] for found in own} == {"vision"}
    names = [(found["kind"], found["metadata"]["name"]) for found in objects]
    assert len(names) == len(set(names))


def test_the_packaged_chart_renders_the_same(tmp_path: Path) -> None:
    archive = helm.chart.package(CHART, destination=tmp_path)
    with helm.Chart.load(archive) as packaged:
        texts = packaged.render(ci_values("full"), name="demo", namespace="vision")
    rendered = render(ci_values("full")).texts
    assert {path.removeprefix("vqa-worker/templates/"): text for path, text in texts.items()} == rendered


def test_rules_and_dashboard_reach_the_cluster_as_they_are() -> None:
    """Their double braces are Prometheus' and Grafana's, not Helm's."""
    rendered = render(ci_values("full"))
    rules = (CHART / "files" / "vqa-worker.rules.yaml").read_text()
    assert "{{" in rules
    usual = render(minimal({"prometheusRule": {"enabled": True}}))
    assert usual.one("PrometheusRule")["spec"] == yaml.safe_load(rules)
    dashboard = (CHART / "files" / "vqa-worker.json").read_text()
    assert "{{" in dashboard
    data = rendered.one("ConfigMap", "questions-dashboard")["data"]
    assert data["vqa-worker.json"].rstrip("\n") == dashboard.rstrip("\n")


def test_what_is_the_user_s_own_in_the_rules_comes_from_the_values() -> None:
    rules = (CHART / "files" / "vqa-worker.rules.yaml").read_text()
    changed = {
        "settings": {"jobsQueue": "questions"},
        "prometheusRule": {
            "enabled": True,
            "costPerHour": 7.5,
            "runbookBaseUrl": "https://git.example/vqa-worker/blob/main/",
        },
    }
    expected = (
        rules.replace('queue="vqa.jobs"', 'queue="questions"')
        .replace("vector(20)", "vector(7.5)")
        .replace("docs/runbook.md#", "https://git.example/vqa-worker/blob/main/docs/runbook.md#")
    )
    spec = render(minimal(changed)).one("PrometheusRule")["spec"]
    assert spec == yaml.safe_load(expected)
    assert "vqa.jobs" not in str(spec)


def test_what_needs_other_peoples_kinds_is_off_unless_asked_for() -> None:
    kinds = {found["kind"] for found in render(minimal()).objects}
    assert kinds.isdisjoint(CUSTOM_KINDS)
    assert "dashboard.yaml" not in _written(render(minimal()))


def _written(rendered: Rendered) -> set[str]:
    return {name for name, text in rendered.texts.items() if text.strip()}


@pytest.mark.parametrize("part", ["podMonitor", "prometheusRule", "dashboard"])
def test_labels_can_be_added_to_what_others_select_by_labels(part: str) -> None:
    labels = {"release": "kube-prometheus-stack"}
    rendered = render(minimal({part: {"enabled": True, "additionalLabels": labels}}))
    kind = {"dashboard": "ConfigMap"}.get(part, part[0].upper() + part[1:])
    name = "demo-vqa-worker-dashboard" if part == "dashboard" else None
    shown: dict[str, Any] = rendered.one(kind, name)["metadata"]["labels"]
    assert labels.items() <= shown.items()
    assert (part == "dashboard") == ("grafana_dashboard" in shown)


def test_objects_of_ones_own_are_added_as_objects_and_as_text() -> None:
    added = [
        found for found in render(ci_values("full")).all("ConfigMap") if "extra" in found["metadata"]["name"]
    ]
    assert [found["metadata"]["name"] for found in added] == ["questions-extra", "extra-as-text"]
    assert added[0]["data"] == {"namespace": "vision"}
