"""Name, declare and check the queues and exchanges. They are named here and nowhere else."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import structlog
from aio_pika import ExchangeType
from aio_pika.abc import AbstractChannel, AbstractConnection
from aio_pika.exceptions import ChannelClosed
from pamqp.common import FieldValue

from vqa_worker.rabbitmq.connection import TopologyError, broker_reason, short_lived_channel
from worker.settings import BROKER_DELIVERY_LIMIT, BrokerSettings, retry_queue

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class QueueSpec:
    """A durable quorum queue: its name and its arguments."""

    name: str
    arguments: Mapping[str, FieldValue]
    may_differ: ClassVar = False

    def __str__(self) -> str:
        return f"queue {self.name}"

    async def declare(self, channel: AbstractChannel, *, passive: bool) -> None:
        """Declare it; `passive`: only check that it exists."""
        arguments = None if passive else dict(self.arguments)
        await channel.declare_queue(self.name, durable=True, passive=passive, arguments=arguments)


@dataclass(frozen=True, slots=True)
class ExchangeSpec:
    """A durable exchange.

    Attributes:
        setting: the variable that names it, if one does.
        may_differ: whether an existing one may have other arguments, because another party created it.
    """

    name: str
    type: ExchangeType
    setting: str = ""
    may_differ: bool = False

    def __str__(self) -> str:
        return f"exchange {self.name} ({self.setting})" if self.setting else f"exchange {self.name}"

    async def declare(self, channel: AbstractChannel, *, passive: bool) -> None:
        """Declare it; `passive`: only check that it exists."""
        await channel.declare_exchange(self.name, self.type, durable=True, passive=passive)


@dataclass(frozen=True, slots=True)
class BindingSpec:
    """A queue's binding to an exchange, with the queue's name as the routing key."""

    exchange: str
    queue: str

    def __str__(self) -> str:
        return f"binding of queue {self.queue} to exchange {self.exchange}"

    async def declare(self, channel: AbstractChannel, *, passive: bool) -> None:
        """Create it, unless it exists. AMQP has no passive declaration of bindings."""
        assert not passive  # noqa: S101 - for the type's sake: queues and exchanges can
        queue = await channel.get_queue(self.queue, ensure=False)
        await queue.bind(self.exchange, routing_key=self.queue)


Part: TypeAlias = QueueSpec | ExchangeSpec


@dataclass(frozen=True, slots=True)
class Topology:
    """The names of all queues and exchanges. An empty exchange name means the default exchange."""

    jobs: str
    results: str
    dead_letters: str
    retry_delays_s: Sequence[int]
    reply_exchange: str
    jobs_exchange: str
    declare: bool

    @classmethod
    def from_settings(cls, settings: BrokerSettings) -> "Topology":
        """Return the topology of these settings."""
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
        """Return the queue that delays a job for `delay_s` seconds before it returns to the jobs queue."""
        return retry_queue(self.jobs, delay_s)

    @property
    def control(self) -> ExchangeSpec:
        """The exchange for cancellations. A worker runs without it."""
        return ExchangeSpec(f"{self.jobs}.control", ExchangeType.FANOUT)

    def queues(self) -> list[QueueSpec]:
        """Return every queue in the order of declaration: dead-letter targets come first."""
        # Dead-lettering at least once needs reject-publish (RabbitMQ documentation, "Quorum queues").
        at_least_once = {"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"}
        return [
            _quorum(self.dead_letters),
            _quorum(self.results),
            _quorum(
                self.jobs,
                **_to(self.dead_letters),
                **at_least_once,
                **{"x-delivery-limit": BROKER_DELIVERY_LIMIT},
            ),
            *(
                _quorum(
                    self.retry(delay_s),
                    **{"x-message-ttl": delay_s * 1000},
                    **_to(self.jobs),
                    **at_least_once,
                )
                for delay_s in self.retry_delays_s
            ),
        ]

    def exchanges(self) -> list[ExchangeSpec]:
        """Return every exchange that messages are published to, except the default exchange."""
        replies = ExchangeSpec(
            self.reply_exchange, ExchangeType.DIRECT, "VQA_REPLY_EXCHANGE", may_differ=True
        )
        jobs = ExchangeSpec(self.jobs_exchange, ExchangeType.DIRECT, "VQA_JOBS_EXCHANGE")
        return [exchange for exchange in (jobs, replies) if exchange.name]

    def bindings(self) -> list[BindingSpec]:
        """Return every queue's binding to those exchanges."""
        kept = [queue.name for queue in self.queues() if queue.name != self.results]
        jobs = [BindingSpec(self.jobs_exchange, name) for name in kept]
        return [
            binding for binding in (*jobs, BindingSpec(self.reply_exchange, self.results)) if binding.exchange
        ]

    def definitions(self) -> dict[str, list[dict[str, Any]]]:
        """Return queues, exchanges and bindings as RabbitMQ definitions.

        The management API imports them with `POST /api/definitions/<vhost>`.
        """
        durable = {"durable": True, "auto_delete": False}
        return {
            "queues": [{"name": it.name, **durable, "arguments": dict(it.arguments)} for it in self.queues()],
            "exchanges": [
                {"name": it.name, "type": it.type.value, **durable, "internal": False, "arguments": {}}
                for it in (self.control, *self.exchanges())
            ],
            "bindings": [
                {
                    "source": it.exchange,
                    "destination": it.queue,
                    "destination_type": "queue",
                    "routing_key": it.queue,
                    "arguments": {},
                }
                for it in self.bindings()
            ],
        }


