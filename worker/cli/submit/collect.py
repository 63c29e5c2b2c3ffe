"""Collect a submission's results: read its reply queue, store them in the state file, print or write them."""

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from vqa_worker.large_results import LargeResults, UnreadableObjectError
from vqa_worker.rabbitmq.connection import (
    Broker,
    BrokerRefusedError,
    BrokerUnreachableError,
    TopologyError,
)
from vqa_worker.rabbitmq.outgoing import RefusedError
from vqa_worker.rabbitmq.replies import (
    QueueMissingError,
    Reply,
    ReplyReader,
    consumer_count,
    delete_queue,
    depth,
)
from vqa_worker.rabbitmq.session import Session
from worker.cli import outputs
from worker.cli.exit_codes import EXIT_FAILURE, EXIT_OK
from worker.cli.progress import Bar, show_progress
from worker.cli.shell import CommandError, Screen, broker_of, counted
from worker.cli.submit.cancellations import publish_cancellations
from worker.cli.submit.limits import Limits
from worker.cli.submit.options import Output
from worker.cli.submit.results import completed, parse, received, result_url
from worker.cli.submit.sender import JobSender
from worker.cli.submit.state import JobResult, SubmissionState
from worker.settings import CommandSettings

# An unused reply queue expires, so that its deletion need not be waited for any longer.
DELETE_TIMEOUT_S: Final = 5.0
# The queue counts as empty after so long without a result.
QUIET_S: Final = 1.0
FIRST_CONSUMERS_POLL_S: Final = 0.2
CONSUMERS_POLL_S: Final = 1.0
# Then something is wrong with S3 rather than with single objects.
MAX_UNREADABLE: Final = 10
NO_CONSUMER: Final = "waiting: no worker is consuming"


