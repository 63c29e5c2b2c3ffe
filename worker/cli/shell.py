"""Output, settings, errors and exit codes of all commands except `run`.

A command is a plain function, sync or async, in a module next to this one. It takes typer's parameters,
prints through a `Screen` and returns its exit code (None: 0):

    async def peek(
        queue: Annotated[str, typer.Argument(help="…")], as_json: Json = False, timeout: ConnectTimeout = 15.0
    ) -> int | None:
        '''Show the depth of a queue.

        `--help` shows the whole docstring as Markdown; the list of commands shows its first line.
        '''
        screen = Screen(as_json=as_json)
        settings = load(load_broker_settings, screen)      # only the settings that it uses
        broker = broker_of(settings)
        found = await Session.once(broker, timeout, lambda connection: …)
        screen.emit({"queue": queue, "found": found})       # with --json: one object a line, on stdout
        screen.print(f"{queue}: {found}")                   # without --json: text on stdout
        screen.note("…")                                    # always: text on stderr
        raise CommandError("<what is wrong>. <What to do>.")

`commands.py` registers it with `add(app, "peek", peek)`, which gives an async function its event loop and
turns exceptions into messages on stderr and an exit code, never a traceback:

    0 success · 1 failure, or a dependency is unreachable · 2 wrong usage · 78 wrong settings, or credentials
    that RabbitMQ or S3 refuse · 130 Ctrl-C · 141 stdout was closed (`| head`)

Commands import slow modules (aio-pika, the SDKs) inside functions: `--help` and shell completion import
every command.
"""

import asyncio
import functools
import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer
from rich.console import Console

if TYPE_CHECKING:
    from worker.rabbitmq.connection import Broker
    from worker.settings import BrokerSettings

EXIT_OK: Final = 0
EXIT_FAILURE: Final = 1
EXIT_USAGE: Final = 2
# sysexits.h: EX_CONFIG, a configuration error.
EXIT_CONFIG: Final = 78
# 128 + SIGINT and 128 + SIGPIPE, as shells report them.
EXIT_INTERRUPTED: Final = 130
EXIT_CLOSED_PIPE: Final = 141

Kind = TypeVar("Kind", bound="BrokerSettings")
Function = Callable[..., Any]

Json = Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")]
ConnectTimeout = Annotated[
    float,
    typer.Option(
        "--timeout",
        metavar="SECONDS",
        min=0.1,
        help="Connection timeout in seconds.",
    ),
]
DEFAULT_CONNECT_TIMEOUT_S: Final = 15.0


class CommandError(Exception):
    """The command failed.

    Attributes:
        lines: printed on stderr, the first one after `Error: `. Says what is wrong and what to do.
        code: the exit code.
    """

    def __init__(self, *lines: str, code: int = EXIT_FAILURE) -> None:
        super().__init__(*lines)
        self.lines = lines
        self.code = code


class UsageError(CommandError):
    """Wrong arguments or options."""

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines, code=EXIT_USAGE)


class _ClosedPipeError(Exception):
    """The reader of stdout has closed it."""


class Screen:
    """The output of a command: text, or JSON with `--json`.

    Attributes:
        as_json: whether stdout gets JSON.
        progress: the console on stderr for progress bars, which it draws only on a terminal.
    """

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self.progress = Console(stderr=True, soft_wrap=True, highlight=False)

    @property
    def is_terminal(self) -> bool:
        """Whether stderr is a terminal."""
        return self.progress.is_terminal

    @property
    def is_interactive(self) -> bool:
        """Whether stdin and stderr are a terminal, so that it can ask for confirmation."""
        return self.is_terminal and sys.stdin.isatty()

    def emit(self, value: Mapping[str, Any]) -> None:
        """With `--json`, print one object on one line."""
        if self.as_json:
            self.write(json.dumps(value, ensure_ascii=False))

    def print(self, *lines: str) -> None:
        """Without `--json`, print lines of text."""
        if not self.as_json:
            self.write(*lines)

    def write(self, *lines: str) -> None:
        """Print lines on stdout, with and without `--json`."""
        if self.is_terminal and sys.stdout.isatty():
            # The console prints lines above the progress bars.
            for line in lines:
                self.progress.print(line, markup=False, emoji=False)
            return
        try:
            sys.stdout.writelines(f"{line}\n" for line in lines)
            sys.stdout.flush()
        except BrokenPipeError:
            raise _ClosedPipeError from None

    def note(self, *lines: str) -> None:
        """Print lines on stderr."""
        for line in lines:
            self.progress.print(line, markup=False, emoji=False)

    def confirm(self, question: str) -> bool:
        """Ask at the terminal; Enter means no."""
        return typer.confirm(question, default=False, err=True)


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: `1 job`, `1,000 jobs`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def load(load_settings: Callable[[], Kind], screen: Screen) -> Kind:
    """Load settings, warn about unknown variables, and silence the libraries' log lines.

    Raises:
        SettingsError: a setting is wrong.
    """
    from worker.observability.logs import configure_logging
    from worker.observability.redaction import Redactor

    settings = load_settings()
    screen.note(*settings.unknown_variables)
    configure_logging("error", None, Redactor(settings.secret_values()), stream=sys.stderr)
    # Errors are printed as messages; log lines would repeat them.
    logging.disable()
    return settings


