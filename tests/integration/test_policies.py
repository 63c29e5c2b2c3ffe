"""Policies, shovels and federation of somebody else: what the worker does, and what `check` says about it."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel
from aio_pika.exceptions import DeliveryError

from deploy.local.model_simulator.behavior import Error
from deploy.local.stack import Stack
from tests.breaking import (
    BrokerUser,
    administer,
    events,
    held_by_broker,
    job,
    own_vhost,
    policy,
    publish,
    results,
    statuses,
    url_as,
)
from tests.conftest import MakeClient, StartWorker
from tests.integration.cli.running import Cli
from tests.proxy import Proxy
from tests.running import Client, Worker, calls_with, until
from vqa_worker import AsyncClient, Replies

JOBS, RETRY, RESULTS, DEAD = "jobs", "retry", "results", "dead"
REPLIES: tuple[Replies, ...] = ("queue", "exclusive", "direct")
DROP: dict[str, Any] = {"max-length": 1, "overflow": "drop-head"}


def queue_of(worker: Worker, role: str) -> str:
    return {
        JOBS: worker.jobs_queue,
        RETRY: f"{worker.jobs_queue}.retry.1s",
        RESULTS: worker.results_queue,
        DEAD: worker.dead_letter_queue,
    }[role]


@asynccontextmanager
async def channel_at(url: str) -> AsyncIterator[AbstractChannel]:
    async with await aio_pika.connect(url) as connection:
        yield await connection.channel(on_return_raises=True)


@pytest.fixture(autouse=True)
def _repaired(stack: Stack) -> Iterator[None]:
    """Restore the behavior of the model API after each test."""
    yield
    stack.model.configure(rules=[])


# Policies that the arguments of the worker's queues make harmless


NOWHERE = {"dead-letter-exchange": "nowhere", "dead-letter-routing-key": "nowhere"}
FULL = {"max-length": 1, "overflow": "reject-publish"}
HARMLESS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "dead-lettering elsewhere": ("policies", {JOBS: NOWHERE, RETRY: NOWHERE, RESULTS: NOWHERE}),
    "few messages, few seconds": (
        "policies",
        {JOBS: {"expires": 500}, RETRY: {"max-length": 1}, RESULTS: FULL},
    ),
    "few bytes": ("policies", {RETRY: {"max-length-bytes": 1}}),
    "shorter retries": ("policies", {RETRY: {"message-ttl": 100}}),
    "drop-head": ("policies", {JOBS: {"overflow": "drop-head"}, RETRY: DROP}),
    "an operator's": ("operator-policies", {JOBS: {"expires": 500}, RETRY: {"max-length": 1}}),
}


@pytest.mark.parametrize("name", HARMLESS)
async def test_jobs_are_retried_and_answered_under_a_policy(
    stack: Stack, start_worker: StartWorker, client_of: MakeClient, name: str
) -> None:
    worker, marker = await start_worker(), uuid.uuid4().hex
    client = await client_of(worker)
    kind, definitions = HARMLESS[name]
    with ExitStack() as policies:
        for role, definition in definitions.items():
            policies.enter_context(policy(stack, queue_of(worker, role), definition, kind=kind))
        stack.model.play(Error(status=500), marker=marker, times=2)
        replies = await results(client, await publish(client, 4, marker))
        assert statuses(replies) == {"succeeded": 4}
        assert sum(reply.body["attempts"] for reply in replies) == 6
        await until(lambda: worker.metric("vqa_jobs_in_flight") == 0, "everything is settled")
    assert [len(it) for it in client.replies.values()] == [1] * 4


async def fill(stack: Stack, queue: str) -> tuple[list[str], int]:
    """Publish six jobs; return the ids of those that were confirmed, and how many were refused."""
    accepted, refused = [], 0
    async with channel_at(stack.rabbitmq.url) as channel:
        for _ in range(6):
            body = job()
            try:
                message = aio_pika.Message(json.dumps(body).encode())
                await channel.default_exchange.publish(message, queue)
            except DeliveryError:
                refused += 1
            else:
                accepted.append(body["id"])
    return accepted, refused


@pytest.mark.parametrize("kind", ["policies", "operator-policies"])
async def test_a_full_jobs_queue_refuses_jobs_and_drops_none(
    stack: Stack, start_worker: StartWorker, client_of: MakeClient, kind: str
) -> None:
    first = await start_worker()
    assert await first.stop() == 0
    with policy(stack, first.jobs_queue, {"max-length": 1}, kind=kind):
        accepted, refused = await fill(stack, first.jobs_queue)
        assert refused >= 3
        second = await start_worker(like=first)
        client = await client_of(second)
        assert statuses(await results(client, accepted)) == {"succeeded": len(accepted)}


# Policies that end jobs without a result: they are dead letters


async def test_jobs_that_a_full_queue_drops_are_dead_letters(
    stack: Stack, start_worker: StartWorker, client_of: MakeClient, tmp_path: Path
) -> None:
    """Of all that a policy can set, `overflow` precedes the queue's argument."""
    worker = await start_worker()
    client = await client_of(worker)
    assert await worker.stop() == 0
    with policy(stack, worker.jobs_queue, DROP):
        accepted, _ = await fill(stack, worker.jobs_queue)
        assert len(accepted) == 6

        async def depths() -> bool:
            return [await client.depth(queue_of(worker, it)) for it in (JOBS, DEAD)] == [1, 5]

        await until(depths, "the oldest are dead-lettered")
    listed = await Cli.of(stack, tmp_path, worker).run("dlq", "list")
    assert listed.out.count("dead-lettered by RabbitMQ (maxlen)") == 5


