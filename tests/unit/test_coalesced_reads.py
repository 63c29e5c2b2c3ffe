"""Concurrent readers of one image share one S3 request, even if some are cancelled."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.unit.fakes import free, turns_of_the_loop
from vqa_worker.messages.error_codes import ErrorCode
from worker.errors import Dependency, DependencyDownError, JobError, TransientError
from worker.images.coalesced_reads import CoalescedReads
from worker.images.memory_budget import MemoryBudget
from worker.s3.aws import S3Object
from worker.s3.object_stream import ObjectStream

IMAGE = S3Object("photos", "cat.png")
PIECES = [b"one", b"two", b"three"]
SIZE = len(b"".join(PIECES))


class FakeReading:
    """Yield a chunk for each `go`; fail at the end if configured."""

    def __init__(self) -> None:
        self.size = SIZE
        self.encoding = ""
        self.go = asyncio.Semaphore(0)
        self.failure: Exception | None = None
        self.given = 0
        self.was_closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in PIECES:
            await self.go.acquire()
            assert not self.was_closed
            self.given += 1
            yield piece
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        self.was_closed = True

    def finish(self) -> None:
        for _ in PIECES:
            self.go.release()


class FakeS3:
    """Open streams when the test allows it."""

    def __init__(self) -> None:
        self.opened: list[FakeReading] = []
        self.asked = 0
        self.given_up = 0
        self.failure: Exception | None = None
        self.may_open = asyncio.Event()

    async def open(self, source: S3Object) -> ObjectStream:
        self.asked += 1
        try:
            await self.may_open.wait()
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        if self.failure is not None:
            raise self.failure
        assert source.bucket == "photos"
        self.opened.append(FakeReading())
        return self.opened[-1]


class Scene:
    def __init__(self, budget: int = 1000) -> None:
        self.s3 = FakeS3()
        self.budget = MemoryBudget(budget)
        self.limit = budget
        self.reads = CoalescedReads(self.s3.open, self.budget, own_bytes=0)

    def readers(self, count: int, source: S3Object = IMAGE) -> "list[asyncio.Task[bytes]]":
        return [asyncio.create_task(self._read(source)) for _ in range(count)]

    async def _read(self, source: S3Object) -> bytes:
        reading = await self.reads.open(source)
        try:
            assert reading.size == SIZE
            return b"".join([piece async for piece in reading])
        finally:
            reading.close()

    def nothing_is_left(self) -> bool:
        """Return whether every read has ended and the budget has all its bytes."""
        return all(it.was_closed for it in self.s3.opened) and free(self.budget) == self.limit


async def ended(tasks: "list[asyncio.Task[bytes]]") -> list[bytes | BaseException]:
    async with asyncio.timeout(60):
        return await asyncio.gather(*tasks, return_exceptions=True)


async def test_concurrent_readers_share_one_read_and_each_gets_every_byte() -> None:
    scene = Scene()
    tasks = scene.readers(20)
    await turns_of_the_loop()
    scene.s3.may_open.set()
    await turns_of_the_loop()
    assert free(scene.budget) == scene.limit - SIZE
    scene.s3.opened[0].finish()
    assert await ended(tasks) == [b"onetwothree"] * 20
    assert scene.s3.asked == 1
    assert scene.nothing_is_left()


async def test_another_object_or_a_later_request_is_read_separately() -> None:
    scene = Scene()
    tasks = [*scene.readers(2), *scene.readers(1, S3Object("photos", "dog.png"))]
    await turns_of_the_loop()
    scene.s3.may_open.set()
    await turns_of_the_loop()
    late = scene.readers(1)
    await turns_of_the_loop()
    for reading in scene.s3.opened:
        reading.finish()
    assert await ended([*tasks, *late]) == [b"onetwothree"] * 4
    assert scene.s3.asked == 3
    assert scene.nothing_is_left()


async def test_a_single_reader_needs_no_buffer() -> None:
    scene = Scene()
    tasks = scene.readers(1)
    scene.s3.may_open.set()
    await turns_of_the_loop()
    assert free(scene.budget) == scene.limit
    # The object is read as fast as its reader consumes it.
    assert scene.s3.opened[0].given == 0
    scene.s3.opened[0].finish()
    assert await ended(tasks) == [b"onetwothree"]
    assert scene.nothing_is_left()


async def test_without_memory_for_a_buffer_each_reader_reads_the_object_itself() -> None:
    scene = Scene(budget=SIZE - 1)
    tasks = scene.readers(3)
    await turns_of_the_loop()
    scene.s3.may_open.set()
    await turns_of_the_loop()
    assert len(scene.s3.opened) == scene.s3.asked == 3
    for reading in scene.s3.opened:
        reading.finish()
    assert await ended(tasks) == [b"onetwothree"] * 3
    assert scene.nothing_is_left()


async def test_slow_readers_delay_neither_fast_readers_nor_the_read() -> None:
    scene = Scene()
    slow, fast = asyncio.create_task(scene.reads.open(IMAGE)), scene.readers(1)
    await turns_of_the_loop()
    scene.s3.may_open.set()
    await turns_of_the_loop()
    scene.s3.opened[0].finish()
    assert await ended(fast) == [b"onetwothree"]
    reading = await slow
    assert b"".join([piece async for piece in reading]) == b"onetwothree"
    reading.close()
    reading.close()
    assert scene.nothing_is_left()


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("moment", range(14))
async def test_readers_may_be_cancelled_at_any_moment(count: int, kept: bool, moment: int) -> None:
    """The first reader is cancelled, then the others, one per turn of the event loop."""
    for leavers in range(1, count + 1):
        scene = Scene(budget=1000 if kept else SIZE - 1)
        tasks = scene.readers(count)

        def step(n: int, scene: Scene = scene) -> None:
            if n == 4:
                scene.s3.may_open.set()
            if n >= 8:
                for reading in scene.s3.opened:
                    reading.go.release()

        for n in range(moment):
            step(n)
            await turns_of_the_loop(1)
        for task in tasks[:leavers]:
            task.cancel()
            await turns_of_the_loop(1)
        scene.s3.may_open.set()
        await turns_of_the_loop()
        for reading in scene.s3.opened:
            reading.finish()
        found = await ended(tasks)
        assert set(found[leavers:]) <= {b"onetwothree"}
        assert all(isinstance(it, asyncio.CancelledError) or it == b"onetwothree" for it in found[:leavers])
        await turns_of_the_loop()
        assert scene.nothing_is_left()
        # Later readers start a new read.
        again = scene.readers(2)
        await turns_of_the_loop()
        for reading in scene.s3.opened:
            reading.finish()
        assert await ended(again) == [b"onetwothree"] * 2
        assert scene.nothing_is_left()


@pytest.mark.parametrize("count", [1, 3])
async def test_the_read_ends_when_the_last_reader_leaves(count: int) -> None:
    scene = Scene()
    tasks = scene.readers(count)
    await turns_of_the_loop()
    for task in tasks:
        task.cancel()
    await ended(tasks)
    await turns_of_the_loop()
    assert scene.s3.given_up == scene.s3.asked
    assert scene.nothing_is_left()


async def test_if_the_opening_reader_is_cancelled_the_others_open_the_object_themselves() -> None:
    scene = Scene()
    tasks = scene.readers(3)
    await turns_of_the_loop()
    tasks[0].cancel()
    await turns_of_the_loop()
    scene.s3.may_open.set()
    await turns_of_the_loop()
    for reading in scene.s3.opened:
        reading.finish()
    assert (await ended(tasks))[1:] == [b"onetwothree"] * 2
    assert scene.nothing_is_left()


async def test_a_reader_that_arrives_just_after_the_last_one_left_is_served() -> None:
    scene = Scene()
    cancelled = scene.readers(1)
    await turns_of_the_loop()
    cancelled[0].cancel()
    # In the turn of the event loop in which the cancelled reader ends its read.
    await turns_of_the_loop(1)
    late = scene.readers(1)
    await turns_of_the_loop()
    scene.s3.may_open.set()
    await turns_of_the_loop()
    scene.s3.opened[-1].finish()
    assert await ended(late) == [b"onetwothree"]


@pytest.mark.parametrize(
    "fault",
    [
        JobError(ErrorCode.IMAGE_NOT_FOUND, "none"),
        TransientError(Dependency.S3, "timeout", "slow"),
        DependencyDownError(Dependency.S3, "down"),
    ],
    ids=lambda it: type(it).__name__,
)
@pytest.mark.parametrize("count", [1, 3])
async def test_an_error_in_opening_is_raised_for_every_reader(fault: Exception, count: int) -> None:
    scene = Scene()
    scene.s3.failure = fault
    tasks = scene.readers(count)
    await turns_of_the_loop()
    scene.s3.may_open.set()
    assert [type(it) for it in await ended(tasks)] == [type(fault)] * count
    assert scene.s3.asked == 1
    assert scene.nothing_is_left()
    # The next reader sends a new request.
    scene.s3.failure = None
    again = scene.readers(1)
    await turns_of_the_loop()
    scene.s3.opened[0].finish()
    assert await ended(again) == [b"onetwothree"]


@pytest.mark.parametrize("kept", [True, False])
async def test_an_error_in_reading_is_raised_for_every_reader(kept: bool) -> None:
    scene = Scene(budget=1000 if kept else SIZE - 1)
    tasks = scene.readers(3)
    await turns_of_the_loop()
    scene.s3.may_open.set()
    await turns_of_the_loop()
    for reading in scene.s3.opened:
        reading.failure = TransientError(Dependency.S3, "connection_error", "it was interrupted")
        reading.finish()
    found = await ended(tasks)
    assert [type(it) for it in found] == [TransientError] * 3
    assert scene.nothing_is_left()


@pytest.mark.parametrize("moment", ["opening", "reading"])
@pytest.mark.parametrize("count", [1, 6])
async def test_an_error_that_readers_share_is_raised_once_and_then_as_duplicates(
    count: int, moment: str
) -> None:
    scene = Scene()
    fault = TransientError(Dependency.S3, "connection_error", "it was interrupted", refused=True, model="m")
    fault.cause, fault.is_likely_the_jobs = "S3 said so", True
    scene.s3.failure = fault if moment == "opening" else None
    tasks = scene.readers(count)
    await turns_of_the_loop()
    scene.s3.may_open.set()
    await turns_of_the_loop()
    for reading in scene.s3.opened:
        reading.failure = fault
        reading.finish()
    found = await ended(tasks)
    reported = [it for it in found if isinstance(it, TransientError)]
    assert len(reported) == count
    assert sum(not it.is_duplicate for it in reported) == 1
    assert {(it.dependency, it.reason, it.message) for it in reported} == {
        (Dependency.S3, "connection_error", "it was interrupted")
    }
    assert {(it.refused, it.model, it.cause, it.is_likely_the_jobs) for it in reported} == {
        (True, "m", "S3 said so", True)
    }
    # One exception object that several tasks raise would accumulate the traceback of each.
    assert len({id(it) for it in reported}) == count


async def test_errors_of_separate_reads_are_not_duplicates() -> None:
    scene = Scene(budget=SIZE - 1)
    tasks = scene.readers(3)
    await turns_of_the_loop()
    scene.s3.may_open.set()
    await turns_of_the_loop()
    for reading in scene.s3.opened:
        reading.failure = TransientError(Dependency.S3, "connection_error", "it was interrupted")
        reading.finish()
    found = await ended(tasks)
    assert [it.is_duplicate for it in found if isinstance(it, TransientError)] == [False] * 3


async def test_a_reader_that_still_waits_when_the_last_one_leaves_raises() -> None:
    """A bug in a reader must not become a task that waits forever."""
    scene = Scene()
    opening = [asyncio.create_task(scene.reads.open(IMAGE)) for _ in range(2)]
    await turns_of_the_loop()
    scene.s3.may_open.set()
    readings = await asyncio.gather(*opening)

    async def read_on() -> bytes:
        return b"".join([piece async for piece in readings[0]])

    waiting = asyncio.create_task(read_on())
    scene.s3.opened[0].go.release()
    await turns_of_the_loop()
    assert not waiting.done()
    for reading in readings:
        reading.close()
    (found,) = await ended([waiting])
    assert isinstance(found, Exception)
    assert scene.nothing_is_left()


async def test_an_unexpected_exception_in_the_read_is_raised_for_its_readers() -> None:
    scene = Scene()
    scene.s3.failure = KeyError("bug")
    scene.s3.may_open.set()
    assert [type(it) for it in await ended(scene.readers(2))] == [KeyError] * 2
