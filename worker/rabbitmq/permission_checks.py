"""What is at the broker and what it allows, found out without any change.

What is allowed shows by questions that cannot be granted: RabbitMQ looks at permissions first and at the rest
of a question then (measured on 3.10.8, 4.0.5 and 4.3.6). So a message that can never be published, and a
consumer that can never be, tell whether others could.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from aio_pika.abc import AbstractChannel, AbstractConnection
from aio_pika.exceptions import ChannelClosed, ChannelNotFoundEntity, ChannelPreconditionFailed
from pamqp.commands import Basic

from worker.rabbitmq.connection import Broker, explain, short_lived_channel
from worker.rabbitmq.session import Session
from worker.rabbitmq.topology import ExchangeSpec, Part, QueueSpec

# A broker that is out of memory or disk takes no message, and says nothing to whoever sends one.
ANSWER_TIMEOUT_S = 5.0
BLOCKED = "the broker takes no messages at the moment: it is short of memory or disk (see its log), or slow"


class NotAllowedError(Exception):
    """The broker does not allow it, or it cannot be done; the message says what is missing."""


class BlockedError(NotAllowedError):
    """The broker says nothing, and will say no more on this connection."""


@dataclass(frozen=True, slots=True)
class Found:
    """What there is of a queue: how many messages wait, and how many consumers take them; 0 of exchanges."""

    messages: int = 0
    consumers: int = 0


class Probes:
    """Asks over one connection, each question on a channel of its own: a refusal closes it.

    All methods raise CONNECTION_EXCEPTIONS if the connection is lost.
    """

    def __init__(self, connection: AbstractConnection) -> None:
        self._connection = connection

    @property
    def version(self) -> str:
        """What the broker calls itself: `RabbitMQ 4.3.6`."""
        transport = self._connection.transport
        told = getattr(transport and transport.connection, "server_properties", None) or {}
        return " ".join(str(told[name]) for name in ("product", "version") if name in told) or "a broker"

    async def find(self, part: Part) -> Found | None:
        """Look for a queue or an exchange; None if it is not there.

        Raises:
            NotAllowedError: the user has no right to it at all, which RabbitMQ asks for since 4.3.
        """
        try:
            async with self._channel() as channel:
                if not isinstance(part, QueueSpec):
                    await part.declare(channel, passive=True)
                    return Found()
                queue = await channel.declare_queue(part.name, passive=True)
                told = queue.declaration_result
                return Found(told.message_count or 0, told.consumer_count or 0)
        except ChannelNotFoundEntity:
            return None
        except ChannelClosed as error:
            raise NotAllowedError(explain(error)) from None

    async def compare(self, part: Part) -> str | None:
        """How a queue or exchange that is there differs from what the worker needs, in the broker's words.

        It is declared as the worker does: should it have gone in this moment, it is made.

        Raises:
            NotAllowedError: the user may not declare it, so that the broker does not compare.
        """
        try:
            async with self._channel() as channel:
                await part.declare(channel, passive=False)
        except ChannelPreconditionFailed as error:
            return str(error.args[-1]) if error.args else "other arguments"
        except ChannelClosed as error:
            raise NotAllowedError(explain(error)) from None
        return None

    async def may_listen(self, exchange: ExchangeSpec) -> None:
        """Find out whether a queue of one's own may be made and bound to an exchange; it goes at once.

        Raises:
            NotAllowedError: it may not.
        """
        try:
            async with self._channel() as channel:
                queue = await channel.declare_queue(exclusive=True)
                await queue.bind(exchange.name)
                await queue.delete()
        except ChannelClosed as error:
            raise NotAllowedError(explain(error)) from None

    async def may_publish(self, exchange: str, routing_key: str) -> None:
        """Find out whether messages may be published to an exchange, for this queue; none is.

        Raises:
            NotAllowedError: they may not, there is no such exchange, or the broker takes no messages.
        """

        async def publish(channel: AbstractChannel) -> None:
            properties = Basic.Properties(expiration="never", message_id="probe")
            underlay = await channel.get_underlay_channel()
            await underlay.basic_publish(
                b"", exchange=exchange, routing_key=routing_key, properties=properties
            )

        await self._ask_in_vain(publish)

    async def may_consume(self, queue: str) -> None:
        """Find out whether a queue may be consumed from; nothing is.

        Raises:
            NotAllowedError: it may not, or there is no such queue.
        """

        async def consume(channel: AbstractChannel) -> None:
            underlay = await channel.get_underlay_channel()
            await underlay.basic_consume(queue, _never, arguments={"x-priority": "none"})

        await self._ask_in_vain(consume)

    async def _ask_in_vain(self, question: Callable[[AbstractChannel], Awaitable[None]]) -> None:
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S), self._channel() as channel:
                await question(channel)
        except ChannelPreconditionFailed:
            # The right answer: all but the impossible was in order.
            return
        except ChannelClosed as error:
            raise NotAllowedError(explain(error)) from None
        except TimeoutError:
            raise BlockedError(BLOCKED) from None
        raise NotAllowedError("the broker granted what no RabbitMQ grants: is it one?")

    def _channel(self) -> AbstractAsyncContextManager[AbstractChannel]:
        return short_lived_channel(self._connection, confirms=True)


class QueueWatch:
    """Read the figures of some queues, again and again, over one session."""

    def __init__(self, broker: Broker, queues: Sequence[QueueSpec]) -> None:
        self._session = Session(broker, "queue figures")
        self._queues = queues

    async def read(self, timeout_s: float) -> dict[str, Found | None]:
        """Return the figures of each queue by its name; None for one that is missing or not visible.

        Raises:
            BrokerRefusedError, BrokerUnreachableError: as `Session.call`.
        """
        return await self._session.call(self._read, timeout_s=timeout_s)

    async def _read(self, connection: AbstractConnection) -> dict[str, Found | None]:
        probes = Probes(connection)
        return {queue.name: await self._find(probes, queue) for queue in self._queues}

    async def _find(self, probes: Probes, queue: QueueSpec) -> Found | None:
        try:
            return await probes.find(queue)
        except NotAllowedError:
            return None

    async def close(self) -> None:
        """Close the connection."""
        await self._session.close()


async def _never(_: object) -> None:
    """No message comes."""
