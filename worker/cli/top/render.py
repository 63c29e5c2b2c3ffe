"""Render the figures of a fleet as tables and as JSON."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Final

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from worker.cli.shell import counted
from worker.cli.top.figures import Fleet, FleetLoad
from worker.rabbitmq.messages import rfc3339

# Enough for the widest table with a long name of a model.
WIDE_COLUMNS: Final = 110


@dataclass(frozen=True, slots=True)
class Figures:
    """All figures at one time.

    Attributes:
        queue: the name of the jobs queue.
        queues: the ready `jobs`, `retries`, `results` and `dead_letters` (each None if the user may not see
            it), and `consumers`. None while the broker is unreachable; `error` says why.
        fleet: None without `--worker`.
    """

    at: datetime
    queue: str
    queues: Mapping[str, int | None] | None
    error: str
    fleet: Fleet | None

    @property
    def has_rates(self) -> bool:
        """Whether the rates are known: they need two samples of a worker."""
        return self.fleet is None or not self.fleet.up or self.fleet.total().per_s is not None


def in_json(figures: Figures) -> dict[str, Any]:
    """Return the figures for `--json`; rates are null before the second sample, latencies without jobs."""
    fleet = figures.fleet
    errors = fleet.unreachable.items() if fleet else ()
    return {
        "at": rfc3339(figures.at),
        "queues": figures.queues,
        "fleet": fleet and asdict(fleet.total()),
        "workers": fleet
        and [*map(asdict, fleet.workers()), *({"address": it, "error": error} for it, error in errors)],
        "models": fleet and [*map(asdict, fleet.models())],
    }


def view(figures: Figures, hint: str = "") -> Group:
    """Return the figures as tables: queues and totals, models, workers; `hint` is at the top."""
    grid = Table.grid(padding=(0, 2))
    grid.add_row("[cyan]queue", Text(f"{figures.queue}  {figures.at.astimezone():%H:%M:%S}{hint}"))
    for name, text, style in _rows(figures):
        grid.add_row(f"[cyan]{name}", Text(text, style=style))
    if figures.fleet is None:
        return Group(grid)
    return Group(grid, "", _models(figures.fleet), "", _workers(figures.fleet))


def text(figures: Figures) -> str:
    """Return the tables as plain text."""
    console = Console(highlight=False, color_system=None)
    with console.capture() as captured:
        console.print(view(figures))
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _models(fleet: Fleet) -> Table:
    table = _table("MODEL", "JOBS/S", "FAILED/S", "TOKENS/S", "P90", "COST", "$/H", flexible="MODEL")
    for load in fleet.models():
        table.add_row(
            Text(load.model),
            f"{load.rate('jobs_succeeded'):,.1f}",
            f"{load.rate('jobs_failed'):,.1f}",
            f"{load.rate('prompt_tokens', 'completion_tokens'):,.0f}",
            _seconds(load.latency_s["p90"]),
            f"{load.cost_usd:,.2f}",
            f"{load.rate('cost_usd') * 3600:,.2f}",
        )
    return table


def _workers(fleet: Fleet) -> Table:
    table = _table("WORKER", "JOBS/S", "FAILED/S", "IN FLIGHT", "P90", flexible="STATE")
    for load in fleet.workers():
        table.add_row(
            Text(load.address),
            f"{load.rate('jobs_succeeded'):,.1f}",
            f"{load.rate('jobs_failed'):,.1f}",
            f"{load.in_flight:,} of {load.limit:,}",
            _seconds(load.latency_s["p90"]),
            Text(f"paused for {', '.join(load.paused)}", style="red") if load.paused else "up",
        )
    for address, error in fleet.unreachable.items():
        table.add_row(Text(address), *"----", Text(f"unreachable: {error}", style="yellow"))
    return table


def _table(first: str, *numbers: str, flexible: str) -> Table:
    """Return a table; on a narrow terminal the column `flexible` gets what the others leave."""
    is_narrow = shutil.get_terminal_size().columns < WIDE_COLUMNS
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="cyan", expand=is_narrow)
    for name in dict.fromkeys((first, *numbers, flexible)):
        is_number = name in numbers
        table.add_column(
            name,
            justify="right" if is_number else "left",
            no_wrap=is_number or name == first,
            ratio=1 if is_narrow and name == flexible else None,
        )
    return table


def _rows(figures: Figures) -> Iterator[tuple[str, str, str]]:
    """Yield label, text and style of the figures of the queues and of all workers."""
    queues, fleet = figures.queues, figures.fleet
    if queues is None:
        yield "queues", figures.error, "red"
    else:
        yield "queues", _queues(queues), "" if queues["consumers"] else "yellow"
    if fleet is None:
        return
    total, missing = fleet.total(), len(fleet.unreachable)
    unreachable = f", {missing} unreachable" if missing else ""
    yield "workers", f"{total.up} up{unreachable}", "yellow" if missing else ""
    yield "jobs", f"{_jobs(total)}{_eta(queues, total)}", ""
    yield "latency", ", ".join(f"{name} {_seconds(it)}" for name, it in total.latency_s.items()), ""
    yield "tokens", f"{total.rate('prompt_tokens'):,.0f} + {total.rate('completion_tokens'):,.0f}/s", ""
    yield "cost", f"${total.cost_usd:,.4f} so far, ${total.rate('cost_usd') * 3600:,.2f}/h", ""
    if total.paused:
        paused = (f"{name} ({count} of {total.up})" for name, count in sorted(total.paused.items()))
        yield "paused", f"for {', '.join(paused)}", "red"


def _queues(queues: Mapping[str, int | None]) -> str:
    ready, retries, dead, results = (
        "?" if (count := queues[name]) is None else f"{count:,}"
        for name in ("jobs", "retries", "dead_letters", "results")
    )
    consumers = counted(queues["consumers"] or 0, "consumer")
    return f"{ready} ready, {retries} in retry, {dead} dead-lettered, {results} results, {consumers}"


def _jobs(total: FleetLoad) -> str:
    rates = f"{total.rate('jobs_succeeded'):,.1f}/s, {total.rate('jobs_failed'):,.1f}/s failed"
    return f"{rates}, {total.in_flight:,} in flight of {total.limit:,}"


def _eta(queues: Mapping[str, int | None] | None, total: FleetLoad) -> str:
    """Return the time until the queues are empty at the present rate, if no jobs are added."""
    rate = total.rate("jobs_succeeded", "jobs_failed")
    waiting = (queues["jobs"] or 0) + (queues["retries"] or 0) + total.in_flight if queues else 0
    if not waiting or not rate:
        return ""
    minutes = waiting / rate / 60
    if minutes >= 60:  # noqa: PLR2004 - minutes per hour
        return f", ETA {minutes / 60:,.1f} h"
    return f", ETA {minutes:.0f} min" if minutes >= 1 else f", ETA {minutes * 60:.0f} s"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"
