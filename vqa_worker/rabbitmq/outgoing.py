"""A message to publish, in the worker's form and in aio-pika's, and why the broker can refuse it."""

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

import aio_pika
from aio_pika.abc import AbstractChannel
from aio_pika.exceptions import ChannelClosed, DeliveryError
from pamqp.common import FieldValue

from vqa_worker.rabbitmq.connection import broker_reason, connection_losses, explain

CONTENT_TYPE = "application/json"
# Set by RabbitMQ's interceptor of the same name as well, where it is enabled.
ENQUEUED_HEADER = "timestamp_in_ms"
# AMQP 0-9-1: the longest short string.
MAX_SHORT_BYTES = 255
# RabbitMQ's text when it closes the channel because of the size of a message (`max_message_size`: by default
# 16 MiB in RabbitMQ 4, 128 MiB before). Messages published with it on that channel are lost as well.
_TOO_LARGE = re.compile(r"message size (\d+) is larger than configured max size (\d+)")


class UnroutableError(Exception):
    """No queue is bound for this message; the broker returned it."""


class PublishAbandonedError(UnroutableError):
    """The message was tried `tries` times; the failures are in the log."""


class RefusedError(Exception):
    """The broker does not let this user publish there; the message gives the reason."""


class TooLargeError(Exception):
    """The message is larger than the broker accepts; another try cannot succeed.

    Attributes:
        max_bytes: the largest size that the broker accepts.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        super().__init__(f"the broker takes no message over {max_bytes} bytes (its max_message_size)")


@dataclass(frozen=True, slots=True, kw_only=True)
class OutgoingMessage:
    """A message to publish, always persistent.

    Attributes:
        mandatory: whether the broker returns the message if no queue takes it.
        tries: the number of refusals and lost connections after which to stop; None: no limit.
        message_id: of the message; each publish gets a new one unless it is given.
        expires_in_s: seconds after which the broker drops or dead-letters the message, in whole milliseconds.
    """

    body: bytes
    routing_key: str
    exchange: str = ""
    mandatory: bool = True
    tries: int | None = None
    content_type: str | None = None
    content_encoding: str | None = None
    type: str | None = None
    app_id: str | None = None
    priority: int | None = None
    expires_in_s: float | None = None
    message_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    correlation_id: str | None = None
    reply_to: str | None = None
    timestamp: datetime | None = None
    headers: Mapping[str, FieldValue] = field(default_factory=dict)

    def to_amqp(self) -> aio_pika.Message:
        """Return the message in aio-pika's form."""
        message = aio_pika.Message(
            self.body,
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            content_type=self.content_type,
            content_encoding=self.content_encoding,
            priority=self.priority,
            expiration=self.expires_in_s,
            type=self.type,
            app_id=self.app_id,
            message_id=self.message_id,
            correlation_id=self.correlation_id,
            reply_to=self.reply_to,
            timestamp=self.timestamp,
            headers=dict(self.headers),
        )
        # aio-pika publishes 0 for none, which is not the same for every type of queue.
        message.priority = self.priority
        return message


async def send(channel: AbstractChannel, message: OutgoingMessage, amqp: aio_pika.Message) -> None:
    """Publish `amqp`, which is `message` as built by `to_amqp`, once and wait for the confirm.

    The channel must have publisher confirms and raise returned messages.

    Raises:
        PublishError: no queue takes it.
        DeliveryError, CONNECTION_EXCEPTIONS: the broker refuses it, or the connection was lost before the
            confirm.
    """
    exchange = (
        await channel.get_exchange(message.exchange, ensure=False)
        if message.exchange
        else channel.default_exchange
    )
    with connection_losses():
        await exchange.publish(amqp, message.routing_key, mandatory=message.mandatory)


def raise_if_too_large(error: BaseException, message: OutgoingMessage) -> None:
    """Raise if the broker refuses this message because of its size; other errors can be retried.

    Raises:
        TooLargeError: the broker closed the channel because of this message's size.
    """
    found = _TOO_LARGE.search(str(error)) if isinstance(error, ChannelClosed) else None
    if found and len(message.body) == int(found[1]):
        raise TooLargeError(int(found[2]))


def raise_if_refused(error: BaseException, user: str = "the user of VQA_RABBITMQ_URL") -> None:
    """Raise if the broker does not let this user publish to this exchange; other errors can be retried.

    Raises:
        RefusedError: the broker closed the channel for that reason.
    """
    reason = broker_reason(error) if isinstance(error, ChannelClosed) else ""
    if reason.startswith("ACCESS_REFUSED"):
        raise RefusedError(f"{user} may not publish jobs: {reason}")
    if reason.startswith("NOT_FOUND"):
        raise RefusedError(f"jobs cannot be published: {reason}")


def explain_failure(error: BaseException) -> str:
    """Explain why a publish failed, for the person who can fix it."""
    if isinstance(error, DeliveryError):
        return "the broker refuses the message: the queue is full, or cannot work"
    return explain(error)
