"""Messages out, each confirmed by the broker before it counts as sent."""

import asyncio
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from weakref import WeakValueDictionary

import aio_pika
import structlog
from aio_pika.abc import AbstractChannel, AbstractConnection
from aio_pika.exceptions import CONNECTION_EXCEPTIONS, DeliveryError, PublishError
from pamqp.common import FieldValue

from worker.errors import Dependency
from worker.metrics import DEPENDENCY_UP
from worker.rabbit.connection import DIAL_TIMEOUT_S, Broker, heed_cancellation, losses
from worker.rabbit.topology import Topology, TopologyError, establish

log = structlog.get_logger(__name__)

FIRST_DELAY_S = 0.25
LONGEST_DELAY_S = 3.0
# The library waits for ever for a channel on a connection that is lost while the broker blocks it.
RESTORE_TIMEOUT_S = 60.0


class UnroutableError(Exception):
    """No queue is bound for this message; the broker returned it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """A message to publish, always persistent.

    Attributes:
        mandatory: whether the broker must say if no queue takes it.
        tries: after how many lost connections it counts as unroutable; None: it is tried without end.
        message_id: of the message; each publish gets a new one unless it is given.
    """

    body: bytes
    routing_key: str
    exchange: str = ""
    mandatory: bool = True
    tries: int | None = None
    content_type: str | None = None
    type: str | None = None
    app_id: str | None = None
    message_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    correlation_id: str | None = None
    reply_to: str | None = None
    timestamp: datetime | None = None
    headers: Mapping[str, FieldValue] = field(default_factory=dict)


class Publisher:
    """One connection for publishing, kept up by `run`; `publish` waits for it as long as it takes."""

    def __init__(self, broker: Broker, topology: Topology) -> None:
        self._broker = broker
        self._topology = topology
        DEPENDENCY_UP.labels(Dependency.RABBITMQ).set(0)
        self._connection: AbstractConnection | None = None
        self._channel: AbstractChannel | None = None
        self._connected = asyncio.Event()
        # aio-pika tells by the message_id whose verdict came: one publish at a time for each.
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def run(self) -> None:
        """Keep the connection up until cancelled.

        Raises:
            BrokerRefusedError: at the first connection, the broker refuses the credentials.
        """
        first = True
        while True:
            async with self._broker.connection("publish", refusal_is_final=first) as connection:
                first = False
                try:
                    with losses():
                        await self._serve(connection)
                except CONNECTION_EXCEPTIONS as error:
                    log.warning("rabbitmq_lost", purpose="publish", reason=f"{type(error).__name__}: {error}")
            # A broker that takes connections only to drop them is not to be called in a busy loop.
            await asyncio.sleep(FIRST_DELAY_S)

    async def publish(self, message: Outgoing) -> None:
        """Publish and wait for the confirm, over lost connections and refusals, until it has come.

        Raises:
            UnroutableError: `message` is mandatory and no queue takes it, or its `tries` are used up.
        """
        delay_s, tried = FIRST_DELAY_S, 0
        async with self._turns.setdefault(message.message_id, asyncio.Lock()):
            while True:
                await self._connected.wait()
                try:
                    return await self._publish_once(message)
                except PublishError:
                    raise UnroutableError(message.routing_key) from None
                except (DeliveryError, *CONNECTION_EXCEPTIONS) as error:
                    log.warning(
                        "publish_failed",
                        routing_key=message.routing_key,
                        reason=type(error).__name__,
                        next_try_s=delay_s,
                    )
                tried += 1
                if tried == message.tries:
                    raise UnroutableError(message.routing_key)
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, LONGEST_DELAY_S)

    async def restore_topology(self) -> None:
        """Declare the queues again after one of them went missing; a fault is logged, not raised."""
        if self._connection is None:
            return
        try:
            async with asyncio.timeout(RESTORE_TIMEOUT_S):
                with losses():
                    await establish(self._connection, self._topology)
        except TopologyError as error:
            log.error("topology_wrong", faults=error.faults)  # noqa: TRY400 - the faults say it all
        except CONNECTION_EXCEPTIONS as error:
            log.warning("topology_not_restored", reason=type(error).__name__)

    async def _serve(self, connection: AbstractConnection) -> None:
        self._connection = connection
        try:
            while not connection.is_closed:
                # A publish to a missing exchange closes the channel only: open another.
                async with asyncio.timeout(DIAL_TIMEOUT_S):
                    channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
                self._channel = channel
                self._connected.set()
                DEPENDENCY_UP.labels(Dependency.RABBITMQ).set(1)
                heed_cancellation()
                await channel.closed()
                self._connected.clear()
                if connection.transport is None or connection.transport.connection.is_closed:
                    break
        finally:
            self._connected.clear()
            self._connection = self._channel = None
            DEPENDENCY_UP.labels(Dependency.RABBITMQ).set(0)

    async def _publish_once(self, message: Outgoing) -> None:
        channel = self._channel
        if channel is None or channel.is_closed:
            self._connected.clear()
            raise ConnectionError("the channel is closed")
        exchange = (
            await channel.get_exchange(message.exchange, ensure=False)
            if message.exchange
            else channel.default_exchange
        )
        with losses():
            await exchange.publish(_to_amqp(message), message.routing_key, mandatory=message.mandatory)


def _to_amqp(message: Outgoing) -> aio_pika.Message:
    return aio_pika.Message(
        message.body,
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        content_type=message.content_type,
        type=message.type,
        app_id=message.app_id,
        message_id=message.message_id,
        correlation_id=message.correlation_id,
        reply_to=message.reply_to,
        timestamp=message.timestamp,
        headers=dict(message.headers),
    )
