"""Build the messages that the worker publishes from a delivery.

A result has no header of its job. A copy of the job has its publisher's headers, except those that RabbitMQ
routes by (`CC` and `BCC` could send it anywhere) or sets. It has no `user_id`: RabbitMQ closes the channel
of a user with another name.
"""

import uuid
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime

from pamqp.common import FieldValue

from vqa_worker.messages.result import Result
from vqa_worker.rabbitmq.outgoing import CONTENT_TYPE, ENQUEUED_HEADER, MAX_SHORT_BYTES, OutgoingMessage
from worker.jobs.delivery import Delivery
from worker.jobs.outcome import DeadLettered, Requeued, Retried
from worker.rabbitmq import properties

APP_ID = "vqa-worker"
RESULT_TYPE = "vqa.result.v1"
UNDELIVERABLE_HEADER = "vqa-undeliverable-to"
ERROR_CODE_HEADER = "vqa-error-code"
ERROR_MESSAGE_HEADER = "vqa-error-message"
# RabbitMQ closes the connection on each publish to some invented direct reply-to names (3.10: code 541).
DIRECT_REPLY_TRIES = 3
# Headers that RabbitMQ routes by, or counts in.
DROPPED_HEADERS = frozenset({"CC", "BCC", "x-delivery-count", "x-acquired-count"})
# About ten seconds with the publisher's delays, which is longer than a broker's restart takes.
PRIVATE_QUEUE_TRIES = 7
# The same for a copy of a job: the broker still has the job itself.
COPY_TRIES = 7


def reply(
    delivery: Delivery, result: Result, queue: str, *, exchange: str, body: bytes | None = None
) -> OutgoingMessage:
    """Build the result message for the queue that the publisher reads; `body`: of the result, if known."""
    return OutgoingMessage(
        body=body or result.to_body(),
        exchange=exchange,
        routing_key=queue,
        content_type=CONTENT_TYPE,
        type=RESULT_TYPE,
        app_id=APP_ID,
        correlation_id=delivery.correlation_id or _short(result.id),
        timestamp=datetime.now(UTC),
        headers=delivery.trace,
    )


def to_direct_reply(message: OutgoingMessage) -> OutgoingMessage:
    """Return the reply for direct reply-to, whose pseudo-queue only the default exchange knows."""
    return replace(message, exchange="", mandatory=False, tries=DIRECT_REPLY_TRIES)


def to_private_queue(message: OutgoingMessage) -> OutgoingMessage:
    """Return the reply for a queue that is not the worker's own: a full one must not block the job."""
    return replace(message, tries=PRIVATE_QUEUE_TRIES)


def undeliverable(message: OutgoingMessage, results_queue: str) -> OutgoingMessage:
    """Return the reply for the results queue, because its own queue does not exist."""
    headers = {**message.headers, UNDELIVERABLE_HEADER: message.routing_key}
    return replace(message, routing_key=results_queue, headers=headers, message_id=str(uuid.uuid4()))


def retry_copy(delivery: Delivery, queue: str, outcome: Retried) -> OutgoingMessage:
    """Build the copy of the job for a retry queue; its deliveries count from zero."""
    headers = _expires_at(delivery)
    headers |= {properties.COPY_HEADER: uuid.uuid4().hex, properties.ATTEMPTS_HEADER: outcome.attempts}
    headers |= _bought(outcome)
    return _expiring(delivery, _copy(delivery, queue, headers))


def requeued_copy(delivery: Delivery, queue: str, outcome: Requeued) -> OutgoingMessage:
    """Build the copy of a requeued job: this delivery and the restored attempts do not count.

    Not a nack, because RabbitMQ before 4.3 counts that towards the delivery limit.
    """
    headers = _expires_at(delivery) | {properties.COPY_HEADER: uuid.uuid4().hex} | _bought(outcome)
    if delivery.counted_attempts > outcome.restored_attempts:
        headers[properties.ATTEMPTS_HEADER] = delivery.counted_attempts - outcome.restored_attempts
    if delivery.deliveries > 1:
        headers[properties.DELIVERIES_HEADER] = delivery.deliveries - 1
    return _expiring(delivery, _copy(delivery, queue, headers))


