"""A broker that goes, dies, blocks, loses queues or falls silent: the worker waits, and goes on."""

import asyncio
import os
import signal
import uuid

from deploy.local.stack import Stack
from deploy.local.standin.behaviour import Answer, Error
from tests.breaking import calls_begun, events, model_answered, publish, results, statuses
from tests.conftest import MakeClient, StartWorker
from tests.proxy import Proxy
from tests.running import Client, calls_with, until

ALARM = ("set_vm_memory_high_watermark", "0.00001")
NO_ALARM = ("set_vm_memory_high_watermark", "0.4")


async def test_jobs_in_flight_and_jobs_queued_outlive_a_broker_that_dies_and_one_that_is_stopped(
    own_stack: Stack, start_own_worker: StartWorker
) -> None:
    """The broker is away for longer than the jobs in flight take: their answers are kept meanwhile."""
    worker = await start_own_worker(VQA_MAX_CONCURRENCY="3")
    for nth, number in enumerate((signal.SIGKILL, signal.SIGTERM), start=1):
        running, queued = uuid.uuid4().hex, uuid.uuid4().hex
        own_stack.model.play(Answer(after=1), marker=running, times=None)
        async with Client.of(own_stack, worker) as client:
            ids = await publish(client, 3, running)
            await calls_begun(own_stack, running, 3)
            ids += await publish(client, 4, queued)
        os.kill(own_stack.rabbitmq.pids[0], number)
        await until(lambda: worker.ready()[1].get("status") == "no_broker", "the loss is noticed")
        await model_answered(own_stack, running)
        assert worker.metric("vqa_dependency_up", dependency="rabbitmq") == 0
        # What it does after it has closed its connections takes seconds and is no matter here.
        await asyncio.to_thread(own_stack.rabbitmq.kill)
        await asyncio.to_thread(own_stack.rabbitmq.start)
        await until(lambda nth=nth: len(events(worker, "rabbitmq_connected")) > nth, "it is connected again")
        async with Client.of(own_stack, worker) as client:
            replies = await results(client, ids)
            assert {len(found) for found in client.replies.values()} == {1}
            assert await client.depth(worker.dead_letter_queue) == 0

        assert statuses(replies) == {"succeeded": 7}
        assert {reply.body["attempts"] for reply in replies} == {1}
        assert len(calls_with(own_stack, running)) == 3
        assert len(calls_with(own_stack, queued)) == 4
        assert worker.ready() == (200, {"status": "ready", "reasons": []})
        assert worker.metric("vqa_dependency_up", dependency="rabbitmq") == 1
    assert await worker.stop() == 0


async def test_queues_that_are_deleted_under_the_worker_are_made_again(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    marker = uuid.uuid4().hex
    own_stack.model.play(Answer(after=1), marker=marker, times=None)
    worker = await start_own_worker()
    client = await own_client_of(worker)
    ids = await publish(client, 1, marker)
    await calls_begun(own_stack, marker, 1)
    for name in (worker.jobs_queue, worker.results_queue, f"{worker.jobs_queue}.retry.1s"):
        await (await client.queue(name)).delete(if_unused=False, if_empty=False)

    await until(lambda: len(events(worker, "rabbitmq_connected")) == 2, "the jobs queue is there again")
    # The job that ran has lost its message, not its result.
    await client.listen(worker.results_queue)
    assert statuses(await results(client, ids)) == {"succeeded": 1}


async def test_results_wait_for_a_blocked_broker(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    marker = uuid.uuid4().hex
    own_stack.model.play(Answer(after=1), marker=marker, times=None)
    worker = await start_own_worker()
    client = await own_client_of(worker)
    ids = await publish(client, 3, marker)
    await calls_begun(own_stack, marker, 3)
    await asyncio.to_thread(own_stack.rabbitmq.ctl, *ALARM)
    try:
        await model_answered(own_stack, marker)
        await until(lambda: worker.output().count("was blocked by"), "the connection is blocked")
        assert client.replies == {}
        assert worker.ready()[0] == 200
    finally:
        await asyncio.to_thread(own_stack.rabbitmq.ctl, *NO_ALARM)
    assert statuses(await results(client, ids)) == {"succeeded": 3}
    assert await worker.stop() == 0
    assert len(calls_with(own_stack, marker)) == 3
    assert {len(found) for found in client.replies.values()} == {1}


async def test_a_network_that_swallows_everything_for_longer_than_the_heartbeat_is_survived(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    """By a worker that is busy, and by one that is paused and asks for a job to try with."""
    busy, barred = uuid.uuid4().hex, uuid.uuid4().hex
    own_stack.model.play(Answer(after=1), marker=busy, times=None)
    own_stack.model.play(Error(status=401), marker=barred, times=None)
    async with Proxy.before(own_stack.rabbitmq.url) as proxy:
        url = f"{proxy.url(own_stack.rabbitmq.url)}?heartbeat=1"
        workers = [await start_own_worker(wait=False, VQA_RABBITMQ_URL=url) for _ in range(2)]
        await asyncio.gather(*(worker.start() for worker in workers))
        clients = [await own_client_of(worker) for worker in workers]
        ids = [
            await publish(client, 2, marker) for client, marker in zip(clients, (busy, barred), strict=True)
        ]
        await calls_begun(own_stack, busy, 2)
        await until(lambda: workers[1].ready()[1].get("status") == "paused", "one is paused")
        proxy.freeze()
        for worker in workers:
            await until(
                lambda it=worker: it.ready()[1].get("status") == "no_broker", "the silence is noticed"
            )
        assert clients[0].replies == {}
        own_stack.model.configure(rules=[])
        proxy.reset()
        proxy.thaw()
        for client, wanted in zip(clients, ids, strict=True):
            assert statuses(await results(client, wanted)) == {"succeeded": 2}
            assert {len(found) for found in client.replies.values()} == {1}
        assert await asyncio.gather(*(worker.stop() for worker in workers)) == [0, 0]

    assert len(calls_with(own_stack, busy)) == 2