def broker_of(settings: "BrokerSettings") -> "Broker":
    """Return the broker of the settings."""
    import socket

    from worker.rabbitmq.connection import Broker
    from worker.settings import broker_ssl_context

    return Broker(
        url=settings.rabbitmq_url.get_secret_value(),
        ssl_context=broker_ssl_context(settings),
        name=f"vqa-worker@{socket.gethostname()}",
    )


def add(app: typer.Typer, name: str, function: Function, **options: Any) -> None:
    """Register a function as a command; `options` are those of typer's `command`."""
    app.command(name, **options)(_wrapped(function))


def _wrapped(function: Function) -> Function:
    @functools.wraps(function)
    def command(*args: Any, **kwargs: Any) -> None:
        raise typer.Exit(_run(functools.partial(function, *args, **kwargs)))

    return command


def _run(function: Callable[[], Any]) -> int:
    try:
        returned = function()
        code = _on_uvloop(returned) if inspect.iscoroutine(returned) else returned
        sys.stdout.flush()
    except (_ClosedPipeError, BrokenPipeError):
        # Python flushes stdout again at exit and would print an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_CLOSED_PIPE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except typer.Abort:
        return EXIT_INTERRUPTED
    except typer.Exit:
        raise
    except BaseExceptionGroup as group:
        return _report(_first(group))
    except Exception as error:  # noqa: BLE001 - a command never ends in a traceback
        return _report(error)
    return code or EXIT_OK


def _on_uvloop(main: Coroutine[Any, Any, Any]) -> Any:
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the first exception of a task group."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _report(error: BaseException) -> int:
    """Print an error on stderr; return the exit code."""
    lines, code = _describe(error)
    for line in lines:
        print(line, file=sys.stderr)  # noqa: T201
    return code


def _describe(error: BaseException) -> tuple[Sequence[str], int]:
    """Return an error's message and exit code. Each line about a setting starts with the setting's name."""
    if isinstance(error, CommandError):
        first, *others = error.lines
        return [f"Error: {first}", *others], error.code
    from worker.errors import DependencyDownError
    from worker.observability.logs import describe_exception
    from worker.rabbitmq.connection import BrokerRefusedError, BrokerUnreachableError
    from worker.rabbitmq.outgoing import RefusedError
    from worker.rabbitmq.topology import TopologyError
    from worker.s3.aws import S3ConfigurationError
    from worker.settings import SettingsError

    match error:
        case SettingsError() | TopologyError():
            return error.faults, EXIT_CONFIG
        case BrokerRefusedError() | RefusedError() | S3ConfigurationError():
            return [str(error)], EXIT_CONFIG
        case BrokerUnreachableError():
            return [str(error)], EXIT_FAILURE
        case DependencyDownError():
            return [f"Error: {error.message}"], EXIT_FAILURE
        case OSError() if error.filename is not None:
            return [f"Error: {error.filename}: {error.strerror}"], EXIT_FAILURE
        case KeyboardInterrupt():
            return [], EXIT_INTERRUPTED
    return [f"Internal error (please report): {describe_exception(error)}"], EXIT_FAILURE
