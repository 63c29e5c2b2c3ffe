"""`vqa-worker`: parse, run, exit code."""

import argparse
import asyncio
import faulthandler
import gc
import importlib.util
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Coroutine, Sequence

from worker import __version__

EXIT_OK, EXIT_FAILURE = 0, 1
# sysexits.h: something is wrong with the configuration.
EXIT_CONFIG = 78
EXIT_USAGE = 2
# What a shell says of a process that SIGPIPE has ended.
EXIT_CLOSED_PIPE = 141
BASIC_COMMANDS = ("run", "topology", "schema")
_ONLY_WITH_SHELL = "all commands but run, topology and schema need: pip install 'vqa-worker[cli]'"
APPLY_TIMEOUT_S = 60.0
# For idle threads to notice the end.
THREADS_GRACE_S = 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # A worker starts without loading what only people need. (The completion's script gives no arguments.)
    if given[:1] == ["run"] or not _has_shell():
        return basics(given)
    from worker.cli.commands import shell

    return shell(given, basics)


def _has_shell() -> bool:
    """Whether the extra `cli` is installed."""
    return all(importlib.util.find_spec(name) for name in ("typer", "rich"))


def basics(arguments: Sequence[str]) -> int:
    """The commands that need nothing but what the worker needs."""
    if arguments and not arguments[0].startswith("-") and arguments[0] not in BASIC_COMMANDS:
        _say([f"vqa-worker {arguments[0]}: {_ONLY_WITH_SHELL}"])
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
        description="Answers questions about images, from RabbitMQ to RabbitMQ.",
        epilog=None if _has_shell() else _ONLY_WITH_SHELL,
    )
    parser.add_argument("--version", action="version", version=f"vqa-worker {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "run", help="work until SIGTERM or SIGINT; settings come from the environment (VQA_…)"
    )
    _add_topology(commands.add_parser("topology", help="the queues and exchanges: show or make them"))
    _add_schema(commands.add_parser("schema", help="print what messages look like; needs no broker"))
    return parser


def _add_schema(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("document", nargs="?", choices=("job", "result", "asyncapi"), help="all by default")
    parser.add_argument("--json", action="store_true", help="print it on one line")


def _add_topology(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser("show", help="print what the settings mean; needs no broker")
    apply = actions.add_parser("apply", help="make on the broker what is not there; changes nothing that is")
    for action in (show, apply):
        action.add_argument("--json", action="store_true", help="print JSON")
    apply.add_argument(
        "--timeout",
        type=_seconds,
        default=APPLY_TIMEOUT_S,
        metavar="SECONDS",
        help="how long to wait for a broker that is out of reach (default: %(default)g)",
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
    _ignore_questions()
    faulthandler.register(signal.SIGUSR2)
    # Until everything is loaded there is no garbage, and looking for it takes a sixth of the start.
    gc.disable()
    # Imported late: a wrong setting and `--help` answer at once, without loading the SDKs.
    from worker.settings import SettingsError, load_settings, trace_secrets

    try:
        settings = load_settings()
    except SettingsError as error:
        return _refuse(error.faults)
    import structlog

    from worker.app import runner as app
    from worker.observability.logs import configure_logging, describe_exception
    from worker.observability.redaction import Redactor
    from worker.rabbitmq.session import BrokerRefusedError
    from worker.rabbitmq.topology import TopologyError

    redact = Redactor([*settings.secret_values(), *trace_secrets(os.environ)])
    configure_logging(settings.log_level, settings.log_format, redact)
    try:
        _on_uvloop(app.run(settings))
    except BaseExceptionGroup as group:
        match cause := app.unwrap(group):
            case TopologyError():
                return _refuse(cause.faults)
            case BrokerRefusedError() | app.StartError():
                return _refuse([str(cause)])
        structlog.get_logger(__name__).critical("crashed", exception=describe_exception(cause))
        return EXIT_FAILURE
    finally:
        _ignore_questions()
    if _threads_linger():
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
        return _refuse(error.faults)
    from worker.cli.topology import apply, show
    from worker.observability.logs import configure_logging
    from worker.observability.redaction import Redactor
    from worker.rabbitmq.session import BrokerRefusedError, BrokerUnreachableError
    from worker.rabbitmq.topology import TopologyError

    _say(settings.strays)
    # What goes wrong is told in lines of its own, without what the libraries say of it.
    configure_logging("error", None, Redactor(settings.secret_values()), stream=sys.stderr)
    logging.disable()
    try:
        told = (
            show(settings, as_json=given.json)
            if given.action == "show"
            else asyncio.run(apply(settings, timeout_s=given.timeout, as_json=given.json))
        )
    except TopologyError as error:
        return _refuse(error.faults)
    except BrokerRefusedError as error:
        return _refuse([str(error)])
    except BrokerUnreachableError as error:
        _say([str(error)])
        return EXIT_FAILURE
    return _print(told)


def _ignore_questions() -> None:
    """While nobody is there to answer it, SIGUSR1 must not end the process."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def schema(given: argparse.Namespace) -> int:
    """`vqa-worker schema`."""
    from worker.settings import SettingsError, load_broker_settings

    try:
        settings = load_broker_settings()
    except SettingsError as error:
        return _refuse(error.faults)
    from worker.cli.schema import show

    _say(settings.strays)
    return _print(show(settings, given.document, compact=given.json))


def _threads_linger() -> bool:
    """Whether a thread still waits, for S3 most likely; nobody needs what it reads, and Python would wait."""
    ends = time.monotonic() + THREADS_GRACE_S
    others = [thread for thread in threading.enumerate() if thread is not threading.current_thread()]
    for thread in others:
        thread.join(max(0.0, ends - time.monotonic()))
    return any(thread.is_alive() and not thread.daemon for thread in others)


def _print(text: str) -> int:
    """What was asked for, on stdout; nothing is said to a reader that has gone away (`| head`)."""
    try:
        print(text, flush=True)  # noqa: T201
    except BrokenPipeError:
        # Python flushes stdout once more in the end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_CLOSED_PIPE
    return EXIT_OK


def _refuse(faults: Sequence[str]) -> int:
    _say(faults)
    return EXIT_CONFIG


def _say(lines: Sequence[str]) -> None:
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
