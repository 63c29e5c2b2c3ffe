"""The commands of `vqa-worker dlq`, and the options that select dead letters."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, TypeVar

import typer

from worker.cli import state_dir
from worker.cli.dlq import render
from worker.cli.exit_codes import EXIT_FAILURE
from worker.cli.progress import Bar, show_progress
from worker.cli.shell import CommandError, Screen, UsageError, Yes, broker_of, counted
from worker.cli.state_dir import append_lines
from worker.cli.times import parse_time

if TYPE_CHECKING:
    from worker.rabbitmq.bulk import Selection, Step
    from worker.rabbitmq.dead_letter_record import DeadLetter
    from worker.rabbitmq.dead_letters import DeadLetters, FetchedDeadLetter

T = TypeVar("T")

MAX_LISTED: Final = 1000
# Before the confirmation.
MAX_SHOWN: Final = 20
# A shorter prefix could match by accident.
MIN_PREFIX_CHARS: Final = 4
ID_HELP: Final = "Job id, or the NAME printed by `dlq list`."


_filter = partial(typer.Option, rich_help_panel="Filters")
_time = partial(_filter, metavar="TIME", parser=partial(parse_time, from_now=-1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filters:
    """Conditions on dead letters: all that are given must match; of several values of one, any."""

    ids: Annotated[list[str] | None, typer.Argument(metavar="ID", show_default=False, help=ID_HELP)] = None
    codes: Annotated[list[str] | None, _filter("--code", metavar="GLOB", help="Filter by error code.")] = None
    since: Annotated[
        datetime | None,
        _time(help="Dead-lettered at this time or later: 2h (ago), 2030-01-31 or an RFC 3339 time."),
    ] = None
    until: Annotated[datetime | None, _time(help="Dead-lettered before this time.")] = None
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Maximum number of messages.")] = None

    @property
    def matches_all(self) -> bool:
        """Whether no condition is given."""
        return not (self.codes or self.ids or self.since or self.until)

    def __contains__(self, dead_letter: "DeadLetter") -> bool:
        return (
            (not self.codes or any(fnmatchcase(dead_letter.code, glob) for glob in self.codes))
            and (not self.ids or any(matches_id(dead_letter, name) for name in self.ids))
            and self._is_in_range(dead_letter.died_at)
        )

    def _is_in_range(self, died_at: datetime | None) -> bool:
        """Return whether the time matches; an unknown time matches only without `since` and `until`."""
        if died_at is None:
            return self.since is None and self.until is None
        return (self.since is None or died_at >= self.since) and (self.until is None or died_at <= self.until)


def matches_id(dead_letter: "DeadLetter", name: str) -> bool:
    """Return whether `name` is the job's id, or the dead letter's name or a prefix of it."""
    return dead_letter.job_id == name or (len(name) >= MIN_PREFIX_CHARS and dead_letter.name.startswith(name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Confirmation:
    """The options of commands that change the queue."""

    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done; change nothing.")] = (
        False
    )
    yes: Yes = False


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

    Long texts are shortened; with --json, `body` is the complete message body. Messages are held unacked
    while they are read (a few seconds per thousand); other consumers cannot get them meanwhile.
    """
    found = await _Queue(screen).select(
        lambda held: held if any(matches_id(held.record, it) for it in ids) else None, None
    )
    for held in found.picked:
        screen.emit(render.full_json(held), *render.page(held))
    missing = [it for it in ids if not any(matches_id(held.record, it) for held in found.picked)]
    if missing:
        text = f"no such dead letter: {', '.join(missing)} ({found.examined:,} read)"
        raise CommandError(f"{text}. Run `vqa-worker dlq list`.")


async def replay(screen: Screen, filters: Filters, confirmation: Confirmation) -> None:
    """Move dead letters back to the jobs queue.

        vqa-worker dlq replay --dry-run
        vqa-worker dlq replay --code attempts_exhausted --since 2h
        vqa-worker dlq replay order-4711-photo --yes

    Lists the jobs and asks for confirmation first. The attempt count is reset to 0. A message is removed
    from the dead-letter queue only after RabbitMQ has confirmed the job, so an interruption loses nothing; at
    worst one job is on both queues.
    """
    queue = _Queue(screen)
    found = await queue.find(filters)
    now = datetime.now(UTC)
    if late := sum(it.deadline is not None and it.deadline < now for it in found):
        screen.note(f"Warning: {counted(late, 'job')} past the deadline will fail again (deadline_exceeded)")
    queue.confirm(found, "replay", f"moved to {queue.topology.jobs}", confirmation)

    async def step(dead: "DeadLetters", held: "FetchedDeadLetter") -> None:
        await dead.replay(held)

    await queue.process(found, "replay", step, log="replayed.jsonl")


