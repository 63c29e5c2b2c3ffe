"""Connections that are lost: the broker delivers again, and nothing is paid for or answered twice."""

import asyncio
import uuid

from deploy.local.stack import Stack
from deploy.local.standin.behaviour import Answer
from tests.breaking import BrokerUser, calls_begun, job, publish, results
from tests.conftest import MakeClient, StartWorker
from tests.proxy import Proxy
from tests.running import Client, Worker, calls_with, until

BASIC_CONSUME = b"\x00\x3c\x00\x14"
"""AMQP 0-9-1: the class and method by which the worker's consuming connection gives itself away."""


async def is_empty_after_the_end(client: Client, worker: Worker) -> bool:
    """Whether the worker leaves nothing behind: what it has not acked would be ready again."""
    assert await worker.stop() == 0, worker.output()
    await asyncio.sleep(0.2)
    return await client.depth(worker.jobs_queue) == 0


async def test_a_job_whose_connection_is_closed_while_it_runs_is_paid_once_and_answered_once(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    marker = uuid.uuid4().hex
    own_stack.model.play(Answer(after=1), marker=marker, times=None)
    with BrokerUser.of(own_stack) as user:
        worker = await start_own_worker(VQA_RABBITMQ_URL=user.url)
        client = await own_client_of(worker)
        ids = await publish(client, 3, marker)
        await calls_begun(own_stack, marker, 3)
        user.close_connections()
        replies = await results(client, ids)

    assert {reply.body["status"] for reply in replies} == {"succeeded"}
    assert {reply.body["attempts"] for reply in replies} == {1}
    assert await is_empty_after_the_end(client, worker)
    assert len(calls_with(own_stack, marker)) == 3
    assert [len(client.replies[it]) for it in ids] == [1, 1, 1]


async def test_a_job_that_waits_for_a_slot_outlives_its_connection_and_is_paid_once(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    marker = uuid.uuid4().hex
    own_stack.model.play(Answer(after=0.5), marker=marker, times=None)
    own_stack.model.configure(max_concurrent=1, retry_after="1")
    try:
        async with Proxy.before(own_stack.rabbitmq.url) as proxy:
            worker = await start_own_worker(VQA_RABBITMQ_URL=proxy.url(own_stack.rabbitmq.url))
            client = await own_client_of(worker)
            ids = await publish(client, 3, marker)
            await calls_begun(own_stack, marker, 1)
            await until(lambda: worker.metric("vqa_jobs_in_flight") == 3, "all jobs are prefetched")
            proxy.reset()
            await results(client, ids)
            assert await is_empty_after_the_end(client, worker)
    finally:
        own_stack.model.configure(max_concurrent=None, retry_after=None)

    paid = [call for call in calls_with(own_stack, marker) if call.status == 200]
    assert len(paid) == 3
    assert [len(client.replies[it]) for it in ids] == [1, 1, 1]


async def test_a_job_whose_ack_is_lost_on_the_way_is_neither_paid_nor_answered_again(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    marker = uuid.uuid4().hex
    own_stack.model.play(Answer(after=1), marker=marker, times=None)
    async with Proxy.before(own_stack.rabbitmq.url) as proxy:
        worker = await start_own_worker(VQA_RABBITMQ_URL=proxy.url(own_stack.rabbitmq.url))
        client = await own_client_of(worker)
        ids = await publish(client, 2, marker)
        await calls_begun(own_stack, marker, 2)
        (consuming,) = [link for link in proxy.links if BASIC_CONSUME in link.sent]
        consuming.swallows_sent = True
        await results(client, ids)
        assert worker.ready()[0] == 200
        consuming.reset()
        # The next job comes behind those that the broker delivers again.
        await until(lambda: len(proxy.links) == 2 and worker.ready()[0] == 200, "it is connected again")
        await results(client, await publish(client, 1, "afterwards"))
        assert await is_empty_after_the_end(client, worker)

    assert len(calls_with(own_stack, marker)) == 2
    assert [len(client.replies[it]) for it in ids] == [1, 1]


async def test_connections_lost_again_and_again_cost_a_job_neither_its_answer_nor_a_second_call(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    marker = uuid.uuid4().hex
    own_stack.model.play(Answer(after=2), marker=marker, times=None)
    async with Proxy.before(own_stack.rabbitmq.url) as proxy:
        worker = await start_own_worker(
            VQA_RABBITMQ_URL=proxy.url(own_stack.rabbitmq.url), VQA_DELIVERY_LIMIT="1"
        )
        client = await own_client_of(worker)
        ids = await publish(client, 1, marker)
        await calls_begun(own_stack, marker, 1)
        for nth in (1, 2):
            proxy.reset()
            await until(lambda: worker.ready()[0] == 503, "the loss is noticed")
            await until(
                lambda nth=nth: worker.output().count("rabbitmq_connected") > nth,
                "it is connected again",
            )
        (reply,) = await results(client, ids)
        assert await is_empty_after_the_end(client, worker)

    assert reply.body["status"] == "succeeded"
    assert len(calls_with(own_stack, marker)) == 1
    assert len(client.replies[ids[0]]) == 1


async def test_a_message_that_was_published_twice_gets_a_result_each(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    markers = [uuid.uuid4().hex, uuid.uuid4().hex]
    async with Proxy.before(own_stack.rabbitmq.url) as proxy:
        worker = await start_own_worker(VQA_RABBITMQ_URL=proxy.url(own_stack.rabbitmq.url))
        client = await own_client_of(worker)
        twins = [job(marker) for marker in markers]
        for marker, twin, is_lost in zip(markers, twins, (False, True), strict=True):
            own_stack.model.play(Answer(after=0.7), marker=marker, times=None)
            for _ in range(2):
                await client.publish(twin, message_id="the same")
            await calls_begun(own_stack, marker, 1)
            if is_lost:
                proxy.reset()
            await until(lambda it=twin["id"]: len(client.replies.get(it, [])) == 2, "two results")
        assert await is_empty_after_the_end(client, worker)

    for twin in twins:
        assert [reply.body["status"] for reply in client.replies[twin["id"]]] == ["succeeded", "succeeded"]
