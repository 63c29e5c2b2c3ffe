"""Progress bars on stderr, drawn only on a terminal."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final

from rich.console import RenderableType
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from worker.cli.shell import Screen
from worker.cli.submit.estimate import dollars
from worker.cli.submit.state import Counts

REFRESH_INTERVAL_S: Final = 0.25
# In a narrower terminal the bars are shorter and have no rates.
WIDE_COLUMNS: Final = 110


@dataclass
class Bar:
    """One progress bar."""

    title: str
    read: Callable[[], tuple[int, int, str]]
    """Return the done and total counts and a note."""


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.1f}/s" if task.speed else "", style="progress.data.speed")


class _Progress(Progress):
    def get_renderables(self) -> Iterator[RenderableType]:
        """Leave room at the right: `^C`, which the terminal prints there, must not start a new line."""
        yield Padding(self.make_tasks_table(self.tasks), (0, 3, 0, 0), expand=False)


@asynccontextmanager
async def show_progress(screen: Screen, bars: Iterable[Bar]) -> AsyncIterator[None]:
    """Show progress bars while the context lasts."""
    if not screen.shows_progress:
        yield
        return
    is_wide = screen.progress.width >= WIDE_COLUMNS
    progress = _Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24 if is_wide else 10),
        MofNCompleteColumn(),
        *([_Rate()] if is_wide else []),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
        console=screen.progress,
        refresh_per_second=1 / REFRESH_INTERVAL_S,
        # Stdout may be a pipe.
        redirect_stdout=False,
        redirect_stderr=False,
    )
    tasks = [(progress.add_task(bar.title, total=None, note=""), bar) for bar in bars]
    with progress:
        drawing = asyncio.create_task(_draw(progress, tasks), name="progress")
        try:
            yield
        finally:
            drawing.cancel()
            with suppress(asyncio.CancelledError):
                await drawing
            _update(progress, tasks)


async def _draw(progress: Progress, tasks: list[tuple[TaskID, Bar]]) -> None:
    while True:
        _update(progress, tasks)
        await asyncio.sleep(REFRESH_INTERVAL_S)


def _update(progress: Progress, tasks: list[tuple[TaskID, Bar]]) -> None:
    for task, bar in tasks:
        done, total, note = bar.read()
        progress.update(task, completed=done, total=total, note=note)


def results_note(counts: Counts) -> str:
    """Return failures, tokens and cost of the results so far."""
    cost = f", {dollars(counts.cost)}" if counts.knows_cost else ""
    failed = f"{counts.failed:,} failed, " if counts.failed else ""
    return f"{failed}{counts.tokens:,} tokens{cost}"
