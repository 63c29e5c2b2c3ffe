"""Submit jobs: plan, confirm, upload, send, and collect the results."""

import asyncio
import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
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
from worker.cli.submit.collect import Collection, Collector, delete_replies
from worker.cli.submit.estimate import Estimate, dollars
from worker.cli.submit.inputs import Source
from worker.cli.submit.options import MAX_QUEUE, Options
from worker.cli.submit.plan import Additions, Planner
from worker.cli.submit.sender import JobSender, jobs_queue_missing
from worker.cli.submit.state import Plan, SubmissionState
from worker.rabbitmq.topology import Topology
from worker.settings import CommandSettings

# A submission larger than this asks for confirmation.
CONFIRM_ABOVE_JOBS: Final = 1000
CONFIRM_ABOVE_USD: Final = 10.0
# Days without a reader after which a reply queue expires.
REPLIES_EXPIRE_DAYS: Final = 14
SECONDS_PER_DAY: Final = 86_400


@dataclass(frozen=True)
class Submission:
    """The jobs to submit, the fields that all of them get, and how to submit them."""

    source: Source
    additions: Additions
    options: Options

    @property
    def is_temporary(self) -> bool:
        """Whether it is a question asked by hand, which nobody will resume."""
        return self.source.is_ad_hoc and self.options.name is None

    def digest(self, settings: CommandSettings) -> str:
        """Identify the submission: the same jobs for another broker or queue are another submission."""
        if self.is_temporary:
            return uuid.uuid4().hex
        parts = [
            self.source.digest(),
            self.additions.digest(),
            settings.rabbitmq_address,
            settings.jobs_queue,
            self.options.reply_to,
        ]
        return hashlib.sha256(json.dumps(parts).encode(errors="replace")).hexdigest()


async def estimate(submission: Submission, settings: CommandSettings, screen: Screen) -> int:
    """`--dry-run`: validate the jobs and print the estimated cost; return the exit code."""
    planner = Planner("dry-run", submission.additions, settings)
    await planner.run(submission.source)
    with closing(planner.plan) as plan:
        _check(planner, submission, screen)
        screen.emit({**planner.estimate.as_json(), "uploads": len(plan.uploads)})
        if plan.uploads:
            screen.print(f"{counted(len(plan.uploads), 'local file')} to upload, except those already in S3")
        screen.print(*planner.estimate.lines(), "Nothing submitted (dry run).")
    return EXIT_OK


async def submit_jobs(submission: Submission, settings: CommandSettings, screen: Screen) -> int:
    """Submit the jobs, and with `waits` collect the results; return the exit code."""
    digest = submission.digest(settings)
    name = submission.options.name or f"{state_dir.to_name(submission.source.title)}-{digest[:10]}"
    with state_dir.locked(name) as path:
        run = _Run(submission, settings, screen, name, path)
        head = _head(submission, settings, name, digest)
        try:
            if not await run.prepare(head):
                return EXIT_FAILURE
            return await run.send_and_collect()
        except asyncio.CancelledError:
            screen.note(f"Interrupted. {run.resume_hint()}")
            raise
        finally:
            run.close()


def _head(submission: Submission, settings: CommandSettings, name: str, digest: str) -> dict[str, str]:
    return {
        "name": name,
        "digest": digest,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": submission.source.title,
        "form": submission.source.form or "",
        "broker": settings.rabbitmq_address,
        "jobs_queue": settings.jobs_queue,
        # Two users may submit the same file; each gets their results on a separate queue.
        "reply_to": submission.options.reply_to or f"{PRIVATE_PREFIX}{name}-{uuid.uuid4().hex[:8]}",
        "is_private": "" if submission.options.reply_to else "1",
    }


