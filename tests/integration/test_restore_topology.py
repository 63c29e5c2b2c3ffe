"""A queue that is deleted while many jobs settle is declared again once for all."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel, AbstractConnection
from structlog.testing import CapturingLogger

from deploy.local.stack import Stack
from tests.running import until
from tests.unit.fakes import TOPOLOGY, a_delivery, cancel_all
from vqa_worker.messages.result import Result, Timings
from vqa_worker.rabbitmq import session
from vqa_worker.rabbitmq.connection import Broker
from worker.jobs.outcome import Succeeded
from worker.rabbitmq import publisher, redeclaration, settlement
from worker.rabbitmq.publisher import Publisher
from worker.rabbitmq.settlement import ReplyPolicy, Settlement
from worker.rabbitmq.topology import QueueSpec, Topology, create

JOBS = 64
OUTCOME = Succeeded(
    job_id="j", model="m", result=Result(id="j", status="succeeded", answer="yes", timings=Timings())
)


@dataclass
class Scene:
    """Jobs that settle on a broker; records declarations and log lines."""

    topology: Topology
    connection: AbstractConnection
    log: CapturingLogger
    settlement: Settlement
    declared: list[str] = field(default_factory=list)

    async def delete_results_queue(self) -> None:
        channel = await self.connection.channel()
        await channel.queue_delete(self.topology.results)
        await channel.close()

    def settle(self) -> list[asyncio.Task[object]]:
        return [asyncio.create_task(self.settlement.publish(a_delivery(), OUTCOME)) for _ in range(JOBS)]

    def logged(self, event: str) -> int:
        return [call.args for call in self.log.calls].count((event,))


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> CapturingLogger:
    log = CapturingLogger()
    for module in (publisher, redeclaration, session, settlement):
        monkeypatch.setattr(module, "log", log)
    return log


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Record the name of each declared queue."""
    names: list[str] = []
    declare = QueueSpec.declare

    async def spy(spec: QueueSpec, channel: AbstractChannel, *, passive: bool) -> None:
        names.append(spec.name)
        await declare(spec, channel, passive=passive)

    with monkeypatch.context() as patch:
        patch.setattr(QueueSpec, "declare", spy)
        yield names


@pytest.fixture(params=[True, False], ids=["declares", "only checks"])
async def scene(
    stack: Stack, request: pytest.FixtureRequest, log: CapturingLogger, declared: list[str]
) -> AsyncIterator[Scene]:
    name = uuid.uuid4().hex
    topology = replace(
        TOPOLOGY, jobs=name, results=f"{name}.results", dead_letters=f"{name}.dead", declare=request.param
    )
    broker = Broker(stack.rabbitmq.url, None, "test")
    async with await aio_pika.connect(stack.rabbitmq.url) as connection:
        await create(connection, topology)
        declared.clear()
        publisher = Publisher(broker, topology)
        running = asyncio.create_task(publisher.run())
        await until(lambda: publisher.is_connected, "the worker is connected")
        yield Scene(
            topology, connection, log, Settlement(publisher, topology, ReplyPolicy(["results"])), declared
        )
        assert not running.done()
        await cancel_all([running])
        channel = await connection.channel()
        for queue in topology.queues():
            await channel.queue_delete(queue.name)


@pytest.mark.parametrize("scene", [True], indirect=True, ids=["declares"])
async def test_results_that_miss_their_queue_at_the_same_time_share_one_restore(scene: Scene) -> None:
    await scene.delete_results_queue()
    async with asyncio.timeout(30):
        await asyncio.gather(*scene.settle())
    assert len(scene.declared) == len(scene.topology.queues())
    assert scene.logged("queue_missing") == 1


@pytest.mark.parametrize("scene", [False], indirect=True, ids=["only checks"])
async def test_a_missing_queue_is_checked_rarely_and_logged_once(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settlement, "UNROUTABLE_DELAY_S", 0.1)
    monkeypatch.setattr(redeclaration, "INTERVAL_S", 1.0)
    await scene.delete_results_queue()
    settling = scene.settle()
    await asyncio.sleep(4.5)
    assert not any(task.done() for task in settling)
    assert 2 * len(scene.topology.queues()) <= len(scene.declared) <= 5 * len(scene.topology.queues())
    assert scene.logged("queue_missing") == scene.logged("topology_mismatch") == 1
    assert scene.logged("rabbitmq_connection_lost") == 0
    await create(scene.connection, scene.topology)
    async with asyncio.timeout(30):
        await asyncio.gather(*settling)
