"""Send the planned jobs of a state file, and record each broker confirm there.

Confirmed jobs are not sent again. A job that was sent and whose confirm was not recorded, because the process
was killed, may be on the queue or not: it is sent again with the same ids.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Final

from vqa_worker.rabbitmq.connection import Broker
from vqa_worker.rabbitmq.outgoing import RefusedError, TooLargeError, UnroutableError
from vqa_worker.rabbitmq.replies import QueueMissingError, depth, job_message
from vqa_worker.rabbitmq.session import Session
from worker.cli.shell import CommandError
from worker.cli.submit.state import SubmissionState, ToSend
from worker.rabbitmq.publisher import Publisher
from worker.rabbitmq.topology import Topology

# The jobs in flight at a time: at most so many lack a recorded confirm after a crash.
CHUNK_JOBS: Final = 500
CHUNK_BYTES: Final = 32 * 1024 * 1024
FULL_QUEUE_POLL_S: Final = 0.5
# The progress bar says so after this time without a confirm.
NO_CONFIRM_S: Final = 3.0


class JobSender:
    """Send the jobs of a state file to the jobs queue."""

    def __init__(
        self,
        state: SubmissionState,
        broker: Broker,
        topology: Topology,
        *,
        exchange: str,
        reply_to: str,
        max_queue: int,
    ) -> None:
        """`max_queue`: the queue depth at which sending waits; 0: any depth."""
        self._state = state
        self._queue = topology.jobs
        self._publisher = Publisher(broker, topology, retry_refusals=False)
        self._session = Session(broker, "queue depth")
        self._exchange = exchange
        self._reply_to = reply_to
        self._max_queue = max_queue
        self._full_queue_depth = 0
        self._confirmed_at = time.monotonic()
        self._was_refused = False
        counts = state.counts()
        self._confirmed_before = self.confirmed = counts.confirmed
        self.total = counts.total

    @property
    def is_refused(self) -> bool:
        """Whether RabbitMQ refused or returned a job, and has confirmed none."""
        return self._was_refused and self.confirmed == self._confirmed_before

    def progress(self) -> tuple[int, int, str]:
        """Return the numbers of confirmed and of all jobs, and a note with what it waits for."""
        return self.confirmed, self.total, "" if self.confirmed == self.total else self._waits_for()

    def _waits_for(self) -> str:
        if not self._publisher.is_connected:
            return "waiting for RabbitMQ"
        if self._full_queue_depth:
            return f"paused: {self._full_queue_depth:,} jobs on the queue (--max-queue)"
        if time.monotonic() - self._confirmed_at > NO_CONFIRM_S:
            return "waiting for confirms (queue full or alarm)"
        return ""

    async def run(self) -> None:
        """Send all jobs that are not confirmed.

        Raises:
            CommandError: the queue does not exist, or a job is too large for it.
            BrokerRefusedError: the broker refuses the credentials.
            RefusedError, TopologyError: the user lacks a permission.
        """
        async with asyncio.TaskGroup() as group, aclosing(self._chunks()) as chunks:
            publishing = group.create_task(self._publisher.run(), name="publisher")
            try:
                async for jobs in chunks:
                    await self._send(jobs)
            except QueueMissingError:
                raise jobs_queue_missing(self._queue) from None
            finally:
                publishing.cancel()
                await self._session.close()

    async def _chunks(self) -> AsyncGenerator[Sequence[ToSend], None]:
        """Yield unconfirmed jobs, as many at a time as `max_queue` permits."""
        last = 0
        capacity = 0
        while jobs := self._state.unconfirmed(last, CHUNK_JOBS):
            if capacity <= 0:
                capacity = await self._capacity()
            jobs = jobs[: min(capacity, _chunk_size(jobs))]
            yield jobs
            capacity -= len(jobs)
            last = jobs[-1].ordinal

    async def _capacity(self) -> int:
        """Return how many jobs may be sent; wait while the queue is full."""
        if not self._max_queue:
            return CHUNK_JOBS
        read_depth = partial(depth, queue=self._queue)
        while (capacity := self._max_queue - await self._session.call(read_depth)) <= 0:
            self._full_queue_depth = self._max_queue - capacity
            await asyncio.sleep(FULL_QUEUE_POLL_S)
        self._full_queue_depth = 0
        self._confirmed_at = time.monotonic()
        return capacity

    async def _send(self, jobs: Sequence[ToSend]) -> None:
        confirmed: list[ToSend] = []
        self._state.set_sent(jobs)
        try:
            async with asyncio.TaskGroup() as group:
                for job in jobs:
                    group.create_task(self._send_one(job, confirmed))
        finally:
            self._state.set_confirmed(confirmed)

    async def _send_one(self, job: ToSend, confirmed: list[ToSend]) -> None:
        try:
            await self._publisher.publish(
                job_message(job.id, job.body, self._queue, reply_to=self._reply_to, exchange=self._exchange)
            )
        except RefusedError:
            self._was_refused = True
            raise
        except UnroutableError:
            self._was_refused = True
            if self._exchange:
                text = (
                    f"no queue is bound to the exchange {self._exchange} with the routing key {self._queue}."
                )
                raise CommandError(text) from None
            raise jobs_queue_missing(self._queue) from None
        except TooLargeError as error:
            raise CommandError(f"job {job.id}: {error}") from None
        confirmed.append(job)
        self.confirmed += 1
        self._confirmed_at = time.monotonic()


def jobs_queue_missing(queue: str) -> CommandError:
    """Return the error for a jobs queue that does not exist."""
    return CommandError(
        f"the queue {queue} does not exist. Start a worker, run `vqa-worker topology apply`, or check"
        " VQA_JOBS_QUEUE."
    )


def _chunk_size(jobs: Sequence[ToSend]) -> int:
    """Return how many jobs have at most `CHUNK_BYTES` together; at least 1."""
    size = 0
    for count, job in enumerate(jobs):
        size += len(job.body)
        if count and size > CHUNK_BYTES:
            return count
    return len(jobs)
