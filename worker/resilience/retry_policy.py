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

    @property
    def longest_delay_s(self) -> int:
        """What is waited for where nothing is in a hurry."""
        return max(self.delays_s)


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
    return Exhausted() if attempts >= policy.max_attempts else after(policy.delay_s(attempts), deadline, now)


def after(delay_s: int, deadline: datetime | None, now: datetime) -> TryAgain | TooLate:
    """Decide whether a job can wait so long."""
    if deadline is not None and now + timedelta(seconds=delay_s) >= deadline:
        return TooLate()
    return TryAgain(delay_s)
