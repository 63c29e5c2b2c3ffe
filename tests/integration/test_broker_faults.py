"""The worker waits for a broker that stops, blocks, loses queues or is silent, and continues."""

import asyncio
import os
import signal
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass

import pytest
from aio_pika.exceptions import DeliveryError

from deploy.local.model_simulator.behavior import Answer, Error
from deploy.local.stack import Stack
from tests.breaking import calls_begun, events, model_answered, publish, results, said, statuses
from tests.conftest import MakeClient, StartWorker
from tests.proxy import Proxy
from tests.running import Client, Worker, calls_with, until

# The rabbitmqctl commands that raise and clear each alarm.
ALARMS = {
    "memory": (("set_vm_memory_high_watermark", "0.00001"), ("set_vm_memory_high_watermark", "0.4")),
    "disk": (("set_disk_free_limit", "100000GB"), ("set_disk_free_limit", "50MB")),
}


@dataclass(frozen=True)
class Scene:
    """A worker with a concurrency of three, and a proxy between it and the model."""

    stack: Stack
    worker: Worker
    model: Proxy

    def times_connected(self) -> int:
        return len(events(self.worker, "rabbitmq_connected"))

    async def connected_again(self, before: int) -> None:
        await until(lambda: self.times_connected() > before, "the worker is connected again")

    async def publish_and_hold(self, client: Client, count: int, marker: str) -> list[str]:
        """Publish `count` jobs, which run until the model's proxy thaws."""
        self.model.freeze()
        ids = await publish(client, count, marker)
        await until(lambda: self.model.held == count, "the jobs have begun")
        return ids


