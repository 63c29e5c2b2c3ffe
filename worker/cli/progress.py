"""Progress as a person sees it on a terminal: bars on stderr, and nothing where nobody looks."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final

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
from worker.cli.submit.manifest import Counts

DRAWN_EACH_S: Final = 0.25


@dataclass
class Bar:
    """One thing that is counted; `note` says more of it."""

    title: str
    read: Callable[[], tuple[int, int, str]]
    """Returns how much is done, of how much, and a note."""


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.1f}/s" if task.speed else "", style="progress.data.speed")


@asynccontextmanager
async def shown(screen: Screen, bars: Iterable[Bar]) -> AsyncIterator[None]:
    """Show how far things have come, for as long as the context lasts."""
    if not screen.is_watched:
        yield
        return
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
        console=screen.progress,
        refresh_per_second=1 / DRAWN_EACH_S,
        # Stdout may be somewhere else.
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
        await asyncio.sleep(DRAWN_EACH_S)


def _update(progress: Progress, tasks: list[tuple[TaskID, Bar]]) -> None:
    for task, bar in tasks:
        done, total, note = bar.read()
        progress.update(task, completed=done, total=total, note=note)


def results_note(counts: Counts) -> str:
    """What results have come to so far."""
    cost = f", {dollars(counts.cost)}" if counts.knows_cost else ""
    failed = f"{counts.failed:,} failed, " if counts.failed else ""
    return f"{failed}{counts.tokens:,} tokens{cost}"
