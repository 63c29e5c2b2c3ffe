"""Render the figures of a fleet as a table, as a line and as JSON."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from worker.cli.shell import counted
from worker.cli.top.figures import FleetFigures

if TYPE_CHECKING:
    from rich.table import Table


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
        return self.fleet is None or self.fleet.per_s is not None or not self.fleet.workers

    @property
    def eta_s(self) -> float | None:
        """Seconds until the queues are empty at the present rate, if no jobs are added."""
        if self.queues is None or self.fleet is None or self.fleet.per_s is None:
            return None
        rate = self.fleet.per_s.get("succeeded", 0.0) + self.fleet.per_s.get("failed", 0.0)
        waiting = self.queues.jobs + (self.queues.retries or 0) + self.fleet.in_flight
        return waiting / rate if waiting and rate else None


def in_json(figures: Figures, now: datetime) -> dict[str, Any]:
    """Return the figures for `--json`; rates are null before the second sample, latencies without jobs."""
    fleet = figures.fleet
    return {
        "at": now.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "queues": asdict(figures.queues) if figures.queues else None,
        "workers": _workers(fleet) if fleet else None,
    }


def _workers(fleet: FleetFigures) -> dict[str, Any]:
    rates = {"succeeded": "jobs_succeeded", "failed": "jobs_failed"}
    names = ("succeeded", "failed", "prompt_tokens", "completion_tokens", "cost_usd")
    per_s = fleet.per_s
    return {
        "up": fleet.workers,
        "unreachable": list(fleet.unreachable),
        "in_flight": fleet.in_flight,
        "limit": fleet.limit,
        "per_s": None
        if per_s is None
        else {rates.get(name, name): round(per_s.get(name, 0.0), 6) for name in names},
        "latency_s": asdict(fleet.latencies),
        "cost_usd": fleet.cost_usd,
        "paused": dict(fleet.paused),
    }


def line(figures: Figures, now: datetime) -> str:
    """Return the figures as one line."""
    cells = (f"{name} {text}" for name, text, _ in _rows(figures))
    return f"{now.astimezone():%H:%M:%S} {' · '.join(cells)}"


def table(figures: Figures, now: datetime) -> "Table":
    """Return the figures as a table for the live view."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    title = Text(f"{figures.queue}  {now.astimezone():%H:%M:%S}", style="bold")
    grid.add_row(title, Text("q or Ctrl-C to quit", style="dim"))
    for name, text, style in _rows(figures):
        grid.add_row(Text(name, style="cyan"), Text(text, style=style))
    return grid


def _rows(figures: Figures) -> Iterator[tuple[str, str, str]]:
    """Yield label, text and style of each row."""
    yield ("queues", *_queues(figures))
    fleet = figures.fleet
    if fleet is None:
        return
    addresses = ", ".join(fleet.unreachable)
    unreachable = f", {len(fleet.unreachable)} unreachable ({addresses})" if addresses else ""
    yield "workers", f"{fleet.workers} up{unreachable}", "yellow" if unreachable else ""
    yield "jobs", _jobs(figures, fleet), ""
    times = (_seconds(value) for value in (fleet.latencies.p50, fleet.latencies.p90, fleet.latencies.p99))
    yield "latency", "p50 {}, p90 {}, p99 {}".format(*times), ""
    per_s = fleet.per_s or {}
    prompt, completion = per_s.get("prompt_tokens", 0.0), per_s.get("completion_tokens", 0.0)
    yield "tokens", f"{prompt:,.0f} + {completion:,.0f}/s", ""
    hourly = per_s.get("cost_usd", 0.0) * 3600
    yield "cost", f"${fleet.cost_usd:,.4f} so far, ${hourly:,.2f}/h", ""
    if fleet.paused:
        paused = (f"{name} ({count} of {fleet.workers})" for name, count in sorted(fleet.paused.items()))
        yield "paused", f"for {', '.join(paused)}", "red"


def _queues(figures: Figures) -> tuple[str, str]:
    queues = figures.queues
    if queues is None:
        return figures.error, "red"
    text = (
        f"{queues.jobs:,} ready, {_or_unknown(queues.retries)} in retry,"
        f" {_or_unknown(queues.dead_letters)} dead-lettered,"
        f" {_or_unknown(queues.results)} on the results queue,"
        f" {counted(queues.consumers, 'consumer')}"
    )
    return text, "" if queues.consumers else "yellow"


def _or_unknown(count: int | None) -> str:
    return "?" if count is None else f"{count:,}"


def _jobs(figures: Figures, fleet: FleetFigures) -> str:
    per_s = fleet.per_s or {}
    rates = f"{per_s.get('succeeded', 0.0):,.1f}/s, {per_s.get('failed', 0.0):,.1f}/s failed"
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