@dataclass
class Collection:
    """Collect the results of a submission: store each once in the state file, then print or write them.

    Attributes:
        wait_timeout_s: stop after so many seconds.
        limits: those of the submission; the collection counts the results in them.
    """

    state: SubmissionState
    settings: CommandSettings
    screen: Screen
    output: Output
    wait_timeout_s: float | None = None

    def __post_init__(self) -> None:
        self._head = self.state.head()
        self._broker = broker_of(self.settings)
        self._form = self.output.form_for(self._head["form"])
        self._is_streaming = False
        self._reader = ReplyReader(self._broker, self._head["reply_to"], self._take)
        self._arrived = asyncio.Event()
        self._counts = self.state.counts()
        self.limits = Limits(self._head, self._counts)
        self._sending: asyncio.Task[None] | None = None
        # At least so many confirmed jobs have no result.
        self._awaited = 0
        self._has_cancelled = False
        self._unknown = 0
        self._large_results = LargeResults(self.settings.s3_endpoint_url, self.settings.s3_addressing_style)
        # Why a result in S3 cannot be read, by the job's id. Its message stays in the queue.
        self._unreadable: dict[str, str] = {}
        # Why no result can arrive.
        self._waits_for = ""

    async def run(self, sender: JobSender | None = None, *, no_wait: bool = False) -> int:
        """Collect until every submitted job has a result, while `sender` submits; return the exit code.

        `no_wait`: collect only what is there now.
        """
        counts = self._counts
        self._is_streaming = self.output.path is None and self._form != "csv"
        if self._is_streaming:
            for it in self.state.results():
                self._print(it)
        if sender is not None or self.limits.outstanding:
            if sender is None:
                await self._check_queue()
            bars = [Bar("submitted", sender.progress)] if sender is not None else []
            with show_progress(self.screen, *bars, Bar("results", self._progress)):
                await (self._read(no_wait=True) if no_wait else self._read_all(sender))
        if self._unknown:
            self.screen.note(f"Ignored {self._unknown:,} unexpected results (unknown job id).")
        files = self._write()
        if not counts.pending:
            await delete_replies(self.state, self._broker, self.screen)
        if not self._is_streaming or self.screen.is_terminal:
            pending = f"; {counts.pending:,} pending" if counts.pending else ""
            self.screen.note(f"{counts.succeeded:,} succeeded, {counts.note()}{pending}")
        if files:
            more = {"name": self._head["name"], "total_tokens": counts.tokens, "files": files}
            self.screen.emit({**counts.as_json(), **more, "stopped": self.limits.reason or None})
            self.screen.note(f"Wrote {', '.join(files)}")
        self.screen.note(*self.limits.report(self.state))
        self._check_unreadable()
        return EXIT_FAILURE if counts.failed or counts.pending else EXIT_OK

    async def read_available(self) -> None:
        """Store the results that are on the queue now.

        Raises:
            CommandError: the queue does not exist, or a result in S3 cannot be read.
            BrokerRefusedError: the broker refuses the credentials.
        """
        await self._read(no_wait=True)
        self._check_unreadable()

    async def _read_all(self, sender: JobSender | None) -> None:
        try:
            async with asyncio.timeout(self.wait_timeout_s), asyncio.TaskGroup() as group:
                if sender is not None:
                    self._sending = group.create_task(sender.run(), name="sender")
                    self._sending.add_done_callback(lambda _: self._arrived.set())
                watching = group.create_task(self._watch_consumers(), name="consumers")
                await self._read(no_wait=False)
                watching.cancel()
        except TimeoutError:
            pending = counted(self._counts.pending, "result")
            self.screen.note(f"{pending} pending after {self.wait_timeout_s:g} s.")

    async def _read(self, *, no_wait: bool) -> None:
        """Store results until every submitted job has one; `no_wait`: until none arrives for `QUIET_S`.

        Jobs that were sent without a confirm may have results; there is no waiting for them.
        """
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(self._run_reader(), name="results")
            cancelling: asyncio.Task[None] | None = None
            while self._is_sending or self._outstanding:
                if self._unreadable and not self._outstanding and self.limits.unsent and not self.limits.room:
                    # The sender waits for a result that cannot be read.
                    self._check_unreadable()
                if self.limits.stopped and cancelling is None:
                    self.state.set_head({"stopped": self.limits.stopped})
                    cancelling = group.create_task(self._cancel(no_wait=no_wait), name="cancel")
                self._arrived.clear()
                try:
                    async with asyncio.timeout(QUIET_S if no_wait or not self._is_awaiting() else None):
                        await self._arrived.wait()
                except TimeoutError:
                    if self._reader.is_connected:
                        break
            reading.cancel()
            if cancelling is not None and not no_wait:
                cancelling.cancel()

    @property
    def _is_sending(self) -> bool:
        return self._sending is not None and not self._sending.done()

    @property
    def _outstanding(self) -> int:
        """The number of jobs that were sent and have no result, unless it is one that cannot be read."""
        return max(0, self.limits.outstanding - len(self._unreadable))

    def _is_awaiting(self) -> bool:
        """Return whether jobs are being sent or confirmed jobs have no result."""
        unreadable = len(self._unreadable)
        if not self._is_sending and self._awaited <= unreadable:
            # Counted seldom, which reads the whole table: results of unconfirmed jobs lower the number too.
            self._awaited = self.state.awaited()
        return self._is_sending or self._awaited > unreadable

    async def _cancel(self, *, no_wait: bool) -> None:
        """Cancel all jobs that were sent and have no result; while no worker listens, try again."""
        settings = self.settings.model_copy(update={"jobs_queue": self._head["jobs_queue"]})
        while not self._has_cancelled:
            reason, is_final = "", no_wait
            try:
                await publish_cancellations(self.state.pending(sent=True), settings, self.screen.timeout_s)
                self._has_cancelled = True
            except* (CommandError, BrokerUnreachableError) as error:
                reason = str(error.exceptions[0])
            except* (BrokerRefusedError, RefusedError, TopologyError) as error:
                reason, is_final = str(error.exceptions[0]), True
            if reason and is_final:
                self.screen.note(f"Warning: the jobs on the queue are not cancelled: {reason}")
                return
            if reason:
                await asyncio.sleep(CONSUMERS_POLL_S)

    async def _run_reader(self) -> None:
        try:
            await self._reader.run()
        except QueueMissingError:
            raise _reply_queue_missing(self._head["reply_to"]) from None

    async def _take(self, replies: Sequence[Reply]) -> Sequence[Reply]:
        """Store results; return those in S3 that cannot be read."""
        large = dict.fromkeys(filter(self._is_large, replies))
        self._store([it for it in replies if it not in large])
        kept = []
        for it in large:
            try:
                # One by one, as they are large.
                self._store([await asyncio.to_thread(completed, it, self._large_results)])
            except UnreadableObjectError as error:
                kept.append(it)
                self._unreadable[parse(it.body)["id"]] = str(error)
                if len(self._unreadable) >= MAX_UNREADABLE:
                    self._check_unreadable()
        self._arrived.set()
        return kept

    def _is_large(self, reply: Reply) -> bool:
        """Return whether a result is to be read from S3: not one of another job, or a second one."""
        has_url = result_url(reply.body) is not None
        return has_url and self.state.is_pending(parse(reply.body)["id"] or "")

    def _store(self, replies: Sequence[Reply]) -> None:
        new, unknown = self.state.store([received(reply) for reply in replies])
        self._unknown += unknown
        for one in new:
            self._counts.add(one)
            self._unreadable.pop(one.id, None)
            if self._is_streaming:
                self._print(one)
        self._awaited -= len(new)
        self.limits.add(len(new))

    def _check_unreadable(self) -> None:
        """Check that all results in S3 could be read.

        Raises:
            CommandError: some could not; their messages are still in the queue.
        """
        if not self._unreadable:
            return
        count = counted(len(self._unreadable), "result")
        hint = (
            "Check VQA_S3_ENDPOINT_URL, the AWS credentials, and that they allow s3:GetObject. Then run the"
            f" same command again: the messages are still in the queue {self._head['reply_to']}."
        )
        raise CommandError(f"{count} in S3 cannot be read.", *self._unreadable.values(), hint)

    def _progress(self) -> tuple[int, int, str]:
        counts = self._counts
        is_lost = counts.pending and not self._reader.is_connected
        note = "waiting for RabbitMQ" if is_lost else self._waits_for or counts.note()
        return counts.received, counts.total, note

    def _print(self, it: JobResult) -> None:
        if self.screen.as_json or self.output.form is not None:
            self.screen.write(outputs.line_of(it, self._form))
        else:
            outputs.print_text(it, self.screen, has_title=self._counts.total > 1)

    def _write(self) -> list[str]:
        """Write the output; return the names of the files."""
        if self.output.path is not None:
            return outputs.write(self.state, self._form, self.output.path, self.output.errors)
        if self._form == "csv":
            outputs.write_csv(self.state, sys.stdout)
        return []

    async def _check_queue(self) -> None:
        """Check that the queue exists, with a timeout: the collector itself would wait for the broker."""
        queue = self._head["reply_to"]
        try:
            await Session.once(self._broker, self.screen.timeout_s, partial(depth, queue=queue))
        except QueueMissingError:
            raise _reply_queue_missing(queue) from None

    async def _watch_consumers(self) -> None:
        """Report when no worker consumes from the jobs queue."""
        queue, was_reported = self._head["jobs_queue"], False
        # Results that are there already arrive before.
        delay_s = FIRST_CONSUMERS_POLL_S
        async with Session(self._broker, "consumers") as session:
            while True:
                await asyncio.sleep(delay_s)
                delay_s = CONSUMERS_POLL_S
                try:
                    count = await session.call(partial(consumer_count, queue=queue))
                except (QueueMissingError, TopologyError):
                    return
                self._waits_for = "" if count else NO_CONSUMER
                if not count and not was_reported:
                    was_reported = True
                    self.screen.note(
                        f"No worker is consuming from the queue {queue}. Start one (`vqa-worker run`); if one"
                        " runs, it is paused, and `vqa-worker check` shows why. The jobs wait in the queue."
                    )


async def delete_replies(state: SubmissionState, broker: Broker, screen: Screen) -> None:
    """Delete the reply queue of a submission, unless it is deleted."""
    head = state.head()
    if head.get("is_queue_deleted"):
        return
    try:
        await Session.once(broker, DELETE_TIMEOUT_S, partial(delete_queue, name=head["reply_to"]))
    except (BrokerUnreachableError, TopologyError):
        queue = head["reply_to"]
        screen.note(f"Could not delete the queue {queue}; RabbitMQ deletes it when it expires.")
    else:
        state.set_head({"is_queue_deleted": "1"})


def _reply_queue_missing(queue: str) -> CommandError:
    return CommandError(
        f"the queue {queue} does not exist any more: it was deleted, or it expired. Later results are on the"
        " workers' results queue, with the header vqa-undeliverable-to."
    )
