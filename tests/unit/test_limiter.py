"""How many may call at once: the limit as pure arithmetic, the gate with real tasks."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.running import until
from tests.unit.fakes import cancel_all, turns_of_the_loop
from worker import metrics
from worker.limiter import (
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    STARTING_LIMIT,
    AdaptiveLimit,
    Gate,
    GateClosedError,
)

PATIENCE_S = 20.0


# The limit


@pytest.mark.parametrize(
    ("maximum", "start"), [(1, 1), (5, 5), (32, 32), (64, STARTING_LIMIT), (1000, STARTING_LIMIT)]
)
def test_the_limit_starts_at_32_at_most(maximum: int, start: int) -> None:
    assert AdaptiveLimit(maximum).value == start


def test_until_the_first_429_a_full_house_of_successes_doubles_the_limit() -> None:
    limit = AdaptiveLimit(1000)
    for n in range(STARTING_LIMIT):
        limit.succeeded(in_flight=limit.value)
        assert limit.value == STARTING_LIMIT + n + 1


def test_after_a_429_a_full_house_of_successes_adds_about_one() -> None:
    limit = AdaptiveLimit(64)
    limit.refused(started=0.0, now=1.0, retry_after_s=None)
    lowered = limit.value
    for _ in range(lowered + 1):
        limit.succeeded(in_flight=limit.value)
    assert limit.value == lowered + 1


def test_successes_in_a_half_empty_house_say_nothing() -> None:
    limit = AdaptiveLimit(64)
    for _ in range(1000):
        limit.succeeded(in_flight=STARTING_LIMIT - 1)
    assert limit.value == STARTING_LIMIT


def test_the_limit_grows_up_to_the_maximum_and_no_further() -> None:
    limit = AdaptiveLimit(64)
    for _ in range(64 - STARTING_LIMIT + 1):
        limit.succeeded(in_flight=limit.value)
    assert limit.value == 64
    limit.refused(started=0.0, now=1.0, retry_after_s=None)
    assert limit.value < 64
    for _ in range(10_000):
        limit.succeeded(in_flight=limit.value)
    assert limit.value == 64


def test_a_429_takes_a_share_of_the_limit() -> None:
    limit = AdaptiveLimit(64)
    limit.refused(started=0.0, now=1.0, retry_after_s=None)
    assert limit.value == 22  # 32 * 0.7


def test_calls_that_were_under_way_at_a_decrease_decrease_nothing_more() -> None:
    limit = AdaptiveLimit(64)
    for n in range(32):
        limit.refused(started=0.5, now=1.0 + n / 100, retry_after_s=None)
    assert limit.value == 22
    # They were one event: one pause follows, from its first word on.
    assert limit.closed_until == 1.0 + FIRST_PAUSE_S
    limit.refused(started=3.0, now=4.0, retry_after_s=None)
    assert limit.value == 15


def test_the_limit_never_falls_below_one() -> None:
    limit = AdaptiveLimit(64)
    for n in range(100):
        limit.refused(started=float(n), now=n + 0.5, retry_after_s=None)
    assert limit.value == 1
    limit.succeeded(in_flight=1)
    assert limit.value == 2


def test_without_a_word_of_the_api_pauses_grow_until_a_success() -> None:
    limit, now, pauses = AdaptiveLimit(64), 0.0, []
    for _ in range(7):
        limit.refused(started=now, now=now, retry_after_s=None)
        pauses.append(limit.closed_until - now)
        now = limit.closed_until
    assert pauses == [1, 2, 4, 8, 16, LONGEST_PAUSE_S, LONGEST_PAUSE_S]
    limit.succeeded(in_flight=1)
    limit.refused(started=now, now=now, retry_after_s=None)
    assert limit.closed_until - now == FIRST_PAUSE_S


@pytest.mark.parametrize("retry_after_s", [0.25, 1.0, 45.0, 3600.0])
def test_the_apis_own_word_is_obeyed(retry_after_s: float) -> None:
    limit = AdaptiveLimit(64)
    limit.refused(started=0.0, now=1.0, retry_after_s=retry_after_s)
    assert limit.closed_until == 1.0 + retry_after_s


def test_the_longest_word_counts_also_from_calls_that_were_under_way() -> None:
    limit = AdaptiveLimit(64)
    limit.refused(started=0.0, now=1.0, retry_after_s=10.0)
    limit.refused(started=0.0, now=2.0, retry_after_s=1.0)
    assert limit.closed_until == 11.0
    limit.refused(started=0.0, now=3.0, retry_after_s=20.0)
    assert limit.closed_until == 23.0


def test_an_api_that_says_to_come_back_at_once_is_not_called_in_a_busy_loop() -> None:
    limit = AdaptiveLimit(64)
    limit.refused(started=0.0, now=1.0, retry_after_s=0.0)
    assert limit.closed_until == 1.0 + FIRST_PAUSE_S


@given(
    maximum=st.integers(1, 200),
    events=st.lists(
        st.tuples(st.just("succeeded"), st.integers(0, 200))
        | st.tuples(st.just("refused"), st.none() | st.just(0.0) | st.floats(1e-3, 3600)),
        max_size=100,
    ),
)
def test_the_limit_stays_between_one_and_the_maximum(
    maximum: int, events: list[tuple[str, int | float | None]]
) -> None:
    limit = AdaptiveLimit(maximum)
    for now, (event, what) in enumerate(events):
        before, closed = limit.value, limit.closed_until
        if event == "succeeded":
            limit.succeeded(in_flight=int(what or 0))
            assert before <= limit.value <= before + 1
        else:
            limit.refused(started=now, now=now, retry_after_s=what)
            assert limit.value <= before
            assert limit.closed_until > now
        assert 1 <= limit.value <= maximum
        assert limit.closed_until >= closed


# The gate


class Visitors:
    """Tasks that go through a gate and stay inside until told to leave."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self.inside: list[int] = []
        self.turned_away: list[int] = []
        self._leave: dict[int, asyncio.Event] = {}
        self.tasks: dict[int, asyncio.Task[None]] = {}

    def come(self, *names: int) -> None:
        for name in names:
            self._leave[name] = asyncio.Event()
            self.tasks[name] = asyncio.create_task(self._visit(name))

    async def _visit(self, name: int) -> None:
        try:
            async with self._gate.slot():
                self.inside.append(name)
                try:
                    await self._leave[name].wait()
                finally:
                    self.inside.remove(name)
        except GateClosedError:
            self.turned_away.append(name)

    def leave(self, *names: int) -> None:
        for name in names:
            self._leave[name].set()

    def leave_all(self) -> None:
        self.leave(*self._leave)


