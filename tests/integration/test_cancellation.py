"""Cancel jobs that are running, queued, waiting for a retry, finished or unknown."""

import json
import uuid
from typing import Any

import aio_pika
import pytest
from aio_pika.exceptions import ChannelNotFoundEntity

from deploy.local.model_simulator.behavior import Error, Hang
from deploy.local.stack import Stack
from tests.breaking import BrokerUser, calls_begun, events, job, publish, results, statuses
from tests.conftest import BUCKET, MakeClient, StartWorker
from tests.running import Client, Worker, calls_with, until


async def send_control_messages(stack: Stack, worker: Worker, *bodies: bytes) -> None:
    """Publish messages on the worker's control exchange."""
    connection = await aio_pika.connect(stack.rabbitmq.url)
    async with connection:
        channel = await connection.channel()
        exchange = await channel.get_exchange(f"{worker.jobs_queue}.control")
        for body in bodies:
            await exchange.publish(aio_pika.Message(body), "")


async def cancel(stack: Stack, worker: Worker, job_id: str, *, times: int = 1) -> None:
    await send_control_messages(stack, worker, *[json.dumps({"cancel": job_id}).encode()] * times)


async def nothing_is_left(client: Client, worker: Worker) -> bool:
    names = (worker.jobs_queue, f"{worker.jobs_queue}.retry.1s", worker.dead_letter_queue)
    return not any([await client.depth(name) for name in names])


@pytest.mark.parametrize("times", [1, 3])
async def test_a_running_call_is_aborted_and_its_job_gets_one_result_however_often_it_is_cancelled(
    stack: Stack, start_worker: StartWorker, client_of: MakeClient, times: int
) -> None:
    marker = uuid.uuid4().hex
    stack.model.play(Hang(), marker=marker, times=None)
    first = await start_worker()
    second = await start_worker(like=first)
    client = await client_of(first)
    taken, other = job(marker, metadata={"mine": 1}), job("another one")
    await client.publish(taken, correlation_id="its sender's")
    await calls_begun(stack, marker, 1)
    await cancel(stack, first, taken["id"], times=times)

    reply = await client.result(taken["id"])
    assert (reply.body["status"], reply.body["answer"]) == ("failed", None)
    assert reply.body["error"]["code"] == "cancelled"
    assert reply.body["error"]["retryable"] is False
    assert reply.body["metadata"] == {"mine": 1}
    assert reply.message.correlation_id == "its sender's"
    # The model request was aborted before its response: it may have been billed.
    await until(lambda: [call.ended for call in calls_with(stack, marker)] != [None], "the call is aborted")
    assert len(calls_with(stack, marker)) == 1
    workers = (first, second)
    assert sum(worker.metric("vqa_ambiguous_calls_total") for worker in workers) == 1
    # Counted after the ack, and the result comes before.
    await until(
        lambda: sum(worker.metric("vqa_jobs_total", error="cancelled") for worker in workers) == 1,
        "the job is counted",
    )
    await until(lambda: all(events(worker, "job_cancelled") for worker in workers), "both workers log it")
    # The workers process later jobs as usual.
    await client.publish(other)
    assert (await client.result(other["id"])).body["status"] == "succeeded"
    assert len(client.replies[taken["id"]]) == 1
    assert await nothing_is_left(client, first)


async def test_a_cancelled_job_in_the_queue_is_dropped_when_it_is_delivered(
    stack: Stack, start_worker: StartWorker, client_of: MakeClient
) -> None:
    marker = uuid.uuid4().hex
    stack.model.play(Hang(), marker=marker)
    worker = await start_worker(VQA_MAX_CONCURRENCY="1")
    client = await client_of(worker)
    (running,) = await publish(client, 1, marker)
    await calls_begun(stack, marker, 1)
    waiting = await publish(client, 3, marker)
    for job_id in (*waiting[:2], running):
        await cancel(stack, worker, job_id)

    assert statuses(await results(client, [running, *waiting])) == {"cancelled": 3, "succeeded": 1}
    assert client.replies[waiting[2]][0].body["status"] == "succeeded"
    # One call for the running job and one for the job that was not cancelled.
    assert len(calls_with(stack, marker)) == 2
    assert await nothing_is_left(client, worker)


async def test_a_cancelled_job_that_waits_for_a_retry_is_dropped(
    stack: Stack, start_worker: StartWorker, client_of: MakeClient
) -> None:
    marker = uuid.uuid4().hex
    stack.model.play(Error(status=500), marker=marker, times=None)
    worker = await start_worker(VQA_MAX_ATTEMPTS="1000")
    client = await client_of(worker)
    (job_id,) = await publish(client, 1, marker)
    await until(lambda: worker.metric("vqa_retries_total") >= 1, "a retry")
    await cancel(stack, worker, job_id)
    (reply,) = await results(client, [job_id])
    assert reply.body["error"]["code"] == "cancelled"
    assert await nothing_is_left(client, worker)


