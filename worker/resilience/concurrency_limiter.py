"""How many jobs may call the API at once: a limit for each model, which moves with what the API answers.

A 429 says that so many calls were too many. The limit falls below what did fit, climbs back to it quickly,
stays about there, and only then tries for more, at first slowly: the curve of CUBIC (RFC 9438), with rounds
of calls in the place of seconds, so that it is the same for short calls and for long ones. Who has much is
refused more often than who has little, and everybody falls by a share and climbs alike: so several workers
come to even parts of one limit without knowing of each other. Until the first 429 each success adds a whole
one, which doubles the limit with each round (slow start, RFC 5681 §3.1): nothing is known of the provider
yet, and calls that take a quarter of a minute would keep a worker small for an hour. The decisions are pure;
`Gate` makes jobs wait for them.
"""

import asyncio
import math
import random
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from worker.observability import metrics

STARTING_LIMIT = 32
# RFC 9438 §4.6: what is left of the limit after a 429.
DECREASE = 0.7
# Of a limit that was refused before it was as high as last time: others want their part (RFC 9438 §4.7).
RELEASE = (1 + DECREASE) / 2
# How steep the curve is, in shares of the ceiling a round³: back at the ceiling after six rounds.
STEEPNESS = 0.0014
# Added to the ceiling, or else it would take a limit of one or two dozens of rounds to try for more.
SMALL = 5
# Workers that were refused together should not climb together.
SPREAD = 0.25
# How much the latest call counts in the average of their time.
WEIGHT = 0.1
# Where the API gives no Retry-After, the pause after a 429 is a share of a call's time: just so long that
# calls do not follow each other into the wall. If nothing but 429s comes, it grows to the longest.
PAUSE_SHARE = 0.25
SHORTEST_PAUSE_S = 0.05
FIRST_PAUSE_S = 0.2
LONGEST_FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0

# How much later than a pause's end to look: never before it.
TICK_S = 0.001

# Jobs that could be started within so many seconds are worth having here.
SOON_S = 5.0
# But at least this share of the limit, to replace the calls that end, and at most as many as there are calls.
LEAST_RESERVE = 0.25
# While a model may not be called, so many jobs are looked at for those that want another.
SIEVE = 8
# A model that nobody has asked for so long takes no part in what the worker can work on.
FORGOTTEN_AFTER_S = 60.0


@dataclass(slots=True)
class _Climb:
    """The way back up after a 429: from `floor` to the `ceiling`, which has fitted, and on; in `rounds`."""

    floor: float
    ceiling: float
    spread: float
    rounds: float = 0.0

    @property
    def height(self) -> float:
        """The limit at this point (RFC 9438 §4.2, figure 1)."""
        steepness = STEEPNESS * (self.ceiling + SMALL)
        back = math.cbrt(max(0.0, self.ceiling - self.floor) / steepness) * self.spread
        return self.ceiling + steepness * (self.rounds - back) ** 3


class AdaptiveLimit:
    """The limit of one model; times are seconds of a monotonic clock, passed in.

    Attributes:
        closed_until: before it nobody else is let in.
        forbidden_until: before it no call may begin, by the API's own word; never after `closed_until`.
        call_s: what calls take, on average; None before the first answer.
    """

    def __init__(self, maximum: int, chance: random.Random | None = None) -> None:
        self._maximum = maximum
        self._chance = chance or random.Random()  # noqa: S311 - it spreads workers, and guards nothing
        self._limit = float(min(STARTING_LIMIT, maximum))
        self._climb: _Climb | None = None
        self._decreased_at = float("-inf")
        self._was_full = True
        # Since the last decrease.
        self._answered = 0
        self._pause_s = 0.0
        self.closed_until = float("-inf")
        self.forbidden_until = float("-inf")
        self.call_s: float | None = None

    @property
    def value(self) -> int:
        """How many calls may run at once; at least 1."""
        return int(self._limit)

    @property
    def was_refused(self) -> bool:
        """Whether there ever was a 429: until then the limit is only a beginning."""
        return self._climb is not None

    def succeeded(self, in_flight: int, took_s: float) -> None:
        """One of `in_flight` calls was answered; a limit that isn't reached says nothing."""
        self._answered += 1
        self.call_s = took_s if self.call_s is None else self.call_s + WEIGHT * (took_s - self.call_s)
        if in_flight < self.value:
            return
        step = 1.0
        if self._climb is not None:
            self._climb.rounds += 1 / self._limit
            step = min(step, self._climb.height - self._limit)
        self._limit = min(self._limit + max(0.0, step), float(self._maximum))

    def refused(self, beside: int, started: float, now: float, retry_after_s: float | None) -> None:
        """A call begun at `started` met a 429, while `beside` others were in flight.

        Of a burst that is too large, the first 429 lowers the limit, and each later one shows better what did
        fit: the calls that still run, and those answered meanwhile. With fewer calls than the limit allows
        it was not the limit that was too high: it bends to what fits, and soon is as high as it was.
        """
        self.forbidden_until = max(self.forbidden_until, now + (retry_after_s or 0.0))
        self.closed_until = max(self.closed_until, self.forbidden_until)
        if self._climb is not None and started < self._decreased_at:
            self._cut(self._climb, float(max(1, beside + self._answered)))
            return
        self.closed_until = max(self.closed_until, now + self._next_pause_s())
        self._decreased_at, self._answered = now, 0
        self._was_full = beside + 1 >= self.value
        self._decrease(float(max(1, beside)))

    def _cut(self, climb: _Climb, fits: float) -> None:
        self._limit = min(self._limit, fits)
        ceiling = min(climb.ceiling, fits) if self._was_full else climb.ceiling
        self._climb = _Climb(self._limit, ceiling, self._spread())

    def _decrease(self, fits: float) -> None:
        ceiling = self._limit
        if self._was_full:
            is_early = self._climb is not None and self._limit < self._climb.ceiling
            ceiling = max(1.0, min(ceiling, fits) * (RELEASE if is_early else 1.0))
        self._limit = max(1.0, min(self._limit * DECREASE, fits))
        self._climb = _Climb(self._limit, ceiling, self._spread())

    def _next_pause_s(self) -> float:
        """The pause that the worker makes of its own: doubled as long as nothing is answered."""
        first_s = FIRST_PAUSE_S if self.call_s is None else PAUSE_SHARE * self.call_s
        first_s = min(max(first_s, SHORTEST_PAUSE_S), LONGEST_FIRST_PAUSE_S)
        self._pause_s = min(max(first_s, self._pause_s * (0.5 if self._answered else 2.0)), LONGEST_PAUSE_S)
        return self._pause_s * self._spread()

    def _spread(self) -> float:
        return self._chance.uniform(1 - SPREAD, 1 + SPREAD)


