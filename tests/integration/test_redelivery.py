"""Lost connections: the broker redelivers, and no job is billed or answered twice."""

import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass

import pytest

from deploy.local.stack import Stack
from tests.breaking import BrokerUser, events, job, publish, results
from tests.proxy import Proxy
from tests.running import Client, Worker, calls_with, until

BASIC_CONSUME = b"\x00\x3c\x00\x14"
"""AMQP 0-9-1 class and method that identify the worker's consumer connection."""


@dataclass(frozen=True)
class Scene:
    """A worker, its publisher, its broker user, and the networks to the broker and the model."""

    stack: Stack
    worker: Worker
    client: Client
    user: BrokerUser
    proxy: Proxy
    model: Proxy

    def connections_made(self) -> int:
        """Return how often the worker's consumer has connected."""
        return len(events(self.worker, "rabbitmq_connected"))

    async def connected_again(self, before: int) -> None:
        """Wait until it has connected more than `before` times."""
        await until(lambda: self.connections_made() > before, "the worker is connected again")

    async def held(self, count: int) -> None:
        """Wait until `count` jobs have begun, which end only after the network to the model thaws."""
        await until(lambda: self.model.held == count, f"{count} jobs have begun")

    def answers(self, ids: list[str]) -> list[int]:
        """Return the number of results of each job."""
        return [len(self.client.replies.get(it, [])) for it in ids]

    async def all_is_settled(self) -> None:
        """Wait until no job is in flight: any further result would have been published."""
        await until(lambda: self.worker.metric("vqa_jobs_in_flight") == 0, "nothing is in flight")
        await results(self.client, await publish(self.client, 1, "afterwards"))


@pytest.fixture(scope="module")
async def scene(own_stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    async with AsyncExitStack() as resources:
        user = resources.enter_context(BrokerUser.of(own_stack))
        proxy = await resources.enter_async_context(Proxy.before(own_stack.rabbitmq.url))
        model = await resources.enter_async_context(Proxy.before(own_stack.model.base_url))
        worker = Worker.of(
            own_stack,
            tmp_path_factory.mktemp("redelivery"),
            VQA_RABBITMQ_URL=proxy.url(user.url),
            VQA_MODEL_BASE_URL=model.url(own_stack.model.base_url),
            VQA_DELIVERY_LIMIT="2",
        )
        resources.callback(worker.kill)
        await worker.start()
        client = await resources.enter_async_context(Client.of(own_stack, worker))
        yield Scene(own_stack, worker, client, user, proxy, model)
        assert await worker.stop() == 0, worker.output()
        # Unacked messages would be ready again.
        assert await client.depth(worker.jobs_queue) == 0
        assert await client.depth(worker.dead_letter_queue) == 0


async def test_running_jobs_are_billed_and_answered_once_after_lost_connections(
    scene: Scene,
) -> None:
    """The broker closes the connections, then the network resets them: three deliveries of each job."""
    marker = uuid.uuid4().hex
    scene.model.freeze()
    ids = await publish(scene.client, 3, marker)
    await scene.held(3)
    for lose in (scene.user.close_connections, scene.proxy.reset):
        before = scene.connections_made()
        lose()
        await scene.connected_again(before)
    scene.model.thaw()
    replies = await results(scene.client, ids)
    await scene.all_is_settled()

    assert {(reply.body["status"], reply.body["attempts"]) for reply in replies} == {("succeeded", 1)}
    assert len(calls_with(scene.stack, marker)) == 3
    assert scene.answers(ids) == [1, 1, 1]


async def test_jobs_that_wait_for_a_slot_are_billed_once_after_a_lost_connection(scene: Scene) -> None:
    marker = uuid.uuid4().hex
    scene.model.freeze()
    ids = await publish(scene.client, 40, marker)
    # The limit starts at 32.
    await scene.held(32)
    await until(lambda: scene.worker.metric("vqa_jobs_in_flight") == 40, "all jobs are prefetched")
    before = scene.connections_made()
    scene.proxy.reset()
    await scene.connected_again(before)
    scene.model.thaw()
    await results(scene.client, ids)
    await scene.all_is_settled()

    assert len(calls_with(scene.stack, marker)) == 40
    assert set(scene.answers(ids)) == {1}


async def test_a_job_whose_ack_is_lost_is_neither_billed_nor_answered_again(scene: Scene) -> None:
    marker = uuid.uuid4().hex
    scene.model.freeze()
    ids = await publish(scene.client, 2, marker)
    await scene.held(2)
    (consuming,) = [link for link in scene.proxy.links if BASIC_CONSUME in link.sent]
    consuming.swallows_sent = True
    scene.model.thaw()
    await results(scene.client, ids)
    await until(lambda: scene.worker.metric("vqa_jobs_in_flight") == 0, "the acks are sent")
    before = scene.connections_made()
    consuming.reset()
    await scene.connected_again(before)
    await scene.all_is_settled()

    assert len(calls_with(scene.stack, marker)) == 2
    assert scene.answers(ids) == [1, 1]


@pytest.mark.parametrize("is_lost", [False, True], ids=["connected", "with a lost connection"])
async def test_a_message_that_was_published_twice_gets_two_results(scene: Scene, *, is_lost: bool) -> None:
    marker = uuid.uuid4().hex
    duplicate = job(marker)
    scene.model.freeze()
    for _ in range(2):
        await scene.client.publish(duplicate, message_id="the same")
    await until(lambda: scene.model.held, "the job has begun")
    if is_lost:
        before = scene.connections_made()
        scene.proxy.reset()
        await scene.connected_again(before)
    scene.model.thaw()
    await until(lambda: scene.answers([duplicate["id"]]) == [2], "two results")
    await scene.all_is_settled()

    assert scene.answers([duplicate["id"]]) == [2]
    assert {reply.body["status"] for reply in scene.client.replies[duplicate["id"]]} == {"succeeded"}
