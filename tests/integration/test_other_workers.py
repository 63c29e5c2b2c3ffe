"""Two workers without a result store: a job whose worker loses its connection is paid and answered once."""

import json
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass

import aio_pika
import pytest

from deploy.local.model_simulator.behavior import Answer
from deploy.local.stack import Stack
from tests.breaking import BrokerUser, calls_begun, events, publish, results, statuses
from tests.conftest import StartWorker
from tests.proxy import Proxy
from tests.running import Client, Worker, calls_with, until

JOBS = 6


@dataclass(frozen=True)
class Scene:
    """Two workers on one queue; the first one is connected through a proxy."""

    stack: Stack
    user: BrokerUser
    proxy: Proxy
    first: Worker
    second: Worker
    client: Client

    def redelivered(self, result: str) -> float:
        return self.second.metric("vqa_redelivered_jobs_total", result=result)


@pytest.fixture
async def scene(stack: Stack, start_worker: StartWorker) -> AsyncIterator[Scene]:
    async with AsyncExitStack() as resources:
        user = resources.enter_context(BrokerUser.of(stack))
        proxy = await resources.enter_async_context(Proxy.before(stack.rabbitmq.url))
        first = await start_worker(VQA_RABBITMQ_URL=proxy.url(stack.rabbitmq.url))
        client = await resources.enter_async_context(Client.of(stack, first))
        names = {"VQA_JOBS_QUEUE": first.jobs_queue, "VQA_RESULTS_QUEUE": first.results_queue}
        second = await start_worker(**names, VQA_RABBITMQ_URL=user.url)
        yield Scene(stack, user, proxy, first, second, client)


async def test_the_other_worker_waits_for_the_one_that_has_the_call(scene: Scene) -> None:
    marker = uuid.uuid4().hex
    scene.stack.model.play(Answer(after=8), marker=marker, times=None)
    ids = await publish(scene.client, JOBS, marker)
    await calls_begun(scene.stack, marker, JOBS)
    before = len(events(scene.first, "rabbitmq_connected"))
    scene.proxy.reset()
    await until(lambda: len(events(scene.first, "rabbitmq_connected")) > before, "it is connected again")
    assert statuses(await results(scene.client, ids)) == {"succeeded": JOBS}
    for worker in (scene.first, scene.second):
        await until(lambda worker=worker: worker.metric("vqa_jobs_in_flight") == 0, "nothing is in flight")
    assert len(calls_with(scene.stack, marker)) == JOBS
    assert [len(scene.client.replies[it]) for it in ids] == [1] * JOBS
    assert scene.redelivered("processed") == 0
    assert scene.redelivered("published_elsewhere") > 0


async def test_the_jobs_of_a_dead_worker_are_processed(scene: Scene) -> None:
    marker = uuid.uuid4().hex
    scene.stack.model.play(Answer(after=10), marker=marker, times=JOBS)
    ids = await publish(scene.client, JOBS, marker)
    await calls_begun(scene.stack, marker, JOBS)
    scene.first.kill()
    assert statuses(await results(scene.client, ids)) == {"succeeded": JOBS}
    assert scene.redelivered("published_elsewhere") == 0


async def test_a_worker_that_may_not_ask_processes_redelivered_jobs(scene: Scene) -> None:
    # It has its queue and the binding already.
    scene.user.permit(write=r"^amq\.(default|gen-.*)$")
    marker = uuid.uuid4().hex
    scene.stack.model.play(Answer(after=10), marker=marker, times=JOBS)
    ids = await publish(scene.client, JOBS, marker)
    await calls_begun(scene.stack, marker, JOBS)
    scene.first.kill()
    assert statuses(await results(scene.client, ids)) == {"succeeded": JOBS}
    await until(lambda: events(scene.second, "publish_failed"), "it is logged")
    (line,) = events(scene.second, "publish_failed")
    assert line["exchange"] == f"{scene.first.jobs_queue}.control"


async def test_malformed_questions_and_answers_are_ignored(scene: Scene) -> None:
    key = "0" * 64
    bodies = [
        {"asked": "all"}, {"asked": [1]}, {"asked": ["x"]}, {"asked": [key], "cancel": "a"},
        {"answer": [key]}, {"answer": {"x": "running"}}, {"answers": {key: "running"}}, {}, [], "asked",
    ]  # fmt: skip
    harmless = [{"asked": []}, {"asked": [key]}, {"answer": {key: "sleeping"}}, {"answer": {key: ["a"]}}]
    async with await aio_pika.connect(scene.stack.rabbitmq.url) as connection:
        channel = await connection.channel()
        control = await channel.get_exchange(f"{scene.first.jobs_queue}.control", ensure=False)
        for body in (*harmless, *bodies):
            await control.publish(aio_pika.Message(json.dumps(body).encode()), "")
    await until(
        lambda: len(events(scene.second, "control_message_ignored")) >= len(bodies), "they are ignored"
    )
    assert len(events(scene.second, "control_message_ignored")) == len(bodies)
    assert scene.second.ready()[0] == 200
