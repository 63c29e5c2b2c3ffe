"""Each RabbitMQ user has the permissions that it needs, and no others."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage
from aio_pika.exceptions import ChannelClosed

from deploy.local.model_simulator.behavior import Answer, Error, Hang
from deploy.local.stack import Stack
from deploy.rabbitmq.rights import KEDA, OPERATOR, PUBLISHER, WORKER
from tests.breaking import administer, calls_begun, events, job, results, said, url_as
from tests.integration.permissions.realm import PLAIN_FOLDER, STRICT_FOLDER, USERS, VHOST, Realm
from tests.running import Client, Worker, calls_with, until
from vqa_worker.rabbitmq.connection import Broker, BrokerRefusedError

# RabbitMQ 4.3.0 denies passive declarations to users without configure permission. Here the tests
# declare actively, which every version denies to them.
NO_PASSIVE_DECLARE = """
from worker.rabbitmq.topology import ExchangeSpec, QueueSpec
def refused(declare):
    return lambda self, channel, *, passive: declare(self, channel, passive=False)
for kind in (ExchangeSpec, QueueSpec):
    kind.declare = refused(kind.declare)
"""
VARIANTS = {"plain": PLAIN_FOLDER, "strict": STRICT_FOLDER}
INTAKE, CONTROL, REPLIES, BACK = "vqa.jobs.intake", "vqa.jobs.control", "vqa.replies", "vqa.jobs.back"


@pytest.fixture(scope="module", params=VARIANTS)
async def realm(stack: Stack, request: pytest.FixtureRequest) -> AsyncIterator[Realm]:
    with Realm.of(stack, VARIANTS[request.param]) as realm:
        yield realm


@dataclass(frozen=True)
class Scene:
    """A worker and a publisher, each with its own user."""

    realm: Realm
    stack: Stack
    worker: Worker
    client: Client

    @property
    def reply_exchange(self) -> str:
        return REPLIES if self.realm.is_strict else ""


@pytest.fixture(scope="module")
async def scene(realm: Realm, stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    folder = tmp_path_factory.mktemp("least-privilege")
    async with Worker.running(stack, folder, VQA_MAX_ATTEMPTS="2", **realm.settings) as worker:
        async with Client.of(stack, worker, url=realm.url(PUBLISHER), exchange=INTAKE) as client:
            yield Scene(realm, stack, worker, client)
        assert not events(worker, "publish_failed")
        assert not events(worker, "cancellation_forbidden")
        assert "ACCESS_REFUSED" not in worker.output()


async def take(realm: Realm, queue_name: str) -> AbstractIncomingMessage:
    """Get a message from a queue as the operator."""
    async with await aio_pika.connect(realm.url(OPERATOR)) as connection:
        channel = await connection.channel()
        queue = await channel.get_queue(queue_name, ensure=False)
        message: AbstractIncomingMessage = await until(
            lambda: queue.get(fail=False, no_ack=True), f"a message in {queue_name}"
        )
        return message


# Operations of the worker and the publisher


async def test_a_job_is_answered(scene: Scene) -> None:
    reply = await scene.client.ask(**job())
    assert reply.body["status"] == "succeeded"
    assert reply.message.exchange == scene.reply_exchange


async def test_a_job_is_retried(scene: Scene) -> None:
    marker = uuid.uuid4().hex
    scene.stack.model.play(Error(status=500), marker=marker)
    reply = await scene.client.ask(**job(marker))
    assert (reply.body["status"], reply.body["attempts"]) == ("succeeded", 2)


async def test_a_job_is_dead_lettered_and_replayed_by_the_operator(scene: Scene) -> None:
    marker = uuid.uuid4().hex
    scene.stack.model.play(Error(status=500), marker=marker, times=2)
    dying = job(marker)
    reply = await scene.client.ask(**dying)
    assert reply.body["error"]["code"] == "attempts_exhausted"
    dead_letter = await take(scene.realm, "vqa.jobs.dead")
    assert dead_letter.headers["vqa-error-code"] == "attempts_exhausted"
    assert dead_letter.exchange == (BACK if scene.realm.is_strict else "")
    async with await aio_pika.connect(scene.realm.url(OPERATOR)) as connection:
        channel = await connection.channel()
        await channel.default_exchange.publish(aio_pika.Message(dead_letter.body), "vqa.jobs")
    await until(lambda: len(scene.client.replies[dying["id"]]) == 2, "another result")
    assert scene.client.replies[dying["id"]][1].body["status"] == "succeeded"


async def test_a_worker_that_pauses_requeues_its_jobs(scene: Scene) -> None:
    marker = uuid.uuid4().hex
    scene.stack.model.play(Error(status=401), marker=marker, times=None)
    before = len(events(scene.worker, "consumption_resumed"))
    asked = [job(marker) for _ in range(6)]
    for it in asked:
        await scene.client.publish(it)
    await said(scene.worker, "paused")
    scene.stack.model.configure(rules=[])
    replies = await results(scene.client, [it["id"] for it in asked])
    assert {(reply.body["status"], reply.body["attempts"]) for reply in replies} == {("succeeded", 1)}
    await until(lambda: len(events(scene.worker, "consumption_resumed")) > before, "the pause ends")


async def test_a_worker_that_stops_requeues_unfinished_jobs(scene: Scene, tmp_path: Path) -> None:
    marker = uuid.uuid4().hex
    scene.stack.model.play(Answer(after=2), marker=marker, times=None)
    stopping = Worker.of(scene.stack, tmp_path, VQA_SHUTDOWN_GRACE="0", **scene.realm.settings)
    jobs: list[dict[str, Any]] = []

    async def has_one() -> bool:
        jobs.append(job(marker))
        await scene.client.publish(jobs[-1])
        await calls_begun(scene.stack, marker, len(jobs))
        return stopping.metric("vqa_jobs_in_flight") > 0

    try:
        await stopping.start()
        await until(has_one, "the worker that is to stop has a job too")
        assert await stopping.stop() == 0
        assert events(stopping, "grace_period_expired")
        assert "ACCESS_REFUSED" not in stopping.output()
    finally:
        stopping.kill()
    replies = [await scene.client.result(it["id"]) for it in jobs]
    assert {reply.body["status"] for reply in replies} == {"succeeded"}
    assert len(calls_with(scene.stack, marker)) > len(jobs)


async def test_the_publisher_cancels_a_job(scene: Scene) -> None:
    marker = uuid.uuid4().hex
    scene.stack.model.play(Hang(), marker=marker, times=None)
    taken_back = job(marker)
    await scene.client.publish(taken_back)
    await calls_begun(scene.stack, marker, 1)
    await scene.client.cancel(taken_back["id"])
    reply = await scene.client.result(taken_back["id"])
    assert reply.body["error"]["code"] == "cancelled"


async def test_an_exclusive_reply_queue_gets_replies(scene: Scene) -> None:
    queue = await scene.client.reply_queue(scene.reply_exchange)
    asked = job()
    await scene.client.publish(asked, reply_to=queue)
    reply = await scene.client.result(asked["id"])
    assert (reply.body["status"], reply.message.routing_key) == ("succeeded", queue)
    assert reply.message.exchange == scene.reply_exchange


async def test_direct_replies_work_if_the_worker_may_write_to_the_default_exchange(scene: Scene) -> None:
    asked = job()
    async with await aio_pika.connect(scene.realm.url(PUBLISHER)) as connection:
        caller = await connection.channel()
        waiting: asyncio.Queue[AbstractIncomingMessage] = asyncio.Queue()
        replies = await caller.get_queue("amq.rabbitmq.reply-to", ensure=False)
        await replies.consume(waiting.put, no_ack=True)
        message = aio_pika.Message(json.dumps(asked).encode(), reply_to="amq.rabbitmq.reply-to")
        await (await caller.get_exchange(INTAKE, ensure=False)).publish(message, "")
        if scene.realm.is_strict:
            answer = (await scene.client.result(asked["id"])).message
            assert answer.routing_key == "vqa.results"
        else:
            async with asyncio.timeout(30):
                answer = await waiting.get()
        assert json.loads(answer.body)["status"] == "succeeded"


async def test_a_worker_that_may_not_check_its_queues_still_works(scene: Scene, tmp_path: Path) -> None:
    worker = Worker.of(scene.stack, tmp_path, **scene.realm.settings)
    worker.patch = NO_PASSIVE_DECLARE

    async def has_answered() -> bool:
        assert (await scene.client.ask(**job())).body["status"] == "succeeded"
        return worker.metric("vqa_jobs_total", status="succeeded") > 0

    try:
        await worker.start()
        await until(has_answered, "one of the jobs was its own")
        (line,) = events(worker, "topology_check_forbidden")
        exchanges = {f"exchange {BACK} (VQA_JOBS_EXCHANGE)", f"exchange {REPLIES} (VQA_REPLY_EXCHANGE)"}
        assert exchanges & set(line["parts"]) == (exchanges if scene.realm.is_strict else set())
        assert {"queue vqa.jobs", "queue vqa.jobs.retry.120s", "queue vqa.results"} <= set(line["parts"])
        assert not events(worker, "cancellation_forbidden")
        assert await worker.stop() == 0
    finally:
        worker.kill()


async def test_keda_reads_the_queue_length(realm: Realm, scene: Scene) -> None:
    marker = uuid.uuid4().hex
    scene.stack.model.play(Hang(), marker=marker, times=None)
    running = job(marker)
    await scene.client.publish(running)

    def counted() -> bool:
        queue = realm.administer(KEDA, "GET", f"/api/queues/{VHOST}/vqa.jobs")
        return bool(queue.get("messages") == queue.get("messages_unacknowledged") == 1)

    await until(counted, "the broker updates its figures")
    await scene.client.cancel(running["id"])
    await scene.client.result(running["id"])


# Permissions of each user, allowed and denied


Act = Callable[[AbstractChannel], Awaitable[object]]


def publish(exchange: str, key: str = "") -> Act:
    async def act(channel: AbstractChannel) -> None:
        found = await channel.get_exchange(exchange, ensure=False) if exchange else channel.default_exchange
        await found.publish(aio_pika.Message(b"{}"), key, mandatory=False)

    return act


def get(queue: str) -> Act:
    async def act(channel: AbstractChannel) -> None:
        found = await channel.get_queue(queue, ensure=False)
        if message := await found.get(fail=False):
            await message.nack(requeue=True)

    return act


def purge(queue: str) -> Act:
    async def act(channel: AbstractChannel) -> None:
        await (await channel.get_queue(queue, ensure=False)).purge()

    return act


def make_queue(name: str | None) -> Act:
    async def act(channel: AbstractChannel) -> None:
        await (await channel.declare_queue(name, exclusive=True)).delete()

    return act


def make_exchange(name: str) -> Act:
    async def act(channel: AbstractChannel) -> None:
        await channel.declare_exchange(name, durable=True)
        await channel.exchange_delete(name)

    return act


def listen(exchange: str, key: str | None = None) -> Act:
    """Bind an exclusive queue; the default routing key is the queue's name."""

    async def act(channel: AbstractChannel) -> None:
        queue = await channel.declare_queue(exclusive=True)
        await queue.bind(exchange, queue.name if key is None else key)

    return act


