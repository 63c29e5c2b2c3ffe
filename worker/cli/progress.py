"""Progress bars on stderr, drawn only on a terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

from rich.console import RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from worker.cli.shell import Screen

REFRESHES_PER_S: Final = 4
# The longest note fits next to it in 80 columns.
BAR_COLUMNS: Final = 10


class Bar(NamedTuple):
    """One progress bar; `read` returns the done and total counts and a note."""

    title: str
    read: Callable[[], tuple[int, int, str]]


class _Bars(Progress):
    bars: tuple[Bar, ...] = ()

    def get_renderables(self) -> Iterator[RenderableType]:
        """Read the bars, each time that they are drawn."""
        for task, bar in zip(self.tasks, self.bars, strict=False):
            done, total, note = bar.read()
            self.update(task.id, completed=done, total=total, note=note)
        # At the right there is room for `^C`, which the terminal prints there: it must not start a new line.
        yield Padding(self.make_tasks_table(self.tasks), (0, 3, 0, 0), expand=False)


@contextmanager
def show_progress(screen: Screen, *bars: Bar) -> Iterator[None]:
    """Show progress bars while the context lasts."""
    progress = _Bars(
        TextColumn("{task.description}"),
        BarColumn(bar_width=BAR_COLUMNS),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
        console=screen.progress,
        refresh_per_second=REFRESHES_PER_S,
        disable=not screen.shows_progress,
        # Stdout may be a pipe.
        redirect_stdout=False,
        redirect_stderr=False,
    )
    for bar in bars:
        progress.add_task(bar.title, total=None, note="")
    progress.bars = bars
    with progress:
        yield