@pytest.mark.parametrize(("overflow", "kept"), [("reject-publish", 1), ("drop-head", 0)])
async def test_with_overflow_drop_head_a_retry_is_lost_that_its_target_cannot_take(
    stack: Stack, start_worker: StartWorker, client_of: MakeClient, overflow: str, kept: int
) -> None:
    worker = await start_worker()
    client = await client_of(worker)
    assert await worker.stop() == 0
    retry = queue_of(worker, RETRY)
    async with channel_at(stack.rabbitmq.url) as channel:
        await channel.queue_delete(worker.jobs_queue)
        with policy(stack, retry, {"overflow": overflow}):
            await channel.default_exchange.publish(aio_pika.Message(b"{}"), retry)
            await until(lambda: _is_expired(client, retry), "it expires")
            # A quorum queue counts what it has not dead-lettered yet.
            await until(lambda: _holds(stack, retry, kept), "it is lost or kept")


async def _is_expired(client: Client, queue: str) -> bool:
    return await client.depth(queue) == 0


async def _holds(stack: Stack, queue: str, count: int) -> bool:
    return (await held_by_broker(stack, queue))[0] == count


async def test_a_job_that_a_policy_expires_is_a_dead_letter(
    stack: Stack, start_worker: StartWorker, client_of: MakeClient, tmp_path: Path
) -> None:
    worker = await start_worker()
    client = await client_of(worker)
    assert await worker.stop() == 0
    with policy(stack, worker.jobs_queue, {"message-ttl": 100}):
        await publish(client, 1, "too late")
        await until(lambda: client.depth(worker.dead_letter_queue), "it expires")
    listed = await Cli.of(stack, tmp_path, worker).run("dlq", "list")
    assert "dead-lettered by RabbitMQ (expired)" in listed.out


def has_job(worker: Worker) -> bool:
    return worker.metric("vqa_jobs_in_flight") == 1


