"""Submit jobs: plan, confirm, upload, send, and collect the results."""

import asyncio
import hashlib
import json
import uuid
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from vqa_worker.rabbitmq.replies import PRIVATE_PREFIX, QueueMissingError, ReplyQueue, prepare
from vqa_worker.rabbitmq.session import Session
from worker.cli import state_dir
from worker.cli.exit_codes import EXIT_FAILURE, EXIT_OK
from worker.cli.outputs import Output
from worker.cli.progress import Bar, show_progress
from worker.cli.shell import Screen, UsageError, broker_of, counted
from worker.cli.submit.collect import Collection, Collector
from worker.cli.submit.estimate import Assumptions, Estimate, dollars
from worker.cli.submit.inputs import Source
from worker.cli.submit.plan import Additions, Planner
from worker.cli.submit.sender import JobSender, jobs_queue_missing
from worker.cli.submit.state import SubmissionState
from worker.rabbitmq.topology import Topology
from worker.settings import CommandSettings, Price

# A submission larger than this asks for confirmation.
CONFIRM_ABOVE_JOBS: Final = 1000
CONFIRM_ABOVE_USD: Final = 10.0
SECONDS_PER_DAY: Final = 86_400


@dataclass(frozen=True, kw_only=True)
class Submission:
    """The jobs to submit, and how.

    Attributes:
        additions: fields that all jobs get.
        price: USD per million tokens of every model; None: the prices of the settings.
        name: None: derived from the source.
        state_file: None: in the state folder.
        exchange: the exchange to publish to; empty: the default exchange.
        reply_to: a queue that another program reads; None: a new queue for this submission.
        keep_days: days without a reader after which the new queue expires.
        max_queue: the depth of the jobs queue at which sending waits; 0: any.
        skips_invalid: turn invalid lines into failed results.
        asks: ask for confirmation of large submissions.
        waits: collect the results at once.
        timeout_s: the connection timeout in seconds.
    """

    source: Source
    additions: Additions
    assumptions: Assumptions
    price: Price | None = None
    name: str | None = None
    state_file: Path | None = None
    exchange: str = ""
    reply_to: str | None = None
    keep_days: int = 7
    max_queue: int = 0
    skips_invalid: bool = False
    asks: bool = True
    waits: bool = False
    output: Output = field(default_factory=Output)
    timeout_s: float = 15.0

    @property
    def is_temporary(self) -> bool:
        """Whether it is a question asked by hand, which nobody will resume."""
        return self.source.is_ad_hoc and self.name is None and self.state_file is None

    def digest(self, settings: CommandSettings) -> str:
        """Identify the submission: the same jobs for another broker or queue are another submission."""
        if self.is_temporary:
            return uuid.uuid4().hex
        parts = [
            self.source.digest(),
            self.additions.digest(),
            settings.rabbitmq_address,
            settings.jobs_queue,
            self.reply_to,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


async def estimate(submission: Submission, settings: CommandSettings, screen: Screen) -> int:
    """`--dry-run`: validate the jobs and print the estimated cost; return the exit code."""
    planned = await _plan(submission, settings, SubmissionState.temporary(), "dry-run")
    screen.emit(planned.as_json())
    screen.print(*planned.lines(), "Nothing submitted (dry run).")
    return EXIT_OK


async def submit_jobs(submission: Submission, settings: CommandSettings, screen: Screen) -> int:
    """Submit the jobs, and with `waits` collect the results; return the exit code."""
    digest = submission.digest(settings)
    name = submission.name or f"{state_dir.to_name(submission.source.title)}-{digest[:10]}"
    path = submission.state_file or state_dir.path_of(name)
    if path.is_file():
        state = SubmissionState.open(path)
    else:
        state = SubmissionState.create(path, _head(submission, settings, name, digest))
    with ExitStack() as stack:
        stack.callback(state.close)
        stack.enter_context(state.locked("submitting"))
        head = state.head()
        if head.get("digest") != digest:
            text = f"{path} belongs to another submission ({head.get('source')}). Choose another --name."
            raise UsageError(text)
        if not await _is_confirmed(submission, settings, state, screen):
            return EXIT_FAILURE
        run = _Run(submission, settings, state, screen)
        try:
            return await run.run()
        except asyncio.CancelledError:
            screen.note(f"Interrupted. {_resume_hint(submission, run.name)}")
            raise


def _resume_hint(submission: Submission, name: str) -> str:
    if submission.is_temporary:
        return f"Collect the results with: vqa-worker results {name}"
    return f"Run the same command again to resume {name}; no job is submitted twice."


def _head(submission: Submission, settings: CommandSettings, name: str, digest: str) -> dict[str, str]:
    return {
        "name": name,
        "digest": digest,
        "source": submission.source.title,
        "form": submission.source.form or "",
        "broker": settings.rabbitmq_address,
        "jobs_queue": settings.jobs_queue,
        # Two users may submit the same file; each gets their results on a separate queue.
        "reply_to": submission.reply_to or f"{PRIVATE_PREFIX}{name}-{uuid.uuid4().hex[:8]}",
        "is_private": "" if submission.reply_to else "1",
    }


async def _is_confirmed(
    submission: Submission, settings: CommandSettings, state: SubmissionState, screen: Screen
) -> bool:
    """Plan the jobs unless they are planned; ask for confirmation if there are many."""
    head = state.head()
    usd = float(head["usd"]) if head.get("usd") else None
    if "planned" not in head or submission.source.may_grow:
        planned = await _plan_or_delete(submission, settings, state)
        usd = planned.usd()
        if submission.asks and screen.is_interactive and not _is_small(planned.jobs, usd):
            screen.note(*planned.lines())
    counts = state.counts()
    unsent = counts.total - counts.confirmed
    if not submission.asks or not screen.is_interactive or _is_small(unsent, usd):
        return True
    price = f", about {dollars(usd)}" if usd is not None else ""
    if screen.confirm(f"Submit {counted(unsent, 'job')}{price}?"):
        return True
    if not counts.sent + counts.confirmed:
        state.delete()
    screen.note("Nothing submitted.")
    return False


def _is_small(jobs: int, usd: float | None) -> bool:
    return jobs <= CONFIRM_ABOVE_JOBS and (usd or 0.0) <= CONFIRM_ABOVE_USD


async def _plan_or_delete(
    submission: Submission, settings: CommandSettings, state: SubmissionState
) -> Estimate:
    """Plan the jobs; on failure delete a state file that is new."""
    head = state.head()
    try:
        return await _plan(submission, settings, state, head["name"])
    except BaseException:
        if "planned" not in head:
            state.delete()
        raise


async def _plan(
    submission: Submission, settings: CommandSettings, state: SubmissionState, name: str
) -> Estimate:
    planned = Estimate(submission.assumptions, settings.model, settings.prices, submission.price)
    planner = Planner(
        state,
        name,
        submission.additions.resolved(),
        planned,
        max_job_bytes=settings.max_job_bytes,
        skips_invalid=submission.skips_invalid,
    )
    with state.transaction():
        await planner.plan(submission.source)
        if planner.error_count and not submission.skips_invalid:
            raise UsageError(*_planning_errors(planner))
        if not state.counts().total:
            raise UsageError(f"{submission.source.title} contains no jobs.")
        usd = planned.usd()
        state.set_head({"planned": "1", "usd": "" if usd is None else str(usd)})
    return planned


def _planning_errors(planner: Planner) -> list[str]:
    more = planner.error_count - len(planner.errors)
    return [
        f"{counted(planner.error_count, 'invalid job')}; nothing submitted.",
        *planner.errors,
        *([f"… and {more:,} more"] if more else []),
        "Use --skip-invalid to submit the valid jobs and report these as failed.",
    ]


class _Run:
    """One run of `submit` with the jobs of a state file."""

    def __init__(
        self, submission: Submission, settings: CommandSettings, state: SubmissionState, screen: Screen
    ) -> None:
        self._submission = submission
        self._settings = settings
        self._state = state
        self._screen = screen
        self._head = state.head()
        self._broker = broker_of(settings)
        self._topology = Topology.from_settings(settings)
        self.name = self._head["name"]

    async def run(self) -> int:
        """Upload, send and collect what is left; return the exit code."""
        counts = self._state.counts()
        unsent = counts.total - counts.confirmed
        if unsent:
            await self._upload()
            await self._prepare_queues()
        else:
            self._screen.note(f"Already submitted: {counted(counts.total, 'job')} (submission {self.name}).")
        if counts.sent:
            await self._resolve_unconfirmed(counts.sent)
        if not self._submission.waits:
            await self._send()
            return self._print_submitted(unsent)
        with self._state.locked("collecting"):
            collection = Collection(
                self._state,
                self._broker,
                self._screen,
                self._submission.output,
                timeout_s=self._submission.timeout_s,
                is_temporary=self._submission.is_temporary,
            )
            return await collection.run(self._sender() if unsent else None)

    async def _upload(self) -> None:
        if not self._state.pending_uploads():
            return
        from worker.cli.storage import Uploads, open_s3

        async with open_s3(self._settings) as s3:
            uploads = Uploads(self._state, s3)
            async with show_progress(self._screen, [Bar("uploaded", uploads.progress)]):
                await uploads.run()

    async def _prepare_queues(self) -> None:
        """Check that the jobs queue exists and declare the reply queue."""
        replies = ReplyQueue(
            self._head["reply_to"],
            self._settings.reply_exchange,
            expires_s=self._submission.keep_days * SECONDS_PER_DAY,
        )
        prepare_all = partial(
            prepare,
            # A user that publishes to an exchange may have no permission on the queue.
            jobs_queue=None if self._submission.exchange else self._topology.jobs,
            replies=replies if self._head["is_private"] else None,
        )
        try:
            await Session.once(self._broker, self._submission.timeout_s, prepare_all)
        except QueueMissingError:
            raise jobs_queue_missing(self._topology.jobs) from None
        self._state.set_head({"is_queue_deleted": ""})

    async def _resolve_unconfirmed(self, unconfirmed: int) -> None:
        """Collect the results that are there: jobs without a confirm but with a result are not sent again."""
        if self._head["is_private"]:
            with self._state.locked("collecting"):
                await Collector(self._state, self._broker, self._head["reply_to"]).until_quiet()
        left = self._state.counts().sent
        self._screen.note(
            f"{counted(unconfirmed, 'job')} sent without a confirm before the interruption:"
            f" {unconfirmed - left:,} answered, {left:,} sent again with the same ids."
        )

    def _sender(self) -> JobSender:
        return JobSender(
            self._state,
            self._broker,
            self._topology,
            exchange=self._submission.exchange,
            reply_to=self._head["reply_to"],
            max_queue=self._submission.max_queue,
        )

    async def _send(self) -> None:
        sender = self._sender()
        async with show_progress(self._screen, [Bar("submitted", sender.progress)]):
            await sender.run()

    def _print_submitted(self, sent: int) -> int:
        self._screen.emit(
            {
                "name": self.name,
                "state_file": str(self._state.path),
                "jobs": self._state.counts().total,
                "submitted": sent,
                "queue": self._topology.jobs,
                "reply_to": self._head["reply_to"],
            }
        )
        self._screen.print(f"Submitted {counted(sent, 'job')} (submission {self.name}).")
        if self._head["is_private"]:
            name = self.name if self._submission.state_file is None else self._submission.state_file
            self._screen.print(f"Collect the results with: vqa-worker results {name}")
        else:
            self._screen.print(f"Results are sent to the queue {self._head['reply_to']}.")
        return EXIT_OK
