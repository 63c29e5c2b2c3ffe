"""`python -m deploy.local up`: runs the local stack in the foreground until Ctrl-C."""

import argparse
import shlex
import signal
import sys
import time
from pathlib import Path

from deploy.local.install import RabbitMQNotInstalledError
from deploy.local.processes import ServiceStartError
from deploy.local.stack import Stack
from deploy.local.terminal import print_status, raise_keyboard_interrupt

_CHECK_SECONDS = 0.5


def main() -> int:
    """Parse the command line and run it; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m deploy.local", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    up = commands.add_parser(
        "up",
        help="start RabbitMQ, S3 and the stand-in model; what the environment names is used instead",
    )
    up.add_argument(
        "--own", action="store_true", help="start everything here, whatever the environment names"
    )
    up.add_argument("--folder", type=Path, help="keep data and logs in this new folder")
    arguments = parser.parse_args()
    # Also when they were ignored before, as in the background of a script.
    signal.signal(signal.SIGINT, raise_keyboard_interrupt)
    signal.signal(signal.SIGTERM, raise_keyboard_interrupt)
    try:
        return _up(use_environment=not arguments.own, folder=arguments.folder)
    except KeyboardInterrupt:
        return 0
    except (ServiceStartError, RabbitMQNotInstalledError, RuntimeError) as error:
        print_status(str(error))
        return 1


def _up(*, use_environment: bool, folder: Path | None) -> int:
    print_status("Starting the local stack …")
    with Stack.start(use_environment=use_environment, folder=folder, on_progress=print_status) as stack:
        for name, value in stack.environment().items():
            print(f"export {name}={shlex.quote(value)}")
        sys.stdout.flush()
        print_status(_summary(stack))
        while not (dead := stack.dead_parts()):
            time.sleep(_CHECK_SECONDS)
        print_status(f"Ended unexpectedly: {', '.join(dead)}. Stopping the rest.")
        return 1


def _summary(stack: Stack) -> str:
    model = "stand-in, not a real model" if stack.model_api.is_simulated else "real, and paid for"
    return (
        f"Up. Model API: {model}. Bucket: {stack.s3.bucket}. "
        f"RabbitMQ management: {stack.rabbitmq.management_url or 'unknown'}\n"
        "Paste the lines above into another shell to use it. Ctrl-C stops it and leaves nothing behind."
    )


if __name__ == "__main__":
    sys.exit(main())
