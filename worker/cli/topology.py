"""`vqa-worker topology`: show the queues, exchanges and bindings of the settings, or create them."""

import json

from worker.cli.shell import Screen, broker_of


def show(screen: Screen) -> None:
    """Print the queues, exchanges and bindings of the settings.

        vqa-worker topology show
        vqa-worker topology show --json > definitions.json

    Does not connect to RabbitMQ. With --json, the output is a file of definitions that RabbitMQ imports.
    """
    from worker.rabbitmq.topology import Topology
    from worker.settings import load_broker_settings

    topology = Topology.from_settings(screen.load(load_broker_settings))
    screen.emit(
        topology.definitions(),
        *(
            f"{it}: durable"
            + "".join(f", {name}: {json.dumps(value)}" for name, value in it.arguments.items())
            for it in topology.queues()
        ),
        *(f"{it}: durable, {it.type.value}" for it in (topology.control, *topology.exchanges())),
        *map(str, topology.bindings()),
    )


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
    found = topology.definitions()
    # In the same order, queues before exchanges.
    for entry, (_, is_new) in zip([*found["queues"], *found["exchanges"]], parts, strict=True):
        entry["created"] = is_new
    lines = [f"{part}: {'created' if is_new else 'exists'}" for part, is_new in parts]
    screen.emit(found, *lines, *(f"{it}: exists" for it in topology.bindings()))
