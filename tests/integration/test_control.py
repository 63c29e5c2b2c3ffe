"""The control exchange is bound again when an administrator deletes and creates it."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

import aio_pika
import pytest
from aio_pika.abc import AbstractConnection
from structlog.testing import CapturingLogger

from deploy.local.stack import Stack
from tests.running import until
from tests.unit.fakes import TOPOLOGY, cancel_all
from worker.rabbitmq import control
from worker.rabbitmq.control import Control
from worker.rabbitmq.topology import Topology


@dataclass
class Scene:
    """A listener and an administrator's connection."""

    topology: Topology
    connection: AbstractConnection
    log: CapturingLogger
    cancelled: list[str] = field(default_factory=list)
    times_listening: int = 0

    async def delete(self) -> None:
        channel = await self.connection.channel()
        await channel.exchange_delete(self.topology.control.name)
        await channel.close()

    async def create(self) -> None:
        channel = await self.connection.channel()
        await self.topology.control.declare(channel, passive=False)
        await channel.close()

    async def hears(self, job_id: str) -> bool:
        """Cancel a job; return whether the listener has received the message."""
        channel = await self.connection.channel()
        exchange = await channel.get_exchange(self.topology.control.name)
        await exchange.publish(aio_pika.Message(json.dumps({"cancel": job_id}).encode()), "")
        await channel.close()
        return job_id in self.cancelled

    def logged(self, event: str) -> int:
        return [call.args for call in self.log.calls].count((event,))

    def listening(self) -> None:
        self.times_listening += 1


@pytest.fixture(params=[True, False], ids=["declares", "only checks"])
async def scene(
    stack: Stack, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Scene]:
    log = CapturingLogger()
    monkeypatch.setattr(control, "log", log)
    monkeypatch.setattr(control, "REBIND_INTERVAL_S", 0.1)
    monkeypatch.setattr(control, "RETRY_INTERVAL_S", 0.1)
    topology = replace(TOPOLOGY, jobs=uuid.uuid4().hex, declare=request.param)
    async with await aio_pika.connect(stack.rabbitmq.url) as admin:
        scene = Scene(topology, admin, log)
        await scene.create()
        async with await aio_pika.connect(stack.rabbitmq.url) as connection:
            listener = Control(topology, on_cancel=scene.cancelled.append, on_subscribed=scene.listening)
            await listener.listen(connection)
            keeping = asyncio.create_task(listener.keep_bound(connection))
            yield scene
            assert not keeping.done()
            await cancel_all([keeping])
        await scene.delete()


async def test_an_exchange_that_was_deleted_and_created_at_once_is_bound_again(scene: Scene) -> None:
    await until(lambda: scene.hears("before"), "the listener receives a cancellation")
    await scene.delete()
    await scene.create()
    await until(lambda: scene.hears("after"), "the listener receives a cancellation again")


async def test_a_missing_exchange_is_logged_once_and_bound_when_it_exists_again(scene: Scene) -> None:
    await scene.delete()
    await until(lambda: scene.logged("control_exchange_missing") == 1, "it is logged")
    if not scene.topology.declare:
        await until(lambda: scene.logged("cancellation_forbidden") == 1, "it is logged")
        await asyncio.sleep(0.5)
        assert scene.logged("cancellation_forbidden") == 1
        await scene.create()
    await until(lambda: scene.logged("control_exchange_rebound") == 1, "the queue is bound")
    assert scene.times_listening == 2
    await until(lambda: scene.hears("after"), "the listener receives a cancellation again")
    assert scene.logged("control_exchange_missing") == 1
