"""`vqa-worker results`: list submissions, collect results, delete a submission."""

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from worker.cli import state_dir
from worker.cli.exit_codes import EXIT_OK
from worker.cli.shell import CommandError, Screen, UsageError, broker_of, counted, seconds
from worker.cli.submit.options import ErrorsPath, OutputForm, OutputPath

if TYPE_CHECKING:
    from vqa_worker.rabbitmq.connection import Broker
    from worker.cli.submit.state import SubmissionState


def _known_names() -> list[str]:
    return state_dir.names()


async def results(
    screen: Screen,
    name: Annotated[
        str | None,
        typer.Argument(
            help="Name of a submission, or path of its state file (default: list all submissions).",
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
        typer.Option(metavar="SECONDS", parser=seconds, help="Maximum time to wait for results."),
    ] = None,
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete the submission, its results and its queue.")
    ] = False,
) -> int:
    """Collect the results of a submission, or list all submissions.

        vqa-worker results orders-3f9a1c2b7d -o results.csv
        vqa-worker results orders-3f9a1c2b7d --no-wait --json | jq .answer

    Each submission has its own reply queue. A result is acked after it is stored on the disk, so an
    interrupted command can be run again. Exit code 1 means that a job failed or a result is pending.
    """
    if name is None:
        return _list(screen)
    if no_wait and wait_timeout is not None:
        raise UsageError("--no-wait and --wait-timeout cannot be combined.")
    from worker.cli.outputs import Output
    from worker.cli.submit.collect import Collection
    from worker.settings import load_command_settings

    settings = screen.load(load_command_settings)
    state = state_dir.find(name)
    try:
        broker = broker_of(settings)
        with state.locked("collecting"):
            if delete:
                return await _delete(state, broker, screen)
            _check(state, settings.rabbitmq_address, screen)
            output_to = Output(output, errors, output_form)
            collection = Collection(state, broker, screen, output_to, timeout_s=screen.timeout_s)
            return await collection.run(no_wait=no_wait, wait_timeout_s=wait_timeout)
    finally:
        state.close()


def _list(screen: Screen) -> int:
    for name in (names := state_dir.names()):
        state = state_dir.find(name)
        counts, head = state.counts(), state.head()
        state.close()
        screen.emit(
            {
                "name": name,
                "source": head["source"],
                "queue": head["jobs_queue"],
                "jobs": counts.total,
                "submitted": counts.confirmed,
                "succeeded": counts.succeeded,
                "failed": counts.failed,
                "pending": counts.pending,
            }
        )
        screen.print(
            f"{name}: {counts.confirmed:,} of {counted(counts.total, 'job')} submitted,"
            f" {counts.succeeded:,} succeeded, {counts.failed:,} failed, {counts.pending:,} pending"
        )
    if not names:
        screen.note(f"No submissions in {state_dir.folder()}.")
    return EXIT_OK


def _check(state: "SubmissionState", broker: str, screen: Screen) -> None:
    """Warn about a different broker and about jobs that are not submitted yet.

    Raises:
        CommandError: the results go to a queue that another program reads.
    """
    head, counts = state.head(), state.counts()
    if not head["is_private"]:
        text = f"the results of {head['name']} are sent to the queue {head['reply_to']}. Read them there."
        raise CommandError(text)
    if head["broker"] != broker:
        screen.note(f"Warning: submitted to {head['broker']}, but VQA_RABBITMQ_URL is {broker}.")
    if left := counts.total - counts.confirmed:
        screen.note(
            f"Warning: {left:,} of {counted(counts.total, 'job')} not submitted yet. Run the same"
            " `vqa-worker submit` again to resume."
        )


async def _delete(state: "SubmissionState", broker: "Broker", screen: Screen) -> int:
    from vqa_worker.rabbitmq.replies import delete_queue
    from vqa_worker.rabbitmq.session import Session

    head, pending = state.head(), state.counts().pending
    if head["is_private"]:
        await Session.once(broker, screen.timeout_s, partial(delete_queue, name=head["reply_to"]))
    state.delete()
    screen.emit({"name": head["name"], "pending": pending, "deleted": True})
    screen.print(f"Deleted {head['name']}; {counted(pending, 'result')} had not been collected.")
    return EXIT_OK
