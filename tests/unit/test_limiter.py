"""How many may call at once: the limit as pure arithmetic, the gate with real tasks."""

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.running import until
from tests.unit.crowd import Crowd, Provider
from tests.unit.fakes import cancel_all, turns_of_the_loop
from worker.observability import metrics
from worker.resilience.concurrency_limiter import (
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    SIEVE,
    SOON_S,
    SPREAD,
    STARTING_LIMIT,
    AdaptiveLimit,
    AdmissionClosedError,
    ConcurrencyLimiter,
    Slot,
)

PATIENCE_S = 20.0


# The limit


def a_limit(maximum: int = 64, *, lowered_to: int | None = None) -> AdaptiveLimit:
    """A limit; `lowered_to` by a 429 in a burst of which so many fitted."""
    limit = AdaptiveLimit(maximum, random.Random(1))  # noqa: S311 - no secret
    if lowered_to is not None:
        for beside in range(limit.value - 1, lowered_to - 1, -1):
            limit.refused(beside, started=0.0, now=1.0, retry_after_s=None)
    return limit


def rounds(limit: AdaptiveLimit, count: float) -> None:
    """So many rounds of calls at a full house, all of them answered."""
    done = 0.0
    while done < count:
        done += 1 / limit.value
        limit.succeeded(limit.value, took_s=1.0)


@pytest.mark.parametrize(
    ("maximum", "start"), [(1, 1), (5, 5), (32, 32), (64, STARTING_LIMIT), (1000, STARTING_LIMIT)]
)
def test_the_limit_starts_at_32_at_most(maximum: int, start: int) -> None:
    assert AdaptiveLimit(maximum).value == start


def test_until_the_first_429_a_full_house_of_successes_doubles_the_limit() -> None:
    limit = AdaptiveLimit(1000)
    for n in range(STARTING_LIMIT):
        limit.succeeded(limit.value, took_s=1.0)
        assert limit.value == STARTING_LIMIT + n + 1
    assert not limit.was_refused


def test_successes_in_a_half_empty_house_say_nothing() -> None:
    limit = a_limit()
    for _ in range(1000):
        limit.succeeded(STARTING_LIMIT - 1, took_s=1.0)
    assert limit.value == STARTING_LIMIT


def test_the_limit_grows_up_to_the_maximum_and_no_further() -> None:
    limit = a_limit(64)
    rounds(limit, 2)
    assert limit.value == 64
    limit.refused(63, started=0.0, now=1.0, retry_after_s=None)
    assert limit.value < 64
    rounds(limit, 100)
    assert limit.value == 64


def test_a_429_takes_a_share_of_the_limit() -> None:
    limit = a_limit()
    limit.refused(31, started=0.0, now=1.0, retry_after_s=None)
    assert limit.value == 22  # 32 * 0.7
    assert limit.was_refused


@pytest.mark.parametrize("fits", [1, 5, 20])
def test_of_a_burst_that_is_too_large_the_limit_falls_to_what_fits(fits: int) -> None:
    assert a_limit(lowered_to=fits).value == fits


def test_calls_answered_during_a_burst_fitted_too() -> None:
    limit = a_limit()
    limit.refused(31, started=0.0, now=1.0, retry_after_s=None)
    for beside in range(30, 20, -1):
        limit.succeeded(beside + 1, took_s=1.0)
    # Of 32 calls 10 were answered, 20 run on.
    limit.refused(20, started=0.0, now=1.1, retry_after_s=None)
    assert limit.value == 22


def test_calls_that_were_under_way_at_a_decrease_take_no_further_share() -> None:
    limit = a_limit(lowered_to=20)
    limit.refused(20, started=0.5, now=1.5, retry_after_s=None)
    assert limit.value == 20
    limit.refused(19, started=3.0, now=4.0, retry_after_s=None)
    assert limit.value == 14


def test_the_limit_never_falls_below_one() -> None:
    limit = a_limit()
    for n in range(100):
        limit.refused(0, started=float(n), now=n + 0.5, retry_after_s=None)
    assert limit.value == 1
    rounds(limit, 20)
    assert limit.value > 1


