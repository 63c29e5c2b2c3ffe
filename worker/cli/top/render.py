"""Render the figures of a fleet, as the JSON output has them, as tables."""

from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any, Final

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from worker.cli.shell import counted

SECONDS_PER_HOUR: Final = 3600


def view(figures: Mapping[str, Any]) -> Group:
    """Return the figures as tables: queues and totals, models, workers."""
    grid = Table.grid(padding=(0, 2))
    for name, text, style in _rows(figures):
        grid.add_row(f"[cyan]{name}", Text(text, style=style))
    if figures["fleet"] is None:
        return Group(grid)
    return Group(grid, "", _models(figures["models"]), "", _workers(figures["workers"]))


def text(figures: Mapping[str, Any]) -> str:
    """Return the tables as plain text."""
    console = Console(highlight=False, color_system=None)
    with console.capture() as captured:
        console.print(view(figures))
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _models(models: list[dict[str, Any]]) -> Table:
    table = _table("MODEL", "JOBS/S", "FAILED/S", "TOKENS/S", "P90", "COST", "$/H", flexible="MODEL")
    for it in models:
        table.add_row(
            Text(it["model"]),
            *_job_rates(it),
            f"{_rate(it, 'prompt_tokens', 'completion_tokens'):,.0f}",
            _seconds(it["latency_s"]["p90"]),
            f"{it['cost_usd']:,.2f}",
            f"{_rate(it, 'cost_usd') * SECONDS_PER_HOUR:,.2f}",
        )
    return table


def _workers(workers: list[dict[str, Any]]) -> Table:
    table = _table("WORKER", "JOBS/S", "FAILED/S", "IN FLIGHT", "P90", "STATE", flexible="STATE")
    for it in workers:
        if it["error"]:
            table.add_row(Text(it["address"]), *"----", Text(f"unreachable: {it['error']}", style="yellow"))
            continue
        table.add_row(
            Text(it["address"]),
            *_job_rates(it),
            f"{it['in_flight']:,} of {it['limit']:,}",
            _seconds(it["latency_s"]["p90"]),
            Text(f"paused for {', '.join(it['paused'])}", style="red") if it["paused"] else "up",
        )
    return table


def _table(*names: str, flexible: str) -> Table:
    """Return a table; on a narrow terminal the column `flexible` gets what the others leave."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="cyan")
    for name in names:
        is_text = name in ("MODEL", "WORKER", "STATE")
        table.add_column(
            name, justify="left" if is_text else "right", no_wrap=name != flexible, overflow="ellipsis"
        )
    return table


def _rows(figures: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield label, text and style of the figures of the queues and of all workers."""
    queues, total = figures["queues"], figures["fleet"]
    yield "queue", f"{figures['queue']}  {figures['at'][11:19]} UTC", ""
    if queues is None:
        yield "queues", figures["error"], "red"
    else:
        yield "queues", _queues(queues), "" if queues["consumers"] else "yellow"
    if total is None:
        return
    missing = len(figures["workers"]) - total["up"]
    unreachable = f", {missing} unreachable" if missing else ""
    yield "workers", f"{total['up']} up{unreachable}", "yellow" if missing else ""
    succeeded, failed = _job_rates(total)
    in_flight = f"{total['in_flight']:,} in flight of {total['limit']:,}"
    yield "jobs", f"{succeeded}/s, {failed}/s failed, {in_flight}{_eta(queues, total)}", ""
    yield "latency", ", ".join(f"{name} {_seconds(it)}" for name, it in total["latency_s"].items()), ""
    yield "tokens", f"{_rate(total, 'prompt_tokens'):,.0f} + {_rate(total, 'completion_tokens'):,.0f}/s", ""
    per_hour = _rate(total, "cost_usd") * SECONDS_PER_HOUR
    yield "cost", f"${total['cost_usd']:,.4f} so far, ${per_hour:,.2f}/h", ""
    if total["paused"]:
        paused = (f"{name} ({count} of {total['up']})" for name, count in sorted(total["paused"].items()))
        yield "paused", f"for {', '.join(paused)}", "red"


def _queues(queues: Mapping[str, int | None]) -> str:
    ready, retries, dead, results = (
        "?" if (count := queues[name]) is None else f"{count:,}"
        for name in ("jobs", "retries", "dead_letters", "results")
    )
    consumers = counted(queues["consumers"] or 0, "consumer")
    return f"{ready} ready, {retries} in retry, {dead} dead-lettered, {results} results, {consumers}"


def _eta(queues: Mapping[str, int | None] | None, total: Mapping[str, Any]) -> str:
    """Return the time until the queues are empty at the present rate, if no jobs are added."""
    rate = _rate(total, "jobs_succeeded", "jobs_failed")
    waiting = (queues["jobs"] or 0) + (queues["retries"] or 0) + total["in_flight"] if queues else 0
    return f", ETA {timedelta(seconds=round(waiting / rate))}" if waiting and rate else ""


def _rate(figures: Mapping[str, Any], *names: str) -> float:
    """Return the sum of rates per second; 0 if they are unknown."""
    return float(sum(figures["per_s"][name] for name in names)) if figures["per_s"] else 0.0


def _job_rates(figures: Mapping[str, Any]) -> tuple[str, str]:
    return f"{_rate(figures, 'jobs_succeeded'):,.1f}", f"{_rate(figures, 'jobs_failed'):,.1f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"
