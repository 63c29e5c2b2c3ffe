"""Jobs at a steady rate, whatever happens to them."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Iterable

from tests.chaos.backend import Backend
from tests.chaos.jobs import Asked


class Traffic:
    """Submits jobs; those so far are in `asked`."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.asked: list[Asked] = []

    @contextlib.asynccontextmanager
    async def flowing(self, jobs: Iterable[Asked], rate: float) -> AsyncIterator[None]:
        """So many jobs a second for as long as the context lasts; in the end the broker has all of them."""
        submissions: list[asyncio.Task[None]] = []
        flow = asyncio.create_task(self._flow(jobs, rate, submissions))
        try:
            yield
        finally:
            flow.cancel()
            await asyncio.wait({flow})
        await asyncio.gather(*submissions)

    def waiting(self) -> list[Asked]:
        """The jobs that have fewer results than submissions."""
        return [job for job in self.asked if self._backend.received[job.id] < len(job.sent_at)]

    async def _flow(self, jobs: Iterable[Asked], rate: float, submissions: list[asyncio.Task[None]]) -> None:
        started = time.monotonic()
        for nth, job in zip(itertools.count(), jobs, strict=False):
            await asyncio.sleep(max(0.0, started + nth / rate - time.monotonic()))
            self.asked.append(job)
            submissions.append(asyncio.create_task(self._submit(job)))

    async def _submit(self, job: Asked) -> None:
        await self._backend.submit(job)
        if job.again_after_s is not None:
            await asyncio.sleep(job.again_after_s)
            await self._backend.submit(job)
        if job.cancelled_after_s is not None:
            await asyncio.sleep(job.cancelled_after_s)
            await self._backend.cancel(job)
