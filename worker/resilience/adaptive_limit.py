"""The concurrency limit of one model. It adapts to the API's answers; all decisions are pure.

Until the first 429, each success adds 1, which doubles the limit each round of calls: slow start, RFC 5681
§3.1. A 429 lowers the limit below what the API accepted. Then it returns to that level quickly, stays near
it, and probes for more, slowly at first: the curve of CUBIC (RFC 9438). The curve counts rounds of calls, not
seconds, so it is the same for short and for long calls. A worker with a high limit meets more 429s than one
with a low limit, and both decrease by a factor: workers converge to equal shares of the API's capacity
without knowing of each other.
"""

import math
import random
from dataclasses import dataclass

# The limit after a 429, as a factor (RFC 9438 §4.6).
DECREASE = 0.7
# The ceiling after a 429 below the last ceiling: other workers need a share (RFC 9438 §4.7).
FAST_CONVERGENCE = (1 + DECREASE) / 2
# Of the cubic curve, as a fraction of the ceiling per round³: the limit is back at the ceiling after six
# rounds.
STEEPNESS = 0.0014
# Added to the ceiling: with a ceiling of one or two, it would take dozens of rounds to probe for more.
MIN_STEEPNESS_CALLS = 5
# Random spread of pauses and curves: workers that met a 429 together should not grow together.
SPREAD = 0.25
# The weight of the latest call in the moving average of call durations.
LATEST_CALL_WEIGHT = 0.1
# Without Retry-After, the pause after a 429 is this fraction of a call's duration, so that retries do not
# follow each other into the rate limit. While all calls meet 429s, the pause doubles up to the maximum.
PAUSE_PER_CALL = 0.25
MIN_PAUSE_S = 0.05
DEFAULT_PAUSE_S = 0.2
MAX_FIRST_PAUSE_S = 1.0
MAX_PAUSE_S = 30.0


@dataclass(slots=True)
class _Recovery:
    """The cubic curve after a 429: from `floor` to `ceiling`, the level that the API accepted, and beyond."""

    floor: float
    ceiling: float
    spread: float
    rounds: float = 0.0

    @property
    def height(self) -> float:
        """Return the curve's value after `rounds` (RFC 9438 §4.2, figure 1)."""
        steepness = STEEPNESS * (self.ceiling + MIN_STEEPNESS_CALLS)
        back = math.cbrt(max(0.0, self.ceiling - self.floor) / steepness) * self.spread
        return self.ceiling + steepness * (self.rounds - back) ** 3


class AdaptiveLimit:
    """The limit of one model; all times are seconds of a monotonic clock, passed in.

    Args:
        maximum: the highest limit.
        initial: the limit at the start.
        chance: the source of the random spread.

    Attributes:
        paused_until: no call may be admitted before this time.
        retry_after_until: no call may begin before this time, by the API's own Retry-After; at most
            `paused_until`.
        call_s: the moving average of call durations in seconds; None before the first answer.
    """

    def __init__(self, maximum: int, initial: int, chance: random.Random | None = None) -> None:
        self._maximum = maximum
        self._chance = chance or random.Random()  # noqa: S311 - spreads load, no cryptography
        self._limit = float(min(initial, maximum))
        # The most calls in flight when a call succeeded.
        self._peak = 0
        self._recovery: _Recovery | None = None
        self._decreased_at = float("-inf")
        self._was_full = True
        # Since the last decrease.
        self._successes = 0
        self._pause_s = 0.0
        self.paused_until = float("-inf")
        self.retry_after_until = float("-inf")
        self.call_s: float | None = None

    @property
    def value(self) -> int:
        """Return how many calls may run concurrently; at least 1."""
        return int(self._limit)

    @property
    def was_rate_limited(self) -> bool:
        """Return whether a call ever met a 429; until then the API's capacity is unknown."""
        return self._recovery is not None

    def succeeded(self, in_flight: int, took_s: float) -> None:
        """Record the success of one of `in_flight` calls, which took `took_s` seconds."""
        self._successes += 1
        self._peak = max(self._peak, in_flight)
        self.call_s = (
            took_s if self.call_s is None else self.call_s + LATEST_CALL_WEIGHT * (took_s - self.call_s)
        )
        self._limit = min(self._limit + self._growth(in_flight), float(self._maximum))

    def rate_limited(
        self, others_in_flight: int, started: float, now: float, retry_after_s: float | None
    ) -> None:
        """Record that a call begun at `started` met a 429 while `others_in_flight` other calls ran.

        In a burst that is too large, the first 429 lowers the limit. Each later 429 of the burst shows more
        exactly how many calls the API accepted: those still running and those answered in the meantime. With
        fewer calls than the limit allows, the limit was not the cause: it drops to what fits and recovers
        soon.
        """
        self.retry_after_until = max(self.retry_after_until, now + (retry_after_s or 0.0))
        self.paused_until = max(self.paused_until, self.retry_after_until)
        if self._recovery is not None and started < self._decreased_at:
            self._lower_to(self._recovery, float(max(1, others_in_flight + self._successes)))
            return
        self.paused_until = max(self.paused_until, now + self._next_pause_s())
        self._decreased_at, self._successes = now, 0
        self._was_full = others_in_flight + 1 >= self.value
        self._decrease(float(max(1, others_in_flight)))

    def _growth(self, in_flight: int) -> float:
        """Return what one success adds to the limit, 1 at most.

        In slow start up to twice the calls that were in flight at once: calls often end together, and the
        limit must double even if the next jobs arrive too late to replace them (as `tcp_is_cwnd_limited` in
        Linux). Later only while the limit is reached; otherwise a success does not show that more calls fit.
        """
        if self._recovery is None:
            return 1.0 if self.value < 2 * self._peak else 0.0
        if in_flight < self.value:
            return 0.0
        self._recovery.rounds += 1 / self._limit
        return min(max(0.0, self._recovery.height - self._limit), 1.0)

    def _lower_to(self, recovery: _Recovery, fits: float) -> None:
        self._limit = min(self._limit, fits)
        ceiling = min(recovery.ceiling, fits) if self._was_full else recovery.ceiling
        self._recovery = _Recovery(self._limit, ceiling, self._random_factor())

    def _decrease(self, fits: float) -> None:
        ceiling = self._limit
        if self._was_full:
            is_below_last = self._recovery is not None and self._limit < self._recovery.ceiling
            ceiling = max(1.0, min(ceiling, fits) * (FAST_CONVERGENCE if is_below_last else 1.0))
        self._limit = max(1.0, min(self._limit * DECREASE, fits))
        self._recovery = _Recovery(self._limit, ceiling, self._random_factor())

    def _next_pause_s(self) -> float:
        """Return the worker's own pause after a 429; it doubles while no call succeeds."""
        first_s = DEFAULT_PAUSE_S if self.call_s is None else PAUSE_PER_CALL * self.call_s
        first_s = min(max(first_s, MIN_PAUSE_S), MAX_FIRST_PAUSE_S)
        self._pause_s = min(max(first_s, self._pause_s * (0.5 if self._successes else 2.0)), MAX_PAUSE_S)
        return self._pause_s * self._random_factor()

    def _random_factor(self) -> float:
        return self._chance.uniform(1 - SPREAD, 1 + SPREAD)
