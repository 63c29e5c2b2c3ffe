"""The flow of jobs follows what the gate wants: not at every turn, and never beyond the maximum."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.running import until
from tests.unit.fakes import TOPOLOGY, FakePublisher, a_delivery, cancel_all
from worker.jobs.delivery import Delivery
from worker.jobs.in_flight_jobs import InFlightJobs
from worker.jobs.outcome import Outcome, Requeued
from worker.rabbitmq.settlement import ReplyPolicy, Settlement
from worker.resilience import flow
from worker.resilience.concurrency_limiter import AdmissionClosedError, ConcurrencyLimiter
from worker.resilience.flow import FlowKeeper, next_allowance


@pytest.mark.parametrize(
    ("allowed", "wanted", "unsettled", "then"),
    [
        pytest.param(200, 200, 200, 200, id="all is as it was"),
        pytest.param(200, 120, 200, 200, id="a little less changes nothing"),
        pytest.param(200, 40, 200, 0, id="much less: first what is here has to go"),
        pytest.param(0, 40, 100, 0, id="more is here than is wanted"),
        pytest.param(0, 40, 40, 40, id="no more is here than is wanted"),
        pytest.param(0, 0, 0, 0, id="nothing is wanted"),
        pytest.param(0, 200, 150, 50, id="what is here counts too"),
        pytest.param(40, 47, 40, 40, id="a little more changes nothing"),
        pytest.param(40, 60, 40, 60, id="much more"),
        pytest.param(190, 200, 190, 200, id="the maximum is the maximum"),
        pytest.param(40, 200, 80, 160, id="what was here before counts too"),
        pytest.param(3, 0, 3, 0, id="the API may not be called for long"),
    ],
)
def test_what_is_allowed_follows_what_is_wanted(allowed: int, wanted: int, unsettled: int, then: int) -> None:
    assert next_allowance(allowed, wanted, unsettled, maximum=200) == then


@given(
    maximum=st.integers(1, 300),
    wishes=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=50),
)
def test_there_are_never_more_than_the_maximum_and_always_some_if_some_are_wanted(
    maximum: int, wishes: list[tuple[float, float]]
) -> None:
    # A queue without end, of which each consumer takes all that it may.
    allowed, fresh, old = maximum, maximum, 0
    for wish, share_done in wishes:
        before, wanted = allowed, round(wish * maximum)
        allowed = next_allowance(allowed, wanted, fresh + old, maximum)
        if allowed < before:
            fresh, old = 0, fresh + old
        fresh = allowed
        assert fresh + old <= maximum
        old -= round(share_done * old)
    for _ in range(4):
        allowed = next_allowance(allowed, maximum, allowed, maximum)
    assert allowed == maximum


class Tap:
    """Where jobs come from."""

    def __init__(self) -> None:
        self.allowed: list[int] = []

    async def allow(self, prefetch: int) -> None:
        self.allowed.append(prefetch)


class Scene:
    """A keeper at work, with jobs that wait at the gate."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self.gate = ConcurrencyLimiter(200, initial=32)
        self.tap = Tap()
        self.leave = asyncio.Event()
        self.publisher = FakePublisher()
        settlement = Settlement(self.publisher, TOPOLOGY, ReplyPolicy([]))
        self.in_flight = InFlightJobs(tasks, self._process, settlement)
        self.keeping = tasks.create_task(FlowKeeper(self.gate, self.tap, self.in_flight, 200).run())

    async def _process(self, delivery: Delivery) -> Outcome:
        try:
            async with self.gate.slot("m"):
                await self.leave.wait()
        except AdmissionClosedError:
            pass
        return Requeued(job_id=delivery.message_id, model="m", reason="test")

    async def allows(self, *numbers: int) -> None:
        await until(lambda: self.tap.allowed == [*numbers], f"{numbers} jobs may come: {self.tap.allowed}")


@pytest.fixture
async def scene(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    monkeypatch.setattr(flow, "TICK_S", 0.01)
    async with asyncio.TaskGroup() as tasks:
        scene = Scene(tasks)
        yield scene
        scene.gate.close("the test is over")
        scene.leave.set()
        scene.publisher.let_go.set()
        await cancel_all([scene.keeping])


async def refuse(scene: Scene, times: int, retry_after_s: float | None) -> None:
    """Have calls meet 429s, until one fits at a time."""
    scene.gate.close("refused")
    for _ in range(times):
        scene.gate.allow_trial()
        async with scene.gate.slot("m") as slot:
            slot.rate_limited(retry_after_s)
    scene.gate.open()


async def test_as_long_as_nobody_is_refused_nothing_changes(scene: Scene) -> None:
    async with scene.gate.slot("m") as slot:
        slot.succeeded()
    await asyncio.sleep(0.1)
    assert scene.tap.allowed == []


async def test_with_a_lowered_limit_no_more_come_until_most_have_gone_and_then_only_some(
    scene: Scene,
) -> None:
    for n in range(10):
        scene.in_flight.accept(a_delivery(message_id=f"m-{n}"))
    await refuse(scene, 1, None)
    await scene.allows(0)
    # They have gone, or were given back.
    scene.leave.set()
    await scene.in_flight.drained()
    await scene.allows(0, scene.gate.wanted())
    assert 1 <= scene.tap.allowed[-1] < 100


async def test_jobs_that_are_being_published_are_not_counted_among_those_that_wait_for_the_api(
    scene: Scene,
) -> None:
    await refuse(scene, 1, None)
    await scene.allows(0, scene.gate.wanted())
    assert scene.gate.present() == 0
    scene.publisher.let_go.clear()
    scene.leave.set()
    for n in range(60):
        scene.in_flight.accept(a_delivery(message_id=f"m-{n}"))
    await until(lambda: scene.tap.allowed[-1] > 40, "more may come")
    scene.publisher.let_go.set()
    await scene.in_flight.drained()


async def test_while_the_api_may_not_be_called_for_long_none_come_and_shortly_before_it_may_some(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    await refuse(scene, 1, 3600.0)
    await scene.allows(0)
    await asyncio.sleep(0.1)
    assert scene.tap.allowed == [0]
    monkeypatch.setattr("worker.resilience.concurrency_limiter.PREFETCH_HORIZON_S", 3601.0)
    await until(lambda: len(scene.tap.allowed) > 1, "jobs may come again")
    assert scene.tap.allowed == [0, 2]
