"""Regression tests for the bugs that the chaos test found."""

import asyncio
import uuid

import aio_pika
from aio_pika.abc import AbstractChannel
from aio_pika.exceptions import DeliveryError

from deploy.local.stack import Stack
from tests.breaking import events, publish, results, statuses
from tests.conftest import StartWorker
from tests.running import Client, calls_with, until

FULL = '{"max-length": 1, "overflow": "reject-publish"}'


async def is_full(channel: AbstractChannel, queue: str) -> bool:
    """Publish one more message; return whether the broker refuses it."""
    try:
        await channel.default_exchange.publish(aio_pika.Message(b'{"id": "filling"}'), queue)
    except DeliveryError:
        return True
    return False


async def test_results_that_a_full_queue_refused_are_delivered_when_its_limit_is_lifted(
    own_stack: Stack, start_own_worker: StartWorker
) -> None:
    """RabbitMQ informs a channel that the queue is full, but not that its limit was removed."""
    marker, ctl = uuid.uuid4().hex, own_stack.rabbitmq.ctl
    worker = await start_own_worker()
    async with await aio_pika.connect(own_stack.rabbitmq.url) as connection:
        # No consumer reads results while the limit applies: that would make room.
        channel = await connection.channel(on_return_raises=True)
        client = Client(channel, worker)
        pattern = f"^{worker.results_queue}$"
        await asyncio.to_thread(ctl, "set_policy", "full", pattern, FULL, "--apply-to", "queues")
        try:
            await until(lambda: is_full(channel, worker.results_queue), "the limit applies")
            ids = await publish(client, 3, marker)
            await until(lambda: events(worker, "publish_failed"), "the broker refuses a result")
        finally:
            await asyncio.to_thread(ctl, "clear_policy", "full")
        await client.listen(worker.results_queue)
        assert statuses(await results(client, ids)) == {"succeeded": 3}
        assert [len(client.replies[it]) for it in ids] == [1, 1, 1]
    assert len(calls_with(own_stack, marker)) == 3
    assert await worker.stop() == 0, worker.output()
