"""Publish jobs and consume results, reconnecting after each connection failure."""

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

from tests.chaos.jobs import ExpectedJob
from vqa_worker.rabbitmq.connection import Broker, BrokerUnreachableError, connection_losses

# Errors while the broker is down or restarting.
_ERRORS: Final = (*CONNECTION_EXCEPTIONS, BrokerUnreachableError, DeliveryError, PublishError, TimeoutError)
_RETRY_DELAY_S: Final = 0.3


@dataclass(frozen=True)
class ReceivedMessage:
    """A consumed message: a result or a dead letter."""

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


class Backend:
    """Publish on one connection and consume on another; reconnect both when they are lost."""

    def __init__(self, url: str, *, jobs: str, results: str, dead_letters: str, private: str) -> None:
        self._url = url
        self._jobs, self._results, self._private = jobs, results, private
        self._dead_letters = dead_letters
        self._publish_channel: AbstractChannel | None = None
        self._consume_channel: AbstractChannel | None = None
        self._can_publish = asyncio.Event()
        self._can_consume = asyncio.Event()
        self._consumes_results = True
        # By message id: a redelivery after a lost ack counts once.
        self._messages: dict[tuple[str, str | None], ReceivedMessage] = {}
        self.received: Counter[str | None] = Counter()
        """The number of results by job id."""

    @classmethod
    @contextlib.asynccontextmanager
    async def connected(cls, url: str, **queues: str) -> AsyncIterator[Self]:
        """Stay connected in this context."""
        backend = cls(url, **queues)
        tasks = [
            asyncio.create_task(backend._keep_publisher_connected()),
            asyncio.create_task(backend._keep_consumer_connected()),
        ]
        try:
            await asyncio.wait_for(backend._can_consume.wait(), 60)
            yield backend
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def results(self) -> list[ReceivedMessage]:
        """The results so far, in order of arrival."""
        return [got for got in self._messages.values() if got.queue != self._dead_letters]

    @property
    def dead_letters(self) -> list[ReceivedMessage]:
        return [got for got in self._messages.values() if got.queue == self._dead_letters]

    async def submit(self, job: ExpectedJob) -> None:
        """Publish a job until the broker confirms it."""
        message_id = uuid.uuid4().hex if job.id_in_body else job.id
        message = aio_pika.Message(
            job.body,
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            message_id=message_id,
            correlation_id=f"for {job.id}",
            reply_to=job.reply_to,
            timestamp=time.time(),
        )
        job.unconfirmed += await self._publish_until_confirmed(message, "", self._jobs)
        job.sent_at.append(time.time())

    async def cancel(self, job: ExpectedJob) -> None:
        """Publish a cancel message."""
        message = aio_pika.Message(json.dumps({"cancel": job.id}).encode())
        await self._publish_until_confirmed(message, f"{self._jobs}.control", "")

    async def depth(self, queue: str) -> int:
        """Return the number of ready messages; use a new connection, which has no cached declaration."""
        connection = await self._connect()
        async with connection:
            channel = await connection.channel()
            declared = await channel.declare_queue(queue, passive=True)
            return declared.declaration_result.message_count or 0

    @contextlib.asynccontextmanager
    async def results_paused(self) -> AsyncIterator[None]:
        """Do not consume results in this context."""
        await self._set_consuming_results(on=False)
        try:
            yield
        finally:
            await self._set_consuming_results(on=True)

    async def _connect(self) -> AbstractConnection:
        return await Broker(self._url, None, "backend").connect()

    async def _publish_until_confirmed(self, message: aio_pika.Message, exchange: str, key: str) -> int:
        """Publish until confirmed; return the number of failed attempts."""
        for failures in itertools.count():
            if await self._publish(message, exchange, key):
                return failures
            await asyncio.sleep(_RETRY_DELAY_S)
        raise AssertionError

    async def _publish(self, message: aio_pika.Message, exchange: str, key: str) -> bool:
        await self._can_publish.wait()
        channel = self._publish_channel
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
        except _ERRORS:
            return False
        return True

    async def _keep_publisher_connected(self) -> None:
        async def serve(connection: AbstractConnection) -> None:
            channel = await connection.channel(on_return_raises=True)
            self._publish_channel = channel
            self._can_publish.set()
            await channel.closed()

        await self._keep_connected(serve, self._can_publish)

    async def _keep_consumer_connected(self) -> None:
        async def serve(connection: AbstractConnection) -> None:
            channel = await connection.channel()
            self._consume_channel = channel
            await channel.declare_queue(self._private, durable=True, arguments={"x-queue-type": "quorum"})
            for queue in (
                self._private,
                self._dead_letters,
                *([self._results] if self._consumes_results else []),
            ):
                await self._consume(channel, queue)
            self._can_consume.set()
            await channel.closed()

        await self._keep_connected(serve, self._can_consume)

    async def _keep_connected(
        self, serve: Callable[[AbstractConnection], Awaitable[None]], is_up: asyncio.Event
    ) -> None:
        while True:
            with contextlib.suppress(*_ERRORS), connection_losses():
                connection = await self._connect()
                async with connection:
                    await serve(connection)
            is_up.clear()
            await asyncio.sleep(_RETRY_DELAY_S)

    async def _set_consuming_results(self, *, on: bool) -> None:
        self._consumes_results = on
        while self._consumes_results == on:
            await self._can_consume.wait()
            with contextlib.suppress(*_ERRORS), connection_losses():
                assert self._consume_channel is not None
                await (self._consume if on else self._cancel)(self._consume_channel, self._results)
                return
            await asyncio.sleep(_RETRY_DELAY_S)

    async def _consume(self, channel: AbstractChannel, queue: str) -> None:
        handle = await channel.get_queue(queue, ensure=False)

        async def receive(message: AbstractIncomingMessage) -> None:
            self._receive(queue, message)
            with contextlib.suppress(*_ERRORS):
                await message.ack()

        await handle.consume(receive, consumer_tag=queue)

    async def _cancel(self, channel: AbstractChannel, queue: str) -> None:
        handle = await channel.get_queue(queue, ensure=False)
        await handle.cancel(queue)

    def _receive(self, queue: str, message: AbstractIncomingMessage) -> None:
        got = ReceivedMessage(
            queue,
            message.message_id,
            message.body,
            dict(message.headers),
            message.correlation_id,
            time.time(),
        )
        if self._messages.setdefault((queue, message.message_id), got) is got and queue != self._dead_letters:
            self.received[got.json()["id"]] += 1


def by_job(results: list[ReceivedMessage]) -> Iterator[tuple[str | None, ReceivedMessage]]:
    """Yield each result with its job id."""
    for got in results:
        yield got.json()["id"], got
