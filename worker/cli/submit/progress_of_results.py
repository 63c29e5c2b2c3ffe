"""Taking a submission's results from its own queue into its manifest."""

import asyncio
import json
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

from worker.cli.progress import results_note
from worker.cli.shell import CommandError
from worker.cli.submit.manifest import Manifest, Received
from worker.rabbitmq.connection import Broker
from worker.rabbitmq.replies import QueueMissingError, Reply, ReplyReader

# A queue whose results come one by one says nothing for so long only when it is empty.
QUIET_S: Final = 1.0


class Gathering:
    """Keeps results as they come, each once.

    Attributes:
        counts: how far the submission has come.
        strange: results that are of no job of this submission.
    """

    def __init__(
        self,
        manifest: Manifest,
        broker: Broker,
        queue: str,
        on_new: Callable[[Sequence[Received]], None] = lambda _: None,
    ) -> None:
        """`on_new` is told of results that have just been kept."""
        self._manifest = manifest
        self._queue = queue
        self._on_new = on_new
        self._reader = ReplyReader(broker, queue, self._take)
        self._came = asyncio.Event()
        self._is_reading = False
        self.counts = manifest.counts()
        self.strange = 0

    def progress(self) -> tuple[int, int, str]:
        """How many results there are, of how many, and what they come to."""
        note = results_note(self.counts)
        waits = ", waiting for the broker" if self._is_reading and not self._reader.is_connected else ""
        return self.counts.in_hand, self.counts.total, note + waits

    async def until_complete(self) -> None:
        """Gather until no result is missing.

        Raises:
            CommandError: the queue is gone.
            BrokerRefusedError: the broker refuses the credentials.
        """
        await self._while(self._until(lambda: not self.counts.missing))

    async def until_quiet(self) -> None:
        """Gather what is there now.

        Raises: as `until_complete`.
        """
        await self._while(self._until_quiet())

    async def _while(self, lasts: Coroutine[Any, Any, None]) -> None:
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(self._read(), name="results")
            self._is_reading = True
            try:
                await lasts
            finally:
                self._is_reading = False
                reading.cancel()

    async def _read(self) -> None:
        try:
            await self._reader.run()
        except QueueMissingError:
            raise gone(self._queue) from None

    async def _until(self, is_over: Callable[[], bool]) -> None:
        while not is_over():
            self._came.clear()
            await self._came.wait()

    async def _until_quiet(self) -> None:
        while self.counts.missing:
            self._came.clear()
            try:
                async with asyncio.timeout(QUIET_S):
                    await self._came.wait()
            except TimeoutError:
                if self._reader.is_connected:
                    return

    def _take(self, replies: Sequence[Reply]) -> None:
        new, strange = self._manifest.keep([_received(reply) for reply in replies])
        self.strange += len(strange)
        for received in new:
            self.counts.add(received)
        self._on_new(new)
        self._came.set()


def gone(queue: str) -> CommandError:
    """What to say of a reply queue that is not there."""
    return CommandError(
        f"the queue {queue} does not exist any more: it was deleted, or nobody read it for too long"
        " (--keep-days). What came later is in the workers' own results queue (header vqa-undeliverable-to)"
    )


def _received(reply: Reply) -> Received:
    """A result with what the progress needs of it, whatever else is wrong with it."""
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
