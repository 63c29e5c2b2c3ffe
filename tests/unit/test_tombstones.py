"""Cancellations that are kept: all of them, in whatever order they come and S3 answers."""

import asyncio

import pytest

from worker.cancellation import Cancellations
from worker.errors import Dependency, DependencyDownError, JobError
from worker.s3.documents import Documents
from worker.tombstones import FOLDER, Tombstones


class Slow(Documents):
    """Takes an object when it is let; lists what `names` has, or refuses."""

    def __init__(self) -> None:
        self.written: list[str] = []
        self.may_write = asyncio.Semaphore(0)
        self.there: list[str] | None = []

    async def create(self, name: str, body: bytes) -> str | None:
        assert body == b""
        await self.may_write.acquire()
        self.written.append(name)
        return "etag"

    async def names(self, folder: str) -> list[str]:
        assert folder == FOLDER
        if self.there is None:
            raise DependencyDownError(Dependency.RESULT_STORE, "403 AccessDenied")
        return self.there


async def test_cancellations_that_come_while_one_is_written_are_all_kept() -> None:
    documents = Slow()
    tombstones = Tombstones(documents, Cancellations())
    tombstones.add("first")
    catching_up = asyncio.create_task(tombstones.catch_up())
    for name in ("second", "third", "fourth"):
        await asyncio.sleep(0)
        tombstones.add(name)
        documents.may_write.release()
    documents.may_write.release()
    async with asyncio.timeout(10):
        await catching_up
    assert documents.written == [f"{FOLDER}{name}" for name in ("first", "second", "third", "fourth")]


async def test_what_is_new_is_kept_even_where_nothing_may_be_listed() -> None:
    documents = Slow()
    documents.there = None
    tombstones = Tombstones(documents, Cancellations())
    tombstones.add("first")
    documents.may_write.release()
    with pytest.raises(DependencyDownError):
        await tombstones.catch_up()
    assert documents.written == [f"{FOLDER}first"]


async def test_what_was_cancelled_while_nobody_listened_is_heeded() -> None:
    documents, cancellations = Slow(), Cancellations()
    other = Cancellations()
    other.heard("invoice-4711")
    tombstones = Tombstones(documents, cancellations)
    other.keep_with(tombstones)
    documents.may_write.release()
    await tombstones.catch_up()
    documents.there = [name.removeprefix(FOLDER) for name in documents.written]
    tombstones.look_again()
    await tombstones.catch_up()
    with pytest.raises(JobError), cancellations.heeded("invoice-4711"):
        pass
