"""The queues and exchanges: their names, arguments, and how they come to be. Named here and nowhere else."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import structlog
from aio_pika import ExchangeType
from aio_pika.abc import AbstractChannel, AbstractConnection
from aio_pika.exceptions import ChannelClosed
from pamqp.common import FieldValue

from worker.rabbitmq.connection import broker_reason, short_lived_channel
from worker.settings import BROKER_DELIVERY_LIMIT, BrokerSettings, retry_queue

log = structlog.get_logger(__name__)


class TopologyError(Exception):
    """The broker's queues or exchanges are not as they must be.

    Attributes:
        faults: one line each, naming the queue or exchange and what to do.
    """

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("; ".join(faults))
        self.faults = list(faults)


@dataclass(frozen=True, slots=True)
class QueueSpec:
    """A durable quorum queue: its name and its arguments."""

    name: str
    arguments: Mapping[str, FieldValue]
    may_differ: ClassVar = False

    def __str__(self) -> str:
        return f"queue {self.name}"

    async def declare(self, channel: AbstractChannel, *, passive: bool) -> None:
        """Make it, or see that it is as it would be made; `passive`: only look that it is there."""
        arguments = None if passive else dict(self.arguments)
        await channel.declare_queue(self.name, durable=True, passive=passive, arguments=arguments)


@dataclass(frozen=True, slots=True)
class ExchangeSpec:
    """A durable exchange.

    Attributes:
        setting: the variable that names it, if one does.
        may_differ: whether one that is there is taken as it is, because it was made by somebody else.
    """

    name: str
    type: ExchangeType
    setting: str = ""
    may_differ: bool = False

    def __str__(self) -> str:
        return f"exchange {self.name} ({self.setting})" if self.setting else f"exchange {self.name}"

    async def declare(self, channel: AbstractChannel, *, passive: bool) -> None:
        """Make it, or see that it is as it would be made; `passive`: only look that it is there."""
        await channel.declare_exchange(self.name, self.type, durable=True, passive=passive)


@dataclass(frozen=True, slots=True)
class BindingSpec:
    """A queue's binding to an exchange, by the queue's own name."""

    exchange: str
    queue: str

    def __str__(self) -> str:
        return f"binding of queue {self.queue} to exchange {self.exchange}"

    async def declare(self, channel: AbstractChannel, *, passive: bool) -> None:
        """Make it, unless it is there. It cannot be looked for."""
        assert not passive  # noqa: S101 - for the type's sake: queues and exchanges can
        queue = await channel.get_queue(self.queue, ensure=False)
        await queue.bind(self.exchange, routing_key=self.queue)


Part: TypeAlias = QueueSpec | ExchangeSpec


@dataclass(frozen=True, slots=True)
class Topology:
    """All the names that the worker uses at the broker. An exchange without a name is the default one."""

    jobs: str
    results: str
    dead_letters: str
    retry_delays_s: Sequence[int]
    reply_exchange: str
    jobs_exchange: str
    declare: bool

    @classmethod
    def from_settings(cls, settings: BrokerSettings) -> "Topology":
        """As the settings say."""
        return cls(
            jobs=settings.jobs_queue,
            results=settings.results_queue,
            dead_letters=settings.dead_letter_queue,
            retry_delays_s=sorted(set(settings.retry_delays)),
            reply_exchange=settings.reply_exchange,
            jobs_exchange=settings.jobs_exchange,
            declare=settings.declare_topology,
        )

    def retry(self, delay_s: int) -> str:
        """The queue that holds a job for so many seconds and then hands it back to the jobs queue."""
        return retry_queue(self.jobs, delay_s)

    @property
    def control(self) -> ExchangeSpec:
        """The exchange on which workers are told of cancellations. They do without if they must."""
        return ExchangeSpec(f"{self.jobs}.control", ExchangeType.FANOUT)

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

    def exchanges(self) -> list[ExchangeSpec]:
        """Every exchange that messages are published to and that is not the default one."""
        replies = ExchangeSpec(
            self.reply_exchange, ExchangeType.DIRECT, "VQA_REPLY_EXCHANGE", may_differ=True
        )
        jobs = ExchangeSpec(self.jobs_exchange, ExchangeType.DIRECT, "VQA_JOBS_EXCHANGE")
        return [exchange for exchange in (jobs, replies) if exchange.name]

    def bindings(self) -> list[BindingSpec]:
        """Every queue's binding to those exchanges."""
        kept = [queue.name for queue in self.queues() if queue.name != self.results]
        jobs = [BindingSpec(self.jobs_exchange, name) for name in kept]
        return [
            binding for binding in (*jobs, BindingSpec(self.reply_exchange, self.results)) if binding.exchange
        ]


