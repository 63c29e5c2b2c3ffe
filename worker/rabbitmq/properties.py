"""What AMQP properties say, read without ever failing: the worker must not stop on any message.

aio-pika reads frames by pamqp, which raises on a property that it cannot decode (text that is not
UTF-8, a timestamp beyond the year 9999). In the connection's reader that ends the connection; the
broker delivers the message again, and so for ever. `install_tolerant_decoders` makes such a property
come out empty instead. Each kind says its own length on the wire, so that what follows it is read right.
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

# AMQP 0-9-1: the longest short string.
MAX_SHORT_BYTES = 255
MAX_ATTEMPTS_BELIEVED = 1000
MAX_DELIVERIES_BELIEVED = 1_000_000

ATTEMPTS_HEADER = "vqa-attempts"
DELIVERIES_HEADER = "vqa-deliveries"
COPY_HEADER = "vqa-copy"
DIED_AT_HEADER = "vqa-died-at"
ENQUEUED_HEADER = "timestamp_in_ms"
# W3C Trace Context, §3.2 and §3.3.
TRACEPARENT, TRACESTATE = "traceparent", "tracestate"
# Version 00 ends where its fields end; later ones may add some; ff is none.
_TRACEPARENT = re.compile(
    r"(?:00(?=.{53}\Z)|(?!00|ff)[0-9a-f]{2})-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
)
MAX_TRACESTATE_CHARS = 512


def install_tolerant_decoders() -> None:
    """Replace pamqp's decoders of the property types that a publisher can fill with anything."""
    lengths: dict[str, Callable[[bytes], int]] = {
        "shortstr": lambda data: 1 + int.from_bytes(data[:1]),
        "timestamp": lambda _: 8,
        "table": lambda data: 4 + int.from_bytes(data[:4]),
    }
    for kind, length_of in lengths.items():
        decoder = pamqp.decode.METHODS[kind]
        if not isinstance(decoder, _Tolerant):
            pamqp.decode.METHODS[kind] = _Tolerant(decoder, length_of)
    # aio-pika itself raises on delivery modes other than 1 and 2, which RabbitMQ 4 lets pass.
    DeliveryMode._missing_ = classmethod(lambda modes, _: modes.NOT_PERSISTENT)  # type: ignore[assignment, method-assign]


class _Tolerant:
    """A decoder that skips what it cannot decode."""

    def __init__(self, decode: Decoder, length_of: Callable[[bytes], int]) -> None:
        self._decode = decode
        self._length_of = length_of

    def __call__(self, data: bytes) -> tuple[int, FieldValue]:
        try:
            return self._decode(data)
        except (ValueError, OverflowError, OSError, KeyError, IndexError, RecursionError):
            return self._length_of(data), None


def can_be_said(name: str, value: FieldValue) -> bool:
    """Whether a header that came can go out again: the library reads some that it cannot write."""
    try:
        pamqp.encode.field_table({name: value})
    except (TypeError, ValueError, OverflowError, RecursionError, struct.error):
        return False
    return True


def text(value: object) -> str | None:
    """A property that should be text."""
    return value if isinstance(value, str) and value else None


def count(value: object, most: int) -> int:
    """A header that should be a small whole number; anything else counts as none."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most:
        return value
    return 0


def trace_headers(headers: Mapping[str, Any]) -> dict[str, str]:
    """`traceparent` and `tracestate`, if they are what the standard says."""
    traceparent, tracestate = headers.get(TRACEPARENT), headers.get(TRACESTATE)
    if not isinstance(traceparent, str) or not _TRACEPARENT.fullmatch(traceparent):
        return {}
    trace = {TRACEPARENT: traceparent}
    if isinstance(tracestate, str) and tracestate.isprintable() and len(tracestate) <= MAX_TRACESTATE_CHARS:
        trace[TRACESTATE] = tracestate
    return trace


def with_trace(headers: Mapping[str, FieldValue], trace: Mapping[str, str]) -> dict[str, FieldValue]:
    """A message's headers, going on with another step of the trace than they did."""
    kept = {name: value for name, value in headers.items() if name not in {TRACEPARENT, TRACESTATE}}
    return {**kept, **trace}


def queued_s(enqueued_ms: int | None, timestamp: datetime | None, now: datetime) -> float | None:
    """Seconds in the queue: by the interceptor's milliseconds, else by the timestamp's whole seconds."""
    if enqueued_ms is not None:
        return max(0.0, now.timestamp() - enqueued_ms / 1000)
    if timestamp is not None:
        return max(0.0, (now - timestamp.astimezone(UTC)).total_seconds())
    return None
