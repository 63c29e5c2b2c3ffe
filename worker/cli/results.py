"""`vqa-worker results`: the command line."""

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from worker.cli import state_dir
from worker.cli.shell import (
    DEFAULT_PATIENCE_S,
    EXIT_OK,
    CommandError,
    Json,
    Patience,
    Screen,
    UsageError,
    broker_of,
    counted,
    read,
)
from worker.cli.submit.commands import ErrorsPath, OutputForm, OutputPath

if TYPE_CHECKING:
    from worker.cli.submit.manifest import Manifest
    from worker.rabbitmq.connection import Broker


def _known_names() -> list[str]:
    return state_dir.names()


async def results(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Name of a submission, or path of its manifest; without it all are listed.",
            autocompletion=_known_names,
            show_default=False,
        ),
    ] = None,
    output: OutputPath = None,
    errors: ErrorsPath = None,
    output_form: OutputForm = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Collect available results and exit.")] = False,
    wait_timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=0.1, help="Maximum time to wait for results, in seconds."),
    ] = None,
    delete: Annotated[
        bool,
        typer.Option("--delete", help="Delete the submission, its results and their queue."),
    ] = False,
    as_json: Json = False,
    timeout: Patience = DEFAULT_PATIENCE_S,
) -> int:
    """Gather the results of a submission.

        vqa-worker results orders-3f9a1c2b7d -o results.csv

        vqa-worker results orders-3f9a1c2b7d --no-wait --json | jq .answer

    They come from a queue of the submission's own, so that nobody else's results are touched, and are kept in
    its manifest before the broker may forget them: broken off, the same command goes on. Exit code 1 says
    that a job failed, or that results are missing.
    """
    screen = Screen(as_json=as_json)
    if name is None:
        return _list(screen)
    if no_wait and wait_timeout is not None:
        raise UsageError("--no-wait and --wait-timeout cannot be combined")
    from worker.cli.outputs import Output
    from worker.cli.submit.collect import Harvest
    from worker.settings import load_command_settings

    settings = read(load_command_settings, screen)
    manifest = state_dir.find(name)
    try:
        broker = broker_of(settings)
        with manifest.locked("gathering"):
            if delete:
                return await _delete(manifest, broker, screen, timeout)
            _check(manifest, settings.rabbitmq_address, screen)
            harvest = Harvest(
                manifest, broker, screen, Output(output, errors, output_form), patience_s=timeout
            )
            return await harvest.bring_in(only_now=no_wait, within_s=wait_timeout)
    finally:
        manifest.close()


def _list(screen: Screen) -> int:
    """Say which submissions there are."""
    for name in (names := state_dir.names()):
        manifest = state_dir.find(name)
        counts, head = manifest.counts(), manifest.head()
        manifest.close()
        screen.emit(
            {
                "name": name,
                "source": head["source"],
                "queue": head["jobs_queue"],
                "jobs": counts.total,
                "submitted": counts.confirmed,
                "succeeded": counts.succeeded,
                "failed": counts.failed,
                "missing": counts.missing,
            }
        )
        screen.say(
            f"{name}: {counts.confirmed:,} of {counted(counts.total, 'job')} submitted,"
            f" {counts.succeeded:,} answered, {counts.failed:,} failed, {counts.missing:,} missing"
        )
    if not names:
        screen.note(f"no submissions in {state_dir.folder()}")
    return EXIT_OK


def _check(manifest: "Manifest", broker: str, screen: Screen) -> None:
    head, counts = manifest.head(), manifest.counts()
    if not head["is_private"]:
        text = f"its results go to {head['reply_to']}, which others read: there is nothing to gather here"
        raise CommandError(text)
    if head["broker"] != broker:
        screen.note(f"it was submitted to {head['broker']}, and VQA_RABBITMQ_URL names {broker}")
    if left := counts.total - counts.confirmed:
        screen.note(
            f"not submitted yet: {left:,} of {counted(counts.total, 'job')}; submit them again to go on"
        )


async def _delete(manifest: "Manifest", broker: "Broker", screen: Screen, patience_s: float) -> int:
    from worker.rabbitmq.replies import delete_queue
    from worker.rabbitmq.session import Session

    head, missing = manifest.head(), manifest.counts().missing
    if head["is_private"]:
        await Session.once(broker, patience_s, partial(delete_queue, name=head["reply_to"]))
    manifest.delete()
    screen.emit({"name": head["name"], "missing": missing, "forgotten": True})
    screen.say(f"{head['name']} is forgotten; {missing:,} of its results had not come")
    return EXIT_OK
