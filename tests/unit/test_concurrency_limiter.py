"""Admission: the order of jobs, backoffs after 429s, closing, probes, and how many jobs to prefetch."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.fake_clock import FakeClock
from tests.unit.fakes import cancel_all, turns_of_the_loop
from worker.errors import NotAdmittedError, RateLimitedError
from worker.observability import metrics
from worker.resilience.concurrency_limiter import (
    LASTING_LIMIT_S,
    PREFETCH_DURING_BACKOFF,
    PREFETCH_HORIZON_S,
    ConcurrencyLimiter,
    Slot,
)

INITIAL = 32
# Only a deadlock takes longer.
PATIENCE_S = 60.0


def a_limiter(maximum: int, clock: FakeClock | None = None, *, models: int = 1) -> ConcurrencyLimiter:
    return ConcurrencyLimiter(maximum, initial=INITIAL, models=models, clock=clock or FakeClock())


def published_limit() -> float | None:
    return metrics.REGISTRY.get_sample_value("vqa_concurrency_limit")


class Jobs:
    """Tasks that wait for a slot and hold it until `finish`."""

    def __init__(self, limiter: ConcurrencyLimiter) -> None:
        self.limiter = limiter
        self.running: list[int] = []
        self.rejected: list[int] = []
        self._may_finish: dict[int, asyncio.Event] = {}
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self.slots: dict[int, Slot] = {}

    async def start(self, *names: int, model: str = "m") -> None:
        self.begin(*names, model=model)
        await turns_of_the_loop()

    def begin(self, *names: int, model: str = "m") -> None:
        for name in names:
            self._may_finish[name] = asyncio.Event()
            self.tasks[name] = asyncio.create_task(self._run(name, model))

    async def _run(self, name: int, model: str) -> None:
        try:
            async with self.limiter.slot(model) as slot:
                self.slots[name] = slot
                self.running.append(name)
                try:
                    await self._may_finish[name].wait()
                finally:
                    self.running.remove(name)
        except NotAdmittedError:
            self.rejected.append(name)

    async def finish(self, *names: int) -> None:
        for name in names:
            self._may_finish[name].set()
        await turns_of_the_loop()

    async def finish_all(self) -> None:
        await self.finish(*self._may_finish)


@asynccontextmanager
async def jobs_of(limiter: ConcurrencyLimiter) -> AsyncIterator[Jobs]:
    """Cancel the jobs that still run at the end."""
    jobs = Jobs(limiter)
    try:
        yield jobs
    finally:
        await cancel_all(jobs.tasks.values())


async def test_jobs_start_in_their_order_within_the_limit() -> None:
    async with jobs_of(a_limiter(2)) as jobs:
        await jobs.start(1, 2, 3, 4, 5)
        assert jobs.running == [1, 2]
        await jobs.finish(2)
        assert jobs.running == [1, 3]
        await jobs.finish(1, 3)
        assert jobs.running == [4, 5]


async def test_a_new_job_does_not_overtake_waiting_ones() -> None:
    async with jobs_of(a_limiter(1)) as jobs:
        await jobs.start(1, 2)
        jobs.begin(3)
        await jobs.finish(1)
        assert jobs.running == [2]


async def test_a_waiting_job_that_is_cancelled_takes_no_slot() -> None:
    async with jobs_of(a_limiter(1)) as jobs:
        await jobs.start(1, 2, 3)
        jobs.tasks[2].cancel()
        await jobs.finish(1)
        assert jobs.running == [3]


async def test_a_job_cancelled_at_its_admission_leaves_the_slot_to_the_next() -> None:
    limiter = a_limiter(1)
    async with jobs_of(limiter) as jobs:
        async with limiter.slot("m"):
            await jobs.start(1, 2)
        # Job 1 has the slot, and is cancelled before it runs.
        jobs.tasks[1].cancel()
        await turns_of_the_loop()
        assert jobs.running == [2]
        assert jobs.tasks[1].cancelled()


async def test_an_error_in_a_job_releases_the_slot() -> None:
    limiter = a_limiter(1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            async with asyncio.timeout(PATIENCE_S), limiter.slot("m"):
                raise ZeroDivisionError


async def test_a_closed_limiter_rejects_all_jobs_except_running_ones() -> None:
    limiter = a_limiter(1)
    async with jobs_of(limiter) as jobs:
        await jobs.start(1, 2, 3)
        limiter.close("the worker is paused")
        await jobs.start(4)
        assert jobs.running == [1]
        assert sorted(jobs.rejected) == [2, 3, 4]
        with pytest.raises(NotAdmittedError, match="the worker is paused"):
            async with limiter.slot("m"):
                pass
        # The slot of the running job is not lost.
        await jobs.finish(1)
        limiter.open()
        await jobs.start(5)
        assert jobs.running == [5]


async def test_a_second_close_replaces_the_reason() -> None:
    limiter = a_limiter(1)
    limiter.close("paused")
    limiter.close("stopping")
    with pytest.raises(NotAdmittedError, match="stopping"):
        async with limiter.slot("m"):
            pass


async def test_a_probe_admits_exactly_one_job() -> None:
    limiter = a_limiter(5)
    limiter.close("paused")
    async with jobs_of(limiter) as jobs:
        limiter.allow_probe()
        await jobs.start(1, 2, 3)
        assert jobs.running == [1]
        assert jobs.rejected == [2, 3]
        limiter.allow_probe()
        limiter.allow_probe()
        await jobs.start(4, 5)
        assert jobs.running == [1, 4]
        assert jobs.rejected == [2, 3, 5]


async def test_an_unused_probe_ends_with_the_next_close() -> None:
    limiter = a_limiter(5)
    for reopen in (True, False):
        limiter.close("paused")
        limiter.allow_probe()
        if reopen:
            limiter.open()
        limiter.close("stopping")
        with pytest.raises(NotAdmittedError):
            async with limiter.slot("m"):
                pass


async def test_a_running_probe_counts_when_the_limiter_opens() -> None:
    limiter = a_limiter(1)
    limiter.close("paused")
    async with jobs_of(limiter) as jobs:
        limiter.allow_probe()
        await jobs.start(1)
        limiter.open()
        await jobs.start(2)
        assert jobs.running == [1]
        await jobs.finish(1)
        assert jobs.running == [2]


async def meet_429(limiter: ConcurrencyLimiter, retry_after_s: float | None, model: str = "m") -> None:
    async with limiter.slot(model) as slot:
        slot.rate_limited(RateLimitedError(retry_after_s))


async def test_after_a_429_no_job_starts_before_the_end_of_retry_after() -> None:
    clock = FakeClock()
    limiter = a_limiter(5, clock)
    async with jobs_of(limiter) as jobs:
        await meet_429(limiter, 30.0)
        await jobs.start(1)
        await clock.advance(29.9)
        assert jobs.running == []
        await clock.advance(0.2)
        assert jobs.running == [1]


async def test_a_longer_retry_after_extends_a_backoff() -> None:
    clock = FakeClock()
    limiter = a_limiter(5, clock)
    async with jobs_of(limiter) as jobs:
        await jobs.start(1, 2)
        jobs.slots[1].rate_limited(RateLimitedError(30.0))
        await jobs.start(3)
        jobs.slots[2].rate_limited(RateLimitedError(60.0))
        await jobs.finish(1, 2)
        await clock.advance(59.9)
        assert jobs.running == []
        await clock.advance(0.2)
        assert jobs.running == [3]


async def test_a_waiting_job_starts_at_the_end_of_a_backoff_although_others_ended_during_it() -> None:
    clock = FakeClock()
    async with jobs_of(a_limiter(1, clock)) as jobs:
        await jobs.start(1, 2)
        jobs.slots[1].rate_limited(RateLimitedError(5.0))
        await jobs.finish(1)
        assert jobs.running == []
        await clock.advance(5.1)
        assert jobs.running == [2]


class RestlessClock(FakeClock):
    """A clock that advances by 10 ms at each reading."""

    def monotonic(self) -> float:
        self.jump(0.01)
        return super().monotonic()


async def test_a_backoff_that_ends_between_two_readings_of_the_clock_blocks_no_job() -> None:
    for nth in range(20):
        clock = RestlessClock()
        limiter = a_limiter(5, clock)
        async with jobs_of(limiter) as jobs:
            await meet_429(limiter, 0.02 + 0.005 * nth)
            await jobs.start(1)
            await clock.advance(5.0)
            assert jobs.running == [1]


async def test_retry_after_also_stops_calls_that_have_a_slot_but_did_not_begin() -> None:
    async with jobs_of(a_limiter(5)) as jobs:
        await jobs.start(1, 2)
        await jobs.start(3, model="another")
        assert not jobs.slots[1].must_wait
        jobs.slots[2].rate_limited(RateLimitedError(None))
        # The worker's own backoff concerns new jobs only.
        assert not jobs.slots[1].must_wait
        jobs.slots[2].rate_limited(RateLimitedError(60.0))
        assert jobs.slots[1].must_wait
        assert not jobs.slots[3].must_wait


async def test_a_success_raises_the_limit_and_admits_a_waiting_job() -> None:
    async with jobs_of(a_limiter(40)) as jobs:
        await jobs.start(*range(40))
        assert len(jobs.running) == INITIAL
        jobs.slots[0].succeeded()
        await turns_of_the_loop()
        assert len(jobs.running) == INITIAL + 1
        assert published_limit() == INITIAL + 1


async def test_a_lower_limit_stops_no_running_job() -> None:
    clock = FakeClock()
    async with jobs_of(a_limiter(4, clock)) as jobs:
        await jobs.start(*range(6))
        jobs.slots[0].rate_limited(RateLimitedError(None))
        assert published_limit() == 2
        for finished, running in ((0, [1, 2, 3]), (1, [2, 3])):
            await jobs.finish(finished)
            await clock.advance(1.0)
            assert jobs.running == running
        await jobs.finish(2)
        assert jobs.running == [3, 4]


async def test_a_429_for_one_model_does_not_slow_another() -> None:
    limiter = a_limiter(40)
    async with jobs_of(limiter) as jobs:
        await jobs.start(*range(5), model="busy")
        for n in range(5):
            jobs.slots[n].rate_limited(RateLimitedError(3600.0))
        await jobs.start(5, model="busy")
        await jobs.start(*range(6, 38), model="idle")
        assert jobs.running == [*range(5), *range(6, 38)]
        assert limiter.backoff_left_s("busy") == 3600
        assert limiter.backoff_left_s("idle") == limiter.backoff_left_s("unknown") == 0
        assert list(limiter.backoffs()) == ["busy"]


async def test_the_maximum_holds_over_all_models() -> None:
    async with jobs_of(a_limiter(3)) as jobs:
        jobs.begin(1, 2, model="a")
        jobs.begin(3, 4, model="b")
        await jobs.start(5, model="a")
        assert jobs.running == [1, 2, 3]
        # Jobs of all models start in the order of their arrival.
        await jobs.finish(1)
        assert jobs.running == [2, 3, 4]
        assert published_limit() == 3


async def test_the_published_limit_is_that_of_the_models_in_use() -> None:
    clock = FakeClock()
    limiter = a_limiter(64, clock)
    assert published_limit() == INITIAL
    await meet_429(limiter, None, "a")
    await meet_429(limiter, None, "b")
    assert published_limit() == 2
    await clock.advance(61.0)
    async with limiter.slot("a"):
        limiter.update_gauge()
        assert published_limit() == 1


# How many jobs to prefetch


async def test_before_the_first_answer_the_maximum_is_wanted() -> None:
    limiter = a_limiter(200)
    assert limiter.target_prefetch() == 200
    async with limiter.slot("m"):
        assert limiter.target_prefetch() == 200


@pytest.mark.parametrize(
    ("took_s", "wanted"),
    [
        pytest.param(0.1, 200, id="short calls: the maximum"),
        pytest.param(PREFETCH_HORIZON_S, 66, id="calls of 5 s: twice the limit"),
        pytest.param(60.0, 42, id="long calls: a quarter more than the limit"),
    ],
)
async def test_jobs_that_can_start_soon_are_wanted(took_s: float, wanted: int) -> None:
    clock = FakeClock()
    async with jobs_of(a_limiter(200, clock)) as jobs:
        await jobs.start(*range(INITIAL))
        clock.jump(took_s)
        jobs.slots[0].succeeded()
        assert jobs.limiter.target_prefetch() == pytest.approx(wanted, abs=1)


async def test_after_a_429_at_most_twice_the_limit_is_wanted() -> None:
    clock = FakeClock()
    async with jobs_of(a_limiter(200, clock)) as jobs:
        await jobs.start(*range(INITIAL))
        clock.jump(0.1)
        jobs.slots[0].succeeded()
        for n in range(12):
            jobs.slots[n].rate_limited(RateLimitedError(None))
            await jobs.finish(n)
        assert len(jobs.running) == 20
        assert 36 <= jobs.limiter.target_prefetch() <= 42


async def test_during_a_long_retry_after_no_job_is_wanted_until_shortly_before_its_end() -> None:
    clock = FakeClock()
    limiter = a_limiter(200, clock)
    await meet_429(limiter, PREFETCH_HORIZON_S + 60)
    assert limiter.target_prefetch() == 0
    await clock.advance(60.1)
    assert limiter.target_prefetch() == 2


async def test_during_the_backoff_of_one_of_several_models_jobs_for_the_others_are_wanted() -> None:
    limiter = a_limiter(200, models=2)
    await meet_429(limiter, 3600.0, "a")
    assert limiter.target_prefetch() == PREFETCH_DURING_BACKOFF
    async with limiter.slot("b"):
        assert limiter.target_prefetch() == 200
    await meet_429(limiter, 3600.0, "b")
    assert limiter.target_prefetch() == 0


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(
            ["start"] * 3
            + ["finish"] * 2
            + ["cancel", "close", "open", "probe", "succeed", "rate_limit", "wait"]
        ),
        st.integers(0, 100),
        st.integers(0, 3),
    ),
    max_size=40,
)


@given(maximum=st.integers(1, 4), operations=OPERATIONS)
async def test_no_sequence_of_operations_loses_or_adds_a_slot(
    maximum: int, operations: list[tuple[str, int, int]]
) -> None:
    clock, probes = FakeClock(), 0
    limiter = a_limiter(maximum, clock)
    async with jobs_of(limiter) as jobs:
        for name, (operation, which, turns) in enumerate(operations):
            known = list(jobs.tasks)
            match operation:
                case "start":
                    jobs.begin(name, model="ab"[which % 2])
                case "finish" if known:
                    await jobs.finish(known[which % len(known)])
                case "cancel" if known:
                    jobs.tasks[known[which % len(known)]].cancel()
                case "close":
                    limiter.close("closed")
                case "open":
                    limiter.open()
                case "probe":
                    limiter.allow_probe()
                    probes += 1
                case "succeed" | "rate_limit" if jobs.running:
                    slot = jobs.slots[jobs.running[which % len(jobs.running)]]
                    slot.succeeded() if operation == "succeed" else slot.rate_limited(
                        RateLimitedError(which / 100)
                    )
                case "wait":
                    await clock.advance(which / 100)
            await turns_of_the_loop(turns)
            assert len(jobs.running) <= maximum + probes

        limiter.open()
        await jobs.finish_all()
        await clock.advance(100.0)
        assert jobs.running == []
        assert all(task.done() for task in jobs.tasks.values())
        # As in a new limiter, exactly the maximum of jobs runs.
        new = range(1000, 1000 + maximum + 1)
        await jobs.start(*new, model="c")
        assert jobs.running == list(new)[:-1]


async def test_the_oldest_request_is_the_slot_held_longest() -> None:
    clock = FakeClock()
    limiter = a_limiter(4, clock)
    assert limiter.oldest_request() == float("inf")
    async with limiter.slot("m") as first:
        await clock.advance(5.0)
        async with limiter.slot("m"):
            assert limiter.oldest_request() == first.started
    assert limiter.oldest_request() == float("inf")


async def test_a_rate_limit_lasts_until_a_request_succeeds() -> None:
    clock = FakeClock()
    limiter = a_limiter(4, clock)
    async with limiter.slot("m") as slot:
        slot.rate_limited(RateLimitedError(None, "slow down"))
        assert limiter.lasting_limits() == {}
        await clock.advance(LASTING_LIMIT_S)
        slot.rate_limited(RateLimitedError(None, "the daily quota is used up"))
        assert limiter.lasting_limits() == {"m": "the daily quota is used up"}
        slot.succeeded()
        assert limiter.lasting_limits() == {}
