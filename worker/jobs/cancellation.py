"""Cancelled jobs: running ones are aborted, and later deliveries of them are not processed."""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from vqa_worker.messages.error_codes import ErrorCode
from worker.errors import JobError

# Cancelled jobs that a worker remembers, at about a hundred bytes each.
REMEMBERED = 100_000


class CancelledJobStore(Protocol):
    """Cancelled jobs, for workers that missed the cancel message."""

    def add(self, hashed: str) -> None:
        """Store one."""

    def reload(self) -> None:
        """Read all of them again, since messages may have been missed."""


class CancelledJobs:
    """The cancelled jobs that this worker knows of, and the tasks of cancellable jobs."""

    def __init__(self) -> None:
        self._store: CancelledJobStore | None = None
        self._cancelled: OrderedDict[str, None] = OrderedDict()
        # The tasks of each job that are not cancelled yet.
        self._running: dict[str, list[asyncio.Task[object]]] = {}

    def store_in(self, store: CancelledJobStore) -> None:
        """Store the jobs cancelled so far and from now on."""
        self._store = store
        for hashed in self._cancelled:
            store.add(hashed)

    def cancel(self, job_id: str) -> None:
        """Abort a job, and remember it for deliveries that come later."""
        hashed = job_hash(job_id)
        self.remember([hashed])
        # Cancel each task only once: a second `cancel()` would be mistaken for shutdown.
        for task in self._running.pop(hashed, ()):
            task.cancel()
        if self._store is not None:
            self._store.add(hashed)

    def on_subscribed(self) -> None:
        """Reload the stored jobs: cancel messages before the subscription may have been missed."""
        if self._store is not None:
            self._store.reload()

    def remember(self, hashes: Iterable[str]) -> None:
        """Remember cancelled jobs by hash, the most recent of them if there are too many."""
        for hashed in hashes:
            self._cancelled[hashed] = None
            self._cancelled.move_to_end(hashed)
            if len(self._cancelled) > REMEMBERED:
                self._cancelled.popitem(last=False)

    @contextmanager
    def cancellable(self, job_id: str) -> Iterator[None]:
        """Let `cancel` abort the current task while it works on a job.

        Raises:
            JobError: the job is cancelled.
        """
        hashed, task = job_hash(job_id), asyncio.current_task()
        assert task is not None  # noqa: S101 - for the type checker: there is one wherever jobs run
        if hashed in self._cancelled:
            raise _cancelled_error()
        self._running.setdefault(hashed, []).append(task)
        try:
            yield
        except asyncio.CancelledError:
            # If the worker also shuts down, the job is requeued and the next worker reports it as cancelled.
            if not self._is_registered(hashed, task) and task.uncancel() == 0:
                raise _cancelled_error() from None
            raise
        finally:
            if self._is_registered(hashed, task):
                self._running[hashed].remove(task)
                if not self._running[hashed]:
                    del self._running[hashed]

    def _is_registered(self, hashed: str, task: asyncio.Task[object]) -> bool:
        """Return whether the task belongs to the job and is not cancelled."""
        return task in self._running.get(hashed, ())


def job_hash(job_id: str) -> str:
    """Return the name of a job here and in the result store; it does not reveal the id."""
    return hashlib.sha256(job_id.encode(errors="replace")).hexdigest()


def _cancelled_error() -> JobError:
    return JobError(ErrorCode.CANCELLED, "the job was cancelled")
