"""Publish jobs, and compare every result with the expected one."""

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage

from tests.bench.contenders import Contender, jobs_queue_arguments
from tests.bench.images import Image

# The timeout for the next result, in seconds: afterwards a job is considered lost.
PATIENCE_S: Final = 90.0
_PUBLISHED_AT_ONCE: Final = 1000
_RETRY_DELAYS: Final = ("1", "5", "30", "120")


class WrongResultError(Exception):
    """A result is wrong or missing; the figures of the run are invalid."""


@dataclass
class Batch:
    """Numbered jobs, whose images are taken in turn."""

    name: str
    images: Sequence[Image]
    count: int
    as_link: bool = False
    is_answered: bytearray = field(default_factory=bytearray)
    answered: int = 0
    sent_at: dict[int, float] = field(default_factory=dict)
    took_s: dict[int, float] = field(default_factory=dict)
    """Seconds from `sent_at` to the result, for jobs with a time in `sent_at`."""
    wanted: int = 0
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when `wanted` jobs are answered."""

    def __post_init__(self) -> None:
        self.is_answered = bytearray(self.count)

    def job(self, number: int) -> tuple[str, bytes]:
        """Return id and JSON of a job."""
        job_id = f"{self.name}-{number}"
        url = self.images[number % len(self.images)].url
        job = {"id": job_id, "question": "What is on this image?", "images": [url]}
        return job_id, json.dumps(job).encode()

    def expected(self, number: int) -> str:
        """Return the expected answer."""
        image = self.images[number % len(self.images)]
        return image.link_answer if self.as_link else image.answer

    def check(self, number: int, answer: str | None) -> None:
        """Compare an answer.

        Raises:
            WrongResultError: The model API did not receive the exact image.
        """
        if answer != (expected := self.expected(number)):
            raise WrongResultError(f"{self.name}-{number}: the answer is {answer!r} instead of {expected!r}")
        if number in self.sent_at:
            self.took_s[number] = time.perf_counter() - self.sent_at[number]
        if not self.is_answered[number]:
            self.is_answered[number] = 1
            self.answered += 1
        if self.answered >= self.wanted:
            self.reached.set()


class Load:
    """The queues for one contender, and a connection to them."""

    def __init__(
        self, channel: AbstractChannel, contender: Contender, name: str, log: Callable[[], str]
    ) -> None:
        self._channel = channel
        self._contender = contender
        self._log = log
        self.jobs_queue = f"{name}.jobs"
        self.results_queue = f"{name}.results"
        self._batches: dict[str, Batch] = {}
        self._error: Exception | None = None
        self._stop_reading: Callable[[], Awaitable[object]]

    @classmethod
    @contextlib.asynccontextmanager
    async def on(
        cls, url: str, contender: Contender, name: str, log: Callable[[], str]
    ) -> AsyncIterator["Load"]:
        """Declare the queues; delete them at the end of the context."""
        connection = await aio_pika.connect(url)
        async with connection:
            load = cls(await connection.channel(), contender, name, log)
            await load._declare()
            yield load
            # Not after an error: then the broker is stopped.
            await load._delete()

    async def publish_all(self, batch: Batch) -> float:
        """Publish all jobs and wait for all results; return the seconds it took."""
        started = time.perf_counter()
        await asyncio.gather(self.publish(batch, range(batch.count)), self.wait_for(batch, batch.count))
        return time.perf_counter() - started

    async def with_outstanding(self, batch: Batch, outstanding: int) -> float:
        """Do the same with a constant number of published jobs without a result."""
        started = time.perf_counter()
        self._batches[batch.name] = batch
        sent = 0
        while sent < batch.count:
            upto = min(batch.count, batch.answered + outstanding)
            await self.publish(batch, range(sent, upto))
            sent = upto
            await self.wait_for(batch, min(batch.count, sent - outstanding + 1))
        await self.wait_for(batch, batch.count)
        return time.perf_counter() - started

    async def publish_at_rate(self, batch: Batch, jobs_per_s: float, *, broker_only: bool = False) -> float:
        """Publish at random times (Poisson), independent of results; return the actual rate.

        Args:
            batch: The jobs.
            jobs_per_s: The average rate.
            broker_only: Publish results instead of jobs, to measure the broker alone.
        """
        publish_one = self._publish_result if broker_only else self._publish_one
        # The same gaps for every contender.
        gaps = random.Random(1)  # noqa: S311 - no secret
        started = due = time.perf_counter()
        self._batches[batch.name] = batch
        publishing = []
        for number in range(batch.count):
            due += gaps.expovariate(jobs_per_s)
            if (wait_s := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait_s)
            batch.sent_at[number] = time.perf_counter()
            publishing.append(asyncio.create_task(publish_one(batch, number)))
        sent_in_s = time.perf_counter() - started
        await asyncio.gather(*publishing)
        await self.wait_for(batch, batch.count)
        return batch.count / sent_in_s

    async def publish(self, batch: Batch, numbers: range) -> None:
        """Publish some of the jobs and wait for the confirms."""
        self._batches[batch.name] = batch
        for begin in range(numbers.start, numbers.stop, _PUBLISHED_AT_ONCE):
            part = range(begin, min(begin + _PUBLISHED_AT_ONCE, numbers.stop))
            await asyncio.gather(*(self._publish_one(batch, number) for number in part))

    async def wait_for(self, batch: Batch, answered: int) -> None:
        """Wait until `answered` jobs of the batch have a result.

        Raises:
            WrongResultError: A result is wrong, or none arrived for `PATIENCE_S`.
        """
        self._batches[batch.name] = batch
        batch.wanted = answered
        while batch.answered < answered and self._error is None:
            before = batch.answered
            batch.reached.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(batch.reached.wait(), PATIENCE_S)
            if batch.answered == before and self._error is None:
                missing = batch.count - batch.answered
                raise WrongResultError(self._describe(f"{missing} of {batch.count} results are missing"))
        if self._error is not None:
            raise WrongResultError(self._describe(self._error))

    def _describe(self, what: object) -> str:
        return f"{self._contender.name}: {what}\nThe end of its log:\n{self._log()}"

    async def _publish_one(self, batch: Batch, number: int) -> None:
        message = self._contender.message(*batch.job(number))
        await self._channel.default_exchange.publish(message, self.jobs_queue)

    async def _publish_result(self, batch: Batch, number: int) -> None:
        job_id, _ = batch.job(number)
        result = {"id": job_id, "answer": batch.expected(number)}
        message = aio_pika.Message(
            json.dumps(result).encode(), delivery_mode=aio_pika.DeliveryMode.PERSISTENT
        )
        await self._channel.default_exchange.publish(message, self.results_queue)

    async def _receive(self, message: AbstractIncomingMessage) -> None:
        result = json.loads(message.body)
        name, _, number = (result.get("id") or "-").rpartition("-")
        batch = self._batches.get(name)
        try:
            if batch is None:
                raise WrongResultError(f"a result for an unknown job: {result}")  # noqa: TRY301 - reported in one place
            batch.check(int(number), result.get("answer"))
        except WrongResultError as error:
            self._error = self._error or WrongResultError(f"{error}; the whole result: {result}")
            for each in self._batches.values():
                each.reached.set()

    async def _declare(self) -> None:
        arguments = jobs_queue_arguments(self._contender, self.jobs_queue)
        await self._channel.declare_queue(self.jobs_queue, durable=True, arguments=arguments)
        results = await self._channel.declare_queue(
            self.results_queue, durable=True, arguments={"x-queue-type": "quorum"}
        )
        # An interrupted run is repeated from the start: no acks needed.
        tag = await results.consume(self._receive, no_ack=True)
        self._stop_reading = lambda: results.cancel(tag)

    async def _delete(self) -> None:
        await self._stop_reading()
        retries = [f"{self.jobs_queue}.retry.{delay}s" for delay in _RETRY_DELAYS]
        for name in (self.jobs_queue, self.results_queue, f"{self.jobs_queue}.dead", *retries):
            await self._channel.queue_delete(name)
