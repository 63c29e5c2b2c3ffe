"""`python -m tests.chaos`: inject faults around running workers, at random times from a printed seed."""

import argparse
import asyncio
import random
import sys
import tempfile
from pathlib import Path

from deploy.local.model_simulator.behavior import Behavior
from deploy.local.stack import Stack
from deploy.local.terminal import print_status
from tests import command_line
from tests.chaos import soak
from tests.chaos.report import FOOTNOTE
from tests.chaos.run import Options, run


def main() -> int:
    """Run the command line; return the exit code."""
    arguments = _parser().parse_args()
    options = _options(arguments)
    if arguments.plan:
        sys.stdout.writelines(f"{fault}\n" for fault in options.plan())
        return 0
    command_line.set_up()
    try:
        return _run(arguments, options)
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, help="seed of the faults and the jobs (default: random)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="duration of publishing in minutes (5; 30 with --soak)")
    length.add_argument("--seconds", type=float, help="duration of publishing in seconds")
    parser.add_argument("--workers", type=int, default=3, help="number of workers (3)")
    parser.add_argument("--rate", type=float, default=15.0, help="jobs per second (15)")
    parser.add_argument("--every", type=float, default=6.0, help="seconds between faults, on average (6)")
    parser.add_argument(
        "--store",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="use a result store in S3 (default: yes)",
    )
    parser.add_argument(
        "--soak", action="store_true", help="run one worker without kills and measure its memory"
    )
    parser.add_argument("--plan", action="store_true", help="print the planned faults and exit")
    parser.add_argument("--logs", type=Path, help="folder for the workers' logs")
    return parser


def _options(arguments: argparse.Namespace) -> Options:
    minutes = arguments.minutes or (30 if arguments.soak else 5)
    seed = random.SystemRandom().randrange(100_000) if arguments.seed is None else arguments.seed
    options = Options(
        seed=seed,
        seconds=arguments.seconds or 60 * minutes,
        workers=arguments.workers,
        rate=arguments.rate,
        every_s=arguments.every,
        with_store=arguments.store,
    )
    return soak.soak_options(options) if arguments.soak else options


def _run(arguments: argparse.Namespace, options: Options) -> int:
    what = "soak" if arguments.soak else "chaos"
    again = f"make {what} SEED={options.seed} SECONDS={options.seconds:g}"
    again += f" WORKERS={arguments.workers} RATE={options.rate:g} EVERY={arguments.every:g}"
    again += "" if options.with_store else " STORE=no"
    size = f"{options.seconds:g} s, {options.workers} worker(s), {options.rate:g} jobs/s"
    print_status(f"{what}: seed {options.seed}, {size}")
    with tempfile.TemporaryDirectory(prefix="vqa-chaos-") as temporary:
        folder = arguments.logs or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        with Stack.start(simulator=Behavior(decode=False)) as stack:
            if arguments.soak:
                text, passed = asyncio.run(soak.run(stack, folder, options, print_status))
            else:
                ended = asyncio.run(run(stack, folder, options, print_status))
                text, passed = f"{ended}\n\n{FOOTNOTE}", ended.evaluation.passed
    sys.stdout.write(f"\n{text}\n\n{'PASSED' if passed else 'FAILED'}. Repeat with: {again}\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
