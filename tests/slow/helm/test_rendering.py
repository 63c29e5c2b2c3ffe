"""Each `ci/` file of the chart, rendered and linted by Helm."""

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


def test_the_ci_files() -> None:
    assert NAMES == ["airgapped", "full", "hpa", "keda", "minimal"]


@every_ci_file
def test_helm_lint_passes(name: str) -> None:
    report = helm.chart.lint(CHART, ci_values(name), strict=True)
    assert report["errors"] == []
    # The chart has no icon.
    assert [message["error"] for message in report["messages"]] == ["icon is recommended"]


@every_ci_file
def test_all_objects_match_their_schemas(name: str) -> None:
    objects = render(ci_values(name)).objects
    assert [fault for found in objects for fault in faults(found)] == []


def test_all_kinds_are_rendered() -> None:
    kinds = {found["kind"] for name in NAMES for found in render(ci_values(name)).objects}
    assert kinds == {
        "ConfigMap",
        "Deployment",
        "HorizontalPodAutoscaler",
        "Job",
        "NetworkPolicy",
        "Pod",
        "PodDisruptionBudget",
        "PodMonitor",
        "PrometheusRule",
        "ScaledObject",
        "Secret",
        "ServiceAccount",
        "TriggerAuthentication",
    }


@pytest.mark.skipif(
    not CRDS.is_dir(), reason="the CRDs of KEDA and the Prometheus operator are not available"
)
@pytest.mark.parametrize("kind", CUSTOM_KINDS)
def test_an_unknown_field_of_a_custom_resource_is_detected(kind: str) -> None:
    found = render(ci_values("full")).one(kind)
    assert faults(found) == []
    found["spec"]["replicaz"] = 1
    assert any("replicaz" in fault for fault in faults(found))


def test_an_unknown_field_of_a_kubernetes_object_is_detected() -> None:
    found = render(minimal()).one("Deployment")
    found["spec"]["template"]["spec"]["containers"][0]["livenessProb"] = {}
    assert [fault.split()[2] for fault in faults(found)] == list(KUBERNETES_VERSIONS)


def test_the_oldest_supported_kubernetes_version_is_checked() -> None:
    assert helm.Chart.load(CHART).metadata["kubeVersion"] == f">={KUBERNETES_VERSIONS[0]}.0-0"


def test_the_chart_has_the_worker_s_version() -> None:
    assert helm.Chart.load(CHART).metadata["appVersion"] == __version__
    assert render(minimal()).container["image"] == f"vqa-worker:{__version__}"


@every_ci_file
def test_the_golden_files_are_up_to_date(name: str) -> None:
    """After an intended change run `make golden` and review the difference."""
    for path, text in goldens.of(name).items():
        assert path.is_file(), f"{path.name} is missing: run `make golden`"
        assert path.read_text() == text, f"{path.name} differs: run `make golden` and review the difference"


def test_there_are_no_obsolete_golden_files() -> None:
    wanted = {path for name in NAMES for path in goldens.of(name)}
    assert set(goldens.FOLDER.iterdir()) == wanted


def test_a_duplicate_key_is_detected() -> None:
    with pytest.raises(AssertionError, match=r"duplicate keys: \{'name'\}"):
        list(objects_in("metadata:\n  name: one\n  name: two\n"))


@every_ci_file
def test_all_objects_are_in_the_namespace_and_have_unique_names(name: str) -> None:
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


def test_rules_and_dashboard_are_rendered_unchanged() -> None:
    """Their double braces must not be evaluated by Helm."""
    rendered = render(ci_values("full"))
    rules = (CHART / "files" / "vqa-worker.rules.yaml").read_text()
    assert "{{" in rules
    usual = render(minimal({"prometheusRule": {"enabled": True}}))
    assert usual.one("PrometheusRule")["spec"] == yaml.safe_load(rules)
    dashboard = (CHART / "files" / "vqa-worker.json").read_text()
    assert "{{" in dashboard
    data = rendered.one("ConfigMap", "questions-dashboard")["data"]
    assert data["vqa-worker.json"].rstrip("\n") == dashboard.rstrip("\n")


def test_the_rules_are_customised_by_values() -> None:
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


def test_custom_resources_are_disabled_by_default() -> None:
    kinds = {found["kind"] for found in render(minimal()).objects}
    assert kinds.isdisjoint(CUSTOM_KINDS)
    assert "dashboard.yaml" not in _written(render(minimal()))


def _written(rendered: Rendered) -> set[str]:
    return {name for name, text in rendered.texts.items() if text.strip()}


@pytest.mark.parametrize("part", ["podMonitor", "prometheusRule", "dashboard"])
def test_labels_can_be_added_to_monitoring_objects(part: str) -> None:
    labels = {"release": "kube-prometheus-stack"}
    rendered = render(minimal({part: {"enabled": True, "additionalLabels": labels}}))
    kind = {"dashboard": "ConfigMap"}.get(part, part[0].upper() + part[1:])
    name = "demo-vqa-worker-dashboard" if part == "dashboard" else None
    shown: dict[str, Any] = rendered.one(kind, name)["metadata"]["labels"]
    assert labels.items() <= shown.items()
    assert (part == "dashboard") == ("grafana_dashboard" in shown)


def test_extra_objects_can_be_objects_or_templates() -> None:
    added = [
        found for found in render(ci_values("full")).all("ConfigMap") if "extra" in found["metadata"]["name"]
    ]
    assert [found["metadata"]["name"] for found in added] == ["questions-extra", "extra-as-text"]
    assert added[0]["data"] == {"namespace": "vision"}
