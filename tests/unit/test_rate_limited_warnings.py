"""A lasting problem at the broker is logged once a minute."""

import pytest

from vqa_worker.rabbitmq import rate_limited_warnings
from vqa_worker.rabbitmq.rate_limited_warnings import RateLimitedWarnings


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the current time in a list of one element."""
    now = [1000.0]
    monkeypatch.setattr("vqa_worker.rabbitmq.rate_limited_warnings.time.monotonic", lambda: now[0])
    return now


def test_the_same_warning_is_logged_once_a_minute(clock: list[float]) -> None:
    warnings_ = RateLimitedWarnings()
    logged = []
    for clock[0] in (0.0, 1.0, 59.0, 60.0, 61.0, 119.0, 120.0):
        logged.append(warnings_.should_log("results", "full"))
    assert logged == [True, False, False, True, False, False, True]


@pytest.mark.usefixtures("clock")
def test_every_subject_and_every_reason_is_logged_also_when_they_alternate() -> None:
    warnings_ = RateLimitedWarnings()
    cases = [("results", "full"), ("results", "forbidden"), ("jobs", "full")]
    assert [warnings_.should_log(*case) for case in cases * 2] == [True] * 3 + [False] * 3


@pytest.mark.usefixtures("clock")
def test_a_problem_that_returns_after_a_recovery_is_logged_again() -> None:
    warnings_ = RateLimitedWarnings()
    assert not warnings_.recovered("results")
    assert warnings_.should_log("results", "full")
    assert warnings_.recovered("results")
    assert not warnings_.recovered("results")
    assert warnings_.should_log("results", "full")


@pytest.mark.usefixtures("clock")
def test_only_the_latest_subjects_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_limited_warnings, "MAX_SUBJECTS", 3)
    warnings_ = RateLimitedWarnings()
    for n in range(5):
        warnings_.should_log(f"queue-{n}", "full")
    assert [warnings_.recovered(f"queue-{n}") for n in range(5)] == [False, False, True, True, True]
