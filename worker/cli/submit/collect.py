"""Bringing in a submission's results: taken from the queue, told or written, and tidied up behind."""

import asyncio
from functools import partial
from typing import Final

from worker.cli import outputs
from worker.cli.outputs import Output, Stream
from worker.cli.progress import Bar, results_note, shown
from worker.cli.shell import EXIT_FAILURE, EXIT_OK, Screen
from worker.cli.submit.manifest import Counts, Manifest
from worker.cli.submit.progress_of_results import Gathering, gone
from worker.cli.submit.submission import Submission
from worker.rabbitmq.connection import Broker, BrokerUnreachableError
from worker.rabbitmq.replies import QueueMissingError, delete_queue, depth
from worker.rabbitmq.session import Session

# For something that happens by itself if it is left.
TIDY_UP_PATIENCE_S: Final = 5.0


class Harvest:
    """The results of one submission, on their way to where they are wanted."""

    def __init__(
        self,
        manifest: Manifest,
        broker: Broker,
        screen: Screen,
        output: Output,
        *,
        patience_s: float,
        is_passing: bool = False,
    ) -> None:
        """`is_passing`: nobody will come back to it, so that nothing of it is kept."""
        self._manifest = manifest
        self._broker = broker
        self._screen = screen
        self._output = output
        self._patience_s = patience_s
        self._is_passing = is_passing
        self._head = manifest.head()
        self._form = output.form_for(self._head["form"])
        self._stream: Stream | None = None
        if output.path is None and self._form != "csv":
            in_words = not screen.as_json and output.form is None
            self._stream = Stream(manifest, self._form, screen, in_words=in_words)

    async def bring_in(
        self, submission: Submission | None = None, *, only_now: bool = False, within_s: float | None = None
    ) -> int:
        """Gather until there is a result of each job, while they are being submitted; returns the exit code.

        `only_now`: only those that are there now; `within_s`: for so many seconds at most.
        """
        if self._stream is not None:
            self._stream.tell_all()
        on_new = self._stream.tell if self._stream is not None else lambda _: None
        gathering = Gathering(self._manifest, self._broker, self._head["reply_to"], on_new)
        if gathering.counts.missing:
            if submission is None:
                await self._knock()
            bars = [Bar("results", gathering.progress)]
            if submission is not None:
                bars.insert(0, Bar("submitted", submission.progress))
            async with shown(self._screen, bars):
                await self._gather(gathering, submission, only_now=only_now, within_s=within_s)
        if gathering.strange:
            self._screen.note(
                f"results in the queue that are of no job of this submission: {gathering.strange:,}"
            )
        await self._hand_over(gathering.counts)
        return EXIT_FAILURE if gathering.counts.failed or gathering.counts.missing else EXIT_OK

    async def _knock(self) -> None:
        """See that the queue is there; a broker that is out of reach is not waited for for ever."""
        queue = self._head["reply_to"]
        try:
            await Session.once(self._broker, self._patience_s, partial(depth, queue=queue))
        except QueueMissingError:
            raise gone(queue) from None

    async def _gather(
        self, gathering: Gathering, submission: Submission | None, *, only_now: bool, within_s: float | None
    ) -> None:
        if only_now:
            await gathering.until_quiet()
            return
        try:
            async with asyncio.timeout(within_s), asyncio.TaskGroup() as group:
                if submission is not None:
                    group.create_task(submission.run(), name="submission")
                group.create_task(gathering.until_complete(), name="gathering")
        except TimeoutError:
            self._screen.note(
                f"results that have not come within {within_s:g} s: {gathering.counts.missing:,}"
            )

    async def _hand_over(self, counts: Counts) -> None:
        files = []
        if self._output.path is not None:
            files = outputs.write(self._manifest, self._form, self._output.path, self._output.errors)
        elif self._form == "csv":
            outputs.write_csv_to_stdout(self._manifest)
        if not counts.missing:
            await self._tidy_up()
        self._tell(counts, [str(file) for file in files])

    async def _tidy_up(self) -> None:
        """The queue has served its purpose; so has the manifest of something that was only asked by hand."""
        if not self._head.get("is_tidy"):
            delete = partial(delete_queue, name=self._head["reply_to"])
            try:
                await Session.once(self._broker, TIDY_UP_PATIENCE_S, delete)
                self._manifest.set_head({"is_tidy": "1"})
            except BrokerUnreachableError:
                text = f"the queue {self._head['reply_to']} could not be deleted; it goes by itself"
                self._screen.note(text)
        if self._is_passing:
            self._manifest.delete()

    def _tell(self, counts: Counts, files: list[str]) -> None:
        summary = f"{counts.succeeded:,} answered, {results_note(counts)}"
        missing = f"; not there yet: {counts.missing:,}" if counts.missing else ""
        if self._stream is None or self._screen.is_watched:
            self._screen.note(summary + missing)
        if files or (self._stream is None and self._form != "csv"):
            self._screen.emit(
                {
                    "name": self._head["name"],
                    "jobs": counts.total,
                    "succeeded": counts.succeeded,
                    "failed": counts.failed,
                    "missing": counts.missing,
                    "total_tokens": counts.tokens,
                    "cost_usd": counts.cost if counts.knows_cost else None,
                    "files": files,
                }
            )
        if files:
            self._screen.note(f"written: {', '.join(files)}")
