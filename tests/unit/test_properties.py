"""AMQP properties with any content are read without errors."""

import struct
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pamqp.decode
import pamqp.encode
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pamqp.commands import Basic

from tests.unit.amqp import delivered, received, short, table
from worker.jobs.delivery import Delivery
from worker.rabbitmq import properties

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


@pytest.fixture(scope="module", autouse=True)
def _tolerant_decoders() -> Iterator[None]:
    before = dict(pamqp.decode.METHODS)
    properties.install_tolerant_decoders()
    yield
    pamqp.decode.METHODS.update(before)


# The decoders.

SHORT_STRINGS = st.binary(max_size=255).map(short)
TABLES = st.binary(max_size=100).map(table)
KINDS = {
    "headers": TABLES,
    "delivery_mode": st.binary(min_size=1, max_size=1),
    "priority": st.binary(min_size=1, max_size=1),
    "expiration": st.integers(0, 2**32).map(lambda ms: short(str(ms).encode())),
    "timestamp": st.binary(min_size=8, max_size=8),
}
NAMES = [name for name in Basic.Properties.flags if name not in {"app_id", "cluster_id"}]
PROPERTIES = st.fixed_dictionaries({}, optional={name: KINDS.get(name, SHORT_STRINGS) for name in NAMES})


@given(raw=PROPERTIES)
@example(raw={"message_id": short(b"\xff")})
@example(raw={"timestamp": b"\xff" * 8})
@example(raw={"headers": table(b"\x01kZ")})
@example(raw={"headers": table(b"\x01kS\x7f\xff\xff\xff")})
def test_an_undecodable_property_does_not_affect_the_ones_after_it(raw: dict[str, bytes]) -> None:
    assert received(raw).properties.app_id == "the end"


@given(raw=PROPERTIES, redelivered=st.booleans())
def test_every_message_becomes_a_delivery(raw: dict[str, bytes], redelivered: bool) -> None:
    delivery = delivered(raw, redelivered=redelivered)
    assert delivery.redelivered is redelivered
    for name in ("message_id", "correlation_id", "reply_to", "content_type"):
        text = getattr(delivery, name)
        assert text is None or short(text.encode()) == raw[name]
    assert delivery.counted_attempts >= 0
    assert delivery.deliveries >= 1
    assert delivery.queued_s is None or delivery.queued_s >= 0
    assert delivery.key == delivered(raw).key


HEADER_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, width=32)
    | st.text(max_size=20)
    | st.binary(max_size=20).map(bytearray)
    | st.integers(0, 2**32 - 1).map(lambda seconds: datetime.fromtimestamp(seconds, UTC))
    | st.integers(0, 9999).map(lambda cents: Decimal(cents) / 100),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=6,
)


@given(
    headers=st.dictionaries(st.text(max_size=20), HEADER_VALUES, max_size=4),
    message_id=st.text(max_size=60),
    timestamp=st.integers(0, 2**32 - 1),
)
def test_valid_properties_are_decoded_as_by_pamqp(
    headers: dict[str, Any], message_id: str, timestamp: int
) -> None:
    raw = {
        "headers": pamqp.encode.field_table(headers),
        "message_id": short(message_id.encode()),
        "timestamp": struct.pack(">Q", timestamp),
    }
    properties = received(raw).properties
    assert properties.headers == pamqp.decode.field_table(raw["headers"])[1]
    assert (properties.message_id or "") == message_id
    assert properties.timestamp == datetime.fromtimestamp(timestamp, UTC)


@given(kind=st.sampled_from(["shortstr", "timestamp", "table"]), data=st.binary(max_size=40))
def test_no_bytes_make_a_decoder_raise(kind: str, data: bytes) -> None:
    consumed, value = pamqp.decode.METHODS[kind](data)
    assert consumed > 0 or value is not None


def test_deeply_nested_tables_are_decoded_safely() -> None:
    nested = b""
    for _ in range(3000):
        nested = b"\x01kF" + table(nested)
    assert received({"headers": table(nested), "message_id": short(b"m")}).properties.message_id == "m"


def test_an_undecodable_header_empties_the_headers_and_no_property() -> None:
    delivery = delivered(
        {"headers": table(b"\x0cvqa-attemptsI\x00\x00\x00\x02\x01kZ"), "message_id": short(b"m")}
    )
    assert (delivery.counted_attempts, delivery.message_id) == (0, "m")


