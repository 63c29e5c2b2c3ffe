"""Stored cancelled_jobs: none is lost, in any order of messages and S3 responses."""

import asyncio

import pytest

from worker.errors import Dependency, DependencyDownError, JobError
from worker.jobs.cancellation import CancelledJobs
from worker.result_store.cancelled_jobs import FOLDER, CancelledJobStore
from worker.s3.conditional_store import ConditionalStore


class Slow(ConditionalStore):
    """Writes wait for `may_write`; a listing returns `names` or fails."""

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


async def test_cancellations_that_arrive_during_a_write_are_all_stored() -> None:
    objects = Slow()
    cancelled_job_store = CancelledJobStore(objects, CancelledJobs().remember)
    cancelled_job_store.add("first")
    catching_up = asyncio.create_task(cancelled_job_store.catch_up())
    for name in ("second", "third", "fourth"):
        await asyncio.sleep(0)
        cancelled_job_store.add(name)
        objects.may_write.release()
    objects.may_write.release()
    async with asyncio.timeout(60):
        await catching_up
    assert objects.written == [f"{FOLDER}{name}" for name in ("first", "second", "third", "fourth")]


async def test_new_cancellations_are_stored_even_without_permission_to_list() -> None:
    objects = Slow()
    objects.there = None
    cancelled_job_store = CancelledJobStore(objects, CancelledJobs().remember)
    cancelled_job_store.add("first")
    objects.may_write.release()
    with pytest.raises(DependencyDownError):
        await cancelled_job_store.catch_up()
    assert objects.written == [f"{FOLDER}first"]


async def test_cancellations_from_before_the_start_are_loaded() -> None:
    objects, cancelled_jobs = Slow(), CancelledJobs()
    other = CancelledJobs()
    other.cancel("invoice-4711")
    cancelled_job_store = CancelledJobStore(objects, cancelled_jobs.remember)
    other.store_in(cancelled_job_store)
    objects.may_write.release()
    await cancelled_job_store.catch_up()
    objects.there = [name.removeprefix(FOLDER) for name in objects.written]
    cancelled_job_store.reload()
    await cancelled_job_store.catch_up()
    with pytest.raises(JobError), cancelled_jobs.cancellable("invoice-4711"):
        pass
