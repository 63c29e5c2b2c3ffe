"""Read AMQP properties without ever failing: no message may stop the worker.

aio-pika decodes frames with pamqp, which raises on a property that it cannot decode (text that is not UTF-8,
a timestamp beyond the year 9999). That closes the connection and the broker delivers the message again,
forever. `install_tolerant_decoders` makes such a property None. Each type has its length on the wire, so the
properties after it are decoded correctly.
"""

import re
import struct
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pamqp.decode
import pamqp.encode
from aio_pika import DeliveryMode
from pamqp.common import FieldValue
from pydantic import ValidationError

from vqa_worker.messages.job import parse_deadline
from vqa_worker.messages.result import Usage
from vqa_worker.rabbitmq.outgoing import ENQUEUED_HEADER

Decoder = Callable[[bytes], tuple[int, FieldValue]]

MAX_ATTEMPTS_BELIEVED = 1000
MAX_DELIVERIES_BELIEVED = 1_000_000

ATTEMPTS_HEADER = "vqa-attempts"
MALFORMED_HEADER = "vqa-malformed-answers"
UNUSABLE_HEADER = "vqa-unusable-usage"
DELIVERIES_HEADER = "vqa-deliveries"
COPY_HEADER = "vqa-copy"
DIED_AT_HEADER = "vqa-died-at"
EXPIRES_AT_HEADER = "vqa-expires-at"
MAX_USAGE_CHARS = 1000
# W3C Trace Context, §3.2 and §3.3.
TRACEPARENT, TRACESTATE = "traceparent", "tracestate"
# Version 00 ends after its fields, later versions may add some, ff is invalid.
_TRACEPARENT = re.compile(
    r"(?:00(?=.{53}\Z)|(?!00|ff)[0-9a-f]{2})-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
)
MAX_TRACESTATE_CHARS = 512

# Headers that copies do not get, in lower case: RabbitMQ routes by them, or it and its plugins set them.
_NOT_COPIED = frozenset(
    {
        "cc", "bcc", "x-death", "x-delivery-count", "x-acquired-count", "x-received-from", "x-shovelled",
        "x-stream-offset", "x-stream-filter", "x-stream-filter-value",
    }
)  # fmt: skip
_NOT_COPIED_PREFIXES = ("vqa-", "x-first-death-", "x-last-death-", "x-opt-")
# The worker sets these itself.
_SET_BY_COPIES = frozenset({TRACEPARENT, TRACESTATE, ENQUEUED_HEADER})
# Values in the headers of a job, nested ones included; a value can take a hundred times its size in memory.
MAX_KEPT_VALUES = 1000
# AMQP 0-9-1, §4.2.5.5.
MAX_NAME_BYTES = 128
# The headers of a message must fit into one frame, by default of 128 KiB, also with the worker's own.
MAX_KEPT_BYTES = 64 * 1024
# RabbitMQ refuses a longer expiration (its maximum is 2**32 - 1 ms).
MAX_EXPIRATION_S = 2**32 / 1000


def install_tolerant_decoders() -> None:
    """Replace pamqp's decoders of the property types whose content a publisher chooses freely.

    Numbers in headers are encoded again without loss: pamqp sends floats in single precision.
    """
    lengths: dict[str, Callable[[bytes], int]] = {
        "shortstr": lambda data: 1 + int.from_bytes(data[:1]),
        "timestamp": lambda _: 8,
        "table": lambda data: 4 + int.from_bytes(data[:4]),
    }
    for kind, length_of in lengths.items():
        decoder = pamqp.decode.METHODS[kind]
        if not isinstance(decoder, _Tolerant):
            pamqp.decode.METHODS[kind] = _Tolerant(decoder, length_of)
    pamqp.encode.encode_table_value = _encode_table_value
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


_encode_value = pamqp.encode.encode_table_value


def _encode_table_value(value: Any) -> bytes:
    return b"d" + pamqp.encode.double(value) if isinstance(value, float) else _encode_value(value)


def is_encodable(name: str, value: FieldValue) -> bool:
    """Return whether a received header can be published: pamqp decodes some that it cannot encode.

    It shortens longer names than AMQP allows, and logs them.
    """
    try:
        return not _has_long_name({name: value}) and bool(pamqp.encode.field_table({name: value}))
    except (TypeError, ValueError, OverflowError, RecursionError, struct.error):
        return False


def _has_long_name(value: FieldValue) -> bool:
    match value:
        case dict():
            return any(
                len(name.encode(errors="replace")) > MAX_NAME_BYTES or _has_long_name(item)
                for name, item in value.items()
            )
        case list():
            return any(map(_has_long_name, value))
        case _:
            return False


def text(value: object) -> str | None:
    """Return a property that should be text; None if it is anything else, or empty."""
    return value if isinstance(value, str) and value else None


def usage(value: object) -> Usage | None:
    """Return a header that should be a usage in JSON; None if it is anything else."""
    if not isinstance(value, str) or len(value) > MAX_USAGE_CHARS:
        return None
    try:
        return Usage.model_validate_json(value)
    except ValidationError:
        return None


def count(value: object, most: int) -> int:
    """Return a header that should be a number from 0 to `most`; 0 if it is anything else."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most:
        return value
    return 0


def publisher_headers(headers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the headers of a job that its copies keep; none if they have over `MAX_KEPT_VALUES` values."""
    kept = {name: value for name, value in headers.items() if _is_publishers(name)}
    return kept if _count_values(kept, MAX_KEPT_VALUES) <= MAX_KEPT_VALUES else {}


def _is_publishers(name: str) -> bool:
    lower = name.lower()
    is_brokers = lower in _NOT_COPIED or lower.startswith(_NOT_COPIED_PREFIXES)
    return not is_brokers and name not in _SET_BY_COPIES


def _count_values(value: Any, most: int) -> int:
    """Count the values in a header's value; stop after `most`."""
    counted, left = 0, [value]
    while left and counted <= most:
        match left.pop():
            case dict() as table:
                left += table.values()
                counted += len(table)
            case list() as array:
                left += array
                counted += len(array)
    return counted


def encodable(headers: Mapping[str, Any]) -> dict[str, FieldValue]:
    """Return the headers that can be published again; none if they are longer than `MAX_KEPT_BYTES`."""
    found = {name: value for name, value in headers.items() if is_encodable(name, value)}
    return found if len(pamqp.encode.field_table(found)) <= MAX_KEPT_BYTES else {}


def expires_at(
    headers: Mapping[str, Any], expiration_s: float | None, queued_s: float | None, now: datetime
) -> datetime | None:
    """Return when a message expires, or None: as a copy carries it, else by its `expiration` property.

    RabbitMQ counts the expiration from the moment when the message entered the queue. `queued_s` cannot be
    the time since then if it is longer, because RabbitMQ does not deliver expired messages.
    """
    try:
        carried = parse_deadline(headers.get(EXPIRES_AT_HEADER))
    except ValueError:
        carried = None
    if carried is not None or expiration_s is None or not 0 <= expiration_s <= MAX_EXPIRATION_S:
        return carried
    left_s = expiration_s - (queued_s or 0.0)
    return now + timedelta(seconds=left_s if left_s > 0 else expiration_s)


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
