"""The adaptive limit: its arithmetic, and its behaviour against an API with limited capacity."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.crowd import Crowd, Provider
from worker.resilience.adaptive_limit import DEFAULT_BACKOFF_S, JITTER, MAX_BACKOFF_S, AdaptiveLimit

INITIAL = 32


def a_limit(maximum: int = 64, *, lowered_to: int | None = None) -> AdaptiveLimit:
    """Return a limit; `lowered_to`: after a burst of which the API accepted that many calls."""
    limit = AdaptiveLimit(maximum, INITIAL, random.Random(1))  # noqa: S311 - no secret
    if lowered_to is not None:
        for others in range(limit.value - 1, lowered_to - 1, -1):
            limit.rate_limited(others, started=0.0, now=1.0, retry_after_s=None)
    return limit


def rounds(limit: AdaptiveLimit, count: float) -> None:
    """Answer all calls of `count` rounds, each with as many in flight as the limit allows."""
    done = 0.0
    while done < count:
        done += 1 / limit.value
        limit.succeeded(limit.value, took_s=1.0)


@pytest.mark.parametrize(
    ("maximum", "initial", "start"), [(1, 32, 1), (5, 32, 5), (32, 32, 32), (64, 32, 32), (64, 4, 4)]
)
def test_the_limit_starts_at_its_initial_value_or_at_the_maximum(
    maximum: int, initial: int, start: int
) -> None:
    assert AdaptiveLimit(maximum, initial).value == start


def test_until_the_first_429_a_round_of_successes_doubles_the_limit() -> None:
    limit = a_limit(1000)
    for n in range(INITIAL):
        limit.succeeded(limit.value, took_s=1.0)
        assert limit.value == INITIAL + n + 1
    assert not limit.was_rate_limited


def test_calls_that_end_together_double_the_limit_too() -> None:
    """No new call starts before the last of them has ended."""
    limit = a_limit(1000)
    for doubled in (64, 128, 256):
        for in_flight in range(limit.value, 0, -1):
            limit.succeeded(in_flight, took_s=20.0)
        assert limit.value == doubled


def test_the_limit_never_exceeds_twice_the_calls_that_were_in_flight() -> None:
    limit = a_limit()
    for _ in range(1000):
        limit.succeeded(INITIAL // 2, took_s=1.0)
    assert limit.value == INITIAL
    for _ in range(1000):
        limit.succeeded(INITIAL - 5, took_s=1.0)
    assert limit.value == 2 * (INITIAL - 5)


def test_after_a_429_successes_below_the_limit_do_not_raise_it() -> None:
    limit = a_limit(lowered_to=20)
    for _ in range(1000):
        limit.succeeded(limit.value - 1, took_s=1.0)
    assert limit.value == 20


def test_the_limit_never_exceeds_the_maximum() -> None:
    limit = a_limit(64)
    rounds(limit, 2)
    assert limit.value == 64
    limit.rate_limited(63, started=0.0, now=1.0, retry_after_s=None)
    assert limit.value < 64
    rounds(limit, 100)
    assert limit.value == 64


def test_a_429_lowers_the_limit_by_a_factor() -> None:
    limit = a_limit()
    limit.rate_limited(31, started=0.0, now=1.0, retry_after_s=None)
    assert limit.value == 22  # 32 * 0.7
    assert limit.was_rate_limited


@pytest.mark.parametrize("fits", [1, 5, 20])
def test_a_burst_of_429s_lowers_the_limit_to_the_calls_that_were_accepted(fits: int) -> None:
    assert a_limit(lowered_to=fits).value == fits


def test_calls_answered_during_a_burst_count_as_accepted() -> None:
    limit = a_limit()
    limit.rate_limited(31, started=0.0, now=1.0, retry_after_s=None)
    for others in range(30, 20, -1):
        limit.succeeded(others + 1, took_s=1.0)
    # 10 of 32 calls were answered, and 20 still run.
    limit.rate_limited(20, started=0.0, now=1.1, retry_after_s=None)
    assert limit.value == 22


def test_a_429_to_a_call_begun_before_a_decrease_does_not_lower_the_limit_by_a_factor_again() -> None:
    limit = a_limit(lowered_to=20)
    limit.rate_limited(20, started=0.5, now=1.5, retry_after_s=None)
    assert limit.value == 20
    limit.rate_limited(19, started=3.0, now=4.0, retry_after_s=None)
    assert limit.value == 14


def test_the_limit_never_falls_below_one() -> None:
    limit = a_limit()
    for n in range(100):
        limit.rate_limited(0, started=float(n), now=n + 0.5, retry_after_s=None)
    assert limit.value == 1
    rounds(limit, 20)
    assert limit.value > 1


def test_the_limit_returns_to_its_former_level_quickly_and_probes_for_more_later() -> None:
    limit = a_limit(lowered_to=20)
    limit.rate_limited(19, started=2.0, now=3.0, retry_after_s=None)
    assert limit.value == 14
    rounds(limit, 4)
    assert limit.value >= 17
    rounds(limit, 4)
    assert 18 <= limit.value <= 20
    for _ in range(20):
        rounds(limit, 1)
    assert limit.value > 22


def test_while_no_further_429_comes_the_limit_grows_faster_and_faster() -> None:
    limit, steps = a_limit(1000, lowered_to=20), []
    for _ in range(5):
        before = limit.value
        rounds(limit, 6)
        steps.append(limit.value - before)
    assert steps[1:] == sorted(steps[1:])
    assert limit.value >= 100


def test_after_a_429_to_a_lone_call_the_limit_recovers_soon() -> None:
    limit = a_limit()
    limit.rate_limited(1, started=0.0, now=1.0, retry_after_s=None)
    assert limit.value == 1
    rounds(limit, 6)
    assert limit.value >= 22


def test_backoffs_grow_while_all_requests_receive_429s() -> None:
    limit, now, backoffs = a_limit(), 0.0, []
    for _ in range(12):
        limit.rate_limited(0, started=now, now=now, retry_after_s=None)
        backoffs.append(limit.backoff_until - now)
        now = limit.backoff_until
    expected = [min(DEFAULT_BACKOFF_S * 2**n, MAX_BACKOFF_S) for n in range(12)]
    for backoff, usual in zip(backoffs, expected, strict=True):
        assert (1 - JITTER) * usual <= backoff <= (1 + JITTER) * usual
    # A success halves the next one.
    limit.succeeded(1, took_s=1.0)
    limit.rate_limited(0, started=now, now=now, retry_after_s=None)
    assert limit.backoff_until - now <= (1 + JITTER) * MAX_BACKOFF_S / 2


@pytest.mark.parametrize(
    ("took_s", "shortest", "longest"), [(0.01, 0.03, 0.07), (1.0, 0.18, 0.32), (60.0, 0.7, 1.3)]
)
def test_the_backoff_after_a_single_429_is_a_fraction_of_a_request_s_duration(
    took_s: float, shortest: float, longest: float
) -> None:
    limit = a_limit()
    limit.succeeded(1, took_s)
    limit.rate_limited(31, started=0.0, now=1.0, retry_after_s=None)
    assert shortest < limit.backoff_until - 1.0 < longest
    # Without Retry-After, a call whose images are being fetched may still begin.
    assert limit.retry_after_until <= 1.0


@pytest.mark.parametrize("retry_after_s", [0.25, 1.0, 45.0, 3600.0])
def test_retry_after_is_obeyed(retry_after_s: float) -> None:
    limit = a_limit()
    limit.rate_limited(31, started=0.0, now=1.0, retry_after_s=retry_after_s)
    assert limit.backoff_until == limit.retry_after_until == 1.0 + retry_after_s


def test_the_latest_end_of_all_retry_afters_counts() -> None:
    limit = a_limit()
    limit.rate_limited(31, started=0.0, now=1.0, retry_after_s=10.0)
    limit.rate_limited(30, started=0.0, now=2.0, retry_after_s=1.0)
    assert limit.backoff_until == 11.0
    limit.rate_limited(29, started=0.0, now=3.0, retry_after_s=20.0)
    assert limit.backoff_until == limit.retry_after_until == 23.0


def test_retry_after_0_does_not_lead_to_a_busy_loop() -> None:
    limit = a_limit()
    limit.rate_limited(31, started=0.0, now=1.0, retry_after_s=0.0)
    assert limit.backoff_until > 1.0


def test_the_duration_of_a_call_is_a_moving_average() -> None:
    limit = a_limit()
    assert limit.request_s is None
    limit.succeeded(1, took_s=1.0)
    assert limit.request_s == 1.0
    for _ in range(100):
        limit.succeeded(1, took_s=3.0)
    assert limit.request_s == pytest.approx(3.0, abs=0.1)


@given(
    maximum=st.integers(1, 200),
    events=st.lists(
        st.tuples(st.just("succeeded"), st.integers(0, 200), st.floats(0, 600))
        | st.tuples(
            st.just("rate limited"), st.integers(0, 200), st.none() | st.just(0.0) | st.floats(1e-3, 3600)
        ),
        max_size=100,
    ),
    lateness=st.integers(0, 3),
)
def test_the_limit_stays_between_one_and_the_maximum(
    maximum: int, events: list[tuple[str, int, float | None]], lateness: int
) -> None:
    limit = AdaptiveLimit(maximum, INITIAL)
    for now, (event, in_flight, seconds) in enumerate(events):
        before, earlier = limit.value, limit.backoff_until
        if event == "succeeded":
            limit.succeeded(in_flight, seconds or 0.0)
            assert before <= limit.value <= before + 1
        else:
            limit.rate_limited(in_flight, started=now - lateness, now=now, retry_after_s=seconds)
            assert limit.value <= before
            assert limit.backoff_until >= now + (seconds or 0.0)
        assert 1 <= limit.value <= maximum
        assert limit.backoff_until >= earlier
        assert limit.retry_after_until <= limit.backoff_until


# Against an API that accepts a number of concurrent calls, in virtual time

SEEDS = range(5)
JOBS = 800
CAPACITY = 20


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("latency_s", "retry_after_s"),
    [(0.1, None), (0.3, None), (1, None), (5, None), (0.3, 0), (0.5, 1), (1, 1), (2, 1), (5, 1)],
)
def test_a_worker_settles_at_the_capacity_of_the_api(
    latency_s: float, retry_after_s: float | None, seed: int
) -> None:
    crowd = Crowd(Provider(CAPACITY, latency_s, retry_after_s), jobs=JOBS, seed=seed)
    crowd.run()
    assert crowd.succeeded() == JOBS
    assert crowd.rate_limited() <= 0.05 * JOBS
    assert crowd.now <= 1.4 * latency_s * JOBS / CAPACITY


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("latency_s", [0.1, 0.5, 2])
@pytest.mark.parametrize("rounds_between", [0, 20])
def test_several_workers_share_the_capacity_evenly_whenever_they_start(
    latency_s: float, rounds_between: int, seed: int
) -> None:
    crowd = Crowd(Provider(CAPACITY, latency_s), workers=1, seed=seed)
    for _ in range(3):
        crowd.run(rounds_between * latency_s)
        crowd.add()
    crowd.run(60 * latency_s)
    since = crowd.now
    crowd.run(100 * latency_s)

    answered = crowd.succeeded(since)
    assert answered >= 0.7 * 100 * CAPACITY
    assert crowd.rate_limited(since) <= 0.15 * answered
    for worker in crowd.workers:
        share = sum(moment >= since for moment in worker.succeeded) * len(crowd.workers) / answered
        assert 1 / 3 < share < 3


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("latency_s", [0.1, 1, 10])
def test_the_limit_follows_the_capacity_up_and_down(latency_s: float, seed: int) -> None:
    crowd = Crowd(Provider(CAPACITY, latency_s), seed=seed)
    (worker,) = crowd.workers
    crowd.run(40 * latency_s)
    assert worker.limit.value <= CAPACITY + 3

    crowd.provider.capacity = 100
    crowd.run(35 * latency_s)
    assert worker.limit.value >= 65
    crowd.provider.capacity = 10
    changed = crowd.now
    crowd.run(10 * latency_s)
    assert worker.limit.value <= 14
    crowd.run(90 * latency_s)
    # Up to 100 calls are in flight when the capacity drops to 10.
    assert crowd.rate_limited(changed) <= 150


@pytest.mark.parametrize("retry_after_s", [None, 0.0])
def test_an_api_that_answers_429_to_every_call_is_called_rarely(retry_after_s: float | None) -> None:
    crowd = Crowd(Provider(0, 1.0, retry_after_s), workers=4)
    crowd.run(120)
    since = crowd.now
    crowd.run(600)
    # Each worker about every 30 s, with random jitter.
    assert 4 * 600 / 40 <= crowd.rate_limited(since) <= 4 * 600 / 22
    crowd.provider.capacity = CAPACITY
    crowd.run(90)
    assert crowd.succeeded(crowd.now - 30) >= 0.5 * 30 * CAPACITY


@pytest.mark.parametrize(("per_minute", "latency_s"), [(30, 0.1), (60, 1.0), (600, 2.0)])
def test_a_limit_of_calls_per_minute_is_used_with_few_429s(per_minute: int, latency_s: float) -> None:
    crowd = Crowd(Provider(1000, latency_s, per_minute=per_minute))
    crowd.run(600)
    assert crowd.succeeded() >= 0.6 * per_minute * 10
    assert crowd.rate_limited() <= 1.5 * crowd.succeeded()


@pytest.mark.parametrize("latency_s", [0.1, 2.0, 20.0])
def test_without_429s_a_worker_reaches_its_maximum_of_200_in_three_rounds(latency_s: float) -> None:
    crowd = Crowd(Provider(1000, latency_s))
    (worker,) = crowd.workers
    # Durations vary by 20 %, and 32 · 2³ is more than 200.
    crowd.run(3 * 1.2 * (latency_s + 0.02))
    assert worker.limit.value == 200
