"""What a job keeps when it is retried, requeued or dead-lettered, its expiration included."""

import json
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import aio_pika
import pytest
from aio_pika.abc import AbstractIncomingMessage

from deploy.local.model_simulator.behavior import Error
from deploy.local.stack import Stack
from tests.breaking import job, publish, results, said, statuses
from tests.conftest import MakeClient, StartWorker
from tests.running import Client, Worker, calls_with, until

HEADERS: dict[str, Any] = {
    "tenant": "a",
    "x-request-id": "r-1",
    "number": -7,
    "ratio": 0.5,
    "list": ["a", 1, True],
    "table": {"a": {"CC": ["other"]}},
}
ROUTING: dict[str, Any] = {
    "x-death": [{"queue": "elsewhere", "reason": "expired", "count": 3}],
    "x-first-death-queue": "elsewhere",
    "x-delivery-count": 3,
    "x-opt-other": 1,
}
PROPERTIES: dict[str, Any] = {
    "content_type": "application/json",
    "content_encoding": "utf-8",
    "priority": 7,
    "correlation_id": "c-1",
    "message_id": "m-1",
    "type": "a.job.v2",
    "app_id": "backend",
}


@pytest.fixture(autouse=True)
def _repaired(stack: Stack) -> Any:
    """Restore the behavior of the model API after each test."""
    yield
    stack.model.configure(rules=[])


async def copies(
    start_worker: StartWorker, client_of: MakeClient, stack: Stack, kind: str
) -> tuple[bytes, datetime, AbstractIncomingMessage]:
    """Publish a job that a worker retries, requeues or dead-letters; return body, timestamp and copy."""
    settings = {"VQA_RETRY_DELAYS": "300", "VQA_MAX_ATTEMPTS": "1" if kind == "dead letter" else "3"}
    worker = await start_worker(**settings)
    client = await client_of(worker)
    marker = uuid.uuid4().hex
    stack.model.play(Error(status=401 if kind == "requeue" else 500), marker=marker, times=None)
    body = json.dumps(job(marker)).encode()
    sent = datetime.now(UTC).replace(microsecond=0) - timedelta(seconds=5)
    headers = {**HEADERS, **ROUTING}
    await client.publish(body, headers=headers, expiration=600, timestamp=sent, **PROPERTIES)
    if kind == "requeue":
        await said(worker, "paused")
        assert await worker.stop() == 0
    queues = {
        "retry": f"{worker.jobs_queue}.retry.300s",
        "requeue": worker.jobs_queue,
        "dead letter": worker.dead_letter_queue,
    }
    return body, sent, await client.take(queues[kind])


@pytest.mark.parametrize("kind", ["retry", "requeue", "dead letter"])
async def test_a_copy_keeps_what_belongs_to_the_job(
    start_worker: StartWorker, client_of: MakeClient, stack: Stack, kind: str
) -> None:
    body, sent, copy = await copies(start_worker, client_of, stack, kind)
    assert copy.body == body
    for name, value in {**PROPERTIES, "timestamp": sent}.items():
        assert getattr(copy, name) == value, name
    assert {name: copy.headers.get(name) for name in HEADERS} == HEADERS
    assert not ROUTING.keys() & copy.headers.keys() - {"x-delivery-count"}
    # RabbitMQ itself sets it.
    assert copy.headers.get("x-delivery-count", 0) == 0
    assert copy.user_id is None
    assert copy.delivery_mode is aio_pika.DeliveryMode.PERSISTENT

    expires_at = copy.headers.get("vqa-expires-at")
    if kind == "dead letter":
        assert (copy.expiration, expires_at) == (None, None)
        return
    error = datetime.fromisoformat(str(expires_at)) - sent - timedelta(seconds=600)
    assert abs(error.total_seconds()) < 0.1
    assert isinstance(copy.expiration, float)
    assert 400 < copy.expiration <= 595


@pytest.fixture
async def paused(start_worker: StartWorker, client_of: MakeClient, stack: Stack) -> tuple[Worker, Client]:
    """A paused worker whose model API refuses all jobs with a marker."""
    marker = uuid.uuid4().hex
    stack.model.play(Error(status=401), marker=marker, times=None)
    worker = await start_worker()
    client = await client_of(worker)
    await publish(client, 1, marker)
    await said(worker, "paused")
    return worker, client