def test_the_way_back_to_what_fitted_is_short_and_the_next_try_for_more_is_not_soon() -> None:
    limit = a_limit(lowered_to=20)
    limit.refused(19, started=2.0, now=3.0, retry_after_s=None)
    assert limit.value == 14
    rounds(limit, 4)
    assert limit.value >= 17
    rounds(limit, 4)
    assert 18 <= limit.value <= 20
    for _ in range(20):
        rounds(limit, 1)
    assert limit.value > 22


def test_where_there_is_more_than_there_was_the_limit_grows_faster_and_faster() -> None:
    limit, steps = a_limit(1000, lowered_to=20), []
    for _ in range(5):
        before = limit.value
        rounds(limit, 6)
        steps.append(limit.value - before)
    assert steps[1:] == sorted(steps[1:])
    assert limit.value >= 100


def test_a_429_to_a_few_calls_does_not_make_a_worker_small_for_long() -> None:
    limit = a_limit()
    limit.refused(1, started=0.0, now=1.0, retry_after_s=None)
    assert limit.value == 1
    rounds(limit, 6)
    assert limit.value >= 22


def test_while_nothing_but_429s_come_the_pauses_grow() -> None:
    limit, now, pauses = a_limit(), 0.0, []
    for _ in range(12):
        limit.refused(0, started=now, now=now, retry_after_s=None)
        pauses.append(limit.closed_until - now)
        now = limit.closed_until
    expected = [min(FIRST_PAUSE_S * 2**n, LONGEST_PAUSE_S) for n in range(12)]
    for pause, usual in zip(pauses, expected, strict=True):
        assert (1 - SPREAD) * usual <= pause <= (1 + SPREAD) * usual
    # A success makes them shorter again, by and by.
    limit.succeeded(1, took_s=1.0)
    limit.refused(0, started=now, now=now, retry_after_s=None)
    assert limit.closed_until - now <= (1 + SPREAD) * LONGEST_PAUSE_S / 2


@pytest.mark.parametrize(
    ("took_s", "shortest", "longest"), [(0.01, 0.03, 0.07), (1.0, 0.18, 0.32), (60.0, 0.7, 1.3)]
)
def test_the_pause_after_a_single_429_is_short_measured_by_the_calls(
    took_s: float, shortest: float, longest: float
) -> None:
    limit = a_limit()
    limit.succeeded(1, took_s)
    limit.refused(31, started=0.0, now=1.0, retry_after_s=None)
    assert shortest < limit.closed_until - 1.0 < longest
    # And it is no word of the API's: a call whose images are being fetched may still begin.
    assert limit.forbidden_until <= 1.0


@pytest.mark.parametrize("retry_after_s", [0.25, 1.0, 45.0, 3600.0])
def test_the_apis_own_word_is_obeyed(retry_after_s: float) -> None:
    limit = a_limit()
    limit.refused(31, started=0.0, now=1.0, retry_after_s=retry_after_s)
    assert limit.closed_until == limit.forbidden_until == 1.0 + retry_after_s


def test_the_longest_word_counts_also_from_calls_that_were_under_way() -> None:
    limit = a_limit()
    limit.refused(31, started=0.0, now=1.0, retry_after_s=10.0)
    limit.refused(30, started=0.0, now=2.0, retry_after_s=1.0)
    assert limit.closed_until == 11.0
    limit.refused(29, started=0.0, now=3.0, retry_after_s=20.0)
    assert limit.closed_until == limit.forbidden_until == 23.0


def test_an_api_that_says_to_come_back_at_once_is_not_called_in_a_busy_loop() -> None:
    limit = a_limit()
    limit.refused(31, started=0.0, now=1.0, retry_after_s=0.0)
    assert limit.closed_until > 1.0


def test_the_time_of_a_call_is_an_average() -> None:
    limit = a_limit()
    assert limit.call_s is None
    limit.succeeded(1, took_s=1.0)
    assert limit.call_s == 1.0
    for _ in range(100):
        limit.succeeded(1, took_s=3.0)
    assert limit.call_s == pytest.approx(3.0, abs=0.1)


