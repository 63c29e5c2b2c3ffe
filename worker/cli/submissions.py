"""`vqa-worker submissions`: list, show, collect, cancel and delete submissions; `vqa-worker cancel`."""

from collections.abc import Iterator, Mapping
from contextlib import closing
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from vqa_worker.rabbitmq.addresses import split_urls
from worker.cli import state_dir
from worker.cli.exit_codes import EXIT_FAILURE, EXIT_OK
from worker.cli.shell import CommandError, Screen, UsageError, Yes, broker_of, counted
from worker.cli.submit.options import Output, WaitTimeout
from worker.cli.times import parse_duration

if TYPE_CHECKING:
    from worker.cli.submit.state import Counts
    from worker.settings import CommandSettings

Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="Name of a submission.",
        show_default=False,
        autocompletion=state_dir.names,
    ),
]


class _Known(NamedTuple):
    """A submission that was read."""

    head: dict[str, str]
    counts: "Counts"

    def as_json(self) -> dict[str, Any]:
        """Return the submission for `--json`."""
        from worker.cli.submit.limits import COST, FAILURES, Limits

        fields = ("name", "created", "source", "broker", "jobs_queue", "reply_to")
        known = {field: self.head[field] for field in fields} | self.counts.as_json()
        limits = {name: self.head.get(name) for name in (FAILURES, COST)}
        return {**known, **limits, "stopped": Limits(self.head, self.counts).reason or None}


def list_(
    screen: Screen,
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="Show at most N, newest first.")] = 20,
) -> None:
    """List the submissions of this user on this host, newest first.

        vqa-worker submissions list
        vqa-worker submissions list --json | jq 'select(.pending > 0).name'

    Jobs are pending until they have succeeded or failed. A stopped submission has reached its
    --stop-after-failures or --max-cost: its pending jobs were not submitted.
    """
    found = sorted(_all(), key=lambda it: it.head["created"], reverse=True)
    if not found:
        screen.note(f"No submissions in {state_dir.folder()}.")
        return
    screen.print("CREATED           JOBS      PENDING   SUCCEEDED FAILED    NAME")
    for it in found[:limit]:
        created, counts = datetime.fromisoformat(it.head["created"]).astimezone(), it.counts
        figures = (counts.total, counts.pending, counts.succeeded, counts.failed)
        cells = "".join(f"{figure:<10,}" for figure in figures)
        fields = it.as_json()
        stopped = " (stopped)" if fields["stopped"] and counts.pending else ""
        screen.emit(fields, f"{created:%Y-%m-%d %H:%M}  {cells}{it.head['name']}{stopped}")
    if more := len(found[limit:]):
        screen.note(f"{more:,} more (--limit)")


def show(screen: Screen, name: Name) -> None:
    """Show a submission: its input, queues, progress and cost.

        vqa-worker submissions show orders-3f9a1c2b7d

    Reads only the state file; `submissions collect` reads the results from RabbitMQ.
    """
    fields = {**_read(name).as_json(), "state_file": str(state_dir.path_of(name))}
    lines = (f"{field.replace('_', ' '):<19} {'-' if it is None else it}" for field, it in fields.items())
    screen.emit(fields, *lines)


