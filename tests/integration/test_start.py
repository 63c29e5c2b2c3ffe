"""The worker's start: errors are reported at once in one line; late services are waited for."""

import asyncio
import re
import socket
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import aio_pika
import pytest

from deploy.local.stack import Stack
from tests.authority import Authority
from tests.breaking import BrokerUser, events, job, url_as
from tests.conftest import MakeClient, StartWorker
from tests.proxy import Proxy
from tests.running import Client, Ended, Worker, until

EXIT_CONFIG = 78


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.made_in(tmp_path_factory.mktemp("tls") / "right")


# Starts that fail. They run concurrently, since each takes a second.


@dataclass(frozen=True)
class Refusals:
    """Workers that did not start, by the cause."""

    ended: Mapping[str, Ended]
    queues: Mapping[str, Worker]
    """The workers' names, where their queues matter."""
    connections_of_wrong_settings: int


@pytest.fixture(scope="module")
async def refusals(own_stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Refusals]:
    folder = tmp_path_factory.mktemp("refusals")
    async with Proxy.before(own_stack.rabbitmq.url) as proxy:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            workers = {
                "settings": Worker.of(
                    own_stack,
                    folder,
                    VQA_RABBITMQ_URL=proxy.url(own_stack.rabbitmq.url),
                    VQA_ALLOWED_BUCKETS="",
                    VQA_MAX_ATTEMPTS="none",
                    VQA_MODEL_API_KEY="a key with blanks",
                    VQA_RETRY_DELAYS="1.5",
                ),
                "password": Worker.of(
                    own_stack, folder, VQA_RABBITMQ_URL=url_as(own_stack, "guest", "s3cr3t-but-wrong")
                ),
                "vhost": Worker.of(
                    own_stack,
                    folder,
                    VQA_RABBITMQ_URL=url_as(own_stack, "guest", "guest", f"no-{uuid.uuid4().hex}"),
                ),
                "arguments": Worker.of(own_stack, folder),
                "missing": Worker.of(own_stack, folder, VQA_DECLARE_TOPOLOGY="false"),
                "port": Worker.of(own_stack, folder, VQA_HTTP_PORT=str(taken.getsockname()[1])),
            }
            await declare_others(own_stack, workers["arguments"])
            ended = await asyncio.gather(*(worker.run_to_end() for worker in workers.values()))
        yield Refusals(dict(zip(workers, ended, strict=True)), workers, proxy.accepted)


async def declare_others(stack: Stack, worker: Worker) -> None:
    """Declare the worker's queues with other arguments."""
    async with await aio_pika.connect(stack.rabbitmq.url) as connection:
        channel = await connection.channel()
        await channel.declare_queue(worker.jobs_queue, durable=True, arguments={"x-queue-type": "quorum"})
        await channel.declare_queue(worker.results_queue, durable=True)


def test_all_invalid_settings_are_reported_before_any_connection(refusals: Refusals) -> None:
    ended = refusals.ended["settings"]
    assert ended.code == EXIT_CONFIG
    assert sorted(line.partition(":")[0] for line in ended.errors) == [
        "VQA_ALLOWED_BUCKETS",
        "VQA_MAX_ATTEMPTS",
        "VQA_MODEL_API_KEY",
        "VQA_RETRY_DELAYS",
    ]
    assert refusals.connections_of_wrong_settings == 0
    assert "a key with blanks" not in ended.output + "".join(ended.errors)


@pytest.mark.parametrize(("fault", "word"), [("password", "password"), ("vhost", "virtual host")])
def test_rejected_credentials_are_an_error_that_shows_no_password(
    refusals: Refusals, fault: str, word: str
) -> None:
    ended = refusals.ended[fault]
    assert ended.code == EXIT_CONFIG
    (line,) = ended.errors
    assert line.startswith("VQA_RABBITMQ_URL: ")
    assert word in line
    assert "s3cr3t" not in ended.output + line
    assert "guest:guest" not in ended.output + line


def test_all_queues_with_other_arguments_are_reported_with_the_difference(refusals: Refusals) -> None:
    ended, worker = refusals.ended["arguments"], refusals.queues["arguments"]
    assert ended.code == EXIT_CONFIG
    results, jobs = ended.errors
    assert worker.jobs_queue in jobs
    assert re.search("x-dead-letter|x-overflow|x-delivery-limit", jobs), jobs
    assert worker.results_queue in results
    assert "x-queue-type" in results
    assert "quorum" in results


