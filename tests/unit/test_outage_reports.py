"""Jobs wait for a pending diagnosis until other calls decide it or their time limit ends."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.unit.fake_clock import FakeClock
from tests.unit.fakes import cancel_all, turns_of_the_loop
from worker.errors import Dependency, DependencyDownError, TransientError
from worker.resilience.concurrency_limiter import ConcurrencyLimiter
from worker.resilience.outage_detector import Diagnosis, OutageDetector
from worker.resilience.outage_reports import MAX_WAIT_ALONE_S, MAX_WAIT_S, OutageReports

MODEL, S3 = Dependency.MODEL, Dependency.S3
OUTAGE, CLEARED, PENDING = Diagnosis.OUTAGE, Diagnosis.CLEARED, Diagnosis.PENDING
PATIENT_S = 1000.0


class Scene:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.limiter = ConcurrencyLimiter(10, initial=10, clock=self.clock)
        self.detector = OutageDetector()
        self.outage_reports = OutageReports(self.detector, self.limiter, self.clock)

    async def fail(self, job: str = "job", max_wait_s: float = PATIENT_S) -> Diagnosis:
        return await self.outage_reports.diagnose(job, TransientError(MODEL, "http_5xx", "no"), max_wait_s)

    def succeed(self, dependency: Dependency = MODEL, begun_ago_s: float = 0.0) -> None:
        self.outage_reports.report_success(dependency, "another", self.clock.monotonic() - begun_ago_s)

    def go_down(self, dependency: Dependency = MODEL) -> None:
        self.outage_reports.report_unavailable("another", DependencyDownError(dependency, "no"))

    @asynccontextmanager
    async def waiting(
        self, job: str = "job", max_wait_s: float = PATIENT_S
    ) -> AsyncIterator[asyncio.Task[Diagnosis]]:
        """A job that failed while another call runs."""
        async with self.limiter.slot("m"):
            task = asyncio.create_task(self.fail(job, max_wait_s))
            await turns_of_the_loop()
            assert not task.done()
            yield task
            await cancel_all([task])


@pytest.fixture
def scene() -> Scene:
    return Scene()


async def test_an_outage_ends_the_wait_of_all_jobs_of_its_dependency(scene: Scene) -> None:
    async with scene.waiting("one") as first, scene.waiting("two") as second:
        scene.go_down(S3)
        await turns_of_the_loop()
        assert not first.done()
        scene.go_down(MODEL)
        assert await first is await second is OUTAGE


async def test_the_success_of_a_call_begun_after_the_failure_clears_the_dependency(scene: Scene) -> None:
    async with scene.waiting() as task:
        await scene.clock.advance(1.0)
        scene.succeed(S3)
        scene.succeed(MODEL, begun_ago_s=1.5)
        await turns_of_the_loop()
        assert not task.done()
        scene.succeed(MODEL, begun_ago_s=1.0)
        assert await task is CLEARED


async def test_an_outage_that_begins_as_the_wait_ends_is_the_diagnosis(scene: Scene) -> None:
    async with scene.waiting() as task:
        scene.clock.expire(MAX_WAIT_S)
        scene.go_down()
        assert await task is OUTAGE


async def test_a_job_waits_for_two_seconds_while_other_calls_run(scene: Scene) -> None:
    async with scene.waiting() as task:
        await scene.clock.advance(MAX_WAIT_S - 0.1)
        assert not task.done()
        await scene.clock.advance(0.1)
        assert await task is PENDING


async def test_a_job_waits_for_a_moment_only_while_no_other_call_runs(scene: Scene) -> None:
    task = asyncio.create_task(scene.fail())
    await scene.clock.advance(MAX_WAIT_ALONE_S - 0.01)
    assert not task.done()
    await scene.clock.advance(0.01)
    assert await task is PENDING


async def test_a_job_waits_longer_while_another_job_waits(scene: Scene) -> None:
    async with scene.waiting("one"):
        pass
    first = asyncio.create_task(scene.fail("one"))
    await turns_of_the_loop()
    second = asyncio.create_task(scene.fail("two"))
    await scene.clock.advance(MAX_WAIT_ALONE_S)
    assert (first.done(), second.done()) == (True, False)
    await scene.clock.advance(MAX_WAIT_S)
    assert second.done()


@pytest.mark.parametrize("max_wait_s", [0.5, 0.0, -1.0])
async def test_a_job_waits_no_longer_than_its_limit(scene: Scene, max_wait_s: float) -> None:
    async with scene.limiter.slot("m"):
        task = asyncio.create_task(scene.fail(max_wait_s=max_wait_s))
        await scene.clock.advance(max(0.0, max_wait_s))
        assert await task is PENDING


async def test_during_an_outage_no_job_waits(scene: Scene) -> None:
    scene.go_down()
    assert await scene.fail(max_wait_s=0.0) is OUTAGE


async def test_after_a_stop_no_job_waits(scene: Scene) -> None:
    async with scene.waiting() as task:
        scene.outage_reports.stop()
        assert await task is PENDING
        assert await scene.fail("another") is PENDING


async def test_a_cancelled_job_is_not_waited_for(scene: Scene) -> None:
    async with scene.waiting():
        pass
    scene.go_down()
    scene.succeed()
