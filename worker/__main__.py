"""`vqa-worker`: parse the command line, run a command, return its exit code."""

import os
import signal

if os.getpid() == 1:
    # Linux ignores a signal that process 1 of a container has no handler for.
    signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))

import faulthandler
import gc
import logging
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from worker.cli.exit_codes import EXIT_CONFIG, EXIT_FAILURE, EXIT_OK
from worker.event_loop import run_coroutine

# For idle threads to finish.
THREADS_GRACE_S = 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # A worker starts without loading the command line's libraries. (Shell completion passes no arguments.)
    if given == ["run"]:
        return run()
    from worker.cli.commands import shell

    return shell(given, run)


def run(env_file: Path = Path(".env")) -> int:
    """Run a worker; return the exit code."""
    _ignore_status_signal()
    faulthandler.register(signal.SIGUSR2)
    # While modules load there is no garbage, and collections take a sixth of the start.
    gc.disable()
    # Imported late, so that wrong settings and `--help` need no SDKs.
    from worker.settings import SettingsError, load_settings, trace_secrets

    try:
        settings = load_settings(env_file=env_file)
    except SettingsError as error:
        return _report_config_errors(error.faults)
    import structlog

    from vqa_worker.rabbitmq.connection import BrokerRefusedError, TopologyError
    from worker.app import runner as app
    from worker.observability.logs import configure_logging, describe_exception
    from worker.observability.redaction import Redactor

    redact = Redactor([*settings.secret_values(), *trace_secrets(os.environ)])
    configure_logging(settings.log_level, settings.log_format, redact)
    try:
        run_coroutine(app.run(settings))
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


def _ignore_status_signal() -> None:
    """Ignore SIGUSR1 while no event loop handles it; by default it ends the process."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _has_blocked_threads() -> bool:
    """Return whether a thread still runs, most likely in a read from S3: Python would wait for it at exit."""
    ends = time.monotonic() + THREADS_GRACE_S
    others = [thread for thread in threading.enumerate() if thread is not threading.current_thread()]
    for thread in others:
        thread.join(max(0.0, ends - time.monotonic()))
    return any(thread.is_alive() and not thread.daemon for thread in others)


def _report_config_errors(faults: Sequence[str]) -> int:
    for fault in faults:
        print(f"Error: {fault}", file=sys.stderr)  # noqa: T201
    return EXIT_CONFIG


if __name__ == "__main__":
    sys.exit(main())