async def test_cancellations_of_finished_or_unknown_jobs_and_invalid_messages_have_no_effect(
    stack: Stack, start_worker: StartWorker, client_of: MakeClient
) -> None:
    worker = await start_worker()
    client = await client_of(worker)
    (done,) = await publish(client, 1, "What is it?")
    await results(client, [done])
    invalid: list[Any] = [
        {},
        [],
        "x",
        {"cancel": 7},
        {"cancel": ""},
        {"cancel": "a\nb"},
        {"cancel": "a", "b": 1},
    ]
    bodies = [b"", b"\xff", b"[" * 100_000, *(json.dumps(it).encode() for it in invalid)]
    for body in bodies:
        await send_control_messages(stack, worker, body)
    await cancel(stack, worker, done)
    await cancel(stack, worker, "nobody's")
    await until(lambda: len(events(worker, "job_cancelled")) == 2, "the valid cancellations are logged")

    assert len(events(worker, "control_message_ignored")) == len(bodies)
    assert statuses(await results(client, await publish(client, 2, "What is it?"))) == {"succeeded": 2}
    assert len(client.replies[done]) == 1


async def test_a_worker_that_starts_later_loads_cancellations_from_the_result_store(
    stack: Stack, start_worker: StartWorker, client_of: MakeClient
) -> None:
    marker = uuid.uuid4().hex
    settings = {"VQA_RESULT_STORE": f"s3://{BUCKET}/{marker}"}
    early = await start_worker(**settings)
    client = await client_of(early)
    cancelled, kept = job(marker), job(marker)
    await cancel(stack, early, cancelled["id"])

    def cancelled_jobs() -> int:
        found = stack.s3.client().list_objects_v2(Bucket=BUCKET, Prefix=f"{marker}/cancelled/")
        return found["KeyCount"]

    await until(cancelled_jobs, "the cancellation marker")
    assert await early.stop() == 0
    for it in (cancelled, kept):
        await client.publish(it)
    late = await start_worker(like=early, **settings)

    assert (await client.result(cancelled["id"])).body["error"]["code"] == "cancelled"
    assert (await client.result(kept["id"])).body["status"] == "succeeded"
    assert len(calls_with(stack, marker)) == 1
    # A user who can list the bucket cannot see job ids.
    listed = stack.s3.client().list_objects_v2(Bucket=BUCKET, Prefix=marker)["Contents"]
    assert not [it["Key"] for it in listed if cancelled["id"] in it["Key"] or kept["id"] in it["Key"]]
    assert await late.stop() == 0


async def test_a_worker_without_permission_for_cancellations_logs_that_and_processes_jobs(
    stack: Stack, start_worker: StartWorker, client_of: MakeClient
) -> None:
    """The permission is `^amq\\.gen-.*$` in addition to the names of its queues."""
    maker = await start_worker()
    assert await maker.stop() == 0
    with BrokerUser.of(stack, configure="^t[0-9a-f]+\\.") as user:
        worker = await start_worker(like=maker, VQA_RABBITMQ_URL=user.url)
        client = await client_of(worker)
        assert statuses(await results(client, await publish(client, 1, "What is it?"))) == {"succeeded": 1}
        (line,) = events(worker, "cancellation_forbidden")
        assert "ACCESS_REFUSED" in line["reason"]
        assert worker.ready() == (200, {"status": "ready", "reasons": []})

    with BrokerUser.of(stack, configure="^(t[0-9a-f]+\\..*|amq\\.gen-.*)$") as user:
        worker = await start_worker(like=maker, VQA_RABBITMQ_URL=user.url)
        await cancel(stack, worker, "some job's")
        await until(lambda: events(worker, "job_cancelled"), "the cancellation is logged")


async def test_a_missing_control_exchange_without_permission_to_declare_it_is_not_an_error(
    stack: Stack, start_worker: StartWorker, client_of: MakeClient
) -> None:
    maker = await start_worker()
    assert await maker.stop() == 0
    connection = await aio_pika.connect(stack.rabbitmq.url)
    async with connection:
        channel = await connection.channel()
        await channel.exchange_delete(f"{maker.jobs_queue}.control")
    worker = await start_worker(like=maker, VQA_DECLARE_TOPOLOGY="false")
    client = await client_of(worker)
    assert statuses(await results(client, await publish(client, 1, "What is it?"))) == {"succeeded": 1}
    (line,) = events(worker, "cancellation_forbidden")
    assert line["exchange"] == f"{worker.jobs_queue}.control"
    assert ChannelNotFoundEntity.__name__ not in line["reason"]
