"""`python -m tests.bench`: compare the CPU and memory of the worker with other workers."""

import argparse
import sys
import time
from pathlib import Path
from typing import Final

import uvloop

from deploy.local.install import RabbitMQNotInstalledError
from deploy.local.processes import ServiceStartError
from deploy.local.terminal import print_status
from tests import command_line
from tests.bench import charts, contenders, machine, report
from tests.bench.contenders import Contender
from tests.bench.load import WrongResultError
from tests.bench.machine import Cores
from tests.bench.results import Results
from tests.bench.scenarios import KB, MB, SCENARIOS, Plan
from tests.bench.servers import Bench

QUICK_SCENARIOS: Final = ("cpu", "memory", "start")
QUICK_CONTENDERS: Final = (contenders.WORKER, "aio-pika", "FastStream")
FIGURES: Final = "figures.json"


def main() -> int:
    """Run the command line; return the exit code."""
    arguments = _parser().parse_args()
    if arguments.redraw:
        _write(Results.load(arguments.redraw / "performance" / FIGURES), arguments.redraw)
        return 0
    if not machine.is_supported():
        print_status("The benchmark reads CPU and memory from /proc, so it runs on Linux only.")
        return 1
    command_line.set_up()
    results = Results(log=print_status)
    try:
        _measure(arguments, results)
    except (WrongResultError, ServiceStartError, RabbitMQNotInstalledError) as error:
        print_status(f"\nThe benchmark failed; its figures are invalid:\n{error}")
        return 1
    except KeyboardInterrupt:
        return 130
    sys.stdout.write(report.tables(results))
    if arguments.write:
        _write(results, arguments.write)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short form, less than two minutes")
    parser.add_argument(
        "--worker",
        metavar="COMMAND",
        help="command of another build of the worker, without `run` (default: this checkout)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help=f"only these scenarios ({', '.join(SCENARIOS)}) or contenders "
        f"({', '.join(repr(it.name) for it in _all_contenders(None))})".replace("%", "%%"),
    )
    parser.add_argument("--rounds", type=int, help="number of repetitions")
    parser.add_argument(
        "--write", type=Path, metavar="FOLDER", help="write performance.md and its charts to this folder"
    )
    parser.add_argument(
        "--redraw",
        type=Path,
        metavar="FOLDER",
        help="write them again from the figures in this folder, without a measurement",
    )
    return parser


def _all_contenders(worker: str | None) -> list[Contender]:
    return [contenders.worker(worker), *contenders.peers(), *contenders.traced(worker)]


def _measure(arguments: argparse.Namespace, results: Results) -> None:
    started = time.monotonic()
    cores = Cores.split()
    only = set(arguments.only or ())
    candidates = _all_contenders(arguments.worker)
    if unknown := only - SCENARIOS.keys() - {it.name for it in candidates}:
        raise SystemExit(f"--only: unknown: {', '.join(sorted(unknown))}")
    default = [
        it for it in candidates if not it.is_optional and (not arguments.quick or it.name in QUICK_CONTENDERS)
    ]
    selected = [it for it in candidates if it.name in only] or default
    plan = (_quick if arguments.quick else _full)(selected, arguments.rounds)
    scenarios = [it for it in SCENARIOS if it in only] or [
        it for it in SCENARIOS if not arguments.quick or it in QUICK_SCENARIOS
    ]
    if cores.are_shared:
        results.remark("All processes shared the only core of this machine.")
    with Bench.start(cores, print_status) as bench:
        results.about |= report.about(bench, cores)
        if arguments.worker:
            results.about["worker command"] = arguments.worker
        for name in scenarios:
            print_status(f"\n{name}: {(SCENARIOS[name].__doc__ or '').strip()}")
            uvloop.run(SCENARIOS[name](bench, plan, results))
    results.about["took"] = f"{(time.monotonic() - started) / 60:.0f} minutes"


def _quick(selected: list[Contender], rounds: int | None) -> Plan:
    return Plan(
        contenders=selected,
        rounds=rounds or 1,
        cpu_jobs={100 * KB: 400, 10 * MB: 32},
        memory=[(10 * MB, 32)],
        latency_s=6,
        starts=rounds or 1,
        load_s=10,
        flat_jobs=1000,
        deep_queue=100_000,
    )


def _full(selected: list[Contender], rounds: int | None) -> Plan:
    return Plan(
        contenders=selected,
        rounds=rounds or 3,
        cpu_jobs={100 * KB: 1500, 1 * MB: 500, 10 * MB: 72},
        memory=[(10 * MB, 64), (10 * MB, 200)],
        memory_for_worker_only=[(10 * MB, 400), (19 * MB, 64)],
        starts=5,
    )


def _write(results: Results, folder: Path) -> None:
    images = folder / "performance"
    images.mkdir(parents=True, exist_ok=True)
    results.save(images / FIGURES)
    drawn = charts.draw(results, images)
    (folder / "performance.md").write_text(report.page(results, drawn))
    print_status(
        f"Written: {folder / 'performance.md'}, {', '.join(f'performance/{name}' for name in drawn)}"
    )


if __name__ == "__main__":
    sys.exit(main())
