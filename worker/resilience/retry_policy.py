"""Decide whether and when a failed job is tried again. No I/O; times are passed in."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """`VQA_MAX_ATTEMPTS` and `VQA_RETRY_DELAYS`: whole seconds, the last of which repeats."""

    max_attempts: int
    delays_s: Sequence[int]

    def delay_s(self, attempts: int) -> int:
        """Return the delay in seconds after the `attempts`-th attempt."""
        return self.delays_s[min(attempts, len(self.delays_s)) - 1]

    @property
    def longest_delay_s(self) -> int:
        """Return the longest delay in seconds."""
        return max(self.delays_s)


@dataclass(frozen=True, slots=True)
class RetryAfter:
    """Try again after `delay_s` seconds, which is one of the policy's delays: each has a retry queue."""

    delay_s: int


@dataclass(frozen=True, slots=True)
class Exhausted:
    """No attempts are left."""


@dataclass(frozen=True, slots=True)
class PastDeadline:
    """The next attempt would begin after the job's deadline."""


def next_step(
    attempts: int, policy: RetryPolicy, deadline: datetime | None, now: datetime
) -> RetryAfter | Exhausted | PastDeadline:
    """Return what follows after the `attempts`-th attempt (from 1) failed."""
    delay_s = policy.delay_s(attempts)
    return Exhausted() if attempts >= policy.max_attempts else check_deadline(delay_s, deadline, now)


def check_deadline(delay_s: int, deadline: datetime | None, now: datetime) -> RetryAfter | PastDeadline:
    """Return RetryAfter, or PastDeadline if the job's deadline is at most `delay_s` seconds from now."""
    is_late = deadline is not None and now + timedelta(seconds=delay_s) >= deadline
    return PastDeadline() if is_late else RetryAfter(delay_s)
