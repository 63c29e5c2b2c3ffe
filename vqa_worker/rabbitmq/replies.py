"""What a publisher of jobs needs: the job message, a reply queue, and its reader."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING

from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage
from aio_pika.exceptions import ChannelClosed, ChannelNotFoundEntity

from vqa_worker.rabbitmq.connection import (
    Broker,
    TopologyError,
    broker_reason,
    channel_lost,
    explain,
    raise_if_cancelled,
    short_lived_channel,
)
from vqa_worker.rabbitmq.outgoing import CONTENT_TYPE, ENQUEUED_HEADER, MAX_SHORT_BYTES, OutgoingMessage
from vqa_worker.rabbitmq.session import Session

if TYPE_CHECKING:
    from pamqp.common import FieldValue

# The default of `VQA_ALLOWED_REPLY_TO` allows this prefix.
PRIVATE_PREFIX = "vqa.results."
PREFETCH = 500


class QueueMissingError(Exception):
    """The queue does not exist."""

    def __init__(self, queue: str) -> None:
        super().__init__(f"the queue {queue} does not exist")
        self.queue = queue


class QueueHiddenError(TopologyError):
    """The user has no permission for the queue, so that the broker does not say whether it exists."""


def job_message(
    job_id: str, body: bytes, queue: str, *, reply_to: str | None = None, exchange: str = ""
) -> OutgoingMessage:
    """Build the message of a job. Copies published after a lost confirm have the same ids."""
    now = datetime.now(UTC)
    message = OutgoingMessage(
        body=body,
        exchange=exchange,
        routing_key=queue,
        content_type=CONTENT_TYPE,
        reply_to=reply_to,
        timestamp=now,
        # The timestamp counts in whole seconds only.
        headers={ENQUEUED_HEADER: int(now.timestamp() * 1000)},
    )
    if len(job_id.encode()) > MAX_SHORT_BYTES:
        return message
    return replace(message, message_id=job_id, correlation_id=job_id)


async def depth(connection: AbstractConnection, queue: str) -> int:
    """Return the number of ready messages in a queue.

    Raises:
        QueueMissingError: it does not exist.
        TopologyError: the broker does not allow it.
    """
    async with _queue_channel(connection, queue) as channel:
        found = await channel.declare_queue(queue, durable=True, passive=True)
    return found.declaration_result.message_count or 0


async def consumer_count(connection: AbstractConnection, queue: str) -> int:
    """Return the number of consumers of a queue.

    Raises: as `depth`.
    """
    async with _queue_channel(connection, queue) as channel:
        found = await channel.declare_queue(queue, durable=True, passive=True)
    return found.declaration_result.consumer_count or 0


@asynccontextmanager
async def _queue_channel(connection: AbstractConnection, queue: str) -> AsyncIterator[AbstractChannel]:
    with queue_errors(queue):
        async with short_lived_channel(connection) as channel:
            yield channel


@contextmanager
def queue_errors(queue: str) -> Iterator[None]:
    """Translate the broker's refusals about a queue; pass on the losses of a channel.

    Raises:
        QueueMissingError: it does not exist.
        QueueHiddenError: the user lacks a permission.
        TopologyError: the broker does not allow the request for another reason.
    """
    try:
        yield
    except ChannelNotFoundEntity:
        raise QueueMissingError(queue) from None
    except ChannelClosed as error:
        fault = [f"queue {queue}: {explain(error)}"]
        match broker_reason(error).split(" - ")[0]:
            case "ACCESS_REFUSED":
                raise QueueHiddenError(fault) from None
            case "PRECONDITION_FAILED" | "RESOURCE_LOCKED":
                raise TopologyError(fault) from None
        raise


@dataclass(frozen=True)
class ReplyQueue:
    """A durable queue for one reader's results, which RabbitMQ deletes when it is unused for long.

    Attributes:
        exchange: to bind it to (`VQA_REPLY_EXCHANGE`); empty: the default exchange.
        expires_s: seconds without a reader after which it is deleted.
    """

    name: str
    exchange: str
    expires_s: int

    async def declare(self, connection: AbstractConnection) -> None:
        """Create it, unless it exists."""
        try:
            await depth(connection, self.name)
        except QueueMissingError:
            arguments: dict[str, FieldValue] = {
                "x-queue-type": "quorum",
                "x-expires": self.expires_s * 1000,
            }
            async with _queue_channel(connection, self.name) as channel:
                queue = await channel.declare_queue(self.name, durable=True, arguments=arguments)
                if self.exchange:
                    await queue.bind(self.exchange, routing_key=self.name)


async def prepare(
    connection: AbstractConnection, *, jobs_queue: str | None, replies: ReplyQueue | None
) -> None:
    """Check that the jobs queue exists and create the reply queue, before any job is sent.

    Raises:
        QueueMissingError, TopologyError: as `depth`.
    """
    if jobs_queue is not None:
        # RabbitMQ 4.3 shows a queue only to users with a permission for it, which publishing does not need.
        with suppress(QueueHiddenError):
            await depth(connection, jobs_queue)
    if replies is not None:
        await replies.declare(connection)


async def delete_queue(connection: AbstractConnection, name: str) -> None:
    """Delete a queue and its messages, if it exists."""
    async with _queue_channel(connection, name) as channel:
        await channel.queue_delete(name, if_unused=False, if_empty=False)


@dataclass(frozen=True, slots=True, eq=False)
class Reply:
    """A result's body, and when it was published, in Unix seconds."""

    body: bytes
    at: int


