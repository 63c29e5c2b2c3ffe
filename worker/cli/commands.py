"""The typer app with all commands; imported only where the extra `cli` is installed."""

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Annotated

import typer

from worker import __version__
from worker.cli.check import commands as check
from worker.cli.dlq import commands as dlq
from worker.cli.results import results
from worker.cli.shell import Json, add
from worker.cli.submit.commands import submit
from worker.cli.top import commands as top

# Runs `run`, `topology` and `schema`, which also work without typer: takes arguments, returns the exit code.
Basics = Callable[[Sequence[str]], int]


class Document(StrEnum):
    """The documents that `schema` prints."""

    JOB = "job"
    RESULT = "result"
    ASYNCAPI = "asyncapi"


DOCUMENT = typer.Argument(help="The document to print (default: all, in one JSON object).")
TIMEOUT = typer.Option(metavar="SECONDS", help="Connection timeout in seconds (default: 60).")


def shell(arguments: Sequence[str], basics: Basics) -> int:
    """Run a command; return its exit code."""
    app = build(basics)
    try:
        app(list(arguments), prog_name="vqa-worker")
    except SystemExit as exited:
        return exited.code if isinstance(exited.code, int) else 0
    return 0


def build(basics: Basics) -> typer.Typer:
    """Build the app."""
    app = typer.Typer(
        no_args_is_help=True,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_main)
    add(app, "submit", submit)
    add(app, "results", results)
    _add_basics(app, basics)
    for command in (check, dlq, top):
        command.register(app)
    return app


def _print_version(is_given: bool) -> None:
    if is_given:
        typer.echo(f"vqa-worker {__version__}")
        raise typer.Exit


def _main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Answer questions about images from RabbitMQ. VQA_* environment variables configure it."""


def _add_basics(app: typer.Typer, basics: Basics) -> None:
    def run() -> int:
        """Run a worker until it receives SIGTERM or SIGINT."""
        return basics(["run"])

    def show(as_json: Json = False) -> int:
        """Print the queues and exchanges of the settings; does not connect to RabbitMQ."""
        return basics(["topology", "show", *_json_option(as_json)])

    def apply(
        as_json: Json = False,
        timeout: Annotated[str | None, TIMEOUT] = None,
    ) -> int:
        """Create missing queues, exchanges and bindings; existing ones are not changed."""
        options = [] if timeout is None else [f"--timeout={timeout}"]
        return basics(["topology", "apply", *_json_option(as_json), *options])

    add(app, "run", run)
    topology = typer.Typer(no_args_is_help=True, help="Show or create queues and exchanges.")
    add(topology, "show", show)
    add(topology, "apply", apply)
    app.add_typer(topology, name="topology")

    def schema(document: Annotated[Document | None, DOCUMENT] = None, as_json: Json = False) -> int:
        """Print the JSON Schemas of jobs and results, and an AsyncAPI 3 document of the worker.

        - `vqa-worker schema job > job.schema.json`
        - `vqa-worker schema asyncapi > asyncapi.json`

        The AsyncAPI document has the queue names of the settings. Does not connect to RabbitMQ.
        """
        return basics(["schema", *([document.value] if document else []), *_json_option(as_json)])

    add(app, "schema", schema)


def _json_option(as_json: bool) -> list[str]:
    return ["--json"] if as_json else []
