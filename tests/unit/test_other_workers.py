"""A redelivered job waits while another worker has it."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import pytest

from tests.unit.fake_clock import FakeClock
from tests.unit.fakes import a_delivery, cancel_all, turns_of_the_loop
from worker.jobs.delivery import Delivery
from worker.jobs.other_workers import ASK_INTERVAL_S, MAX_ASKED, SILENCE_S, JobState, OtherWorkers

MAX_S = 60.0


@dataclass
class Scene:
    clock: FakeClock = field(default_factory=FakeClock)
    asked: list[Sequence[str]] = field(default_factory=list)
    can_ask: bool = True
    answer: JobState | None = None
    lives: bool = True

    def __post_init__(self) -> None:
        self.others = OtherWorkers(max_s=MAX_S, clock=self.clock)

    async def ask(self, keys: Sequence[str]) -> bool:
        self.asked.append(keys)
        if self.answer is not None:
            self.others.answered(dict.fromkeys(keys, self.answer))
        return self.can_ask

    def delivery(self, name: str = "a") -> Delivery:
        return a_delivery(message_id=name, redelivered=True, can_ack=lambda: self.lives)

    def wait(self, name: str = "a") -> asyncio.Task[bool]:
        return asyncio.create_task(self.others.have_published(self.delivery(name)))


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    scene = Scene()
    running = asyncio.create_task(scene.others.run(scene.ask))
    yield scene
    await cancel_all([running])


async def test_a_job_that_nobody_has_is_processed_after_the_silence(scene: Scene) -> None:
    waiting = scene.wait()
    await scene.clock.advance(SILENCE_S - 0.5)
    assert not waiting.done()
    assert len(scene.asked) == SILENCE_S / ASK_INTERVAL_S
    await scene.clock.advance(1)
    assert await waiting is False
    asked = len(scene.asked)
    await scene.clock.advance(10)
    assert len(scene.asked) == asked


async def test_a_job_waits_as_long_as_another_worker_works_on_it(scene: Scene) -> None:
    scene.answer = JobState.RUNNING
    waiting = scene.wait()
    await scene.clock.advance(MAX_S - 5)
    assert not waiting.done()
    scene.answer = JobState.PUBLISHED
    await scene.clock.advance(ASK_INTERVAL_S)
    assert await waiting is True


async def test_a_worker_that_falls_silent_loses_the_job(scene: Scene) -> None:
    scene.answer = JobState.RUNNING
    waiting = scene.wait()
    await scene.clock.advance(20)
    scene.answer = None
    await scene.clock.advance(SILENCE_S + ASK_INTERVAL_S)
    assert await waiting is False


async def test_no_job_waits_longer_than_the_limit(scene: Scene) -> None:
    scene.answer = JobState.RUNNING
    waiting = scene.wait()
    await scene.clock.advance(MAX_S + ASK_INTERVAL_S)
    assert await waiting is False


async def test_a_lost_delivery_ends_the_wait(scene: Scene) -> None:
    scene.answer = JobState.RUNNING
    waiting = scene.wait()
    await scene.clock.advance(2)
    scene.lives = False
    await scene.clock.advance(ASK_INTERVAL_S)
    assert await waiting is False


async def test_without_the_permission_to_ask_no_job_waits(scene: Scene) -> None:
    scene.can_ask = False
    waiting = [scene.wait(str(n)) for n in range(3)]
    await scene.clock.advance(0.1)
    assert [task.result() for task in waiting] == [False] * 3


async def test_many_jobs_are_asked_about_in_few_messages(scene: Scene) -> None:
    waiting = [scene.wait(str(n)) for n in range(2 * MAX_ASKED + 1)]
    await scene.clock.advance(0.1)
    assert [len(keys) for keys in scene.asked] == [MAX_ASKED, MAX_ASKED, 1]
    scene.others.close()
    assert set(await asyncio.gather(*waiting)) == {False}


async def test_two_deliveries_of_one_job_share_the_answer(scene: Scene) -> None:
    scene.answer = JobState.RUNNING
    first, second = scene.wait(), scene.wait()
    await scene.clock.advance(2)
    assert {len(keys) for keys in scene.asked} == {1}
    scene.answer = JobState.PUBLISHED
    await scene.clock.advance(ASK_INTERVAL_S)
    assert (await first, await second) == (True, True)


async def test_after_closing_no_job_waits(scene: Scene) -> None:
    waiting = scene.wait()
    await turns_of_the_loop()
    scene.others.close()
    assert await waiting is False
    assert await scene.wait("b") is False


async def test_answers_about_unknown_jobs_are_ignored(scene: Scene) -> None:
    scene.others.answered({"0" * 64: JobState.PUBLISHED})
    waiting = scene.wait()
    await scene.clock.advance(SILENCE_S + ASK_INTERVAL_S)
    assert await waiting is False