def bind(queue: str, exchange: str, key: str) -> Act:
    async def act(channel: AbstractChannel) -> None:
        found = await channel.get_queue(queue, ensure=False)
        await found.bind(exchange, key)
        await found.unbind(exchange, key)

    return act


def delete_queue(name: str) -> Act:
    async def act(channel: AbstractChannel) -> None:
        await channel.queue_delete(name)

    return act


# The operations, and the users that may do them.
ACTS: dict[str, tuple[Act, set[str]]] = {
    "publish a job": (publish(INTAKE), {PUBLISHER, OPERATOR}),
    "cancel a job": (publish(CONTROL), {WORKER, PUBLISHER, OPERATOR}),
    "publish to a built-in exchange": (publish("amq.topic", "x"), set()),
    "get a job": (get("vqa.jobs"), {WORKER, OPERATOR}),
    "read a result": (get("vqa.results"), {PUBLISHER, OPERATOR}),
    "read a dead letter": (get("vqa.jobs.dead"), {OPERATOR}),
    "read a retry queue": (get("vqa.jobs.retry.120s"), {OPERATOR}),
    "read another application's queue": (get("others"), set()),
    "purge dead letters": (purge("vqa.jobs.dead"), {OPERATOR}),
    "purge jobs": (purge("vqa.jobs"), {WORKER, OPERATOR}),
    "declare a queue with a generated name": (make_queue(None), {WORKER, PUBLISHER}),
    "declare a result queue": (make_queue("vqa.results.mine"), {PUBLISHER, OPERATOR}),
    "declare a queue below the jobs queue": (make_queue("vqa.jobs.mine"), {OPERATOR}),
    "declare a queue of another name": (make_queue("mine"), set()),
    "declare an exchange below the jobs queue": (make_exchange("vqa.jobs.mine"), {OPERATOR}),
    "declare an exchange of another name": (make_exchange("mine"), set()),
    "delete a queue of the worker": (delete_queue("vqa.jobs.deletable"), {OPERATOR}),
    "delete another application's queue": (delete_queue("others"), set()),
    "consume cancellations": (listen(CONTROL), {WORKER}),
    "consume published jobs a second time": (listen(INTAKE), set()),
    "bind the jobs queue for cancellations": (bind("vqa.jobs", CONTROL, ""), {OPERATOR}),
}
PLAIN_ACTS: dict[str, tuple[Act, set[str]]] = {
    # A permission beyond the worker's needs: it covers every queue of the virtual host.
    "publish to another application's queue": (publish("", "others"), {WORKER, OPERATOR}),
}
STRICT_ACTS: dict[str, tuple[Act, set[str]]] = {
    "publish to another application's queue": (publish("", "others"), {OPERATOR}),
    "requeue a job": (publish(BACK, "vqa.jobs"), {WORKER, OPERATOR}),
    "publish a result": (publish(REPLIES, "vqa.results"), {WORKER, OPERATOR}),
    "publish a result to a reply queue": (publish(REPLIES, "vqa.results.somebody"), {WORKER, OPERATOR}),
    "publish a result with another routing key": (publish(REPLIES, "others"), {OPERATOR}),
    "bind an exclusive queue for replies": (listen(REPLIES), {PUBLISHER}),
    "bind a client's queue for replies": (listen(REPLIES, "vqa.results.mine"), {PUBLISHER}),
    "consume results a second time": (listen(REPLIES, "vqa.results"), set()),
    "consume all results a second time": (listen(REPLIES, "#"), set()),
    "bind the jobs queue for results": (bind("vqa.jobs", REPLIES, "vqa.results.mine"), {OPERATOR}),
    "consume requeued jobs a second time": (listen(BACK, "vqa.jobs"), set()),
    "bind another application's queue": (bind("others", REPLIES, "vqa.results"), set()),
}