@asynccontextmanager
async def visitors(gate: Gate) -> AsyncIterator[Visitors]:
    """All of them are gone at the end, whatever the test did."""
    them = Visitors(gate)
    try:
        yield them
    finally:
        await cancel_all(them.tasks.values())


async def test_as_many_pass_as_the_limit_allows_and_the_others_in_their_order() -> None:
    async with visitors(Gate(AdaptiveLimit(2))) as them:
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
    async with visitors(Gate(AdaptiveLimit(1))) as them:
        them.come(1, 2)
        await turns_of_the_loop()
        them.leave(1)
        them.come(3)
        await turns_of_the_loop()
        assert them.inside == [2]


async def test_one_who_gives_up_waiting_takes_no_place() -> None:
    async with visitors(Gate(AdaptiveLimit(1))) as them:
        them.come(1, 2, 3)
        await turns_of_the_loop()
        them.tasks[2].cancel()
        await turns_of_the_loop()
        them.leave(1)
        await turns_of_the_loop()
        assert them.inside == [3]


async def test_one_who_gives_up_at_the_moment_of_being_let_in_leaves_the_place_to_the_next() -> None:
    gate = Gate(AdaptiveLimit(1))
    async with visitors(gate) as them:
        async with gate.slot():
            them.come(1, 2)
            await turns_of_the_loop()
        # This place went to the first who waits; it is cancelled before it can notice.
        them.tasks[1].cancel()
        await turns_of_the_loop()
        assert them.inside == [2]
        assert them.tasks[1].cancelled()


async def test_an_error_inside_gives_the_place_back() -> None:
    gate = Gate(AdaptiveLimit(1))
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            async with asyncio.timeout(PATIENCE_S), gate.slot():
                raise ZeroDivisionError


async def test_a_closed_gate_turns_everybody_away_but_those_inside() -> None:
    gate = Gate(AdaptiveLimit(1))
    async with visitors(gate) as them:
        them.come(1, 2, 3)
        await turns_of_the_loop()
        gate.close("the worker is paused")
        them.come(4)
        await turns_of_the_loop()
        assert them.inside == [1]
        assert sorted(them.turned_away) == [2, 3, 4]
        with pytest.raises(GateClosedError, match="the worker is paused"):
            async with gate.slot():
                pass
        # The place of the one inside is not lost.
        them.leave(1)
        await turns_of_the_loop()
        gate.open()
        them.come(5)
        await turns_of_the_loop()
        assert them.inside == [5]


