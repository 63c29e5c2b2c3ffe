"""Each refusal by the broker is logged; no result is lost and no job billed twice."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel
from aio_pika.exceptions import DeliveryError

from deploy.local.model_simulator.behavior import Answer, Error
from deploy.local.stack import Stack
from tests.breaking import (
    BrokerUser,
    administer,
    calls_begun,
    events,
    held_by_broker,
    job,
    model_answered,
    policy,
    publish,
    results,
    said,
    statuses,
    url_as,
)
from tests.conftest import MakeClient, StartWorker
from tests.proxy import Proxy
from tests.running import Worker, calls_with, until

# A worker that leaves a refused copy to the broker after two tries instead of one minute.
FEW_COPY_TRIES = """
from worker.rabbitmq import messages, settlement
messages.COPY_TRIES, settlement.COPY_ROUNDS = 2, 1
"""


async def open_channel(resources: AsyncExitStack, url: str) -> AbstractChannel:
    """Open a channel on a new connection."""
    connection = await resources.enter_async_context(await aio_pika.connect(url))
    return await connection.channel(on_return_raises=True)


async def send(channel: AbstractChannel, worker: Worker, marker: str) -> str:
    """Publish a job; return its id."""
    body = job(marker)
    message = aio_pika.Message(json.dumps(body).encode())
    await channel.default_exchange.publish(message, worker.jobs_queue)
    return str(body["id"])


def refusals(worker: Worker, queue: str) -> tuple[int, list[str]]:
    """Return how many publishes to a queue failed, and the reasons logged as warnings."""
    failed = [line for line in events(worker, "publish_failed") if line["routing_key"] == queue]
    return len(failed), [line["reason"] for line in failed if line["level"] == "warning"]


@asynccontextmanager
async def limited(stack: Stack, queue: str, most: int) -> AsyncIterator[None]:
    """Limit a queue to `most` messages by an administrator's policy."""
    with policy(stack, queue, {"max-length": most, "overflow": "reject-publish"}):
        yield


async def is_full(channel: AbstractChannel, queue: str, body: bytes) -> bool:
    """Publish one more message; return whether the broker refused it."""
    try:
        await channel.default_exchange.publish(aio_pika.Message(body), queue)
    except DeliveryError:
        return True
    return False


# Permissions that an administrator revokes while the worker runs


@dataclass(frozen=True)
class Realm:
    """A worker in its own virtual host, where the test grants and revokes permissions."""

    stack: Stack
    worker: Worker
    user: BrokerUser
    model: Proxy

    def make(self) -> None:
        """Create the virtual host and its permissions."""
        path = f"/api/vhosts/{self.user.vhost}"
        administer(self.stack, "PUT", path)
        everything = {"configure": ".*", "write": ".*", "read": ".*"}
        administer(self.stack, "PUT", f"/api/permissions/{self.user.vhost}/guest", everything)
        self.user.permit()

    def delete(self) -> None:
        administer(self.stack, "DELETE", f"/api/vhosts/{self.user.vhost}")

    @property
    def url(self) -> str:
        """Return the URL for the test itself."""
        return url_as(self.stack, "guest", "guest", self.user.vhost)


@pytest.fixture(scope="module")
async def realm(own_stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Realm]:
    vhost = uuid.uuid4().hex
    await asyncio.to_thread(administer, own_stack, "PUT", f"/api/vhosts/{vhost}")
    with BrokerUser.of(own_stack, vhost=vhost) as user:
        async with Proxy.before(own_stack.model.base_url) as model:
            worker = Worker.of(
                own_stack,
                tmp_path_factory.mktemp("realm"),
                VQA_RABBITMQ_URL=user.url,
                VQA_MODEL_BASE_URL=model.url(own_stack.model.base_url),
                VQA_LOG_LEVEL="debug",
            )
            realm = Realm(own_stack, worker, user, model)
            await asyncio.to_thread(realm.make)
            try:
                await worker.start()
                yield realm
                assert await worker.stop() == 0, worker.output()
            finally:
                worker.kill()