@pytest.fixture(scope="module")
async def scene(own_stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    folder = tmp_path_factory.mktemp("broker")
    async with Proxy.before(own_stack.model.base_url) as model:
        settings = {
            "VQA_MODEL_BASE_URL": model.url(own_stack.model.base_url),
            "VQA_MAX_CONCURRENCY": "3",
        }
        async with Worker.running(own_stack, folder, **settings) as worker:
            yield Scene(own_stack, worker, model)


async def delete(client: Client, *names: str) -> None:
    for name in names:
        await (await client.queue(name)).delete(if_unused=False, if_empty=False)


async def test_a_deleted_jobs_queue_is_declared_again(scene: Scene, own_client_of: MakeClient) -> None:
    before = scene.times_connected()
    client = await own_client_of(scene.worker)
    ids = await scene.publish_and_hold(client, 1, "while the queue is deleted")
    await delete(client, scene.worker.jobs_queue)
    await scene.connected_again(before)
    scene.model.thaw()
    # The running job has lost its message, but not its result.

    async def publish_next() -> list[str]:
        # A connection of an earlier test may have been counted.
        with suppress(DeliveryError):
            return await publish(client, 1, "the next one")
        return []

    ids += await until(publish_next, "the queue exists again")
    assert statuses(await results(client, ids)) == {"succeeded": 2}


async def test_a_deleted_retry_queue_and_results_queue_are_declared_again_when_needed(
    scene: Scene,
) -> None:
    marker, retry_queue = uuid.uuid4().hex, f"{scene.worker.jobs_queue}.retry.1s"
    scene.stack.model.play(Error(status=500), marker=marker)
    async with Client.of(scene.stack, scene.worker) as client:
        await delete(client, retry_queue)
        (reply,) = await results(client, await publish(client, 1, marker))
        assert (reply.body["status"], reply.body["attempts"]) == ("succeeded", 2)

        (job_id,) = await scene.publish_and_hold(client, 1, "while the queue is deleted")
        await delete(client, scene.worker.results_queue)
        scene.model.thaw()
        await until(
            lambda: [line for line in events(scene.worker, "job_finished") if line["job_id"] == job_id],
            "its end",
        )
    async with Client.of(scene.stack, scene.worker) as client:
        assert statuses(await results(client, [job_id])) == {"succeeded": 1}
    assert [line["queue"] for line in events(scene.worker, "queue_missing")] == [
        retry_queue,
        scene.worker.results_queue,
    ]


@pytest.mark.parametrize("alarm", ALARMS)
async def test_results_wait_for_a_blocked_broker(scene: Scene, own_client_of: MakeClient, alarm: str) -> None:
    marker, (begin, end) = uuid.uuid4().hex, ALARMS[alarm]

    def times_blocked() -> int:
        return scene.worker.output().count("was blocked by")

    before = times_blocked()
    client = await own_client_of(scene.worker)
    ids = await scene.publish_and_hold(client, 3, marker)
    await asyncio.to_thread(scene.stack.rabbitmq.ctl, *begin)
    try:
        scene.model.thaw()
        await until(lambda: times_blocked() > before, "the connection is blocked")
        await calls_begun(scene.stack, marker, 3)
        await model_answered(scene.stack, marker)
        assert client.replies == {}
        assert scene.worker.ready()[0] == 200
    finally:
        await asyncio.to_thread(scene.stack.rabbitmq.ctl, *end)
    assert statuses(await results(client, ids)) == {"succeeded": 3}
    assert len(calls_with(scene.stack, marker)) == 3
    assert {len(found) for found in client.replies.values()} == {1}


async def test_workers_recover_from_a_silent_network_after_the_heartbeat_timeout(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    """One worker is busy; the other is paused and takes a job for a probe."""
    busy, barred = uuid.uuid4().hex, uuid.uuid4().hex
    own_stack.model.play(Answer(after=1.5), marker=busy, times=None)
    own_stack.model.play(Error(status=401), marker=barred, times=None)
    async with Proxy.before(own_stack.rabbitmq.url) as proxy:
        url = f"{proxy.url(own_stack.rabbitmq.url)}?heartbeat=1"
        workers = [await start_own_worker(wait=False, VQA_RABBITMQ_URL=url) for _ in range(2)]
        await asyncio.gather(*(worker.start() for worker in workers))
        clients = [await own_client_of(worker) for worker in workers]
        barred_ids = await publish(clients[1], 2, barred)
        await said(workers[1], "paused")
        busy_ids = await publish(clients[0], 2, busy)
        await calls_begun(own_stack, busy, 2)
        proxy.freeze()
        for worker in workers:
            await said(worker, "no_broker")
        own_stack.model.configure(rules=[])
        proxy.reset()
        proxy.thaw()
        assert statuses(await results(clients[0], busy_ids)) == {"succeeded": 2}
        assert {len(found) for found in clients[0].replies.values()} == {1}
        # Jobs whose requeue was interrupted may be in the queue twice.
        assert statuses(await results(clients[1], barred_ids)) == {"succeeded": 2}
        assert await asyncio.gather(*(worker.stop() for worker in workers)) == [0, 0]

    assert len(calls_with(own_stack, busy)) == 2


async def test_jobs_in_flight_and_queued_jobs_survive_a_killed_and_a_stopped_broker(
    scene: Scene,
) -> None:
    """The jobs in flight end while the broker is down: their results wait."""
    worker, broker = scene.worker, scene.stack.rabbitmq
    for number in (signal.SIGKILL, signal.SIGTERM):
        before = scene.times_connected()
        running, queued = uuid.uuid4().hex, uuid.uuid4().hex
        async with Client.of(scene.stack, worker) as client:
            ids = await scene.publish_and_hold(client, 3, running)
            ids += await publish(client, 4, queued)
        os.kill(broker.pids[0], number)
        assert (await said(worker, "no_broker"))[0] == 503
        scene.model.thaw()
        await calls_begun(scene.stack, running, 3)
        await model_answered(scene.stack, running)
        assert worker.metric("vqa_dependency_up", dependency="rabbitmq") == 0
        # A stopping broker needs seconds after closing its connections; the test does not wait for that.
        await asyncio.to_thread(broker.kill)
        broker.launch()
        await scene.connected_again(before)
        async with Client.of(scene.stack, worker) as client:
            replies = await results(client, ids)
            assert {len(found) for found in client.replies.values()} == {1}
            assert await client.depth(worker.dead_letter_queue) == 0

        assert statuses(replies) == {"succeeded": 7}
        assert {reply.body["attempts"] for reply in replies} == {1}
        assert len(calls_with(scene.stack, running)) == 3
        assert len(calls_with(scene.stack, queued)) == 4
        assert worker.ready() == (200, {"status": "ready", "reasons": []})
        assert worker.metric("vqa_dependency_up", dependency="rabbitmq") == 1
    await asyncio.to_thread(broker.wait_until_ready)
