"""A session connects again after each loss, and raises refusals only until it was ready once."""

import asyncio
import contextlib
import gc
import logging
from typing import Any

import aio_pika
import pytest
from aio_pika.abc import AbstractConnection
from structlog.testing import capture_logs

from deploy.local.stack import Stack
from tests.proxy import Proxy
from tests.running import until
from tests.unit.fakes import TOPOLOGY, cancel_all
from vqa_worker.rabbitmq.connection import Broker, BrokerUnreachableError, TopologyError
from vqa_worker.rabbitmq.outgoing import OutgoingMessage
from vqa_worker.rabbitmq.session import Session
from worker.rabbitmq import publisher


async def open_a_channel(connection: AbstractConnection) -> None:
    await (await connection.channel()).close()


async def test_a_request_is_repeated_on_a_new_connection_after_a_loss(stack: Stack) -> None:
    async with Proxy.before(stack.rabbitmq.url) as proxy:
        used = []

        async def request(connection: AbstractConnection) -> str:
            used.append(connection)
            if len(used) == 2:
                proxy.reset()
            await open_a_channel(connection)
            return "done"

        async with Session(Broker(proxy.url(stack.rabbitmq.url), None, "test"), "test") as session:
            assert await session.call(request, timeout_s=20) == "done"
            assert session.ready.is_set()
            assert await session.call(request, timeout_s=20) == "done"
    assert used[0] is used[1] is not used[2]
    assert session.connection is None


async def test_a_broker_that_stays_unreachable_is_named_with_the_reason() -> None:
    session = Session(Broker("amqp://127.0.0.1:1/", None, "test", setting="THE_URL"), "test")
    message = r"^THE_URL: the broker was unreachable for 0\.5 s \(.*Connect call failed"
    with pytest.raises(BrokerUnreachableError, match=message):
        async with session.opened(0.5):
            pass


async def test_a_failed_attempt_to_connect_is_collected_in_any_thread_without_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL)  # a record would hold the error
    failed = []
    try:
        await Broker("amqp://127.0.0.1:1/", None, "test").connect()
    except BrokerUnreachableError as error:
        # Its traceback holds the connection.
        failed.append(error)
    assert len(failed) == 1
    await asyncio.to_thread(failed.clear)
    await asyncio.to_thread(gc.collect)


async def test_a_refusal_is_raised_at_the_start_and_retried_later(stack: Stack) -> None:
    problems: list[str] = []
    session = Session(Broker(stack.rabbitmq.url, None, "test"), "test", report=problems.append)
    is_refused = True

    async def serve(connection: AbstractConnection) -> None:
        if is_refused:
            raise TopologyError(["the queue is exclusive to another connection"])
        session.mark_ready()
        await connection.closed()

    with pytest.raises(TopologyError):
        await session.run(serve)
    assert session.connection is None
    is_refused = False
    running = asyncio.create_task(session.run(serve))
    await until(session.ready.is_set, "the session is ready")
    is_refused = True
    assert session.connection is not None
    await session.connection.close()
    await until(lambda: len(problems) >= 2, "the refusals are reported")
    assert session.problem == problems[-1] == "the queue is exclusive to another connection"
    is_refused = False
    await until(session.ready.is_set, "the session is ready again")
    assert session.problem == ""
    await cancel_all([running])
    assert session.connection is None


async def test_a_cancellation_in_the_moment_of_success_is_not_swallowed(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`asyncio.wait_for` of Python 3.11 returns the result instead; the task would go on for ever."""
    connect, connections = aio_pika.connect, list[AbstractConnection]()

    async def connect_and_swallow_a_cancellation(url: str, **options: Any) -> AbstractConnection:
        connections.append(await connect(url, **options))
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return connections[0]
        raise AssertionError

    monkeypatch.setattr(aio_pika, "connect", connect_and_swallow_a_cancellation)
    session = Session(Broker(stack.rabbitmq.url, None, "test"), "test")
    calling = asyncio.create_task(session.call(open_a_channel))
    await until(lambda: connections, "the connection")
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    assert connections[0].is_closed


async def test_a_cancellation_in_the_moment_of_a_response_is_not_swallowed(stack: Stack) -> None:
    responded = asyncio.Event()

    async def request(connection: AbstractConnection) -> None:
        await open_a_channel(connection)
        responded.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()

    async with Session(Broker(stack.rabbitmq.url, None, "test"), "test") as session:
        calling = asyncio.create_task(session.call(request))
        await responded.wait()
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        assert session.connection is None


async def test_a_message_that_is_not_confirmed_is_reported_until_it_is(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "CONFIRM_WARNING_S", 0.1)
    async with Proxy.before(stack.rabbitmq.url) as proxy:
        publishing = publisher.Publisher(Broker(proxy.url(stack.rabbitmq.url), None, "test"), TOPOLOGY)
        running = asyncio.create_task(publishing.run())
        await until(lambda: publishing.is_connected, "the publisher is connected")
        message = OutgoingMessage(body=b"{}", routing_key="nobody", mandatory=False)
        await publishing.publish(message)
        proxy.freeze()
        with capture_logs() as logged:
            waiting = asyncio.create_task(publishing.publish(message))
            await until(lambda: publishing.delay_reason, "the delay is reported")
            assert publishing.delay_reason.startswith("1 not published: no confirm for 10 s")
            proxy.thaw()
            await waiting
        assert [line["event"] for line in logged] == ["publish_unconfirmed", "publish_recovered"]
        assert publishing.delay_reason == ""
        await cancel_all([running])
