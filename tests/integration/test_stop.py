"""The worker's stop: running jobs finish, others are requeued, and no attempt or delivery is counted."""

import asyncio
import signal
import uuid
from contextlib import AsyncExitStack

import pytest

from deploy.local.model_simulator.behavior import Answer, Error, Hang
from deploy.local.stack import Stack
from tests.breaking import calls_begun, events, job, publish, results, said
from tests.conftest import MakeClient, StartWorker
from tests.proxy import Proxy
from tests.running import Worker, calls_with, until

# AMQP 0-9-1: class and method of frames from the worker to the broker.
BASIC_GET = b"\x00\x3c\x00\x46"
BASIC_CANCEL = b"\x00\x3c\x00\x1e"
QUEUE_DECLARE = b"\x00\x32\x00\x0a"
CHANNEL_CLOSE = b"\x00\x14\x00\x28"


def signal_to(worker: Worker, number: signal.Signals) -> None:
    assert worker.process is not None
    worker.process.send_signal(number)


async def test_the_first_signal_finishes_running_jobs_and_requeues_the_others(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    marker, waiting = uuid.uuid4().hex, uuid.uuid4().hex
    async with Proxy.before(own_stack.model.base_url) as model:
        model.freeze()
        first = await start_own_worker(
            VQA_MODEL_BASE_URL=model.url(own_stack.model.base_url), VQA_MAX_CONCURRENCY="40"
        )
        client = await own_client_of(first)
        # The limit starts at 32 concurrent calls; the other jobs are prefetched and wait.
        running = await publish(client, 32, marker)
        await until(lambda: model.held == 32, "the calls begin")
        prefetched = await publish(client, 8, waiting)
        await until(lambda: first.metric("vqa_jobs_in_flight") == 40, "all jobs are prefetched")

        signal_to(first, signal.SIGTERM)
        assert (await said(first, "stopping"))[0] == 503
        assert first.get("/livez")[0] == 200
        # Jobs that had not begun are requeued while the others run, and this worker gets no new jobs.
        late = await publish(client, 2, waiting)

        async def are_back() -> bool:
            return await client.depth(first.jobs_queue) == 10

        await until(are_back, "jobs are requeued")
        assert client.replies == {}
        model.thaw()
        assert await first.ended() == 0, first.output()
    await results(client, running)
    assert await client.depth(first.jobs_queue) == 10
    assert calls_with(own_stack, waiting) == []

    second = await start_own_worker(like=first)
    replies = await results(client, [*prefetched, *late])
    assert {(reply.body["status"], reply.body["attempts"]) for reply in replies} == {("succeeded", 1)}
    assert await second.stop() == 0
    assert len(calls_with(own_stack, marker)) == 32
    assert len(calls_with(own_stack, waiting)) == 10
    assert {len(found) for found in client.replies.values()} == {1}


async def test_jobs_that_exceed_the_grace_period_are_requeued_without_a_counted_attempt_or_delivery(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    marker = uuid.uuid4().hex
    own_stack.model.play(Hang(), marker=marker, times=4)
    settings = {"VQA_SHUTDOWN_GRACE": "0.5", "VQA_DELIVERY_LIMIT": "1"}
    worker = await start_own_worker(**settings)
    client = await own_client_of(worker)
    fresh, tried = job(marker), job(marker)
    await client.publish(fresh)
    await client.publish(tried, headers={"vqa-attempts": 2})
    for calls, number in ((2, signal.SIGTERM), (4, signal.SIGINT)):
        await calls_begun(own_stack, marker, calls)
        assert await worker.stop(number) == 0, worker.output()
        assert [event["after_s"] for event in events(worker, "grace_period_expired")] == [0.5]
        assert await client.depth(worker.jobs_queue) == 2
        worker = await start_own_worker(like=worker, **settings)

    replies = await results(client, [fresh["id"], tried["id"]])
    assert [reply.body["status"] for reply in replies] == ["succeeded", "succeeded"]
    assert [reply.body["attempts"] for reply in replies] == [1, 3]
    assert await worker.stop() == 0
    assert {len(found) for found in client.replies.values()} == {1}


async def test_a_second_signal_stops_the_worker_at_once_and_the_next_one_answers_its_jobs(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    marker = uuid.uuid4().hex
    own_stack.model.play(Hang(), marker=marker, times=4)
    first = await start_own_worker(wait=False, VQA_MAX_CONCURRENCY="2")
    second = await start_own_worker(wait=False, like=first, VQA_MAX_CONCURRENCY="2")
    await asyncio.gather(first.start(), second.start())
    client = await own_client_of(first)
    ids = await publish(client, 4, marker)
    await calls_begun(own_stack, marker, 4)
    for worker in (first, second):
        signal_to(worker, signal.SIGTERM)
        await said(worker, "stopping")

    assert await first.stop(signal.SIGTERM, patience_s=60) == 143
    assert await second.stop(signal.SIGINT, patience_s=60) == 130
    third = await start_own_worker(like=first)
    replies = await results(client, ids)
    assert {(reply.body["status"], reply.body["attempts"]) for reply in replies} == {("succeeded", 1)}
    assert await third.stop() == 0
    assert {len(found) for found in client.replies.values()} == {1}


async def test_a_worker_without_jobs_broker_or_model_stops(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    marker = uuid.uuid4().hex
    own_stack.model.play(Error(status=401), marker=marker, times=None)
    async with Proxy.before(own_stack.rabbitmq.url, listens=False) as proxy:
        paused = await start_own_worker(wait=False)
        lonely = await start_own_worker(wait=False, VQA_RABBITMQ_URL=proxy.url(own_stack.rabbitmq.url))
        lonely.launch()
        await paused.start()
        client = await own_client_of(paused)
        (lost,) = await publish(client, 1, marker)
        await said(paused, "paused")
        await until(lambda: events(lonely, "rabbitmq_unreachable"), "the worker waits for the broker")
        codes = await asyncio.gather(paused.stop(patience_s=60), lonely.stop(patience_s=60))

    assert list(codes) == [0, 0], paused.output() + lonely.output()
    message = await client.take(paused.jobs_queue)
    assert lost in message.body.decode()
    assert "vqa-attempts" not in message.headers


async def test_a_worker_that_waits_for_a_response_of_the_broker_stops(
    own_stack: Stack, start_own_worker: StartWorker
) -> None:
    async with AsyncExitStack() as proxies:

        async def stop_at(word: bytes) -> int:
            proxy = await proxies.enter_async_context(Proxy.before(own_stack.rabbitmq.url))
            proxy.freezes_on = word
            url = proxy.url(own_stack.rabbitmq.url)
            worker = await start_own_worker(wait=False, VQA_RABBITMQ_URL=url)
            worker.launch()
            await until(lambda: proxy.freezes_on is None, "the request")
            signal_to(worker, signal.SIGTERM)
            await until(lambda: events(worker, "stopping"), "the worker is stopping")
            proxy.thaw()
            return await worker.ended(patience_s=60)

        assert await asyncio.gather(*map(stop_at, (QUEUE_DECLARE, CHANNEL_CLOSE))) == [0, 0]


async def test_a_stop_during_a_probe_affects_neither_the_probe_s_job_nor_others(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    running, barred = uuid.uuid4().hex, uuid.uuid4().hex
    own_stack.model.play(Answer(after=3), marker=running, times=None)
    own_stack.model.play(Error(status=401), marker=barred, times=None)
    async with Proxy.before(own_stack.rabbitmq.url) as proxy:
        worker = await start_own_worker(VQA_RABBITMQ_URL=proxy.url(own_stack.rabbitmq.url))
        client = await own_client_of(worker)
        # The worker requests a job for a probe, and gets SIGTERM before the response.
        proxy.freezes_on = BASIC_GET
        ids = await publish(client, 1, running)
        await calls_begun(own_stack, running, 1)
        await publish(client, 1, barred)
        await until(lambda: proxy.freezes_on is None, "the request")
        signal_to(worker, signal.SIGTERM)
        await said(worker, "stopping")
        proxy.thaw()
        assert await worker.ended() == 0, worker.output()

    (reply,) = await results(client, ids)
    assert reply.body["status"] == "succeeded"
    assert len(calls_with(own_stack, barred)) == 1
    # Closing the channel too early would also have requeued the running job.
    assert await client.depth(worker.jobs_queue) == 1
    message = await client.take(worker.jobs_queue)
    assert barred in message.body.decode()
    assert {name for name, value in message.headers.items() if value} == {"vqa-copy"}


@pytest.mark.parametrize("why", ["it is paused", "it is asked to stop"])
async def test_jobs_are_requeued_only_after_cancel_ok_so_that_no_delivery_is_counted(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient, *, why: str
) -> None:
    """RabbitMQ counts a delivery to a consumer that is being cancelled."""
    barred = uuid.uuid4().hex
    own_stack.model.play(Error(status=401), marker=barred, times=None)
    async with (
        Proxy.before(own_stack.rabbitmq.url) as broker,
        Proxy.before(own_stack.model.base_url) as model,
    ):
        worker = await start_own_worker(
            VQA_RABBITMQ_URL=broker.url(own_stack.rabbitmq.url),
            VQA_MODEL_BASE_URL=model.url(own_stack.model.base_url),
            VQA_LOG_LEVEL="debug",
        )
        client = await own_client_of(worker)
        model.freeze()
        # The limit starts at 32 concurrent calls; the other jobs wait.
        await publish(client, 40, barred)
        await until(lambda: model.held == 32, "jobs have begun")
        await until(lambda: worker.metric("vqa_jobs_in_flight") == 40, "the other jobs are delivered")
        broker.holds_up = BASIC_CANCEL
        if why == "it is paused":
            model.thaw()
            await said(worker, "paused")
        else:
            signal_to(worker, signal.SIGTERM)
            await said(worker, "stopping")
        await until(lambda: broker.holds_up is None, "the worker sends Basic.Cancel")
        # The broker has not handled Basic.Cancel yet: it delivers this job, which waits for the requeue too.
        await publish(client, 1, barred)
        await until(
            lambda: worker.metric("vqa_stage_duration_seconds_count", stage="wait") >= 9, "the delivery"
        )
        assert events(worker, "job_requeued") == []
        assert await client.depth(worker.jobs_queue) == 0
        signal_to(worker, signal.SIGTERM) if why == "it is paused" else model.thaw()
        broker.thaw()
        assert await worker.ended() == 0, worker.output()

    assert len(events(worker, "job_requeued")) == 41
    messages = [await client.take(worker.jobs_queue) for _ in range(41)]
    assert {name for message in messages for name, value in message.headers.items() if value} == {"vqa-copy"}


async def test_a_broker_that_returns_within_the_grace_period_gets_the_results(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    async with (
        Proxy.before(own_stack.rabbitmq.url) as broker,
        Proxy.before(own_stack.model.base_url) as model,
    ):
        worker = await start_own_worker(
            VQA_RABBITMQ_URL=broker.url(own_stack.rabbitmq.url),
            VQA_MODEL_BASE_URL=model.url(own_stack.model.base_url),
        )
        client = await own_client_of(worker)
        model.freeze()
        ids = await publish(client, 1, "What is it?")
        await until(lambda: model.held == 1, "the job has begun")
        await broker.refuse()
        broker.reset()
        await until(lambda: events(worker, "rabbitmq_unreachable"), "the connection is lost")
        signal_to(worker, signal.SIGTERM)
        model.thaw()
        await until(lambda: worker.metric("vqa_model_requests_total", code="200") == 1, "the model answers")
        assert (await said(worker, "stopping"))[0] == 503
        await broker.accept()
        assert await worker.ended() == 0, worker.output()

    (reply,) = await results(client, ids)
    assert reply.body["status"] == "succeeded"
