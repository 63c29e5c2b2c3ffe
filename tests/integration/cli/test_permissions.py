"""RabbitMQ permissions of `submit`, `results` and the client, and the errors without them."""

import uuid
from collections.abc import AsyncIterator, Iterator

import pytest
from aio_pika import ExchangeType

from deploy.local.stack import Stack
from tests.breaking import BrokerUser, broker_version
from tests.conftest import StartWorker
from tests.integration.cli.running import Cli, channel_of
from tests.running import Worker
from vqa_worker import AsyncClient, RefusedError, Replies, TopologyError

# In the form of RabbitMQ's permissions.
SUBMITTING = {"configure": r"^vqa\.results\..*$", "read": r"^vqa\.results\..*$"}
REPLIES: tuple[Replies, ...] = ("queue", "exclusive", "direct")
QUESTION = {"messages": [{"role": "user", "content": "May I?"}]}


@pytest.fixture
def user(stack: Stack) -> Iterator[BrokerUser]:
    with BrokerUser.of(stack) as user:
        yield user


@pytest.fixture
async def intake(stack: Stack, worker: Worker) -> AsyncIterator[str]:
    """Declare an exchange that routes all jobs to the worker's queue."""
    name = f"intake-{uuid.uuid4().hex}"
    async with channel_of(stack) as channel:
        exchange = await channel.declare_exchange(name, ExchangeType.FANOUT)
        await (await channel.get_queue(worker.jobs_queue, ensure=False)).bind(exchange)
        yield name
        await exchange.delete()


async def test_submit_needs_permissions_on_its_reply_queue_and_the_default_exchange(
    stack: Stack, cli: Cli, user: BrokerUser
) -> None:
    user.permit(**SUBMITTING, write=r"^amq\.default$")
    cli.settings["VQA_RABBITMQ_URL"] = user.url
    cli.write("jobs.jsonl", QUESTION)
    done = await cli.run("submit", "jobs.jsonl", "--wait", "--json")
    assert done.code == 0, done.err
    assert done.summary["status"] == "succeeded"
    limited = await cli.run("submit", "jobs.jsonl", "--name", "limited", "--max-queue", "5")
    hides_depth = broker_version(stack) >= (4, 3)
    assert limited.code == (78 if hides_depth else 0), limited.err


async def test_submit_can_publish_to_an_exchange_without_other_write_permissions(
    cli: Cli, user: BrokerUser, intake: str
) -> None:
    user.permit(**SUBMITTING, write=f"^{intake}$")
    cli.settings["VQA_RABBITMQ_URL"] = user.url
    cli.write("jobs.jsonl", QUESTION)
    done = await cli.run("submit", "jobs.jsonl", "--exchange", intake, "--wait", "--json")
    assert done.code == 0, done.err
    assert done.summary["status"] == "succeeded"


async def test_a_missing_permission_is_reported_and_the_submission_can_be_resumed(
    cli: Cli, user: BrokerUser
) -> None:
    cli.settings["VQA_RABBITMQ_URL"] = user.url
    cli.write("jobs.jsonl", QUESTION)
    user.permit(configure="^$", write=".*", read=".*")
    no_queue = await cli.run("submit", "jobs.jsonl")
    user.permit(**SUBMITTING, write="^$")
    no_writing = await cli.run("submit", "jobs.jsonl")
    for refused, reported in (
        (no_queue, "Error: queue vqa.results.jobs-"),
        (no_writing, "Error: the user of VQA_RABBITMQ_URL may not publish jobs: ACCESS_REFUSED"),
    ):
        assert (refused.code, refused.out) == (78, "")
        assert any(line.startswith(reported) for line in refused.err.splitlines()), refused.err
        assert "Traceback" not in refused.err
    user.permit(**SUBMITTING, write=".*")
    missing = await cli.run("submit", "jobs.jsonl", "--exchange", "no-such-exchange")
    assert missing.code == 78
    assert "jobs cannot be published: NOT_FOUND - no exchange 'no-such-exchange'" in missing.err
    user.permit()
    assert (await cli.run("submit", "jobs.jsonl", "--wait")).code == 0


async def test_a_missing_read_permission_is_reported(cli: Cli, user: BrokerUser) -> None:
    user.permit(configure=".*", write=".*", read="^$")
    cli.settings["VQA_RABBITMQ_URL"] = user.url
    cli.write("jobs.jsonl", QUESTION)
    submitted = await cli.run("submit", "jobs.jsonl", "--name", "unread")
    unread = await cli.run("submissions", "collect", "unread")
    assert (submitted.code, unread.code, unread.out) == (0, 78, "")
    assert unread.err.startswith("Error: queue vqa.results.unread-")
    assert "lacks a permission: ACCESS_REFUSED" in unread.err
    for replies in ("queue", "exclusive"):
        with pytest.raises(TopologyError, match="lacks a permission: ACCESS_REFUSED"):
            async with AsyncClient(user.url, replies=replies):
                pass


async def test_the_client_needs_only_the_documented_permissions(
    worker: Worker, user: BrokerUser, intake: str
) -> None:
    ways = {"configure": r"^vqa\.results\.client-.*$", "read": r"^vqa\.results\.client-.*$"}
    user.permit(**ways, write=f"^{intake}$")
    async with AsyncClient(user.url, jobs_queue=worker.jobs_queue, jobs_exchange=intake) as client:
        assert (await client.ask_job(QUESTION, timeout=60)).succeeded
        user.permit(**ways, write="^$")
    async with AsyncClient(user.url, jobs_queue=worker.jobs_queue, jobs_exchange=intake) as client:
        with pytest.raises(RefusedError, match="the client's user may not publish jobs"):
            await client.ask_job(QUESTION, timeout=60)
    user.permit(configure=r"^amq\.gen-.*$", read=r"^amq\.gen-.*$", write=r"^amq\.default$")
    async with AsyncClient(user.url, jobs_queue=worker.jobs_queue, replies="exclusive") as client:
        assert (await client.ask_job(QUESTION, timeout=60)).succeeded


async def test_reply_queues_are_bound_to_the_reply_exchange(
    no_worker_cli: Cli, start_worker: StartWorker, stack: Stack
) -> None:
    exchange = f"replies-{uuid.uuid4().hex}"
    no_worker_cli.settings["VQA_REPLY_EXCHANGE"] = exchange
    assert (await no_worker_cli.run("topology", "apply")).code == 0
    queues = {name: no_worker_cli.settings[name] for name in ("VQA_JOBS_QUEUE", "VQA_RESULTS_QUEUE")}
    await start_worker(VQA_REPLY_EXCHANGE=exchange, VQA_DECLARE_TOPOLOGY="false", **queues)
    no_worker_cli.write("jobs.jsonl", QUESTION)
    done = await no_worker_cli.run("submit", "jobs.jsonl", "--wait", "--json")
    assert done.code == 0, done.err
    for replies in REPLIES:
        async with AsyncClient(
            stack.rabbitmq.url,
            jobs_queue=no_worker_cli.jobs_queue,
            reply_exchange=exchange,
            replies=replies,
        ) as client:
            assert (await client.ask_job(QUESTION, timeout=60)).succeeded