def _quorum(name: str, **arguments: FieldValue) -> QueueSpec:
    return QueueSpec(name, {"x-queue-type": "quorum", **arguments})


def _to(queue: str) -> dict[str, FieldValue]:
    return {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": queue}


async def establish(connection: AbstractConnection, topology: Topology) -> None:
    """Declare what a worker cannot do without, or only look that it is there (`VQA_DECLARE_TOPOLOGY=false`).

    Somebody else's exchange is only looked for. RabbitMQ 4.3 shows nothing to users without a right to it
    (4.3.0 and 4.2.6: to those who may not configure it), which a worker need not have: that is no fault.

    Raises:
        TopologyError: with every fault found, a line each.
    """
    looks = not topology.declare
    hint = "" if looks else "; or create it and set VQA_DECLARE_TOPOLOGY=false"
    faults, unseen = [], []
    parts: list[Part] = [*topology.queues(), *topology.exchanges()]
    for part in parts:
        only_looks = looks or part.may_differ
        refusal = await _refusal(connection, part, passive=only_looks)
        if refusal and only_looks and broker_reason(refusal).startswith("ACCESS_REFUSED"):
            unseen.append(str(part))
        elif refusal:
            faults.append(_explain(refusal, part, hint))
    if unseen:
        log.info(
            "topology_check_forbidden", parts=unseen, reason="RabbitMQ does not let this user look for them"
        )
    _raise_if_any(faults)
    if topology.declare:
        _raise_if_any([await _fault(connection, binding, hint=hint) for binding in topology.bindings()])


async def create(connection: AbstractConnection, topology: Topology) -> list[tuple[Part, bool]]:
    """Make everything that is not there, whatever `VQA_DECLARE_TOPOLOGY` says.

    Returns:
        The queues and exchanges, each with whether it was made now. (Of bindings AMQP does not tell.)

    Raises:
        TopologyError: with every fault found, a line each.
    """
    parts: list[Part] = [*topology.queues(), topology.control, *topology.exchanges()]
    found = [await _is_there(connection, part) for part in parts]
    _raise_if_any(
        [
            await _fault(connection, part, passive=part.may_differ and is_there)
            for part, is_there in zip(parts, found, strict=True)
        ]
    )
    _raise_if_any([await _fault(connection, binding) for binding in topology.bindings()])
    return [(part, not is_there) for part, is_there in zip(parts, found, strict=True)]


async def _is_there(connection: AbstractConnection, part: Part) -> bool:
    refusal = await _refusal(connection, part, passive=True)
    # Whatever else it says, the declaration will meet and tell.
    return refusal is None or not broker_reason(refusal).startswith("NOT_FOUND")


async def _fault(
    connection: AbstractConnection, part: Part | BindingSpec, *, passive: bool = False, hint: str = ""
) -> str | None:
    refusal = await _refusal(connection, part, passive=passive)
    return _explain(refusal, part, hint) if refusal else None


async def _refusal(
    connection: AbstractConnection, part: Part | BindingSpec, *, passive: bool
) -> ChannelClosed | None:
    try:
        async with short_lived_channel(connection) as channel:
            await part.declare(channel, passive=passive)
    except ChannelClosed as error:
        return error
    return None


def _raise_if_any(faults: Iterable[str | None]) -> None:
    if found := [fault for fault in faults if fault]:
        raise TopologyError(found)


def _explain(error: ChannelClosed, what: Part | BindingSpec, hint: str) -> str:
    """What is wrong with it, for the person who can put it right.

    Raises:
        ChannelClosed: `error`, if it is the broker that is in trouble and not the queue.
    """
    reason = broker_reason(error)
    match reason.split(" - ")[0]:
        case "NOT_FOUND":
            return f"{what} does not exist: create it (`vqa-worker topology apply` does){_or_let(what)}"
        case "ACCESS_REFUSED":
            return f"{what}: the user of VQA_RABBITMQ_URL lacks a permission: {reason}{hint}"
        case "RESOURCE_LOCKED":
            return f"{what} is another connection's own: {reason}; name another"
        case "PRECONDITION_FAILED":
            advice = "delete it, change it by a policy, or name another"
            return f"{what} exists with other arguments: {reason}; {advice}"
    raise error


def _or_let(what: Part | BindingSpec) -> str:
    is_made_by_workers = not isinstance(what, ExchangeSpec) or not what.may_differ
    return ", or let the worker do so with VQA_DECLARE_TOPOLOGY=true" if is_made_by_workers else ""
