"""The alerts are valid, fire when they should, and have a section in the runbook."""

import re
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from tests.observability import rules
from tests.observability.prometheus import RELEASES, RULES, release_3
from tests.running import ROOT

RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()
ALERTS = rules.alerts()
NAMES = {alert["alert"] for alert in ALERTS}
TESTS = yaml.safe_load(rules.TESTS.read_text())


@pytest.fixture(scope="module", params=RELEASES, ids=lambda name: f"Prometheus {name}")
def promtool(request: pytest.FixtureRequest) -> Callable[..., str]:
    program = RELEASES[request.param]().promtool

    def run(*arguments: str) -> str:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)  # noqa: S603 - of Prometheus
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_promtool_accepts_the_rules(promtool: Callable[..., str]) -> None:
    promtool("check", "rules", str(RULES))


def test_each_alert_fires_when_it_should_and_only_then(promtool: Callable[..., str]) -> None:
    promtool("test", "rules", str(rules.TESTS))


def test_two_releases_are_tested() -> None:
    version = subprocess.run([release_3().promtool, "--version"], capture_output=True, text=True, check=True)  # noqa: S603 - of Prometheus
    assert version.stdout.startswith("promtool, version 3.")


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: f"{alert['alert']} {alert['labels']['severity']}")
def test_an_alert_is_tested_firing_and_not_firing(alert: dict[str, Any]) -> None:
    tries = [
        each["exp_alerts"]
        for case in TESTS["tests"]
        for each in case["alert_rule_test"]
        if each["alertname"] == alert["alert"]
    ]
    severity = alert["labels"]["severity"]
    fired = [[one for one in them if one["exp_labels"]["severity"] == severity] for them in tries]
    assert any(fired)
    assert not all(fired)


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: f"{alert['alert']} {alert['labels']['severity']}")
def test_an_alert_has_a_severity_a_summary_a_description_and_a_runbook_url(alert: dict[str, Any]) -> None:
    assert alert["labels"] in ({"severity": "critical"}, {"severity": "warning"})
    annotations = alert["annotations"]
    assert set(annotations) == {"summary", "description", "runbook_url"}
    # The number of digits of a raw value depends on the version of Prometheus.
    assert re.findall(r"\$value (?!\| (?:humanize|printf))", annotations["summary"]) == []
    assert annotations["runbook_url"] == f"docs/runbook.md#{alert['alert'].lower()}"


def test_every_alert_has_a_section_in_the_runbook_and_every_section_an_alert() -> None:
    sections = re.findall(r"^## (VqaWorker\w+)$", RUNBOOK, re.MULTILINE)
    assert len(set(sections)) == len(sections)
    assert set(sections) == NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_section_has_meaning_diagnosis_and_mitigation(name: str) -> None:
    section = RUNBOOK.split(f"\n## {name}\n", 1)[1].split("\n## ", 1)[0]
    parts = re.findall(r"^\*\*(.*?)\.\*\*", section, re.MULTILINE)
    assert parts == ["Meaning", "Diagnosis", "Mitigation"]
    assert "```sh\n" in section or "```promql\n" in section


def test_the_runbook_s_links_have_targets() -> None:
    for file, anchor in re.findall(r"\]\(([^)#]*)#([\w-]+)\)", re.sub(r"\s+", " ", RUNBOOK)):
        page = (ROOT / "docs" / file).read_text() if file else RUNBOOK
        headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", it).lower().replace(" ", "-") for it in headings}
    for file in re.findall(r"\]\(([^)#]+)\)", RUNBOOK):
        assert (ROOT / "docs" / file).exists(), file


def test_customisable_values_are_in_the_first_group() -> None:
    text = RULES.read_text()
    first = yaml.safe_load(text)["groups"][0]
    rest = yaml.safe_dump(yaml.safe_load(text)["groups"][1:])
    assert [rule["record"] for rule in first["rules"]] == [
        "vqa:jobs_queue:ready",
        "vqa:jobs_queue:consumers",
        "vqa:cost_usd_per_hour:threshold",
    ]
    assert "vqa.jobs" not in rest
    assert 'queue="' not in rest
