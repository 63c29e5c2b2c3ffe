"""`vqa-worker topology`: show the queues, exchanges and bindings of the settings, or create them."""

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
    """Return queues, exchanges and bindings as RabbitMQ definitions.

    The management API imports them with `POST /api/definitions/<vhost>`.
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
    """Return the topology of the settings as text or JSON; connects to nothing."""
    topology = Topology.from_settings(settings)
    return json.dumps(definitions(topology), indent=2) if as_json else "\n".join(_lines(topology))


def _lines(topology: Topology) -> Iterator[str]:
    for queue in topology.queues():
        yield f"{queue}: durable{_format_arguments(queue.arguments)}"
    for exchange in (topology.control, *topology.exchanges()):
        yield f"{exchange}: durable, {exchange.type.value}"
    for binding in topology.bindings():
        yield str(binding)


def _format_arguments(arguments: Mapping[str, Any]) -> str:
    return "".join(f", {name}: {json.dumps(value)}" for name, value in arguments.items())


async def apply(settings: BrokerSettings, *, timeout_s: float, as_json: bool) -> str:
    """Create what is missing of the topology; return what was created and what existed, as text or JSON.

    Raises:
        BrokerUnreachableError: the broker was unreachable for `timeout_s` seconds.
        BrokerRefusedError: the broker refuses the credentials.
        TopologyError: the broker refuses a part of the topology.
    """
    broker = Broker(
        url=settings.rabbitmq_url.get_secret_value(),
        ssl_context=broker_ssl_context(settings),
        name=f"vqa-worker@{socket.gethostname()}",
    )
    topology = Topology.from_settings(settings)
    parts = await Session.once(broker, timeout_s, lambda connection: create(connection, topology))
    return _created_json(topology, parts) if as_json else "\n".join(_created_lines(topology, parts))


def _created_lines(topology: Topology, parts: Sequence[tuple[Part, bool]]) -> Iterator[str]:
    for part, is_new in parts:
        yield f"{part}: {'created' if is_new else 'exists'}"
    for binding in topology.bindings():
        yield f"{binding}: exists"


def _created_json(topology: Topology, parts: Sequence[tuple[Part, bool]]) -> str:
    """Return the definitions, each queue and exchange with `created`; it is unknown for bindings."""
    found = definitions(topology)
    # In the same order, queues before exchanges.
    for entry, (_, is_new) in zip([*found["queues"], *found["exchanges"]], parts, strict=True):
        entry["created"] = is_new
    return json.dumps(found, indent=2)
