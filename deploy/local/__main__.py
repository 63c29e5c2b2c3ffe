"""`python -m deploy.local up`: run the local stack in the foreground until Ctrl-C."""

import argparse
import shlex
import signal
import sys
import time

from deploy.local.stack import Stack
from deploy.local.terminal import print_status, raise_keyboard_interrupt

_CHECK_SECONDS = 0.5


def main() -> int:
    """Parse the command line and run the stack; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m deploy.local", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    up = commands.add_parser(
        "up", help="start RabbitMQ, S3 and the model simulator, except those that the environment names"
    )
    up.add_argument(
        "--own", action="store_true", help="start all services, also if the environment names some"
    )
    arguments = parser.parse_args()
    # Also if they were ignored before, as in the background of a script.
    signal.signal(signal.SIGINT, raise_keyboard_interrupt)
    signal.signal(signal.SIGTERM, raise_keyboard_interrupt)
    try:
        return _up(use_environment=not arguments.own)
    except KeyboardInterrupt:
        return 0
    except RuntimeError as error:
        print_status(str(error))
        return 1


def _up(*, use_environment: bool) -> int:
    print_status("Starting the local stack …")
    with Stack.start(use_environment=use_environment, on_progress=print_status) as stack:
        for name, value in stack.environment().items():
            print(f"export {name}={shlex.quote(value)}")
        sys.stdout.flush()
        model = "simulated" if stack.model_api.is_simulated else "real, costs money"
        print_status(
            f"Ready. Model API: {model}. Bucket: {stack.s3.bucket}. "
            f"RabbitMQ management: {stack.rabbitmq.management_url or 'unknown'}\n"
            "Paste the lines above into another shell to use the stack. Ctrl-C stops it and deletes its data."
        )
        while not (stopped := stack.stopped_services()):
            time.sleep(_CHECK_SECONDS)
        print_status(f"Stopped unexpectedly: {', '.join(stopped)}. Stopping the rest.")
        return 1


if __name__ == "__main__":
    sys.exit(main())
