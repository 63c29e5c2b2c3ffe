"""`vqa-worker`: parse, run, exit code."""

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Coroutine, Sequence

from worker import __version__

EXIT_OK, EXIT_FAILURE = 0, 1
# sysexits.h: something is wrong with the configuration.
EXIT_CONFIG = 78


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="vqa-worker", description="Answers questions about images, from RabbitMQ to RabbitMQ."
    )
    parser.add_argument("--version", action="version", version=f"vqa-worker {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "run", help="work until SIGTERM or SIGINT; settings come from the environment (VQA_…)"
    )
    parser.parse_args(arguments)
    return run()


def run() -> int:
    """`vqa-worker run`."""
    # Imported late: a wrong setting and `--help` answer at once, without loading the SDKs.
    from worker.settings import SettingsError, load_settings

    try:
        settings = load_settings()
    except SettingsError as error:
        return _refuse(error.faults)
    from worker import app
    from worker.logs import configure_logging, describe_bug
    from worker.rabbit.connection import BrokerRefusedError
    from worker.rabbit.topology import TopologyError
    from worker.redact import Redactor

    configure_logging(settings.log_level, settings.log_format, Redactor(settings.secret_values()))
    try:
        all_done = _on_uvloop(app.run(settings))
    except BaseExceptionGroup as group:
        match cause := app.unwrap(group):
            case TopologyError():
                return _refuse(cause.faults)
            case BrokerRefusedError() | app.StartError():
                return _refuse([str(cause)])
        logging.getLogger(__name__).critical("died", extra={"exception": describe_bug(cause)})
        return EXIT_FAILURE
    if not all_done:
        # A thread may still wait for S3; nobody needs what it reads.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(EXIT_OK)
    return EXIT_OK


def _refuse(faults: Sequence[str]) -> int:
    for fault in faults:
        print(fault, file=sys.stderr)  # noqa: T201
    return EXIT_CONFIG


def _on_uvloop(main: Coroutine[None, None, bool]) -> bool:
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)


if __name__ == "__main__":
    sys.exit(main())
