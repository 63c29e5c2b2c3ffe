"""A message that the broker delivered, as the worker sees it: plain data and one way to ack."""

import hashlib
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property


@dataclass(slots=True)
class Progress:
    """How far the work on a message has come, for whoever asks.

    Attributes:
        stage: read, wait, fetch, model, verdict, keep or publish; `since` is when it began, in seconds of
            `time.monotonic`.
        attempts: counted ones, this one included.
        trace_id: of the trace that the message goes on with, or that begins with it.
        job_id, model: as soon as they are known.
    """

    since: float
    attempts: int
    trace_id: str | None
    stage: str = "decode"
    job_id: str | None = None
    model: str | None = None

    def enters(self, stage: str) -> None:
        """The next stage begins now."""
        self.stage, self.since = stage, time.monotonic()


@dataclass(eq=False)
class Delivery:
    """One delivery of one message.

    Attributes:
        body: the message's body, as it came.
        message_id: AMQP property, like `correlation_id`, `reply_to`, `content_type` and `timestamp`.
        trace: the W3C headers `traceparent` and `tracestate`, as far as present and well-formed.
        enqueued_ms: the header `timestamp_in_ms` of RabbitMQ's own interceptor, in Unix milliseconds.
        queued_s: seconds between the message's timestamp and this delivery, where it has one.
        attempts: counted attempts before this one.
        deliveries: how often it was delivered without an end, this delivery included.
        redelivered: the broker says that it may have been delivered before.
        copy: which of the worker's own copies of a job this is; None for the publisher's original.
        received: when it came, in seconds of `time.monotonic`.
        ack: settles it with the broker; a lost connection is no error, since the broker delivers again.
        reject: hands it to the broker's own dead-lettering; the last resort.
        requeue: puts it back where it was, counted as a delivery by RabbitMQ before 4.3; another last resort.
        is_alive: whether the broker still waits for the ack of this very delivery.
        may_go_back: returns when a copy of it may go to the queue that it came from without being counted.
        progress: what is being done with it.
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
    progress: Progress = field(init=False)

    def __post_init__(self) -> None:
        self.progress = Progress(self.received, self.attempts + 1, _trace_id(self.trace))

    @cached_property
    def key(self) -> bytes:
        """What tells this message from others: equal for two deliveries of the same message."""
        digest = hashlib.sha256(self.body)
        for part in (self.message_id, self.correlation_id, self.reply_to, self.copy, str(self.attempts)):
            digest.update(b"\0" if part is None else b"\1" + part.encode(errors="replace") + b"\0")
        return digest.digest()


def _trace_id(trace: Mapping[str, str]) -> str | None:
    """The trace's id in the W3C header `traceparent`, if there is one: what follows its version."""
    traceparent = trace.get("traceparent")
    return traceparent.split("-", 2)[1] if traceparent else None