def test_decoders_are_installed_once() -> None:
    before = dict(pamqp.decode.METHODS)
    properties.install_tolerant_decoders()
    assert before == pamqp.decode.METHODS


def test_a_number_in_a_header_is_encoded_again_without_loss() -> None:
    raw = table(b"\x05ratiod" + struct.pack(">d", 0.1))
    headers = received({"headers": raw}).properties.headers
    assert pamqp.encode.field_table(headers or {}) == raw


# Headers


def with_headers(**headers: Any) -> Delivery:
    return delivered(
        {"headers": pamqp.encode.field_table({k.replace("_", "-"): v for k, v in headers.items()})}
    )


@pytest.mark.parametrize(
    ("value", "counted"),
    [
        (0, 0), (1, 1), (7, 7), (properties.MAX_ATTEMPTS_BELIEVED, properties.MAX_ATTEMPTS_BELIEVED),
        (properties.MAX_ATTEMPTS_BELIEVED + 1, 0), (2**62, 0), (-1, 0), (True, 0),
        ("3", 0), (3.0, 0), (None, 0),
        ([3], 0), ({"a": 3}, 0), (bytearray(b"3"), 0), (Decimal(3), 0),
    ],
)  # fmt: skip
def test_attempts_are_a_small_whole_number_or_zero(value: Any, counted: int) -> None:
    assert with_headers(vqa_attempts=value).counted_attempts == counted


def test_a_replayed_dead_letter_starts_with_zero_attempts() -> None:
    assert with_headers(vqa_attempts=5, vqa_died_at="2030-01-01T00:00:00Z").counted_attempts == 0


@pytest.mark.parametrize(
    ("headers", "deliveries"),
    [
        ({}, 1),
        ({"x_delivery_count": 2}, 3),
        ({"vqa_deliveries": 2}, 3),
        ({"x_delivery_count": 2, "vqa_deliveries": 3}, 6),
        ({"x_delivery_count": "many", "vqa_deliveries": -3}, 1),
        ({"x_delivery_count": 2**40, "vqa_deliveries": True}, 1),
    ],
)
def test_deliveries_are_the_sum_of_the_brokers_count_and_the_copys_header(
    headers: dict[str, Any], deliveries: int
) -> None:
    assert with_headers(**headers).deliveries == deliveries


def test_a_copy_differs_from_its_original() -> None:
    original, copy, other = with_headers(), with_headers(vqa_copy="c1"), with_headers(vqa_copy="c2")
    assert original.copy is None
    assert copy.copy == "c1"
    assert len({original.key, copy.key, other.key, with_headers(vqa_copy="c1").key}) == 3


@given(
    properties=st.lists(
        st.fixed_dictionaries(
            {name: st.none() | st.text(max_size=3) for name in ("message_id", "correlation_id")}
        ),
        min_size=2,
        max_size=2,
        unique_by=str,
    )
)
def test_messages_with_different_properties_have_different_keys(
    properties: list[dict[str, str | None]],
) -> None:
    first, second = (delivered({k: short(v.encode()) for k, v in each.items() if v}) for each in properties)
    same = all(
        (a or None) == (b or None) for a, b in zip(*(each.values() for each in properties), strict=True)
    )
    assert (first.key == second.key) is same


NOW = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("enqueued_ms", "timestamp", "seconds"),
    [
        (None, None, None),
        (int(NOW.timestamp() * 1000) - 1500, None, 1.5),
        (int(NOW.timestamp() * 1000) - 1500, NOW - timedelta(hours=1), 1.5),
        (None, NOW - timedelta(seconds=3), 3.0),
        (None, NOW + timedelta(hours=1), 0.0),
        (int(NOW.timestamp() * 1000) + 5000, None, 0.0),
        (None, datetime.min.replace(tzinfo=UTC), (NOW - datetime.min.replace(tzinfo=UTC)).total_seconds()),
        (None, datetime.max.replace(tzinfo=UTC), 0.0),
        (2**53, None, 0.0),
    ],
)
def test_the_time_in_the_queue_is_never_negative(
    enqueued_ms: int | None, timestamp: datetime | None, seconds: float | None
) -> None:
    assert properties.queued_s(enqueued_ms, timestamp, NOW) == seconds


