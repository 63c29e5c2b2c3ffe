"""The reply queue of a client is bound again when an administrator deletes and creates the reply exchange."""

import asyncio
import uuid

import aio_pika
import pytest

from deploy.local.stack import Stack
from tests.running import until
from tests.unit.fakes import cancel_all
from vqa_worker.rabbitmq import requests
from vqa_worker.rabbitmq.connection import Broker
from vqa_worker.rabbitmq.requests import Replies, Requests


@pytest.mark.parametrize("replies", ["queue", "exclusive"])
async def test_results_arrive_after_the_reply_exchange_was_deleted_and_created(
    stack: Stack, replies: Replies, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "REBIND_INTERVAL_S", 0.1)
    name = uuid.uuid4().hex
    received: list[bytes] = []
    client = Requests(
        Broker(stack.rabbitmq.url, None, "test"),
        "jobs",
        replies,
        reply_exchange=name,
        expires_s=60,
        on_result=received.append,
        on_loss=lambda: None,
    )
    async with await aio_pika.connect(stack.rabbitmq.url) as admin:
        channel = await admin.channel()
        exchange = await channel.declare_exchange(name)

        async def arrives(body: bytes) -> bool:
            await exchange.publish(aio_pika.Message(body), client.reply_to, mandatory=False)
            return body in received

        running = asyncio.create_task(client.run())
        await until(client.connected.is_set, "the client is connected")
        await until(lambda: arrives(b"before"), "a result")
        await channel.exchange_delete(name)
        exchange = await channel.declare_exchange(name)
        await until(lambda: arrives(b"after"), "another result")
        assert client.connected.is_set()
        await client.close()
        await cancel_all([running])
        await channel.exchange_delete(name)
