"""The commands themselves."""

from collections import Counter
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple, TypeVar

import typer

from worker.cli.dlq import render
from worker.cli.dlq.records import Lines
from worker.cli.dlq.selection import Choice, is_called, moment
from worker.cli.shell import (
    DEFAULT_PATIENCE_S,
    EXIT_OK,
    CommandError,
    Json,
    Patience,
    Screen,
    UsageError,
    add,
    broker_of,
    counted,
    read,
)

if TYPE_CHECKING:
    from worker.cli.dlq.bulk import Step
    from worker.rabbitmq.connection import Broker
    from worker.rabbitmq.dead_letter_record import DeadLetter
    from worker.rabbitmq.dead_letters import DeadLetters, FetchedDeadLetter
    from worker.rabbitmq.topology import Topology

T = TypeVar("T")

MAX_LISTED: Final = 1000
MAX_SHOWN: Final = 20
# Slower than this, a letter that waits for its turn would be held for too long.
SLOWEST: Final = 0.02

_CHOICE = "Which letters"
Codes = Annotated[
    list[str] | None,
    typer.Option("--code", metavar="GLOB", help="Those that died of this error.", rich_help_panel=_CHOICE),
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        metavar="GLOB",
        help="Those for this model; `default`: they name none, `unknown`: unreadable.",
        rich_help_panel=_CHOICE,
    ),
]
Ids = Annotated[
    list[str] | None,
    typer.Option("--id", metavar="ID", help="A job's id or a letter's name.", rich_help_panel=_CHOICE),
]
Since = Annotated[
    datetime | None,
    typer.Option(
        "--since",
        metavar="TIME",
        parser=moment,
        help="Those that died then or later: `2h` (ago), `2030-01-31` or an RFC 3339 time.",
        rich_help_panel=_CHOICE,
    ),
]
Until = Annotated[
    datetime | None,
    typer.Option(
        "--until", metavar="TIME", parser=moment, help="Those that died before.", rich_help_panel=_CHOICE
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Maximum number of messages to read.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only show what would be done.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Record = Annotated[
    Path | None,
    typer.Option(
        dir_okay=False,
        help="Add a line for each letter to this file; where submissions are remembered, if none is given.",
    ),
]


class _Desk(NamedTuple):
    """What every one of the commands works with."""

    screen: Screen
    broker: "Broker"
    topology: "Topology"
    patience_s: float


def register(app: typer.Typer) -> None:
    """Add `dlq` and its commands."""
    dlq = typer.Typer(no_args_is_help=True, help="Manage the dead-letter queue: list, show, replay, purge.")
    add(dlq, "list", list_)
    add(dlq, "show", show)
    add(dlq, "replay", replay)
    add(dlq, "purge", purge)
    app.add_typer(dlq, name="dlq")


async def list_(
    code: Codes = None,
    model: Models = None,
    ids: Ids = None,
    since: Since = None,
    until: Until = None,
    limit: Limit = MAX_LISTED,
    as_json: Json = False,
    patience: Patience = DEFAULT_PATIENCE_S,
) -> None:
    """List the dead letters. All of them stay where they are.

    - `vqa-worker dlq list`
    - `vqa-worker dlq list --code attempts_exhausted --since 2h`
    - `vqa-worker dlq list --json | jq -r .job_id`

    During the look, a few seconds for a thousand letters, nobody else can fetch them.
    """
    desk = _desk(Screen(as_json=as_json), patience)
    choice = _choice(code, model, ids, since, until)
    letters = await _chosen(desk, choice, limit)
    for letter in letters:
        desk.screen.emit(render.in_json(letter))
    if letters:
        desk.screen.say(*render.table(letters))


async def show(
    name: Annotated[str, typer.Argument(metavar="ID", help="A job's id or a letter's name.")],
    limit: Limit = None,
    as_json: Json = False,
    patience: Patience = DEFAULT_PATIENCE_S,
) -> None:
    """Show a dead letter with its job, question and all. It stays where it is.

    - `vqa-worker dlq show order-4711-photo`
    - `vqa-worker dlq show 3f9a12c04b --json | jq -r .body > job.json`

    For a person, images in the job are told by their length; with `--json`, `body` is the job as it came.
    """
    desk = _desk(Screen(as_json=as_json), patience)

    def pick(held: "FetchedDeadLetter") -> dict[str, Any] | list[str] | None:
        if not is_called(held.record, name):
            return None
        return render.whole(held) if as_json else list(render.page(held))

    from worker.cli.dlq.bulk import select

    found = await _told(select(desk.broker, desk.topology, pick, limit=limit, timeout_s=desk.patience_s))
    if not found.picked:
        raise CommandError(f"{name}: none of the {found.examined} letters looked at has this id or name")
    for number, letter in enumerate(found.picked):
        if isinstance(letter, dict):
            desk.screen.emit(letter)
        else:
            desk.screen.say(*([""] if number else []), *letter)


async def replay(
    code: Codes = None,
    model: Models = None,
    ids: Ids = None,
    since: Since = None,
    until: Until = None,
    rate: Annotated[
        float | None, typer.Option(min=SLOWEST, metavar="N", help="At most so many letters a second.")
    ] = None,
    record: Record = None,
    limit: Limit = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: Json = False,
    patience: Patience = DEFAULT_PATIENCE_S,
) -> int | None:
    """Put dead letters back on the jobs queue, as the jobs that they were.

    - `vqa-worker dlq replay --dry-run`
    - `vqa-worker dlq replay --code attempts_exhausted --since 2h --rate 5`
    - `vqa-worker dlq replay --id order-4711-photo --yes`

    Shows first what would be done, and asks. Attempts are counted anew. A letter leaves the dead-letter queue
    after the broker has confirmed the job: whatever happens in between, it is on one of the two, at worst on
    both.
    """
    desk = _desk(Screen(as_json=as_json), patience)
    letters = await _chosen(desk, _choice(code, model, ids, since, until), limit)
    desk.screen.note(*_doubts(letters))
    target = f"put back on {desk.topology.jobs}"
    if not _is_wanted(desk.screen, letters, "replay", target, dry_run=dry_run, yes=yes):
        return None

    async def step(dead: "DeadLetters", held: "FetchedDeadLetter") -> None:
        await dead.replay(held)

    with Lines(record or _kept("replayed")) as lines:
        return await _work_off(desk, letters, "replay", step, lines, rate=rate)


async def purge(
    code: Codes = None,
    model: Models = None,
    ids: Ids = None,
    since: Since = None,
    until: Until = None,
    everything: Annotated[
        bool, typer.Option("--all", help="All that there are.", rich_help_panel=_CHOICE)
    ] = False,
    save: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Keep the letters in this file first, jobs and all (JSON)."),
    ] = None,
    record: Record = None,
    limit: Limit = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: Json = False,
    patience: Patience = DEFAULT_PATIENCE_S,
) -> int | None:
    """Throw dead letters away. They are gone then, unless they were saved.

    - `vqa-worker dlq purge --code invalid_job --dry-run`
    - `vqa-worker dlq purge --until 30d --save letters.jsonl`
    - `vqa-worker dlq purge --all --yes`
    """
    choice = _choice(code, model, ids, since, until)
    if choice.is_any and not everything:
        raise UsageError("say which letters, e.g. --code invalid_job or --until 30d; or --all")
    desk = _desk(Screen(as_json=as_json), patience)
    letters = await _chosen(desk, choice, limit)
    if not _is_wanted(desk.screen, letters, "purge", "thrown away", dry_run=dry_run, yes=yes):
        return None
    with ExitStack() as files:
        lines = files.enter_context(Lines(record or _kept("purged")))
        saved = files.enter_context(Lines(save, keeps=True)) if save else None

        async def step(_: "DeadLetters", held: "FetchedDeadLetter") -> None:
            if saved is not None:
                saved.add(render.whole(held))

        return await _work_off(desk, letters, "purge", step, lines)


def _desk(screen: Screen, patience_s: float) -> _Desk:
    from worker.settings import load_broker_settings

    settings = read(load_broker_settings, screen)
    from worker.rabbitmq.properties import install_tolerant_decoders
    from worker.rabbitmq.topology import Topology

    install_tolerant_decoders()
    return _Desk(screen, broker_of(settings), Topology.from_settings(settings), patience_s)


def _kept(name: str) -> Path:
    from worker.cli.state_dir import folder

    return folder() / f"{name}.jsonl"


def _choice(
    code: list[str] | None,
    model: list[str] | None,
    ids: list[str] | None,
    since: datetime | None,
    until: datetime | None,
) -> Choice:
    return Choice(codes=code or (), models=model or (), ids=ids or (), since=since, until=until)


async def _chosen(desk: _Desk, choice: Choice, limit: int | None) -> Sequence["DeadLetter"]:
    """The letters that are meant, the oldest first; says how many others there are."""
    from worker.cli.dlq.bulk import select

    def pick(held: "FetchedDeadLetter") -> "DeadLetter | None":
        return held.record if held.record in choice else None

    found = await _told(select(desk.broker, desk.topology, pick, limit=limit, timeout_s=desk.patience_s))
    chosen = f"{len(found.picked)} of them chosen" if not choice.is_any else ""
    part = f"{found.examined} of them looked at (--limit)" if found.examined < found.total else ""
    there = f"{desk.topology.dead_letters}: {counted(found.total, 'letter')}"
    desk.screen.note(", ".join(filter(None, (there, part, chosen))))
    return sorted(found.picked, key=lambda letter: letter.died_at or datetime.min.replace(tzinfo=UTC))


def _doubts(letters: Sequence["DeadLetter"]) -> Iterator[str]:
    """What will fail again."""
    now = datetime.now(UTC)
    if late := sum(letter.deadline is not None and letter.deadline < now for letter in letters):
        yield f"{late} with a deadline that has passed: the worker will refuse them (deadline_exceeded)"
    if wrong := sum(letter.code == "invalid_job" for letter in letters):
        yield f"{wrong} that are no jobs (invalid_job): they will be back, unless the worker has changed"


def _is_wanted(
    screen: Screen, letters: Sequence["DeadLetter"], action: str, done: str, *, dry_run: bool, yes: bool
) -> bool:
    """Show what would be done, and ask if need be."""
    if not letters:
        screen.note("nothing to do")
        return False
    if dry_run or not yes:
        for letter in letters if dry_run else ():
            screen.emit({"action": action, "done": False, **render.in_json(letter)})
        screen.say(*render.table(letters[:MAX_SHOWN]))
        if len(letters) > MAX_SHOWN:
            screen.say(f"… and {len(letters) - MAX_SHOWN} more")
    count = f"{len(letters)} ({render.summary(letters)})"
    if dry_run:
        screen.note(f"{count} would be {done}; nothing was done (--dry-run)")
        return False
    if yes:
        return True
    if not screen.may_ask:
        raise UsageError(f"{count} would be {done}; nothing was done: add --yes to do it")
    return screen.confirm(f"{count} will be {done}. Go on?")


async def _work_off(
    desk: _Desk,
    letters: Sequence["DeadLetter"],
    action: str,
    step: "Step",
    lines: Lines,
    *,
    rate: float | None = None,
) -> int:
    from worker.cli.dlq.bulk import process
    from worker.cli.progress import Bar
    from worker.cli.progress import shown as progress

    wanted = Counter(letter.name for letter in letters)
    planned, done, total = Counter(wanted), Counter[str](), len(letters)

    def so_far() -> int:
        # After a lost connection one may be done twice.
        return (done & planned).total()

    async def recorded(dead: "DeadLetters", held: "FetchedDeadLetter") -> None:
        await step(dead, held)
        line = {"action": action, "done": True, **render.in_json(held.record)}
        lines.add({"at": render.plain(datetime.now(UTC)), "queue": desk.topology.dead_letters, **line})
        desk.screen.emit(line)
        done[held.record.name] += 1

    work = process(desk.broker, desk.topology, wanted, recorded, rate=rate, timeout_s=desk.patience_s)
    try:
        async with progress(desk.screen, [Bar(action, lambda: (so_far(), total, ""))]):
            await _told(work)
    finally:
        desk.screen.note(f"{action}: {so_far()} of {total} done, recorded in {lines.path}")
    if left := wanted.total():
        raise CommandError(f"{left} were not there any more: somebody else took them, or holds them")
    return EXIT_OK


async def _told(work: Awaitable[T]) -> T:
    from worker.rabbitmq.dead_letters import DeadLettersError

    try:
        return await work
    except DeadLettersError as error:
        raise CommandError(str(error)) from None
