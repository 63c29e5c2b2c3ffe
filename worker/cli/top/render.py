"""Render the figures of a fleet as a table, as a line and as JSON."""

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from worker.cli.shell import counted
from worker.cli.top.figures import FleetFigures, Load, WorkerFigures

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


# Enough for the widest table with a long name of a model.
WIDE_COLUMNS: Final = 110


@dataclass(frozen=True, slots=True)
class QueueFigures:
    """Queue depths; None for queues that do not exist or that the user may not see.

    Attributes:
        jobs: ready jobs, without those that workers hold.
        retries: jobs on the retry queues.
        results: results on the results queue.
        dead_letters: messages on the dead-letter queue.
        consumers: consumers of the jobs queue; a worker has at least one.
    """

    jobs: int = 0
    retries: int | None = None
    results: int | None = None
    dead_letters: int | None = None
    consumers: int = 0


@dataclass(frozen=True, slots=True)
class Figures:
    """All figures at one time.

    Attributes:
        queues: None while the broker is unreachable; `error` says why.
        fleet: None without `--worker`.
    """

    queue: str
    queues: QueueFigures | None
    error: str
    fleet: FleetFigures | None

    @property
    def has_rates(self) -> bool:
        """Whether the rates are known: they need two samples of a worker."""
        return self.fleet is None or self.fleet.total.per_s is not None or not self.fleet.up

    @property
    def eta_s(self) -> float | None:
        """Seconds until the queues are empty at the present rate, if no jobs are added."""
        if self.queues is None or self.fleet is None:
            return None
        rate = self.fleet.total.rate("succeeded") + self.fleet.total.rate("failed")
        waiting = self.queues.jobs + (self.queues.retries or 0) + self.fleet.in_flight
        return waiting / rate if waiting and rate else None


def in_json(figures: Figures, now: datetime) -> dict[str, Any]:
    """Return the figures for `--json`; rates are null before the second sample, latencies without jobs."""
    fleet = figures.fleet
    return {
        "at": now.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "queues": asdict(figures.queues) if figures.queues else None,
        "fleet": _fleet_json(fleet) if fleet else None,
        "workers": [_worker_json(it) for it in fleet.workers] if fleet else None,
        "models": [{"model": name, **_load_json(load)} for name, load in fleet.models.items()]
        if fleet
        else None,
    }


def _fleet_json(fleet: FleetFigures) -> dict[str, Any]:
    counts = {"up": len(fleet.up), "in_flight": fleet.in_flight, "limit": fleet.limit}
    return {**counts, **_load_json(fleet.total), "paused": dict(fleet.paused)}


def _worker_json(worker: WorkerFigures) -> dict[str, Any]:
    error = {"address": worker.address, "error": worker.error or None}
    if worker.error:
        return error
    counts = {"in_flight": worker.in_flight, "limit": worker.limit}
    return {**error, **counts, **_load_json(worker.load), "paused": list(worker.paused)}


def _load_json(load: Load) -> dict[str, Any]:
    rates = {"succeeded": "jobs_succeeded", "failed": "jobs_failed"}
    names = ("succeeded", "failed", "prompt_tokens", "completion_tokens", "cost_usd")
    per_s = {rates.get(name, name): round(load.rate(name), 6) for name in names}
    return {
        "per_s": None if load.per_s is None else per_s,
        "latency_s": asdict(load.latencies),
        "cost_usd": load.cost_usd,
    }