@pytest.fixture(scope="module")
async def others(realm: Realm) -> None:
    """Declare another application's queue, and one to delete."""
    path = f"/api/permissions/{VHOST}/guest"
    everything = {"configure": ".*", "write": ".*", "read": ".*"}
    await asyncio.to_thread(administer, realm.stack, "PUT", path, everything)
    async with await aio_pika.connect(url_as(realm.stack, "guest", "guest", VHOST)) as connection:
        channel = await connection.channel()
        for name in ("others", "vqa.jobs.deletable"):
            await channel.declare_queue(name, durable=True)


@pytest.mark.usefixtures("others")
@pytest.mark.parametrize("user", USERS)
async def test_each_user_has_its_permissions_and_no_others(realm: Realm, user: str) -> None:
    acts = ACTS | (STRICT_ACTS if realm.is_strict else PLAIN_ACTS)
    done, refused = set(), {}
    async with await aio_pika.connect(realm.url(user)) as connection:
        for name, (act, _) in acts.items():
            channel = await connection.channel(on_return_raises=True)
            try:
                await act(channel)
            except ChannelClosed as error:
                refused[name] = str(error)
            else:
                done.add(name)
                await channel.close()
    assert done == {name for name, (_, allowed) in acts.items() if user in allowed}
    assert refused.keys() == acts.keys() - done
    assert all(reason.startswith("ACCESS_REFUSED") for reason in refused.values()), refused


