"""Submit jobs: plan, confirm, upload, send, and collect the results."""

import asyncio
import hashlib
import json
import uuid
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

from vqa_worker.rabbitmq.replies import PRIVATE_PREFIX, QueueMissingError, ReplyQueue, prepare
from vqa_worker.rabbitmq.session import Session
from worker.cli import state_dir
from worker.cli.exit_codes import EXIT_FAILURE, EXIT_OK
from worker.cli.progress import Bar, show_progress
from worker.cli.shell import Screen, UsageError, broker_of, counted, dollars
from worker.cli.submit.collect import Collection, Collector, delete_replies
from worker.cli.submit.estimate import Estimate
from worker.cli.submit.inputs import Source
from worker.cli.submit.options import MAX_QUEUE, Options, Output
from worker.cli.submit.plan import Planner
from worker.cli.submit.sender import JobSender, jobs_queue_missing
from worker.cli.submit.state import Plan, SubmissionState
from worker.rabbitmq.topology import Topology
from worker.settings import CommandSettings

# A submission larger than this asks for confirmation.
CONFIRM_ABOVE_JOBS: Final = 1000
CONFIRM_ABOVE_USD: Final = 10.0
# Without a reader, a reply queue expires after 14 days.
REPLIES_EXPIRE_S: Final = 14 * 86_400


@dataclass(frozen=True)
class Submission:
    """The jobs to submit, and how.

    Attributes:
        additions: fields that all jobs get.
        uploads_to: the URL of a bucket and prefix for local images.
    """

    source: Source
    additions: Mapping[str, Any]
    uploads_to: str | None
    options: Options
    output: Output

    @property
    def is_temporary(self) -> bool:
        """Whether it is a question asked by hand, which nobody will resume."""
        return self.source.is_ad_hoc and self.options.name is None

    def digest(self, settings: CommandSettings) -> str:
        """Identify the submission: the same jobs for another broker or queue are another submission."""
        if self.is_temporary:
            return uuid.uuid4().hex
        broker = settings.rabbitmq_address, settings.jobs_queue, self.options.reply_to
        parts = (self.source.digest, self.additions, self.uploads_to, *broker)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode(errors="replace")).hexdigest()


async def estimate(submission: Submission, settings: CommandSettings, screen: Screen) -> int:
    """`--dry-run`: validate the jobs and print the estimated cost; return the exit code."""
    planner = Planner("dry-run", submission.additions, submission.uploads_to, settings)
    await planner.run(submission.source)
    with closing(planner.plan) as plan:
        _check(planner, submission, screen)
        screen.emit({**planner.estimate.as_json(), "uploads": len(plan.uploads)})
        if plan.uploads:
            screen.print(f"{counted(len(plan.uploads), 'local file')} to upload, except those already in S3")
        screen.print(*planner.estimate.lines(), "Nothing submitted (dry run).")
    return EXIT_OK


async def submit_jobs(submission: Submission, settings: CommandSettings, screen: Screen) -> int:
    """Submit the jobs, and with `--wait` collect the results; return the exit code."""
    digest = submission.digest(settings)
    name = submission.options.name or f"{state_dir.to_name(submission.source.title)}-{digest[:10]}"
    with state_dir.locked(name) as path, closing(_Run(submission, settings, screen, name, path)) as run:
        try:
            return await run.send_and_collect() if await run.prepare(digest) else EXIT_FAILURE
        except asyncio.CancelledError:
            screen.note(f"Interrupted. {run.resume_hint()}")
            raise


def _check(planner: Planner, submission: Submission, screen: Screen) -> None:
    """Check that there are jobs to submit; print what is skipped.

    Raises:
        UsageError: there are none, or some are invalid.
    """
    if not planner.error_count:
        return
    invalid, more = counted(planner.error_count, "invalid job"), planner.error_count - len(planner.errors)
    errors = [*planner.errors, *([f"… and {more:,} more"] if more else [])]
    if submission.options.skip_invalid and planner.estimate.jobs:
        screen.note(f"Skipped {invalid}:", *errors)
        return
    hint = "Use --skip-invalid to submit the valid jobs and report these as failed."
    raise UsageError(f"{invalid}; nothing submitted.", *errors, *([hint] if planner.estimate.jobs else []))


