"""Sending what a manifest has planned: the jobs, each confirmed by the broker.

What is confirmed is written down, so that nothing is submitted twice however often this is broken off. One
doubt remains: jobs that were sent and whose confirm was not yet written down. They may be in the queue or
not, and are sent again, under the same ids.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Final

from worker.cli.shell import CommandError
from worker.cli.submit.manifest import Manifest, ToSend
from worker.rabbitmq.connection import Broker
from worker.rabbitmq.outgoing import TooLargeError, UnroutableError
from worker.rabbitmq.publisher import Publisher
from worker.rabbitmq.replies import QueueMissingError, depth, job_message
from worker.rabbitmq.session import Session
from worker.rabbitmq.topology import Topology

# Sent at once: so many can be in doubt after a crash.
CHUNK_JOBS: Final = 500
CHUNK_BYTES: Final = 32 * 1024 * 1024
FULL_QUEUE_LOOK_S: Final = 0.5
# After so long without a confirm a person is told.
SILENCE_S: Final = 3.0


class Submission:
    """Sends the jobs of a manifest to the queue."""

    def __init__(
        self,
        manifest: Manifest,
        broker: Broker,
        topology: Topology,
        *,
        exchange: str,
        reply_to: str,
        max_queue: int,
    ) -> None:
        """`max_queue`: how many jobs may wait in the queue before this waits too; 0: any number."""
        self._manifest = manifest
        self._queue = topology.jobs
        self._publisher = Publisher(broker, topology, retry_refusals=False)
        self._session = Session(broker, "queue depth")
        self._exchange = exchange
        self._reply_to = reply_to
        self._max_queue = max_queue
        self._waits_in_queue = 0
        self._confirmed_at = time.monotonic()
        counts = manifest.counts()
        self.confirmed = counts.confirmed
        self.total = counts.total

    def progress(self) -> tuple[int, int, str]:
        """How many jobs are in the queue, of how many, and what it is waiting for, if it waits."""
        return self.confirmed, self.total, "" if self.confirmed == self.total else self._state()

    def _state(self) -> str:
        if not self._publisher.is_connected:
            return "waiting for the broker"
        if self._waits_in_queue:
            return f"waiting: the queue holds {self._waits_in_queue:,} (--max-queue {self._max_queue:,})"
        if time.monotonic() - self._confirmed_at > SILENCE_S:
            return "waiting: the broker takes no jobs (the queue is full, or it has an alarm)"
        return ""

    async def run(self) -> None:
        """Send all that is not known to be in the queue.

        Raises:
            CommandError: the queue is missing, or takes no job of this size.
            BrokerRefusedError, RefusedError, TopologyError: it refuses the user, or what the user does.
        """
        async with asyncio.TaskGroup() as group, aclosing(self._chunks()) as chunks:
            publishing = group.create_task(self._publisher.run(), name="publisher")
            try:
                async for jobs in chunks:
                    await self._send(jobs)
            except QueueMissingError:
                raise missing(self._queue) from None
            finally:
                publishing.cancel()
                await self._session.close()

    async def _chunks(self) -> AsyncGenerator[Sequence[ToSend], None]:
        """What is to be sent, as much at a time as the queue has room for."""
        last = 0
        room = 0
        while jobs := self._manifest.unconfirmed(last, CHUNK_JOBS):
            if room <= 0:
                room = await self._room()
            jobs = jobs[: min(room, _fitting(jobs))]
            yield jobs
            room -= len(jobs)
            last = jobs[-1].ordinal

    async def _room(self) -> int:
        """How many jobs the queue has room for; waits until there is some."""
        if not self._max_queue:
            return CHUNK_JOBS
        while (room := self._max_queue - await self._session.call(partial(depth, queue=self._queue))) <= 0:
            self._waits_in_queue = self._max_queue - room
            await asyncio.sleep(FULL_QUEUE_LOOK_S)
        self._waits_in_queue = 0
        self._confirmed_at = time.monotonic()
        return room

    async def _send(self, jobs: Sequence[ToSend]) -> None:
        confirmed: list[ToSend] = []
        self._manifest.about_to_send(jobs)
        try:
            async with asyncio.TaskGroup() as group:
                for job in jobs:
                    group.create_task(self._send_one(job, confirmed))
        finally:
            self._manifest.are_confirmed(confirmed)

    async def _send_one(self, job: ToSend, confirmed: list[ToSend]) -> None:
        try:
            await self._publisher.publish(
                job_message(job.id, job.body, self._queue, reply_to=self._reply_to, exchange=self._exchange)
            )
        except UnroutableError:
            if self._exchange:
                text = f"no queue is bound to the exchange {self._exchange} for {self._queue}"
                raise CommandError(text) from None
            raise missing(self._queue) from None
        except TooLargeError as error:
            raise CommandError(f"{job.id}: {error}") from None
        confirmed.append(job)
        self.confirmed += 1
        self._confirmed_at = time.monotonic()


def missing(queue: str) -> CommandError:
    """What to say of a jobs queue that is not there."""
    return CommandError(
        f"the queue {queue} does not exist: start a worker, or make it with `vqa-worker topology apply`;"
        " or is VQA_JOBS_QUEUE another one?"
    )


def _fitting(jobs: Sequence[ToSend]) -> int:
    """How many of them may be on their way at a time: one at least."""
    size = 0
    for count, job in enumerate(jobs):
        size += len(job.body)
        if count and size > CHUNK_BYTES:
            return count
    return len(jobs)
