"""`python -m tests.seeing.preview`: plays a load on real services and draws what the queries find."""

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
from tests import debian
from tests.conftest import BUCKET
from tests.running import ROOT
from tests.seeing import board, drawing
from tests.seeing.prometheus import PACKAGES, Series
from tests.seeing.scene import Pace, Scene

FILE: Final = ROOT / "docs" / "dashboard-preview.svg"
PACE: Final = Pace(calm=30, accidents=40, limited=25, outage=12, burst=8, after=40, jobs_per_s=20.0)
STEP_S: Final = 3.0
WINDOW_S: Final = 12
SAYS: Final = """\
Preview of the dashboard vqa-worker
Drawn by matplotlib from what the dashboard's own queries found in a real Prometheus: no screenshot of Grafana
One worker, a real RabbitMQ and S3, a simulator for the model: calm, bad jobs, a provider that limits (429),
one that refuses the key (the worker pauses), a burst, calm again.""".splitlines()


def main() -> int:
    """Play, ask, draw; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.seeing.preview", description=__doc__)
    parser.add_argument("--to", type=Path, default=FILE, metavar="FILE", help="an .svg or .png")
    file = parser.parse_args().to
    logging.getLogger("aio_pika").setLevel(logging.CRITICAL)
    try:
        debian.install(PACKAGES)
    except pytest.skip.Exception as missing:
        print_status(str(missing))
        return 1
    found = asyncio.run(_played())
    drawing.draw(board.load(), found, file, SAYS)
    print_status(f"wrote {file}")
    return 0


async def _played() -> dict[int, list[drawing.Line]]:
    seconds = sum(value for name, value in vars(PACE).items() if name != "jobs_per_s")
    print_status(
        f"Starting RabbitMQ, S3, the model simulator and Prometheus; then {seconds:.0f} seconds of jobs"
    )
    with Stack.start() as stack, tempfile.TemporaryDirectory() as folder:
        stack.s3.client().create_bucket(Bucket=BUCKET)
        async with Scene.set_up(stack, Path(folder)) as scene:
            await scene.play(PACE)
            return _asked(scene, time.time())


def _asked(scene: Scene, ended: float) -> dict[int, list[drawing.Line]]:
    """What each panel's queries find over the whole time."""
    values = {
        **dict.fromkeys(("namespace", "instance", "model"), ".*"),
        "queue": scene.worker.jobs_queue,
        "__rate_interval": f"{WINDOW_S}s",
        "__range": f"{ended - scene.began:.0f}s",
    }
    found: dict[int, list[drawing.Line]] = {}
    for target in board.targets(board.load()):
        asked = board.with_values(target.expr, values)
        if target.is_instant:
            series = scene.prometheus.now(asked)
        else:
            series = scene.prometheus.over(asked, scene.began, ended, STEP_S)
        legend = "" if target.legend == "__auto" else target.legend
        lines = found.setdefault(target.panel["id"], [])
        lines += [_line(each, legend, scene) for each in sorted(series, key=_order)]
    return found


def _order(series: Series) -> list[str]:
    return sorted(series.labels.values())


def _line(series: Series, legend: str, scene: Scene) -> drawing.Line:
    labels = {**series.labels, "instance": "worker-0"}
    points = [(second - scene.began, value) for second, value in series.points if math.isfinite(value)]
    return drawing.Line(board.named(legend, labels), points or [(0.0, math.nan)])


if __name__ == "__main__":
    sys.exit(main())
