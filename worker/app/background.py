"""Background tasks by name; the worker stops if one of them ends unexpectedly."""

import asyncio
from collections.abc import Awaitable, Callable


class Background:
    """The background tasks of one task group."""

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def start(self, name: str, run: Callable[[], Awaitable[None]]) -> None:
        """Start a task. If it ends before it is stopped, the whole group fails."""
        self._tasks[name] = self._group.create_task(_run_until_stopped(name, run), name=name)

    def stop(self, name: str) -> None:
        """Stop a task."""
        self._tasks.pop(name).cancel()

    def stop_all(self) -> None:
        """Stop all tasks."""
        for name in list(self._tasks):
            self.stop(name)


async def _run_until_stopped(name: str, run: Callable[[], Awaitable[None]]) -> None:
    """Run a background task.

    Raises:
        RuntimeError: The task returned, or raised CancelledError itself, which a TaskGroup ignores.
    """
    try:
        await run()
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
    raise RuntimeError(f"the background task {name} ended")
