"""A broker that goes, dies, blocks, loses queues or falls silent: the worker waits, and goes on."""

import asyncio
import os
import signal
import uuid
from collections.abc import AsyncIterator

import pytest

from deploy.local.stack import Stack
from deploy.local.standin.behaviour import Answer, Error
from tests.breaking import calls_begun, events, model_answered, publish, results, said, statuses
from tests.conftest import MakeClient, StartWorker
from tests.proxy import Proxy
from tests.running import Client, Worker, calls_with, until

ALARM = ("set_vm_memory_high_watermark", "0.00001")
NO_ALARM = ("set_vm_memory_high_watermark", "0.4")


@pytest.fixture(scope="module")
async def worker(own_stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Worker]:
    folder = tmp_path_factory.mktemp("broker")
    async with Worker.running(own_stack, folder, VQA_MAX_CONCURRENCY="3") as worker:
        yield worker


def times_connected(worker: Worker) -> int:
    return len(events(worker, "rabbitmq_connected"))


async def connected_again(worker: Worker, before: int) -> None:
    await until(lambda: times_connected(worker) > before, "it is connected again")


async def delete(client: Client, *names: str) -> None:
    for name in names:
        await (await client.queue(name)).delete(if_unused=False, if_empty=False)


async def test_a_jobs_queue_that_is_deleted_under_the_worker_is_made_again(
    own_stack: Stack, worker: Worker, own_client_of: MakeClient
) -> None:
    marker, before = uuid.uuid4().hex, times_connected(worker)
    own_stack.model.play(Answer(after=1), marker=marker, times=None)
    client = await own_client_of(worker)
    ids = await publish(client, 1, marker)
    await calls_begun(own_stack, marker, 1)
    await delete(client, worker.jobs_queue)
    await connected_again(worker, before)
    # The job that ran has lost its message, not its result.
    ids += await publish(client, 1, "the next one")
    assert statuses(await results(client, ids)) == {"succeeded": 2}


async def test_a_retry_queue_and_a_results_queue_that_are_gone_when_they_are_needed_are_made_again(
    own_stack: Stack, worker: Worker
) -> None:
    marker, retries = uuid.uuid4().hex, worker.metric("vqa_retries_total")
    own_stack.model.play(Error(status=500), marker=marker)
    async with Client.of(own_stack, worker) as client:
        await delete(client, f"{worker.jobs_queue}.retry.1s")
        ids = await publish(client, 1, marker)
        await until(lambda: worker.metric("vqa_retries_total") > retries, "the job is held back")
        await delete(client, worker.results_queue)
        await until(
            lambda: [line for line in events(worker, "job") if line["job_id"] == ids[0]], "it is answered"
        )
    async with Client.of(own_stack, worker) as client:
        (reply,) = await results(client, ids)
    assert (reply.body["status"], reply.body["attempts"]) == ("succeeded", 2)
    assert [line["queue"] for line in events(worker, "queue_missing")] == [
        f"{worker.jobs_queue}.retry.1s",
        worker.results_queue,
    ]


async def test_results_wait_for_a_blocked_broker(
    own_stack: Stack, worker: Worker, own_client_of: MakeClient
) -> None:
    marker = uuid.uuid4().hex
    own_stack.model.play(Answer(after=1), marker=marker, times=None)
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
    assert len(calls_with(own_stack, marker)) == 3
    assert {len(found) for found in client.replies.values()} == {1}


async def test_a_network_that_swallows_everything_for_longer_than_the_heartbeat_is_survived(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    """By a worker that is busy, and by one that is paused and asks for a job to try with."""
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
        assert clients[0].replies == {}
        own_stack.model.configure(rules=[])
        proxy.reset()
        proxy.thaw()
        assert statuses(await results(clients[0], busy_ids)) == {"succeeded": 2}
        assert {len(found) for found in clients[0].replies.values()} == {1}
        # What was being given back when the network went may have gone back twice.
        assert statuses(await results(clients[1], barred_ids)) == {"succeeded": 2}
        assert await asyncio.gather(*(worker.stop() for worker in workers)) == [0, 0]

    assert len(calls_with(own_stack, busy)) == 2


async def test_jobs_in_flight_and_jobs_queued_outlive_a_broker_that_dies_and_one_that_is_stopped(
    own_stack: Stack, worker: Worker
) -> None:
    """The broker is away for longer than the jobs in flight take: their answers are kept meanwhile."""
    for number in (signal.SIGKILL, signal.SIGTERM):
        before = times_connected(worker)
        running, queued = uuid.uuid4().hex, uuid.uuid4().hex
        own_stack.model.play(Answer(after=1), marker=running, times=None)
        async with Client.of(own_stack, worker) as client:
            ids = await publish(client, 3, running)
            await calls_begun(own_stack, running, 3)
            ids += await publish(client, 4, queued)
        os.kill(own_stack.rabbitmq.pids[0], number)
        assert (await said(worker, "no_broker"))[0] == 503
        await model_answered(own_stack, running)
        assert worker.metric("vqa_dependency_up", dependency="rabbitmq") == 0
        # What it does after it has closed its connections takes seconds and is no matter here.
        await asyncio.to_thread(own_stack.rabbitmq.kill)
        own_stack.rabbitmq.launch()
        await connected_again(worker, before)
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
    await asyncio.to_thread(own_stack.rabbitmq.wait_until_ready)
