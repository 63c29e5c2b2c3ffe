"""The control exchange: every worker receives each message that is published to it.

The messages: `{"cancel": "<id>"}`, from publishers; `{"asked": ["<key>", …]}` and `{"answer": {"<key>":
"running"}}`, from workers, about jobs that were delivered again: see `worker.jobs.other_workers`.
"""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

import structlog
from aio_pika.abc import AbstractConnection, AbstractIncomingMessage, AbstractQueue
from aio_pika.exceptions import ChannelClosed

from vqa_worker.messages.job import valid_id
from vqa_worker.rabbitmq.connection import broker_reason, connection_losses
from vqa_worker.rabbitmq.outgoing import CONTENT_TYPE, OutgoingMessage
from worker.jobs.other_workers import JobState
from worker.rabbitmq.topology import Topology

log = structlog.get_logger(__name__)

# An exchange that was deleted and created again has lost its bindings, and AMQP reports neither.
REBIND_INTERVAL_S = 10.0
# Each refusal is an error line in RabbitMQ's log.
RETRY_INTERVAL_S = 60.0

_KEY = re.compile(r"[0-9a-f]{64}")


def cancellation(exchange: str, job_id: str) -> OutgoingMessage:
    """Build the message that cancels a job; the broker returns it if no worker listens."""
    return _message(exchange, {"cancel": job_id})


class Control:
    """Receive messages on a queue of this worker, bound to a fan-out exchange; send to all workers.

    A worker without the permissions still runs: its jobs then cannot be cancelled while they run, and it does
    not ask other workers about redelivered jobs.
    """

    def __init__(
        self,
        topology: Topology,
        *,
        on_cancel: Callable[[str], None],
        on_subscribed: Callable[[], None],
        publish: Callable[[OutgoingMessage], Awaitable[bool]] | None = None,
        states_of: Callable[[Iterable[str]], dict[str, JobState]] = lambda _: {},
        on_answer: Callable[[Mapping[str, JobState]], None] = lambda _: None,
    ) -> None:
        """Describe what to do.

        Args:
            topology: names the exchange.
            on_cancel: gets the id of a cancelled job.
            on_subscribed: called when messages before were missed.
            publish: publishes once, over another connection: an alarm would block this one, acks included.
            states_of: answers other workers' questions about jobs.
            on_answer: gets the answers to this worker's own questions.
        """
        self._topology = topology
        self._on_cancel = on_cancel
        self._on_subscribed = on_subscribed
        self._states_of = states_of
        self._on_answer = on_answer
        self._publish = publish
        self._queue: AbstractQueue | None = None
        self._last_refusal = ""

    async def listen(self, connection: AbstractConnection) -> None:
        """Start to listen, unless the broker refuses, which is logged.

        Raises:
            CONNECTION_EXCEPTIONS: the connection is lost.
        """
        self._queue, self._last_refusal = None, ""
        await self._bind(connection)

    async def ask(self, keys: Sequence[str]) -> bool:
        """Ask all workers for the states of jobs; return whether the question was sent."""
        return await self._send({"asked": list(keys)})

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
        match _parsed(message.body):
            case {"cancel": str(text)} if (job_id := valid_id(text)) is not None:
                log.info("job_cancelled", job_id=job_id)
                self._on_cancel(job_id)
            case {"asked": [*keys]} if all(map(_is_key, keys)):
                if states := self._states_of(keys):
                    await self._send({"answer": states})
            case {"answer": dict(states)} if all(map(_is_key, states)):
                self._on_answer({key: JobState(it) for key, it in states.items() if it in set(JobState)})
            case _:
                log.warning("control_message_ignored", reason="it is not a message of this version")

    async def _send(self, message: Mapping[str, Any]) -> bool:
        """Publish to all workers; return whether it is confirmed. Without a queue there is no answer."""
        if self._queue is None or self._publish is None:
            return False
        return await self._publish(_message(self._topology.control.name, message))


def _message(exchange: str, content: Mapping[str, Any]) -> OutgoingMessage:
    body = json.dumps(content).encode()
    return OutgoingMessage(body=body, exchange=exchange, routing_key="", content_type=CONTENT_TYPE)


def _parsed(body: bytes) -> Any:
    try:
        message = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) and len(message) == 1 else None


def _is_key(value: object) -> bool:
    return isinstance(value, str) and _KEY.fullmatch(value) is not None
