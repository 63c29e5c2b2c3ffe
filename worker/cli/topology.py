"""`vqa-worker topology`: show the queues, exchanges and bindings of the settings, or create them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from worker.cli.shell import Screen, broker_of

if TYPE_CHECKING:
    from worker.rabbitmq.topology import Part, Topology

Definitions = dict[str, list[dict[str, Any]]]


def show(screen: Screen) -> None:
    """Print the queues, exchanges and bindings of the settings.

        vqa-worker topology show
        vqa-worker topology show --json > definitions.json

    Does not connect to RabbitMQ. With --json, the output is a file of definitions that RabbitMQ imports.
    """
    from worker.rabbitmq.topology import Topology
    from worker.settings import load_broker_settings

    topology = Topology.from_settings(screen.load(load_broker_settings))
    screen.print(*_lines(topology))
    _print_json(screen, definitions(topology))


async def apply(screen: Screen) -> None:
    """Create missing queues, exchanges and bindings.

        vqa-worker topology apply
        vqa-worker topology apply --url amqp://operator:…@rabbitmq.example.com/vqa

    Existing ones are not changed; one with other arguments is an error.
    """
    from vqa_worker.rabbitmq.session import Session
    from worker.rabbitmq.topology import Topology, create
    from worker.settings import load_broker_settings

    settings = screen.load(load_broker_settings)
    topology = Topology.from_settings(settings)
    parts = await Session.once(
        broker_of(settings), screen.timeout_s, lambda connection: create(connection, topology)
    )
    screen.print(*_created_lines(topology, parts))
    _print_json(screen, _created(topology, parts))


def definitions(topology: "Topology") -> Definitions:
    """Return queues, exchanges and bindings as RabbitMQ definitions.

    The management API imports them with `POST /api/definitions/<vhost>`.
    """
    return {
        "queues": [
            {"name": it.name, "durable": True, "auto_delete": False, "arguments": dict(it.arguments)}
            for it in topology.queues()
        ],
        "exchanges": [
            {
                "name": it.name,
                "type": it.type.value,
                "durable": True,
                "auto_delete": False,
                "internal": False,
                "arguments": {},
            }
            for it in (topology.control, *topology.exchanges())
        ],
        "bindings": [
            {
                "source": it.exchange,
                "destination": it.queue,
                "destination_type": "queue",
                "routing_key": it.queue,
                "arguments": {},
            }
            for it in topology.bindings()
        ],
    }


def _print_json(screen: Screen, found: Definitions) -> None:
    """Print one indented object: a file of definitions."""
    if screen.as_json:
        screen.write(json.dumps(found, indent=2))


def _lines(topology: "Topology") -> Iterator[str]:
    for queue in topology.queues():
        yield f"{queue}: durable{_format_arguments(queue.arguments)}"
    for exchange in (topology.control, *topology.exchanges()):
        yield f"{exchange}: durable, {exchange.type.value}"
    for binding in topology.bindings():
        yield str(binding)


def _format_arguments(arguments: Mapping[str, Any]) -> str:
    return "".join(f", {name}: {json.dumps(value)}" for name, value in arguments.items())


def _created_lines(topology: "Topology", parts: "Sequence[tuple[Part, bool]]") -> Iterator[str]:
    for part, is_new in parts:
        yield f"{part}: {'created' if is_new else 'exists'}"
    for binding in topology.bindings():
        yield f"{binding}: exists"


def _created(topology: "Topology", parts: "Sequence[tuple[Part, bool]]") -> Definitions:
    """Return the definitions, each queue and exchange with `created`; it is unknown for bindings."""
    found = definitions(topology)
    # In the same order, queues before exchanges.
    for entry, (_, is_new) in zip([*found["queues"], *found["exchanges"]], parts, strict=True):
        entry["created"] = is_new
    return found
