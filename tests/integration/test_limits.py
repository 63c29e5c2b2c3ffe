"""An API with limited capacity: workers adapt to it, share it, and requeue jobs that they cannot start."""

import asyncio
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import aio_pika
import pytest

from deploy.local.model_simulator.behavior import Error
from deploy.local.stack import Stack
from tests.breaking import publish, results, statuses
from tests.conftest import MakeClient, StartWorker
from tests.running import Worker, calls_with, until
from tests.unit.fakes import TOPOLOGY
from vqa_worker.rabbitmq.connection import Broker
from worker.jobs.delivery import Delivery
from worker.rabbitmq.consumer import Consumer
from worker.rabbitmq.control import Control

JOBS = 400
CAPACITY = 20
# Calls are long enough that a worker on a busy machine reaches its limit.
LATENCY_S = 0.6
# Far more than a worker needs, because other tests may use the CPU.
PATIENCE_S = 100.0


@pytest.fixture(autouse=True)
def usual_model(own_stack: Stack) -> Iterator[None]:
    """Reset the simulated model after each test."""
    yield
    own_stack.model.reset()


async def test_the_limit_follows_the_capacity_of_the_api_down_and_up(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    own_stack.model.configure(max_concurrent=CAPACITY, latency=LATENCY_S)
    worker = await start_own_worker(VQA_MAX_CONCURRENCY="200", VQA_LOG_LEVEL="debug")
    client, marker = await own_client_of(worker), uuid.uuid4().hex
    ids = await publish(client, JOBS, marker)
    replies = await results(client, ids, PATIENCE_S)

    assert statuses(replies) == {"succeeded": JOBS}
    assert {reply.body["attempts"] for reply in replies} == {1}
    assert {len(client.replies[it]) for it in ids} == {1}
    calls = Counter(call.status for call in calls_with(own_stack, marker))
    assert calls.keys() == {200, 429}
    assert calls[200] == JOBS
    assert calls[429] <= 0.2 * JOBS
    assert worker.metric("vqa_concurrency_limit") < 1.5 * CAPACITY
    assert worker.ready() == (200, {"status": "ready", "reasons": []})

    own_stack.model.configure(max_concurrent=None, latency=LATENCY_S)
    ids = await publish(client, JOBS, marker)
    await until(
        lambda: worker.metric("vqa_concurrency_limit") >= 1.5 * CAPACITY, "the limit grows", PATIENCE_S
    )
    own_stack.model.configure(latency=0)
    assert statuses(await results(client, ids, PATIENCE_S)) == {"succeeded": JOBS}
    assert await worker.stop() == 0


async def test_jobs_that_a_worker_cannot_start_are_requeued_for_another(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    own_stack.model.configure(max_concurrent=4, latency=0.5)
    # Half of VQA_JOB_TIMEOUT is for the wait for a slot.
    settings = {"VQA_MAX_CONCURRENCY": "200", "VQA_JOB_TIMEOUT": "6"}
    first = await start_own_worker(**settings)
    client, marker = await own_client_of(first), uuid.uuid4().hex
    ids = await publish(client, 150, marker)

    async def most_are_requeued() -> bool:
        return await client.depth(first.jobs_queue) >= 60

    await until(lambda: first.metric("vqa_concurrency_limit") <= 4, "the limit falls")
    await until(most_are_requeued, "waiting jobs are requeued")
    assert first.metric("vqa_jobs_in_flight") <= 150 - 60

    second = await start_own_worker(like=first, **settings)
    # On a slow machine the first worker may have answered the others meanwhile.
    ids += await publish(client, 150, marker)
    await until(lambda: answers(first) >= 8 and answers(second) >= 8, "both make progress", PATIENCE_S)
    own_stack.model.configure(max_concurrent=None, latency=0)
    replies = await results(client, ids, PATIENCE_S)
    assert statuses(replies) == {"succeeded": 300}
    assert {reply.body["attempts"] for reply in replies} == {1}
    assert {len(client.replies[it]) for it in ids} == {1}
    assert [await first.stop(), await second.stop()] == [0, 0]


def answers(worker: Worker) -> float:
    return worker.metric("vqa_jobs_total", status="succeeded")


async def test_during_a_long_retry_after_jobs_are_requeued_and_deadlines_hold(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    marker = uuid.uuid4().hex
    own_stack.model.play(Error(status=429, headers={"Retry-After": "40"}), marker=marker, times=None)
    # With several models a worker continues to consume a few jobs, to find those for other models.
    model = own_stack.model.models[0]
    worker = await start_own_worker(VQA_JOB_TIMEOUT="8", VQA_MODEL=model, VQA_ALLOWED_MODELS=model)
    client = await own_client_of(worker)
    soon, later = (datetime.now(UTC) + timedelta(seconds=seconds) for seconds in (2.5, 30))
    ids = await publish(client, 34, marker)
    too_late = [
        *await publish(client, 3, marker, deadline=soon.isoformat()),
        *await publish(client, 3, marker, deadline=later.isoformat()),
    ]

    async def are_requeued() -> bool:
        return await client.depth(worker.jobs_queue) == len(ids)

    # Before the end of Retry-After, when the other jobs are requeued.
    assert statuses(await results(client, too_late, 20.0)) == {"deadline_exceeded": 6}
    await until(are_requeued, "the jobs are requeued")
    status, body = worker.ready()
    assert (status, body["status"]) == (200, "ready")
    assert "may not be called" in body["reasons"][0]
    assert worker.metric("vqa_jobs_in_flight") == 0
    calls = calls_with(own_stack, marker)
    first_429 = min(call.ended or call.started for call in calls)
    # Calls that had begun before the first 429.
    assert max(call.started for call in calls) < first_429 + 20.0
    assert len(calls) <= 32

    own_stack.model.configure(rules=[])
    assert await worker.stop() == 0
    await start_own_worker(like=worker)
    replies = await results(client, ids)
    assert statuses(replies) == {"succeeded": len(ids)}
    assert {reply.body["attempts"] for reply in replies} == {1}
    assert len(calls_with(own_stack, marker)) == len(calls) + len(ids)


async def test_a_model_that_is_limited_does_not_slow_another(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    limited, marker = uuid.uuid4().hex, uuid.uuid4().hex
    busy, idle = own_stack.model.models
    own_stack.model.play(Error(status=429, headers={"Retry-After": "600"}), marker=limited, times=None)
    worker = await start_own_worker(VQA_MODEL=busy, VQA_ALLOWED_MODELS=f"{busy},{idle}")
    client = await own_client_of(worker)
    await publish(client, 3, limited, model=busy)
    await until(lambda: worker.ready()[1]["reasons"], "the worker waits")
    ids = await publish(client, 100, marker, model=idle)
    assert statuses(await results(client, ids)) == {"succeeded": 100}
    assert busy in worker.ready()[1]["reasons"][0]
    # Each job at most once: the others can be on their way when the first is refused.
    assert len(calls_with(own_stack, limited)) <= 3
    # At a stop during Retry-After, waiting jobs are requeued at once.
    assert await worker.stop() == 0
    assert await client.depth(worker.jobs_queue) == 3


# Prefetch


@asynccontextmanager
async def consuming(stack: Stack, messages: int) -> AsyncIterator[tuple[Consumer, list[Delivery]]]:
    """Return a consumer of a new queue with prefetch 3, and the list of its deliveries."""
    name = f"t{uuid.uuid4().hex[:10]}"
    topology = replace(TOPOLOGY, jobs=f"{name}.jobs", results=f"{name}.results", dead_letters=f"{name}.dead")
    came: list[Delivery] = []
    broker = Broker(stack.rabbitmq.url, None, "test")
    control = Control(topology, on_cancel=lambda _: None, on_subscribed=lambda: None)
    consumer = Consumer(broker, topology, control, prefetch=3, on_delivery=came.append)
    running = asyncio.create_task(consumer.run())
    try:
        await until(lambda: consumer.is_connected, "the consumer is connected")
        connection = await aio_pika.connect(stack.rabbitmq.url)
        async with connection:
            channel = await connection.channel()
            for _ in range(messages):
                await channel.default_exchange.publish(aio_pika.Message(b"{}"), topology.jobs)
            yield consumer, came
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def have_come(came: list[Delivery], count: int) -> None:
    """Wait for `count` deliveries, and a moment longer in case there is one more."""
    await until(lambda: len(came) >= count, f"{count} deliveries")
    await asyncio.sleep(0.2)
    assert len(came) == count


async def test_the_consumer_follows_a_changed_prefetch_and_stops_while_held(
    own_stack: Stack,
) -> None:
    async with consuming(own_stack, 30) as (consumer, came):
        await consumer.set_prefetch(4)
        await have_come(came, 0)
        await consumer.resume()
        await have_come(came, 4)
        await consumer.set_prefetch(6)
        await have_come(came, 6)
        # Each settled job is replaced.
        await came[0].ack()
        await came[5].ack()
        await have_come(came, 8)
        # Jobs delivered before stay, and do not count.
        await consumer.set_prefetch(2)
        await have_come(came, 10)
        await came[1].ack()
        await have_come(came, 10)
        await came[-1].ack()
        await have_come(came, 11)
        await consumer.set_prefetch(0)
        await came[-1].ack()
        await have_come(came, 11)
        # While consuming is held, a new prefetch has no effect.
        await consumer.hold()
        await consumer.set_prefetch(5)
        await have_come(came, 11)
        await consumer.resume()
        await have_come(came, 16)
        assert all(delivery.can_ack() for delivery in came)
        assert {delivery.deliveries for delivery in came} == {1}


async def test_the_prefetch_also_holds_for_the_next_connection(own_stack: Stack) -> None:
    async with consuming(own_stack, 10) as (consumer, came):
        await consumer.resume()
        await consumer.set_prefetch(5)
        await have_come(came, 5)
        await lose_the_channel(consumer)
        await until(lambda: consumer.is_connected and len(came) >= 10, "the jobs are redelivered")
        await have_come(came, 10)
        assert [delivery.can_ack() for delivery in came] == [False] * 5 + [True] * 5


async def lose_the_channel(consumer: Consumer) -> None:
    """Close the channel, like an error of the broker."""
    queue = consumer._queue  # noqa: SLF001 - no fault of the broker's ends a single channel on demand
    assert queue is not None
    await queue.channel.close()
    await until(lambda: consumer._queue is not queue, "the loss is noticed")  # noqa: SLF001
