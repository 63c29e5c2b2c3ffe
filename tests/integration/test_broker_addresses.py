"""Several addresses of the broker: the order, nodes that fail, refuse or are silent."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from aio_pika.abc import AbstractConnection

from deploy.local.stack import Stack
from tests.breaking import events, url_as
from tests.conftest import BUCKET, StartWorker
from tests.integration.cli.running import Cli
from tests.proxy import Proxy
from tests.running import Worker, until
from tests.unit.fakes import cancel_all
from vqa_worker import AsyncClient
from vqa_worker.rabbitmq import connection
from vqa_worker.rabbitmq.connection import (
    Broker,
    BrokerRefusedError,
    BrokerUnreachableError,
    close,
    node_of,
)
from vqa_worker.rabbitmq.session import Session


@pytest.fixture
async def nodes(stack: Stack) -> AsyncIterator[list[Proxy]]:
    """Three addresses of the broker."""
    async with AsyncExitStack() as proxies:
        yield [await proxies.enter_async_context(Proxy.before(stack.rabbitmq.url)) for _ in range(3)]


def urls_of(nodes: list[Proxy], stack: Stack) -> str:
    return ",".join(node.url(stack.rabbitmq.url) for node in nodes)


def broker_at(urls: str) -> Broker:
    return Broker(urls, None, "test", setting="THE_URL")


def address(node: Proxy) -> str:
    return f"127.0.0.1:{node.port}"


def connected_node(worker: Worker) -> str:
    return str([{}, *events(worker, "rabbitmq_connected")][-1].get("node"))


async def connected_to(broker: Broker, *, last: str = "") -> str:
    connection = await broker.connect(last=last)
    await close(connection)
    return node_of(connection)


async def test_connections_are_spread_over_all_addresses(stack: Stack, nodes: list[Proxy]) -> None:
    broker = broker_at(urls_of(nodes, stack))
    # One of three addresses is left out of 60 connections once in ten thousand million runs.
    found = [await connected_to(broker) for _ in range(60)]
    assert set(found) == set(map(address, nodes))


async def test_the_address_to_try_last_is_tried_when_the_others_fail(
    stack: Stack, nodes: list[Proxy]
) -> None:
    broker, last = broker_at(urls_of(nodes, stack)), address(nodes[1])
    assert last not in [await connected_to(broker, last=last) for _ in range(30)]
    for node in (nodes[0], nodes[2]):
        await node.refuse()
    assert await connected_to(broker, last=last) == last


async def test_a_lost_connection_is_replaced_by_one_to_another_address(
    stack: Stack, nodes: list[Proxy]
) -> None:
    used: list[str] = []
    session = Session(broker_at(urls_of(nodes[:2], stack)), "test")

    async def serve(made: AbstractConnection) -> None:
        used.append(node_of(made))
        session.mark_ready()
        channel = await made.channel()
        await channel.closed()

    running = asyncio.create_task(session.run(serve))
    for times in range(1, 8):
        await until(lambda times=times: len(used) == times, "the next connection")
        for node in nodes:
            node.reset()
    await cancel_all([running])
    assert all(before != after for before, after in itertools.pairwise(used))


async def test_a_node_that_refuses_is_skipped_while_another_one_accepts(
    stack: Stack, nodes: list[Proxy]
) -> None:
    refusing, accepting = (
        nodes[0].url(url_as(stack, "guest", "s3cr3t-but-wrong")),
        nodes[1].url(stack.rabbitmq.url),
    )
    missing_vhost = nodes[2].url(url_as(stack, "guest", "guest", "no-such-vhost"))
    broker = broker_at(f"{refusing},{accepting},{missing_vhost}")
    for _ in range(10):
        assert await connected_to(broker) == address(nodes[1])
    await nodes[1].refuse()
    with pytest.raises(
        BrokerRefusedError, match=r"^THE_URL: the (broker refuses|virtual host).* \(127"
    ) as caught:
        await broker.connect()
    assert "s3cr3t" not in str(caught.value)


async def test_a_silent_node_delays_the_connection_by_a_bounded_time(
    stack: Stack, nodes: list[Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "NODE_TIMEOUT_S", 0.5)
    silent, dead, alive = nodes
    silent.freeze()
    await dead.refuse()
    broker = broker_at(urls_of(nodes, stack))
    while not silent.accepted:
        assert await connected_to(broker) == address(alive)
    await alive.refuse()
    with pytest.raises(BrokerUnreachableError) as caught:
        await broker.connect()
    reasons = sorted(str(caught.value).split("; "))
    assert len(reasons) == 3
    assert f"{address(silent)}: no answer within 0.5 s" in reasons
    assert f"{address(dead)}: " in str(caught.value)


async def test_a_worker_and_a_client_use_the_nodes_that_answer(
    stack: Stack, nodes: list[Proxy], start_worker: StartWorker
) -> None:
    await nodes[0].refuse()
    urls = urls_of(nodes, stack)
    worker = await start_worker(VQA_RABBITMQ_URL=urls)
    await uses_the_other(worker, urls, refused=nodes[1], accepting=nodes[2])
    await nodes[1].accept()
    await uses_the_other(worker, urls, refused=nodes[2], accepting=nodes[1])
    assert "guest:guest" not in worker.output()


async def uses_the_other(worker: Worker, urls: str, *, refused: Proxy, accepting: Proxy) -> None:
    """Check that jobs are answered without one of two nodes."""
    await refused.refuse()
    refused.reset()
    await until(lambda: connected_node(worker) == address(accepting), "the worker uses the other node")
    async with AsyncClient(urls.split(","), jobs_queue=worker.jobs_queue) as client:
        job = {"messages": [{"role": "user", "content": "Which node?"}]}
        assert (await client.ask_job(job, timeout=60)).succeeded


async def test_check_names_the_nodes_that_do_not_answer(
    stack: Stack, nodes: list[Proxy], tmp_path: Path
) -> None:
    dead, refusing, alive = nodes
    await dead.refuse()
    urls = f"{urls_of([dead, alive], stack)},{refusing.url(url_as(stack, 'guest', 's3cr3t-but-wrong'))}"
    cli = Cli(tmp_path, {**stack.environment(), "VQA_ALLOWED_BUCKETS": BUCKET})
    cli = cli.with_settings(VQA_RABBITMQ_URL=urls)
    found = {it["check"]: it for it in await cli.run_json("check")}
    assert found["broker"]["status"] == "ok"
    assert [found[f"node {address(node)}"]["status"] for node in nodes] == ["warning", "warning", "ok"]
    assert "refused" in found[f"node {address(dead)}"]["message"]
    assert "refuses this user name" in found[f"node {address(refusing)}"]["message"]
    for node in nodes:
        await node.refuse()
    found = {it["check"]: it for it in await cli.run_json("check", "--timeout=1", code=1)}
    assert found["broker"]["status"] == "failed"
    assert all(address(node) in found["broker"]["message"] for node in nodes)
    assert not any(check.startswith("node ") for check in found)