async def test_closed_once_more_it_says_the_newer_reason() -> None:
    gate = Gate(AdaptiveLimit(1))
    gate.close("paused")
    gate.close("stopping")
    with pytest.raises(GateClosedError, match="stopping"):
        async with gate.slot():
            pass


async def test_a_trial_is_for_exactly_one() -> None:
    gate = Gate(AdaptiveLimit(5))
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
    gate = Gate(AdaptiveLimit(5))
    for reopen in (True, False):
        gate.close("paused")
        gate.allow_trial()
        if reopen:
            gate.open()
        gate.close("stopping")
        with pytest.raises(GateClosedError):
            async with gate.slot():
                pass


async def test_those_on_trial_count_as_inside_when_the_gate_opens() -> None:
    gate = Gate(AdaptiveLimit(1))
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


async def test_after_a_429_nobody_passes_until_the_api_said_so() -> None:
    gate = Gate(AdaptiveLimit(5))
    async with visitors(gate) as them:
        refused_at = time.monotonic()
        gate.refused(refused_at, 0.2)
        them.come(1, 2)
        await turns_of_the_loop()
        assert them.inside == []
        await until(lambda: len(them.inside) == 2, "both pass")
        assert time.monotonic() >= refused_at + 0.2
        assert them.inside == [1, 2]


async def test_a_longer_pause_that_comes_during_a_shorter_one_is_kept() -> None:
    gate = Gate(AdaptiveLimit(5))
    async with visitors(gate) as them:
        started = time.monotonic()
        gate.refused(started, 0.2)
        them.come(1)
        await asyncio.sleep(0)
        refused_at = time.monotonic()
        gate.refused(started, 0.4)
        await until(lambda: them.inside, "the one who waits passes")
        assert time.monotonic() >= refused_at + 0.4


async def test_a_pause_ends_for_those_who_wait_although_others_left_meanwhile() -> None:
    gate = Gate(AdaptiveLimit(1))
    async with visitors(gate) as them:
        them.come(1, 2)
        await turns_of_the_loop()
        gate.refused(time.monotonic(), 0.05)
        them.leave(1)
        await until(lambda: them.inside == [2], "the one who waits passes")


async def test_successes_widen_the_gate_for_those_who_wait() -> None:
    limit = AdaptiveLimit(40)
    gate = Gate(limit)
    async with visitors(gate) as them:
        them.come(*range(40))
        await turns_of_the_loop()
        assert len(them.inside) == STARTING_LIMIT
        while limit.value == STARTING_LIMIT:
            gate.succeeded()
        await turns_of_the_loop()
        assert len(them.inside) == STARTING_LIMIT + 1
        assert metrics.REGISTRY.get_sample_value("vqa_concurrency_limit") == STARTING_LIMIT + 1


async def test_a_narrower_gate_drives_nobody_out_and_waits_for_room() -> None:
    limit = AdaptiveLimit(4)
    gate = Gate(limit)
    async with visitors(gate) as them:
        them.come(*range(6))
        await turns_of_the_loop()
        gate.refused(time.monotonic(), 1e-6)
        await asyncio.sleep(0.001)
        assert limit.value == 2
        assert metrics.REGISTRY.get_sample_value("vqa_concurrency_limit") == 2
        for leaving, inside in ((0, [1, 2, 3]), (1, [2, 3]), (2, [3, 4])):
            them.leave(leaving)
            await turns_of_the_loop()
            assert them.inside == inside


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


@given(maximum=st.integers(1, 4), operations=OPERATIONS)
async def test_no_place_is_lost_or_made_up_whatever_happens_in_which_order(
    maximum: int, operations: list[tuple[str, int, int]]
) -> None:
    limit = AdaptiveLimit(maximum)
    gate = Gate(limit)
    async with visitors(gate) as them:
        trials = 0
        for name, (operation, which, turns) in enumerate(operations):
            known = list(them.tasks)
            match operation:
                case "come":
                    them.come(name)
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
                case "succeed":
                    gate.succeeded()
                case "refuse":
                    gate.refused(time.monotonic(), 1e-9)
            await turns_of_the_loop(turns)
            assert len(them.inside) <= maximum + trials

        gate.open()
        them.leave_all()
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*them.tasks.values(), return_exceptions=True)
        assert them.inside == []
        # Now it is as good as new: as many as the limit says pass, and not one more.
        await asyncio.sleep(1e-6)
        newcomers = range(1000, 1000 + limit.value + 1)
        them.come(*newcomers)
        await turns_of_the_loop()
        assert them.inside == list(newcomers)[:-1]
