"""Collect a submission's results: read its reply queue, store them in the state file, print or write them."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from vqa_worker.rabbitmq.connection import Broker, BrokerUnreachableError, TopologyError
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
from worker.cli.outputs import Stream
from worker.cli.progress import Bar, show_progress
from worker.cli.shell import CommandError, Screen, counted
from worker.cli.submit.options import Output
from worker.cli.submit.results import received
from worker.cli.submit.sender import JobSender
from worker.cli.submit.state import Counts, Received, SubmissionState

# An unused reply queue expires, so that its deletion need not be waited for any longer.
DELETE_TIMEOUT_S: Final = 5.0
# The queue counts as empty after so long without a result.
QUIET_S: Final = 1.0
FIRST_CONSUMERS_POLL_S: Final = 0.2
CONSUMERS_POLL_S: Final = 1.0
NO_CONSUMER: Final = "waiting: no worker is consuming"


class Collector:
    """Read results from the reply queue and store each once in the state file.

    Attributes:
        counts: the progress of the submission.
        unknown: the number of results that belong to no job of this submission.
        waits_for: why no result can arrive, for the progress; empty if unknown.
    """

    def __init__(
        self,
        state: SubmissionState,
        broker: Broker,
        queue: str,
        on_new: Callable[[Sequence[Received]], None] = lambda _: None,
    ) -> None:
        """`on_new` is called with results that have just been stored."""
        self._state = state
        self._queue = queue
        self._on_new = on_new
        self._reader = ReplyReader(broker, queue, self._take)
        self._arrived = asyncio.Event()
        self._is_reading = False
        self.counts = state.counts()
        self.unknown = 0
        self.waits_for = ""

    def progress(self) -> tuple[int, int, str]:
        """Return the numbers of results and of jobs, and a note with failures, tokens and cost."""
        is_lost = self._is_reading and not self._reader.is_connected
        note = "waiting for RabbitMQ" if is_lost else self.waits_for or self.counts.note()
        return self.counts.received, self.counts.total, note

    async def run(self, *, wait: bool) -> None:
        """Collect until every job has a result; without `wait`, only the results that are on the queue now.

        Raises:
            CommandError: the queue does not exist.
            BrokerRefusedError: the broker refuses the credentials.
        """
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(self._read(), name="results")
            self._is_reading = True
            try:
                await self._wait(None if wait else QUIET_S)
            finally:
                self._is_reading = False
                reading.cancel()

    async def _wait(self, quiet_s: float | None) -> None:
        while self.counts.pending:
            self._arrived.clear()
            try:
                async with asyncio.timeout(quiet_s):
                    await self._arrived.wait()
            except TimeoutError:
                if self._reader.is_connected:
                    return

    async def _read(self) -> None:
        try:
            await self._reader.run()
        except QueueMissingError:
            raise _reply_queue_missing(self._queue) from None

    def _take(self, replies: Sequence[Reply]) -> None:
        new, unknown = self._state.store([received(reply) for reply in replies])
        self.unknown += len(unknown)
        for one in new:
            self.counts.add(one)
        self._on_new(new)
        self._arrived.set()


@dataclass
class Collection:
    """Collect the results of one submission, deliver them to its output, and clean up.

    Attributes:
        wait_timeout_s: stop after so many seconds.
        is_temporary: delete the state file at the end.
    """

    state: SubmissionState
    broker: Broker
    screen: Screen
    output: Output
    wait_timeout_s: float | None = None
    is_temporary: bool = False

    def __post_init__(self) -> None:
        self._head = self.state.head()
        self._form = self.output.form_for(self._head["form"])
        self._stream: Stream | None = None
        if self.output.path is None and self._form != "csv":
            as_text = not self.screen.as_json and self.output.form is None
            self._stream = Stream(self.state, self._form, self.screen, as_text=as_text)

    async def run(self, sender: JobSender | None = None, *, no_wait: bool = False) -> int:
        """Collect until every job has a result, while `sender` submits them; return the exit code.

        `no_wait`: collect only what is there now.
        """
        if self._stream is not None:
            self._stream.print_all()
        on_new = self._stream.print_new if self._stream is not None else lambda _: None
        collector = Collector(self.state, self.broker, self._head["reply_to"], on_new)
        counts = collector.counts
        if counts.pending:
            if sender is None:
                await self._check_queue()
            bars = [Bar("submitted", sender.progress)] if sender is not None else []
            with show_progress(self.screen, *bars, Bar("results", collector.progress)):
                await self._collect(collector, sender, no_wait=no_wait)
        if collector.unknown:
            self.screen.note(f"Ignored {collector.unknown:,} unexpected results (unknown job id).")
        files = self._write()
        if not counts.pending:
            await delete_replies(self.state, self.broker, self.screen)
            if self.is_temporary:
                self.state.delete()
        self._print_summary(counts, files)
        return EXIT_FAILURE if counts.failed or counts.pending else EXIT_OK

    async def _check_queue(self) -> None:
        """Check that the queue exists, with a timeout: the collector itself would wait for the broker."""
        queue = self._head["reply_to"]
        try:
            await Session.once(self.broker, self.screen.timeout_s, partial(depth, queue=queue))
        except QueueMissingError:
            raise _reply_queue_missing(queue) from None

    async def _collect(self, collector: Collector, sender: JobSender | None, *, no_wait: bool) -> None:
        if no_wait:
            await collector.run(wait=False)
            return
        try:
            async with asyncio.timeout(self.wait_timeout_s), asyncio.TaskGroup() as group:
                if sender is not None:
                    group.create_task(sender.run(), name="sender")
                watching = group.create_task(self._watch_consumers(collector), name="consumers")
                await collector.run(wait=True)
                watching.cancel()
        except TimeoutError:
            pending = collector.counts.pending
            self.screen.note(f"{counted(pending, 'result')} pending after {self.wait_timeout_s:g} s.")

    async def _watch_consumers(self, collector: Collector) -> None:
        """Report when no worker consumes from the jobs queue."""
        queue, was_reported = self._head["jobs_queue"], False
        # Results that are there already arrive before.
        delay_s = FIRST_CONSUMERS_POLL_S
        async with Session(self.broker, "consumers") as session:
            while True:
                await asyncio.sleep(delay_s)
                delay_s = CONSUMERS_POLL_S
                try:
                    count = await session.call(partial(consumer_count, queue=queue))
                except (QueueMissingError, TopologyError):
                    return
                collector.waits_for = "" if count else NO_CONSUMER
                if not count and not was_reported:
                    was_reported = True
                    self.screen.note(
                        f"No worker is consuming from the queue {queue}. Start one (`vqa-worker run`); if one"
                        " runs, it is paused, and `vqa-worker check` shows why. The jobs wait in the queue."
                    )

    def _write(self) -> list[str]:
        """Write the output; return the names of the files."""
        if self.output.path is not None:
            return outputs.write(self.state, self._form, self.output.path, self.output.errors)
        if self._form == "csv":
            outputs.write_csv_to_stdout(self.state)
        return []

    def _print_summary(self, counts: Counts, files: list[str]) -> None:
        if self._stream is None or self.screen.is_terminal:
            pending = f"; {counts.pending:,} pending" if counts.pending else ""
            self.screen.note(f"{counts.succeeded:,} succeeded, {counts.note()}{pending}")
        if files:
            more = {"name": self._head["name"], "total_tokens": counts.tokens, "files": files}
            self.screen.emit({**counts.as_json(), **more})
            self.screen.note(f"Wrote {', '.join(files)}")


async def delete_replies(state: SubmissionState, broker: Broker, screen: Screen) -> None:
    """Delete the reply queue of a submission, unless another program reads it or it is deleted."""
    head = state.head()
    if not head["is_private"] or head.get("is_queue_deleted"):
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
