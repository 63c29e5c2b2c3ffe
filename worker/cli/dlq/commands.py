"""The commands of `vqa-worker dlq`."""

from collections import Counter
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple, TypeVar

import typer

from worker.cli.dlq import render
from worker.cli.dlq.records import Lines
from worker.cli.dlq.selection import Filter, matches_id, parse_time
from worker.cli.exit_codes import EXIT_OK
from worker.cli.shell import CommandError, Screen, UsageError, add, broker_of, counted

if TYPE_CHECKING:
    from vqa_worker.rabbitmq.connection import Broker
    from worker.cli.dlq.bulk import Step
    from worker.rabbitmq.dead_letter_record import DeadLetter
    from worker.rabbitmq.dead_letters import DeadLetters, FetchedDeadLetter
    from worker.rabbitmq.topology import Topology

T = TypeVar("T")

MAX_LISTED: Final = 1000
MAX_SHOWN: Final = 20
# At a lower rate a dead letter would be held unacknowledged for more than a minute.
MIN_RATE: Final = 0.02

_FILTERS = "Filters"
Codes = Annotated[
    list[str] | None,
    typer.Option("--code", metavar="GLOB", help="Filter by error code.", rich_help_panel=_FILTERS),
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        metavar="GLOB",
        help="Filter by model; `default`: the job names none, `unknown`: the job is unreadable.",
        rich_help_panel=_FILTERS,
    ),
]
Ids = Annotated[
    list[str] | None,
    typer.Option(
        "--id",
        metavar="ID",
        help="Filter by job id, or by name of the dead letter.",
        rich_help_panel=_FILTERS,
    ),
]
Since = Annotated[
    datetime | None,
    typer.Option(
        "--since",
        metavar="TIME",
        parser=parse_time,
        help="Dead-lettered at this time or later: `2h` (ago), `2030-01-31` or an RFC 3339 time.",
        rich_help_panel=_FILTERS,
    ),
]
Until = Annotated[
    datetime | None,
    typer.Option(
        "--until",
        metavar="TIME",
        parser=parse_time,
        help="Dead-lettered before this time.",
        rich_help_panel=_FILTERS,
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Maximum number of messages to read.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done; change nothing.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Skip confirmation.")]
Record = Annotated[
    Path | None,
    typer.Option(
        dir_okay=False,
        help="Append one line per dead letter to this file (default: in ~/.local/state/vqa-worker).",
    ),
]


class _Context(NamedTuple):
    """The common dependencies of the commands."""

    screen: Screen
    broker: "Broker"
    topology: "Topology"
    timeout_s: float


def register(dlq: typer.Typer) -> None:
    """Add the commands."""
    add(dlq, "list", list_)
    add(dlq, "show", show)
    add(dlq, "replay", replay)
    add(dlq, "purge", purge)


async def list_(
    screen: Screen,
    code: Codes = None,
    model: Models = None,
    ids: Ids = None,
    since: Since = None,
    until: Until = None,
    limit: Limit = MAX_LISTED,
) -> None:
    """List dead-lettered jobs (read-only).

        vqa-worker dlq list
        vqa-worker dlq list --code attempts_exhausted --since 2h
        vqa-worker dlq list --json | jq -r .job_id

    While it reads, a few seconds per thousand messages, other consumers cannot fetch them.
    """
    context = _context(screen)
    filters = _filter(code, model, ids, since, until)
    dead_letters = await _select(context, filters, limit)
    for dead_letter in dead_letters:
        context.screen.emit(render.in_json(dead_letter))
    if dead_letters:
        context.screen.print(*render.table(dead_letters))


async def show(
    screen: Screen,
    name: Annotated[str, typer.Argument(metavar="ID", help="Job id, or name of the dead letter.")],
    limit: Limit = None,
) -> None:
    """Show one dead-lettered job with its headers and body (read-only).

        vqa-worker dlq show order-4711-photo
        vqa-worker dlq show 3f9a12c04b --json | jq -r .body > job.json

    Long data URLs are shortened; with `--json`, `body` is the complete message body.
    """
    context = _context(screen)

    def pick(held: "FetchedDeadLetter") -> dict[str, Any] | list[str] | None:
        if not matches_id(held.record, name):
            return None
        return render.full_json(held) if screen.as_json else list(render.page(held))

    from worker.cli.dlq.bulk import select

    found = await _translated(
        select(context.broker, context.topology, pick, limit=limit, timeout_s=context.timeout_s)
    )
    if not found.picked:
        raise CommandError(
            f"no such dead letter: {name} ({found.examined:,} read). Run `vqa-worker dlq list`."
        )
    for number, dead_letter in enumerate(found.picked):
        if isinstance(dead_letter, dict):
            context.screen.emit(dead_letter)
        else:
            context.screen.print(*([""] if number else []), *dead_letter)


async def replay(
    screen: Screen,
    code: Codes = None,
    model: Models = None,
    ids: Ids = None,
    since: Since = None,
    until: Until = None,
    rate: Annotated[
        float | None, typer.Option(min=MIN_RATE, metavar="N", help="Maximum number of jobs per second.")
    ] = None,
    record: Record = None,
    limit: Limit = None,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> int | None:
    """Move dead letters back to the jobs queue.

        vqa-worker dlq replay --dry-run
        vqa-worker dlq replay --code attempts_exhausted --since 2h --rate 5
        vqa-worker dlq replay --id order-4711-photo --yes

    Lists the jobs and asks for confirmation first. Attempts start again at 0. A message is removed from the
    dead-letter queue only after RabbitMQ has confirmed the job, so an interruption loses nothing; at worst
    one job is on both queues.
    """
    context = _context(screen)
    dead_letters = await _select(context, _filter(code, model, ids, since, until), limit)
    context.screen.note(*_warnings(dead_letters))
    done = f"moved to {context.topology.jobs}"
    if not _is_confirmed(context.screen, dead_letters, "replay", done, dry_run=dry_run, yes=yes):
        return None

    async def step(dead: "DeadLetters", held: "FetchedDeadLetter") -> None:
        await dead.replay(held)

    with Lines(record or _default_record("replayed")) as lines:
        return await _process(context, dead_letters, "replay", step, lines, rate=rate)


async def purge(
    screen: Screen,
    code: Codes = None,
    model: Models = None,
    ids: Ids = None,
    since: Since = None,
    until: Until = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Delete all of them.", rich_help_panel=_FILTERS)
    ] = False,
    save: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Write the complete messages to this file first (JSONL)."),
    ] = None,
    record: Record = None,
    limit: Limit = None,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> int | None:
    """Delete dead letters. This cannot be undone; use --save to keep a copy.

        vqa-worker dlq purge --code invalid_job --dry-run
        vqa-worker dlq purge --until 30d --save dead-letters.jsonl
        vqa-worker dlq purge --all --yes

    Lists the messages and asks for confirmation first.
    """
    filters = _filter(code, model, ids, since, until)
    if filters.matches_all and not everything:
        raise UsageError("no filter. Give one, such as --code invalid_job or --until 30d, or use --all.")
    context = _context(screen)
    dead_letters = await _select(context, filters, limit)
    if not _is_confirmed(context.screen, dead_letters, "purge", "deleted", dry_run=dry_run, yes=yes):
        return None
    with ExitStack() as files:
        lines = files.enter_context(Lines(record or _default_record("purged")))
        saved = files.enter_context(Lines(save, fsync=True)) if save else None

        async def step(_: "DeadLetters", held: "FetchedDeadLetter") -> None:
            if saved is not None:
                saved.add(render.full_json(held))

        return await _process(context, dead_letters, "purge", step, lines)


def _context(screen: Screen) -> _Context:
    from worker.settings import load_broker_settings

    settings = screen.load(load_broker_settings)
    from worker.rabbitmq.properties import install_tolerant_decoders
    from worker.rabbitmq.topology import Topology

    install_tolerant_decoders()
    return _Context(screen, broker_of(settings), Topology.from_settings(settings), screen.timeout_s)


def _default_record(name: str) -> Path:
    from worker.cli.state_dir import folder

    return folder() / f"{name}.jsonl"


def _filter(
    code: list[str] | None,
    model: list[str] | None,
    ids: list[str] | None,
    since: datetime | None,
    until: datetime | None,
) -> Filter:
    return Filter(codes=code or (), models=model or (), ids=ids or (), since=since, until=until)


async def _select(context: _Context, filters: Filter, limit: int | None) -> Sequence["DeadLetter"]:
    """Return the matching dead letters, oldest first; print how many there are in all."""
    from worker.cli.dlq.bulk import select

    def pick(held: "FetchedDeadLetter") -> "DeadLetter | None":
        return held.record if held.record in filters else None

    found = await _translated(
        select(context.broker, context.topology, pick, limit=limit, timeout_s=context.timeout_s)
    )
    total = f"{context.topology.dead_letters}: {counted(found.total, 'dead letter')}"
    read = f"{found.examined:,} read (--limit)" if found.examined < found.total else ""
    matching = "" if filters.matches_all else f"{len(found.picked):,} matching"
    context.screen.note(", ".join(filter(None, (total, read, matching))))
    return sorted(
        found.picked, key=lambda dead_letter: dead_letter.died_at or datetime.min.replace(tzinfo=UTC)
    )


def _warnings(dead_letters: Sequence["DeadLetter"]) -> Iterator[str]:
    """Yield a warning for each kind of job that will fail again."""
    now = datetime.now(UTC)
    if late := sum(
        dead_letter.deadline is not None and dead_letter.deadline < now for dead_letter in dead_letters
    ):
        yield f"{counted(late, 'job')} past the deadline will fail again (deadline_exceeded)"
    if wrong := sum(dead_letter.code == "invalid_job" for dead_letter in dead_letters):
        yield f"{counted(wrong, 'invalid job')} will fail again unless the worker was upgraded (invalid_job)"


def _is_confirmed(
    screen: Screen, dead_letters: Sequence["DeadLetter"], action: str, done: str, *, dry_run: bool, yes: bool
) -> bool:
    """List the dead letters and ask for confirmation, as the options say."""
    if not dead_letters:
        screen.note("No matching dead letters.")
        return False
    if dry_run or not yes:
        for dead_letter in dead_letters if dry_run else ():
            screen.emit({"action": action, "done": False, **render.in_json(dead_letter)})
        screen.print(*render.table(dead_letters[:MAX_SHOWN]))
        if len(dead_letters) > MAX_SHOWN:
            screen.print(f"… and {len(dead_letters) - MAX_SHOWN} more")
    count = f"{len(dead_letters)} ({render.summary(dead_letters)})"
    if dry_run:
        screen.note(f"{count} would be {done} (dry run)")
        return False
    if yes:
        return True
    if not screen.is_interactive:
        raise UsageError(f"{count} would be {done}, but there is no terminal to ask at. Add --yes.")
    return screen.confirm(f"{count} will be {done}. Continue?")


async def _process(
    context: _Context,
    dead_letters: Sequence["DeadLetter"],
    action: str,
    step: "Step",
    lines: Lines,
    *,
    rate: float | None = None,
) -> int:
    from worker.cli.dlq.bulk import process
    from worker.cli.progress import Bar, show_progress

    wanted = Counter(dead_letter.name for dead_letter in dead_letters)
    planned, done, total = Counter(wanted), Counter[str](), len(dead_letters)

    def processed() -> int:
        # After a lost connection one dead letter can be processed twice.
        return (done & planned).total()

    async def process_one(dead: "DeadLetters", held: "FetchedDeadLetter") -> None:
        await step(dead, held)
        line = {"action": action, "done": True, **render.in_json(held.record)}
        lines.add({"at": render.plain(datetime.now(UTC)), "queue": context.topology.dead_letters, **line})
        context.screen.emit(line)
        done[held.record.name] += 1

    work = process(
        context.broker, context.topology, wanted, process_one, rate=rate, timeout_s=context.timeout_s
    )
    try:
        async with show_progress(context.screen, [Bar(action, lambda: (processed(), total, ""))]):
            await _translated(work)
    finally:
        context.screen.note(f"{action}: {processed()} of {total} done; log: {lines.path}")
    if left := wanted.total():
        text = "not found: removed or held by another consumer meanwhile. Run the command again."
        raise CommandError(f"{counted(left, 'dead letter')} {text}")
    return EXIT_OK


async def _translated(work: Awaitable[T]) -> T:
    from worker.rabbitmq.dead_letters import DeadLettersError

    try:
        return await work
    except DeadLettersError as error:
        raise CommandError(str(error)) from None
