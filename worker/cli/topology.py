"""`vqa-worker topology`: shows what the settings mean at the broker, and makes it there."""

import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from worker.rabbitmq.connection import Broker
from worker.rabbitmq.session import Session
from worker.rabbitmq.topology import Part, Topology, create
from worker.settings import BrokerSettings, broker_ssl_context

Definitions = dict[str, list[dict[str, Any]]]


def definitions(topology: Topology) -> Definitions:
    """The queues, exchanges and bindings, in the form of a virtual host's definitions.

    RabbitMQ's management interface takes them so (`POST /api/definitions/<vhost>`).
    """
    exchanges = [topology.control, *topology.exchanges()]
    return {
        "queues": [
            {
                "name": queue.name,
                "durable": True,
                "auto_delete": False,
                "arguments": dict(queue.arguments),
            }
            for queue in topology.queues()
        ],
        "exchanges": [
            {
                "name": exchange.name,
                "type": exchange.type.value,
                "durable": True,
                "auto_delete": False,
                "internal": False,
                "arguments": {},
            }
            for exchange in exchanges
        ],
        "bindings": [
            {
                "source": binding.exchange,
                "destination": binding.queue,
                "destination_type": "queue",
                "routing_key": binding.queue,
                "arguments": {},
            }
            for binding in topology.bindings()
        ],
    }


def show(settings: BrokerSettings, *, as_json: bool) -> str:
    """What the settings mean; nothing is connected to."""
    topology = Topology.from_settings(settings)
    return json.dumps(definitions(topology), indent=2) if as_json else "\n".join(_lines(topology))


def _lines(topology: Topology) -> Iterator[str]:
    for queue in topology.queues():
        yield f"{queue}: durable{_named(queue.arguments)}"
    for exchange in (topology.control, *topology.exchanges()):
        yield f"{exchange}: durable, {exchange.type.value}"
    for binding in topology.bindings():
        yield str(binding)


def _named(arguments: Mapping[str, Any]) -> str:
    return "".join(f", {name}: {json.dumps(value)}" for name, value in arguments.items())


async def apply(settings: BrokerSettings, *, timeout_s: float, as_json: bool) -> str:
    """Make what the settings mean, where it is not there yet; says what was made and what was there.

    Raises:
        BrokerUnreachableError: the broker was unreachable for `timeout_s` seconds.
        BrokerRefusedError, TopologyError: it refuses the credentials, or something of the topology.
    """
    broker = Broker(
        url=settings.rabbitmq_url.get_secret_value(),
        ssl_context=broker_ssl_context(settings),
        name=f"vqa-worker@{socket.gethostname()}",
    )
    topology = Topology.from_settings(settings)
    parts = await Session.once(broker, timeout_s, lambda connection: create(connection, topology))
    return _told_in_json(topology, parts) if as_json else "\n".join(_told(topology, parts))


def _told(topology: Topology, parts: Sequence[tuple[Part, bool]]) -> Iterator[str]:
    for part, is_new in parts:
        yield f"{part}: {'made' if is_new else 'was there'}"
    for binding in topology.bindings():
        yield f"{binding}: is there"


def _told_in_json(topology: Topology, parts: Sequence[tuple[Part, bool]]) -> str:
    """The definitions, with `made` in each queue and exchange; of bindings it is not known."""
    told = definitions(topology)
    # In the same order, queues before exchanges.
    for entry, (_, is_new) in zip([*told["queues"], *told["exchanges"]], parts, strict=True):
        entry["made"] = is_new
    return json.dumps(told, indent=2)