async def test_a_job_over_the_delivery_limit_of_a_policy_is_a_dead_letter(
    stack: Stack, start_worker: StartWorker, client_of: MakeClient, tmp_path: Path
) -> None:
    async with Proxy.before(stack.model.base_url) as model:
        settings = {"VQA_MODEL_BASE_URL": model.url(stack.model.base_url)}
        worker = await start_worker(**settings)
        client = await client_of(worker)
        model.freeze()
        with policy(stack, worker.jobs_queue, {"delivery-limit": 1}):
            await publish(client, 1, "interrupted")
            await until(partial(has_job, worker), "the job has begun")
            worker.kill()
            second = await start_worker(like=worker, **settings)
            await until(partial(has_job, second), "the job has begun again")
            second.kill()
            await until(lambda: client.depth(worker.dead_letter_queue), "it is dead-lettered")
    listed = await Cli.of(stack, tmp_path, worker).run("dlq", "list")
    assert "dead-lettered by RabbitMQ (delivery_limit)" in listed.out


# Policies that delete queues


@pytest.mark.parametrize("role", [RETRY, RESULTS])
async def test_a_queue_that_a_policy_deletes_is_declared_again(
    stack: Stack, start_worker: StartWorker, client_of: MakeClient, role: str
) -> None:
    worker, marker = await start_worker(), uuid.uuid4().hex
    queue = queue_of(worker, role)

    async def is_deleted() -> bool:
        listed = await asyncio.to_thread(stack.rabbitmq.ctl, "list_queues", "name")
        return queue not in listed.split()

    with policy(stack, queue, {"expires": 100}):
        await until(is_deleted, "the queue expires")
    stack.model.play(Error(status=500), marker=marker)
    async with channel_at(stack.rabbitmq.url) as channel:
        body = job(marker)
        await channel.default_exchange.publish(aio_pika.Message(json.dumps(body).encode()), worker.jobs_queue)
        missing = await until(lambda: events(worker, "queue_missing"), "the log names the queue")
        assert {line["queue"] for line in missing} == {queue}
        await until(lambda: worker.metric("vqa_jobs_total", status="succeeded") == 1, "it is answered")
    client = await client_of(worker)
    assert statuses(await results(client, [body["id"]])) == {"succeeded": 1}


# What `check` reports


@pytest.fixture
def vhost(stack: Stack) -> Iterator[str]:
    with own_vhost(stack) as name:
        yield name


@pytest.fixture
async def cli(stack: Stack, tmp_path: Path, vhost: str) -> Cli:
    url = url_as(stack, "guest", "guest", vhost)
    names = {"VQA_JOBS_QUEUE": "jobs", "VQA_RESULTS_QUEUE": "results", "VQA_RETRY_DELAYS": "30"}
    cli = Cli(tmp_path, {**stack.environment(), **names, "VQA_RABBITMQ_URL": url})
    assert (await cli.run("topology", "apply")).code == 0
    return cli


async def policy_findings(cli: Cli, management_url: str, *, code: int = 0) -> list[tuple[str, str, str]]:
    done = await cli.run("check", "--json", "--management-url", management_url)
    assert done.code == code, done.out
    found = [(it["check"], it["status"], it["message"]) for it in done.objects]
    return [it for it in found if it[0].startswith("policies")]


POLICIES = {"jobs.retry.30s": {"expires": 20_000}, "results": DROP, "jobs": {"max-length": 1000}}


@pytest.mark.parametrize("kind", ["policies", "operator-policies"])
async def test_check_warns_of_policies_that_remove_messages(
    stack: Stack, cli: Cli, vhost: str, kind: str
) -> None:
    def are_shown() -> bool:
        listed = administer(stack, "GET", f"/api/queues/{vhost}")
        return len([it for it in listed if it.get("effective_policy_definition")]) == len(POLICIES)

    assert await policy_findings(cli, f"{stack.rabbitmq.management_url}/") == [
        ("policies", "ok", "no policy removes messages")
    ]
    with ExitStack() as policies:
        for queue, definition in POLICIES.items():
            # RabbitMQ 3.10 has no overflow in operator policies.
            allowed = {
                it: value for it, value in definition.items() if it != "overflow" or kind == "policies"
            }
            policies.enter_context(policy(stack, queue, allowed, vhost=vhost, kind=kind))
        await until(are_shown, "the management API shows them, which takes some seconds")
        found = await policy_findings(cli, stack.rabbitmq.management_url)
    assert {(check, status) for check, status, _ in found} == {
        ("policies of queue jobs.retry.30s", "warning"),
        ("policies of queue results", "warning"),
    }
    assert all(len(text.partition(": ")[0]) == 32 for _, _, text in found)