@given(
    maximum=st.integers(1, 200),
    events=st.lists(
        st.tuples(st.just("succeeded"), st.integers(0, 200), st.floats(0, 600))
        | st.tuples(
            st.just("refused"), st.integers(0, 200), st.none() | st.just(0.0) | st.floats(1e-3, 3600)
        ),
        max_size=100,
    ),
    lateness=st.integers(0, 3),
)
def test_the_limit_stays_between_one_and_the_maximum(
    maximum: int, events: list[tuple[str, int, float | None]], lateness: int
) -> None:
    limit = AdaptiveLimit(maximum)
    for now, (event, in_flight, seconds) in enumerate(events):
        before, closed = limit.value, limit.closed_until
        if event == "succeeded":
            limit.succeeded(in_flight, seconds or 0.0)
            assert before <= limit.value <= before + 1
        else:
            limit.refused(in_flight, started=now - lateness, now=now, retry_after_s=seconds)
            assert limit.value <= before
            assert limit.closed_until >= now + (seconds or 0.0)
        assert 1 <= limit.value <= maximum
        assert limit.closed_until >= closed
        assert limit.forbidden_until <= limit.closed_until


# The limit before a provider that takes so many calls at once, in virtual time

SEEDS = range(5)
JOBS = 800
TAKES = 20


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("latency_s", "retry_after_s"),
    [(0.1, None), (0.3, None), (1, None), (5, None), (0.3, 0), (0.5, 1), (1, 1), (2, 1), (5, 1)],
)
def test_a_worker_that_may_do_more_settles_at_what_the_provider_takes(
    latency_s: float, retry_after_s: float | None, seed: int
) -> None:
    crowd = Crowd(Provider(TAKES, latency_s, retry_after_s), jobs=JOBS, seed=seed)
    crowd.run()
    assert crowd.answers() == JOBS
    assert crowd.refusals() <= 0.05 * JOBS
    assert crowd.now <= 1.4 * latency_s * JOBS / TAKES


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("latency_s", [0.1, 0.5, 2])
@pytest.mark.parametrize("rounds_between", [0, 20])
def test_several_workers_come_to_even_parts_of_one_limit_whenever_they_start(
    latency_s: float, rounds_between: int, seed: int
) -> None:
    crowd = Crowd(Provider(TAKES, latency_s), workers=1, seed=seed)
    for _ in range(3):
        crowd.run(rounds_between * latency_s)
        crowd.add()
    crowd.run(60 * latency_s)
    since = crowd.now
    crowd.run(100 * latency_s)

    answered = crowd.answers(since)
    assert answered >= 0.7 * 100 * TAKES
    assert crowd.refusals(since) <= 0.15 * answered
    for worker in crowd.workers:
        part = sum(moment >= since for moment in worker.answered) * len(crowd.workers) / answered
        assert 1 / 3 < part < 3


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("latency_s", [0.1, 1, 10])
def test_the_limit_follows_a_provider_that_takes_more_or_fewer_calls_than_before(
    latency_s: float, seed: int
) -> None:
    crowd = Crowd(Provider(TAKES, latency_s), seed=seed)
    (worker,) = crowd.workers
    crowd.run(40 * latency_s)
    assert worker.limit.value <= TAKES + 3

    crowd.provider.capacity = 100
    crowd.run(35 * latency_s)
    assert worker.limit.value >= 65
    crowd.provider.capacity = 10
    changed = crowd.now
    crowd.run(10 * latency_s)
    assert worker.limit.value <= 14
    crowd.run(90 * latency_s)
    # Up to 100 calls run on when only 10 are taken any more.
    assert crowd.refusals(changed) <= 150


@pytest.mark.parametrize("retry_after_s", [None, 0.0])
def test_a_provider_that_refuses_everything_is_left_in_peace(retry_after_s: float | None) -> None:
    crowd = Crowd(Provider(0, 1.0, retry_after_s), workers=4)
    crowd.run(120)
    since = crowd.now
    crowd.run(600)
    # Every 30 s at the most, give or take what keeps the workers apart.
    assert 4 * 600 / 40 <= crowd.refusals(since) <= 4 * 600 / 22
    crowd.provider.capacity = TAKES
    crowd.run(90)
    assert crowd.answers(crowd.now - 30) >= 0.5 * 30 * TAKES


