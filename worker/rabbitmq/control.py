"""The control exchange: every worker receives each message that is published to it."""

import asyncio
import json
from collections.abc import Callable

import structlog
from aio_pika.abc import AbstractConnection, AbstractIncomingMessage, AbstractQueue
from aio_pika.exceptions import ChannelClosed

from vqa_worker.messages.job import valid_id
from vqa_worker.rabbitmq.connection import broker_reason, connection_losses
from vqa_worker.rabbitmq.outgoing import CONTENT_TYPE, OutgoingMessage
from worker.rabbitmq.topology import Topology

log = structlog.get_logger(__name__)

# An exchange that was deleted and created again has lost its bindings, and AMQP reports neither.
REBIND_INTERVAL_S = 10.0
# Each refusal is an error line in RabbitMQ's log.
RETRY_INTERVAL_S = 60.0


def cancellation(exchange: str, job_id: str) -> OutgoingMessage:
    """Build the message that cancels a job; the broker returns it if no worker listens."""
    return OutgoingMessage(
        body=json.dumps({"cancel": job_id}).encode(),
        exchange=exchange,
        routing_key="",
        content_type=CONTENT_TYPE,
    )


class Control:
    """Receive cancellations, `{"cancel": "<id>"}`, on a queue of this worker bound to a fan-out exchange.

    A worker without the permission still runs: its jobs then cannot be cancelled while they run.
    """

    def __init__(
        self, topology: Topology, *, on_cancel: Callable[[str], None], on_subscribed: Callable[[], None]
    ) -> None:
        self._topology = topology
        self._on_cancel = on_cancel
        self._on_subscribed = on_subscribed
        self._queue: AbstractQueue | None = None
        self._last_refusal = ""

    async def listen(self, connection: AbstractConnection) -> None:
        """Start to listen, unless the broker refuses, which is logged.

        Raises:
            CONNECTION_EXCEPTIONS: the connection is lost.
        """
        self._queue, self._last_refusal = None, ""
        await self._bind(connection)

    async def keep_bound(self, connection: AbstractConnection) -> None:
        """Repeat the binding until cancelled, and start again to listen when that became possible.

        Raises:
            CONNECTION_EXCEPTIONS: the connection is lost.
        """
        while True:
            before = self._queue
            await asyncio.sleep(REBIND_INTERVAL_S if before is not None else RETRY_INTERVAL_S)
            with connection_losses():
                await self._bind(connection)
            if self._queue is not None and self._queue is not before:
                log.info("control_exchange_rebound", exchange=self._topology.control.name)

    async def _bind(self, connection: AbstractConnection) -> None:
        try:
            if self._queue is not None:
                await self._queue.bind(self._topology.control.name)
                return
        except ChannelClosed:
            log.warning("control_exchange_missing", exchange=self._topology.control.name)
        try:
            self._queue = await self._open(connection)
        except ChannelClosed as error:
            self._queue = None
            self._log_refusal(error)
        else:
            self._last_refusal = ""
            self._on_subscribed()

    async def _open(self, connection: AbstractConnection) -> AbstractQueue:
        # A separate channel: a refusal closes it.
        channel = await connection.channel(publisher_confirms=False)
        if self._topology.declare:
            await self._topology.control.declare(channel, passive=False)
        # The server names it amq.gen-… and deletes it with the connection.
        queue = await channel.declare_queue(exclusive=True)
        await queue.bind(self._topology.control.name)
        await queue.consume(self._receive, no_ack=True)
        return queue

    def _log_refusal(self, error: ChannelClosed) -> None:
        reason = broker_reason(error)
        if reason != self._last_refusal:
            log.warning(
                "cancellation_forbidden",
                exchange=self._topology.control.name,
                reason=reason,
                advice="create this fan-out exchange, and permit reading it and queues ^amq\\.gen-.*$",
            )
        self._last_refusal = reason

    async def _receive(self, message: AbstractIncomingMessage) -> None:
        job_id = _cancelled_id(message.body)
        if job_id is None:
            log.warning("control_message_ignored", reason='it is not {"cancel": "<id>"}')
            return
        log.info("job_cancelled", job_id=job_id)
        self._on_cancel(job_id)


def _cancelled_id(body: bytes) -> str | None:
    try:
        message = json.loads(body)
    except (ValueError, RecursionError):
        return None
    is_cancellation = isinstance(message, dict) and message.keys() == {"cancel"}
    return valid_id(message["cancel"]) if is_cancellation else None
