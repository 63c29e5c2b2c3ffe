"""Publish jobs at a steady rate, independent of their results."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Iterable

from tests.chaos.backend import Backend
from tests.chaos.jobs import ExpectedJob


class Traffic:
    """Submit jobs; `jobs` has the jobs so far."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.jobs: list[ExpectedJob] = []

    @contextlib.asynccontextmanager
    async def publishing(self, jobs: Iterable[ExpectedJob], rate: float) -> AsyncIterator[None]:
        """Publish `rate` jobs per second in this context; at its end the broker has confirmed all."""
        submissions: list[asyncio.Task[None]] = []
        flow = asyncio.create_task(self._publish_jobs(jobs, rate, submissions))
        try:
            yield
        finally:
            flow.cancel()
            await asyncio.wait({flow})
        await asyncio.gather(*submissions)

    def waiting(self) -> list[ExpectedJob]:
        """Return the jobs with fewer results than submissions."""
        return [job for job in self.jobs if self._backend.received[job.id] < len(job.sent_at)]

    async def _publish_jobs(
        self, jobs: Iterable[ExpectedJob], rate: float, submissions: list[asyncio.Task[None]]
    ) -> None:
        started = time.monotonic()
        for nth, job in zip(itertools.count(), jobs, strict=False):
            await asyncio.sleep(max(0.0, started + nth / rate - time.monotonic()))
            self.jobs.append(job)
            submissions.append(asyncio.create_task(self._submit(job)))

    async def _submit(self, job: ExpectedJob) -> None:
        await self._backend.submit(job)
        if job.resubmitted_after_s is not None:
            await asyncio.sleep(job.resubmitted_after_s)
            await self._backend.submit(job)
        if job.cancelled_after_s is not None:
            await asyncio.sleep(job.cancelled_after_s)
            await self._backend.cancel(job)