async def collect(
    screen: Screen,
    name: Name,
    output: Output,
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
    from worker.cli.submit.collect import Collection
    from worker.cli.submit.state import SubmissionState

    settings = _settings(screen)
    with state_dir.locked(name), closing(SubmissionState.open(state_dir.find(name))) as state:
        _warn(state.head(), state.counts(), settings.rabbitmq_address, screen)
        collection = Collection(state, settings, screen, output, wait_timeout_s=wait_timeout)
        return await collection.run(no_wait=no_wait)


async def cancel_one(screen: Screen, name: Name) -> None:
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
            autocompletion=state_dir.names,
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
    from worker.cli.submit.cancellations import publish_cancellations

    settings = _settings(screen)
    if submission is None:
        count = await publish_cancellations(ids or [], settings, screen.timeout_s)
    else:
        count = await _cancel_pending(submission, settings, screen)
    screen.emit({"cancelled": count}, f"Cancelled {counted(count, 'job')}.")


async def _cancel_pending(name: str, settings: "CommandSettings", screen: Screen) -> int:
    """Cancel all jobs of a submission that have no result; return how many."""
    from vqa_worker.messages.error_codes import ErrorCode
    from worker.cli.submit.cancellations import publish_cancellations
    from worker.cli.submit.plan import failed_result
    from worker.cli.submit.state import SubmissionState

    with closing(SubmissionState.open(state_dir.find(name))) as state:
        settings = settings.model_copy(update={"jobs_queue": state.head()["jobs_queue"]})
        sent, unsent = state.pending(sent=True), state.pending(sent=False)
        code, message = ErrorCode.CANCELLED, "cancelled before it was sent"
        try:
            with state_dir.locked(name):
                state.store([failed_result(it, code, message, retryable=True) for it in unsent])
        except CommandError:
            # Another process sends or collects: the workers cancel the jobs that it sends.
            sent += unsent
            unsent = []
    return len(unsent) + (await publish_cancellations(sent, settings, screen.timeout_s) if sent else 0)


async def delete(
    screen: Screen,
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="Names of submissions.", autocompletion=state_dir.names),
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
    if bool(names) == (older_than is not None):
        raise UsageError("give the names of submissions, or --older-than.")
    chosen = _older(older_than) if older_than else [_read(name) for name in dict.fromkeys(names or [])]
    if not chosen:
        screen.note("No matching submissions.")
        return EXIT_OK
    if not yes:
        screen.note(*(it.head["name"] for it in chosen))
        pending = counted(sum(it.counts.pending for it in chosen), "pending result")
        if not screen.confirm(f"{counted(len(chosen), 'submission')} with {pending}", "deleted"):
            return EXIT_FAILURE
    from worker.cli.submit.collect import delete_replies
    from worker.cli.submit.state import SubmissionState

    broker = broker_of(_settings(screen))
    for it in chosen:
        name = it.head["name"]
        with state_dir.locked(name):
            state = SubmissionState.open(state_dir.find(name))
            await delete_replies(state, broker, screen)
            state.delete()
        screen.emit({"name": name, "pending": it.counts.pending, "deleted": True}, f"Deleted {name}.")
    return EXIT_OK


def _settings(screen: Screen) -> "CommandSettings":
    from worker.settings import load_command_settings

    return screen.load(load_command_settings)


def _read(name: str) -> _Known:
    from worker.cli.submit.state import read_state

    return _Known(*read_state(state_dir.find(name)))


def _all() -> Iterator[_Known]:
    """Yield each submission that can be read."""
    for name in state_dir.names():
        try:
            yield _read(name)
        except CommandError:
            # Deleted meanwhile, or of another version.
            continue


def _older(than: str) -> list[_Known]:
    """Return the submissions that were created longer ago.

    Raises:
        UsageError: `than` is not a duration.
    """
    try:
        before = datetime.now(UTC) - parse_duration(than)
    except (ValueError, OverflowError) as error:
        raise UsageError(f"--older-than: {error}.") from None
    return [it for it in _all() if datetime.fromisoformat(it.head["created"]) < before]


def _warn(head: Mapping[str, str], counts: "Counts", broker: str, screen: Screen) -> None:
    """Warn about a different broker, and about jobs that are not submitted yet unless a limit says why."""
    from worker.cli.submit.limits import Limits

    if not set(split_urls(head["broker"])) & set(split_urls(broker)):
        screen.note(f"Warning: submitted to {head['broker']}, but VQA_RABBITMQ_URL is {broker}.")
    if counts.unconfirmed and not Limits(head, counts).reason:
        screen.note(
            f"Warning: {counts.unconfirmed:,} of {counted(counts.total, 'job')} not submitted yet. Run the"
            " same `vqa-worker submit` again to resume."
        )
