"""Killed workers: the broker redelivers their jobs to the next one."""

import resource
import sys
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from deploy.local.model_simulator.behavior import Answer, Hang
from deploy.local.stack import Stack
from tests.breaking import (
    calls_begun,
    events,
    held_by_broker,
    job,
    model_answered,
    publish,
    results,
    statuses,
)
from tests.conftest import BUCKET, MakeClient, StartWorker, picture
from tests.proxy import Proxy
from tests.running import Client, Worker, calls_with, until

# AMQP 0-9-1: class and method of frames from the worker to the broker.
BASIC_PUBLISH = b"\x00\x3c\x00\x28"
BASIC_ACK = b"\x00\x3c\x00\x50"


@dataclass(frozen=True)
class Life:
    """A job in a worker that will be killed, and the networks between the worker and other services."""

    stack: Stack
    worker: Worker
    client: Client
    broker: Proxy
    s3: Proxy
    model: Proxy
    marker: str
    job_id: str

    async def publish_job(self) -> None:
        key = f"{self.job_id}.png"
        self.stack.s3.client().put_object(Bucket=BUCKET, Key=key, Body=picture())
        await self.client.publish(job(self.marker, f"s3://{BUCKET}/{key}", id=self.job_id))


async def while_its_image_is_read(life: Life) -> None:
    life.s3.freeze()
    await life.publish_job()
    await until(lambda: life.s3.held, "the worker reads the image")


async def before_the_call_gets_through(life: Life) -> None:
    life.model.freeze()
    await life.publish_job()
    await until(lambda: life.model.held, "the worker calls the model")


async def during_the_call(life: Life) -> None:
    life.stack.model.play(Hang(), marker=life.marker)
    await life.publish_job()
    await calls_begun(life.stack, life.marker, 1)


async def after_the_answer(life: Life) -> None:
    life.broker.holds_up = BASIC_PUBLISH
    await life.publish_job()
    await until(lambda: life.broker.holds_up is None, "the worker publishes the result")
    await model_answered(life.stack, life.marker)


async def after_the_result(life: Life) -> None:
    life.broker.holds_up = BASIC_ACK
    await life.publish_job()
    await results(life.client, [life.job_id])
    await until(lambda: life.broker.holds_up is None, "the worker acks")


async def after_the_ack(life: Life) -> None:
    await life.publish_job()
    await results(life.client, [life.job_id])

    async def is_acked() -> bool:
        return await held_by_broker(life.stack, life.worker.jobs_queue) == (0, 0)

    await until(is_acked, "the broker has the ack")


Stage = Callable[[Life], Awaitable[None]]


