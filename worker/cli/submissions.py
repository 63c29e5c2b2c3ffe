"""`vqa-worker submissions`: list, show, collect, cancel and delete submissions; `vqa-worker cancel`."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.cli import state_dir
from worker.cli.exit_codes import EXIT_FAILURE, EXIT_OK
from worker.cli.shell import CommandError, Screen, UsageError, add, broker_of, count, counted
from worker.cli.submit.options import ErrorsPath, OutputForm, OutputPath, WaitTimeout
from worker.cli.times import parse_duration

if TYPE_CHECKING:
    from worker.cli.submit.state import Counts, SubmissionState
    from worker.settings import CommandSettings

_COLUMNS = "CREATED           JOBS      PENDING   SUCCEEDED FAILED    NAME"


def _known_names() -> list[str]:
    return state_dir.names()


Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="Name of a submission.", show_default=False, autocompletion=_known_names
    ),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Skip confirmation.")]


def register(app: typer.Typer, group: typer.Typer) -> None:
    """Add the commands: `cancel` to the app, the others to the group `submissions`."""
    for name, function in (
        ("list", list_submissions),
        ("show", show),
        ("collect", collect),
        ("cancel", cancel_submission),
        ("delete", delete),
    ):
        add(group, name, function)
    add(app, "cancel", cancel)


def list_submissions(
    screen: Screen,
    limit: Annotated[int, typer.Option(metavar="N", parser=count, help="Show at most N, newest first.")] = 20,
) -> None:
    """List the submissions of this user on this host, newest first.

        vqa-worker submissions list
        vqa-worker submissions list --json | jq 'select(.pending > 0).name'

    Jobs are pending until they have succeeded or failed.
    """
    found = sorted(_all(), key=lambda it: it[0]["created"], reverse=True)
    if not found:
        screen.note(f"No submissions in {state_dir.folder()}.")
        return
    screen.print(_COLUMNS)
    for head, counts in found[:limit]:
        screen.emit(_as_json(head, counts))
        created = datetime.fromisoformat(head["created"]).astimezone()
        figures = (counts.total, counts.pending, counts.succeeded, counts.failed)
        cells = "".join(f"{figure:<10,}" for figure in figures)
        screen.print(f"{created:%Y-%m-%d %H:%M}  {cells}{head['name']}")
    if more := len(found) - limit:
        screen.note(*([f"{more:,} more (--limit)"] if more > 0 else []))


def show(screen: Screen, name: Name) -> None:
    """Show a submission: its input, queues, progress and cost.

        vqa-worker submissions show orders-3f9a1c2b7d

    Reads only the state file; `submissions collect` reads the results from RabbitMQ.
    """
    from worker.cli.progress import results_note
    from worker.cli.submit.state import read_state

    head, counts = read_state(path := state_dir.find(name))
    screen.emit({**_as_json(head, counts), "broker": head["broker"], "state_file": str(path)})
    unsent = f" ({counts.unconfirmed:,} not submitted yet)" if counts.unconfirmed else ""
    screen.print(
        f"name        {head['name']}",
        f"created     {head['created']}",
        f"input       {head['source']}",
        f"jobs queue  {head['jobs_queue']} at {head['broker']}",
        f"reply queue {head['reply_to']}",
        f"state file  {path}",
        f"jobs        {counts.total:,}{unsent}",
        f"results     {counts.succeeded:,} succeeded, {results_note(counts)}; {counts.pending:,} pending",
    )


async def collect(
    screen: Screen,
    name: Name,
    output: OutputPath = None,
    errors: ErrorsPath = None,
    output_form: OutputForm = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Collect available results and exit.")] = False,
    wait_timeout: WaitTimeout = None,
) -> int:
    """Wait for the results of a submission, and print or write them.

        vqa-worker submissions collect orders-3f9a1c2b7d -o results.csv
        vqa-worker submissions collect orders-3f9a1c2b7d --no-wait --json | jq .id

    A result is acked only after it is written to disk; after an interruption, run the command again.
    Exit code 1: a job failed or results are pending.
    """
    if no_wait and wait_timeout is not None:
        raise UsageError("--no-wait and --wait-timeout cannot be combined.")
    from worker.cli.outputs import Output
    from worker.cli.submit.collect import Collection
    from worker.cli.submit.state import SubmissionState

    settings = _settings(screen)
    with state_dir.locked(name), closing(SubmissionState.open(state_dir.find(name))) as state:
        _check(state, settings.rabbitmq_address, screen)
        output_to = Output(output, errors, output_form)
        collection = Collection(state, broker_of(settings), screen, output_to, wait_timeout_s=wait_timeout)
        return await collection.run(no_wait=no_wait)


async def cancel_submission(screen: Screen, name: Name) -> None:
    """Cancel the jobs of a submission that have no result yet.

        vqa-worker submissions cancel orders-3f9a1c2b7d

    Their results are failed with the code cancelled, unless a worker has just answered them.
    """
    await cancel(screen, submission=name)


async def cancel(
    screen: Screen,
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="ID", help="Ids of jobs.", show_default=False)
    ] = None,
    submission: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Cancel all jobs of a submission that have no result.",
            autocompletion=_known_names,
        ),
    ] = None,
) -> None:
    """Cancel jobs, queued or running.

        vqa-worker cancel order-4711-photo order-4712-photo
        vqa-worker cancel --submission orders-3f9a1c2b7d

    All running workers are notified: they abort the jobs and drop them from the queue. Their results are
    failed with the code cancelled; jobs that are answered already keep their results.
    """
    if bool(ids) == (submission is not None):
        raise UsageError("give the ids of jobs, or --submission NAME.")
    from worker.cli.submit.cancel import cancel_pending, publish_cancellations

    settings = _settings(screen)
    if submission is None:
        count = await publish_cancellations(ids or [], settings, screen)
    else:
        count = await cancel_pending(state_dir.find(submission), submission, settings, screen)
    screen.emit({"cancelled": count})
    screen.print(f"Cancelled {counted(count, 'job')}.")


async def delete(
    screen: Screen,
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="Names of submissions.", autocompletion=_known_names),
    ] = None,
    older_than: Annotated[
        str | None,
        typer.Option(metavar="DURATION", help="Delete all that were created longer ago: 12h, 30d."),
    ] = None,
    yes: Yes = False,
) -> int:
    """Delete submissions with their results and reply queues.

        vqa-worker submissions delete orders-3f9a1c2b7d
        vqa-worker submissions delete --older-than 30d --yes

    This cannot be undone. Jobs on the queue stay there; cancel them before.
    """
    chosen = _chosen(names or [], older_than)
    if not chosen:
        screen.note("No matching submissions.")
        return EXIT_OK
    if not (yes or _is_confirmed(screen, chosen)):
        return EXIT_FAILURE
    from worker.cli.submit.collect import delete_replies
    from worker.cli.submit.state import SubmissionState

    broker = broker_of(_settings(screen))
    for head, counts in chosen:
        with state_dir.locked(head["name"]):
            state = SubmissionState.open(state_dir.find(head["name"]))
            await delete_replies(state, broker, screen)
            state.delete()
        screen.emit({"name": head["name"], "pending": counts.pending, "deleted": True})
        screen.print(f"Deleted {head['name']}.")
    return EXIT_OK


def _is_confirmed(screen: Screen, chosen: Sequence[tuple[dict[str, str], "Counts"]]) -> bool:
    """Ask whether to delete these submissions.

    Raises:
        UsageError: there is no terminal to ask at.
    """
    pending = sum(counts.pending for _, counts in chosen)
    what = f"{counted(len(chosen), 'submission')} with {counted(pending, 'pending result')}"
    screen.note(*(head["name"] for head, _ in chosen))
    if not screen.is_interactive:
        raise UsageError(f"{what} would be deleted, but there is no terminal to ask at. Add --yes.")
    return screen.confirm(f"{what} will be deleted. Continue?")


def _settings(screen: Screen) -> "CommandSettings":
    from worker.settings import load_command_settings

    return screen.load(load_command_settings)


def _all() -> Iterator[tuple[dict[str, str], "Counts"]]:
    """Yield the head and progress of each submission that can be read."""
    from worker.cli.submit.state import read_state

    for name in state_dir.names():
        try:
            yield read_state(state_dir.path_of(name))
        except CommandError:
            # Deleted meanwhile, or of another version.
            continue


def _chosen(names: Sequence[str], older_than: str | None) -> list[tuple[dict[str, str], "Counts"]]:
    """Return the submissions to delete.

    Raises:
        UsageError: neither names nor a valid duration are given, or both.
        CommandError: there is no submission of one of the names.
    """
    from worker.cli.submit.state import read_state

    if bool(names) == (older_than is not None):
        raise UsageError("give the names of submissions, or --older-than.")
    if older_than is None:
        return [read_state(state_dir.find(name)) for name in dict.fromkeys(names)]
    try:
        before = datetime.now(UTC) - parse_duration(older_than)
    except (ValueError, OverflowError) as error:
        raise UsageError(f"--older-than: {error}.") from None
    return [it for it in _all() if datetime.fromisoformat(it[0]["created"]) < before]


def _as_json(head: dict[str, str], counts: "Counts") -> dict[str, Any]:
    from worker.cli.submit.collect import summary

    fields = {field: head[field] for field in ("name", "created", "source", "jobs_queue", "reply_to")}
    return {**fields, **summary(counts)}


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
    if counts.unconfirmed:
        screen.note(
            f"Warning: {counts.unconfirmed:,} of {counted(counts.total, 'job')} not submitted yet. Run the"
            " same `vqa-worker submit` again to resume."
        )
