"""One message as the broker delivered it: plain data, and the ways to settle it."""

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

from vqa_worker.messages.result import Usage


@dataclass(eq=False)
class Delivery:
    """One delivery of one message.

    Attributes:
        body: the message's body, unchanged.
        message_id: AMQP property, like `correlation_id`, `reply_to`, `content_type`, `content_encoding`,
            `timestamp`, `type`, `app_id` and `priority` (None also for 0).
        trace: the W3C headers `traceparent` and `tracestate`, if present and well-formed.
        enqueued_ms: the header `timestamp_in_ms` of RabbitMQ's own interceptor, in Unix milliseconds.
        queued_s: seconds since the message's timestamp, if any; `counted_attempts`: before this one;
            `malformed_answers`: how many of them were billed for an answer that cannot be read;
            `unusable`: the usage of these, as far as the API reported it.
        deliveries: number of deliveries without an outcome, this one included.
        redelivered: whether the broker may have delivered the message before.
        copy: identifies a copy that a worker published; None for the publisher's original.
        received_at: when it arrived, in seconds of the monotonic clock.
        ack: ack the delivery. Does not raise if the connection is lost: the broker then redelivers it.
        reject: let the broker dead-letter it; `requeue` it. Last resorts: RabbitMQ < 4.3 counts a requeue.
        can_ack: whether the broker still waits for the ack of this delivery.
        wait_until_requeue_is_safe: wait until no consumer is being cancelled (RabbitMQ up to 4.2 counts a
            delivery to a cancelled consumer).
        expires_at: when the message expires, if its publisher set an `expiration`.
        headers: the publisher's headers that copies of the job keep.
    """

    body: bytes
    message_id: str | None
    correlation_id: str | None
    reply_to: str | None
    content_type: str | None
    timestamp: datetime | None
    trace: Mapping[str, str]
    enqueued_ms: int | None
    queued_s: float | None
    counted_attempts: int
    malformed_answers: int
    deliveries: int
    redelivered: bool
    copy: str | None
    received_at: float
    ack: Callable[[], Awaitable[None]]
    reject: Callable[[], Awaitable[None]]
    requeue: Callable[[], Awaitable[None]]
    can_ack: Callable[[], bool]
    wait_until_requeue_is_safe: Callable[[], Awaitable[None]]
    content_encoding: str | None = None
    type: str | None = None
    app_id: str | None = None
    priority: int | None = None
    expires_at: datetime | None = None
    unusable: Usage | None = None
    headers: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def key(self) -> bytes:
        """Identify the message: equal for two deliveries of the same message."""
        digest = hashlib.sha256(self.body)
        attempts = str(self.counted_attempts)
        for part in (self.message_id, self.correlation_id, self.reply_to, self.copy, attempts):
            digest.update(b"\0" if part is None else b"\1" + part.encode(errors="replace") + b"\0")
        return digest.digest()

    @property
    def trace_id(self) -> str | None:
        """The trace's id: the part after the version in the W3C header `traceparent`."""
        traceparent = self.trace.get("traceparent")
        return traceparent.split("-", 2)[1] if traceparent else None
