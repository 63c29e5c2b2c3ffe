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
from worker.cli.submit.collect import Collection, delete_replies
from worker.cli.submit.inputs import Source
from worker.cli.submit.limits import COST, FAILURES
from worker.cli.submit.options import MAX_QUEUE, Options, Output
from worker.cli.submit.plan import Planner, parse_deadline_option
from worker.cli.submit.sender import JobSender, jobs_queue_missing
from worker.cli.submit.state import SubmissionState
from worker.rabbitmq.topology import Topology
from worker.settings import CommandSettings

# A submission larger than this asks for confirmation.
CONFIRM_ABOVE_JOBS: Final = 1000
CONFIRM_ABOVE_USD: Final = 10.0
# Without a reader, a reply queue expires after 14 days.
REPLIES_EXPIRE_S: Final = 14 * 86_400


@dataclass
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
    settings: CommandSettings
    screen: Screen

    def __post_init__(self) -> None:
        """Name the submission: the same jobs for another broker or queue are another submission."""
        parts = (
            self.source.digest,
            self.additions,
            self.uploads_to,
            self.settings.rabbitmq_address,
            self.settings.jobs_queue,
        )
        self._digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode(errors="replace")).hexdigest()
        # A question asked by hand is a new submission each time, which nobody will resume.
        self._is_temporary = self.source.is_ad_hoc and self.options.name is None
        suffix = uuid.uuid4().hex if self._is_temporary else self._digest
        self._name = self.options.name or f"{state_dir.to_name(self.source.title)}-{suffix[:10]}"
        self._broker = broker_of(self.settings)
        self._topology = Topology.from_settings(self.settings)

    async def dry_run(self) -> int:
        """Validate the jobs and print the estimated cost; return the exit code."""
        planner = await self._plan()
        planner.draft.close()
        samples = []
        if self.options.estimate:
            from worker.cli.submit.estimate import prepare_samples

            async for name, sent in prepare_samples(planner, self.screen):
                samples.append({"image": name, "sent": sent.text, "tokens": sent.tokens})
                self.screen.print(f"{name}: {sent.text}")
        found = {
            "jobs": planner.jobs.total(),
            "images": planner.images.total(),
            "models": sorted(planner.jobs),
            "cost_usd": planner.usd(),
            "uploads": len(planner.uploads),
            **({"samples": samples} if self.options.estimate else {}),
        }
        self.screen.emit(found, *planner.estimate(), "Nothing submitted (dry run).")
        return EXIT_OK

    async def run(self) -> int:
        """Submit the jobs, and with `--wait` collect the results; return the exit code.

        The state file is created when everything is ready to send, and deleted if nothing was sent.
        """
        with state_dir.locked(self._name) as path:
            try:
                is_resumed = path.exists()
                if not is_resumed and not await self._create(path):
                    self.screen.note("Nothing submitted.")
                    return EXIT_FAILURE
                with closing(SubmissionState.open(path)) as state:
                    return await self._send_and_collect(state, is_resumed=is_resumed)
            except asyncio.CancelledError:
                self.screen.note(f"Interrupted. {self._resume_hint(path)}")
                raise

    def _resume_hint(self, path: Path) -> str:
        if not path.exists():
            return "Nothing was submitted."
        if self._is_temporary:
            return f"Collect the results with: vqa-worker submissions collect {self._name}"
        return f"Run the same command again to resume {self._name}; no job is submitted twice."

    async def _plan(self) -> Planner:
        """Plan the jobs; print those that are skipped.

        Raises:
            UsageError: there are none, or some are invalid.
        """
        additions = dict(self.additions)
        if "deadline" in additions:
            additions["deadline"] = parse_deadline_option(additions["deadline"])
        planner = Planner(self._name, additions, self.uploads_to, self.settings)
        await planner.run(self.source)
        if not planner.error_count and not planner.jobs:
            raise UsageError(f"{self.source.title} contains no jobs.")
        if planner.error_count:
            invalid, more = (
                counted(planner.error_count, "invalid job"),
                planner.error_count - len(planner.errors),
            )
            errors = [*planner.errors, *([f"… and {more:,} more"] if more else [])]
            if not (self.options.skip_invalid and planner.jobs):
                hint = "Use --skip-invalid to submit the valid jobs and report these as failed."
                raise UsageError(f"{invalid}; nothing submitted.", *errors, *([hint] if planner.jobs else []))
            self.screen.note(f"Skipped {invalid}:", *errors)
        return planner

    async def _create(self, path: Path) -> bool:
        """Plan the jobs, upload the images and save the state file; return False if the user declines."""
        planner = await self._plan()
        with closing(planner.draft) as draft:
            if not self._is_confirmed(planner):
                return False
            if planner.uploads:
                from worker.cli.storage import upload

                await upload(planner.uploads, self.settings, self.screen)
            head = {
                "name": self._name,
                "digest": self._digest,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "source": self.source.title,
                "form": self.source.form or "",
                "broker": self.settings.rabbitmq_address,
                "jobs_queue": self.settings.jobs_queue,
                # Two users may submit the same file; each gets their results on a separate queue.
                "reply_to": f"{PRIVATE_PREFIX}{self._name}-{uuid.uuid4().hex[:8]}",
            }
            await self._declare_queues(head["reply_to"])
            draft.save(path, head)
        return True

    def _is_confirmed(self, planner: Planner) -> bool:
        """Ask for confirmation if there are many jobs."""
        jobs, usd = planner.jobs.total(), planner.usd()
        is_small = jobs <= CONFIRM_ABOVE_JOBS and (usd or 0.0) <= CONFIRM_ABOVE_USD
        if is_small or self.options.yes or not self.screen.is_interactive:
            return True
        self.screen.note(*planner.estimate())
        price = "" if usd is None else f", about {dollars(usd)}"
        return self.screen.ask(f"Submit {counted(jobs, 'job')}{price}?")

    async def _declare_queues(self, reply_to: str) -> None:
        """Check that the jobs queue exists and declare the reply queue."""
        prepare_all = partial(
            prepare,
            # A user that publishes to an exchange may have no permission on the queue.
            jobs_queue=None if self.options.exchange else self._topology.jobs,
            replies=ReplyQueue(reply_to, self.settings.reply_exchange, REPLIES_EXPIRE_S),
        )
        try:
            await Session.once(self._broker, self.screen.timeout_s, prepare_all)
        except QueueMissingError:
            raise jobs_queue_missing(self._topology.jobs) from None

    async def _send_and_collect(self, state: SubmissionState, *, is_resumed: bool) -> int:
        """Send and collect what is left; return the exit code.

        Raises:
            UsageError: the name belongs to another submission, or its limits need `--wait`.
        """
        head, counts, options = state.head(), state.counts(), self.options
        if head["digest"] != self._digest:
            text = f"the name {self._name} belongs to another submission ({head['source']})."
            raise UsageError(f"{text} Choose another --name.")
        self._store_limits(state)
        is_new = state.is_unsent()
        if not counts.unconfirmed:
            self.screen.note(f"Already submitted: {counted(counts.total, 'job')} (submission {self._name}).")
        elif is_resumed:
            await self._declare_queues(head["reply_to"])
        collection = Collection(state, self.settings, self.screen, self.output, options.wait_timeout)
        if counts.sent:
            # Jobs without a confirm but with a result are not sent again.
            await collection.read_available()
            left = state.counts().sent
            again = "not sent again" if collection.limits.stopped else "sent again with the same ids"
            self.screen.note(
                f"{counted(counts.sent, 'job')} sent without a confirm before the interruption:"
                f" {counts.sent - left:,} answered, {left:,} {again}."
            )
        max_queue = options.max_queue
        if max_queue is None:
            # A user that publishes to an exchange may have no permission on the queue.
            max_queue = 0 if options.exchange else MAX_QUEUE
        limits = collection.limits
        sender = JobSender(
            state,
            self._broker,
            self._topology,
            options.exchange,
            head["reply_to"],
            max_queue,
            limits,
            must_see_depth=options.max_queue is not None,
        )
        try:
            if not options.wait:
                with show_progress(self.screen, Bar("submitted", sender.progress)):
                    await sender.run()
            else:
                code = await collection.run(sender if counts.unconfirmed and not limits.stopped else None)
                if self._is_temporary and not state.counts().pending:
                    state.delete()
                return code
        except BaseException:
            if is_new and (state.is_unsent() or sender.is_refused):
                # No job was published. The broker is called in another task: this one can be cancelled, and
                # Python 3.11's TaskGroup marks it as cancelled also when one of its tasks fails.
                await asyncio.create_task(delete_replies(state, self._broker, self.screen))
                state.delete()
            raise
        sent = {"jobs": counts.total, "submitted": counts.unconfirmed}
        self.screen.emit(
            {"name": self._name, **sent, "queue": self._topology.jobs, "reply_to": head["reply_to"]},
            f"Submitted {counted(counts.unconfirmed, 'job')} (submission {self._name}).",
            f"Collect the results with: vqa-worker submissions collect {self._name}",
        )
        return EXIT_OK

    def _store_limits(self, state: SubmissionState) -> None:
        """Store the limits of this command; those of an earlier one stay in force without.

        Raises:
            UsageError: there are limits, and jobs would be sent without waiting for results.
        """
        given = {FAILURES: self.options.stop_after_failures, COST: self.options.max_cost}
        head, limits = state.head(), {name: value for name, value in given.items() if value is not None}
        if limits.get(FAILURES) not in (None, head.get(FAILURES)):
            limits["stopped"] = ""
        state.set_head(limits)
        if not self.options.wait and head.keys() & given.keys() and state.counts().unconfirmed:
            raise UsageError(
                f"the submission {self._name} has --stop-after-failures or --max-cost, which require --wait."
                " Add it."
            )
