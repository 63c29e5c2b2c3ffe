"""The system's clock, and the clock that tests advance."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from tests.unit.fake_clock import FakeClock
from tests.unit.fakes import turns_of_the_loop
from worker.clock import Clock


async def test_the_clock_is_the_system_s() -> None:
    clock = Clock()
    before, monotonic = datetime.now(UTC), clock.monotonic()
    await clock.sleep(0)
    assert clock.monotonic() >= monotonic
    assert clock.now() >= before
    with pytest.raises(TimeoutError):
        async with clock.timeout(0):
            await asyncio.Event().wait()


async def test_a_fake_clock_wakes_sleepers_in_order_and_on_time() -> None:
    clock, woken = FakeClock(), dict[float, float]()
    started = clock.monotonic()

    async def sleeper(seconds: float) -> None:
        await clock.sleep(seconds)
        woken[seconds] = clock.monotonic() - started

    async with asyncio.TaskGroup() as tasks:
        for seconds in (5.0, 1.0, 3.0):
            tasks.create_task(sleeper(seconds))
        await clock.advance(4)
        assert woken == {1.0: 1.0, 3.0: 3.0}
        await clock.advance(4)
    assert woken[5.0] == 5.0
    assert clock.monotonic() == started + 8


async def test_a_fake_clock_s_timeout_expires_during_advance_and_not_after_its_block() -> None:
    clock = FakeClock()

    async def wait() -> None:
        async with clock.timeout(10):
            await asyncio.Event().wait()

    waiting = asyncio.create_task(wait())
    async with clock.timeout(5):
        pass
    await clock.advance(9.9)
    assert not waiting.done()
    await clock.advance(0.1)
    await turns_of_the_loop()
    assert isinstance(waiting.exception(), TimeoutError)


async def test_a_fake_clock_returns_the_date_of_its_seconds() -> None:
    clock = FakeClock()
    before = clock.now()
    clock.jump(90)
    assert clock.now() - before == timedelta(seconds=90)
