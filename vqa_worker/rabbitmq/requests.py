"""Publish jobs and receive their results over one session: the transport of the Python client."""

import asyncio
import json
import logging
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Literal, TypeAlias

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage, AbstractQueue
from aio_pika.exceptions import CONNECTION_EXCEPTIONS, ChannelClosed, PublishError

from vqa_worker.rabbitmq.connection import (
    Broker,
    channel_lost,
    connection_losses,
    explain,
    raise_if_cancelled,
    short_lived_channel,
)
from vqa_worker.rabbitmq.outgoing import (
    OutgoingMessage,
    UnroutableError,
    raise_if_refused,
    raise_if_too_large,
    send,
)
from vqa_worker.rabbitmq.replies import PRIVATE_PREFIX, QueueMissingError, ReplyQueue, queue_errors
from vqa_worker.rabbitmq.session import FIRST_DELAY_S, LONGEST_DELAY_S, Session

# A program that uses the client need not configure structlog.
log = logging.getLogger(__name__)

Replies: TypeAlias = Literal["queue", "exclusive", "direct"]

# An exchange that was deleted and created again has lost its bindings, and AMQP reports neither.
REBIND_INTERVAL_S = 10.0
DIRECT: Final = "amq.rabbitmq.reply-to"


class Requests:
    """Publish jobs and pass results to a callback, while `run` runs.

    `replies` is the kind of reply queue: `queue`, a durable queue that outlives lost connections and is
    deleted after `expires_s` seconds without a reader; `exclusive`, a queue that is deleted with the
    connection; or `direct`, RabbitMQ's direct reply-to, which has no queue.

    Attributes:
        reply_to: what the current session's jobs carry.
    """

    def __init__(
        self,
        broker: Broker,
        jobs_queue: str,
        replies: Replies,
        *,
        reply_exchange: str,
        expires_s: int,
        on_result: Callable[[bytes], None],
        on_loss: Callable[[], None],
    ) -> None:
        """`on_result` gets each result's body; `on_loss` is called when results under way are lost."""
        self._session = Session(broker, "client", report=_report)
        self._jobs_queue = jobs_queue
        self._replies = replies
        self._reply_exchange = reply_exchange
        self._own = ReplyQueue(f"{PRIVATE_PREFIX}client-{uuid.uuid4().hex}", reply_exchange, expires_s)
        self._on_result = on_result
        self._on_loss = on_loss
        self._channel: AbstractChannel | None = None
        self._consumer: tuple[AbstractQueue, str] | None = None
        self.reply_to = ""

    async def run(self) -> None:
        """Keep the session connected until cancelled.

        Raises:
            BrokerRefusedError: at the first connection, the broker refuses the credentials.
            TopologyError: at the first connection, the broker refuses the reply queue.
        """
        await self._session.run(self._serve)

    @property
    def connected(self) -> asyncio.Event:
        """Set while there is a session with the broker."""
        return self._session.ready

    @property
    def problem(self) -> str:
        """Why there is no session, as far as known; empty while there is one."""
        return self._session.problem

    async def publish(self, message: OutgoingMessage) -> None:
        """Publish a job with the session's `reply_to` and wait for the confirm; repeat after losses.

        Raises:
            UnroutableError: there is no such queue.
            TooLargeError: the job is larger than the broker accepts.
            RefusedError: this user may not publish there, or there is no such exchange.
        """
        # Outside the loop that publishes again: an error in building the message is not the broker's.
        amqp, delay_s = message.to_amqp(), FIRST_DELAY_S
        while True:
            await self.connected.wait()
            amqp.reply_to = self.reply_to
            try:
                return await self._publish_once(message, amqp)
            except PublishError:
                raise UnroutableError(self._jobs_queue) from None
            except CONNECTION_EXCEPTIONS as error:
                raise_if_too_large(error, message)
                raise_if_refused(error, "the client's user")
                log.debug("a job was not confirmed, publishing it again: %s", explain(error))
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, LONGEST_DELAY_S)

    async def cancel(self, job_id: str) -> None:
        """Publish a cancellation to all workers.

        Raises:
            ConnectionError: there is no connection to the broker, or it refuses the message.
        """
        connection = self._session.connection
        if connection is None:
            raise ConnectionError("there is no connection to the broker")
        body = json.dumps({"cancel": job_id}).encode()
        exchange_name = f"{self._jobs_queue}.control"
        try:
            async with short_lived_channel(connection, confirms=True) as channel:
                exchange = await channel.get_exchange(exchange_name, ensure=False)
                await exchange.publish(aio_pika.Message(body), "", mandatory=False)
        except CONNECTION_EXCEPTIONS as error:
            raise ConnectionError(f"exchange {exchange_name}: {explain(error)}") from None

    async def close(self) -> None:
        """Delete the reply queue, if there is a connection."""
        if self._replies == "queue" and self._channel is not None and self._consumer is not None:
            with suppress(*CONNECTION_EXCEPTIONS), connection_losses():
                queue, tag = self._consumer
                await queue.cancel(tag)
                await self._channel.queue_delete(self._own.name, if_unused=False, if_empty=False)

    async def _serve(self, connection: AbstractConnection) -> None:
        channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
        lost = await channel_lost(channel)
        try:
            try:
                await self._consume(connection, channel)
            except QueueMissingError as error:
                raise ConnectionError(str(error)) from None
            self._channel = channel
            self._session.mark_ready()
            raise_if_cancelled()
            while not lost.done():
                await asyncio.wait({lost}, timeout=REBIND_INTERVAL_S)
                await self._bind_again(connection)
            raise ConnectionError(lost.result())
        finally:
            lost.cancel()
            was_ready, self._channel = self._channel is not None, None
            self.connected.clear()
            if was_ready and self._replies != "queue":
                self._on_loss()

    async def _consume(self, connection: AbstractConnection, channel: AbstractChannel) -> None:
        queue = await self._reply_queue(connection, channel)
        self.reply_to = queue.name
        with queue_errors(queue.name):
            if self._replies == "direct":
                await queue.consume(self._receive_direct, no_ack=True)
            else:
                self._consumer = queue, await queue.consume(self._receive)

    async def _reply_queue(self, connection: AbstractConnection, channel: AbstractChannel) -> AbstractQueue:
        if self._replies == "direct":
            return await channel.get_queue(DIRECT, ensure=False)
        if self._replies == "queue":
            await self._own.declare(connection)
            return await channel.get_queue(self._own.name, ensure=False)
        with queue_errors("for replies"):
            queue = await channel.declare_queue(exclusive=True)
            if self._reply_exchange:
                await queue.bind(self._reply_exchange, routing_key=queue.name)
        return queue

    async def _bind_again(self, connection: AbstractConnection) -> None:
        """Repeat the binding, which is lost when the reply exchange is deleted and created again."""
        if not self._reply_exchange or self._replies == "direct":
            return
        try:
            async with short_lived_channel(connection) as channel:
                queue = await channel.get_queue(self.reply_to, ensure=False)
                await queue.bind(self._reply_exchange, routing_key=self.reply_to)
        except ChannelClosed as error:
            log.warning("results cannot arrive: exchange %s: %s", self._reply_exchange, explain(error))

    async def _receive(self, message: AbstractIncomingMessage) -> None:
        self._on_result(message.body)
        await message.ack()

    async def _receive_direct(self, message: AbstractIncomingMessage) -> None:
        self._on_result(message.body)

    async def _publish_once(self, message: OutgoingMessage, amqp: aio_pika.Message) -> None:
        channel = self._channel
        if channel is None or channel.is_closed:
            raise ConnectionError("the channel is closed")
        await send(channel, message, amqp)


def _report(problem: str) -> None:
    log.warning("not connected to the broker, retrying: %s", problem)