@pytest.mark.parametrize(("per_minute", "latency_s"), [(30, 0.1), (60, 1.0), (600, 2.0)])
def test_a_provider_that_counts_calls_by_the_minute_is_used_and_not_stormed(
    per_minute: int, latency_s: float
) -> None:
    crowd = Crowd(Provider(1000, latency_s, per_minute=per_minute))
    crowd.run(600)
    assert crowd.answers() >= 0.6 * per_minute * 10
    assert crowd.refusals() <= 1.5 * crowd.answers()


# The gate


class Visitors:
    """Tasks that go through a gate and stay inside until told to leave."""

    def __init__(self, gate: ConcurrencyLimiter) -> None:
        self.gate = gate
        self.inside: list[int] = []
        self.turned_away: list[int] = []
        self._leave: dict[int, asyncio.Event] = {}
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self.slots: dict[int, Slot] = {}

    def come(self, *names: int, model: str = "m") -> None:
        for name in names:
            self._leave[name] = asyncio.Event()
            self.tasks[name] = asyncio.create_task(self._visit(name, model))

    async def _visit(self, name: int, model: str) -> None:
        try:
            async with self.gate.slot(model) as slot:
                self.slots[name] = slot
                self.inside.append(name)
                try:
                    await self._leave[name].wait()
                finally:
                    self.inside.remove(name)
        except AdmissionClosedError:
            self.turned_away.append(name)

    def leave(self, *names: int) -> None:
        for name in names:
            self._leave[name].set()

    def leave_all(self) -> None:
        self.leave(*self._leave)


@asynccontextmanager
async def visitors(gate: ConcurrencyLimiter) -> AsyncIterator[Visitors]:
    """All of them are gone at the end, whatever the test did."""
    them = Visitors(gate)
    try:
        yield them
    finally:
        await cancel_all(them.tasks.values())


async def test_as_many_pass_as_the_limit_allows_and_the_others_in_their_order() -> None:
    async with visitors(ConcurrencyLimiter(2)) as them:
        them.come(1, 2, 3, 4, 5)
        await turns_of_the_loop()
        assert them.inside == [1, 2]
        them.leave(2)
        await turns_of_the_loop()
        assert them.inside == [1, 3]
        them.leave(1, 3)
        await turns_of_the_loop()
        assert them.inside == [4, 5]


async def test_whoever_comes_later_does_not_overtake_those_who_wait() -> None:
    async with visitors(ConcurrencyLimiter(1)) as them:
        them.come(1, 2)
        await turns_of_the_loop()
        them.leave(1)
        them.come(3)
        await turns_of_the_loop()
        assert them.inside == [2]


async def test_one_who_gives_up_waiting_takes_no_place() -> None:
    async with visitors(ConcurrencyLimiter(1)) as them:
        them.come(1, 2, 3)
        await turns_of_the_loop()
        them.tasks[2].cancel()
        await turns_of_the_loop()
        them.leave(1)
        await turns_of_the_loop()
        assert them.inside == [3]


async def test_one_who_gives_up_at_the_moment_of_being_let_in_leaves_the_place_to_the_next() -> None:
    gate = ConcurrencyLimiter(1)
    async with visitors(gate) as them:
        async with gate.slot("m"):
            them.come(1, 2)
            await turns_of_the_loop()
        # This place went to the first who waits; it is cancelled before it can notice.
        them.tasks[1].cancel()
        await turns_of_the_loop()
        assert them.inside == [2]
        assert them.tasks[1].cancelled()