def last_death(dead_letter: AbstractIncomingMessage) -> dict[str, Any]:
    """Return RabbitMQ's latest entry in `x-death`."""
    deaths: Any = dead_letter.headers["x-death"]
    found: dict[str, Any] = deaths[0]
    return found


async def test_jobs_that_expire_in_an_outage_are_dead_lettered_and_not_paid_for(
    stack: Stack, paused: tuple[Worker, Client]
) -> None:
    worker, client = paused
    marker = uuid.uuid4().hex
    stack.model.play(Error(status=401), marker=marker, times=None)
    asked = [job(f"{marker} {n}") for n in range(5)]
    async with client.reading(worker.dead_letter_queue) as dead_letters:
        for it in asked:
            await client.publish(it, expiration=1.5)
        await until(lambda: len(dead_letters) == 5, "the dead letters of the expired jobs")
    calls = len(calls_with(stack, marker))
    stack.model.configure(rules=[])
    await results(client, await publish(client, 3, "afterwards"))

    assert {json.loads(it.body)["id"] for it in dead_letters} == {it["id"] for it in asked}
    assert {last_death(it)["reason"] for it in dead_letters} == {"expired"}
    assert len(calls_with(stack, marker)) == calls
    assert not any(client.replies.get(it["id"]) for it in asked)


async def test_a_copy_that_has_expired_fails_without_a_call(stack: Stack, client: Client) -> None:
    """As after a retry queue, where RabbitMQ removes the `expiration`."""
    marker = uuid.uuid4().hex
    late, soon = job(marker), job(marker)
    await client.publish(late, headers={"vqa-expires-at": "2020-01-01T00:00:00Z"})
    await client.publish(soon, headers={"vqa-expires-at": "2999-01-01T00:00:00Z"})

    error = (await client.result(late["id"])).body["error"]
    assert error["code"] == "deadline_exceeded"
    assert "the message's expiration" in error["message"]
    assert (await client.result(soon["id"])).body["status"] == "succeeded"
    assert len(calls_with(stack, marker)) == 1


async def test_a_job_that_would_expire_before_its_retry_fails_at_once(
    start_worker: StartWorker, client_of: MakeClient, stack: Stack
) -> None:
    worker = await start_worker(VQA_RETRY_DELAYS="300")
    client = await client_of(worker)
    marker = uuid.uuid4().hex
    stack.model.play(Error(status=500), marker=marker, times=None)
    asked = job(marker)
    await client.publish(asked, expiration=100)

    assert (await client.result(asked["id"])).body["error"]["code"] == "deadline_exceeded"
    assert len(calls_with(stack, marker)) == 1


async def test_urgent_jobs_are_still_first_after_an_outage(
    start_worker: StartWorker, client_of: MakeClient, stack: Stack
) -> None:
    """On a classic queue with priorities, which somebody else has declared."""
    marker = uuid.uuid4().hex
    worker = await start_worker(
        wait=False, VQA_DECLARE_TOPOLOGY="false", VQA_MAX_CONCURRENCY="1", VQA_RETRY_DELAYS="1"
    )
    async with await aio_pika.connect(stack.rabbitmq.url) as connection:
        channel = await connection.channel()
        await channel.declare_queue(worker.jobs_queue, durable=True, arguments={"x-max-priority": 10})
        for name in (worker.results_queue, worker.dead_letter_queue, f"{worker.jobs_queue}.retry.1s"):
            await channel.declare_queue(name, durable=True)
    stack.model.play(Error(status=401), marker=marker, times=None)
    client = await client_of(worker)
    usual = await publish(client, 6, marker)
    urgent = job(f"{marker} urgent")
    await client.publish(urgent, priority=9)
    await worker.start()
    await said(worker, "paused")
    await until(lambda: worker.metric("vqa_jobs_in_flight") == 0, "the jobs are requeued")
    stack.model.configure(rules=[])
    assert statuses(await results(client, [urgent["id"], *usual])) == {"succeeded": 7}

    first, *_ = [call.question for call in calls_with(stack, marker) if call.status == 200]
    assert first == f"{marker} urgent"
