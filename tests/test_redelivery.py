"""Connections that are lost: the broker delivers again, and nothing is paid for or answered twice."""

import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from deploy.local.stack import Stack
from deploy.local.standin.behaviour import Answer
from tests.breaking import BrokerUser, calls_begun, events, job, publish, results
from tests.proxy import Proxy
from tests.running import Client, Worker, calls_with, until

BASIC_CONSUME = b"\x00\x3c\x00\x14"
"""AMQP 0-9-1: the class and method by which the worker's consuming connection gives itself away."""


@dataclass(frozen=True)
class Scene:
    """A worker, its publisher, its user at the broker, and the network between the worker and the broker."""

    stack: Stack
    worker: Worker
    client: Client
    user: BrokerUser
    proxy: Proxy

    def connections_made(self) -> int:
        """How often the worker's consumer has connected so far."""
        return len(events(self.worker, "rabbitmq_connected"))

    async def connected_again(self, before: int) -> None:
        """Wait until it has connected once more than `before` times."""
        await until(lambda: self.connections_made() > before, "it is connected again")

    def answers(self, ids: list[str]) -> list[int]:
        """How many results there are for each job."""
        return [len(self.client.replies.get(it, [])) for it in ids]

    async def all_is_settled(self) -> None:
        """Wait until the worker has nothing in hand: another result of what it had would be out by then."""
        await until(lambda: self.worker.metric("vqa_jobs_in_flight") == 0, "nothing is in flight")
        await results(self.client, await publish(self.client, 1, "afterwards"))


@pytest.fixture(scope="module")
async def scene(own_stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    with BrokerUser.of(own_stack) as user:
        async with Proxy.before(own_stack.rabbitmq.url) as proxy:
            folder = tmp_path_factory.mktemp("redelivery")
            settings = {"VQA_RABBITMQ_URL": proxy.url(user.url), "VQA_DELIVERY_LIMIT": "2"}
            worker = Worker.of(own_stack, folder, **settings)
            try:
                await worker.start()
                async with Client.of(own_stack, worker) as client:
                    yield Scene(own_stack, worker, client, user, proxy)
                    assert await worker.stop() == 0, worker.output()
                    # What the worker had not acked would be ready again.
                    assert await client.depth(worker.jobs_queue) == 0
                    assert await client.depth(worker.dead_letter_queue) == 0
            finally:
                worker.kill()


async def test_jobs_whose_connections_are_lost_while_they_run_are_paid_once_and_answered_once(
    scene: Scene,
) -> None:
    """First the broker closes them, with a reason, then they break off: that makes three deliveries."""
    marker = uuid.uuid4().hex
    scene.stack.model.play(Answer(after=2), marker=marker, times=None)
    ids = await publish(scene.client, 3, marker)
    await calls_begun(scene.stack, marker, 3)
    for lose in (scene.user.close_connections, scene.proxy.reset):
        before = scene.connections_made()
        lose()
        await scene.connected_again(before)
    replies = await results(scene.client, ids)
    await scene.all_is_settled()

    assert {(reply.body["status"], reply.body["attempts"]) for reply in replies} == {("succeeded", 1)}
    assert len(calls_with(scene.stack, marker)) == 3
    assert scene.answers(ids) == [1, 1, 1]


async def test_a_job_that_waits_for_a_slot_outlives_its_connection_and_is_paid_once(scene: Scene) -> None:
    marker = uuid.uuid4().hex
    scene.stack.model.play(Answer(after=0.5), marker=marker, times=None)
    scene.stack.model.configure(max_concurrent=1, retry_after="0.3")
    try:
        ids = await publish(scene.client, 3, marker)
        await calls_begun(scene.stack, marker, 1)
        await until(lambda: scene.worker.metric("vqa_jobs_in_flight") == 3, "all jobs are prefetched")
        before = scene.connections_made()
        scene.proxy.reset()
        await scene.connected_again(before)
        await results(scene.client, ids)
        await scene.all_is_settled()
    finally:
        scene.stack.model.configure(max_concurrent=None, retry_after=None)

    paid = [call for call in calls_with(scene.stack, marker) if call.status == 200]
    assert len(paid) == 3
    assert scene.answers(ids) == [1, 1, 1]


async def test_a_job_whose_ack_is_lost_on_the_way_is_neither_paid_nor_answered_again(scene: Scene) -> None:
    marker = uuid.uuid4().hex
    scene.stack.model.play(Answer(after=0.5), marker=marker, times=None)
    ids = await publish(scene.client, 2, marker)
    await calls_begun(scene.stack, marker, 2)
    (consuming,) = [link for link in scene.proxy.links if BASIC_CONSUME in link.sent]
    consuming.swallows_sent = True
    await results(scene.client, ids)
    before = scene.connections_made()
    consuming.reset()
    await scene.connected_again(before)
    await scene.all_is_settled()

    assert len(calls_with(scene.stack, marker)) == 2
    assert scene.answers(ids) == [1, 1]


@pytest.mark.parametrize("is_lost", [False, True], ids=["in peace", "with a lost connection"])
async def test_a_message_that_was_published_twice_gets_a_result_each(scene: Scene, *, is_lost: bool) -> None:
    marker = uuid.uuid4().hex
    scene.stack.model.play(Answer(after=0.7), marker=marker, times=None)
    twin = job(marker)
    for _ in range(2):
        await scene.client.publish(twin, message_id="the same")
    await calls_begun(scene.stack, marker, 1)
    if is_lost:
        scene.proxy.reset()
    await until(lambda: scene.answers([twin["id"]]) == [2], "two results")
    await scene.all_is_settled()

    assert scene.answers([twin["id"]]) == [2]
    assert {reply.body["status"] for reply in scene.client.replies[twin["id"]]} == {"succeeded"}
