"""Jobs queues that somebody else has declared in another way: they work, or the start says why not."""

import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage

from deploy.local.model_simulator.behavior import Error
from deploy.local.stack import Stack
from tests.breaking import BrokerUser, events, hasty, publish, results, said, statuses
from tests.conftest import MakeClient, StartWorker
from tests.running import Worker, calls_with, until

EXIT_CONFIG = 78
OWN: dict[str, str] = {"VQA_DECLARE_TOPOLOGY": "false", "VQA_RETRY_DELAYS": "1"}
QUORUM: dict[str, Any] = {"x-queue-type": "quorum"}
SINGLE: dict[str, Any] = {"x-single-active-consumer": True}
KINDS: dict[str, dict[str, Any]] = {
    "classic": {},
    "classic with priorities": {"x-max-priority": 10},
    "classic, lazy": {"x-queue-mode": "lazy"},
    "classic with a single active consumer": SINGLE,
    "quorum": QUORUM,
    "quorum with a single active consumer": {**QUORUM, **SINGLE},
    "quorum with a low delivery limit": {**QUORUM, "x-delivery-limit": 1},
    "quorum with a maximum length": {**QUORUM, "x-max-length": 1000, "x-overflow": "reject-publish"},
    "quorum with a time to live": {**QUORUM, "x-message-ttl": 3_600_000},
}


@pytest.fixture(autouse=True)
def _repaired(stack: Stack) -> Iterator[None]:
    """Restore the behavior of the model API after each test."""
    yield
    stack.model.configure(rules=[])


@pytest.fixture(scope="module")
def limited(stack: Stack) -> Iterator[BrokerUser]:
    """A user who may not declare queues, except those of a worker's control exchange."""
    with BrokerUser.of(stack, configure=r"^amq\.gen-.*$") as user:
        yield user


@asynccontextmanager
async def broker_channel(stack: Stack) -> AsyncIterator[AbstractChannel]:
    async with await aio_pika.connect(stack.rabbitmq.url) as connection:
        yield await connection.channel()


async def nack(message: AbstractIncomingMessage) -> None:
    await message.nack()


async def declare(channel: AbstractChannel, worker: Worker, arguments: dict[str, Any]) -> None:
    """Declare a worker's queues as somebody else would."""
    await channel.declare_queue(worker.jobs_queue, durable=True, arguments=arguments)
    for name in (worker.results_queue, worker.dead_letter_queue):
        await channel.declare_queue(name, durable=True)
    back: dict[str, Any] = {
        "x-message-ttl": 1000,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": worker.jobs_queue,
    }
    await channel.declare_queue(f"{worker.jobs_queue}.retry.1s", durable=True, arguments=back)


@pytest.mark.parametrize(
    ("kind", "permitted"),
    [
        *((kind, False) for kind in KINDS),
        *((kind, True) for kind in KINDS if KINDS[kind] in (SINGLE, QUORUM)),
    ],
)
async def test_jobs_are_answered_before_and_after_an_outage(
    stack: Stack,
    start_worker: StartWorker,
    client_of: MakeClient,
    limited: BrokerUser,
    kind: str,
    *,
    permitted: bool,
) -> None:
    urls = {} if permitted else {"VQA_RABBITMQ_URL": limited.url}
    worker = hasty(await start_worker(wait=False, VQA_MAX_CONCURRENCY="4", **OWN, **urls))
    async with broker_channel(stack) as channel:
        await declare(channel, worker, KINDS[kind])
    client = await client_of(worker)
    marker = uuid.uuid4().hex
    before = await publish(client, 6, "before")
    await worker.start()
    assert statuses(await results(client, before)) == {"succeeded": 6}

    for _ in range(2):
        stack.model.play(Error(status=401), marker=marker, times=None)
        failing = await publish(client, 6, marker)
        await said(worker, "paused")
        stack.model.configure(rules=[])
        replies = await results(client, failing, 40.0)
        assert statuses(replies) == {"succeeded": 6}
        assert {reply.body["attempts"] for reply in replies} == {1}
        await said(worker, "ready")
    assert not events(worker, "rabbitmq_connection_lost")
    await until(lambda: worker.metric("vqa_jobs_in_flight") == 0, "nothing is in flight")
    assert await worker.stop() == 0
    assert (await client.depth(worker.jobs_queue), await client.depth(worker.dead_letter_queue)) == (0, 0)