async def test_an_error_inside_gives_the_place_back() -> None:
    gate = ConcurrencyLimiter(1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            async with asyncio.timeout(PATIENCE_S), gate.slot("m"):
                raise ZeroDivisionError


async def test_a_closed_gate_turns_everybody_away_but_those_inside() -> None:
    gate = ConcurrencyLimiter(1)
    async with visitors(gate) as them:
        them.come(1, 2, 3)
        await turns_of_the_loop()
        gate.close("the worker is paused")
        them.come(4)
        await turns_of_the_loop()
        assert them.inside == [1]
        assert sorted(them.turned_away) == [2, 3, 4]
        with pytest.raises(AdmissionClosedError, match="the worker is paused"):
            async with gate.slot("m"):
                pass
        # The place of the one inside is not lost.
        them.leave(1)
        await turns_of_the_loop()
        gate.open()
        them.come(5)
        await turns_of_the_loop()
        assert them.inside == [5]


async def test_closed_once_more_it_says_the_newer_reason() -> None:
    gate = ConcurrencyLimiter(1)
    gate.close("paused")
    gate.close("stopping")
    with pytest.raises(AdmissionClosedError, match="stopping"):
        async with gate.slot("m"):
            pass


async def test_a_trial_is_for_exactly_one() -> None:
    gate = ConcurrencyLimiter(5)
    gate.close("paused")
    async with visitors(gate) as them:
        gate.allow_trial()
        them.come(1, 2, 3)
        await turns_of_the_loop()
        assert them.inside == [1]
        assert them.turned_away == [2, 3]
        gate.allow_trial()
        gate.allow_trial()
        them.come(4, 5)
        await turns_of_the_loop()
        assert them.inside == [1, 4]
        assert them.turned_away == [2, 3, 5]


async def test_a_trial_that_nobody_used_is_over_with_the_next_closing() -> None:
    gate = ConcurrencyLimiter(5)
    for reopen in (True, False):
        gate.close("paused")
        gate.allow_trial()
        if reopen:
            gate.open()
        gate.close("stopping")
        with pytest.raises(AdmissionClosedError):
            async with gate.slot("m"):
                pass


async def test_those_on_trial_count_as_inside_when_the_gate_opens() -> None:
    gate = ConcurrencyLimiter(1)
    gate.close("paused")
    async with visitors(gate) as them:
        gate.allow_trial()
        them.come(1)
        await turns_of_the_loop()
        gate.open()
        them.come(2)
        await turns_of_the_loop()
        assert them.inside == [1]
        them.leave(1)
        await turns_of_the_loop()
        assert them.inside == [2]


async def refuse(gate: ConcurrencyLimiter, retry_after_s: float | None, model: str = "m") -> float:
    """Have a single call meet a 429; returns when."""
    async with gate.slot(model) as slot:
        slot.refused(retry_after_s)
        return time.monotonic()


async def test_after_a_429_nobody_passes_until_the_api_said_so() -> None:
    gate = ConcurrencyLimiter(5)
    async with visitors(gate) as them:
        refused_at = await refuse(gate, 0.3)
        them.come(1)
        await turns_of_the_loop()
        assert them.inside == []
        await until(lambda: them.inside, "the one who waits passes")
        assert time.monotonic() >= refused_at + 0.3


async def test_a_longer_pause_that_comes_during_a_shorter_one_is_kept() -> None:
    gate = ConcurrencyLimiter(5)
    async with visitors(gate) as them:
        them.come(1, 2)
        await turns_of_the_loop()
        them.slots[1].refused(0.3)
        them.come(3)
        await asyncio.sleep(0)
        refused_at = time.monotonic()
        them.slots[2].refused(0.6)
        them.leave(1, 2)
        await until(lambda: 3 in them.inside, "the one who waits passes")
        assert time.monotonic() >= refused_at + 0.6


async def test_a_pause_ends_for_those_who_wait_although_others_left_meanwhile() -> None:
    async with visitors(ConcurrencyLimiter(1)) as them:
        them.come(1, 2)
        await turns_of_the_loop()
        them.slots[1].refused(0.05)
        them.leave(1)
        await until(lambda: them.inside == [2], "the one who waits passes")


async def test_a_pause_that_ends_while_the_gate_looks_leaves_nobody_standing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The clock goes on between two looks at it."""
    readings = itertools.count()
    monkeypatch.setattr("worker.resilience.concurrency_limiter.time.monotonic", lambda: 0.01 * next(readings))
    for nth in range(20):
        gate = ConcurrencyLimiter(5)
        async with asyncio.timeout(PATIENCE_S), gate.slot("usual") as slot:
            slot.refused(None)
        gate._lanes["usual"].limit.closed_until = 0.01 * next(readings) + 0.005 * nth  # noqa: SLF001 - to the tick
        async with asyncio.timeout(PATIENCE_S), gate.slot("usual"):
            pass


async def test_who_was_let_in_before_the_api_asked_for_a_pause_must_not_begin_a_call() -> None:
    async with visitors(ConcurrencyLimiter(5)) as them:
        them.come(1, 2)
        them.come(3, model="another")
        await turns_of_the_loop()
        assert not them.slots[1].must_wait
        them.slots[2].refused(None)
        # The worker's own pause is for those who come.
        assert not them.slots[1].must_wait
        them.slots[2].refused(60.0)
        assert them.slots[1].must_wait
        assert not them.slots[3].must_wait


async def test_successes_widen_the_gate_for_those_who_wait() -> None:
    async with visitors(ConcurrencyLimiter(40)) as them:
        them.come(*range(40))
        await turns_of_the_loop()
        assert len(them.inside) == STARTING_LIMIT
        them.slots[0].succeeded()
        await turns_of_the_loop()
        assert len(them.inside) == STARTING_LIMIT + 1
        assert metrics.REGISTRY.get_sample_value("vqa_concurrency_limit") == STARTING_LIMIT + 1


async def test_a_narrower_gate_drives_nobody_out_and_waits_for_room() -> None:
    async with visitors(ConcurrencyLimiter(4)) as them:
        them.come(*range(6))
        await turns_of_the_loop()
        them.slots[0].refused(1e-6)
        assert metrics.REGISTRY.get_sample_value("vqa_concurrency_limit") == 2
        for leaving, inside in ((0, [1, 2, 3]), (1, [2, 3])):
            them.leave(leaving)
            await turns_of_the_loop()
            assert them.inside == inside
        them.leave(2)
        await until(lambda: them.inside == [3, 4], "the first who waits passes")


async def test_a_429_for_one_model_does_not_slow_another() -> None:
    gate = ConcurrencyLimiter(40)
    async with visitors(gate) as them:
        them.come(*range(5), model="busy")
        await turns_of_the_loop()
        for n in range(5):
            them.slots[n].refused(3600.0)
        them.come(5, model="busy")
        them.come(*range(6, 38), model="idle")
        await turns_of_the_loop()
        assert them.inside == [*range(5), *range(6, 38)]
        assert gate.closed_s("busy") > 3500
        assert gate.closed_s("idle") == gate.closed_s("unheard-of") == 0
        assert list(gate.pauses()) == ["busy"]


async def test_all_models_together_are_no_more_than_may_be_at_once() -> None:
    async with visitors(ConcurrencyLimiter(3)) as them:
        them.come(1, 2, model="a")
        them.come(3, 4, model="b")
        them.come(5, model="a")
        await turns_of_the_loop()
        assert them.inside == [1, 2, 3]
        # Who came first goes first, whatever the model.
        them.leave(1)
        await turns_of_the_loop()
        assert them.inside == [2, 3, 4]
        assert metrics.REGISTRY.get_sample_value("vqa_concurrency_limit") == 3


async def test_the_limit_that_is_shown_is_that_of_the_models_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = ConcurrencyLimiter(64)
    await refuse(gate, 1e-6, "a")
    await refuse(gate, 1e-6, "b")
    assert metrics.REGISTRY.get_sample_value("vqa_concurrency_limit") == 2
    monkeypatch.setattr("worker.resilience.concurrency_limiter.FORGOTTEN_AFTER_S", -1.0)
    async with gate.slot("a"):
        gate.publish_limit()
        assert metrics.REGISTRY.get_sample_value("vqa_concurrency_limit") == 1


# What the gate wants to have here


async def test_as_long_as_nothing_is_known_the_gate_wants_all_it_may_have() -> None:
    gate = ConcurrencyLimiter(200)
    assert gate.wanted() == 200
    async with gate.slot("m"):
        assert gate.wanted() == 200


@pytest.mark.parametrize(
    ("took_s", "wanted"),
    [
        pytest.param(0.1, 200, id="short calls: what is here is soon gone"),
        pytest.param(SOON_S, 66, id="as many again"),
        pytest.param(60.0, 42, id="long calls: a quarter more"),
    ],
)
async def test_the_gate_wants_what_can_be_started_soon(
    took_s: float, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with visitors(ConcurrencyLimiter(200)) as them:
        them.come(*range(STARTING_LIMIT))
        await turns_of_the_loop()
        monkeypatch.setattr(them.slots[0], "started", time.monotonic() - took_s)
        them.slots[0].succeeded()
        assert them.gate.wanted() == pytest.approx(wanted, abs=1)


async def test_once_refused_it_wants_no_more_than_twice_what_may_run() -> None:
    async with visitors(ConcurrencyLimiter(200)) as them:
        them.come(*range(STARTING_LIMIT))
        await turns_of_the_loop()
        them.slots[0].succeeded()
        for n in range(12):
            them.slots[n].refused(None)
            them.leave(n)
            await turns_of_the_loop()
        assert len(them.inside) == 20
        assert 36 <= them.gate.wanted() <= 42


async def test_while_the_api_may_not_be_called_for_long_the_gate_wants_nothing() -> None:
    gate = ConcurrencyLimiter(200)
    await refuse(gate, SOON_S - 1)
    assert gate.wanted() == 2
    await refuse_at_once(gate, SOON_S + 60)
    assert gate.wanted() == 0


async def test_while_one_of_several_models_may_not_be_called_there_are_still_jobs_for_the_others() -> None:
    gate = ConcurrencyLimiter(200, models=2)
    await refuse(gate, 3600.0, "a")
    assert gate.wanted() == SIEVE
    async with gate.slot("b"):
        assert gate.wanted() == 200
    await refuse(gate, 3600.0, "b")
    assert gate.wanted() == 0


async def refuse_at_once(gate: ConcurrencyLimiter, retry_after_s: float) -> None:
    """The same while the gate would let nobody pass."""
    gate.close("paused")
    gate.allow_trial()
    await refuse(gate, retry_after_s)
    gate.open()


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "come",
                "come",
                "come",
                "leave",
                "leave",
                "cancel",
                "close",
                "open",
                "trial",
                "succeed",
                "refuse",
            ]
        ),
        st.integers(0, 100),
        st.integers(0, 3),
    ),
    max_size=40,
)


@asynccontextmanager
async def no_pauses() -> AsyncIterator[None]:
    """The worker's own pauses are over before anybody looks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("worker.resilience.concurrency_limiter.LONGEST_PAUSE_S", 1e-9)
        yield


@given(maximum=st.integers(1, 4), operations=OPERATIONS)
async def test_no_place_is_lost_or_made_up_whatever_happens_in_which_order(
    maximum: int, operations: list[tuple[str, int, int]]
) -> None:
    gate, trials = ConcurrencyLimiter(maximum), 0
    async with visitors(gate) as them, no_pauses():
        for name, (operation, which, turns) in enumerate(operations):
            known = list(them.tasks)
            match operation:
                case "come":
                    them.come(name, model="ab"[which % 2])
                case "leave" if known:
                    them.leave(known[which % len(known)])
                case "cancel" if known:
                    them.tasks[known[which % len(known)]].cancel()
                case "close":
                    gate.close("closed")
                case "open":
                    gate.open()
                case "trial":
                    gate.allow_trial()
                    trials += 1
                case "succeed" if them.inside:
                    them.slots[them.inside[which % len(them.inside)]].succeeded()
                case "refuse" if them.inside:
                    them.slots[them.inside[which % len(them.inside)]].refused(1e-9)
            await turns_of_the_loop(turns)
            assert len(them.inside) <= maximum + trials

        gate.open()
        them.leave_all()
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*them.tasks.values(), return_exceptions=True)
        assert them.inside == []
        # Now it is as good as new: as many pass as may be inside, and not one more.
        newcomers = range(1000, 1000 + maximum + 1)
        them.come(*newcomers, model="c")
        await turns_of_the_loop()
        assert them.inside == list(newcomers)[:-1]