@dataclass
class _Run:
    """One run of `submit`, which holds the lock of its submission.

    The state file is created when everything is ready to send, and deleted if nothing was sent.
    """

    submission: Submission
    settings: CommandSettings
    screen: Screen
    name: str
    path: Path

    def __post_init__(self) -> None:
        self._options = self.submission.options
        self._broker = broker_of(self.settings)
        self._topology = Topology.from_settings(self.settings)
        self._state: SubmissionState | None = None

    def close(self) -> None:
        """Close the state file."""
        if self._state is not None:
            self._state.close()

    def resume_hint(self) -> str:
        """Return what to do after an interruption."""
        if self._state is None:
            return "Nothing was submitted."
        if self.submission.is_temporary:
            return f"Collect the results with: vqa-worker submissions collect {self.name}"
        return f"Run the same command again to resume {self.name}; no job is submitted twice."

    async def prepare(self, digest: str) -> bool:
        """Plan, upload and save what is not in the state file yet; return whether to go on.

        Raises:
            UsageError: the name belongs to another submission, or there are no jobs.
        """
        submission, head = self.submission, self._head(digest)
        left = self._state.counts().unconfirmed if self._state else 0
        if self._state and not submission.source.may_grow:
            await self._declare_queues(head, left)
            return True
        known = self._state.has if self._state else None
        planner = Planner(
            self.name, submission.additions, submission.uploads_to, self.settings, is_known=known
        )
        with closing(planner.plan) as plan:
            await planner.run(submission.source)
            _check(planner, submission, self.screen)
            new = plan.counts()
            if not new.total and self._state is None:
                raise UsageError(f"{submission.source.title} contains no jobs.")
            if not self._is_confirmed(planner.estimate):
                self.screen.note("Nothing submitted.")
                return False
            await self._upload(plan)
            await self._declare_queues(head, new.unconfirmed + left)
            plan.save(self.path, head)
        self._state = self._state or SubmissionState.open(self.path)
        return True

    def _head(self, digest: str) -> Mapping[str, str]:
        """Open the state file, if there is one; return its head, or a new one.

        Raises:
            UsageError: the name belongs to another submission.
        """
        if not self.path.exists():
            return self._new_head(digest)
        self._state = SubmissionState.open(self.path)
        head = self._state.head()
        if head["digest"] != digest:
            text = f"the name {self.name} belongs to another submission ({head['source']})."
            raise UsageError(f"{text} Choose another --name.")
        return head

    def _new_head(self, digest: str) -> dict[str, str]:
        reply_to = self._options.reply_to
        return {
            "name": self.name,
            "digest": digest,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "source": self.submission.source.title,
            "form": self.submission.source.form or "",
            "broker": self.settings.rabbitmq_address,
            "jobs_queue": self.settings.jobs_queue,
            # Two users may submit the same file; each gets their results on a separate queue.
            "reply_to": reply_to or f"{PRIVATE_PREFIX}{self.name}-{uuid.uuid4().hex[:8]}",
            "is_private": "" if reply_to else "1",
        }

    def _is_confirmed(self, planned: Estimate) -> bool:
        """Ask for confirmation if there are many new jobs."""
        usd = planned.usd()
        is_small = planned.jobs <= CONFIRM_ABOVE_JOBS and (usd or 0.0) <= CONFIRM_ABOVE_USD
        if is_small or self._options.yes or not self.screen.is_interactive:
            return True
        self.screen.note(*planned.lines())
        price = "" if usd is None else f", about {dollars(usd)}"
        return self.screen.ask(f"Submit {counted(planned.jobs, 'job')}{price}?")

    async def _upload(self, plan: Plan) -> None:
        if plan.uploads:
            from worker.cli.storage import Uploads, open_s3

            async with open_s3(self.settings) as s3:
                uploads = Uploads(plan.uploads, s3)
                with show_progress(self.screen, Bar("uploaded", uploads.progress)):
                    await uploads.run()

    async def _declare_queues(self, head: Mapping[str, str], unconfirmed: int) -> None:
        """If jobs are to be sent, check that the jobs queue exists and declare the reply queue."""
        if not unconfirmed:
            return
        replies = ReplyQueue(head["reply_to"], self.settings.reply_exchange, REPLIES_EXPIRE_S)
        prepare_all = partial(
            prepare,
            # A user that publishes to an exchange may have no permission on the queue.
            jobs_queue=None if self._options.exchange else self._topology.jobs,
            replies=replies if head["is_private"] else None,
        )
        try:
            await Session.once(self._broker, self.screen.timeout_s, prepare_all)
        except QueueMissingError:
            raise jobs_queue_missing(self._topology.jobs) from None
        if self._state is not None:
            self._state.set_head({"is_queue_deleted": ""})

    async def send_and_collect(self) -> int:
        """Send and collect what is left; return the exit code."""
        assert self._state is not None  # noqa: S101 - `prepare` opens it
        state, counts, options = self._state, self._state.counts(), self._options
        if not counts.unconfirmed:
            self.screen.note(f"Already submitted: {counted(counts.total, 'job')} (submission {self.name}).")
        if counts.sent:
            await self._resolve_unconfirmed(state, counts.sent)
        sender, is_new = self._sender(state), state.is_unsent()
        try:
            if options.wait:
                return await self._collection(state).run(sender if counts.unconfirmed else None)
            with show_progress(self.screen, Bar("submitted", sender.progress)):
                await sender.run()
        except BaseException:
            if is_new and (state.is_unsent() or sender.is_refused):
                # No job was published. The broker is called in another task: this one can be cancelled, and
                # Python 3.11's TaskGroup marks it as cancelled also when one of its tasks fails.
                await asyncio.create_task(delete_replies(state, self._broker, self.screen))
                state.delete()
                self._state = None
            raise
        self._print_submitted(state, counts.unconfirmed)
        return EXIT_OK

    async def _resolve_unconfirmed(self, state: SubmissionState, unconfirmed: int) -> None:
        """Collect the results that are there: jobs without a confirm but with a result are not sent again."""
        head = state.head()
        if head["is_private"]:
            await Collector(state, self._broker, head["reply_to"]).run(wait=False)
        left = state.counts().sent
        self.screen.note(
            f"{counted(unconfirmed, 'job')} sent without a confirm before the interruption:"
            f" {unconfirmed - left:,} answered, {left:,} sent again with the same ids."
        )

    def _sender(self, state: SubmissionState) -> JobSender:
        exchange, max_queue = self._options.exchange, self._options.max_queue
        if max_queue is None:
            # A user that publishes to an exchange may have no permission on the queue.
            max_queue = 0 if exchange else MAX_QUEUE
        reply_to = state.head()["reply_to"]
        return JobSender(state, self._broker, self._topology, exchange, reply_to, max_queue)

    def _collection(self, state: SubmissionState) -> Collection:
        return Collection(
            state,
            self._broker,
            self.screen,
            self.submission.output,
            wait_timeout_s=self._options.wait_timeout,
            is_temporary=self.submission.is_temporary,
        )

    def _print_submitted(self, state: SubmissionState, sent: int) -> None:
        head = state.head()
        result = {
            "name": self.name,
            "jobs": state.counts().total,
            "submitted": sent,
            "queue": self._topology.jobs,
            "reply_to": head["reply_to"],
        }
        self.screen.emit(result)
        self.screen.print(f"Submitted {counted(sent, 'job')} (submission {self.name}).")
        if head["is_private"]:
            self.screen.print(f"Collect the results with: vqa-worker submissions collect {self.name}")
        else:
            self.screen.print(f"Results are sent to the queue {head['reply_to']}.")