class AdmissionClosedError(Exception):
    """No job may start now: the worker is paused or stopping. The message says why."""


class _Lane:
    """One model: its limit, who is inside and who waits."""

    def __init__(self, limit: AdaptiveLimit) -> None:
        self.limit = limit
        self.in_flight = 0
        # Who waits, with the number of their arrival at the gate.
        self.waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self.timer: asyncio.TimerHandle | None = None
        self.used_at = time.monotonic()

    def closed_s(self) -> float:
        """Seconds until the API may be called again; 0 if it may be now."""
        return max(0.0, self.limit.closed_until - time.monotonic())

    def has_room_for_the_next(self) -> bool:
        """Whether somebody waits who may pass."""
        return bool(self.waiting) and self.in_flight < self.limit.value and not self.closed_s()

    def soon(self) -> float:
        """How many jobs can be worked on now and in the next seconds."""
        if self.closed_s() > SOON_S:
            return self.in_flight
        most = 1.0 if self.limit.was_refused else math.inf
        in_time = math.inf if self.limit.call_s is None else SOON_S / max(self.limit.call_s, 1e-3)
        return self.limit.value * (1 + min(max(in_time, LEAST_RESERVE), most))


class Slot:
    """A place for one call, from the fetching of its images to the API's answer."""

    def __init__(self, gate: "ConcurrencyLimiter", lane: _Lane) -> None:
        self._gate = gate
        self._lane = lane
        self.started = time.monotonic()

    @property
    def must_wait(self) -> bool:
        """Whether others have met a 429 since that forbids to begin a call now."""
        return self._lane.limit.forbidden_until > time.monotonic()

    def succeeded(self) -> None:
        """The call was answered."""
        self._lane.limit.succeeded(self._lane.in_flight, time.monotonic() - self.started)
        self._gate.changed()

    def refused(self, retry_after_s: float | None) -> None:
        """The call met a 429."""
        beside = self._lane.in_flight - 1
        self._lane.limit.refused(beside, self.started, time.monotonic(), retry_after_s)
        self._gate.changed()


