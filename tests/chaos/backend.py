"""Publishes jobs and reads results as a careful backend would: it outlives the broker and loses nothing."""

import asyncio
import contextlib
import itertools
import json
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage
from aio_pika.exceptions import CONNECTION_EXCEPTIONS, DeliveryError, PublishError

from tests.chaos.jobs import Asked
from worker.rabbitmq.connection import connection_losses

# What goes wrong while the broker is away or coming back.
_TROUBLE: Final = (*CONNECTION_EXCEPTIONS, DeliveryError, PublishError, TimeoutError)
_AGAIN_S: Final = 0.3


@dataclass(frozen=True)
class Got:
    """A message that was read: a result or a dead letter."""

    queue: str
    message_id: str | None
    body: bytes
    headers: Mapping[str, Any]
    correlation_id: str | None
    at: float
    """Unix time."""

    def json(self) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(self.body)
        return body


class _Connection(aio_pika.Connection):
    """Left half open, one would be closed when it is collected as garbage, in whichever thread that is."""

    async def connect(self, timeout: aio_pika.abc.TimeoutType = None) -> None:  # noqa: ASYNC109 - the library's
        try:
            await super().connect(timeout)
        except BaseException:
            await self.close()
            raise


class Backend:
    """One connection that publishes and one that reads, each made again whenever it is lost."""

    def __init__(self, url: str, *, jobs: str, results: str, dead_letters: str, private: str) -> None:
        self._url = url
        self._jobs, self._results, self._private = jobs, results, private
        self._dead_letters = dead_letters
        self._publishing: AbstractChannel | None = None
        self._reading: AbstractChannel | None = None
        self._can_publish = asyncio.Event()
        self._can_read = asyncio.Event()
        self._reads_results = True
        # By the message's own id: what the reader gets twice because its ack was lost is one message.
        self._got: dict[tuple[str, str | None], Got] = {}
        self.received: Counter[str | None] = Counter()
        """How many results have come for each job, by its id."""

    @classmethod
    @contextlib.asynccontextmanager
    async def connected(cls, url: str, **queues: str) -> AsyncIterator[Self]:
        """Connected for as long as the context lasts."""
        backend = cls(url, **queues)
        tasks = [
            asyncio.create_task(backend._publish_for_ever()),
            asyncio.create_task(backend._read_for_ever()),
        ]
        try:
            await asyncio.wait_for(backend._can_read.wait(), 60)
            yield backend
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def results(self) -> list[Got]:
        """The results so far, in the order of their arrival."""
        return [got for got in self._got.values() if got.queue != self._dead_letters]

    @property
    def dead_letters(self) -> list[Got]:
        return [got for got in self._got.values() if got.queue == self._dead_letters]

    async def submit(self, asked: Asked) -> None:
        """Publish a job until the broker has confirmed it; each submission is a message of its own."""
        message_id = uuid.uuid4().hex if asked.id_in_body else asked.id
        message = aio_pika.Message(
            asked.body,
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            message_id=message_id,
            correlation_id=f"for {asked.id}",
            reply_to=asked.reply_to,
            timestamp=time.time(),
        )
        asked.doubtful += await self._publish_surely(message, "", self._jobs)
        asked.sent_at.append(time.time())

    async def cancel(self, asked: Asked) -> None:
        """Take a job back."""
        message = aio_pika.Message(json.dumps({"cancel": asked.id}).encode())
        await self._publish_surely(message, f"{self._jobs}.control", "")

    async def depth(self, queue: str) -> int:
        """How many messages are ready in a queue; asked on a fresh connection, which has nothing cached."""
        connection = await self._connect()
        async with connection:
            channel = await connection.channel()
            declared = await channel.declare_queue(queue, passive=True)
            return declared.declaration_result.message_count or 0

    @contextlib.asynccontextmanager
    async def reading_no_results(self) -> AsyncIterator[None]:
        """Leave the results where they are."""
        await self._read_results(on=False)
        try:
            yield
        finally:
            await self._read_results(on=True)

    async def _connect(self) -> AbstractConnection:
        return await aio_pika.connect(self._url, timeout=10, heartbeat=10, connection_class=_Connection)

    async def _publish_surely(self, message: aio_pika.Message, exchange: str, key: str) -> int:
        """Publish until it is confirmed; returns how often that was without success."""
        for vain in itertools.count():
            if await self._publish(message, exchange, key):
                return vain
            await asyncio.sleep(_AGAIN_S)
        raise AssertionError

    async def _publish(self, message: aio_pika.Message, exchange: str, key: str) -> bool:
        await self._can_publish.wait()
        channel = self._publishing
        if channel is None:
            return False
        try:
            with connection_losses():
                target = (
                    await channel.get_exchange(exchange, ensure=False)
                    if exchange
                    else channel.default_exchange
                )
                await target.publish(message, key, mandatory=not exchange)
        except _TROUBLE:
            return False
        return True

    async def _publish_for_ever(self) -> None:
        async def serve(connection: AbstractConnection) -> None:
            channel = await connection.channel(on_return_raises=True)
            self._publishing = channel
            self._can_publish.set()
            await channel.closed()

        await self._keep(serve, self._can_publish)

    async def _read_for_ever(self) -> None:
        async def serve(connection: AbstractConnection) -> None:
            channel = await connection.channel()
            self._reading = channel
            await channel.declare_queue(self._private, durable=True, arguments={"x-queue-type": "quorum"})
            for queue in (
                self._private,
                self._dead_letters,
                *([self._results] if self._reads_results else []),
            ):
                await self._consume(channel, queue)
            self._can_read.set()
            await channel.closed()

        await self._keep(serve, self._can_read)

    async def _keep(
        self, serve: Callable[[AbstractConnection], Awaitable[None]], is_up: asyncio.Event
    ) -> None:
        while True:
            with contextlib.suppress(*_TROUBLE), connection_losses():
                connection = await self._connect()
                async with connection:
                    await serve(connection)
            is_up.clear()
            await asyncio.sleep(_AGAIN_S)

    async def _read_results(self, *, on: bool) -> None:
        self._reads_results = on
        while self._reads_results == on:
            await self._can_read.wait()
            with contextlib.suppress(*_TROUBLE), connection_losses():
                assert self._reading is not None
                await (self._consume if on else self._cancel)(self._reading, self._results)
                return
            await asyncio.sleep(_AGAIN_S)

    async def _consume(self, channel: AbstractChannel, queue: str) -> None:
        handle = await channel.get_queue(queue, ensure=False)

        async def receive(message: AbstractIncomingMessage) -> None:
            self._receive(queue, message)
            with contextlib.suppress(*_TROUBLE):
                await message.ack()

        await handle.consume(receive, consumer_tag=queue)

    async def _cancel(self, channel: AbstractChannel, queue: str) -> None:
        handle = await channel.get_queue(queue, ensure=False)
        await handle.cancel(queue)

    def _receive(self, queue: str, message: AbstractIncomingMessage) -> None:
        got = Got(
            queue,
            message.message_id,
            message.body,
            dict(message.headers),
            message.correlation_id,
            time.time(),
        )
        if self._got.setdefault((queue, message.message_id), got) is got and queue != self._dead_letters:
            self.received[got.json()["id"]] += 1


def by_job(results: list[Got]) -> Iterator[tuple[str | None, Got]]:
    """Each result with the id of its job."""
    for got in results:
        yield got.json()["id"], got
