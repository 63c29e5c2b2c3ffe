"""`python -m tests.bench`: this worker compared with others, on this machine."""

import argparse
import logging
import signal
import sys
import time
from pathlib import Path
from typing import Final

import uvloop

from deploy.local.install import RabbitMQNotInstalledError
from deploy.local.processes import ServiceStartError
from deploy.local.terminal import print_status, raise_keyboard_interrupt
from tests.bench import charts, contenders, machine, report
from tests.bench.contenders import Contender
from tests.bench.figures import Notebook
from tests.bench.load import WrongError
from tests.bench.machine import Cores
from tests.bench.running import Bench
from tests.bench.scenarios import KB, MB, SCENARIOS, Plan

QUICK_SCENARIOS: Final = ("cpu", "memory", "start")
QUICK_CONTENDERS: Final = (contenders.WORKER, "aio-pika", "FastStream")
FIGURES: Final = "figures.json"


def main() -> int:
    """Run what the command line asks for; return the exit code."""
    arguments = _parser().parse_args()
    if arguments.redraw:
        _write(Notebook.load(arguments.redraw / "performance" / FIGURES), arguments.redraw)
        return 0
    if not machine.is_supported():
        print_status("The benchmark reads CPU and memory from /proc, so it runs on Linux only.")
        return 1
    # Connections to a broker that goes away with the benchmark are expected and not logged.
    logging.getLogger("aio_pika").setLevel(logging.CRITICAL)
    logging.getLogger("aiormq").setLevel(logging.CRITICAL)
    for number in (signal.SIGINT, signal.SIGTERM):
        # Also when they were ignored before, as in the background of a script.
        signal.signal(number, raise_keyboard_interrupt)
    notebook = Notebook(tell=print_status)
    try:
        _measure(arguments, notebook)
    except (WrongError, ServiceStartError, RabbitMQNotInstalledError) as error:
        print_status(f"\nThe benchmark was interrupted, and its figures mean nothing:\n{error}")
        return 1
    except KeyboardInterrupt:
        return 130
    sys.stdout.write(report.tables(notebook))
    if arguments.write:
        _write(notebook, arguments.write)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the short form, under two minutes")
    parser.add_argument(
        "--worker",
        metavar="COMMAND",
        help="measure the build of the worker that this command starts (`run` is added to it), such as "
        "another checkout's; by default this one's",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help=f"only these scenarios ({', '.join(SCENARIOS)}) or contenders "
        f"({', '.join(repr(it.name) for it in _everybody(None))})",
    )
    parser.add_argument("--rounds", type=int, help="how often the measurements are repeated")
    parser.add_argument(
        "--write", type=Path, metavar="FOLDER", help="write performance.md and its pictures here"
    )
    parser.add_argument(
        "--redraw",
        type=Path,
        metavar="FOLDER",
        help="measure nothing: write them again from the figures there",
    )
    return parser


def _everybody(worker: str | None) -> list[Contender]:
    return [contenders.worker(worker), *contenders.peers(), *contenders.traced(worker)]


def _measure(arguments: argparse.Namespace, notebook: Notebook) -> None:
    began = time.monotonic()
    cores = Cores.split()
    only = set(arguments.only or ())
    everybody = _everybody(arguments.worker)
    if unknown := only - SCENARIOS.keys() - {it.name for it in everybody}:
        raise SystemExit(f"--only: unknown: {', '.join(sorted(unknown))}")
    usual = [
        it for it in everybody if not it.only_by_name and (not arguments.quick or it.name in QUICK_CONTENDERS)
    ]
    taking_part = [it for it in everybody if it.name in only] or usual
    plan = (_quick if arguments.quick else _whole)(taking_part, arguments.rounds)
    asked = [it for it in SCENARIOS if it in only]
    scenarios = asked or [it for it in SCENARIOS if not arguments.quick or it in QUICK_SCENARIOS]
    if cores.are_shared:
        notebook.remark("This machine has one core, which all share: read the figures with that in mind.")
    with Bench.start(cores, print_status) as bench:
        notebook.about |= report.about(bench, cores)
        if arguments.worker:
            notebook.about["worker command"] = arguments.worker
        for name in scenarios:
            print_status(f"\n{name}: {(SCENARIOS[name].__doc__ or '').strip()}")
            uvloop.run(SCENARIOS[name](bench, plan, notebook))
    notebook.about["took"] = f"{(time.monotonic() - began) / 60:.0f} minutes"


def _quick(taking_part: list[Contender], rounds: int | None) -> Plan:
    return Plan(
        contenders=taking_part,
        rounds=rounds or 1,
        cpu_jobs={100 * KB: 400, 10 * MB: 32},
        memory=[(10 * MB, 32)],
        thinking_s=6,
        starts=rounds or 1,
        load_s=10,
        flat_jobs=1000,
        deep_queue=100_000,
    )


def _whole(taking_part: list[Contender], rounds: int | None) -> Plan:
    return Plan(
        contenders=taking_part,
        rounds=rounds or 3,
        cpu_jobs={100 * KB: 1500, 1 * MB: 500, 10 * MB: 72},
        memory=[(10 * MB, 64), (10 * MB, 200)],
        memory_for_worker_only=[(10 * MB, 400), (19 * MB, 64)],
        starts=5,
    )


def _write(notebook: Notebook, folder: Path) -> None:
    pictures = folder / "performance"
    pictures.mkdir(parents=True, exist_ok=True)
    notebook.save(pictures / FIGURES)
    drawn = charts.draw(notebook, pictures)
    (folder / "performance.md").write_text(report.page(notebook, drawn))
    print_status(
        f"Written: {folder / 'performance.md'}, {', '.join(f'performance/{name}' for name in drawn)}"
    )


if __name__ == "__main__":
    sys.exit(main())
