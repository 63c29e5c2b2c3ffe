"""`vqa-worker`: parse the command line, run a command, return its exit code."""

import os
import signal

if os.getpid() == 1:
    # Linux ignores a signal that process 1 of a container has no handler for.
    signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))

import argparse
import asyncio
import faulthandler
import gc
import importlib.util
import logging
import sys
import threading
import time
from collections.abc import Coroutine, Sequence

from worker import __version__

EXIT_OK, EXIT_FAILURE = 0, 1
# sysexits.h: EX_CONFIG, a configuration error.
EXIT_CONFIG = 78
EXIT_USAGE = 2
# 128 + SIGPIPE, as shells report it.
EXIT_CLOSED_PIPE = 141
BASIC_COMMANDS = ("run", "topology", "schema")
_ONLY_WITH_SHELL = "all commands except run, topology and schema need: pip install 'vqa-worker[cli]'"
APPLY_TIMEOUT_S = 60.0
# For idle threads to finish.
THREADS_GRACE_S = 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # A worker starts without loading the command line's libraries. (Shell completion passes no arguments.)
    if given[:1] == ["run"] or not _has_shell():
        return basics(given)
    from worker.cli.commands import shell

    return shell(given, basics)


def _has_shell() -> bool:
    """Return whether the extra `cli` is installed."""
    return all(importlib.util.find_spec(name) for name in ("typer", "rich"))


def basics(arguments: Sequence[str]) -> int:
    """Run a command that needs only the worker's dependencies."""
    if arguments and not arguments[0].startswith("-") and arguments[0] not in BASIC_COMMANDS:
        _print_errors([f"vqa-worker {arguments[0]}: {_ONLY_WITH_SHELL}"])
        return EXIT_USAGE
    given = _parser().parse_args(arguments)
    if given.command == "topology":
        return topology(given)
    if given.command == "schema":
        return schema(given)
    return run()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vqa-worker",
        description="Answer questions about images: jobs come from RabbitMQ, results go to RabbitMQ.",
        epilog=None if _has_shell() else _ONLY_WITH_SHELL,
    )
    parser.add_argument("--version", action="version", version=f"vqa-worker {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "run", help="run a worker until it receives SIGTERM or SIGINT; settings: VQA_… variables"
    )
    _add_topology(commands.add_parser("topology", help="show or declare the queues and exchanges"))
    _add_schema(commands.add_parser("schema", help="print the schemas of the messages; needs no broker"))
    return parser


def _add_schema(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("document", nargs="?", choices=("job", "result", "asyncapi"), help="all by default")
    parser.add_argument("--json", action="store_true", help="print compact JSON on one line")


def _add_topology(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser("show", help="print the queues and exchanges of the settings; needs no broker")
    apply = actions.add_parser(
        "apply", help="declare what does not exist on the broker; change nothing that exists"
    )
    for action in (show, apply):
        action.add_argument("--json", action="store_true", help="print JSON")
    apply.add_argument(
        "--timeout",
        type=_seconds,
        default=APPLY_TIMEOUT_S,
        metavar="SECONDS",
        help="connection timeout in seconds (default: %(default)g)",
    )


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, not {text!r}")
    return seconds


def run() -> int:
    """`vqa-worker run`."""
    _ignore_status_signal()
    faulthandler.register(signal.SIGUSR2)
    # While modules load there is no garbage, and collections take a sixth of the start.
    gc.disable()
    # Imported late, so that wrong settings and `--help` need no SDKs.
    from worker.settings import SettingsError, load_settings, trace_secrets

    try:
        settings = load_settings()
    except SettingsError as error:
        return _report_config_errors(error.faults)
    import structlog

    from worker.app import runner as app
    from worker.observability.logs import configure_logging, describe_exception
    from worker.observability.redaction import Redactor
    from worker.rabbitmq.connection import BrokerRefusedError
    from worker.rabbitmq.topology import TopologyError

    redact = Redactor([*settings.secret_values(), *trace_secrets(os.environ)])
    configure_logging(settings.log_level, settings.log_format, redact)
    try:
        _on_uvloop(app.run(settings))
    except BaseExceptionGroup as group:
        match cause := app.unwrap(group):
            case TopologyError():
                return _report_config_errors(cause.faults)
            case BrokerRefusedError() | app.StartError():
                return _report_config_errors([str(cause)])
        structlog.get_logger(__name__).critical("crashed", exception=describe_exception(cause))
        return EXIT_FAILURE
    finally:
        _ignore_status_signal()
    if _has_blocked_threads():
        logging.shutdown()
        sys.stdout.flush()
        os._exit(EXIT_OK)
    return EXIT_OK


def topology(given: argparse.Namespace) -> int:
    """`vqa-worker topology show` and `apply`."""
    from worker.settings import SettingsError, load_broker_settings

    try:
        settings = load_broker_settings()
    except SettingsError as error:
        return _report_config_errors(error.faults)
    from worker.cli.topology import apply, show
    from worker.observability.logs import configure_logging
    from worker.observability.redaction import Redactor
    from worker.rabbitmq.connection import BrokerRefusedError, BrokerUnreachableError
    from worker.rabbitmq.topology import TopologyError

    _print_errors(settings.unknown_variables)
    # Errors are printed below; the libraries' own log lines would repeat them.
    configure_logging("error", None, Redactor(settings.secret_values()), stream=sys.stderr)
    logging.disable()
    try:
        text = (
            show(settings, as_json=given.json)
            if given.action == "show"
            else asyncio.run(apply(settings, timeout_s=given.timeout, as_json=given.json))
        )
    except TopologyError as error:
        return _report_config_errors(error.faults)
    except BrokerRefusedError as error:
        return _report_config_errors([str(error)])
    except BrokerUnreachableError as error:
        _print_errors([str(error)])
        return EXIT_FAILURE
    return _print(text)


def _ignore_status_signal() -> None:
    """Ignore SIGUSR1 while no event loop handles it; by default it ends the process."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def schema(given: argparse.Namespace) -> int:
    """`vqa-worker schema`."""
    from worker.settings import SettingsError, load_broker_settings

    try:
        settings = load_broker_settings()
    except SettingsError as error:
        return _report_config_errors(error.faults)
    from worker.cli.schema import show

    _print_errors(settings.unknown_variables)
    return _print(show(settings, given.document, compact=given.json))


def _has_blocked_threads() -> bool:
    """Return whether a thread still runs, most likely in a read from S3: Python would wait for it at exit."""
    ends = time.monotonic() + THREADS_GRACE_S
    others = [thread for thread in threading.enumerate() if thread is not threading.current_thread()]
    for thread in others:
        thread.join(max(0.0, ends - time.monotonic()))
    return any(thread.is_alive() and not thread.daemon for thread in others)


def _print(text: str) -> int:
    """Print to stdout; return an exit code, without an error if the reader has closed the pipe (`| head`)."""
    try:
        print(text, flush=True)  # noqa: T201
    except BrokenPipeError:
        # Python flushes stdout again at exit and would print an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_CLOSED_PIPE
    return EXIT_OK


def _report_config_errors(faults: Sequence[str]) -> int:
    _print_errors(faults)
    return EXIT_CONFIG


def _print_errors(lines: Sequence[str]) -> None:
    for line in lines:
        print(line, file=sys.stderr)  # noqa: T201


def _on_uvloop(main: Coroutine[None, None, bool]) -> bool:
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)


if __name__ == "__main__":
    sys.exit(main())
