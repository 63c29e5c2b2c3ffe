"""Jobs that somebody has cancelled: those that run are aborted, those that come are not begun."""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from worker.errors import ErrorCode, JobError

# Far more than anybody takes back at once; about a hundred bytes each.
REMEMBERED = 100_000


class Keeper(Protocol):
    """Where cancellations are kept for workers that were not there to hear them."""

    def add(self, name: str) -> None:
        """Keep one."""

    def look_again(self) -> None:
        """There may be some that this worker did not hear."""


class Cancellations:
    """Which jobs were cancelled, as far as this worker has heard, and which of them it is at."""

    def __init__(self) -> None:
        self._keeper: Keeper | None = None
        self._names: OrderedDict[str, None] = OrderedDict()
        # The tasks that work on each job and are not aborted yet.
        self._running: dict[str, list[asyncio.Task[object]]] = {}

    def keep_with(self, keeper: Keeper) -> None:
        """Keep what was heard so far, and what will be."""
        self._keeper = keeper
        for name in self._names:
            keeper.add(name)

    def heard(self, job_id: str) -> None:
        """Abort a cancelled job, and remember it for deliveries that come later."""
        name = name_of(job_id)
        self.remember([name])
        # Each task once: a second cancel message must not look like a stop of the worker.
        for task in self._running.pop(name, ()):
            task.cancel()
        if self._keeper is not None:
            self._keeper.add(name)

    def listening(self) -> None:
        """From now on this worker hears of cancellations; what came before, it may have missed."""
        if self._keeper is not None:
            self._keeper.look_again()

    def remember(self, names: Iterable[str]) -> None:
        """These were cancelled before."""
        for name in names:
            self._names[name] = None
            self._names.move_to_end(name)
            if len(self._names) > REMEMBERED:
                self._names.popitem(last=False)

    @contextmanager
    def heeded(self, job_id: str) -> Iterator[None]:
        """Work on a job that may be cancelled, in the task that does it.

        Raises:
            JobError: it has been.
        """
        name, task = name_of(job_id), asyncio.current_task()
        assert task is not None  # noqa: S101 - for the type checker: a context of asyncio's
        if name in self._names:
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
    """What a job goes by here and in the result store: whoever lists the store learns no ids."""
    return hashlib.sha256(job_id.encode(errors="replace")).hexdigest()


def _cancelled() -> JobError:
    return JobError(ErrorCode.CANCELLED, "the job was cancelled")
