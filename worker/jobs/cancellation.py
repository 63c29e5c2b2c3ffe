"""Cancelled jobs: running ones are aborted, and later deliveries of them are not worked on."""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from worker.errors import ErrorCode, JobError

# Cancelled jobs that a worker remembers, at about a hundred bytes each.
REMEMBERED = 100_000


class CancellationStore(Protocol):
    """Cancelled jobs, for workers that missed the cancel message."""

    def add(self, name: str) -> None:
        """Store one."""

    def look_again(self) -> None:
        """Read all of them again, since messages may have been missed."""


class Cancellations:
    """The cancelled jobs that this worker knows of, and the tasks that work on cancellable jobs."""

    def __init__(self) -> None:
        self._store: CancellationStore | None = None
        self._cancelled: OrderedDict[str, None] = OrderedDict()
        # The tasks that work on each job and are not aborted yet.
        self._running: dict[str, list[asyncio.Task[object]]] = {}

    def store_in(self, store: CancellationStore) -> None:
        """Store the jobs cancelled so far and from now on."""
        self._store = store
        for name in self._cancelled:
            store.add(name)

    def cancel(self, job_id: str) -> None:
        """Abort a job, and remember it for deliveries that come later."""
        name = name_of(job_id)
        self.remember([name])
        # Each task once: a second cancel message must not look like a stop of the worker.
        for task in self._running.pop(name, ()):
            task.cancel()
        if self._store is not None:
            self._store.add(name)

    def listening(self) -> None:
        """Note that cancel messages arrive from now on; earlier ones may have been missed."""
        if self._store is not None:
            self._store.look_again()

    def remember(self, names: Iterable[str]) -> None:
        """Remember cancelled jobs by name, the youngest of them if there are too many."""
        for name in names:
            self._cancelled[name] = None
            self._cancelled.move_to_end(name)
            if len(self._cancelled) > REMEMBERED:
                self._cancelled.popitem(last=False)

    @contextmanager
    def cancellable(self, job_id: str) -> Iterator[None]:
        """Let `cancel` abort the current task while it works on a job.

        Raises:
            JobError: the job is cancelled.
        """
        name, task = name_of(job_id), asyncio.current_task()
        assert task is not None  # noqa: S101 - for the type checker: there is one wherever jobs run
        if name in self._cancelled:
            raise _cancelled()
        self._running.setdefault(name, []).append(task)
        try:
            yield
        except asyncio.CancelledError:
            # If the worker stops as well, the job is requeued and the next worker reports it as cancelled.
            if not self._is_running(name, task) and task.uncancel() == 0:
                raise _cancelled() from None
            raise
        finally:
            if self._is_running(name, task):
                self._running[name].remove(task)
                if not self._running[name]:
                    del self._running[name]

    def _is_running(self, name: str, task: asyncio.Task[object]) -> bool:
        """Return whether the task works on the job and was not aborted."""
        return task in self._running.get(name, ())


def name_of(job_id: str) -> str:
    """Return the name of a job here and in the result store; it does not reveal the id."""
    return hashlib.sha256(job_id.encode(errors="replace")).hexdigest()


def _cancelled() -> JobError:
    return JobError(ErrorCode.CANCELLED, "the job was cancelled")
