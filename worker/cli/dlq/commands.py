"""The commands of `vqa-worker dlq`."""

import dataclasses
from collections import Counter
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple, TypeVar

import typer

from worker.cli.dlq import render
from worker.cli.dlq.records import Lines
from worker.cli.dlq.selection import ID_HELP, Filters, matches_id
from worker.cli.exit_codes import EXIT_FAILURE, EXIT_OK
from worker.cli.shell import CommandError, Screen, UsageError, add, broker_of, counted

if TYPE_CHECKING:
    from collections.abc import Callable

    from vqa_worker.rabbitmq.connection import Broker
    from worker.cli.dlq.bulk import Selection, Step
    from worker.rabbitmq.dead_letter_record import DeadLetter
    from worker.rabbitmq.dead_letters import DeadLetters, FetchedDeadLetter
    from worker.rabbitmq.topology import Topology

T = TypeVar("T")

MAX_LISTED: Final = 1000
# Before the confirmation.
MAX_SHOWN: Final = 20
# At a lower rate a dead letter would be held unacknowledged for more than a minute.
MIN_RATE: Final = 0.02


def _rate(value: str | float) -> float:
    try:
        rate = float(value)
    except ValueError:
        rate = 0.0
    if not rate >= MIN_RATE:
        raise typer.BadParameter(f"{value} is not a number of at least {MIN_RATE:g}.")
    return rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Confirmation:
    """How a command that changes the queue asks."""

    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done; change nothing.")] = (
        False
    )
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Skip confirmation.")] = False


class _Action(NamedTuple):
    """A change of the queue.

    Attributes:
        name: of the command.
        done: what it does with the messages, for the confirmation.
        record: the file in the state folder with a line for each message.
    """

    name: str
    done: str
    record: str


def register(dlq: typer.Typer) -> None:
    """Add the commands."""
    add(dlq, "list", list_)
    add(dlq, "show", show)
    add(dlq, "replay", replay)
    add(dlq, "purge", purge)


async def list_(screen: Screen, filters: Filters) -> None:
    """List dead-lettered jobs (read-only).

        vqa-worker dlq list
        vqa-worker dlq list --code attempts_exhausted --since 2h
        vqa-worker dlq list --json | jq -r .job_id

    Messages are held unacked while they are read (a few seconds per thousand); other consumers cannot get
    them meanwhile. Without --limit, at most 1,000 are listed.
    """
    queue = _Queue(screen)
    found = await queue.find(dataclasses.replace(filters, limit=filters.limit or MAX_LISTED))
    for dead_letter in found:
        screen.emit(render.in_json(dead_letter))
    if found:
        screen.print(*render.table(found))


async def show(screen: Screen, ids: Annotated[list[str], typer.Argument(metavar="ID", help=ID_HELP)]) -> None:
    """Show dead-lettered jobs with headers and body (read-only).

        vqa-worker dlq show order-4711-photo
        vqa-worker dlq show 3f9a12c04b --json | jq -r .body > job.json

    Long data URLs are shortened; with --json, `body` is the complete message body. Messages are held unacked
    while they are read (a few seconds per thousand); other consumers cannot get them meanwhile.
    """

    def pick(held: "FetchedDeadLetter") -> tuple["DeadLetter", dict[str, Any], list[str]] | None:
        if not any(matches_id(held.record, name) for name in ids):
            return None
        # A body may be large: only what is printed is kept.
        full = render.full_json(held) if screen.as_json else {}
        return held.record, full, [] if screen.as_json else list(render.page(held))

    found = await _Queue(screen).select(pick, None)
    for number, (_, full, page) in enumerate(found.picked):
        screen.emit(full)
        screen.print(*([""] if number else []), *page)
    missing = [it for it in ids if not any(matches_id(record, it) for record, *_ in found.picked)]
    if missing:
        text = f"no such dead letter: {', '.join(missing)} ({found.examined:,} read)"
        raise CommandError(f"{text}. Run `vqa-worker dlq list`.")


