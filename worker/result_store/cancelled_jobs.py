"""Cancelled jobs in the result store, for workers that missed the cancel message."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable

import structlog

from worker.errors import DependencyDownError
from worker.s3.conditional_store import ConditionalStore

log = structlog.get_logger(__name__)

FOLDER = "cancelled/"
NEXT_TRY_S = 5.0


class CancelledJobStore:
    """Store and read cancelled jobs: one empty object for each, named by the hash of its id."""

    def __init__(self, objects: ConditionalStore, remember: Callable[[Iterable[str]], None]) -> None:
        """`remember`: called with the names of all cancelled jobs in the store."""
        self._objects = objects
        self._remember = remember
        self._new: deque[str] = deque()
        self._is_behind = True
        self._has_work = asyncio.Event()
        self._has_work.set()

    def add(self, name: str) -> None:
        """Store one. Every worker that receives the message writes the same object."""
        self._new.append(name)
        self._has_work.set()

    def reload(self) -> None:
        """Read all of them again, since this worker may have missed messages."""
        self._is_behind = True
        self._has_work.set()

    async def run(self) -> None:
        """Read and write until cancelled, and try again after a failure."""
        while True:
            await self._has_work.wait()
            try:
                await self.catch_up()
            except DependencyDownError as error:
                log.warning("cancelled_jobs_unavailable", reason=error.message, next_try_s=NEXT_TRY_S)
                await asyncio.sleep(NEXT_TRY_S)

    async def catch_up(self) -> None:
        """Write what is new, and read what may have been missed.

        Raises:
            DependencyDownError: S3 is unreachable or refuses.
        """
        self._has_work.clear()
        try:
            # Writing comes first: unlike reading, nobody else may be able to do it later.
            await self._write()
            if self._is_behind:
                self._is_behind = False
                self._remember(await self._objects.names(FOLDER))
        except (DependencyDownError, asyncio.CancelledError):
            self._is_behind = True
            self._has_work.set()
            raise

    async def _write(self) -> None:
        while self._new:
            await self._objects.create(f"{FOLDER}{self._new[0]}", b"")
            self._new.popleft()
