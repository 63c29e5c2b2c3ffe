"""Read what is known of a dead letter from its body, properties and headers."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from vqa_worker.messages.content_encoding import ContentEncodingError, decompress, is_encoded
from vqa_worker.messages.decoding import parse_leniently
from vqa_worker.messages.job import parse_deadline, valid_id
from worker.jobs.delivery import Delivery
from worker.rabbitmq import messages, properties

NAME_CHARS = 10
UNKNOWN, DEFAULT = "unknown", "default"
# Of a decompressed body: a larger one is shown as it is.
MAX_READ_BYTES = 100_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """What is known of a dead letter, without its body.

    Attributes:
        name: identifies it among the dead letters, and stays the same when it is renewed.
        code: why it was dead-lettered: an error code, or RabbitMQ's reason if RabbitMQ moved the job itself.
        message: the last error; empty where RabbitMQ moved the job itself.
        died_at: None if unknown.
        model: the job's; `default` if it names none, `unknown` if the body cannot be read.
        returns: how often it was fetched from the queue and returned to it.
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

    @classmethod
    def of(cls, delivery: Delivery, headers: Mapping[str, Any]) -> "DeadLetter":
        """Read a dead letter; what cannot be read is unknown."""
        job = parse_leniently(readable_body(delivery))
        code, died_at = _cause(headers)
        return cls(
            name=_name(delivery, code, died_at),
            job_id=valid_id((job or {}).get("id")) or valid_id(delivery.message_id),
            code=code,
            message=properties.text(headers.get(messages.ERROR_MESSAGE_HEADER)) or "",
            died_at=died_at,
            attempts=properties.count(
                headers.get(properties.ATTEMPTS_HEADER), properties.MAX_ATTEMPTS_BELIEVED
            ),
            model=_model(job),
            deadline=_time((job or {}).get("deadline")),
            size=len(delivery.body),
            message_id=delivery.message_id,
            correlation_id=delivery.correlation_id,
            reply_to=delivery.reply_to,
            returns=properties.count(headers.get("x-delivery-count"), properties.MAX_DELIVERIES_BELIEVED),
        )

    def headers_when_renewed(self, headers: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return its headers with the cause in the worker's own, which only RabbitMQ's may have named."""
        cause: dict[str, Any] = {messages.ERROR_CODE_HEADER: self.code}
        if self.died_at is not None:
            cause[properties.DIED_AT_HEADER] = messages.rfc3339(self.died_at)
        kept = {name: value for name, value in headers.items() if properties.is_encodable(name, value)}
        return {**cause, **kept}


def readable_body(delivery: Delivery) -> bytes:
    """Return the body without its `content_encoding`; unchanged if that is not possible."""
    if delivery.content_encoding is None or not is_encoded(delivery.content_encoding):
        return delivery.body
    try:
        return decompress(delivery.body, delivery.content_encoding, MAX_READ_BYTES)
    except ContentEncodingError:
        return delivery.body


def _cause(headers: Mapping[str, Any]) -> tuple[str, datetime | None]:
    """Return why and when it was dead-lettered: from the worker's headers, else from the broker's."""
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


def _name(delivery: Delivery, code: str, died_at: datetime | None) -> str:
    digest = hashlib.sha256(delivery.body)
    for part in (delivery.message_id, delivery.correlation_id, delivery.reply_to, code, str(died_at)):
        digest.update(b"\0" if part is None else b"\1" + part.encode(errors="replace") + b"\0")
    return digest.hexdigest()[:NAME_CHARS]
