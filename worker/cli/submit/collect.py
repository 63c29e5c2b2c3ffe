"""Collect a submission's results: read its reply queue, store them in the state file, print or write them."""

import asyncio
import json
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Final

from vqa_worker.rabbitmq.connection import Broker, BrokerUnreachableError
from vqa_worker.rabbitmq.replies import QueueMissingError, Reply, ReplyReader, delete_queue, depth
from vqa_worker.rabbitmq.session import Session
from worker.cli import outputs
from worker.cli.exit_codes import EXIT_FAILURE, EXIT_OK
from worker.cli.outputs import Output, Stream
from worker.cli.progress import Bar, results_note, show_progress
from worker.cli.shell import CommandError, Screen
from worker.cli.submit.sender import JobSender
from worker.cli.submit.state import Counts, Received, SubmissionState

# An unused reply queue expires, so that its deletion need not be waited for any longer.
DELETE_TIMEOUT_S: Final = 5.0
# The queue counts as empty after so long without a result.
QUIET_S: Final = 1.0


class Collector:
    """Read results from the reply queue and store each once in the state file.

    Attributes:
        counts: the progress of the submission.
        unknown: the number of results that belong to no job of this submission.
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

    def progress(self) -> tuple[int, int, str]:
        """Return the numbers of results and of jobs, and a note with failures, tokens and cost."""
        note = results_note(self.counts)
        waits = ", waiting for RabbitMQ" if self._is_reading and not self._reader.is_connected else ""
        return self.counts.received, self.counts.total, note + waits

    async def until_complete(self) -> None:
        """Collect until every job has a result.

        Raises:
            CommandError: the queue does not exist.
            BrokerRefusedError: the broker refuses the credentials.
        """
        await self._read_while(self._until_complete())

    async def until_quiet(self) -> None:
        """Collect the results that are on the queue now.

        Raises: as `until_complete`.
        """
        await self._read_while(self._until_quiet())

    async def _read_while(self, waiting: Coroutine[Any, Any, None]) -> None:
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(self._read(), name="results")
            self._is_reading = True
            try:
                await waiting
            finally:
                self._is_reading = False
                reading.cancel()

    async def _read(self) -> None:
        try:
            await self._reader.run()
        except QueueMissingError:
            raise _reply_queue_missing(self._queue) from None

    async def _until_complete(self) -> None:
        while self.counts.pending:
            self._arrived.clear()
            await self._arrived.wait()

    async def _until_quiet(self) -> None:
        while self.counts.pending:
            self._arrived.clear()
            try:
                async with asyncio.timeout(QUIET_S):
                    await self._arrived.wait()
            except TimeoutError:
                if self._reader.is_connected:
                    return

    def _take(self, replies: Sequence[Reply]) -> None:
        new, unknown = self._state.store([_received(reply) for reply in replies])
        self.unknown += len(unknown)
        for received in new:
            self.counts.add(received)
        self._on_new(new)
        self._arrived.set()


class Collection:
    """Collect the results of one submission, deliver them to its output, and clean up."""

    def __init__(
        self,
        state: SubmissionState,
        broker: Broker,
        screen: Screen,
        output: Output,
        *,
        timeout_s: float,
        is_temporary: bool = False,
    ) -> None:
        """`is_temporary`: delete the state file when all results are there."""
        self._state = state
        self._broker = broker
        self._screen = screen
        self._output = output
        self._timeout_s = timeout_s
        self._is_temporary = is_temporary
        self._head = state.head()
        self._form = output.form_for(self._head["form"])
        self._stream: Stream | None = None
        if output.path is None and self._form != "csv":
            as_text = not screen.as_json and output.form is None
            self._stream = Stream(state, self._form, screen, as_text=as_text)

    async def run(
        self, sender: JobSender | None = None, *, no_wait: bool = False, wait_timeout_s: float | None = None
    ) -> int:
        """Collect until every job has a result, while `sender` submits them; return the exit code.

        `no_wait`: collect only what is there now. `wait_timeout_s`: stop after so many seconds.
        """
        if self._stream is not None:
            self._stream.print_all()
        on_new = self._stream.print_new if self._stream is not None else lambda _: None
        collector = Collector(self._state, self._broker, self._head["reply_to"], on_new)
        if collector.counts.pending:
            if sender is None:
                await self._check_queue()
            bars = [Bar("results", collector.progress)]
            if sender is not None:
                bars.insert(0, Bar("submitted", sender.progress))
            async with show_progress(self._screen, bars):
                await self._collect(collector, sender, no_wait=no_wait, wait_timeout_s=wait_timeout_s)
        if collector.unknown:
            self._screen.note(f"Ignored {collector.unknown:,} unexpected results (unknown job id).")
        await self._finish(collector.counts)
        return EXIT_FAILURE if collector.counts.failed or collector.counts.pending else EXIT_OK

    async def _check_queue(self) -> None:
        """Check that the queue exists, with a timeout: the collector itself would wait for the broker."""
        queue = self._head["reply_to"]
        try:
            await Session.once(self._broker, self._timeout_s, partial(depth, queue=queue))
        except QueueMissingError:
            raise _reply_queue_missing(queue) from None

    async def _collect(
        self, collector: Collector, sender: JobSender | None, *, no_wait: bool, wait_timeout_s: float | None
    ) -> None:
        if no_wait:
            await collector.until_quiet()
            return
        try:
            async with asyncio.timeout(wait_timeout_s), asyncio.TaskGroup() as group:
                if sender is not None:
                    group.create_task(sender.run(), name="sender")
                group.create_task(collector.until_complete(), name="collector")
        except TimeoutError:
            self._screen.note(f"{collector.counts.pending:,} results pending after {wait_timeout_s:g} s.")

    async def _finish(self, counts: Counts) -> None:
        files = []
        if self._output.path is not None:
            files = outputs.write(self._state, self._form, self._output.path, self._output.errors)
        elif self._form == "csv":
            outputs.write_csv_to_stdout(self._state)
        if not counts.pending:
            await self._clean_up()
        self._print_summary(counts, [str(file) for file in files])

    async def _clean_up(self) -> None:
        """Delete the reply queue, and the state file of a question asked by hand."""
        if not self._head.get("is_queue_deleted"):
            delete = partial(delete_queue, name=self._head["reply_to"])
            try:
                await Session.once(self._broker, DELETE_TIMEOUT_S, delete)
                self._state.set_head({"is_queue_deleted": "1"})
            except BrokerUnreachableError:
                queue = self._head["reply_to"]
                self._screen.note(f"Could not delete the queue {queue}; RabbitMQ deletes it when it expires.")
        if self._is_temporary:
            self._state.delete()

    def _print_summary(self, counts: Counts, files: list[str]) -> None:
        pending = f"; {counts.pending:,} pending" if counts.pending else ""
        if self._stream is None or self._screen.is_terminal:
            self._screen.note(f"{counts.succeeded:,} succeeded, {results_note(counts)}{pending}")
        if files or (self._stream is None and self._form != "csv"):
            self._screen.emit(_summary(self._head["name"], counts, files))
        if files:
            self._screen.note(f"Wrote {', '.join(files)}")


def _summary(name: str, counts: Counts, files: list[str]) -> dict[str, Any]:
    return {
        "name": name,
        "jobs": counts.total,
        "succeeded": counts.succeeded,
        "failed": counts.failed,
        "pending": counts.pending,
        "total_tokens": counts.tokens,
        "cost_usd": counts.cost if counts.knows_cost else None,
        "files": files,
    }


def _reply_queue_missing(queue: str) -> CommandError:
    return CommandError(
        f"the queue {queue} does not exist any more: it was deleted, or it expired (--keep-days). Later"
        " results are on the workers' results queue, with the header vqa-undeliverable-to."
    )


def _received(reply: Reply) -> Received:
    """Read from a result what the progress shows; a malformed result counts as failed."""
    try:
        result = json.loads(reply.body)
    except ValueError:
        result = None
    if not isinstance(result, dict):
        result = {}
    usage = result.get("usage") or {}
    return Received(
        id=str(result.get("id")),
        body=reply.body,
        at=reply.at,
        failed=result.get("status") != "succeeded",
        tokens=usage.get("total_tokens") or 0,
        cost=usage.get("cost_usd"),
    )
