"""Turn AMQP messages into deliveries, as the rest of the worker knows them."""

import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime

import structlog
from aio_pika.abc import AbstractIncomingMessage
from aio_pika.exceptions import CONNECTION_EXCEPTIONS

from vqa_worker.messages.result import Usage
from vqa_worker.rabbitmq.connection import connection_losses
from vqa_worker.rabbitmq.outgoing import ENQUEUED_HEADER
from worker.jobs.delivery import Delivery
from worker.rabbitmq import properties

log = structlog.get_logger(__name__)


async def ignoring_loss(operation: Awaitable[object]) -> None:
    """Await a request to the broker; ignore a lost connection, which the session handles."""
    try:
        with connection_losses():
            await operation
    except CONNECTION_EXCEPTIONS:
        log.debug("rabbitmq_request_lost")


def to_delivery(
    message: AbstractIncomingMessage,
    *,
    can_ack: Callable[[], bool],
    wait_until_requeue_is_safe: Callable[[], Awaitable[None]],
) -> Delivery:
    """Return the message as a delivery; it keeps no reference to the message."""
    headers, now = message.headers or {}, datetime.now(UTC)
    enqueued_ms = properties.count(headers.get(ENQUEUED_HEADER), 2**53) or None
    timestamp = message.timestamp if isinstance(message.timestamp, datetime) else None
    queued_s = properties.queued_s(enqueued_ms, timestamp, now)
    expiration_s = message.expiration if isinstance(message.expiration, float) else None
    # Quorum queues count the deliveries before this one; copies of requeued jobs carry the sum.
    before = properties.count(headers.get("x-delivery-count"), properties.MAX_DELIVERIES_BELIEVED)
    carried = properties.count(headers.get(properties.DELIVERIES_HEADER), properties.MAX_DELIVERIES_BELIEVED)
    # A copy of a job without a message_id has the copy's own: the publisher gave the job none.
    message_id, copy = (
        properties.text(message.message_id),
        properties.text(headers.get(properties.COPY_HEADER)),
    )
    return Delivery(
        body=message.body,
        message_id=message_id if message_id != copy else None,
        correlation_id=properties.text(message.correlation_id),
        reply_to=properties.text(message.reply_to),
        content_type=properties.text(message.content_type),
        content_encoding=properties.text(message.content_encoding),
        type=properties.text(message.type),
        app_id=properties.text(message.app_id),
        # aio-pika reads 0 where there is none.
        priority=message.priority or None,
        expires_at=properties.expires_at(headers, expiration_s, queued_s, now),
        headers=properties.publisher_headers(headers),
        timestamp=timestamp,
        trace=properties.trace_headers(headers),
        enqueued_ms=enqueued_ms,
        queued_s=queued_s,
        counted_attempts=_count(headers, properties.ATTEMPTS_HEADER),
        malformed_answers=_count(headers, properties.MALFORMED_HEADER),
        unusable=_unusable(headers),
        deliveries=carried + before + 1,
        redelivered=bool(message.redelivered),
        copy=copy,
        received_at=time.monotonic(),
        ack=lambda: ignoring_loss(message.ack()),
        reject=lambda: ignoring_loss(message.reject(requeue=False)),
        requeue=lambda: ignoring_loss(message.nack(requeue=True)),
        can_ack=can_ack,
        wait_until_requeue_is_safe=wait_until_requeue_is_safe,
    )


def _count(headers: Mapping[str, object], name: str) -> int:
    """Return a number of attempts so far; a replayed dead letter starts at 0."""
    if properties.DIED_AT_HEADER in headers:
        return 0
    return properties.count(headers.get(name), properties.MAX_ATTEMPTS_BELIEVED)


def _unusable(headers: Mapping[str, object]) -> Usage | None:
    """Return the usage of the unusable answers of the attempts so far, none of a replayed dead letter."""
    if properties.DIED_AT_HEADER in headers:
        return None
    return properties.usage(headers.get(properties.UNUSABLE_HEADER))
