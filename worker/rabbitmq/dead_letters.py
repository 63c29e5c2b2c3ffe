"""Read the dead-letter queue, and replay or delete dead letters, without losing one.

A quorum queue cannot be browsed. Dead letters are fetched without an ack and returned to the queue: all at
once at the end, or by the broker when the connection is lost. But RabbitMQ counts the returns of a message
(4.3 only those by a lost connection), and since 4.0 it drops one with more than twenty returns from a queue
without a dead-letter exchange. So a dead letter with a few returns is renewed: it is published again and
confirmed, then the old one is acked. The new one counts from zero.
"""

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from typing import Any, Self

from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage
from aio_pika.exceptions import (
    CONNECTION_EXCEPTIONS,
    ChannelClosed,
    ChannelNotFoundEntity,
    DeliveryError,
    PublishError,
)

from vqa_worker.rabbitmq.connection import Broker, ConnectionLostError, connection_losses, explain
from vqa_worker.rabbitmq.outgoing import OutgoingMessage, send
from vqa_worker.rabbitmq.session import Session
from worker.rabbitmq import messages
from worker.rabbitmq.dead_letter_record import DeadLetter, readable_body
from worker.rabbitmq.deliveries import to_delivery
from worker.rabbitmq.permission_checks import NotAllowedError, Probes
from worker.rabbitmq.topology import Topology

# A dead letter with this many returns is renewed the next time it is read. An administrator's policy can
# lower the broker's limit of twenty.
MAX_RETURNS = 3


class DeadLettersError(Exception):
    """The dead-letter queue cannot be processed; the message gives the reason and what to do."""


class FetchedDeadLetter:
    """A dead letter that was fetched, and not acked or returned to the queue yet."""

    def __init__(self, message: AbstractIncomingMessage) -> None:
        self._message = message
        self.delivery = to_delivery(message, can_ack=lambda: True, wait_until_requeue_is_safe=_at_once)
        self.record = DeadLetter.of(self.delivery, self.headers)
        self.is_settled = False

    @property
    def body(self) -> bytes:
        """The job's body."""
        return self.delivery.body

    @property
    def readable_body(self) -> bytes:
        """The job's body without its `content_encoding`, if it can be decompressed."""
        return readable_body(self.delivery)

    @property
    def headers(self) -> Mapping[str, Any]:
        """All headers, including the broker's."""
        return self._message.headers or {}

    async def ack(self) -> None:
        """Remove it from the queue."""
        self.is_settled = True
        with connection_losses():
            await self._message.ack()


