"""The memory budget: reservations are granted in order, and no bytes leak."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.unit.fakes import cancel_all, free, turns_of_the_loop
from worker.images.memory_budget import MemoryBudget, Reservation


class Holders:
    """Tasks that each hold a reservation until asked to leave."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self.holding: list[int] = []
        self.shares: dict[int, Reservation] = {}
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self._leave: dict[int, asyncio.Event] = {}

    def come(self, name: int, wanted: int) -> None:
        self._leave[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._hold(name, wanted))

    async def _hold(self, name: int, wanted: int) -> None:
        async with self._budget.reserve(wanted) as self.shares[name]:
            self.holding.append(name)
            try:
                await self._leave[name].wait()
            finally:
                self.holding.remove(name)

    def leave(self, *names: int) -> None:
        for name in names:
            self._leave[name].set()

    def cancel(self, *names: int) -> None:
        for name in names:
            self.tasks[name].cancel()


@asynccontextmanager
async def holders(budget: MemoryBudget) -> AsyncIterator[Holders]:
    them = Holders(budget)
    try:
        yield them
    finally:
        await cancel_all(them.tasks.values())


async def test_reservations_that_fit_are_granted_and_others_wait_in_order() -> None:
    async with holders(MemoryBudget(10)) as them:
        for name, wanted in enumerate([6, 4, 5, 1, 1]):
            them.come(name, wanted)
        await turns_of_the_loop()
        assert them.holding == [0, 1]
        # The small one would fit, but the large one is first: otherwise it could wait forever.
        them.leave(1)
        await turns_of_the_loop()
        assert them.holding == [0]
        them.leave(0)
        await turns_of_the_loop()
        assert them.holding == [2, 3, 4]


async def test_a_reservation_larger_than_the_budget_gets_all_of_it() -> None:
    budget = MemoryBudget(10)
    async with holders(budget) as them:
        them.come(0, 1000)
        them.come(1, 1)
        await turns_of_the_loop()
        assert them.holding == [0]
        them.leave(0)
        await turns_of_the_loop()
        assert them.holding == [1]
        them.leave(1)
    assert free(budget) == 10


async def test_a_reservation_of_nothing_does_not_wait() -> None:
    async with holders(MemoryBudget(10)) as them:
        them.come(0, 10)
        them.come(1, 5)
        them.come(2, 0)
        await turns_of_the_loop()
        assert them.holding == [0, 2]


async def test_bytes_released_early_go_to_the_next_waiter() -> None:
    budget = MemoryBudget(10)
    async with holders(budget) as them:
        them.come(0, 10)
        them.come(1, 7)
        await turns_of_the_loop()
        them.shares[0].shrink_to(4)
        await turns_of_the_loop()
        assert them.holding == [0]
        them.shares[0].shrink_to(3)
        await turns_of_the_loop()
        assert them.holding == [0, 1]
        # A reservation only shrinks.
        them.shares[0].shrink_to(9)
        assert budget.try_reserve(1) is None
        them.shares[0].release()
        them.shares[0].release()
        assert free(budget) == 3
    assert free(budget) == 10


@pytest.mark.parametrize("cancelled", [[1], [2], [1, 2], [3]])
async def test_a_cancelled_waiter_does_not_block_the_others(cancelled: list[int]) -> None:
    budget = MemoryBudget(10)
    async with holders(budget) as them:
        them.come(0, 6)
        for name, wanted in ((1, 9), (2, 8), (3, 2)):
            them.come(name, wanted)
        await turns_of_the_loop()
        assert them.holding == [0]
        them.cancel(*cancelled)
        await turns_of_the_loop()
        # The small one is next, and fits, only if both large ones were cancelled.
        assert them.holding == ([0, 3] if cancelled == [1, 2] else [0])
        them.leave(0, 1, 2, 3)
        await asyncio.gather(*them.tasks.values(), return_exceptions=True)
    assert free(budget) == 10


async def test_a_waiter_cancelled_just_after_its_grant_releases_the_bytes() -> None:
    budget = MemoryBudget(10)
    async with holders(budget) as them:
        them.come(0, 10)
        them.come(1, 10)
        them.come(2, 10)
        await turns_of_the_loop()
        # All in one turn of the event loop: 1 has its reservation but has not resumed yet.
        them.shares[0].release()
        them.cancel(1)
        await turns_of_the_loop()
        assert them.holding == [0, 2]
        them.leave(2)
    assert free(budget) == 10


async def test_try_reserve_neither_waits_nor_overtakes() -> None:
    budget = MemoryBudget(10)
    share = budget.try_reserve(8)
    assert share is not None
    assert budget.try_reserve(3) is None
    async with holders(budget) as them:
        them.come(0, 5)
        await turns_of_the_loop()
        assert budget.try_reserve(1) is None
        share.release()
        await turns_of_the_loop()
        assert them.holding == [0]
        assert budget.try_reserve(6) is None
        them.leave(0)
    assert free(budget) == 10


async def test_the_limit_holds_and_no_bytes_leak_in_any_order_of_events() -> None:
    chance = random.Random(2)  # noqa: S311 - no secret
    for _ in range(100):
        budget, sizes = MemoryBudget(20), [chance.randint(0, 25) for _ in range(30)]
        async with holders(budget) as them:
            for name, wanted in enumerate(sizes):
                them.come(name, wanted)
                for it in chance.sample(range(name + 1), min(name + 1, 3)):
                    chance.choice([them.leave, them.cancel, lambda _: None])(it)
                await turns_of_the_loop(chance.randint(0, 3))
                assert sum(min(sizes[it], 20) for it in them.holding) <= 20
            them.leave(*range(len(sizes)))
            await asyncio.gather(*them.tasks.values(), return_exceptions=True)
        assert free(budget) == 20


async def test_a_waiter_cancelled_just_before_its_turn_is_only_cancelled() -> None:
    budget = MemoryBudget(10)
    async with holders(budget) as them:
        them.come(0, 10)
        them.come(1, 10)
        await turns_of_the_loop()
        # All in one turn of the event loop: 1 leaves the queue with the bytes of 0.
        them.cancel(1)
        them.shares[0].release()
        with pytest.raises(asyncio.CancelledError):
            await them.tasks[1]
    assert free(budget) == 10


async def test_a_reservation_that_holds_content_grows_without_waiting_and_others_wait() -> None:
    budget = MemoryBudget(10)
    async with budget.reserve(1) as one, budget.reserve(1) as other:
        await one.extend(5)
        one.grow(1)
        # Waits for 8 of 3 bytes, and holds nothing meanwhile.
        waiting = asyncio.create_task(other.extend(7))
        await turns_of_the_loop()
        await one.extend(4)
        one.grow(1)
        one.shrink_to(3)
        assert not waiting.done()
        one.release()
        await waiting
        assert free(budget) == 2
    assert free(budget) == 10


async def test_jobs_with_several_images_to_convert_stay_near_the_limit() -> None:
    budget, processes, held = MemoryBudget(64), asyncio.Semaphore(2), [0]
    peak = 0

    async def convert(reservation: Reservation) -> None:
        nonlocal peak
        await reservation.extend(3)
        async with processes:
            await turns_of_the_loop(3)
        held[0] += 3
        peak = max(peak, held[0])

    async def run() -> None:
        async with budget.reserve(8) as reservation:
            await asyncio.gather(*(convert(reservation) for _ in range(8)))
            await turns_of_the_loop(3)
            held[0] -= 24

    await asyncio.gather(*(run() for _ in range(40)))
    assert peak <= 2 * 64
    assert free(budget) == 64
