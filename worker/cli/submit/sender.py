"""Send the planned jobs of a state file, and record each broker confirm there.

Confirmed jobs are not sent again. A job that was sent and whose confirm was not recorded, because the process
was killed, may be on the queue or not: it is sent again with the same ids.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Final

from vqa_worker.rabbitmq.connection import Broker
from vqa_worker.rabbitmq.outgoing import RefusedError, TooLargeError, UnroutableError
from vqa_worker.rabbitmq.replies import QueueHiddenError, QueueMissingError, depth, job_message
from vqa_worker.rabbitmq.session import Session
from worker.cli.shell import CommandError
from worker.cli.submit.limits import Limits
from worker.cli.submit.state import SubmissionState, ToSend
from worker.rabbitmq.publisher import Publisher
from worker.rabbitmq.topology import Topology

# The jobs in flight at a time: at most so many lack a recorded confirm after a crash.
CHUNK_JOBS: Final = 500
CHUNK_BYTES: Final = 32 * 1024 * 1024
FULL_QUEUE_POLL_S: Final = 0.5
# The progress bar says so after this time without a confirm.
NO_CONFIRM_S: Final = 3.0


@dataclass
class JobSender:
    """Send the jobs of a state file to the jobs queue.

    Attributes:
        max_queue: the queue depth at which sending waits; 0: any depth.
        limits: what it counts the jobs in, and obeys.
        must_see_depth: whether it is an error if RabbitMQ hides the queue; otherwise any depth is accepted.
    """

    state: SubmissionState
    broker: Broker
    topology: Topology
    exchange: str
    reply_to: str
    max_queue: int
    limits: Limits
    must_see_depth: bool

    def __post_init__(self) -> None:
        self._publisher = Publisher(self.broker, self.topology, retry_refusals=False)
        self._session = Session(self.broker, "queue depth")
        self._full_queue_depth = 0
        self._waits_for_results = False
        self._confirmed_at = time.monotonic()
        self._was_refused = False
        counts = self.state.counts()
        self._confirmed_before = self.confirmed = counts.confirmed
        self.total = counts.total

    @property
    def is_refused(self) -> bool:
        """Whether RabbitMQ refused or returned a job, and has confirmed none."""
        return self._was_refused and self.confirmed == self._confirmed_before

    def progress(self) -> tuple[int, int, str]:
        """Return the numbers of confirmed and of all jobs, and a note with what it waits for."""
        note = ""
        if self.confirmed == self.total:
            pass
        elif not self._publisher.is_connected:
            note = "waiting for RabbitMQ"
        elif self._full_queue_depth:
            note = f"paused: {self._full_queue_depth:,} jobs on the queue (--max-queue)"
        elif self._waits_for_results:
            note = "paused: waiting for results (--max-cost)"
        elif time.monotonic() - self._confirmed_at > NO_CONFIRM_S:
            note = "waiting for confirms (queue full or alarm)"
        return self.confirmed, self.total, note

    async def run(self) -> None:
        """Send all jobs that are not confirmed, or as many as the limits allow.

        Raises:
            CommandError: the queue does not exist, or a job is too large for it.
            BrokerRefusedError: the broker refuses the credentials.
            RefusedError, TopologyError: the user lacks a permission.
        """
        last, jobs = 0, list[ToSend]()
        async with asyncio.TaskGroup() as group:
            publishing = group.create_task(self._publisher.run(), name="publisher")
            try:
                while jobs := jobs or self.state.unconfirmed(last, CHUNK_JOBS):
                    if not (room := await self._capacity(sum(not job.is_new for job in jobs))):
                        break
                    some = jobs[: min(room, _chunk_size(jobs))]
                    await self._send(some)
                    last, jobs = some[-1].ordinal, jobs[len(some) :]
            except QueueMissingError:
                raise jobs_queue_missing(self.topology.jobs) from None
            finally:
                publishing.cancel()
                await self._session.close()

    async def _capacity(self, sent_before: int) -> int:
        """Wait until jobs may be sent; return how many, or 0 if the limits allow no more.

        `sent_before`: the number of next jobs that were sent before, which the limits include already.
        """
        while True:
            self.limits.changed.clear()
            free = await self._queue_room()
            if self.limits.reason:
                return 0
            room = max(self.limits.room, sent_before)
            self._waits_for_results = not room
            if free and room:
                return min(free, room)
            await (self.limits.changed.wait() if free else asyncio.sleep(FULL_QUEUE_POLL_S))

    async def _queue_room(self) -> int:
        """Return how many jobs the queue may get, 0 if it is full."""
        if not self.max_queue:
            return CHUNK_JOBS
        try:
            found = await self._session.call(partial(depth, queue=self.topology.jobs))
        except QueueHiddenError:
            if self.must_see_depth:
                raise
            self.max_queue = 0
            return CHUNK_JOBS
        self._full_queue_depth = found if found >= self.max_queue else 0
        return max(0, self.max_queue - found)

    async def _send(self, jobs: Sequence[ToSend]) -> None:
        confirmed: list[ToSend] = []
        self._confirmed_at = time.monotonic()
        to_send = self.state.set_sent(jobs)
        self.confirmed += len(jobs) - len(to_send)
        self.limits.add_sent(sum(job.is_new for job in to_send))
        try:
            async with asyncio.TaskGroup() as group:
                for job in to_send:
                    group.create_task(self._send_one(job, confirmed))
        finally:
            self.state.set_confirmed(confirmed)

    async def _send_one(self, job: ToSend, confirmed: list[ToSend]) -> None:
        queue, exchange = self.topology.jobs, self.exchange
        message = job_message(job.id, job.body, queue, reply_to=self.reply_to, exchange=exchange)
        try:
            await self._publisher.publish(message)
        except RefusedError:
            self._was_refused = True
            raise
        except UnroutableError:
            self._was_refused = True
            text = f"no queue is bound to the exchange {exchange} with the routing key {queue}."
            raise CommandError(text) if exchange else jobs_queue_missing(queue) from None
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
    return max(1, sum(size <= CHUNK_BYTES for size in accumulate(len(job.body) for job in jobs)))