def _quorum(name: str, **arguments: FieldValue) -> QueueSpec:
    return QueueSpec(name, {"x-queue-type": "quorum", **arguments})


def _to(queue: str) -> dict[str, FieldValue]:
    return {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": queue}


async def establish(connection: AbstractConnection, topology: Topology) -> None:
    """Declare everything that a worker needs, or only check it (`VQA_DECLARE_TOPOLOGY=false`).

    The reply exchange, which another party created, is only checked. RabbitMQ 4.3 refuses that check to users
    without a permission for it (4.3.0 and 4.2.6: without the configure permission). A worker does not need
    that permission, so such a refusal is not an error.

    Raises:
        TopologyError: with every problem found, a line each.
    """
    hint = "" if not topology.declare else "; or create it and set VQA_DECLARE_TOPOLOGY=false"
    faults, unchecked = [], []
    parts: list[Part] = [*topology.queues(), *topology.exchanges()]
    for part in parts:
        is_check = not topology.declare or part.may_differ
        refusal = await _refusal(connection, part, passive=is_check)
        if refusal and is_check and broker_reason(refusal).startswith("ACCESS_REFUSED"):
            unchecked.append(str(part))
        elif refusal:
            faults.append(_explain(refusal, part, hint))
    if unchecked:
        log.info(
            "topology_check_forbidden", parts=unchecked, reason="RabbitMQ does not let this user check them"
        )
    _raise_if_any(faults)
    if topology.declare:
        _raise_if_any([await _fault(connection, binding, hint=hint) for binding in topology.bindings()])


async def create(connection: AbstractConnection, topology: Topology) -> list[tuple[Part, bool]]:
    """Create everything that is missing, also with `VQA_DECLARE_TOPOLOGY=false`.

    Returns:
        The queues and exchanges, each with whether it was created now. AMQP does not report bindings.

    Raises:
        TopologyError: with every problem found, a line each.
    """
    parts: list[Part] = [*topology.queues(), topology.control, *topology.exchanges()]
    found = [await _exists(connection, part) for part in parts]
    _raise_if_any(
        [
            await _fault(connection, part, passive=part.may_differ and exists)
            for part, exists in zip(parts, found, strict=True)
        ]
    )
    _raise_if_any([await _fault(connection, binding) for binding in topology.bindings()])
    return [(part, not exists) for part, exists in zip(parts, found, strict=True)]


async def _exists(connection: AbstractConnection, part: Part) -> bool:
    refusal = await _refusal(connection, part, passive=True)
    # The declaration that follows meets any other refusal and reports it.
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
    """Explain what is wrong, for the person who can fix it.

    Raises:
        ChannelClosed: `error`, if it is about the broker and not about the queue.
    """
    reason = broker_reason(error)
    match reason.split(" - ")[0]:
        case "NOT_FOUND":
            return f"{what} does not exist: create it (`vqa-worker topology apply` does){_declare_hint(what)}"
        case "ACCESS_REFUSED":
            return f"{what}: the user of VQA_RABBITMQ_URL lacks a permission: {reason}{hint}"
        case "RESOURCE_LOCKED":
            return f"{what} is exclusive to another connection: {reason}; use another name"
        case "PRECONDITION_FAILED":
            advice = "delete it, change it by a policy, or use another name"
            return f"{what} exists with other arguments: {reason}; {advice}"
    raise error


def _declare_hint(what: Part | BindingSpec) -> str:
    is_declared_by_workers = not isinstance(what, ExchangeSpec) or not what.may_differ
    return ", or let the worker do so with VQA_DECLARE_TOPOLOGY=true" if is_declared_by_workers else ""