Change = Callable[[Realm], None]
TAKEN: dict[str, tuple[Change, Change, str, str]] = {
    "password": (
        lambda realm: realm.user.set_password("another"),
        lambda realm: realm.user.set_password(realm.user.password),
        "rabbitmq_unreachable",
        "refuses this user name and password",
    ),
    "vhost": (Realm.delete, Realm.make, "rabbitmq_unreachable", "the virtual host does not exist"),
    "permission to consume": (
        lambda realm: realm.user.permit(read="^$"),
        lambda realm: realm.user.permit(),
        "rabbitmq_connection_lost",
        "lacks a permission",
    ),
}


@pytest.mark.parametrize("what", TAKEN)
async def test_a_revoked_permission_is_logged_and_the_result_is_delivered_when_it_is_restored(
    realm: Realm, what: str
) -> None:
    take, give, event, words = TAKEN[what]
    worker, marker = realm.worker, uuid.uuid4().hex
    before, said_before = len(events(worker, "rabbitmq_connected")), len(events(worker, event))
    async with AsyncExitStack() as resources:
        job_id = await send(await open_channel(resources, realm.url), worker, marker)
        realm.model.freeze()
        await until(lambda: realm.model.held == 1, "the job has begun")
    await asyncio.to_thread(take, realm)
    if what != "vhost":
        # Existing connections keep their permissions.
        await asyncio.to_thread(realm.user.close_connections)
    await until(lambda: words in json.dumps(events(worker, event)[said_before:]), "the log names it")
    assert (await said(worker, "no_broker"))[0] == 503
    realm.model.thaw()
    await calls_begun(realm.stack, marker, 1)
    await model_answered(realm.stack, marker)
    await asyncio.to_thread(give, realm)
    await until(lambda: len(events(worker, "rabbitmq_connected")) > before, "the worker is connected again")

    async with AsyncExitStack() as resources:
        channel = await open_channel(resources, realm.url)
        queue = await channel.get_queue(worker.results_queue, ensure=False)
        message: Any = await until(lambda: queue.get(fail=False, no_ack=True), "the result")
        body = json.loads(message.body)
        assert (body["id"], body["status"], body["attempts"]) == (job_id, "succeeded", 1)
        await until(lambda: worker.metric("vqa_jobs_in_flight") == 0, "everything is settled")
        next_id = await send(channel, worker, "the next one")
        message = await until(lambda: queue.get(fail=False, no_ack=True), "another result")
        assert json.loads(message.body)["id"] == next_id
    assert len(calls_with(realm.stack, marker)) == 1


