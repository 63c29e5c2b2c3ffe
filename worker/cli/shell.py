"""Common options, output, settings, errors and exit codes of all commands.

A command is a plain function, sync or async, that gets a `Screen` and parameters of typer, and returns its
exit code (None: 0). Options that several commands share are a dataclass, which is one parameter. The list of
commands shows the first line of its docstring; indented paragraphs, such as examples, stay as they are.

Commands import slow modules (aio-pika, the SDKs) inside functions: `--help` and shell completion import
every command.
"""

import dataclasses
import inspect
import io
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer
import typer.main
from rich.console import Console
from rich.text import Text

from worker.cli.exit_codes import (
    EXIT_CLOSED_PIPE,
    EXIT_CONFIG,
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_USAGE,
)
from worker.cli.help import COMMON
from worker.event_loop import run_coroutine

if TYPE_CHECKING:
    from vqa_worker.rabbitmq.connection import Broker
    from worker.settings import BrokerSettings

Kind = TypeVar("Kind", bound="BrokerSettings")
Function = Callable[..., Any]

PROGRAM: Final = "vqa-worker"


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


def seconds(value: str | float) -> float:
    """Parse a number of seconds; a `parser` for options.

    Raises:
        ValueError: it is not a number above 0.
    """
    with suppress(ValueError):
        if 0 < (number := float(value)) < math.inf:
            return number
    raise ValueError(f"{value} is not a number of seconds above 0")


Yes = Annotated[bool, typer.Option("--yes", "-y", help="Skip confirmation.")]


_common = partial(typer.Option, rich_help_panel=COMMON)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """The options of all commands."""

    url: Annotated[str | None, _common(metavar="URL", help="RabbitMQ URL, instead of VQA_RABBITMQ_URL.")] = (
        None
    )
    env_file: Annotated[
        Path | None,
        _common(metavar="FILE", exists=True, dir_okay=False, help="File with settings (default: .env)."),
    ] = None
    timeout: Annotated[
        float,
        _common(metavar="SECONDS", parser=seconds, help="Connection timeout in seconds."),
    ] = 15
    as_json: Annotated[bool, _common("--json", help="Print JSON, one object per line; errors too.")] = False
    verbose: Annotated[bool, _common("--verbose", "-v", help="Log the libraries' messages.")] = False
    quiet: Annotated[
        bool, _common("--quiet", "-q", help="Print only results and errors, no notes or progress.")
    ] = False
    no_color: Annotated[bool, _common("--no-color", help="Print without colors (also: NO_COLOR).")] = False


class Screen:
    """The output and the settings of a command.

    Attributes:
        as_json: whether stdout gets JSON.
        timeout_s: the connection timeout in seconds.
        progress: the console on stderr for progress bars; draw them only if `shows_progress`.
        is_terminal: whether stderr is a terminal.
        is_interactive: whether stdin is one too, so that the command can ask for confirmation.
    """

    def __init__(self, options: CommonOptions) -> None:
        self.options = options
        self.as_json = options.as_json
        self.timeout_s = options.timeout
        self.progress = Console(stderr=True, highlight=False)
        self.is_terminal = self.progress.is_terminal
        self.is_interactive = self.is_terminal and sys.stdin.isatty()
        self.shows_progress = self.is_terminal and not options.quiet

    def load(self, load_settings: Callable[..., Kind], *, is_quiet: bool = False) -> Kind:
        """Load settings, warn about unknown variables (unless `is_quiet`), and silence the libraries' log.

        Raises:
            SettingsError: a setting is wrong.
        """
        from worker.observability.logs import configure_logging
        from worker.observability.redaction import Redactor

        settings = load_settings(env_file=self.options.env_file or Path(".env"))
        if not is_quiet:
            self.note(*(f"Warning: {text}" for text in settings.unknown_variables))
        redact = Redactor(settings.secret_values())
        level = "debug" if self.options.verbose else "error"
        configure_logging(level, "json" if self.as_json else "console", redact, stream=sys.stderr)
        if not self.options.verbose:
            # Errors are printed as messages; log lines would repeat them.
            logging.disable()
        return settings

    def emit(self, value: Mapping[str, Any], *lines: str) -> None:
        """Print one object on one line with `--json`, otherwise lines of text."""
        self.write(*([json.dumps(value, ensure_ascii=False)] if self.as_json else lines))

    def print(self, *lines: str) -> None:
        """Print lines of text, unless `--json` is given."""
        if not self.as_json:
            self.write(*lines)

    def write(self, *lines: str) -> None:
        """Print lines on stdout, with and without `--json`."""
        if self.is_terminal and sys.stdout.isatty():
            # The console prints lines above the progress bars.
            for line in lines:
                self.progress.print(line, markup=False, emoji=False, soft_wrap=self.as_json)
            return
        try:
            sys.stdout.writelines(f"{line}\n" for line in lines)
            sys.stdout.flush()
        except BrokenPipeError:
            raise _ClosedPipeError from None

    def note(self, *lines: str) -> None:
        """Without `--quiet`, print lines on stderr; on a terminal they wrap between words."""
        for line in () if self.options.quiet else lines:
            self.progress.print(line, markup=False, emoji=False, soft_wrap=not self.is_terminal)

    def confirm(self, what: str, done: str) -> bool:
        """Ask at the terminal whether something is to be `done`, such as `deleted`.

        Raises:
            UsageError: there is no terminal to ask at.
        """
        if not self.is_interactive:
            raise UsageError(f"{what} would be {done}, but there is no terminal to ask at. Add --yes.")
        return self.ask(f"{what} will be {done}. Continue?")

    def ask(self, question: str) -> bool:
        """Ask at the terminal; Enter means no."""
        return typer.confirm(question, default=False, err=True)


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: `1 job`, `1,000 jobs`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def dollars(usd: float) -> str:
    """Format USD; amounts below a cent get six decimal places."""
    return f"${usd:,.2f}" if usd >= 0.01 or not usd else f"${usd:.6f}"  # noqa: PLR2004 - a cent