@pytest.mark.parametrize(
    ("dies", "calls", "answers"),
    [
        (while_its_image_is_read, 1, 1),
        (before_the_call_gets_through, 1, 1),
        (during_the_call, 2, 1),
        (after_the_answer, 2, 1),
        (after_the_result, 2, 2),
        (after_the_ack, 1, 1),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
async def test_a_job_is_answered_even_if_its_worker_is_killed_at_any_step(
    own_stack: Stack,
    start_own_worker: StartWorker,
    own_client_of: MakeClient,
    dies: Stage,
    calls: int,
    answers: int,
) -> None:
    """At least once: killed between result and ack it is answered twice, from the call on billed twice."""
    async with AsyncExitStack() as proxies:
        broker, s3, model = [
            await proxies.enter_async_context(Proxy.before(url))
            for url in (own_stack.rabbitmq.url, own_stack.s3.endpoint_url, own_stack.model.base_url)
        ]
        doomed = await start_own_worker(
            VQA_RABBITMQ_URL=broker.url(own_stack.rabbitmq.url),
            VQA_S3_ENDPOINT_URL=s3.url(own_stack.s3.endpoint_url),
            VQA_MODEL_BASE_URL=model.url(own_stack.model.base_url),
        )
        client = await own_client_of(doomed)
        life = Life(own_stack, doomed, client, broker, s3, model, uuid.uuid4().hex, uuid.uuid4().hex)
        await dies(life)
        doomed.kill()

    worker = await start_own_worker(like=doomed)
    await until(lambda: len(client.replies.get(life.job_id, [])) == answers, "all results")
    # Any other result would have arrived by then.
    await results(client, await publish(client, 1, "afterwards"))
    assert await worker.stop() == 0, worker.output()
    assert {reply.body["status"] for reply in client.replies[life.job_id]} == {"succeeded"}
    assert len(client.replies[life.job_id]) == answers
    assert len(calls_with(own_stack, life.marker)) == calls
    assert await client.depth(worker.jobs_queue) == await client.depth(worker.dead_letter_queue) == 0


LARGE_BYTES = 10_500_000


def data_bytes(pid: int) -> int:
    """Return the size that counts towards RLIMIT_DATA."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmData:")]
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's data so")
async def test_a_worker_out_of_memory_exits_at_once_and_its_job_is_redelivered(
    start_own_worker: StartWorker, own_client_of: MakeClient, own_stack: Stack
) -> None:
    poor = await start_own_worker()
    client = await own_client_of(poor)
    await results(client, await publish(client, 1, "while there is memory"))
    assert poor.process is not None
    # Enough for the job, but not for its answer.
    most = data_bytes(poor.process.pid) + LARGE_BYTES
    resource.prlimit(poor.process.pid, resource.RLIMIT_DATA, (most, most))
    large = job(uuid.uuid4().hex)
    own_stack.model.play(Answer(text="x" * LARGE_BYTES), marker=large["question"])
    await client.publish(large)
    assert await poor.ended() == 1
    assert events(poor, "out_of_memory")

    rich = await start_own_worker(like=poor)
    (reply,) = await results(client, [large["id"]])
    assert (reply.body["status"], reply.body["attempts"]) == ("succeeded", 1)
    assert await rich.stop() == 0, rich.output()


async def test_a_hundred_jobs_of_a_killed_worker_are_all_answered(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    marker = uuid.uuid4().hex
    own_stack.model.play(Answer(after=0.02), marker=marker, times=50)
    own_stack.model.play(Hang(), marker=marker, times=10)
    doomed = await start_own_worker(VQA_MAX_CONCURRENCY="10")
    client = await own_client_of(doomed)
    ids = await publish(client, 100, marker)
    await calls_begun(own_stack, marker, 60)
    await until(lambda: len(client.replies) == 50, "half of the results")
    doomed.kill()

    worker = await start_own_worker(like=doomed, VQA_MAX_CONCURRENCY="10")
    assert statuses(await results(client, ids)) == {"succeeded": 100}
    assert await worker.stop() == 0
    assert await client.depth(worker.jobs_queue) == await client.depth(worker.dead_letter_queue) == 0
    # Only the jobs that were in flight in the killed worker are called a second time.
    calls = Counter(call.question for call in calls_with(own_stack, marker))
    assert Counter(calls.values()) == {1: 90, 2: 10}


async def test_a_job_that_crashes_every_worker_is_removed_and_its_neighbours_are_answered(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    """The test kills each worker that processes the job.

    Each crash counts as a delivery of the neighbours too, which succeed at their last delivery.
    """
    marker, neighbours_marker = uuid.uuid4().hex, uuid.uuid4().hex
    own_stack.model.play(Hang(), marker=marker, times=None)
    own_stack.model.play(Hang(), marker=neighbours_marker, times=3)
    worker = await start_own_worker(VQA_DELIVERY_LIMIT="2")
    client = await own_client_of(worker)
    poison = job(marker)
    await client.publish(poison, correlation_id="its sender's")
    neighbours = await publish(client, 3, neighbours_marker)

    async def only_the_poison_is_left() -> bool:
        return await held_by_broker(own_stack, worker.jobs_queue) == (1, 0)

    for nth in (1, 2):
        await calls_begun(own_stack, marker, nth)
        await calls_begun(own_stack, neighbours_marker, 3 * nth)
        if nth == 1:
            assert client.replies == {}
        else:
            assert statuses(await results(client, neighbours)) == {"succeeded": 3}
            await until(only_the_poison_is_left, "the broker has the acks of the other jobs")
        worker.kill()
        worker = await start_own_worker(like=worker, VQA_DELIVERY_LIMIT="2")

    (reply,) = await results(client, [poison["id"]])
    assert reply.body["error"]["code"] == "attempts_exhausted"
    assert "VQA_DELIVERY_LIMIT" in reply.body["error"]["message"]
    dead = await client.take(worker.dead_letter_queue)
    assert poison["id"] in dead.body.decode()
    assert dead.correlation_id == "its sender's"
    assert dead.headers["vqa-error-code"] == "attempts_exhausted"
    assert len(calls_with(own_stack, marker)) == 2
    assert await worker.stop() == 0
    assert await client.depth(worker.jobs_queue) == await client.depth(worker.dead_letter_queue) == 0
    assert all(len(client.replies[it]) == 1 for it in neighbours)
