"""The dead-letter queue, looked into and worked off so that no letter is lost.

A quorum queue cannot be browsed. Letters are fetched without being acked, and given back: at once when the
look is over, or by the broker itself when the connection ends. But RabbitMQ counts how often a message came
back (4.3 only if the connection broke off), and since 4.0 it drops one that came back more than twenty times
from a queue without dead-lettering of its own. So a letter that came back a few times is renewed: published
once more, confirmed, and only then is the old one acked. The new one counts from zero.
"""

import hashlib
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Self

from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage
from aio_pika.exceptions import (
    CONNECTION_EXCEPTIONS,
    ChannelClosed,
    ChannelNotFoundEntity,
    DeliveryError,
    PublishError,
)

from worker.jobs.delivery import Delivery
from worker.messages.decoding import parse_leniently
from worker.messages.job import parse_deadline, valid_id
from worker.rabbitmq import messages, properties
from worker.rabbitmq.connection import connection_losses, explain
from worker.rabbitmq.deliveries import to_delivery
from worker.rabbitmq.outgoing import OutgoingMessage, send
from worker.rabbitmq.permission_checks import NotAllowedError, Probes
from worker.rabbitmq.topology import Topology

# So many times a letter may have come back; with the next look at it, it is renewed. An administrator's
# policy can lower the broker's twenty.
MOST_RETURNS = 3
NAME_CHARS = 10
UNKNOWN, DEFAULT = "unknown", "default"


class LettersError(Exception):
    """The dead-letter queue cannot be worked with; the message says why and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Letter:
    """What is known of a dead letter, without its body.

    Attributes:
        name: tells it from other letters, and stays the same when it is renewed.
        code: why it died: an error code, or what RabbitMQ says if it moved the job itself.
        message: the last fault; empty where RabbitMQ moved the job itself.
        died_at: None where nobody said.
        model: what the job asks for; `default` if it names none, `unknown` if the body cannot be read.
        returns: how often it came back to the queue after somebody had fetched it.
    """

    name: str
    job_id: str | None
    code: str
    message: str
    died_at: datetime | None
    attempts: int
    model: str
    deadline: datetime | None
    size: int
    message_id: str | None
    correlation_id: str | None
    reply_to: str | None
    returns: int


class Held:
    """A letter that was fetched and neither acked nor given back so far."""

    def __init__(self, message: AbstractIncomingMessage) -> None:
        self._message = message
        self.delivery = to_delivery(message, is_alive=lambda: True, may_go_back=_at_once)
        self.letter = _letter(self.delivery, self.headers)
        self.is_settled = False

    @property
    def body(self) -> bytes:
        """The job's body."""
        return self.delivery.body

    @property
    def headers(self) -> Mapping[str, Any]:
        """All headers, the broker's too."""
        return self._message.headers or {}

    async def ack(self) -> None:
        """Take it from the queue."""
        self.is_settled = True
        with connection_losses():
            await self._message.ack()


class DeadLetters:
    """The letters that are in the queue now, each shown once. Made by `looked_into`.

    Attributes:
        there: how many letters there were at the beginning, beside those that somebody else looks at.
    """

    def __init__(self, topology: Topology, reading: AbstractChannel, writing: AbstractChannel) -> None:
        self._topology = topology
        self._reading = reading
        self._writing = writing
        self._last: Held | None = None
        self._left = 0
        self.there = 0

    @classmethod
    @asynccontextmanager
    async def looked_into(cls, connection: AbstractConnection, topology: Topology) -> AsyncIterator[Self]:
        """Open the queue; in the end, however it comes, what was not taken out is back in it.

        Raises:
            LettersError: the queue is not there, or the user lacks a permission.
            CONNECTION_EXCEPTIONS: the broker is gone; it gives everything back itself.
        """
        with _explained(topology), connection_losses():
            # Before anything is fetched: who may not renew letters would use up their returns.
            await Probes(connection).may_publish(topology.jobs_exchange, topology.jobs)
            reading = await connection.channel(publisher_confirms=False)
            writing = await connection.channel(publisher_confirms=True, on_return_raises=True)
            letters = cls(topology, reading, writing)
            try:
                await letters._count()
                yield letters
                # The last one has come back as often as the others.
                await letters._let_go()
            finally:
                await letters._close()

    async def next(self) -> Held | None:
        """The next letter; None if all that were there at the beginning have been shown.

        The one before it stays in the queue unless it was replayed or removed.

        Raises:
            LettersError, CONNECTION_EXCEPTIONS: as `looked_into`.
        """
        await self._let_go()
        if not self._left:
            return None
        self._left -= 1
        queue = await self._reading.get_queue(self._topology.dead_letters, ensure=False)
        with connection_losses():
            # No timeout of its own: that would close the channel. A dead connection ends it.
            message = await queue.get(fail=False, timeout=None)
        self._last = None if message is None else Held(message)
        return self._last

    async def put_back(self, held: Held) -> None:
        """Publish the letter to the jobs queue as the job that it was; `held` is still to be acked.

        Raises:
            LettersError: the broker does not take it; the letter is where it was.
        """
        await self._put(messages.replayed(held.delivery, self._topology.jobs))

    async def sync(self) -> None:
        """Return when the broker has heard all that was said so far, acks too."""
        with connection_losses():
            await self._reading.set_qos(prefetch_count=0)

    async def _count(self) -> None:
        queue = await self._reading.declare_queue(self._topology.dead_letters, passive=True)
        self.there = self._left = queue.declaration_result.message_count or 0

    async def _let_go(self) -> None:
        held, self._last = self._last, None
        if held is None or held.is_settled or held.letter.returns < MOST_RETURNS:
            return
        copy = messages.renewed(held.delivery, self._topology.dead_letters, _with_cause(held))
        try:
            await self._put(copy)
        except LettersError as error:
            raise LettersError(
                f"the letter {held.letter.name} came back {held.letter.returns} times and cannot be renewed,"
                f" and RabbitMQ 4 drops it after 20; before the next look, see to this: {error}"
            ) from None
        await held.ack()

    async def _put(self, message: OutgoingMessage) -> None:
        message = replace(message, exchange=self._topology.jobs_exchange)
        amqp = message.to_amqp()
        try:
            await send(self._writing, message, amqp)
        except PublishError:
            raise LettersError(
                f"nothing gets to the queue {message.routing_key} by {_exchange(self._topology)}:"
                " `vqa-worker topology apply` makes what is missing"
            ) from None
        except DeliveryError:
            raise LettersError(
                f"the broker refuses messages for the queue {message.routing_key}: it is full, or cannot work"
            ) from None
        except ChannelClosed as error:
            raise LettersError(f"the broker refuses to copy a letter: {explain(error)}") from None

    async def _close(self) -> None:
        with suppress(*CONNECTION_EXCEPTIONS), connection_losses():
            underlay = await self._reading.get_underlay_channel()
            # Tag 0: all that are unacked on this channel. Closing it would do the same, but count on 4.3.
            await underlay.basic_nack(0, multiple=True, requeue=True)
            await self._reading.close()
            await self._writing.close()


