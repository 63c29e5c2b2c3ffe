"""The queues: their names, arguments, and how they come to be. Named here and nowhere else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aio_pika.abc import AbstractConnection
from aio_pika.exceptions import ChannelClosed
from pamqp.common import FieldValue

from worker.settings import BROKER_DELIVERY_LIMIT, Settings, retry_queue


class TopologyError(Exception):
    """The broker's queues are not as they must be.

    Attributes:
        faults: one line each, naming the queue and what to do.
    """

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("; ".join(faults))
        self.faults = list(faults)


@dataclass(frozen=True, slots=True)
class QueueSpec:
    """A durable quorum queue: its name and its arguments."""

    name: str
    arguments: Mapping[str, FieldValue]


@dataclass(frozen=True, slots=True)
class Topology:
    """All the names that the worker uses at the broker."""

    jobs: str
    results: str
    dead_letters: str
    retry_delays_s: Sequence[int]
    reply_exchange: str
    declare: bool

    @classmethod
    def from_settings(cls, settings: Settings) -> "Topology":
        """As the settings say."""
        return cls(
            jobs=settings.jobs_queue,
            results=settings.results_queue,
            dead_letters=settings.dead_letter_queue,
            retry_delays_s=sorted(set(settings.retry_delays)),
            reply_exchange=settings.reply_exchange,
            declare=settings.declare_topology,
        )

    def retry(self, delay_s: int) -> str:
        """The queue that holds a job for so many seconds and then hands it back to the jobs queue."""
        return retry_queue(self.jobs, delay_s)

    @property
    def control(self) -> str:
        """The fan-out exchange on which workers are told of cancellations."""
        return f"{self.jobs}.control"

    def queues(self) -> list[QueueSpec]:
        """Every queue, in the order of declaration: where messages go to comes first."""
        # Dead-lettering at least once needs reject-publish (RabbitMQ documentation, "Quorum queues").
        hands_on = {"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"}
        return [
            _quorum(self.dead_letters),
            _quorum(self.results),
            _quorum(
                self.jobs, **_to(self.dead_letters), **hands_on, **{"x-delivery-limit": BROKER_DELIVERY_LIMIT}
            ),
            *(
                _quorum(
                    self.retry(delay_s), **{"x-message-ttl": delay_s * 1000}, **_to(self.jobs), **hands_on
                )
                for delay_s in self.retry_delays_s
            ),
        ]


def _quorum(name: str, **arguments: FieldValue) -> QueueSpec:
    return QueueSpec(name, {"x-queue-type": "quorum", **arguments})


def _to(queue: str) -> dict[str, FieldValue]:
    return {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": queue}


async def establish(connection: AbstractConnection, topology: Topology) -> None:
    """Declare the queues, or only look that they are there (`VQA_DECLARE_TOPOLOGY=false`).

    Raises:
        TopologyError: with every fault found, a line each.
    """
    faults = [await _fault_of(connection, topology, queue) for queue in topology.queues()]
    if topology.reply_exchange:
        faults.append(await _fault_of_exchange(connection, topology))
    if any(faults):
        raise TopologyError([fault for fault in faults if fault])


async def _fault_of(connection: AbstractConnection, topology: Topology, queue: QueueSpec) -> str | None:
    # A refused declaration closes its channel, so that each queue gets one of its own.
    channel = await connection.channel()
    try:
        await channel.declare_queue(
            queue.name,
            durable=True,
            passive=not topology.declare,
            arguments=dict(queue.arguments) if topology.declare else None,
        )
    except ChannelClosed as error:
        return _explain(error, f"queue {queue.name}", declared=topology.declare)
    await channel.close()
    return None


async def _fault_of_exchange(connection: AbstractConnection, topology: Topology) -> str | None:
    channel = await connection.channel()
    try:
        exchange = await channel.get_exchange(topology.reply_exchange)
        if topology.declare:
            queue = await channel.get_queue(topology.results, ensure=False)
            await queue.bind(exchange, routing_key=topology.results)
    except ChannelClosed as error:
        what = f"exchange {topology.reply_exchange} (VQA_REPLY_EXCHANGE)"
        return _explain(error, what, declared=False)
    await channel.close()
    return None


def _explain(error: ChannelClosed, what: str, *, declared: bool) -> str:
    """What is wrong, by the reply text: the library keeps the code only where it has no class for it.

    Raises:
        ChannelClosed: `error`, if it is the broker that is in trouble and not the queue.
    """
    reason = str(error.args[-1]) if error.args else ""
    match reason.split(" - ")[0]:
        case "NOT_FOUND":
            return f"{what} does not exist: create it, or let the worker do so with VQA_DECLARE_TOPOLOGY=true"
        case "ACCESS_REFUSED":
            hint = "; or create it and set VQA_DECLARE_TOPOLOGY=false" if declared else ""
            return f"{what}: the user of VQA_RABBITMQ_URL lacks a permission: {reason}{hint}"
        case "RESOURCE_LOCKED":
            return f"{what} is another connection's own: {reason}; name another"
        case "PRECONDITION_FAILED":
            advice = "delete it, change it by a policy, or name another"
            return f"{what} exists with other arguments: {reason}; {advice}"
    raise error
