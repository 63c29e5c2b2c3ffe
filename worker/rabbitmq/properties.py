"""Read AMQP properties without ever failing: no message may stop the worker.

aio-pika decodes frames with pamqp, which raises on a property that it cannot decode (text that is not UTF-8,
a timestamp beyond the year 9999). That closes the connection and the broker delivers the message again,
forever. `install_tolerant_decoders` makes such a property None. Each type has its length on the wire, so the
properties after it are decoded correctly.
"""

import re
import struct
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import pamqp.decode
import pamqp.encode
from aio_pika import DeliveryMode
from pamqp.common import FieldValue

Decoder = Callable[[bytes], tuple[int, FieldValue]]

MAX_ATTEMPTS_BELIEVED = 1000
MAX_DELIVERIES_BELIEVED = 1_000_000

ATTEMPTS_HEADER = "vqa-attempts"
MALFORMED_HEADER = "vqa-malformed-answers"
DELIVERIES_HEADER = "vqa-deliveries"
COPY_HEADER = "vqa-copy"
DIED_AT_HEADER = "vqa-died-at"
# W3C Trace Context, §3.2 and §3.3.
TRACEPARENT, TRACESTATE = "traceparent", "tracestate"
# Version 00 ends after its fields, later versions may add some, ff is invalid.
_TRACEPARENT = re.compile(
    r"(?:00(?=.{53}\Z)|(?!00|ff)[0-9a-f]{2})-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
)
MAX_TRACESTATE_CHARS = 512


def install_tolerant_decoders() -> None:
    """Replace pamqp's decoders of the property types whose content a publisher chooses freely."""
    lengths: dict[str, Callable[[bytes], int]] = {
        "shortstr": lambda data: 1 + int.from_bytes(data[:1]),
        "timestamp": lambda _: 8,
        "table": lambda data: 4 + int.from_bytes(data[:4]),
    }
    for kind, length_of in lengths.items():
        decoder = pamqp.decode.METHODS[kind]
        if not isinstance(decoder, _Tolerant):
            pamqp.decode.METHODS[kind] = _Tolerant(decoder, length_of)
    # aio-pika raises on delivery modes other than 1 and 2, which RabbitMQ 4 accepts.
    DeliveryMode._missing_ = classmethod(lambda modes, _: modes.NOT_PERSISTENT)  # type: ignore[assignment, method-assign]


class _Tolerant:
    """A decoder that returns None for a value that it cannot decode."""

    def __init__(self, decode: Decoder, length_of: Callable[[bytes], int]) -> None:
        self._decode = decode
        self._length_of = length_of

    def __call__(self, data: bytes) -> tuple[int, FieldValue]:
        try:
            return self._decode(data)
        except (ValueError, OverflowError, OSError, KeyError, IndexError, RecursionError):
            return self._length_of(data), None


def is_encodable(name: str, value: FieldValue) -> bool:
    """Return whether a received header can be published: pamqp decodes some that it cannot encode."""
    try:
        pamqp.encode.field_table({name: value})
    except (TypeError, ValueError, OverflowError, RecursionError, struct.error):
        return False
    return True


def text(value: object) -> str | None:
    """Return a property that should be text; None if it is anything else, or empty."""
    return value if isinstance(value, str) and value else None


def count(value: object, most: int) -> int:
    """Return a header that should be a number from 0 to `most`; 0 if it is anything else."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most:
        return value
    return 0


def trace_headers(headers: Mapping[str, Any]) -> dict[str, str]:
    """Return `traceparent` and `tracestate` if they conform to W3C Trace Context."""
    traceparent, tracestate = headers.get(TRACEPARENT), headers.get(TRACESTATE)
    if not isinstance(traceparent, str) or not _TRACEPARENT.fullmatch(traceparent):
        return {}
    trace = {TRACEPARENT: traceparent}
    if isinstance(tracestate, str) and tracestate.isprintable() and len(tracestate) <= MAX_TRACESTATE_CHARS:
        trace[TRACESTATE] = tracestate
    return trace


def with_trace(headers: Mapping[str, FieldValue], trace: Mapping[str, str]) -> dict[str, FieldValue]:
    """Return a message's headers with another trace context."""
    kept = {name: value for name, value in headers.items() if name not in {TRACEPARENT, TRACESTATE}}
    return {**kept, **trace}


def queued_s(enqueued_ms: int | None, timestamp: datetime | None, now: datetime) -> float | None:
    """Return the seconds in the queue: from the interceptor's milliseconds, else from the timestamp."""
    if enqueued_ms is not None:
        return max(0.0, now.timestamp() - enqueued_ms / 1000)
    if timestamp is not None:
        return max(0.0, (now - timestamp.astimezone(UTC)).total_seconds())
    return None
