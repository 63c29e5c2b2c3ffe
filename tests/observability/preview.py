"""`python -m tests.observability.preview`: generate a load and draw the dashboard's query results."""

import argparse
import asyncio
import logging
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

import pytest

from deploy.local.stack import Stack
from deploy.local.terminal import print_status
from tests.conftest import BUCKET
from tests.observability import dashboard, drawing
from tests.observability.load import Durations, ObservedWorker
from tests.observability.prometheus import Release, Series, installed
from tests.running import ROOT

FILE: Final = ROOT / "docs" / "dashboard-preview.svg"
DURATIONS: Final = Durations(
    normal=30, failures=40, rate_limited=25, outage=12, burst=8, after=40, jobs_per_s=20.0
)
STEP_S: Final = 3.0
WINDOW_S: Final = 12
TITLE: Final = """\
Preview of the dashboard vqa-worker
Drawn with matplotlib from the dashboard's own queries to a real Prometheus, without Grafana
One worker, a real RabbitMQ and S3, a simulated model API: normal load, failing jobs, rate limits (429),
an invalid API key (the worker pauses), a burst, normal load.""".splitlines()


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.observability.preview", description=__doc__)
    parser.add_argument("--to", type=Path, default=FILE, metavar="FILE", help="an .svg or .png file")
    file = parser.parse_args().to
    logging.getLogger("aio_pika").setLevel(logging.CRITICAL)
    try:
        release = installed()
    except pytest.skip.Exception as missing:
        print_status(str(missing))
        return 1
    found = asyncio.run(_run_load(release))
    drawing.draw(dashboard.load(), found, file, TITLE)
    print_status(f"wrote {file}")
    return 0


async def _run_load(release: Release) -> dict[int, list[drawing.Line]]:
    seconds = sum(value for name, value in vars(DURATIONS).items() if name != "jobs_per_s")
    print_status(
        f"Starting RabbitMQ, S3, the model simulator and Prometheus; then {seconds:.0f} seconds of jobs"
    )
    with Stack.start() as stack, tempfile.TemporaryDirectory() as folder:
        stack.s3.client().create_bucket(Bucket=BUCKET)
        async with ObservedWorker.set_up(stack, Path(folder), release) as observed:
            await observed.run(DURATIONS)
            return _query_panels(observed, time.time())


def _query_panels(observed: ObservedWorker, ended: float) -> dict[int, list[drawing.Line]]:
    """Return the series of each panel for the whole run."""
    values = {
        **dict.fromkeys(("namespace", "instance", "model"), ".*"),
        "queue": observed.worker.jobs_queue,
        "__rate_interval": f"{WINDOW_S}s",
        "__range": f"{ended - observed.started:.0f}s",
    }
    found: dict[int, list[drawing.Line]] = {}
    for target in dashboard.targets(dashboard.load()):
        query = dashboard.with_values(target.expr, values)
        if target.is_instant:
            series = observed.prometheus.query(query)
        else:
            series = observed.prometheus.query_range(query, observed.started, ended, STEP_S)
        legend = "" if target.legend == "__auto" else target.legend
        lines = found.setdefault(target.panel["id"], [])
        lines += [_line(each, legend, observed) for each in sorted(series, key=_order)]
    return found


def _order(series: Series) -> list[str]:
    return sorted(series.labels.values())


def _line(series: Series, legend: str, observed: ObservedWorker) -> drawing.Line:
    labels = {**series.labels, "instance": "worker-0"}
    points = [(second - observed.started, value) for second, value in series.points if math.isfinite(value)]
    return drawing.Line(dashboard.named(legend, labels), points or [(0.0, math.nan)])


if __name__ == "__main__":
    sys.exit(main())