async def test_without_the_permission_to_publish_results_wait_and_one_warning_is_logged(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    marker = uuid.uuid4().hex
    with BrokerUser.of(own_stack) as user:
        async with Proxy.before(own_stack.model.base_url) as model:
            worker = await start_own_worker(
                VQA_RABBITMQ_URL=user.url,
                VQA_MODEL_BASE_URL=model.url(own_stack.model.base_url),
                VQA_LOG_LEVEL="debug",
            )
            client = await own_client_of(worker)
            model.freeze()
            ids = await publish(client, 3, marker)
            await until(lambda: model.held == 3, "the jobs have begun")
            await asyncio.to_thread(user.permit, write="^$")
            # A channel caches permissions.
            await asyncio.to_thread(user.close_connections)
            await until(
                lambda: len(events(worker, "rabbitmq_connected")) == 2, "the worker is connected again"
            )
            model.thaw()
            await until(lambda: refusals(worker, worker.results_queue)[0] >= 9, "tries for each job")
        reasons = refusals(worker, worker.results_queue)[1]
        (reason,) = [it for it in reasons if "the user of VQA_RABBITMQ_URL lacks a permission" in it]
        assert "amq.default" in reason
        assert client.replies == {}
        await asyncio.to_thread(user.permit)
        assert statuses(await results(client, ids)) == {"succeeded": 3}
        assert await worker.stop() == 0, worker.output()
    assert len(calls_with(own_stack, marker)) == 3
    assert {len(found) for found in client.replies.values()} == {1}


async def test_a_jobs_queue_with_other_arguments_is_logged_until_it_is_corrected(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    marker = uuid.uuid4().hex
    async with Proxy.before(own_stack.model.base_url) as model, AsyncExitStack() as resources:
        worker = await start_own_worker(VQA_MODEL_BASE_URL=model.url(own_stack.model.base_url))
        client = await own_client_of(worker)
        channel = await open_channel(resources, own_stack.rabbitmq.url)
        model.freeze()
        ids = await publish(client, 1, marker)
        await until(lambda: model.held == 1, "the job has begun")
        await channel.queue_delete(worker.jobs_queue)
        await channel.declare_queue(worker.jobs_queue, durable=True)
        await until(lambda: events(worker, "topology_mismatch"), "the log names it")
        assert worker.jobs_queue in str(events(worker, "topology_mismatch")[0]["faults"])
        assert (await said(worker, "no_broker"))[0] == 503
        model.thaw()
        assert statuses(await results(client, ids)) == {"succeeded": 1}
        await channel.queue_delete(worker.jobs_queue)
        await said(worker, "ready")
        ids += await publish(client, 1, marker)
        assert statuses(await results(client, ids)) == {"succeeded": 2}
        assert await worker.stop() == 0, worker.output()
    assert len(calls_with(own_stack, marker)) == 2


async def test_a_deleted_reply_exchange_delays_only_its_own_results(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    exchange, failing = f"replies-{uuid.uuid4().hex}", uuid.uuid4().hex
    own_stack.model.play(Error(status=500), marker=failing)
    async with AsyncExitStack() as resources:
        channel = await open_channel(resources, own_stack.rabbitmq.url)
        await channel.declare_exchange(exchange, durable=True)
        worker = await start_own_worker(VQA_REPLY_EXCHANGE=exchange, VQA_LOG_LEVEL="debug")
        client = await own_client_of(worker)
        await results(client, await publish(client, 1, "while it is there"))
        await channel.exchange_delete(exchange)
        ids = await publish(client, 4, "while it is not")
        await until(lambda: refusals(worker, worker.results_queue)[0] >= 8, "tries for each job")
        # Retries use the default exchange and are not affected.
        before = len(refusals(worker, f"{worker.jobs_queue}.retry.1s")[1])
        ids += await publish(client, 1, failing)
        await calls_begun(own_stack, failing, 2)
        assert len(refusals(worker, f"{worker.jobs_queue}.retry.1s")[1]) == before
        again = await channel.declare_exchange(exchange, durable=True)
        results_queue = await channel.get_queue(worker.results_queue, ensure=False)
        await results_queue.bind(again, worker.results_queue)
        assert statuses(await results(client, ids)) == {"succeeded": 5}
        assert await worker.stop() == 0, worker.output()
        await channel.exchange_delete(exchange)
    named = [it for it in refusals(worker, worker.results_queue)[1] if f"no exchange '{exchange}'" in it]
    assert len(named) == 1
    assert len(calls_with(own_stack, failing)) == 2


# Full queues


async def test_results_wait_for_a_full_results_queue(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    marker = uuid.uuid4().hex
    worker = await start_own_worker(VQA_LOG_LEVEL="debug")
    async with limited(own_stack, worker.results_queue, 1), AsyncExitStack() as resources:
        channel = await open_channel(resources, own_stack.rabbitmq.url)
        filling = json.dumps({"id": "filling"}).encode()
        await until(lambda: is_full(channel, worker.results_queue, filling), "it is full")
        ids = [await send(channel, worker, marker) for _ in range(3)]
        await until(lambda: refusals(worker, worker.results_queue)[0] >= 6, "tries for each job")
        (reason,) = refusals(worker, worker.results_queue)[1]
        assert "full" in reason
        assert worker.ready()[0] == 200
        client = await own_client_of(worker)
        assert statuses(await results(client, ids)) == {"succeeded": 3}
    assert await worker.stop() == 0, worker.output()
    assert len(calls_with(own_stack, marker)) == 3
    assert [len(client.replies[it]) for it in ids] == [1, 1, 1]


@pytest.fixture
async def few_copy_tries(
    own_stack: Stack, start_own_worker: StartWorker
) -> AsyncIterator[tuple[Worker, Proxy]]:
    """Start a worker that soon leaves refused copies to the broker, behind a proxy for the model."""
    async with Proxy.before(own_stack.model.base_url) as model:
        worker = await start_own_worker(
            wait=False,
            VQA_MODEL_BASE_URL=model.url(own_stack.model.base_url),
            VQA_MAX_CONCURRENCY="3",
        )
        worker.patch = FEW_COPY_TRIES
        await worker.start()
        yield worker, model
        model.thaw()
        assert await worker.stop() == 0, worker.output()


async def test_the_broker_requeues_jobs_whose_copies_a_full_queue_refuses(
    own_stack: Stack, few_copy_tries: tuple[Worker, Proxy], own_client_of: MakeClient
) -> None:
    (worker, model), marker = few_copy_tries, uuid.uuid4().hex
    own_stack.model.play(Error(status=401), marker=marker, times=None)
    client = await own_client_of(worker)
    async with limited(own_stack, worker.jobs_queue, 2), AsyncExitStack() as resources:
        channel = await open_channel(resources, own_stack.rabbitmq.url)
        model.freeze()
        ids = [await send(channel, worker, marker) for _ in range(3)]
        await until(lambda: model.held == 3, "the jobs have begun")
        filling = json.dumps(job("filling", id="filling")).encode()
        await until(lambda: is_full(channel, worker.jobs_queue, filling), "it is full")
        model.thaw()
        await until(lambda: len(events(worker, "job_left_to_broker")) == 3, "the jobs are back in the queue")
        await until(lambda: worker.metric("vqa_jobs_in_flight") == 0, "the worker has no job")
        own_stack.model.configure(rules=[])
        # All jobs in the queue are answered after the pause.
        assert statuses(await results(client, [*ids, "filling"])) == {"succeeded": 4}
    assert {len(client.replies[it]) for it in ids} == {1}
    assert len([it for it in refusals(worker, worker.jobs_queue)[1] if "full" in it]) == 1


async def test_the_broker_keeps_dead_letters_that_a_full_queue_refuses(
    own_stack: Stack, few_copy_tries: tuple[Worker, Proxy], own_client_of: MakeClient
) -> None:
    """RabbitMQ retries every three minutes: the jobs queue dead-letters at least once."""
    worker, _ = few_copy_tries
    client = await own_client_of(worker)

    async def kept() -> bool:
        return await held_by_broker(own_stack, worker.jobs_queue) == (1, 0)

    async with limited(own_stack, worker.dead_letter_queue, 1), AsyncExitStack() as resources:
        channel = await open_channel(resources, own_stack.rabbitmq.url)
        await until(lambda: is_full(channel, worker.dead_letter_queue, b"filling"), "it is full")
        await client.publish(b"no job")
        await until(lambda: events(worker, "job_left_to_broker"), "the job is back in the queue")
        await until(
            lambda: worker.metric("vqa_dead_letters_total", reason="invalid_job") == 1, "it is counted"
        )
        await until(lambda: worker.metric("vqa_jobs_in_flight") == 0, "the worker has no job")
        await until(kept, "the broker holds the job unavailable to consumers")


# Limits of the broker


MOST_BYTES = 20_000
# RabbitMQ 4 reads the size from a persistent term.
STRICT = f"""
application:set_env(rabbit, max_message_size, {MOST_BYTES}),
persistent_term:put(max_message_size, {MOST_BYTES}),
application:set_env(rabbit, consumer_timeout, 1500),
application:set_env(rabbit, channel_tick_interval, 200).
"""
LENIENT = """
application:set_env(rabbit, max_message_size, 134217728),
persistent_term:put(max_message_size, 134217728),
application:set_env(rabbit, consumer_timeout, 1800000),
application:set_env(rabbit, channel_tick_interval, 60000).
"""


@dataclass(frozen=True)
class Strict:
    """A worker whose broker has a small max_message_size and a short consumer timeout."""

    stack: Stack
    worker: Worker
    model: Proxy


@pytest.fixture(scope="module")
async def strict(own_stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Strict]:
    await asyncio.to_thread(own_stack.rabbitmq.ctl, "eval", STRICT)
    try:
        async with Proxy.before(own_stack.model.base_url) as model:
            settings = {"VQA_MODEL_BASE_URL": model.url(own_stack.model.base_url), "VQA_MAX_CONCURRENCY": "4"}
            async with Worker.running(own_stack, tmp_path_factory.mktemp("strict"), **settings) as worker:
                yield Strict(own_stack, worker, model)
    finally:
        await asyncio.to_thread(own_stack.rabbitmq.ctl, "eval", LENIENT)


async def test_a_result_too_large_for_the_broker_becomes_a_failed_one_and_is_not_billed_again(
    strict: Strict, own_client_of: MakeClient
) -> None:
    large, small = uuid.uuid4().hex, uuid.uuid4().hex
    client = await own_client_of(strict.worker)
    strict.stack.model.play(Answer(text="x" * (MOST_BYTES + 1)), marker=large, times=None)
    (large_id,) = await publish(client, 1, large, metadata={"whose": "mine"})
    ids = await publish(client, 3, small)
    (reply,) = await results(client, [large_id])
    assert reply.body["error"]["code"] == "result_too_large"
    assert str(MOST_BYTES) in reply.body["error"]["message"]
    assert reply.body["usage"]["completion_tokens"] > 0
    assert reply.body["metadata"] == {"whose": "mine"}
    assert statuses(await results(client, ids)) == {"succeeded": 3}
    await until(lambda: strict.worker.metric("vqa_jobs_in_flight") == 0, "everything is settled")
    assert len(calls_with(strict.stack, large)) == 1
    assert len(calls_with(strict.stack, small)) == 3
    assert strict.worker.metric("vqa_jobs_total", status="failed", error="result_too_large") == 1
    errors = [line["error"] for line in events(strict.worker, "job_finished") if line["job_id"] == large_id]
    assert errors == ["result_too_large"]


@pytest.mark.parametrize("why", ["the model is slow", "the results queue is full"])
async def test_a_job_that_exceeds_the_consumer_timeout_is_billed_and_answered_once(
    strict: Strict, own_client_of: MakeClient, why: str
) -> None:
    worker, marker = strict.worker, uuid.uuid4().hex
    before = len(events(worker, "rabbitmq_connected"))
    async with AsyncExitStack() as resources:
        channel = await open_channel(resources, strict.stack.rabbitmq.url)
        if why == "the results queue is full":
            await resources.enter_async_context(limited(strict.stack, worker.results_queue, 1))
            filling = json.dumps({"id": "filling"}).encode()
            await until(lambda: is_full(channel, worker.results_queue, filling), "it is full")
        else:
            strict.model.freeze()
        job_id = await send(channel, worker, marker)
        await until(lambda: len(events(worker, "rabbitmq_connected")) > before, "the consumer timeout")
        strict.model.thaw()
        client = await own_client_of(worker)
        assert statuses(await results(client, [job_id])) == {"succeeded": 1}
    await results(client, await publish(client, 1, "afterwards"))
    await until(lambda: worker.metric("vqa_jobs_in_flight") == 0, "everything is settled")
    assert len(calls_with(strict.stack, marker)) == 1
    assert len(client.replies[job_id]) == 1
    assert await client.depth(worker.jobs_queue) == 0


# A silent broker


async def test_the_worker_waits_for_a_broker_that_accepts_connections_and_is_silent(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    async with Proxy.before(own_stack.rabbitmq.url) as proxy:
        proxy.freeze()
        url = proxy.url(own_stack.rabbitmq.url)
        waiting, leaving = [await start_own_worker(wait=False, VQA_RABBITMQ_URL=url) for _ in range(2)]
        await asyncio.gather(waiting.serve(), leaving.serve())
        assert waiting.ready()[1]["status"] == leaving.ready()[1]["status"] == "no_broker"
        assert waiting.get("/livez")[0] == 200
        assert await leaving.stop(patience_s=60) == 0, leaving.output()
        proxy.thaw()
        await said(waiting, "ready")
        client = await own_client_of(waiting)
        assert (await client.ask(**job())).body["status"] == "succeeded"
        assert await waiting.stop() == 0
