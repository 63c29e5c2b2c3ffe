"""What is wrong at the broker is said once, and again while it lasts."""

import pytest

from worker.rabbitmq import session
from worker.rabbitmq.session import RateLimitedWarnings


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in a list of one."""
    now = [1000.0]
    monkeypatch.setattr("worker.rabbitmq.session.time.monotonic", lambda: now[0])
    return now


def test_the_same_is_said_once_a_minute(clock: list[float]) -> None:
    warnings_ = RateLimitedWarnings()
    said = []
    for clock[0] in (0.0, 1.0, 59.0, 60.0, 61.0, 119.0, 120.0):
        said.append(warnings_.is_news("results", "full"))
    assert said == [True, False, False, True, False, False, True]


@pytest.mark.usefixtures("clock")
def test_every_subject_and_every_reason_is_said() -> None:
    warnings_ = RateLimitedWarnings()
    cases = [("results", "full"), ("results", "forbidden"), ("jobs", "full")]
    # Also when they take turns.
    assert [warnings_.is_news(*case) for case in cases * 2] == [True] * 3 + [False] * 3


@pytest.mark.usefixtures("clock")
def test_what_was_over_in_between_is_said_again() -> None:
    warnings_ = RateLimitedWarnings()
    assert not warnings_.is_over("results")
    assert warnings_.is_news("results", "full")
    assert warnings_.is_over("results")
    assert not warnings_.is_over("results")
    assert warnings_.is_news("results", "full")


@pytest.mark.usefixtures("clock")
def test_names_that_jobs_make_up_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "REMEMBERED_COMPLAINTS", 3)
    warnings_ = RateLimitedWarnings()
    for n in range(5):
        warnings_.is_news(f"queue-{n}", "full")
    assert [warnings_.is_over(f"queue-{n}") for n in range(5)] == [False, False, True, True, True]
