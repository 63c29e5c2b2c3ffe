"""Sampling of repeated log lines, with a fake clock."""

import logging
from collections.abc import Callable

import pytest

from worker.observability.log_sampling import MAX_KINDS, MAX_SHOWN, WINDOW_S, Kind, LogSampler


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
def sampler(clock: Clock) -> LogSampler:
    return LogSampler(clock)


@pytest.fixture
def shown(sampler: LogSampler) -> Callable[..., int]:
    """Log a number of lines; return how many are shown."""
    return lambda count, of=RETRY: sum(sampler.should_log(of) for _ in range(count))


def test_the_first_lines_of_a_minute_are_shown(shown: Callable[..., int], clock: Clock) -> None:
    assert shown(MAX_SHOWN) == MAX_SHOWN
    clock.now += WINDOW_S - 1
    assert shown(100) == 0
    clock.now += 1
    assert shown(100) == MAX_SHOWN


def test_each_kind_of_line_is_counted_separately(shown: Callable[..., int]) -> None:
    assert shown(100) == MAX_SHOWN
    assert shown(100, kind("timeout")) == MAX_SHOWN
    assert shown(1, RETRY._replace(level=logging.ERROR)) == 1
    assert shown(1, RETRY._replace(event="internal_error")) == 1
    assert shown(1, RETRY._replace(logger="another")) == 1


def test_suppressed_events_are_reported_once_per_minute(
    sampler: LogSampler, shown: Callable[..., int], clock: Clock
) -> None:
    shown(MAX_SHOWN + 7)
    shown(MAX_SHOWN, kind("timeout"))
    clock.now += WINDOW_S - 1
    assert sampler.suppressed() == []
    clock.now += 1
    assert sampler.suppressed() == [(RETRY, 7, WINDOW_S)]
    assert sampler.suppressed() == []


def test_a_line_of_the_next_minute_keeps_the_count_of_suppressed_lines(
    sampler: LogSampler, shown: Callable[..., int], clock: Clock
) -> None:
    shown(MAX_SHOWN + 7)
    clock.now += 5 * WINDOW_S
    assert shown(MAX_SHOWN + 2) == MAX_SHOWN
    assert sampler.suppressed() == [(RETRY, 7, WINDOW_S)]
    clock.now += WINDOW_S
    assert sampler.suppressed() == [(RETRY, 2, WINDOW_S)]


def test_flush_reports_suppressed_events(
    sampler: LogSampler, shown: Callable[..., int], clock: Clock
) -> None:
    shown(MAX_SHOWN + 7)
    clock.now += 5
    assert sampler.suppressed(flush=True) == [(RETRY, 7, 5)]
    assert sampler.suppressed(flush=True) == []
    assert shown(100) == MAX_SHOWN


def test_distinct_lines_use_a_bounded_amount_of_memory(
    sampler: LogSampler, shown: Callable[..., int]
) -> None:
    shown(MAX_SHOWN + 1)
    for number in range(MAX_KINDS):
        assert shown(1, kind(str(number))) == 1
    # The oldest kind was evicted, and its suppressed lines are reported.
    assert [suppressed.records for suppressed in sampler.suppressed()] == [1]
    assert shown(1) == 1