def test_the_brokers_timestamp_takes_precedence_over_the_publishers() -> None:
    ms = int((datetime.now(UTC) - timedelta(minutes=5)).timestamp() * 1000)
    raw = {
        "headers": pamqp.encode.field_table({"timestamp_in_ms": ms}),
        "timestamp": struct.pack(">Q", ms // 1000 - 10_000),
    }
    delivery = delivered(raw)
    assert delivery.enqueued_ms == ms
    assert delivery.queued_s == pytest.approx(300, abs=60)


@pytest.mark.parametrize(
    "traceparent",
    [
        f"00-{TRACE}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-00",
        f"cc-{TRACE}-{PARENT}-01",
        f"cc-{TRACE}-{PARENT}-01-more",
    ],
)
def test_a_trace_is_continued(traceparent: str) -> None:
    headers = {"traceparent": traceparent, "tracestate": "a=1,b=2", "other": "x"}
    assert properties.trace_headers(headers) == {"traceparent": traceparent, "tracestate": "a=1,b=2"}
    assert properties.trace_headers({"traceparent": traceparent}) == {"traceparent": traceparent}


@pytest.mark.parametrize(
    "traceparent",
    [
        None, "", 5, b"x", f"00-{TRACE}-{PARENT}", f"00-{'0' * 32}-{PARENT}-01", f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{PARENT}-01", f"00-{TRACE.upper()}-{PARENT}-01", f"00-{TRACE[:-1]}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01\n", f" 00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-01x",
        f"0-{TRACE}-{PARENT}-01",
    ],
)  # fmt: skip
def test_an_invalid_trace_is_dropped_with_its_state(traceparent: Any) -> None:
    assert properties.trace_headers({"traceparent": traceparent, "tracestate": "a=1"}) == {}


@pytest.mark.parametrize("tracestate", [5, None, "a=1\n", "a=\x00", "a=" + "x" * 511, b"a=1"])
def test_an_invalid_trace_state_does_not_drop_the_trace(tracestate: Any) -> None:
    traceparent = f"00-{TRACE}-{PARENT}-01"
    headers = {"traceparent": traceparent, "tracestate": tracestate}
    assert properties.trace_headers(headers) == {"traceparent": traceparent}


# Expiration


def expiring(expiration: bytes | None = None, **raw: Any) -> datetime | None:
    headers = pamqp.encode.field_table({k.replace("_", "-"): v for k, v in raw.pop("headers", {}).items()})
    found = {"headers": headers, **raw}
    return delivered({**found, "expiration": short(expiration)} if expiration else found).expires_at


def seconds_from_now(moment: datetime | None) -> float:
    assert moment is not None
    return (moment - datetime.now(UTC)).total_seconds()


def test_an_expiration_counts_from_the_moment_when_the_job_was_sent() -> None:
    sent = struct.pack(">Q", int(datetime.now(UTC).timestamp()) - 40)
    assert 10 < seconds_from_now(expiring(b"60000", timestamp=sent)) <= 20
    assert 50 < seconds_from_now(expiring(b"60000")) <= 60
    assert expiring() is None


@pytest.mark.parametrize("seconds", [-3600, 60, 70])
def test_a_delivered_job_has_not_expired_so_its_timestamp_is_not_when_it_was_sent(seconds: int) -> None:
    sent = struct.pack(">Q", int(datetime.now(UTC).timestamp()) - seconds)
    assert 50 < seconds_from_now(expiring(b"60000", timestamp=sent)) <= 60


@pytest.mark.parametrize("expiration", [None, b"60000"])
def test_a_copy_carries_when_the_job_expires(expiration: bytes | None) -> None:
    headers = {"vqa_expires_at": "2030-01-31T12:00:00.500Z"}
    expected = datetime(2030, 1, 31, 12, 0, 0, 500_000, UTC)
    assert expiring(expiration, headers=headers) == expected


@pytest.mark.parametrize("value", [7, "soon", "", None, [1], "9999-99-99T00:00:00Z"])
def test_an_invalid_time_of_expiry_is_ignored(value: Any) -> None:
    assert expiring(headers={"vqa_expires_at": value}) is None
    assert 50 < seconds_from_now(expiring(b"60000", headers={"vqa_expires_at": value})) <= 60