async def test_check_says_when_it_cannot_read_policies(stack: Stack, cli: Cli, vhost: str) -> None:
    ((_, status, text),) = await policy_findings(cli, "http://127.0.0.1:1", code=1)
    assert status == "failed"
    assert text.endswith("Check --management-url.")
    ((_, status, text),) = await policy_findings(cli, stack.model.base_url, code=1)
    assert status == "failed"
    with BrokerUser.of(stack, vhost=vhost) as user:
        limited = cli.with_settings(VQA_RABBITMQ_URL=user.url)
        ((_, status, text),) = await policy_findings(limited, stack.rabbitmq.management_url)
    assert (status, "give it the tag `management`" in text) == ("skipped", True)


async def test_a_virtual_host_may_make_all_queues_quorum_queues(
    stack: Stack, vhost: str, start_worker: StartWorker, cli: Cli
) -> None:
    """Reply queues of clients and the queue for cancellations are not durable. (RabbitMQ 3.10 ignores it.)"""
    administer(stack, "PUT", f"/api/vhosts/{vhost}", {"default_queue_type": "quorum"})
    worker = await start_worker(**{it: cli.settings[it] for it in cli.settings if it.startswith("VQA_")})
    url = cli.settings["VQA_RABBITMQ_URL"]
    for replies in REPLIES:
        async with AsyncClient(url, jobs_queue="jobs", replies=replies) as client:
            assert (await client.ask_job(job(), timeout=60)).succeeded
    assert not [line for line in worker.log() if line["level"] in ("warning", "error")]


# Shovels and federation


PLUGINS = "rabbitmq_management,rabbitmq_prometheus,rabbitmq_shovel,rabbitmq_federation"
ENABLE = f"""
{{ok, File}} = application:get_env(rabbit, enabled_plugins_file),
ok = file:write_file(File, "[{PLUGINS}]."),
{{ok, _, _}} = rabbit_plugins:ensure(File).
"""


@pytest.fixture(scope="module")
def upstream(own_stack: Stack) -> Iterator[str]:
    """Return a virtual host in which others publish, on a broker with the plugins."""
    own_stack.rabbitmq.ctl("eval", ENABLE)
    with own_vhost(own_stack) as name:
        yield name


def shovel(stack: Stack, upstream: str, source: str, worker: Worker) -> None:
    value = {
        "src-protocol": "amqp091",
        "src-uri": url_as(stack, "guest", "guest", upstream),
        "src-queue": source,
        "dest-protocol": "amqp091",
        # For RabbitMQ, a URL that ends with `/` names the virtual host without a name.
        "dest-uri": url_as(stack, "guest", "guest", "%2F"),
        "dest-queue": worker.jobs_queue,
        "dest-add-forward-headers": True,
        "dest-add-timestamp-header": True,
        "ack-mode": "on-confirm",
    }
    administer(stack, "PUT", f"/api/parameters/shovel/{upstream}/{source}", {"value": value})


def federation(stack: Stack, upstream: str, name: str, **settings: str) -> None:
    """Define an upstream and apply it to the worker's queue or exchange of this name."""
    value = {"uri": url_as(stack, "guest", "guest", upstream), "ack-mode": "on-confirm", **settings}
    administer(stack, "PUT", f"/api/parameters/federation-upstream/%2F/{name}", {"value": value})
    body = {
        "pattern": f"^{name}$",
        "definition": {"federation-upstream": name},
        "apply-to": "exchanges" if "exchange" in settings else "queues",
    }
    administer(stack, "PUT", f"/api/policies/%2F/{quote(name, safe='')}", body)


