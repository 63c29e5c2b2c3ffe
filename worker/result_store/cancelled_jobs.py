"""Cancellations in the result store, for workers that were not there to hear of them."""

import asyncio
from collections import deque

import structlog

from worker.errors import DependencyDownError
from worker.jobs.cancellation import Cancellations
from worker.s3.conditional_store import ConditionalStore

log = structlog.get_logger(__name__)

FOLDER = "cancelled/"
NEXT_TRY_S = 5.0


class CancelledJobs:
    """Keeps what is cancelled, and tells what was: an empty object for each, named by the id's hash."""

    def __init__(self, objects: ConditionalStore, cancellations: Cancellations) -> None:
        self._objects = objects
        self._cancellations = cancellations
        self._new: deque[str] = deque()
        self._is_behind = True
        self._news = asyncio.Event()
        self._news.set()

    def add(self, name: str) -> None:
        """Keep one. Every worker that hears of it does; it is the same object."""
        self._new.append(name)
        self._news.set()

    def look_again(self) -> None:
        """There may be some that this worker did not hear."""
        self._is_behind = True
        self._news.set()

    async def run(self) -> None:
        """Read and write until cancelled; what S3 does not take now is tried again."""
        while True:
            await self._news.wait()
            try:
                await self.catch_up()
            except DependencyDownError as error:
                log.warning("cancelled_jobs_unavailable", reason=error.message, next_try_s=NEXT_TRY_S)
                await asyncio.sleep(NEXT_TRY_S)

    async def catch_up(self) -> None:
        """Read what may have been missed, and write what is new.

        Raises:
            DependencyDownError: S3 is out of reach, or refuses it.
        """
        self._news.clear()
        try:
            # What is new comes last: it can be kept only once, and be told of by S3 any time.
            await self._write()
            if self._is_behind:
                self._is_behind = False
                self._cancellations.remember(await self._objects.names(FOLDER))
        except DependencyDownError:
            self._is_behind = True
            self._news.set()
            raise

    async def _write(self) -> None:
        while self._new:
            await self._objects.create(f"{FOLDER}{self._new[0]}", b"")
            # Meanwhile others may have come, behind it.
            self._new.popleft()
