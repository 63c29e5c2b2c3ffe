"""Which of the lines that say the same are shown, with the clock in the test's hand."""

import logging
from collections.abc import Callable

import pytest

from worker.observability.log_sampling import MOST_KINDS, SHOWN, WINDOW_S, Kind, Repeats


def kind(reason: str = "http_5xx") -> Kind:
    return Kind("worker.rabbitmq.settlement", logging.WARNING, "job_retried", reason)


RETRY = kind()


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def repeats(clock: Clock) -> Repeats:
    return Repeats(clock)


@pytest.fixture
def shown(repeats: Repeats) -> Callable[..., int]:
    """Of so many lines, how many are shown."""
    return lambda count, of=RETRY: sum(repeats.may_be_shown(of) for _ in range(count))


def test_the_first_lines_of_a_minute_are_shown(shown: Callable[..., int], clock: Clock) -> None:
    assert shown(SHOWN) == SHOWN
    clock.now += WINDOW_S - 1
    assert shown(100) == 0
    clock.now += 1
    assert shown(100) == SHOWN


def test_each_kind_counts_for_itself(shown: Callable[..., int]) -> None:
    assert shown(100) == SHOWN
    assert shown(100, kind("timeout")) == SHOWN
    assert shown(1, RETRY._replace(level=logging.ERROR)) == 1
    assert shown(1, RETRY._replace(event="internal_error")) == 1
    assert shown(1, RETRY._replace(logger="another")) == 1


def test_what_was_withheld_is_told_once_when_the_minute_is_over(
    repeats: Repeats, shown: Callable[..., int], clock: Clock
) -> None:
    shown(SHOWN + 7)
    shown(SHOWN, kind("timeout"))
    clock.now += WINDOW_S - 1
    assert repeats.withheld() == []
    clock.now += 1
    assert repeats.withheld() == [(RETRY, 7, WINDOW_S)]
    assert repeats.withheld() == []


def test_a_line_of_the_next_minute_does_not_lose_what_was_withheld_in_the_last(
    repeats: Repeats, shown: Callable[..., int], clock: Clock
) -> None:
    shown(SHOWN + 7)
    clock.now += 5 * WINDOW_S
    assert shown(SHOWN + 2) == SHOWN
    assert repeats.withheld() == [(RETRY, 7, WINDOW_S)]
    clock.now += WINDOW_S
    assert repeats.withheld() == [(RETRY, 2, WINDOW_S)]


def test_in_the_end_all_of_it_is_told(repeats: Repeats, shown: Callable[..., int], clock: Clock) -> None:
    shown(SHOWN + 7)
    clock.now += 5
    assert repeats.withheld(all_of_it=True) == [(RETRY, 7, 5)]
    assert repeats.withheld(all_of_it=True) == []
    assert shown(100) == SHOWN


def test_lines_that_never_say_the_same_take_no_memory_without_end(
    repeats: Repeats, shown: Callable[..., int]
) -> None:
    shown(SHOWN + 1)
    for number in range(MOST_KINDS):
        assert shown(1, kind(str(number))) == 1
    # The oldest had to go; what it withheld is told.
    assert [withheld.times for withheld in repeats.withheld()] == [1]
    assert shown(1) == 1
