"""What is wrong at the broker is said once, and again while it lasts."""

import pytest

from worker.rabbit import connection
from worker.rabbit.connection import Complaints


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in a list of one."""
    now = [1000.0]
    monkeypatch.setattr("worker.rabbit.connection.time.monotonic", lambda: now[0])
    return now


def test_the_same_is_said_once_a_minute(clock: list[float]) -> None:
    complaints = Complaints()
    said = []
    for clock[0] in (0.0, 1.0, 59.0, 60.0, 61.0, 119.0, 120.0):
        said.append(complaints.is_news("results", "full"))
    assert said == [True, False, False, True, False, False, True]


@pytest.mark.usefixtures("clock")
def test_every_subject_and_every_reason_is_said() -> None:
    complaints = Complaints()
    cases = [("results", "full"), ("results", "forbidden"), ("jobs", "full")]
    # Also when they take turns.
    assert [complaints.is_news(*case) for case in cases * 2] == [True] * 3 + [False] * 3


@pytest.mark.usefixtures("clock")
def test_what_was_over_in_between_is_said_again() -> None:
    complaints = Complaints()
    assert not complaints.is_over("results")
    assert complaints.is_news("results", "full")
    assert complaints.is_over("results")
    assert not complaints.is_over("results")
    assert complaints.is_news("results", "full")


@pytest.mark.usefixtures("clock")
def test_names_that_jobs_make_up_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "REMEMBERED_COMPLAINTS", 3)
    complaints = Complaints()
    for n in range(5):
        complaints.is_news(f"queue-{n}", "full")
    assert [complaints.is_over(f"queue-{n}") for n in range(5)] == [False, False, True, True, True]