def test_missing_queues_are_an_error_if_they_are_not_to_be_declared(refusals: Refusals) -> None:
    ended, worker = refusals.ended["missing"], refusals.queues["missing"]
    assert ended.code == EXIT_CONFIG
    names = [
        worker.dead_letter_queue,
        worker.results_queue,
        worker.jobs_queue,
        f"{worker.jobs_queue}.retry.1s",
    ]
    assert len(ended.errors) == len(names)
    for name, line in zip(names, ended.errors, strict=True):
        assert re.search(rf"\b{re.escape(name)} does not exist", line), line


def test_a_port_in_use_is_an_error(refusals: Refusals) -> None:
    ended = refusals.ended["port"]
    assert ended.code == EXIT_CONFIG
    (line,) = ended.errors
    assert "VQA_HTTP_PORT" in line
    assert "in use" in line


# A worker with few permissions and existing queues


@dataclass(frozen=True)
class Guest:
    """A worker with existing queues whose broker user may not declare any."""

    worker: Worker
    client: Client
    user: BrokerUser


@pytest.fixture(scope="module")
async def guest(own_stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Guest]:
    with BrokerUser.of(own_stack, configure="^$") as user:
        worker = Worker.of(
            own_stack,
            tmp_path_factory.mktemp("guest"),
            VQA_RABBITMQ_URL=user.url,
            VQA_DECLARE_TOPOLOGY="false",
            VQA_SHUTDOWN_GRACE="5",
        )
        async with await aio_pika.connect(own_stack.rabbitmq.url) as connection:
            channel = await connection.channel()
            for name in ("", ".dead", ".retry.1s"):
                await channel.declare_queue(f"{worker.jobs_queue}{name}", durable=True)
            await channel.declare_queue(worker.results_queue, durable=True)
        try:
            await worker.start()
            async with Client.of(own_stack, worker) as client:
                yield Guest(worker, client, user)
            assert await worker.stop() == 0, worker.output()
        finally:
            worker.kill()


async def test_existing_queues_are_used_without_declaring_them(guest: Guest) -> None:
    reply = await guest.client.ask(**job())
    assert reply.body["status"] == "succeeded"


async def test_the_worker_s_connections_are_named_after_its_host(guest: Guest, own_stack: Stack) -> None:
    listed = await asyncio.to_thread(own_stack.rabbitmq.ctl, "list_connections", "user", "client_properties")
    own = [line for line in listed.splitlines() if line.startswith(guest.user.name)]
    assert len(own) == 2
    assert all(f'"vqa-worker@{socket.gethostname()}"' in line for line in own), own


def test_a_grace_period_shorter_than_a_call_is_a_warning(guest: Guest) -> None:
    (warning,) = events(guest.worker, "configuration_warning")
    assert warning["level"] == "warning"
    assert warning["warning"].startswith("VQA_SHUTDOWN_GRACE: ")


# The network between worker and broker


async def test_the_worker_waits_for_a_broker_that_starts_later(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    async with Proxy.before(own_stack.rabbitmq.url, listens=False) as proxy:
        worker = await start_own_worker(wait=False, VQA_RABBITMQ_URL=proxy.url(own_stack.rabbitmq.url))
        starting = asyncio.create_task(worker.start())
        await until(
            lambda: len(events(worker, "rabbitmq_unreachable")) > 2, "the worker waits for the broker"
        )
        await until(lambda: worker.get("/livez")[0], "the worker has imported everything else")
        assert worker.ready() == (503, {"status": "no_broker", "reasons": ["not connected to RabbitMQ"]})
        assert worker.get("/livez")[0] == 200
        await proxy.accept()
        await starting
        client = await own_client_of(worker)
        assert (await client.ask(**job())).body["status"] == "succeeded"
        assert await worker.stop() == 0


async def test_the_broker_s_certificate_is_verified_with_the_configured_ca(
    own_stack: Stack,
    start_own_worker: StartWorker,
    own_client_of: MakeClient,
    authority: Authority,
    tmp_path: Path,
) -> None:
    other = Authority.made_in(tmp_path / "other")
    async with Proxy.before(own_stack.rabbitmq.url, tls=authority.server_context()) as proxy:
        url = proxy.url(own_stack.rabbitmq.url).replace("amqp:", "amqps:")
        distrusting = await start_own_worker(
            wait=False, VQA_RABBITMQ_URL=url, VQA_RABBITMQ_CA_FILE=other.certificate
        )
        worker, ended = await asyncio.gather(
            start_own_worker(VQA_RABBITMQ_URL=url, VQA_RABBITMQ_CA_FILE=authority.certificate),
            distrusting.run_to_end(),
        )
        client = await own_client_of(worker)
        assert (await client.ask(**job())).body["status"] == "succeeded"
        assert await worker.stop() == 0

    assert ended.code == EXIT_CONFIG
    (line,) = ended.errors
    assert "VQA_RABBITMQ_CA_FILE" in line
    assert "certificate" in line