def broker_of(settings: "BrokerSettings") -> "Broker":
    """Return the broker of the settings."""
    import socket

    from vqa_worker.rabbitmq.connection import Broker
    from worker.settings import broker_ssl_context

    return Broker(
        url=settings.rabbitmq_url.get_secret_value(),
        ssl_context=broker_ssl_context(settings),
        name=f"vqa-worker@{socket.gethostname()}",
    )


def with_common_options(function: Function) -> Function:
    """Return `function` as a command: with options in place of its `Screen` and of its dataclasses."""
    own = list(inspect.signature(function, eval_str=True).parameters.values())
    kinds = {it.name: CommonOptions if it.annotation is Screen else it.annotation for it in own}
    fields = {
        name: inspect.signature(kind, eval_str=True).parameters
        for name, kind in kinds.items()
        if dataclasses.is_dataclass(kind)
    }
    parameters = [inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    for it in own:
        parameters += fields[it.name].values() if it.name in fields else [it.replace(kind=it.KEYWORD_ONLY)]

    def command(context: typer.Context, **given: Any) -> Any:
        for name, of in fields.items():
            given[name] = kinds[name](**{field: given.pop(field) for field in of})
        # Options before the command's name apply too.
        context.obj = options = _merged(context.obj, given.pop("screen"))
        if options.url is not None:
            os.environ["VQA_RABBITMQ_URL"] = options.url
        if options.no_color:
            os.environ["NO_COLOR"] = "1"
        returned = function(Screen(options), **given)
        return run_coroutine(returned) if inspect.iscoroutine(returned) else returned

    command.__doc__ = function.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined] # functions may have one
    command.__annotations__ = {it.name: it.annotation for it in parameters}
    return command


def _merged(before: Any, after: CommonOptions) -> CommonOptions:
    if not isinstance(before, CommonOptions):
        return after
    changed = {
        it.name: value for it in dataclasses.fields(after) if (value := getattr(after, it.name)) != it.default
    }
    return dataclasses.replace(before, **changed)


def execute(app: typer.Typer, arguments: Sequence[str]) -> int:
    """Run a command; return its exit code. Exceptions become messages on stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Answers may contain characters that the terminal's encoding does not have.
        sys.stdout.reconfigure(errors="replace")
    try:
        command = typer.main.get_command(app)
        with command.make_context(PROGRAM, list(arguments)) as context:
            code = command.invoke(context)
        sys.stdout.flush()
    except BaseException as error:  # noqa: BLE001 - a command never ends in a traceback
        return _end(error, as_json="--json" in arguments)
    return code or EXIT_OK


def _end(error: BaseException, *, as_json: bool) -> int:
    """Report an error on stderr, the first one of a task group; return the exit code."""
    match error:
        case BaseExceptionGroup():
            return _end(error.exceptions[0], as_json=as_json)
        case typer.Exit():
            return error.exit_code
        case SystemExit():
            return int(error.code or EXIT_OK)
        case KeyboardInterrupt() | typer.Abort():
            return EXIT_INTERRUPTED
        case _ClosedPipeError() | BrokenPipeError():
            # Python flushes stdout again at exit and would print an error.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_CLOSED_PIPE
    errors, details, code = _describe(error)
    if as_json:
        text = "\n".join((*errors, *details))
        print(json.dumps({"error": text, "exit_code": code}, ensure_ascii=False), file=sys.stderr)  # noqa: T201
        return code
    console = Console(stderr=True, highlight=False)
    for line in (*(Text.assemble(("Error:", "bold red"), f" {it}") for it in errors), *map(Text, details)):
        console.print(line, soft_wrap=not console.is_terminal)
    return code


def _describe(error: BaseException) -> tuple[Sequence[str], Sequence[str], int]:
    """Return the messages of an error, further lines and the exit code.

    A message about a setting starts with the setting's name.
    """
    from vqa_worker.rabbitmq.connection import BrokerRefusedError, BrokerUnreachableError, TopologyError
    from vqa_worker.rabbitmq.outgoing import RefusedError
    from worker.errors import DependencyDownError
    from worker.observability.logs import describe_exception
    from worker.rabbitmq.dead_letters import DeadLettersError
    from worker.s3.aws import S3ConfigurationError
    from worker.settings import SettingsError

    match error:
        case CommandError():
            first, *details = error.lines
            return [first], details, error.code
        case typer.TyperException():
            path = getattr(getattr(error, "ctx", None), "command_path", PROGRAM)
            # Without the words of pydantic, which checks the values of options.
            message = (
                error.format_message().replace("Value error, ", "").replace("Input should be", "must be")
            )
            message = message.partition(", unable to parse")[0]
            return [f"{message.rstrip('.')}."], [f"Run `{path} --help` for help."], EXIT_USAGE
        case SettingsError() | TopologyError():
            return error.faults, [], EXIT_CONFIG
        case BrokerRefusedError() | RefusedError() | S3ConfigurationError():
            return [str(error)], [], EXIT_CONFIG
        case BrokerUnreachableError():
            return [f"{error}. Check that RabbitMQ is running and reachable."], [], EXIT_FAILURE
        case DependencyDownError() | DeadLettersError():
            return [getattr(error, "message", str(error))], [], EXIT_FAILURE
        case OSError() if error.filename is not None:
            return [f"{error.filename}: {error.strerror}"], [], EXIT_FAILURE
    return [f"internal error, please report it: {describe_exception(error)}"], [], EXIT_FAILURE
