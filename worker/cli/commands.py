"""The typer app with all commands."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Final, Literal

import typer

from worker import __version__
from worker.cli import config, submissions, topology
from worker.cli.check.commands import check
from worker.cli.dlq import commands as dlq
from worker.cli.help import Command, Group
from worker.cli.shell import PROGRAM, Screen, execute, with_common_options
from worker.cli.submit.commands import submit
from worker.cli.top.commands import top

# Runs a worker with the settings of an env file; returns the exit code.
Run = Callable[[Path], int]

COMPLETION_VARIABLE: Final = "_VQA_WORKER_COMPLETE"


def shell(arguments: Sequence[str], run: Run) -> int:
    """Run a command; return its exit code."""
    app = build(run)
    if COMPLETION_VARIABLE in os.environ:
        # typer registers the shells with the options that the commands here do not have.
        typer.main.get_command(typer.Typer(callback=lambda: None))
        app([], prog_name=PROGRAM, complete_var=COMPLETION_VARIABLE)
    return execute(app, arguments)


def build(run: Run) -> typer.Typer:
    """Build the app."""
    app = _group(
        _main.__doc__ or "",
        submit=submit,
        cancel=submissions.cancel,
        run=_run_command(run),
        schema=schema,
        check=check,
        top=top,
        completion=completion,
    )
    app.callback()(with_common_options(_main))
    groups = {
        "submissions": _group(
            "Manage submissions: list, show, collect, cancel, delete.",
            list=submissions.list_,
            show=submissions.show,
            collect=submissions.collect,
            cancel=submissions.cancel_one,
            delete=submissions.delete,
        ),
        "topology": _group("Show or create queues and exchanges.", show=topology.show, apply=topology.apply),
        "config": _group("Show the effective settings.", show=config.show),
        "dlq": _group(
            "Manage the dead-letter queue: list, show, replay, purge.",
            list=dlq.list_,
            show=dlq.show,
            replay=dlq.replay,
            purge=dlq.purge,
        ),
    }
    for name, group in groups.items():
        app.add_typer(group, name=name)
    return app


def _group(text: str, **commands: Callable[..., object]) -> typer.Typer:
    group = typer.Typer(
        cls=Group,
        help=text,
        add_completion=False,
        # Help as plain text; see `worker.cli.help`.
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for name, function in commands.items():
        group.command(name, cls=Command)(with_common_options(function))
    return group


def schema(
    screen: Screen,
    document: Annotated[
        Literal["job", "result", "asyncapi"] | None,
        typer.Argument(metavar="DOCUMENT", help="job, result or asyncapi (default: all)."),
    ] = None,
) -> None:
    """Print the JSON Schemas of the messages, or AsyncAPI.

        vqa-worker schema job > job.schema.json
        vqa-worker schema asyncapi > asyncapi.json

    The AsyncAPI 3 document has the queue names of the settings. Does not connect to RabbitMQ. With --json,
    the document is on one line.
    """
    from worker.rabbitmq.schemas import asyncapi, job_schema, result_schema
    from worker.settings import load_broker_settings

    settings = screen.load(load_broker_settings)
    found = {"job": job_schema(), "result": result_schema(), "asyncapi": asyncapi(settings)}
    chosen = found[document] if document else found
    screen.emit(chosen, json.dumps(chosen, ensure_ascii=False, indent=2))


def completion(
    screen: Screen,
    shell: Annotated[
        Literal["bash", "zsh", "fish"], typer.Argument(metavar="SHELL", help="bash, zsh or fish.")
    ],
) -> None:
    """Print the completion script of a shell.

        eval "$(vqa-worker completion bash)"    # in ~/.bashrc
        eval "$(vqa-worker completion zsh)"     # in ~/.zshrc
        vqa-worker completion fish > ~/.config/fish/completions/vqa-worker.fish

    Completes commands, options, and names of submissions.
    """
    # typer has no public name for it.
    from typer._completion_shared import get_completion_script

    screen.write(get_completion_script(prog_name=PROGRAM, complete_var=COMPLETION_VARIABLE, shell=shell))


def _print_version(is_given: bool) -> None:
    if is_given:
        typer.echo(f"{PROGRAM} {__version__}")
        raise typer.Exit


def _main(
    screen: Screen,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Answer questions about images: jobs and results are RabbitMQ messages.

        vqa-worker check
        vqa-worker submit photo.jpg "What is this?" --bucket photos --wait
        vqa-worker dlq list --since 2h

    VQA_* environment variables configure all commands, see `config show`.
    """


def _run_command(run: Run) -> Callable[[Screen], int]:
    def command(screen: Screen) -> int:
        """Run a worker until it receives SIGTERM or SIGINT.

            vqa-worker run
            vqa-worker run --env-file worker.env --verbose

        --json, --verbose and --quiet set VQA_LOG_FORMAT and VQA_LOG_LEVEL. The worker waits for RabbitMQ
        without a timeout.
        """
        options = screen.options
        if options.as_json:
            os.environ["VQA_LOG_FORMAT"] = "json"
        if options.verbose or options.quiet:
            os.environ["VQA_LOG_LEVEL"] = "debug" if options.verbose else "warning"
        return run(options.env_file or Path(".env"))

    return command