@pytest.mark.parametrize("user", USERS)
async def test_no_user_has_access_to_another_virtual_host(realm: Realm, user: str) -> None:
    worker_s = Broker(url=realm.url(user, vhost=""), ssl_context=None, name="a test")
    with pytest.raises(BrokerRefusedError, match="may not use it"):
        await worker_s.connect()


MANAGEMENT: dict[str, tuple[str, str, object]] = {
    "the jobs queue": ("GET", f"/api/queues/{VHOST}/vqa.jobs", None),
    "get its messages": (
        "POST",
        f"/api/queues/{VHOST}/vqa.jobs/get",
        {"count": 1, "ackmode": "ack_requeue_true", "encoding": "auto"},
    ),
    "publish a message": (
        "POST",
        f"/api/exchanges/{VHOST}/{INTAKE}/publish",
        {"properties": {}, "routing_key": "", "payload": "x", "payload_encoding": "string"},
    ),
    "purge a queue": ("DELETE", f"/api/queues/{VHOST}/vqa.jobs/contents", None),
    "delete a queue": ("DELETE", f"/api/queues/{VHOST}/vqa.jobs", None),
    "a policy": ("PUT", f"/api/policies/{VHOST}/mine", {"pattern": ".*", "definition": {"max-length": 1}}),
    "the users": ("GET", "/api/users", None),
    "the definitions": ("GET", "/api/definitions", None),
    "another virtual host's queues": ("GET", "/api/queues/%2F", None),
}


@pytest.mark.parametrize("user", USERS)
async def test_the_management_api_shows_queues_to_keda_only(realm: Realm, user: str) -> None:
    shown, refused = set(), {}
    for name, (method, path, body) in MANAGEMENT.items():
        try:
            await asyncio.to_thread(realm.administer, user, method, path, body)
        except HTTPError as error:
            with error:
                refused[name] = f"{error.code} {error.read().decode()}"
        else:
            shown.add(name)
    assert shown == ({"the jobs queue"} if user == KEDA else set())
    # The target broker denies the publish, with its own code in the error; newer versions report that the
    # other virtual host does not exist.
    assert all(
        reason.startswith("401 ")
        or "403 ACCESS_REFUSED" in reason
        or (reason.startswith("404 ") and "another" in name)
        for name, reason in refused.items()
    ), refused