async def replay(
    screen: Screen,
    filters: Filters,
    confirmation: Confirmation,
    rate: Annotated[
        float | None, typer.Option(metavar="N", parser=_rate, help="Maximum number of jobs per second.")
    ] = None,
) -> int:
    """Move dead letters back to the jobs queue.

        vqa-worker dlq replay --dry-run
        vqa-worker dlq replay --code attempts_exhausted --since 2h --rate 5
        vqa-worker dlq replay order-4711-photo --yes

    Lists the jobs and asks for confirmation first. The attempt count is reset to 0. A message is removed
    from the dead-letter queue only after RabbitMQ has confirmed the job, so an interruption loses nothing; at
    worst one job is on both queues.
    """
    queue = _Queue(screen)
    found = await queue.find(filters)
    screen.note(*_warnings(found))
    action = _Action("replay", f"moved to {queue.topology.jobs}", "replayed.jsonl")
    if (declined := _declined(screen, found, action, confirmation)) is not None:
        return declined

    async def step(dead: "DeadLetters", held: "FetchedDeadLetter") -> None:
        await dead.replay(held)

    return await queue.process(found, action, step, rate=rate)


async def purge(
    screen: Screen,
    filters: Filters,
    confirmation: Confirmation,
    everything: Annotated[
        bool, typer.Option("--all", help="Delete all of them.", rich_help_panel="Filters")
    ] = False,
    save: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Append the complete messages to this file first (JSONL)."),
    ] = None,
) -> int:
    """Delete dead letters. This cannot be undone; use --save to keep a copy.

        vqa-worker dlq purge --code invalid_job --dry-run
        vqa-worker dlq purge --until 30d --save dead-letters.jsonl
        vqa-worker dlq purge order-4711-photo order-4712-photo
        vqa-worker dlq purge --all --yes

    Lists the messages and asks for confirmation first.
    """
    if filters.matches_all and not everything:
        raise UsageError(
            "no filter. Give one, such as an ID, --code invalid_job or --until 30d, or use --all."
        )
    queue = _Queue(screen)
    found = await queue.find(filters)
    action = _Action("purge", "deleted", "purged.jsonl")
    if (declined := _declined(screen, found, action, confirmation)) is not None:
        return declined
    with ExitStack() as files:
        # Synced, because the message is then deleted.
        saved = files.enter_context(Lines(save, fsync=True)) if save else None

        async def step(_: "DeadLetters", held: "FetchedDeadLetter") -> None:
            if saved is not None:
                saved.add(render.full_json(held))

        return await queue.process(found, action, step)