async def purge(
    screen: Screen,
    filters: Filters,
    confirmation: Confirmation,
    everything: Annotated[
        bool, typer.Option("--all", help="Delete all of them.", rich_help_panel="Filters")
    ] = False,
    save: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", dir_okay=False, help="Append the complete messages to this file first (JSONL)."
        ),
    ] = None,
) -> None:
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
    queue.confirm(found, "purge", "deleted", confirmation)

    async def step(_: "DeadLetters", held: "FetchedDeadLetter") -> None:
        if save is not None:
            append_lines(save, render.full_json(held))

    await queue.process(found, "purge", step, log="purged.jsonl")


class _Queue:
    """The dead-letter queue of the settings."""

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
        from worker.rabbitmq.bulk import select

        timeout_s = self._screen.timeout_s
        return await select(self._broker, self.topology, pick, limit=limit, timeout_s=timeout_s)

    async def find(self, filters: Filters) -> Sequence["DeadLetter"]:
        """Return the matching dead letters, oldest first; print how many there are in all."""
        found = await self.select(lambda held: held.record if held.record in filters else None, filters.limit)
        total = f"{self.topology.dead_letters}: {counted(found.total, 'dead letter')}"
        read = f", {found.examined:,} read (--limit)" if found.examined < found.total else ""
        matching = "" if filters.matches_all else f", {len(found.picked):,} matching"
        self._screen.note(f"{total}{read}{matching}")
        return sorted(found.picked, key=lambda it: it.died_at or datetime.min.replace(tzinfo=UTC))

    def confirm(
        self, found: Sequence["DeadLetter"], action: str, done: str, confirmation: Confirmation
    ) -> None:
        """List the dead letters and ask, as the options say.

        Raises:
            Exit: nothing is to be done.
        """
        screen, what = self._screen, counted(len(found), "dead letter")
        if not found:
            screen.note("No matching dead letters.")
            raise typer.Exit
        if confirmation.dry_run or not confirmation.yes:
            screen.print(*render.table(found[:MAX_SHOWN]))
            if more := len(found[MAX_SHOWN:]):
                screen.print(f"… and {more} more")
        if confirmation.dry_run:
            for dead_letter in found:
                screen.emit({"action": action, "done": False, **render.in_json(dead_letter)})
            screen.note(f"{what} would be {done} (dry run)")
            raise typer.Exit
        if not confirmation.yes and not screen.confirm(what, done):
            raise typer.Exit(EXIT_FAILURE)

    async def process(self, found: Sequence["DeadLetter"], action: str, step: "Step", *, log: str) -> None:
        """Run `step` for each dead letter, remove it from the queue, and log it in the state folder."""
        from worker.rabbitmq.bulk import process

        screen, log_file = self._screen, state_dir.folder() / log
        try:
            append_lines(log_file)
            logged = f"; log: {log_file}"
        except CommandError as error:
            # As in a container with a read-only file system.
            screen.note(f"Warning: no log is kept: {error.lines[0]}")
            logged = ""
        wanted, done, total = Counter(dead_letter.name for dead_letter in found), 0, len(found)

        async def process_one(dead: "DeadLetters", held: "FetchedDeadLetter") -> None:
            nonlocal done
            await step(dead, held)
            line = {"action": action, "done": True, **render.in_json(held.record)}
            if logged:
                at = render.in_json(datetime.now(UTC))
                append_lines(log_file, {"at": at, "queue": self.topology.dead_letters, **line})
            screen.emit(line)
            done += 1

        try:
            with show_progress(screen, Bar(action, lambda: (done, total, ""))):
                await process(self._broker, self.topology, wanted, process_one, timeout_s=screen.timeout_s)
        finally:
            screen.note(f"{action}: {done} of {total} done{logged}")
        if left := wanted.total():
            text = "not found: removed or held by another consumer meanwhile. Run the command again."
            raise CommandError(f"{counted(left, 'dead letter')} {text}")
