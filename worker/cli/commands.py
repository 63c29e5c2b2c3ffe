"""All commands, put together; loaded only where the extra `cli` is installed."""

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Annotated

import typer

from worker import __version__
from worker.cli.check import commands as check
from worker.cli.dlq import commands as dead
from worker.cli.results import results
from worker.cli.shell import Json, add
from worker.cli.submit.commands import submit
from worker.cli.top import commands as top

# What works without this shell too: takes arguments, returns the exit code.
Basics = Callable[[Sequence[str]], int]


class StoredObject(StrEnum):
    """What `schema` can print."""

    JOB = "job"
    RESULT = "result"
    ASYNCAPI = "asyncapi"


DOCUMENT = typer.Argument(help="Which one; all of them, under their names, if none is given.")
TIMEOUT = typer.Option(metavar="SECONDS", help="Connection timeout in seconds (default: 60).")


def shell(arguments: Sequence[str], basics: Basics) -> int:
    """Do what the arguments say; returns the exit code."""
    app = build(basics)
    try:
        app(list(arguments), prog_name="vqa-worker")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0
    return 0


def build(basics: Basics) -> typer.Typer:
    """The whole app."""
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
    for command in (check, dead, top):
        command.register(app)
    return app


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(f"vqa-worker {__version__}")
        raise typer.Exit


def _main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Answers questions about images, from RabbitMQ to RabbitMQ. Settings come from the environment."""


def _add_basics(app: typer.Typer, basics: Basics) -> None:
    def run() -> int:
        """Work until SIGTERM or SIGINT."""
        return basics(["run"])

    def show(as_json: Json = False) -> int:
        """Print what the settings mean; needs no broker."""
        return basics(["topology", "show", *_given(as_json)])

    def apply(
        as_json: Json = False,
        timeout: Annotated[str | None, TIMEOUT] = None,
    ) -> int:
        """Make on the broker what is not there; changes nothing that is."""
        waits = [] if timeout is None else [f"--timeout={timeout}"]
        return basics(["topology", "apply", *_given(as_json), *waits])

    add(app, "run", run)
    topology = typer.Typer(no_args_is_help=True, help="The queues and exchanges: show or make them.")
    add(topology, "show", show)
    add(topology, "apply", apply)
    app.add_typer(topology, name="topology")

    def schema(document: Annotated[StoredObject | None, DOCUMENT] = None, as_json: Json = False) -> int:
        """Print the JSON Schemas of jobs and results, and an AsyncAPI 3 document of the worker.

        - `vqa-worker schema job > job.schema.json`
        - `vqa-worker schema asyncapi > asyncapi.json` (which is YAML as well)

        The AsyncAPI document names the queues as the settings do; no broker is needed.
        """
        return basics(["schema", *([document.value] if document else []), *_given(as_json)])

    add(app, "schema", schema)


def _given(as_json: bool) -> list[str]:
    return ["--json"] if as_json else []
