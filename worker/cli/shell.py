"""The shell around every command but `run`: what they share, so that they look and end alike.

A command is a plain function, sync or async, in a module of its own beside this one. It takes typer's
parameters, works by a `Screen`, and returns its exit code (None: 0):

    async def peek(
        queue: Annotated[str, typer.Argument(help="…")], as_json: Json = False, timeout: Patience = 15.0
    ) -> int | None:
        '''First line: what the list of commands says.

        The rest, in Markdown, with examples, is what `--help` says.
        '''
        screen = Screen(as_json=as_json)
        settings = read(load_broker_settings, screen)      # only the settings that it uses
        broker = broker_of(settings)
        found = await Session.once(broker, timeout, lambda connection: …)
        screen.emit({"queue": queue, "found": found})       # with --json: one object a line, on stdout
        screen.say(f"{queue}: {found}")                     # without: for a person, on stdout
        screen.note("…")                                    # beside either, on stderr
        raise CommandError("what was wrong and what to do")

`commands.py` registers it by `add(app, "peek", peek)`. That wraps it: an async one gets its event loop, and
what it raises becomes lines for a person on stderr and an exit code, never a traceback:

    0 done · 1 something failed or is out of reach · 2 wrong usage · 78 wrong settings, or the broker or S3
    refuses them · 130 Ctrl-C · 141 nobody reads stdout any more (`| head`)

Modules of commands import what is heavy (aio-pika, the SDKs) within the functions that need it: `--help` and
the shell's completion load every one of them.
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
# sysexits.h: something is wrong with the configuration.
EXIT_CONFIG: Final = 78
# What a shell says of a process that SIGINT and SIGPIPE have ended.
EXIT_INTERRUPTED: Final = 130
EXIT_CLOSED_PIPE: Final = 141

Kind = TypeVar("Kind", bound="BrokerSettings")
Function = Callable[..., Any]

Json = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
Patience = Annotated[
    float,
    typer.Option(
        "--timeout",
        metavar="SECONDS",
        min=0.1,
        help="Connection timeout in seconds.",
    ),
]
DEFAULT_PATIENCE_S: Final = 15.0


class CommandError(Exception):
    """The command cannot go on.

    Attributes:
        lines: what was wrong and what to do, for a person.
        code: the exit code.
    """

    def __init__(self, *lines: str, code: int = EXIT_FAILURE) -> None:
        super().__init__(*lines)
        self.lines = lines
        self.code = code


class UsageError(CommandError):
    """The command was called in a way that makes no sense."""

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines, code=EXIT_USAGE)


class _NobodyReadsError(Exception):
    """Stdout was closed by its reader."""


class Screen:
    """Where a command writes: for a person, or as JSON for a program.

    Attributes:
        as_json: whether stdout is for a program.
        progress: the console on stderr that progress is shown on; it is only drawn on a terminal.
    """

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self.progress = Console(stderr=True, soft_wrap=True, highlight=False)

    @property
    def is_watched(self) -> bool:
        """Whether a person sees stderr as it comes."""
        return self.progress.is_terminal

    @property
    def may_ask(self) -> bool:
        """Whether there is a person to ask."""
        return self.is_watched and sys.stdin.isatty()

    def emit(self, value: Mapping[str, Any]) -> None:
        """With `--json`: one object, on a line of its own."""
        if self.as_json:
            self.write(json.dumps(value, ensure_ascii=False))

    def say(self, *lines: str) -> None:
        """Without `--json`: lines for a person."""
        if not self.as_json:
            self.write(*lines)

    def write(self, *lines: str) -> None:
        """Lines on stdout, whoever reads it."""
        if self.is_watched and sys.stdout.isatty():
            # The same terminal: a bar that is drawn there makes room.
            for line in lines:
                self.progress.print(line, markup=False, emoji=False)
            return
        try:
            sys.stdout.writelines(f"{line}\n" for line in lines)
            sys.stdout.flush()
        except BrokenPipeError:
            raise _NobodyReadsError from None

    def note(self, *lines: str) -> None:
        """Lines beside the output, on stderr."""
        for line in lines:
            self.progress.print(line, markup=False, emoji=False)

    def confirm(self, question: str) -> bool:
        """Ask the person at the terminal; no is the answer that Enter gives."""
        return typer.confirm(question, default=False, err=True)


def counted(number: int, noun: str) -> str:
    """`1 job`, `1,000 jobs`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def read(load: Callable[[], Kind], screen: Screen) -> Kind:
    """The settings that `load` reads; says what looks like a setting and is none.

    What libraries log from here on is not shown: what goes wrong is told in lines of its own.

    Raises:
        SettingsError: some are wrong.
    """
    from worker.observability.logs import configure_logging
    from worker.observability.redaction import Redactor

    settings = load()
    screen.note(*settings.unknown_variables)
    configure_logging("error", None, Redactor(settings.secret_values()), stream=sys.stderr)
    logging.disable()
    return settings


def broker_of(settings: "BrokerSettings") -> "Broker":
    """The broker that the settings name."""
    import socket

    from worker.rabbitmq.connection import Broker
    from worker.settings import broker_ssl_context

    return Broker(
        url=settings.rabbitmq_url.get_secret_value(),
        ssl_context=broker_ssl_context(settings),
        name=f"vqa-worker@{socket.gethostname()}",
    )


def add(app: typer.Typer, name: str, function: Function, **options: Any) -> None:
    """Make a function a command of the app; `options` as typer's `command` takes them."""
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
    except (_NobodyReadsError, BrokenPipeError):
        # Python flushes stdout once more in the end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_CLOSED_PIPE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except typer.Abort:
        return EXIT_INTERRUPTED
    except typer.Exit:
        raise
    except BaseExceptionGroup as group:
        return _ended(_first(group))
    except Exception as error:  # noqa: BLE001 - none of them may end in a traceback
        return _ended(error)
    return code or EXIT_OK


def _on_uvloop(main: Coroutine[Any, Any, Any]) -> Any:
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What brought a group of tasks down."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _ended(error: BaseException) -> int:
    lines, code = _told(error)
    for line in lines:
        print(line, file=sys.stderr)  # noqa: T201
    return code


def _told(error: BaseException) -> tuple[Sequence[str], int]:
    """What to say of an error, and the exit code."""
    if isinstance(error, CommandError):
        return error.lines, error.code
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
            return [error.message], EXIT_FAILURE
        case OSError() if error.filename is not None:
            return [f"{error.filename}: {error.strerror}"], EXIT_FAILURE
        case KeyboardInterrupt():
            return [], EXIT_INTERRUPTED
    return [f"vqa-worker has a bug, please report it: {describe_exception(error)}"], EXIT_FAILURE
