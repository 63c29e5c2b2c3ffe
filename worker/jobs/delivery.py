"""One message as the broker delivered it: plain data, and the ways to settle it."""

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property


@dataclass(eq=False)
class Delivery:
    """One delivery of one message.

    Attributes:
        body: the message's body, unchanged.
        message_id: AMQP property, like `correlation_id`, `reply_to`, `content_type` and `timestamp`.
        trace: the W3C headers `traceparent` and `tracestate`, if present and well-formed.
        enqueued_ms: the header `timestamp_in_ms` of RabbitMQ's own interceptor, in Unix milliseconds.
        queued_s: seconds between the message's timestamp and this delivery, if it has one.
        attempts: counted attempts before this one.
        deliveries: number of deliveries without an outcome, this one included.
        redelivered: whether the broker may have delivered the message before.
        copy: identifies a copy that a worker published; None for the publisher's original.
        received: when it arrived, in seconds of the monotonic clock.
        ack: settle it. Does not raise when the connection is lost: the broker then delivers it again.
        reject: let the broker dead-letter it; the last resort.
        requeue: return it to the queue; the last resort, since RabbitMQ before 4.3 counts it as a delivery.
        is_alive: whether the broker still waits for the ack of this delivery.
        may_go_back: wait until a copy published to the same queue does not count as a delivery.
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
    attempts: int
    deliveries: int
    redelivered: bool
    copy: str | None
    received: float
    ack: Callable[[], Awaitable[None]]
    reject: Callable[[], Awaitable[None]]
    requeue: Callable[[], Awaitable[None]]
    is_alive: Callable[[], bool]
    may_go_back: Callable[[], Awaitable[None]]

    @cached_property
    def key(self) -> bytes:
        """Identify the message: equal for two deliveries of the same message."""
        digest = hashlib.sha256(self.body)
        for part in (self.message_id, self.correlation_id, self.reply_to, self.copy, str(self.attempts)):
            digest.update(b"\0" if part is None else b"\1" + part.encode(errors="replace") + b"\0")
        return digest.digest()

    @property
    def trace_id(self) -> str | None:
        """The trace's id: the part after the version in the W3C header `traceparent`."""
        traceparent = self.trace.get("traceparent")
        return traceparent.split("-", 2)[1] if traceparent else None