class _Queue:
    """The dead-letter queue of the settings."""

    topology: "Topology"
    _broker: "Broker"

    def __init__(self, screen: Screen) -> None:
        from worker.rabbitmq.properties import install_tolerant_decoders
        from worker.rabbitmq.topology import Topology
        from worker.settings import load_broker_settings

        settings = screen.load(load_broker_settings)
        install_tolerant_decoders()
        self._screen = screen
        self._broker = broker_of(settings)
        self.topology = Topology.from_settings(settings)

    async def select(
        self, pick: "Callable[[FetchedDeadLetter], T | None]", limit: int | None
    ) -> "Selection[T]":
        """Read dead letters, see `bulk.select`."""
        from worker.cli.dlq.bulk import select

        work = select(self._broker, self.topology, pick, limit=limit, timeout_s=self._screen.timeout_s)
        return await _translated(work)

    async def find(self, filters: Filters) -> Sequence["DeadLetter"]:
        """Return the matching dead letters, oldest first; print how many there are in all."""

        def pick(held: "FetchedDeadLetter") -> "DeadLetter | None":
            return held.record if held.record in filters else None

        found = await self.select(pick, filters.limit)
        total = f"{self.topology.dead_letters}: {counted(found.total, 'dead letter')}"
        read = f"{found.examined:,} read (--limit)" if found.examined < found.total else ""
        matching = "" if filters.matches_all else f"{len(found.picked):,} matching"
        self._screen.note(", ".join(filter(None, (total, read, matching))))
        return sorted(found.picked, key=lambda it: it.died_at or datetime.min.replace(tzinfo=UTC))

    async def process(
        self, found: Sequence["DeadLetter"], action: _Action, step: "Step", *, rate: float | None = None
    ) -> int:
        """Run `step` for each dead letter, remove it from the queue, and record it."""
        from worker.cli.dlq.bulk import process
        from worker.cli.progress import Bar, show_progress

        screen = self._screen
        wanted = Counter(dead_letter.name for dead_letter in found)
        planned, done, total = Counter(wanted), Counter[str](), len(found)

        def processed() -> int:
            # After a lost connection one dead letter can be processed twice.
            return (done & planned).total()

        with ExitStack() as files:
            record = _record(screen, action.record, files)

            async def process_one(dead: "DeadLetters", held: "FetchedDeadLetter") -> None:
                await step(dead, held)
                line = {"action": action.name, "done": True, **render.in_json(held.record)}
                if record is not None:
                    at = render.plain(datetime.now(UTC))
                    record.add({"at": at, "queue": self.topology.dead_letters, **line})
                screen.emit(line)
                done[held.record.name] += 1

            work = process(
                self._broker, self.topology, wanted, process_one, rate=rate, timeout_s=screen.timeout_s
            )
            try:
                async with show_progress(screen, [Bar(action.name, lambda: (processed(), total, ""))]):
                    await _translated(work)
            finally:
                log = f"; log: {record.path}" if record is not None else ""
                screen.note(f"{action.name}: {processed()} of {total} done{log}")
        if left := wanted.total():
            text = "not found: removed or held by another consumer meanwhile. Run the command again."
            raise CommandError(f"{counted(left, 'dead letter')} {text}")
        return EXIT_OK


def _record(screen: Screen, name: str, files: ExitStack) -> Lines | None:
    """Open a file in the state folder; warn if it is not writable, as in a read-only container."""
    from worker.cli.state_dir import folder

    try:
        return files.enter_context(Lines(folder() / name))
    except CommandError as error:
        screen.note(f"Warning: no log is kept: {error.lines[0]}")
        return None


def _warnings(found: Sequence["DeadLetter"]) -> Iterator[str]:
    """Yield a warning for each kind of job that will fail again."""
    now = datetime.now(UTC)
    if late := sum(it.deadline is not None and it.deadline < now for it in found):
        yield f"Warning: {counted(late, 'job')} past the deadline will fail again (deadline_exceeded)"
    if wrong := sum(it.code == "invalid_job" for it in found):
        text = "will fail again unless the worker was upgraded (invalid_job)"
        yield f"Warning: {counted(wrong, 'invalid job')} {text}"


def _declined(
    screen: Screen, found: Sequence["DeadLetter"], action: _Action, confirmation: Confirmation
) -> int | None:
    """List the dead letters and ask, as the options say; return the exit code if nothing is to be done."""
    if not found:
        screen.note("No matching dead letters.")
        return EXIT_OK
    if confirmation.dry_run or not confirmation.yes:
        for dead_letter in found if confirmation.dry_run else ():
            screen.emit({"action": action.name, "done": False, **render.in_json(dead_letter)})
        screen.print(*render.table(found[:MAX_SHOWN]))
        if len(found) > MAX_SHOWN:
            screen.print(f"… and {len(found) - MAX_SHOWN} more")
    count = f"{len(found)} ({render.summary(found)})"
    if confirmation.dry_run:
        screen.note(f"{count} would be {action.done} (dry run)")
        return EXIT_OK
    if confirmation.yes:
        return None
    if not screen.is_interactive:
        raise UsageError(f"{count} would be {action.done}, but there is no terminal to ask at. Add --yes.")
    return None if screen.confirm(f"{count} will be {action.done}. Continue?") else EXIT_FAILURE


async def _translated(work: Awaitable[T]) -> T:
    from worker.rabbitmq.dead_letters import DeadLettersError

    try:
        return await work
    except DeadLettersError as error:
        raise CommandError(str(error)) from None