class ReplyReader:
    """Pass the results in a queue to `take`, some at a time, and ack them when it returns.

    `take` returns those that it could not take: they stay in the queue, for the next reader.
    """

    def __init__(
        self, broker: Broker, queue: str, take: Callable[[Sequence[Reply]], Awaitable[Sequence[Reply]]]
    ) -> None:
        self._session = Session(broker, "results")
        self._queue = queue
        self._take = take

    async def run(self) -> None:
        """Read until cancelled; connect again after losses.

        Raises:
            QueueMissingError: the queue does not exist, or was deleted.
            BrokerRefusedError, TopologyError: at the first connection, the broker refuses the user.
        """
        await self._session.run(self._read)

    @property
    def is_connected(self) -> bool:
        """Whether results can arrive."""
        return self._session.ready.is_set()

    async def _read(self, connection: AbstractConnection) -> None:
        channel = await connection.channel(publisher_confirms=False)
        await channel.set_qos(prefetch_count=PREFETCH)
        queue = await channel.get_queue(self._queue, ensure=False)
        arrivals: asyncio.Queue[AbstractIncomingMessage | None] = asyncio.Queue()
        lost = await channel_lost(channel)
        # None ends the reading.
        lost.add_done_callback(lambda _: arrivals.put_nowait(None))
        try:
            with queue_errors(self._queue):
                await queue.consume(partial(_put, arrivals))
            self._session.mark_ready()
            raise_if_cancelled()
            await self._take_all(arrivals)
        finally:
            lost.cancel()

    async def _take_all(self, arrivals: "asyncio.Queue[AbstractIncomingMessage | None]") -> None:
        keeps_some = False
        while True:
            messages = [await arrivals.get()]
            while not arrivals.empty():
                messages.append(arrivals.get_nowait())
            came = [message for message in messages if message is not None]
            if came:
                replies = [Reply(message.body, _published_at(message)) for message in came]
                kept = set(await self._take(replies))
                keeps_some = keeps_some or bool(kept)
                if not keeps_some:
                    # One consumer on one channel: this one's tag stands for all before it.
                    await came[-1].ack(multiple=True)
                for message, reply in zip(came, replies, strict=True) if keeps_some else ():
                    if reply not in kept:
                        await message.ack()
            if len(came) < len(messages):
                return


async def _put(
    arrivals: "asyncio.Queue[AbstractIncomingMessage | None]", message: AbstractIncomingMessage
) -> None:
    # aio-pika cancels this coroutine with the channel: nothing may be awaited here.
    arrivals.put_nowait(message)


def _published_at(message: AbstractIncomingMessage) -> int:
    if isinstance(message.timestamp, datetime):
        return int(message.timestamp.timestamp())
    return int(time.time())
