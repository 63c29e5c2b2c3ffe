"""The messages that the worker publishes, made of what was delivered. No header of a job is copied blindly.

RabbitMQ routes by `CC` and `BCC` headers, and refuses a `user_id` that isn't the connection's own, so a
copied header could send a message anywhere or end the channel.
"""

import uuid
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime

from pamqp.common import FieldValue

from worker.jobs.delivery import Delivery
from worker.jobs.outcome import DeadLettered
from worker.messages.result import Result
from worker.rabbitmq import properties
from worker.rabbitmq.outgoing import OutgoingMessage

APP_ID = "vqa-worker"
RESULT_TYPE = "vqa.result.v1"
CONTENT_TYPE = "application/json"
UNDELIVERABLE_HEADER = "vqa-undeliverable-to"
ERROR_CODE_HEADER = "vqa-error-code"
ERROR_MESSAGE_HEADER = "vqa-error-message"
# To some made-up names of direct reply-to RabbitMQ answers by closing the connection (3.10: 541), each time.
DIRECT_REPLY_TRIES = 3
# What RabbitMQ routes by, and what it counts.
NOT_REPEATED = frozenset({"CC", "BCC", "x-delivery-count", "x-acquired-count"})
# About ten seconds with the publisher's growing delays: longer than a broker's restart cuts connections.
PRIVATE_QUEUE_TRIES = 7
# As long for a copy of a job: the broker still has the job itself.
COPY_TRIES = 7


def reply(delivery: Delivery, result: Result, queue: str, *, exchange: str) -> OutgoingMessage:
    """The result, for the queue that the job's publisher reads."""
    return OutgoingMessage(
        body=result.to_body(),
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
    """The same for direct reply-to, whose pseudo-queue is not routed to in the usual way."""
    return replace(message, exchange="", mandatory=False, tries=DIRECT_REPLY_TRIES)


def to_private_queue(message: OutgoingMessage) -> OutgoingMessage:
    """The same for a queue that is not the worker's own: one that is full must not hold up all others."""
    return replace(message, tries=PRIVATE_QUEUE_TRIES)


def undeliverable(message: OutgoingMessage, results_queue: str) -> OutgoingMessage:
    """The same for the results queue, since nobody reads where it was to go."""
    headers = {**message.headers, UNDELIVERABLE_HEADER: message.routing_key}
    return replace(message, routing_key=results_queue, headers=headers, message_id=str(uuid.uuid4()))


def retry_copy(delivery: Delivery, queue: str, attempts: int) -> OutgoingMessage:
    """The job for a retry queue; deliveries are counted anew, since this one has come to an end."""
    return _copy(
        delivery, queue, {properties.COPY_HEADER: uuid.uuid4().hex, properties.ATTEMPTS_HEADER: attempts}
    )


def given_back_copy(delivery: Delivery, queue: str, restored_attempts: int = 0) -> OutgoingMessage:
    """The job as it was, with this delivery uncounted, and so many attempts less.

    A copy and not a nack, which RabbitMQ before 4.3 counts towards the delivery limit.
    """
    headers: dict[str, FieldValue] = {properties.COPY_HEADER: uuid.uuid4().hex}
    if delivery.attempts > restored_attempts:
        headers[properties.ATTEMPTS_HEADER] = delivery.attempts - restored_attempts
    if delivery.deliveries > 1:
        headers[properties.DELIVERIES_HEADER] = delivery.deliveries - 1
    return _copy(delivery, queue, headers)


def dead_letter(delivery: Delivery, queue: str, outcome: DeadLettered) -> OutgoingMessage:
    """The job as it came, with why it died: it can be put back as it was."""
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


def put_back(delivery: Delivery, queue: str) -> OutgoingMessage:
    """A dead letter as the job that it was: nothing of its death comes along, and attempts count anew."""
    return _copy(delivery, queue, {properties.COPY_HEADER: uuid.uuid4().hex})


def renewed(delivery: Delivery, queue: str, headers: Mapping[str, FieldValue]) -> OutgoingMessage:
    """A dead letter once more, with its headers but those that route it or are RabbitMQ's to count."""
    kept = {name: value for name, value in headers.items() if name not in NOT_REPEATED}
    return _copy(delivery, queue, kept)


def _copy(delivery: Delivery, queue: str, headers: Mapping[str, FieldValue]) -> OutgoingMessage:
    kept: dict[str, FieldValue] = dict(delivery.trace)
    if delivery.enqueued_ms is not None:
        kept[properties.ENQUEUED_HEADER] = delivery.enqueued_ms
    copy = OutgoingMessage(
        body=delivery.body,
        routing_key=queue,
        content_type=delivery.content_type,
        correlation_id=delivery.correlation_id,
        reply_to=delivery.reply_to,
        timestamp=delivery.timestamp,
        headers={**kept, **headers},
        tries=COPY_TRIES,
    )
    if delivery.message_id is not None:
        return replace(copy, message_id=delivery.message_id)
    # The library gives every message an id. One that is also here was not the publisher's: a dead letter
    # without any id, put back, must not become a job under a name that nobody knows.
    return replace(copy, headers={**copy.headers, properties.COPY_HEADER: copy.message_id})


def rfc3339(moment: datetime) -> str:
    """A moment in UTC, to the millisecond."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _short(text: str | None) -> str | None:
    """`text` if AMQP can carry it as a property (255 bytes), else None."""
    return text if text is not None and len(text.encode()) <= properties.MAX_SHORT_BYTES else None