@contextmanager
def _explained(topology: Topology) -> Iterator[None]:
    """What the broker refuses, in words for the person who can put it right."""
    try:
        yield
    except NotAllowedError as error:
        by = _exchange(topology)
        raise LettersError(
            f"letters are looked at only where they can be put back too, by {by}: {error}"
        ) from None
    except ChannelNotFoundEntity:
        raise LettersError(
            f"the queue {topology.dead_letters} does not exist: has a worker run here, and are VQA_JOBS_QUEUE"
            " and VQA_DEAD_LETTER_QUEUE the same as its own?"
        ) from None
    except ChannelClosed as error:
        raise LettersError(f"the queue {topology.dead_letters}: {explain(error)}") from None


def _exchange(topology: Topology) -> str:
    return f"exchange {topology.jobs_exchange}" if topology.jobs_exchange else "the default exchange"


def _letter(delivery: Delivery, headers: Mapping[str, Any]) -> Letter:
    job = parse_leniently(delivery.body)
    code, died_at = _cause(headers)
    return Letter(
        name=_name(delivery, code, died_at),
        job_id=valid_id((job or {}).get("id")) or valid_id(delivery.message_id),
        code=code,
        message=properties.text(headers.get(messages.ERROR_MESSAGE_HEADER)) or "",
        died_at=died_at,
        attempts=properties.count(headers.get(properties.ATTEMPTS_HEADER), properties.MAX_ATTEMPTS_BELIEVED),
        model=_model(job),
        deadline=_deadline(job),
        size=len(delivery.body),
        message_id=delivery.message_id,
        correlation_id=delivery.correlation_id,
        reply_to=delivery.reply_to,
        returns=properties.count(headers.get("x-delivery-count"), properties.MAX_DELIVERIES_BELIEVED),
    )


def _cause(headers: Mapping[str, Any]) -> tuple[str, datetime | None]:
    """Why and when it died: by the worker's word, else by the broker's."""
    by_broker = _last_death(headers)
    code = properties.text(headers.get(messages.ERROR_CODE_HEADER)) or properties.text(
        by_broker.get("reason")
    )
    died_at = _time(headers.get(properties.DIED_AT_HEADER)) or _time(by_broker.get("time"))
    return code or UNKNOWN, died_at


def _last_death(headers: Mapping[str, Any]) -> Mapping[str, Any]:
    match headers.get("x-death"):
        case [dict() as last, *_]:
            return last
    return {}


def _time(value: object) -> datetime | None:
    if isinstance(value, datetime):
        return value.astimezone(UTC)
    try:
        moment = parse_deadline(value)
    except ValueError:
        return None
    return moment and moment.astimezone(UTC)


def _model(job: Mapping[str, Any] | None) -> str:
    match (job or {}).get("model"):
        case str() as model if model:
            return model
        case None if job is not None:
            return DEFAULT
    return UNKNOWN


def _deadline(job: Mapping[str, Any] | None) -> datetime | None:
    return _time((job or {}).get("deadline"))


def _name(delivery: Delivery, code: str, died_at: datetime | None) -> str:
    digest = hashlib.sha256(delivery.body)
    for part in (delivery.message_id, delivery.correlation_id, delivery.reply_to, code, str(died_at)):
        digest.update(b"\0" if part is None else b"\1" + part.encode(errors="replace") + b"\0")
    return digest.hexdigest()[:NAME_CHARS]


def _with_cause(held: Held) -> Mapping[str, Any]:
    """Its headers; what the broker alone had said of its death, they say in the worker's way from now on."""
    said: dict[str, Any] = {messages.ERROR_CODE_HEADER: held.letter.code}
    if held.letter.died_at is not None:
        said[properties.DIED_AT_HEADER] = messages.rfc3339(held.letter.died_at)
    return {
        **said,
        **{name: value for name, value in held.headers.items() if properties.is_encodable(name, value)},
    }


async def _at_once() -> None:
    """Letters are not given back as copies, for which there would be something to wait."""