class DeadLetters:
    """The dead letters that are in the queue now, each read once. Made by `opened`.

    Attributes:
        total: the number of dead letters at the beginning, without the ones that another reader holds.
    """

    def __init__(self, topology: Topology, reading: AbstractChannel, writing: AbstractChannel) -> None:
        self._topology = topology
        self._reading = reading
        self._writing = writing
        self._last: FetchedDeadLetter | None = None
        self._left = 0
        self.total = 0

    @classmethod
    @asynccontextmanager
    async def opened(cls, broker: Broker, topology: Topology, timeout_s: float) -> AsyncIterator[Self]:
        """Connect and open the queue; at the end every dead letter that was not acked is back in it.

        Raises:
            DeadLettersError: the queue does not exist, or the user lacks a permission.
            BrokerRefusedError, BrokerUnreachableError: there was no connection within `timeout_s` seconds.
            ConnectionLostError: the connection was lost; the broker returns the dead letters itself.
        """
        async with Session(broker, "dead letters").opened(timeout_s) as connection:
            with _explained(topology), connection_losses():
                async with cls._on(connection, topology) as dead_letters:
                    yield dead_letters

    @classmethod
    @asynccontextmanager
    async def _on(cls, connection: AbstractConnection, topology: Topology) -> AsyncIterator[Self]:
        # Before anything is fetched: a user who cannot renew dead letters would use up their returns.
        await Probes(connection).may_publish(topology.jobs_exchange, topology.jobs)
        reading = await connection.channel(publisher_confirms=False)
        writing = await connection.channel(publisher_confirms=True, on_return_raises=True)
        dead_letters = cls(topology, reading, writing)
        try:
            await dead_letters._count()
            yield dead_letters
            # The last one was fetched as often as the others.
            await dead_letters._renew_last()
        finally:
            await dead_letters._close()

    async def next(self) -> FetchedDeadLetter | None:
        """Return the next dead letter; None if all that were there at the beginning were read.

        The one before it stays in the queue unless it was acked.

        Raises:
            DeadLettersError: the one before it had to be renewed, and the broker refuses that.
        """
        await self._renew_last()
        if not self._left:
            return None
        self._left -= 1
        queue = await self._reading.get_queue(self._topology.dead_letters, ensure=False)
        with connection_losses():
            # No timeout: that would close the channel. A dead connection ends it.
            message = await queue.get(fail=False, timeout=None)
        self._last = None if message is None else FetchedDeadLetter(message)
        return self._last

    async def replay(self, fetched: FetchedDeadLetter) -> None:
        """Publish the original job to the jobs queue; the caller then acks `fetched`.

        Raises:
            DeadLettersError: the broker refuses it; the dead letter stays in its queue.
        """
        await self._publish(messages.replayed(fetched.delivery, self._topology.jobs))

    async def sync(self) -> None:
        """Return when the broker has processed everything sent so far, including acks."""
        with connection_losses():
            await self._reading.set_qos(prefetch_count=0)

    async def _count(self) -> None:
        queue = await self._reading.declare_queue(self._topology.dead_letters, passive=True)
        self.total = self._left = queue.declaration_result.message_count or 0

    async def _renew_last(self) -> None:
        last, self._last = self._last, None
        if last is None or last.is_settled or last.record.returns < MAX_RETURNS:
            return
        headers = last.record.headers_when_renewed(last.headers)
        try:
            await self._publish(messages.renewed(last.delivery, self._topology.dead_letters, headers))
        except DeadLettersError as error:
            raise DeadLettersError(
                f"the dead letter {last.record.name} was returned {last.record.returns} times and cannot be"
                f" renewed, and RabbitMQ 4 drops it after 20 returns; first fix this: {error}"
            ) from None
        await last.ack()

    async def _publish(self, message: OutgoingMessage) -> None:
        message = replace(message, exchange=self._topology.jobs_exchange)
        amqp = message.to_amqp()
        try:
            await send(self._writing, message, amqp)
        except PublishError:
            raise DeadLettersError(
                f"{_exchange(self._topology)} does not route to the queue {message.routing_key}:"
                " `vqa-worker topology apply` creates what is missing"
            ) from None
        except DeliveryError:
            raise DeadLettersError(
                f"the broker refuses messages for the queue {message.routing_key}: it is full, or cannot work"
            ) from None
        except ChannelClosed as error:
            raise DeadLettersError(
                f"the broker refuses the copy of a dead letter: {explain(error)}"
            ) from None

    async def _close(self) -> None:
        with suppress(*CONNECTION_EXCEPTIONS), connection_losses():
            underlay = await self._reading.get_underlay_channel()
            # Tag 0: all unacked messages of this channel. Closing it does the same, but 4.3 then counts it.
            await underlay.basic_nack(0, multiple=True, requeue=True)
            await self._reading.close()
            await self._writing.close()


@contextmanager
def _explained(topology: Topology) -> Iterator[None]:
    """Explain the broker's refusals to the person who can fix them."""
    try:
        yield
    except NotAllowedError as error:
        raise DeadLettersError(
            f"reading dead letters needs the permission to publish them by {_exchange(topology)}: {error}"
        ) from None
    except ChannelNotFoundEntity:
        raise DeadLettersError(
            f"the queue {topology.dead_letters} does not exist: start a worker first, or check VQA_JOBS_QUEUE"
            " and VQA_DEAD_LETTER_QUEUE against the worker's"
        ) from None
    except ChannelClosed as error:
        raise DeadLettersError(f"the queue {topology.dead_letters}: {explain(error)}") from None
    except CONNECTION_EXCEPTIONS as error:
        raise ConnectionLostError(type(error).__name__) from None


def _exchange(topology: Topology) -> str:
    return f"exchange {topology.jobs_exchange}" if topology.jobs_exchange else "the default exchange"


async def _at_once() -> None:
    """Return: dead letters are not requeued as copies, which would have to wait."""