def dead_letter(delivery: Delivery, queue: str, outcome: DeadLettered) -> OutgoingMessage:
    """Build the dead letter: the job as it came, and the cause in headers, so that it can be replayed.

    It does not expire, like a message that RabbitMQ dead-letters.
    """
    return _copy(
        delivery,
        queue,
        {
            ERROR_CODE_HEADER: str(outcome.code),
            ERROR_MESSAGE_HEADER: outcome.message,
            properties.ATTEMPTS_HEADER: outcome.attempts,
            properties.DIED_AT_HEADER: rfc3339(datetime.now(UTC)),
        },
    )


def replayed(delivery: Delivery, queue: str) -> OutgoingMessage:
    """Build the original job from a dead letter: without the cause, and with attempts counted from zero."""
    return _copy(delivery, queue, {properties.COPY_HEADER: uuid.uuid4().hex})


def renewed(delivery: Delivery, queue: str, headers: Mapping[str, FieldValue]) -> OutgoingMessage:
    """Build a copy of a dead letter, without the headers that RabbitMQ routes by or counts in."""
    kept = {name: value for name, value in headers.items() if name not in DROPPED_HEADERS}
    return _copy(delivery, queue, kept)


def _copy(delivery: Delivery, queue: str, headers: Mapping[str, FieldValue]) -> OutgoingMessage:
    kept = {**properties.encodable(delivery.headers), **delivery.trace}
    if delivery.enqueued_ms is not None:
        kept[ENQUEUED_HEADER] = delivery.enqueued_ms
    copy = OutgoingMessage(
        body=delivery.body,
        routing_key=queue,
        content_type=delivery.content_type,
        content_encoding=delivery.content_encoding,
        type=delivery.type,
        app_id=delivery.app_id,
        priority=delivery.priority,
        correlation_id=delivery.correlation_id,
        reply_to=delivery.reply_to,
        timestamp=delivery.timestamp,
        headers={**kept, **headers},
        tries=COPY_TRIES,
    )
    if delivery.message_id is not None:
        return replace(copy, message_id=delivery.message_id)
    # aio-pika gives every message an id. The header marks one that is not the publisher's: the replay of a
    # dead letter without an id must not add one that its publisher does not know.
    return replace(copy, headers={**copy.headers, properties.COPY_HEADER: copy.message_id})


def _bought(outcome: Retried | Requeued) -> dict[str, FieldValue]:
    """Return the headers for the answers that were billed and cannot be used."""
    headers: dict[str, FieldValue] = {}
    if outcome.malformed_answers:
        headers[properties.MALFORMED_HEADER] = outcome.malformed_answers
    if outcome.unusable is not None:
        headers[properties.UNUSABLE_HEADER] = outcome.unusable.model_dump_json()
    return headers


def _expires_at(delivery: Delivery) -> dict[str, FieldValue]:
    if delivery.expires_at is None:
        return {}
    return {properties.EXPIRES_AT_HEADER: rfc3339(delivery.expires_at)}


def _expiring(delivery: Delivery, copy: OutgoingMessage) -> OutgoingMessage:
    """Return the copy with the rest of the job's `expiration`; without it if nothing is left.

    No job is retried that expires within its delay, so it does not leave the retry queue early. RabbitMQ
    removes the property when it moves the job back; the header stays.
    """
    if delivery.expires_at is None:
        return copy
    left_s = (delivery.expires_at - datetime.now(UTC)).total_seconds()
    return replace(copy, expires_in_s=left_s) if 0 < left_s < properties.MAX_EXPIRATION_S else copy


def rfc3339(moment: datetime) -> str:
    """Format a time in UTC, to the millisecond."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _short(text: str | None) -> str | None:
    """Return `text` if it fits into an AMQP property (255 bytes), else None."""
    return text if text is not None and len(text.encode()) <= MAX_SHORT_BYTES else None
