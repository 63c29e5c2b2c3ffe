"""What the broker allows, found out without any change: by questions that it cannot grant.

RabbitMQ looks at permissions first and at the rest of a question then (measured on 3.10.8, 4.0.5 and 4.3.6).
So a message that can never be published, and a consumer that can never be, tell whether one could.
"""

import asyncio
from collections.abc import Awaitable, Callable

from aio_pika.abc import AbstractChannel, AbstractConnection
from aio_pika.exceptions import ChannelClosed, ChannelPreconditionFailed
from pamqp.commands import Basic

from worker.rabbit.connection import explain, losses

# A broker that is out of memory or disk takes no message, and says nothing to whoever sends one.
ANSWER_TIMEOUT_S = 10.0
BLOCKED = "the broker takes no messages at the moment: it is short of memory or disk (see its log), or slow"


class NotAllowedError(Exception):
    """The broker does not allow it, or it cannot be done; the message says what is missing."""


async def may_publish(connection: AbstractConnection, exchange: str) -> None:
    """Find out whether messages may be published to an exchange; none is.

    Raises:
        NotAllowedError: they may not, there is no such exchange, or the broker takes no messages.
    """

    async def publish(channel: AbstractChannel) -> None:
        properties = Basic.Properties(expiration="never", message_id="probe")
        underlay = await channel.get_underlay_channel()
        await underlay.basic_publish(b"", exchange=exchange, routing_key="probe", properties=properties)

    await _ask(connection, publish)


async def may_consume(connection: AbstractConnection, queue: str) -> None:
    """Find out whether a queue may be consumed from; nothing is.

    Raises:
        NotAllowedError: it may not, or there is no such queue.
    """

    async def consume(channel: AbstractChannel) -> None:
        underlay = await channel.get_underlay_channel()
        await underlay.basic_consume(queue, _never, arguments={"x-priority": "none"})

    await _ask(connection, consume)


async def _ask(
    connection: AbstractConnection, question: Callable[[AbstractChannel], Awaitable[None]]
) -> None:
    channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            with losses():
                await question(channel)
    except ChannelPreconditionFailed:
        # The right answer: all but the impossible was in order.
        return
    except ChannelClosed as error:
        raise NotAllowedError(explain(error)) from None
    except TimeoutError:
        raise NotAllowedError(BLOCKED) from None
    raise NotAllowedError("the broker granted what no RabbitMQ grants: is it one?")


async def _never(_: object) -> None:
    """No message comes."""
