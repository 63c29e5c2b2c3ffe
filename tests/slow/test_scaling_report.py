"""docs/scaling.md is generated from the stored figures and the current chart."""

from pathlib import Path
from typing import Final

import pytest

from tests.bench.tables import number, table
from tests.running import ROOT
from tests.scaling import report, study
from tests.scaling.findings import Findings, thinned
from tests.scaling.record import Sample

DOCS: Final = ROOT / "docs"
FIGURES: Final = DOCS / "scaling" / "figures.json"


@pytest.fixture(scope="module")
def findings() -> Findings:
    return Findings.load(FIGURES)


def test_the_page_is_up_to_date(findings: Findings) -> None:
    page = (DOCS / "scaling.md").read_text()
    assert page == report.page(findings), "run `python -m tests.scaling --redraw docs`"


def test_stored_findings_can_be_read_again(findings: Findings, tmp_path: Path) -> None:
    findings.save(tmp_path / "figures.json")
    assert Findings.load(tmp_path / "figures.json") == findings


def test_the_stored_simulations_are_up_to_date(findings: Findings) -> None:
    pods = study.SIZES[0]
    now = {pods: study.sizes(lambda _: None, [pods])[pods].summary, **study.over_provider_limit()}
    reported = {pods: findings.sizes[pods].summary, **findings.over_limit}
    for size, summary in now.items():
        for figure in ("max_backlog", "drain_s", "wait_s", "pod_s", "rate_limited"):
            expected = pytest.approx(getattr(reported[size], figure), rel=0.1)
            assert getattr(summary, figure) == expected, f"{figure} of {size} pods: run `make scale-demo`"


def test_the_stored_run_had_no_errors(findings: Findings) -> None:
    run = findings.run
    assert run.calls == run.real.summary.jobs
    assert run.real.summary.max_replicas == run.pods
    assert run.interrupted
    assert (run.real.samples[0].replicas, run.real.samples[-1].replicas) == (0, 0)


def test_thinned_samples_have_all_changes_of_the_number_of_pods() -> None:
    def sample(nth: int) -> Sample:
        return Sample(nth / 10, nth, nth // 7, nth // 9, 0, nth, nth)

    samples = [sample(nth) for nth in range(100)]
    kept = thinned(samples)
    assert len(kept) < len(samples) / 2
    assert {(it.replicas, it.ready) for it in kept} == {(it.replicas, it.ready) for it in samples}


def test_a_table_has_aligned_columns() -> None:
    found = table(["a", "long header"], [["longer cell", "1"]])
    assert found.split("\n") == [
        "| a           | long header |",
        "| ----------- | ----------- |",
        "| longer cell | 1           |",
    ]
    assert [number(it) for it in (1234.5, 123.45, 12.345, 1.2345)] == ["1234", "123", "12.3", "1.23"]
