"""The programs helm 3, helm 4 and kubectl render the chart as Helm's library does."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.slow.helm.programs import KUBERNETES_OF_HELM, Programs, programs
from tests.slow.helm.rendering import CHART, CI_FILES, Object, ci_values, objects_in, render

HOOK = "helm.sh/hook"
TEMPLATE = ("template", "demo", "--namespace=vision")
every_ci_file = pytest.mark.parametrize("file", CI_FILES, ids=lambda file: file.name)


@pytest.fixture(scope="module", params=sorted(KUBERNETES_OF_HELM), ids=lambda release: f"helm {release}")
def release(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def programs_of(release: str, tmp_path_factory: pytest.TempPathFactory) -> Programs:
    return programs(release, tmp_path_factory.mktemp("home"))


def _rendered(file: Path) -> list[Object]:
    return _sorted(render(ci_values(file.name.removesuffix("-values.yaml"))).objects)


def _sorted(objects: list[Object]) -> list[Object]:
    return sorted(objects, key=lambda it: (it["kind"], it["metadata"]["name"]))


def _is_hook(found: Object) -> bool:
    return HOOK in found["metadata"].get("annotations", {})


def test_the_program_is_of_the_release(programs_of: Programs, release: str) -> None:
    assert programs_of.helm("version", "--template={{.Version}}").startswith(f"v{release}.")


def test_the_default_values_pass_lint(programs_of: Programs) -> None:
    """In lint mode Helm goes on after the chart's error about required values."""
    assert "[ERROR]" not in programs_of.helm("lint", "--strict", CHART)


@every_ci_file
def test_the_ci_files_pass_lint(programs_of: Programs, file: Path) -> None:
    output = programs_of.helm("lint", "--strict", CHART, f"--values={file}")
    messages = [line for line in output.splitlines() if line.startswith("[")]
    assert messages == ["[INFO] Chart.yaml: icon is recommended"]


@every_ci_file
def test_a_template_is_rendered_as_by_the_library(programs_of: Programs, file: Path) -> None:
    output = programs_of.helm(*TEMPLATE, CHART, f"--values={file}")
    assert _sorted(list(objects_in(output))) == _rendered(file)


@every_ci_file
def test_the_packaged_chart_is_rendered_as_by_the_library(
    programs_of: Programs, file: Path, tmp_path: Path
) -> None:
    programs_of.helm("package", CHART, f"--destination={tmp_path}")
    (archive,) = tmp_path.glob("vqa-worker-*.tgz")
    output = programs_of.helm(*TEMPLATE, archive, f"--values={file}")
    assert _sorted(list(objects_in(output))) == _rendered(file)


@every_ci_file
def test_the_hooks_can_be_left_out_or_rendered_alone(programs_of: Programs, file: Path) -> None:
    output = programs_of.helm(*TEMPLATE, CHART, f"--values={file}", "--no-hooks")
    assert _sorted(list(objects_in(output))) == [it for it in _rendered(file) if not _is_hook(it)]
    check = programs_of.helm(*TEMPLATE, CHART, f"--values={file}", "--show-only=templates/tests/check.yaml")
    assert list(objects_in(check)) == [it for it in _rendered(file) if it["kind"] == "Pod"]
    before = [it for it in _rendered(file) if _is_hook(it) and it["kind"] != "Pod"]
    if before:
        alone = programs_of.helm(
            *TEMPLATE, CHART, f"--values={file}", "--show-only=templates/topology-hook.yaml"
        )
        assert _sorted(list(objects_in(alone))) == before


@every_ci_file
def test_the_pod_of_helm_test_can_be_left_out(programs_of: Programs, file: Path) -> None:
    output = programs_of.helm(*TEMPLATE, CHART, f"--values={file}", "--skip-tests")
    assert _sorted(list(objects_in(output))) == [it for it in _rendered(file) if it["kind"] != "Pod"]


def test_values_can_be_set_on_the_command_line(programs_of: Programs) -> None:
    changes = ("--set=settings.maxJobBytes=32000000", '--set-json=settings.prices={"a/model": [0.1, 0.2]}')
    output = programs_of.helm(*TEMPLATE, CHART, f"--values={CHART / 'ci' / 'minimal-values.yaml'}", *changes)
    (data,) = (it["data"] for it in objects_in(output) if it["kind"] == "ConfigMap")
    assert data["VQA_MAX_JOB_BYTES"] == "32000000"
    assert yaml.safe_load(data["VQA_PRICES"]) == {"a/model": [0.1, 0.2]}


def test_required_values_are_listed(programs_of: Programs) -> None:
    error = programs_of.error_of_helm(*TEMPLATE, CHART)
    assert "settings.allowedBuckets is empty" in error
    assert "secrets.modelApiKey is empty" in error


def test_a_value_of_a_wrong_type_is_rejected_by_the_schema(programs_of: Programs) -> None:
    file = CHART / "ci" / "minimal-values.yaml"
    error = programs_of.error_of_helm(
        *TEMPLATE, CHART, f"--values={file}", "--set=settings.maxConcurrency=many"
    )
    assert "values don't meet the specifications of the schema" in error
    assert "maxConcurrency" in error


def test_an_old_kubernetes_is_rejected(programs_of: Programs) -> None:
    file = CHART / "ci" / "minimal-values.yaml"
    error = programs_of.error_of_helm(*TEMPLATE, CHART, f"--values={file}", "--kube-version=1.28")
    assert "chart requires kubeVersion: >=1.29.0-0" in error


@every_ci_file
def test_kustomize_renders_the_chart(programs_of: Programs, file: Path, tmp_path: Path) -> None:
    (tmp_path / "charts").mkdir()
    (tmp_path / "charts" / CHART.name).symlink_to(CHART)
    values = tmp_path / "values.yaml"
    values.write_text(file.read_text())
    inflated: dict[str, Any] = {
        "name": CHART.name,
        "releaseName": "demo",
        "namespace": "vision",
        "valuesFile": values.name,
    }
    kustomization = {"helmGlobals": {"chartHome": "charts"}, "helmCharts": [inflated]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    output = programs_of.kubectl(
        "kustomize", "--enable-helm", f"--helm-command={programs_of.helm_path}", tmp_path
    )
    assert _sorted(list(objects_in(output))) == _rendered(file)
