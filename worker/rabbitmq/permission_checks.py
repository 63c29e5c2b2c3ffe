"""Find out what exists at the broker and what this user may do, without changing anything.

Permissions are checked with invalid requests: RabbitMQ checks the permission first and the request's other
parts afterwards (measured on 3.10.8, 4.0.5 and 4.3.6). So the error for an invalid message, queue or consumer
shows whether a valid one would be allowed, also where the queue or exchange does not exist.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from aio_pika.abc import AbstractChannel, AbstractConnection
from aio_pika.exceptions import ChannelClosed, ChannelNotFoundEntity, ChannelPreconditionFailed
from pamqp.commands import Basic
from pamqp.common import FieldValue

from vqa_worker.rabbitmq.connection import (
    Broker,
    TopologyError,
    broker_reason,
    connection_losses,
    explain,
    short_lived_channel,
)
from vqa_worker.rabbitmq.session import Session
from worker.rabbitmq.single_jobs import SingleJobs
from worker.rabbitmq.topology import Part, QueueSpec

# A broker with a memory or disk alarm blocks publishers, without an answer.
ANSWER_TIMEOUT_S = 5.0
BLOCKED = "the broker accepts no messages now: it has a memory or disk alarm (see its log), or is slow"


# More than RabbitMQ knows.
MAX_ARGUMENTS = 40
# RabbitMQ 4 reports the queue type without "the value" and "of type".
_DIFFERENCE = re.compile(
    r"inequivalent arg '(x-[^']+)'.* current is (?:the value )?'(.*?)'(?: of type '(\w+)')?$"
)


class NotAllowedError(Exception):
    """The broker does not allow it, or it is not possible; the message says what is missing."""


class NotFoundError(NotAllowedError):
    """The user has the permission, but the queue or exchange does not exist."""


class BlockedError(NotAllowedError):
    """The broker does not answer, and will not answer on this connection any more."""


class QueueKind(StrEnum):
    """How a queue delivers messages."""

    USUAL = "usual"
    SINGLE_ACTIVE_CONSUMER = "single active consumer"
    STREAM = "stream"


@dataclass(frozen=True, slots=True)
class Found:
    """The number of ready messages and of consumers of a queue; 0 for exchanges."""

    messages: int = 0
    consumers: int = 0


class Probes:
    """Check over one connection, each time on its own channel, because a refusal closes it.

    All methods raise CONNECTION_EXCEPTIONS if the connection is lost.
    """

    def __init__(self, connection: AbstractConnection) -> None:
        self._connection = connection

    @property
    def version(self) -> str:
        """The broker's product and version: `RabbitMQ 4.3.6`."""
        server = self._server_properties
        return " ".join(str(server[name]) for name in ("product", "version") if name in server) or "a broker"

    @property
    def cluster(self) -> str:
        """The name of the broker's cluster; empty if it has none."""
        return str(self._server_properties.get("cluster_name", ""))

    @property
    def _server_properties(self) -> Mapping[str, Any]:
        transport = self._connection.transport
        return getattr(transport and transport.connection, "server_properties", None) or {}

    async def find(self, part: Part) -> Found | None:
        """Return the figures of a queue or an exchange; None if it does not exist.

        Raises:
            NotAllowedError: the user has no permission for it, which RabbitMQ requires since 4.3.
        """
        try:
            async with self._channel() as channel:
                if not isinstance(part, QueueSpec):
                    await part.declare(channel, passive=True)
                    return Found()
                queue = await channel.declare_queue(part.name, passive=True)
                result = queue.declaration_result
                return Found(result.message_count or 0, result.consumer_count or 0)
        except ChannelNotFoundEntity:
            return None
        except ChannelClosed as error:
            raise NotAllowedError(explain(error)) from None

    async def compare(self, part: Part) -> str | None:
        """Return how an existing queue or exchange differs from what the worker needs, in the broker's words.

        It is declared as the worker does, so one that is deleted at this moment is created again.

        Raises:
            NotAllowedError: the user may not declare it, so the broker does not compare.
        """
        try:
            async with self._channel() as channel:
                await part.declare(channel, passive=False)
        except ChannelPreconditionFailed as error:
            return str(error.args[-1]) if error.args else "other arguments"
        except ChannelClosed as error:
            raise NotAllowedError(explain(error)) from None
        return None

    async def kind(self, queue: str) -> QueueKind | None:
        """Return the kind of a queue; None if it does not exist or this user cannot see it without consuming.

        RabbitMQ can close the connection.
        """
        try:
            found = await self.find(QueueSpec(queue, {}))
        except NotAllowedError:
            return None
        if found is None:
            return None
        try:
            arguments = await self._arguments(queue)
        except NotAllowedError:
            # A message would count a delivery.
            return None if found.messages else await self._kind_shown_by_get(queue)
        if arguments.get("x-queue-type") == "stream":
            return QueueKind.STREAM
        has_one = arguments.get("x-single-active-consumer") == "true"
        return QueueKind.SINGLE_ACTIVE_CONSUMER if has_one else QueueKind.USUAL

    async def _arguments(self, queue: str) -> Mapping[str, str]:
        """Return the arguments of an existing queue as text, as far as needed to see its kind.

        Each declaration without all of them is refused with the name and the value of one of the others.
        """
        known: dict[str, FieldValue] = {}
        found: dict[str, str] = {}
        while len(found) < MAX_ARGUMENTS:
            try:
                async with self._channel() as channel:
                    await channel.declare_queue(queue, durable=True, arguments=known)
            except ChannelPreconditionFailed as error:
                difference = _DIFFERENCE.search(broker_reason(error))
                if difference is None or difference[1] in found:
                    return found
                name, found[name], kind = difference[1], difference[2], difference[3]
                known[name] = _argument(found[name], kind)
            except ChannelClosed as error:
                raise NotAllowedError(explain(error)) from None
            else:
                return found
        return found

    async def _kind_shown_by_get(self, queue: str) -> QueueKind | None:
        single_jobs = SingleJobs(self._connection, queue, lambda _: None)
        try:
            with connection_losses():
                message = await single_jobs.identify()
        except TopologyError:
            return QueueKind.STREAM
        except ChannelClosed:
            return None
        if message is not None:
            await message.nack()
        has_one = single_jobs.has_single_active_consumer
        return QueueKind.SINGLE_ACTIVE_CONSUMER if has_one else QueueKind.USUAL

    async def may_declare(self, queue: str, arguments: Mapping[str, FieldValue] | None = None) -> None:
        """Check whether the user may create a queue that does not exist; empty: the broker names it.

        Raises:
            NotAllowedError: the user may not.
        """

        async def declare(channel: AbstractChannel) -> None:
            invalid: dict[str, FieldValue] = {**(arguments or {}), "x-expires": -1}
            underlay = await channel.get_underlay_channel()
            await underlay.queue_declare(queue, durable=bool(queue), exclusive=not queue, arguments=invalid)

        await self._check_with(declare, f"configure on queue {queue or 'amq.gen-*'}")

    async def may_bind(self, queue: str, exchange: str) -> None:
        """Check whether the user may bind a queue that does not exist to an exchange.

        Raises:
            NotFoundError: the user may.
            NotAllowedError: the user may not.
        """

        async def bind(channel: AbstractChannel) -> None:
            underlay = await channel.get_underlay_channel()
            await underlay.queue_bind(queue, exchange)

        await self._check_with(bind, f"write on queue {queue} and read on exchange {exchange}")

    async def may_publish(self, exchange: str, routing_key: str) -> None:
        """Check whether the user may publish to an exchange for this queue; nothing is published.

        Raises:
            NotAllowedError: the user may not, there is no such exchange, or the broker accepts no messages.
        """

        async def publish(channel: AbstractChannel) -> None:
            properties = Basic.Properties(expiration="never", message_id="probe")
            underlay = await channel.get_underlay_channel()
            await underlay.basic_publish(
                b"", exchange=exchange, routing_key=routing_key, properties=properties
            )

        await self._check_with(
            publish, f"write on {f'exchange {exchange}' if exchange else 'the default exchange'}"
        )

    async def may_consume(self, queue: str) -> None:
        """Check whether the user may consume from a queue; nothing is consumed.

        Raises:
            NotAllowedError: the user may not, or there is no such queue.
        """

        async def consume(channel: AbstractChannel) -> None:
            underlay = await channel.get_underlay_channel()
            await underlay.basic_consume(queue, _never, arguments={"x-priority": "none"})

        await self._check_with(consume, f"read on queue {queue}")

    async def _check_with(
        self, invalid_request: Callable[[AbstractChannel], Awaitable[None]], needed: str
    ) -> None:
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S), self._channel() as channel:
                await invalid_request(channel)
        except ChannelPreconditionFailed:
            # The permission was granted; only the invalid part of the request was refused.
            return
        except ChannelNotFoundEntity as error:
            raise NotFoundError(explain(error)) from None
        except ChannelClosed as error:
            raise NotAllowedError(f"{explain(error)} (needed: {needed})") from None
        except TimeoutError:
            raise BlockedError(BLOCKED) from None
        raise NotAllowedError("the broker accepted an invalid request: is it RabbitMQ?")

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


def _argument(value: str, kind: str | None) -> FieldValue:
    """Return an argument of a queue as RabbitMQ's error message shows it."""
    if kind == "bool":
        return value == "true"
    return value if kind in (None, "longstr", "binary") else int(value)


async def _never(_: object) -> None:
    """Ignore messages; none arrives."""
