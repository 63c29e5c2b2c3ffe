"""Queues with dead letters for commands."""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage

from deploy.local.stack import Stack
from tests.breaking import job
from tests.integration.cli.running import Cli
from tests.running import until
from vqa_worker.rabbitmq.connection import Broker
from worker.rabbitmq import bulk
from worker.rabbitmq.dead_letters import FetchedDeadLetter
from worker.rabbitmq.topology import Topology, create


class Queues:
    """Queues without a worker."""

    def __init__(self, cli: Cli, channel: AbstractChannel) -> None:
        self.jobs = cli.settings["VQA_JOBS_QUEUE"]
        self.dead = f"{self.jobs}.dead"
        self.topology = Topology(
            jobs=self.jobs,
            results=cli.settings["VQA_RESULTS_QUEUE"],
            dead_letters=self.dead,
            retry_delays_s=[1],
            reply_exchange="",
            jobs_exchange=cli.settings.get("VQA_JOBS_EXCHANGE", ""),
            declare=False,
        )
        self._channel = channel

    @classmethod
    @asynccontextmanager
    async def of(cls, stack: Stack, cli: Cli) -> AsyncIterator["Queues"]:
        async with await aio_pika.connect(stack.rabbitmq.url) as connection:
            queues = cls(cli, await connection.channel())
            await create(connection, queues.topology)
            yield queues

    async def dead_letter(
        self,
        body: bytes | Mapping[str, Any],
        code: str = "attempts_exhausted",
        *,
        ago_s: float = 60.0,
        **more: Any,
    ) -> None:
        """Publish a dead letter as a worker does."""
        died_at = datetime.now(UTC) - timedelta(seconds=ago_s)
        headers = {
            "vqa-error-code": code,
            "vqa-error-message": "the API answered 500: overloaded",
            "vqa-attempts": 5,
            "vqa-died-at": died_at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            **more.pop("headers", {}),
        }
        await self.put(self.dead, body, headers=headers, **more)

    async def put(self, queue: str, body: bytes | Mapping[str, Any], **properties: Any) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        message = aio_pika.Message(raw, delivery_mode=2, **properties)
        await self._channel.default_exchange.publish(message, queue)

    async def depth(self, queue: str) -> int:
        found = await self._channel.declare_queue(queue, passive=True)
        return found.declaration_result.message_count or 0

    async def until_depth(self, queue: str, count: int) -> None:
        """Wait for a number of ready messages: the broker requeues those of a killed process."""

        async def is_there() -> bool:
            return await self.depth(queue) == count

        await until(is_there, f"{count} messages in {queue}")

    async def drain(self, queue: str) -> list[AbstractIncomingMessage]:
        """Consume all messages of a queue."""
        found = await self._channel.get_queue(queue, ensure=False)
        messages = []
        while (message := await found.get(fail=False, no_ack=True)) is not None:
            messages.append(message)
        return messages

    async def delete(self, queue: str) -> None:
        await self._channel.queue_delete(queue, if_unused=False, if_empty=False)


def ids_of(messages: list[AbstractIncomingMessage]) -> list[str]:
    return [json.loads(message.body)["id"] for message in messages]


async def add_dead_letters(queues: Queues, count: int, **more: Any) -> list[str]:
    jobs = [job() for _ in range(count)]
    for it in jobs:
        await queues.dead_letter(it, **more)
    return [it["id"] for it in jobs]


def broker_of(stack: Stack) -> Broker:
    return Broker(url=stack.rabbitmq.url, ssl_context=None, name="test")


async def read_dead_letters(stack: Stack, queues: Queues, most: int | None = None) -> list[FetchedDeadLetter]:
    found = await bulk.select(
        broker_of(stack), queues.topology, lambda held: held, limit=most, timeout_s=15.0
    )
    return found.picked


def state(cli: Cli) -> Path:
    """Return the state folder."""
    return cli.folder / "state" / "vqa-worker"