def view(figures: Figures, now: datetime, hint: str = "") -> "Group":
    """Return the figures as tables: queues and totals, models, workers; `hint` is at the top."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_row(Text("queue", style="cyan"), Text(f"{figures.queue}  {now.astimezone():%H:%M:%S}{hint}"))
    for name, text, style in _rows(figures):
        grid.add_row(Text(name, style="cyan"), Text(text, style=style))
    if figures.fleet is None:
        return Group(grid)
    return Group(grid, "", _models(figures.fleet), "", _workers(figures.fleet))


def text(figures: Figures, now: datetime) -> str:
    """Return the tables as plain text."""
    from rich.console import Console

    console = Console(highlight=False, color_system=None)
    with console.capture() as captured:
        console.print(view(figures, now))
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _models(fleet: FleetFigures) -> "Table":
    table = _table("MODEL", "JOBS/S", "FAILED/S", "TOKENS/S", "P90", "COST", "$/H", flexible="MODEL")
    for name, load in fleet.models.items():
        tokens = load.rate("prompt_tokens") + load.rate("completion_tokens")
        table.add_row(
            name,
            f"{load.rate('succeeded'):,.1f}",
            f"{load.rate('failed'):,.1f}",
            f"{tokens:,.0f}",
            _seconds(load.latencies.p90),
            f"{load.cost_usd:,.2f}",
            f"{load.rate('cost_usd') * 3600:,.2f}",
        )
    return table


def _workers(fleet: FleetFigures) -> "Table":
    from rich.text import Text

    table = _table("WORKER", "JOBS/S", "FAILED/S", "IN FLIGHT", "P90", flexible="STATE")
    for worker in fleet.workers:
        if worker.error:
            table.add_row(worker.address, *"----", Text(f"unreachable: {worker.error}", style="yellow"))
            continue
        state = Text(f"paused for {', '.join(worker.paused)}", style="red") if worker.paused else Text("up")
        table.add_row(
            worker.address,
            f"{worker.load.rate('succeeded'):,.1f}",
            f"{worker.load.rate('failed'):,.1f}",
            f"{worker.in_flight:,} of {worker.limit:,}",
            _seconds(worker.load.latencies.p90),
            state,
        )
    return table


def _table(first: str, *numbers: str, flexible: str) -> "Table":
    """Return a table; on a narrow terminal the column `flexible` gets what the others leave."""
    from rich.table import Table

    is_narrow = shutil.get_terminal_size().columns < WIDE_COLUMNS
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="cyan", expand=is_narrow)
    for name in (first, *numbers, *([flexible] if flexible != first else [])):
        table.add_column(
            name,
            justify="right" if name in numbers else "left",
            no_wrap=name in {first, *numbers},
            overflow="ellipsis",
            ratio=1 if is_narrow and name == flexible else None,
        )
    return table


def _rows(figures: Figures) -> Iterator[tuple[str, str, str]]:
    """Yield label, text and style of the figures of the queues and of all workers."""
    queues = figures.queues
    style = "red" if queues is None else "" if queues.consumers else "yellow"
    yield "queues", figures.error if queues is None else _queues(queues), style
    fleet = figures.fleet
    if fleet is None:
        return
    total = fleet.total
    missing = len(fleet.workers) - len(fleet.up)
    unreachable = f", {missing} unreachable" if missing else ""
    yield "workers", f"{len(fleet.up)} up{unreachable}", "yellow" if missing else ""
    yield "jobs", _jobs(figures, fleet), ""
    times = (_seconds(value) for value in (total.latencies.p50, total.latencies.p90, total.latencies.p99))
    yield "latency", "p50 {}, p90 {}, p99 {}".format(*times), ""
    prompt, completion = total.rate("prompt_tokens"), total.rate("completion_tokens")
    yield "tokens", f"{prompt:,.0f} + {completion:,.0f}/s", ""
    yield "cost", f"${total.cost_usd:,.4f} so far, ${total.rate('cost_usd') * 3600:,.2f}/h", ""
    if fleet.paused:
        paused = (f"{name} ({count} of {len(fleet.up)})" for name, count in sorted(fleet.paused.items()))
        yield "paused", f"for {', '.join(paused)}", "red"


def _queues(queues: QueueFigures) -> str:
    return (
        f"{queues.jobs:,} ready, {_or_unknown(queues.retries)} in retry,"
        f" {_or_unknown(queues.dead_letters)} dead-lettered, {_or_unknown(queues.results)} results,"
        f" {counted(queues.consumers, 'consumer')}"
    )


def _or_unknown(count: int | None) -> str:
    return "?" if count is None else f"{count:,}"


def _jobs(figures: Figures, fleet: FleetFigures) -> str:
    rates = f"{fleet.total.rate('succeeded'):,.1f}/s, {fleet.total.rate('failed'):,.1f}/s failed"
    eta = "" if figures.eta_s is None else f", ETA {_duration(figures.eta_s)}"
    return f"{rates}, {fleet.in_flight:,} in flight of {fleet.limit:,}{eta}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{minutes:.0f} min" if minutes >= 1 else f"{seconds:.0f} s"
