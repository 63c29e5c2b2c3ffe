"""Cancelled jobs: which they are, and how running ones end."""

import asyncio

import pytest

from vqa_worker.messages.error_codes import ErrorCode
from worker.errors import JobError
from worker.jobs import cancellation
from worker.jobs.cancellation import CancelledJobs, job_hash


class Store:
    """Record stored cancelled_jobs."""

    def __init__(self) -> None:
        self.stored: list[str] = []
        self.looks = 0

    def add(self, name: str) -> None:
        self.stored.append(name)

    def reload(self) -> None:
        self.looks += 1


async def work(cancelled_jobs: CancelledJobs, job_id: str) -> str:
    """Run a job without end; return the error code that it ends with."""
    try:
        with cancelled_jobs.cancellable(job_id):
            await asyncio.Event().wait()
    except JobError as error:
        return error.code
    return "done"


async def running(cancelled_jobs: CancelledJobs, *job_ids: str) -> list[asyncio.Task[str]]:
    tasks = [asyncio.create_task(work(cancelled_jobs, job_id)) for job_id in job_ids]
    await asyncio.sleep(0)
    return tasks


async def test_a_cancelled_job_ends_and_other_jobs_continue() -> None:
    cancelled_jobs = CancelledJobs()
    mine, mine_too, other = await running(cancelled_jobs, "a", "a", "b")
    cancelled_jobs.cancel("a")
    assert {await mine, await mine_too} == {ErrorCode.CANCELLED}
    assert not mine.cancelled()
    assert not other.done()
    other.cancel()


async def test_a_job_delivered_after_its_cancellation_is_not_started() -> None:
    cancelled_jobs = CancelledJobs()
    cancelled_jobs.cancel("a")
    begun = False
    with pytest.raises(JobError) as caught, cancelled_jobs.cancellable("a"):
        begun = True
    assert (caught.value.code, begun) == (ErrorCode.CANCELLED, False)
    with cancelled_jobs.cancellable("b"):
        begun = True
    assert begun


@pytest.mark.parametrize("stop_comes_first", [True, False])
async def test_a_stopping_worker_requeues_a_cancelled_job(*, stop_comes_first: bool) -> None:
    """The next worker reports it as cancelled: stop and cancellation together must not lose the outcome."""
    cancelled_jobs = CancelledJobs()
    (task,) = await running(cancelled_jobs, "a")
    if stop_comes_first:
        task.cancel()
    cancelled_jobs.cancel("a")
    if not stop_comes_first:
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_several_cancel_messages_for_one_job_are_one_cancellation() -> None:
    cancelled_jobs = CancelledJobs()
    mine, mine_too = await running(cancelled_jobs, "a", "a")
    for _ in range(3):
        cancelled_jobs.cancel("a")
    assert {await mine, await mine_too} == {ErrorCode.CANCELLED}
    assert mine.cancelling() == 0


async def test_a_cancel_message_during_the_end_of_the_job_has_no_effect() -> None:
    cancelled_jobs = CancelledJobs()

    async def cleans_up() -> str:
        try:
            with cancelled_jobs.cancellable("a"):
                try:
                    await asyncio.Event().wait()
                finally:
                    await asyncio.sleep(0)
        except JobError as error:
            return error.code
        return "done"

    task = asyncio.create_task(cleans_up())
    await asyncio.sleep(0)
    cancelled_jobs.cancel("a")
    await asyncio.sleep(0)
    cancelled_jobs.cancel("a")
    assert await task == ErrorCode.CANCELLED


async def test_a_cancel_message_after_the_end_of_the_job_has_no_effect() -> None:
    cancelled_jobs = CancelledJobs()
    with cancelled_jobs.cancellable("a"):
        pass
    cancelled_jobs.cancel("a")
    await asyncio.sleep(0)


async def test_a_task_that_was_cancelled_without_a_cancel_message_stays_cancelled() -> None:
    cancelled_jobs = CancelledJobs()
    (task,) = await running(cancelled_jobs, "a")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_only_the_latest_cancellations_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cancellation, "REMEMBERED", 2)
    cancelled_jobs = CancelledJobs()
    for job_id in ("a", "b", "a", "c"):
        cancelled_jobs.cancel(job_id)
    with cancelled_jobs.cancellable("b"):
        pass
    for job_id in ("a", "c"):
        with pytest.raises(JobError), cancelled_jobs.cancellable(job_id):
            pass


async def test_cancellations_are_stored_under_a_name_that_does_not_reveal_the_id() -> None:
    cancelled_jobs, store = CancelledJobs(), Store()
    cancelled_jobs.on_subscribed()
    cancelled_jobs.cancel("cancelled before there was a store")
    cancelled_jobs.store_in(store)
    assert len(store.stored) == 1
    store.stored.clear()
    cancelled_jobs.cancel("invoice-4711")
    cancelled_jobs.on_subscribed()
    assert (store.stored, store.looks) == ([job_hash("invoice-4711")], 1)
    assert "4711" not in store.stored[0]
    assert job_hash("invoice-4711") != job_hash("invoice-4712")