async def test_a_single_active_consumer_gets_as_many_jobs_as_the_worker_can_process(
    stack: Stack, start_worker: StartWorker, client_of: MakeClient
) -> None:
    """The limit of concurrency rises again after a pause; a second consumer would get no jobs."""
    worker = hasty(await start_worker(wait=False, VQA_MAX_CONCURRENCY="8", **OWN))
    async with broker_channel(stack) as channel:
        await declare(channel, worker, KINDS["quorum with a single active consumer"])
    client = await client_of(worker)
    await worker.start()
    marker = uuid.uuid4().hex
    stack.model.play(Error(status=401), marker=marker, times=None)
    await publish(client, 1, marker)
    await said(worker, "paused")
    stack.model.configure(rules=[], latency=0.2)
    try:
        await results(client, await publish(client, 80, marker))
    finally:
        stack.model.configure(latency=0.0)
    spans = [(call.started, call.ended or 0.0) for call in calls_with(stack, marker) if call.status == 200]
    assert max(sum(begin <= at < end for begin, end in spans) for at, _ in spans) == 8


async def test_the_next_worker_takes_over_when_the_active_consumer_ends(
    stack: Stack, start_worker: StartWorker, client_of: MakeClient
) -> None:
    first = await start_worker(wait=False, **OWN)
    async with broker_channel(stack) as channel:
        await declare(channel, first, KINDS["quorum with a single active consumer"])
    await first.start()
    second = await start_worker(like=first, **OWN)
    client = await client_of(first)
    await results(client, await publish(client, 3, "first"))
    assert await first.stop() == 0
    await results(client, await publish(client, 3, "second"))
    # Counted after the ack.
    await until(lambda: second.metric("vqa_jobs_total", status="succeeded") == 3, "all are counted")


@pytest.mark.parametrize("waiting", [0, 3])
@pytest.mark.parametrize("permitted", [True, False], ids=["may declare", "may not declare"])
async def test_a_stream_ends_the_start(
    stack: Stack, start_worker: StartWorker, limited: BrokerUser, waiting: int, *, permitted: bool
) -> None:
    urls = {} if permitted else {"VQA_RABBITMQ_URL": limited.url}
    worker = await start_worker(wait=False, **OWN, **urls)
    async with broker_channel(stack) as channel:
        await declare(channel, worker, {"x-queue-type": "stream"})
        for _ in range(waiting):
            await channel.default_exchange.publish(aio_pika.Message(b"{}"), worker.jobs_queue)
    ended = await worker.run_to_end()
    assert ended.code == EXIT_CONFIG, ended
    (line,) = [line for line in ended.errors if "stream" in line and not line.startswith("{")]
    assert line == (
        f"queue {worker.jobs_queue} is a stream, which keeps the jobs that were processed: use another name"
        " (VQA_JOBS_QUEUE), or delete it and run `vqa-worker topology apply`"
    )


@pytest.mark.parametrize("arguments", [{"x-queue-type": "stream"}, {**QUORUM, **SINGLE}])
async def test_a_worker_that_declares_its_queues_names_the_difference(
    stack: Stack, start_worker: StartWorker, arguments: dict[str, Any]
) -> None:
    worker = await start_worker(wait=False)
    async with broker_channel(stack) as channel:
        await channel.declare_queue(worker.jobs_queue, durable=True, arguments=arguments)
    ended = await worker.run_to_end()
    assert ended.code == EXIT_CONFIG
    (line,) = [line for line in ended.errors if worker.jobs_queue in line]
    assert "exists with other arguments: PRECONDITION_FAILED - inequivalent arg" in line


@pytest.mark.parametrize("declares", ["true", "false"])
async def test_an_exclusive_queue_of_another_connection_ends_the_start(
    stack: Stack, start_worker: StartWorker, declares: str
) -> None:
    worker = await start_worker(wait=False, **{**OWN, "VQA_DECLARE_TOPOLOGY": declares})
    async with broker_channel(stack) as channel:
        for name in (worker.results_queue, worker.dead_letter_queue, f"{worker.jobs_queue}.retry.1s"):
            await channel.declare_queue(name, durable=True, arguments=QUORUM if declares == "true" else {})
        await channel.declare_queue(worker.jobs_queue, exclusive=True)
        ended = await worker.run_to_end()
    assert ended.code == EXIT_CONFIG
    assert any(f"queue {worker.jobs_queue} is exclusive to another connection" in it for it in ended.errors)


async def test_a_queue_with_an_exclusive_consumer_is_used_as_soon_as_that_ends(
    stack: Stack, start_worker: StartWorker, client_of: MakeClient
) -> None:
    worker = await start_worker(wait=False, **OWN)
    async with broker_channel(stack) as channel:
        await declare(channel, worker, {})
        queue = await channel.get_queue(worker.jobs_queue, ensure=False)
        await queue.consume(nack, exclusive=True)
        await worker.serve()
        (lost,) = await until(
            lambda: events(worker, "rabbitmq_connection_lost")[:1], "the refusal in the log"
        )
    assert "another consumer has the exclusive use of the queue" in lost["reason"]
    client = await client_of(worker)
    await results(client, await publish(client, 2, "afterwards"))
