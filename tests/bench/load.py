"""The publisher's and the reader's side: sends jobs, and compares every result with what it must be."""

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
from tests.bench.pictures import Picture

# A contender that gives no result for so long has lost a job, or has stopped.
PATIENCE_S: Final = 90.0
_PUBLISHED_AT_ONCE: Final = 1000
_RETRY_DELAYS: Final = ("1", "5", "30", "120")


class WrongError(Exception):
    """A result was wrong, or none came; no figure of this run means anything."""


@dataclass
class Batch:
    """Jobs that belong together, each with the picture whose place its number gives."""

    name: str
    pictures: Sequence[Picture]
    count: int
    as_link: bool = False
    is_answered: bytearray = field(default_factory=bytearray)
    answered: int = 0
    sent_at: dict[int, float] = field(default_factory=dict)
    took_s: dict[int, float] = field(default_factory=dict)
    """For jobs with a time in `sent_at`: from there to the result."""
    wanted: int = 0
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    """Set as soon as `wanted` jobs are answered."""

    def __post_init__(self) -> None:
        self.is_answered = bytearray(self.count)

    def job(self, number: int) -> tuple[str, bytes]:
        """Id and JSON of a job."""
        job_id = f"{self.name}-{number}"
        url = self.pictures[number % len(self.pictures)].url
        job = {"id": job_id, "question": "What is on this picture?", "images": [url]}
        return job_id, json.dumps(job).encode()

    def expected(self, number: int) -> str:
        """The answer that is right."""
        picture = self.pictures[number % len(self.pictures)]
        return picture.answer_to_link if self.as_link else picture.answer

    def check(self, number: int, answer: str | None) -> None:
        """Compare an answer.

        Raises:
            WrongError: the bytes of the picture did not all get where they had to.
        """
        if answer != (expected := self.expected(number)):
            raise WrongError(f"{self.name}-{number}: the answer is {answer!r}, and must be {expected!r}")
        if number in self.sent_at:
            self.took_s[number] = time.perf_counter() - self.sent_at[number]
        if not self.is_answered[number]:
            self.is_answered[number] = 1
            self.answered += 1
        if self.answered >= self.wanted:
            self.reached.set()


class Load:
    """Queues of their own for one contender's process, and a connection to them."""

    def __init__(
        self, channel: AbstractChannel, contender: Contender, name: str, log: Callable[[], str]
    ) -> None:
        self._channel = channel
        self._contender = contender
        self._log = log
        self.jobs_queue = f"{name}.jobs"
        self.results_queue = f"{name}.results"
        self._batches: dict[str, Batch] = {}
        self._wrong: Exception | None = None
        self._stop_reading: Callable[[], Awaitable[object]]

    @classmethod
    @contextlib.asynccontextmanager
    async def on(
        cls, url: str, contender: Contender, name: str, log: Callable[[], str]
    ) -> AsyncIterator["Load"]:
        """The queues are there, and empty, in the block, and deleted after it."""
        connection = await aio_pika.connect(url)
        async with connection:
            load = cls(await connection.channel(), contender, name, log)
            await load._declare()
            yield load
            # After an error the whole broker goes.
            await load._delete()

    async def all_of(self, batch: Batch) -> float:
        """Publish all, wait for all results; return the seconds from the first to the last."""
        began = time.perf_counter()
        await asyncio.gather(self.publish(batch, range(batch.count)), self.wait_for(batch, batch.count))
        return time.perf_counter() - began

    async def keeping(self, batch: Batch, outstanding: int) -> float:
        """As `all_of`, with so many jobs published and not answered at any time."""
        began = time.perf_counter()
        self._batches[batch.name] = batch
        sent = 0
        while sent < batch.count:
            upto = min(batch.count, batch.answered + outstanding)
            await self.publish(batch, range(sent, upto))
            sent = upto
            await self.wait_for(batch, min(batch.count, sent - outstanding + 1))
        await self.wait_for(batch, batch.count)
        return time.perf_counter() - began

    async def at_rate(self, batch: Batch, jobs_per_s: float, *, past_contender: bool = False) -> float:
        """Publish at times that answers do not influence (Poisson); return the rate that came about.

        Args:
            batch: The jobs.
            jobs_per_s: How many, on average.
            past_contender: Publish the results instead of the jobs: what is measured is the broker alone.
        """
        publish_one = self._publish_result if past_contender else self._publish_one
        # The same gaps for every contender.
        gaps = random.Random(1)  # noqa: S311 - no secret
        began = due = time.perf_counter()
        self._batches[batch.name] = batch
        publishing = []
        for number in range(batch.count):
            due += gaps.expovariate(jobs_per_s)
            if (wait_s := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait_s)
            batch.sent_at[number] = time.perf_counter()
            publishing.append(asyncio.create_task(publish_one(batch, number)))
        sent_in_s = time.perf_counter() - began
        await asyncio.gather(*publishing)
        await self.wait_for(batch, batch.count)
        return batch.count / sent_in_s

    async def publish(self, batch: Batch, numbers: range) -> None:
        """Publish some of the jobs, confirmed."""
        self._batches[batch.name] = batch
        for begin in range(numbers.start, numbers.stop, _PUBLISHED_AT_ONCE):
            part = range(begin, min(begin + _PUBLISHED_AT_ONCE, numbers.stop))
            await asyncio.gather(*(self._publish_one(batch, number) for number in part))

    async def wait_for(self, batch: Batch, answered: int) -> None:
        """Wait until so many of the batch have their result.

        Raises:
            WrongError: one was wrong, or none came for a long time.
        """
        self._batches[batch.name] = batch
        batch.wanted = answered
        while batch.answered < answered and self._wrong is None:
            before = batch.answered
            batch.reached.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(batch.reached.wait(), PATIENCE_S)
            if batch.answered == before and self._wrong is None:
                missing = batch.count - batch.answered
                raise WrongError(
                    self._told(f"{missing} results of {batch.count} are missing, and no more come")
                )
        if self._wrong is not None:
            raise WrongError(self._told(self._wrong))

    def _told(self, what: object) -> str:
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
                raise WrongError(f"a result that nobody asked for: {result}")  # noqa: TRY301 - reported in one place
            batch.check(int(number), result.get("answer"))
        except WrongError as error:
            self._wrong = self._wrong or WrongError(f"{error}; the whole result: {result}")
            for each in self._batches.values():
                each.reached.set()

    async def _declare(self) -> None:
        arguments = jobs_queue_arguments(self._contender, self.jobs_queue)
        await self._channel.declare_queue(self.jobs_queue, durable=True, arguments=arguments)
        results = await self._channel.declare_queue(
            self.results_queue, durable=True, arguments={"x-queue-type": "quorum"}
        )
        # What is read is checked at once, and a run that is interrupted is worth nothing: no acks needed.
        tag = await results.consume(self._receive, no_ack=True)
        self._stop_reading = lambda: results.cancel(tag)

    async def _delete(self) -> None:
        await self._stop_reading()
        retries = [f"{self.jobs_queue}.retry.{delay}s" for delay in _RETRY_DELAYS]
        for name in (self.jobs_queue, self.results_queue, f"{self.jobs_queue}.dead", *retries):
            await self._channel.queue_delete(name)