class ConcurrencyLimiter:
    """Lets jobs pass, in the order in which they came, as far as their models' limits allow.

    While closed it turns everybody away, those who wait included, but for single trials.

    Args:
        maximum: how many may be inside, all models together.
        models: how many models there are.
    """

    def __init__(self, maximum: int, models: int = 1) -> None:
        self._maximum = maximum
        self._models = models
        self._lanes: dict[str, _Lane] = {}
        self._arrivals = 0
        self._in_flight = 0
        self._closed: str | None = None
        self._trials = 0
        self.publish_limit()
        metrics.CONCURRENCY_IN_USE.set_function(lambda: self._in_flight)

    @property
    def in_flight(self) -> int:
        """How many are inside."""
        return self._in_flight

    @asynccontextmanager
    async def slot(self, model: str) -> AsyncIterator[Slot]:
        """Wait for a place and hold it.

        Raises:
            GateClosedError: the gate is closed, or was closed while waiting.
        """
        lane = self._lane(model)
        await self._enter(lane)
        try:
            yield Slot(self, lane)
        finally:
            self._leave(lane)

    def close(self, reason: str) -> None:
        """Turn everybody away until `open`."""
        self._closed = reason
        self._trials = 0
        for lane in self._lanes.values():
            while lane.waiting:
                _, waiter = lane.waiting.popleft()
                if not waiter.done():
                    waiter.set_exception(AdmissionClosedError(reason))

    def check(self, *, also_trials: bool = True) -> None:
        """See that it is worth waiting elsewhere for what comes before a slot.

        Raises:
            GateClosedError: the gate is closed, for trials too unless `also_trials` is false.
        """
        if self._closed is not None and (also_trials or not self._trials):
            raise AdmissionClosedError(self._closed)

    def open(self) -> None:
        """Let jobs pass again."""
        self._closed = None
        self._trials = 0
        self._admit()

    def allow_trial(self) -> None:
        """Let one job pass although the gate is closed."""
        self._trials = 1

    def closed_s(self, model: str) -> float:
        """Seconds for which the API has asked not to be called for this model; 0 if it has not."""
        return self._lanes[model].closed_s() if model in self._lanes else 0.0

    def pauses(self) -> dict[str, float]:
        """The models that may not be called for a while, and the seconds."""
        waits = {model: lane.closed_s() for model, lane in self._lanes.items()}
        return {model: seconds for model, seconds in waits.items() if seconds > SOON_S}

    def present(self) -> int:
        """How many jobs wait here or are inside."""
        return self._in_flight + sum(len(lane.waiting) for lane in self._lanes.values())

    def wanted(self) -> int:
        """How many jobs are worth having here: those that can be worked on soon.

        As long as nothing is known it is as many as there may be. 0 if no model may be called for a while.
        """
        if not self._lanes:
            return self._maximum
        wanted = sum(lane.soon() for lane in self._in_use())
        if len(self.pauses()) < self._models:
            wanted = max(wanted, 1 if not self.pauses() else SIEVE)
        return math.ceil(min(wanted, self._maximum))

    def changed(self) -> None:
        """A limit has moved."""
        self.publish_limit()
        self._admit()

    def publish_limit(self) -> None:
        """Show how many may be inside at the moment: the limits of all models in use, the maximum at most."""
        limits = [lane.limit.value for lane in self._in_use()] or [STARTING_LIMIT]
        metrics.CONCURRENCY_LIMIT.set(min(self._maximum, sum(limits)))

    def _lane(self, model: str) -> _Lane:
        lane = self._lanes.get(model)
        if lane is None:
            lane = self._lanes[model] = _Lane(AdaptiveLimit(self._maximum))
            self.publish_limit()
        lane.used_at = time.monotonic()
        return lane

    def _in_use(self) -> list[_Lane]:
        """The lanes in which there is or lately was somebody; after a quiet time, all of them."""
        since, lanes = time.monotonic() - FORGOTTEN_AFTER_S, list(self._lanes.values())
        used = [lane for lane in lanes if lane.in_flight or lane.waiting or lane.used_at > since]
        return used or lanes

    async def _enter(self, lane: _Lane) -> None:
        if self._closed is not None:
            if not self._trials:
                raise AdmissionClosedError(self._closed)
            self._trials -= 1
            self._let_in(lane)
            return
        waiter = asyncio.get_running_loop().create_future()
        self._arrivals += 1
        place = (self._arrivals, waiter)
        lane.waiting.append(place)
        self._admit()
        try:
            await waiter
        except asyncio.CancelledError:
            if place in lane.waiting:
                lane.waiting.remove(place)
            elif not waiter.cancelled() and waiter.exception() is None:
                self._leave(lane)
            raise

    def _let_in(self, lane: _Lane) -> None:
        lane.in_flight += 1
        self._in_flight += 1

    def _leave(self, lane: _Lane) -> None:
        lane.in_flight -= 1
        self._in_flight -= 1
        lane.used_at = time.monotonic()
        self._admit()

    def _admit(self) -> None:
        while self._in_flight < self._maximum:
            lanes = [lane for lane in self._lanes.values() if lane.has_room_for_the_next()]
            if not lanes:
                return self._come_back_later()
            lane = min(lanes, key=lambda lane: lane.waiting[0][0])
            _, waiter = lane.waiting.popleft()
            if not waiter.done():
                self._let_in(lane)
                waiter.set_result(None)
        return None

    def _come_back_later(self) -> None:
        """Look again when a model that somebody waits for may be called again."""
        loop = asyncio.get_running_loop()
        for lane in self._lanes.values():
            # Who could have a place waits for the time alone, which may have come at this very moment.
            if lane.waiting and lane.timer is None and lane.in_flight < lane.limit.value:
                lane.timer = loop.call_later(lane.closed_s() + TICK_S, self._admit_later, lane)

    def _admit_later(self, lane: _Lane) -> None:
        lane.timer = None
        self._admit()
