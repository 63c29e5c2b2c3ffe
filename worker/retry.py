"""What follows from a failed attempt. Pure: the clock is passed in."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """`VQA_MAX_ATTEMPTS` and `VQA_RETRY_DELAYS` (whole seconds; the last one repeats)."""

    max_attempts: int
    delays_s: Sequence[int]

    def delay_s(self, attempts: int) -> int:
        """The delay after the `attempts`-th attempt."""
        return self.delays_s[min(attempts, len(self.delays_s)) - 1]


@dataclass(frozen=True, slots=True)
class TryAgain:
    """Try again after `delay_s` whole seconds, one of the policy's own."""

    delay_s: int


@dataclass(frozen=True, slots=True)
class Exhausted:
    """That was the last attempt."""


@dataclass(frozen=True, slots=True)
class TooLate:
    """The next attempt would come after the job's deadline."""


def after_attempt(
    attempts: int, policy: RetryPolicy, deadline: datetime | None, now: datetime
) -> TryAgain | Exhausted | TooLate:
    """Decide after the `attempts`-th attempt (from 1) has failed."""
    if attempts >= policy.max_attempts:
        return Exhausted()
    delay_s = policy.delay_s(attempts)
    if deadline is not None and now + timedelta(seconds=delay_s) >= deadline:
        return TooLate()
    return TryAgain(delay_s)
