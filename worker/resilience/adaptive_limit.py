"""The concurrency limit of one model, which adapts to the model API. No I/O; times are passed in.

Until the first 429, each success adds 1, which doubles the limit each round of requests: slow start, RFC 5681
§3.1. A 429 lowers the limit below what the API accepted. Then it returns to that level quickly, stays near
it, and probes for more, slowly at first: the curve of CUBIC (RFC 9438). The curve counts rounds of requests,
not seconds, so it is the same for short and for long requests. A worker with a high limit receives more 429s
than one with a low limit, and both decrease by a factor: workers converge to equal shares of the API's
capacity without coordination.
"""

import math
import random
from dataclasses import dataclass

# The limit after a 429, as a factor (RFC 9438 §4.6).
DECREASE = 0.7
# The ceiling after a 429 below the last ceiling: other workers need a share (RFC 9438 §4.7).
FAST_CONVERGENCE = (1 + DECREASE) / 2
# Cubic coefficient, as a fraction of the ceiling per round cubed; large ceilings are reached again after
# about six rounds, small ones sooner.
STEEPNESS = 0.0014
# Added to the ceiling: with a ceiling of one or two, it would take dozens of rounds to probe for more.
MIN_STEEPNESS_REQUESTS = 5
# Jitter, so that workers limited together do not increase together.
JITTER = 0.25
# The weight of the latest request in the moving average of request durations.
LATEST_REQUEST_WEIGHT = 0.1
# Without Retry-After, the backoff after a 429 is this fraction of a request's duration, so that retries do
# not hit the rate limit again. While all requests receive 429s, the backoff doubles up to the maximum.
BACKOFF_PER_REQUEST = 0.25
MIN_BACKOFF_S = 0.05
DEFAULT_BACKOFF_S = 0.2
MAX_FIRST_BACKOFF_S = 1.0
MAX_BACKOFF_S = 30.0


@dataclass(slots=True)
class _Recovery:
    """The cubic curve after a 429: from `floor` to `ceiling`, the level that the API accepted, and beyond."""

    floor: float
    ceiling: float
    jitter: float
    rounds: float = 0.0

    @property
    def value(self) -> float:
        """Return the curve's value after `rounds` (RFC 9438 §4.2, figure 1)."""
        steepness = STEEPNESS * (self.ceiling + MIN_STEEPNESS_REQUESTS)
        k = math.cbrt(max(0.0, self.ceiling - self.floor) / steepness) * self.jitter
        return self.ceiling + steepness * (self.rounds - k) ** 3


class AdaptiveLimit:
    """The limit of one model; all times are seconds of a monotonic clock, passed in.

    Args:
        maximum: the highest limit.
        initial: the limit at the start.
        rng: the source of the jitter.

    Attributes:
        backoff_until: no request may be admitted before this time.
        retry_after_until: no request may begin before this time, by the API's own Retry-After; at most
            `backoff_until`.
        request_s: the moving average of request durations in seconds; None before the first answer.
    """

    def __init__(self, maximum: int, initial: int, rng: random.Random | None = None) -> None:
        self._maximum = maximum
        self._rng = rng or random.Random()  # noqa: S311 - jitter, no cryptography
        self._limit = float(min(initial, maximum))
        # The most slots in use when a request succeeded.
        self._peak = 0
        self._recovery: _Recovery | None = None
        self._decreased_at = float("-inf")
        self._limit_was_reached = True
        # Since the last decrease.
        self._successes = 0
        self._backoff_s = 0.0
        self.backoff_until = float("-inf")
        self.retry_after_until = float("-inf")
        self.request_s: float | None = None

    @property
    def value(self) -> int:
        """Return how many requests may run concurrently; at least 1."""
        return int(self._limit)

    @property
    def was_rate_limited(self) -> bool:
        """Return whether a request ever received a 429; until then the API's capacity is unknown."""
        return self._recovery is not None

    def succeeded(self, slots_in_use: int, took_s: float) -> None:
        """Record the success of one of `slots_in_use` requests, which took `took_s` seconds."""
        self._successes += 1
        self._peak = max(self._peak, slots_in_use)
        average_s = took_s if self.request_s is None else self.request_s
        self.request_s = average_s + LATEST_REQUEST_WEIGHT * (took_s - average_s)
        self._limit = min(self._limit + self._growth(slots_in_use), float(self._maximum))

    def rate_limited(
        self, other_slots_in_use: int, started: float, now: float, retry_after_s: float | None
    ) -> None:
        """Record that a request begun at `started` received a 429 while `other_slots_in_use` others ran.

        In a burst that is too large, the first 429 lowers the limit. Each later 429 of the burst shows more
        exactly how many requests the API accepted: those still running and those answered in the meantime.
        With fewer requests than the limit allows, the limit was not the cause: it drops to the accepted
        number and recovers soon.
        """
        self.retry_after_until = max(self.retry_after_until, now + (retry_after_s or 0.0))
        self.backoff_until = max(self.backoff_until, self.retry_after_until)
        if self._recovery is not None and started < self._decreased_at:
            self._refine_decrease(self._recovery, float(max(1, other_slots_in_use + self._successes)))
            return
        self.backoff_until = max(self.backoff_until, now + self._next_backoff_s())
        self._decreased_at, self._successes = now, 0
        self._limit_was_reached = other_slots_in_use + 1 >= self.value
        self._decrease(float(max(1, other_slots_in_use)))

    def _growth(self, slots_in_use: int) -> float:
        """Return what one success adds to the limit, 1 at most.

        In slow start up to twice the requests that ran at once: requests often end together, and the limit
        must double even if the next jobs arrive too late to replace them (as `tcp_is_cwnd_limited` in Linux).
        Later only while the limit is reached; otherwise a success does not show that more are accepted.
        """
        if self._recovery is None:
            return 1.0 if self.value < 2 * self._peak else 0.0
        if slots_in_use < self.value:
            return 0.0
        self._recovery.rounds += 1 / self._limit
        return min(max(0.0, self._recovery.value - self._limit), 1.0)

    def _refine_decrease(self, recovery: _Recovery, accepted: float) -> None:
        self._limit = min(self._limit, accepted)
        ceiling = min(recovery.ceiling, accepted) if self._limit_was_reached else recovery.ceiling
        self._recovery = _Recovery(self._limit, ceiling, self._jitter())

    def _decrease(self, accepted: float) -> None:
        ceiling = self._limit
        if self._limit_was_reached:
            is_below_last = self._recovery is not None and self._limit < self._recovery.ceiling
            ceiling = max(1.0, min(ceiling, accepted) * (FAST_CONVERGENCE if is_below_last else 1.0))
        self._limit = max(1.0, min(self._limit * DECREASE, accepted))
        self._recovery = _Recovery(self._limit, ceiling, self._jitter())

    def _next_backoff_s(self) -> float:
        """Return the worker's own backoff after a 429; it doubles while no request succeeds."""
        first_s = DEFAULT_BACKOFF_S if self.request_s is None else BACKOFF_PER_REQUEST * self.request_s
        first_s = min(max(first_s, MIN_BACKOFF_S), MAX_FIRST_BACKOFF_S)
        next_s = self._backoff_s * (0.5 if self._successes else 2.0)
        self._backoff_s = min(max(first_s, next_s), MAX_BACKOFF_S)
        return self._backoff_s * self._jitter()

    def _jitter(self) -> float:
        return self._rng.uniform(1 - JITTER, 1 + JITTER)
