"""Whether and when a failed job is tried again."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.resilience.retry_policy import Exhausted, PastDeadline, RetryAfter, RetryPolicy, next_step

NOW = datetime(2030, 1, 1, tzinfo=UTC)
USUAL = RetryPolicy(max_attempts=5, delays_s=(1, 5, 30, 120))


@pytest.mark.parametrize(("attempts", "delay_s"), [(1, 1), (2, 5), (3, 30), (4, 120)])
def test_the_delays_are_used_in_order(attempts: int, delay_s: int) -> None:
    assert next_step(attempts, USUAL, None, NOW) == RetryAfter(delay_s)


@pytest.mark.parametrize("attempts", [5, 6, 1000])
def test_the_last_attempt_is_not_followed_by_another(attempts: int) -> None:
    assert next_step(attempts, USUAL, None, NOW) == Exhausted()
    # Past the deadline too the result reports the failure, not the deadline.
    assert next_step(attempts, USUAL, NOW, NOW) == Exhausted()


def test_the_last_delay_repeats() -> None:
    policy = RetryPolicy(max_attempts=10, delays_s=(1, 2))
    decisions = [next_step(n, policy, None, NOW) for n in range(1, 10)]
    assert decisions == [RetryAfter(1)] + [RetryAfter(2)] * 8


def test_a_policy_may_allow_a_single_attempt() -> None:
    assert next_step(1, RetryPolicy(1, (1,)), None, NOW) == Exhausted()


@pytest.mark.parametrize(
    ("left_s", "decision"),
    [
        (-1, PastDeadline()),
        (0, PastDeadline()),
        (0.999, PastDeadline()),
        (1, PastDeadline()),
        (1.001, RetryAfter(1)),
        (9, RetryAfter(1)),
    ],
)
def test_no_retry_begins_after_the_deadline(left_s: float, decision: RetryAfter | PastDeadline) -> None:
    assert next_step(1, USUAL, NOW + timedelta(seconds=left_s), NOW) == decision


def test_deadlines_at_the_limits_of_datetime_are_compared_like_others() -> None:
    late = datetime.fromisoformat("9999-12-31T23:59:59-23:59")
    early = datetime.fromisoformat("0001-01-01T00:00:00+23:59")
    assert next_step(1, USUAL, late, NOW) == RetryAfter(1)
    assert next_step(1, USUAL, early, NOW) == PastDeadline()


@given(
    attempts=st.integers(1, 50),
    maximum=st.integers(1, 50),
    delays=st.lists(st.integers(1, 86_400), min_size=1, max_size=8),
    left_s=st.none() | st.floats(-100_000, 100_000),
)
def test_every_decision_follows_the_policy(
    attempts: int, maximum: int, delays: list[int], left_s: float | None
) -> None:
    deadline = None if left_s is None else NOW + timedelta(seconds=left_s)
    match next_step(attempts, RetryPolicy(maximum, delays), deadline, NOW):
        case RetryAfter(delay_s):
            assert attempts < maximum
            assert delay_s == (delays[attempts - 1] if attempts <= len(delays) else delays[-1])
            assert deadline is None or NOW + timedelta(seconds=delay_s) < deadline
        case Exhausted():
            assert attempts >= maximum
        case PastDeadline():
            assert attempts < maximum
            assert deadline is not None
            assert NOW + timedelta(seconds=max(delays)) >= deadline