@pytest.mark.parametrize("way", ["shovel", "federated exchange", "federated queue"])
async def test_jobs_from_another_virtual_host_are_retried_and_answered(
    own_stack: Stack, upstream: str, start_own_worker: StartWorker, own_client_of: MakeClient, way: str
) -> None:
    worker, marker = await start_own_worker(), uuid.uuid4().hex
    client = await own_client_of(worker)
    source = exchange = ""
    async with (
        channel_at(url_as(own_stack, "guest", "guest", upstream)) as there,
        channel_at(own_stack.rabbitmq.url) as here,
    ):
        match way:
            case "shovel":
                source = f"source-{marker}"
                await there.declare_queue(source, durable=True)
                shovel(own_stack, upstream, source, worker)
            case "federated queue":
                source = worker.jobs_queue
                await there.declare_queue(source, durable=True, arguments={"x-queue-type": "quorum"})
                federation(own_stack, upstream, source, queue=source)
            case _:
                source, exchange = worker.jobs_queue, f"jobs-{marker}"
                await there.declare_exchange(exchange, durable=True)
                federated = await here.declare_exchange(exchange, durable=True)
                await (await here.get_queue(source, ensure=False)).bind(federated, source)
                federation(own_stack, upstream, exchange, exchange=exchange)
        own_stack.model.play(Error(status=500), marker=marker, times=2)
        ids = [await send(there, exchange, source, marker) for _ in range(4)]
        replies = await results(client, ids)
    assert statuses(replies) == {"succeeded": 4}
    assert sum(reply.body["attempts"] for reply in replies) == 6
    # The publisher's reply queue is in the other virtual host.
    assert {reply.message.headers["vqa-undeliverable-to"] for reply in replies} == {"vqa.results.elsewhere"}
    assert {reply.message.correlation_id for reply in replies} == {"ticket"}
    assert len(calls_with(own_stack, marker)) == 6
    await until(lambda: worker.metric("vqa_jobs_in_flight") == 0, "everything is settled")


async def send(channel: AbstractChannel, exchange: str, key: str, marker: str) -> str:
    """Publish a job until a queue takes it: a federated exchange learns its bindings with a delay."""
    body = job(marker)
    message = aio_pika.Message(
        json.dumps(body).encode(),
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        correlation_id="ticket",
        reply_to="vqa.results.elsewhere",
    )
    target = await channel.get_exchange(exchange, ensure=False) if exchange else channel.default_exchange

    async def is_routed() -> bool:
        try:
            await target.publish(message, key)
        except DeliveryError:
            return False
        return True

    await until(is_routed, "the job is routed")
    return str(body["id"])


async def test_dead_letters_of_shovelled_jobs_can_be_replayed(
    own_stack: Stack, upstream: str, start_own_worker: StartWorker, own_client_of: MakeClient, tmp_path: Path
) -> None:
    worker, marker = await start_own_worker(VQA_MAX_ATTEMPTS="1"), uuid.uuid4().hex
    client: Client = await own_client_of(worker)
    async with channel_at(url_as(own_stack, "guest", "guest", upstream)) as there:
        await there.declare_queue(f"source-{marker}", durable=True)
        shovel(own_stack, upstream, f"source-{marker}", worker)
        own_stack.model.play(Error(status=500), marker=marker)
        job_id = await send(there, "", f"source-{marker}", marker)
        assert statuses(await results(client, [job_id])) == {"attempts_exhausted": 1}
    await until(lambda: client.depth(worker.dead_letter_queue), "the dead letter")
    replayed = await Cli.of(own_stack, tmp_path, worker).run("dlq", "replay", "--yes")
    assert replayed.code == 0, replayed.err
    await until(lambda: len(client.replies[job_id]) == 2, "another result")
    assert client.replies[job_id][1].body["status"] == "succeeded"