def _check(planner: Planner, submission: Submission, screen: Screen) -> None:
    """Check that there are jobs to submit; print what is skipped.

    Raises:
        UsageError: there are none, or some are invalid.
    """
    if planner.error_count and submission.options.skip_invalid and planner.estimate.jobs:
        screen.note(f"Skipped {counted(planner.error_count, 'invalid job')}:", *_errors(planner))
    elif planner.error_count:
        hint = ["Use --skip-invalid to submit the valid jobs and report these as failed."]
        raise UsageError(
            f"{counted(planner.error_count, 'invalid job')}; nothing submitted.",
            *_errors(planner),
            *(hint if planner.estimate.jobs else []),
        )


def _errors(planner: Planner) -> Iterator[str]:
    yield from planner.errors
    if more := planner.error_count - len(planner.errors):
        yield f"… and {more:,} more"


class _Run:
    """One run of `submit`, which holds the lock of its submission.

    The state file is created when everything is ready to send, and deleted if nothing was sent.
    """

    def __init__(
        self, submission: Submission, settings: CommandSettings, screen: Screen, name: str, path: Path
    ) -> None:
        self._submission = submission
        self._options = submission.options
        self._settings = settings
        self._screen = screen
        self._name = name
        self._path = path
        self._broker = broker_of(settings)
        self._topology = Topology.from_settings(settings)
        self._state: SubmissionState | None = None

    def close(self) -> None:
        """Close the state file."""
        if self._state is not None:
            self._state.close()

    def resume_hint(self) -> str:
        """Return what to do after an interruption."""
        if self._state is None:
            return "Nothing was submitted."
        if self._submission.is_temporary:
            return f"Collect the results with: vqa-worker submissions collect {self._name}"
        return f"Run the same command again to resume {self._name}; no job is submitted twice."

    async def prepare(self, head: Mapping[str, str]) -> bool:
        """Plan, upload and save what is not in the state file yet; return whether to go on.

        Raises:
            UsageError: the name belongs to another submission, or there are no jobs.
        """
        if self._path.exists():
            self._state = SubmissionState.open(self._path)
            head = self._own_head(self._state, head["digest"])
            if not self._submission.source.may_grow:
                await self._declare_queues(head, self._state.counts().unconfirmed)
                return True
        known = self._state.has if self._state is not None else None
        planner = Planner(self._name, self._submission.additions, self._settings, is_known=known)
        with closing(planner.plan) as plan:
            await planner.run(self._submission.source)
            _check(planner, self._submission, self._screen)
            if not plan.counts().total and self._state is None:
                raise UsageError(f"{self._submission.source.title} contains no jobs.")
            if not self._is_confirmed(planner.estimate):
                self._screen.note("Nothing submitted.")
                return False
            await self._save(plan, head)
        return True

    def _own_head(self, state: SubmissionState, digest: str) -> dict[str, str]:
        head = state.head()
        if head["digest"] != digest:
            text = f"the name {self._name} belongs to another submission ({head['source']})."
            raise UsageError(f"{text} Choose another --name.")
        return head

    async def _save(self, plan: Plan, head: Mapping[str, str]) -> None:
        """Upload the images and declare the queues, then save the jobs."""
        await self._upload(plan)
        left = 0 if self._state is None else self._state.counts().unconfirmed
        await self._declare_queues(head, plan.counts().unconfirmed + left)
        plan.save(self._path, head)
        if self._state is None:
            self._state = SubmissionState.open(self._path)

    def _is_confirmed(self, planned: Estimate) -> bool:
        """Ask for confirmation if there are many new jobs."""
        usd = planned.usd()
        is_small = planned.jobs <= CONFIRM_ABOVE_JOBS and (usd or 0.0) <= CONFIRM_ABOVE_USD
        if is_small or self._options.yes or not self._screen.is_interactive:
            return True
        self._screen.note(*planned.lines())
        price = "" if usd is None else f", about {dollars(usd)}"
        return self._screen.confirm(f"Submit {counted(planned.jobs, 'job')}{price}?")

    async def _upload(self, plan: Plan) -> None:
        if not plan.uploads:
            return
        from worker.cli.storage import Uploads, open_s3

        async with open_s3(self._settings) as s3:
            uploads = Uploads(plan.uploads, s3)
            async with show_progress(self._screen, [Bar("uploaded", uploads.progress)]):
                await uploads.run()

    async def _declare_queues(self, head: Mapping[str, str], unconfirmed: int) -> None:
        """If jobs are to be sent, check that the jobs queue exists and declare the reply queue."""
        if not unconfirmed:
            return
        replies = ReplyQueue(
            head["reply_to"],
            self._settings.reply_exchange,
            expires_s=REPLIES_EXPIRE_DAYS * SECONDS_PER_DAY,
        )
        prepare_all = partial(
            prepare,
            # A user that publishes to an exchange may have no permission on the queue.
            jobs_queue=None if self._options.exchange else self._topology.jobs,
            replies=replies if head["is_private"] else None,
        )
        try:
            await Session.once(self._broker, self._screen.timeout_s, prepare_all)
        except QueueMissingError:
            raise jobs_queue_missing(self._topology.jobs) from None
        if self._state is not None:
            self._state.set_head({"is_queue_deleted": ""})

    async def send_and_collect(self) -> int:
        """Send and collect what is left; return the exit code."""
        assert self._state is not None  # noqa: S101 - `prepare` opens it
        state, counts = self._state, self._state.counts()
        if not counts.unconfirmed:
            self._screen.note(f"Already submitted: {counted(counts.total, 'job')} (submission {self._name}).")
        if counts.sent:
            await self._resolve_unconfirmed(state, counts.sent)
        sender = self._sender(state)
        is_new = state.is_unsent()
        try:
            if self._options.wait:
                return await self._collection(state).run(sender if counts.unconfirmed else None)
            async with show_progress(self._screen, [Bar("submitted", sender.progress)]):
                await sender.run()
        except BaseException:
            if is_new and (state.is_unsent() or sender.is_refused):
                await self._discard(state)
            raise
        return self._print_submitted(state, counts.unconfirmed)

    async def _discard(self, state: SubmissionState) -> None:
        """Delete a submission of which no job was published."""
        await delete_replies(state, self._broker, self._screen)
        state.delete()
        self._state = None

    async def _resolve_unconfirmed(self, state: SubmissionState, unconfirmed: int) -> None:
        """Collect the results that are there: jobs without a confirm but with a result are not sent again."""
        head = state.head()
        if head["is_private"]:
            await Collector(state, self._broker, head["reply_to"]).until_quiet()
        left = state.counts().sent
        self._screen.note(
            f"{counted(unconfirmed, 'job')} sent without a confirm before the interruption:"
            f" {unconfirmed - left:,} answered, {left:,} sent again with the same ids."
        )

    def _sender(self, state: SubmissionState) -> JobSender:
        max_queue = self._options.max_queue
        if max_queue is None:
            # A user that publishes to an exchange may have no permission on the queue.
            max_queue = 0 if self._options.exchange else MAX_QUEUE
        return JobSender(
            state,
            self._broker,
            self._topology,
            exchange=self._options.exchange,
            reply_to=state.head()["reply_to"],
            max_queue=max_queue,
        )

    def _collection(self, state: SubmissionState) -> Collection:
        return Collection(
            state,
            self._broker,
            self._screen,
            Output(self._options.output, self._options.errors, self._options.output_form),
            wait_timeout_s=self._options.wait_timeout,
            is_temporary=self._submission.is_temporary,
        )

    def _print_submitted(self, state: SubmissionState, sent: int) -> int:
        head = state.head()
        self._screen.emit(
            {
                "name": self._name,
                "jobs": state.counts().total,
                "submitted": sent,
                "queue": self._topology.jobs,
                "reply_to": head["reply_to"],
            }
        )
        self._screen.print(f"Submitted {counted(sent, 'job')} (submission {self._name}).")
        if head["is_private"]:
            self._screen.print(f"Collect the results with: vqa-worker submissions collect {self._name}")
        else:
            self._screen.print(f"Results are sent to the queue {head['reply_to']}.")
        return EXIT_OK
