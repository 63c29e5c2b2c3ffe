"""Messages that the worker publishes: their properties, and the headers that they have of a job."""

import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pamqp.encode
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.amqp import delivered, short
from tests.unit.fakes import a_delivery
from vqa_worker.messages.error_codes import ErrorCode
from vqa_worker.messages.result import Result, Usage
from vqa_worker.rabbitmq.outgoing import OutgoingMessage
from worker.jobs.delivery import Delivery
from worker.jobs.outcome import DeadLettered, Requeued, Retried
from worker.rabbitmq import messages

RETRIED = Retried(job_id="j", model="m", delay_s=1, attempts=3, reason="timeout")
REQUEUED = Requeued(job_id="j", model="m", reason="paused")

SENT = datetime(2030, 1, 1, tzinfo=UTC)
TRACE = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "tracestate": "x=1"}
RESULT = Result(id="job-1", status="succeeded", answer="A cat.")
DIED = DeadLettered(
    job_id="job-1",
    model="m",
    result=Result(id="job-1", status="failed"),
    code=ErrorCode.ATTEMPTS_EXHAUSTED,
    message="5 attempts failed",
    reason="5 attempts failed",
    attempts=5,
)
FULL: dict[str, Any] = {
    "body": b"{ }",
    "message_id": "m-1",
    "correlation_id": "c-1",
    "reply_to": "results.a",
    "content_type": "application/x-job",
    "content_encoding": "gzip",
    "type": "a.job",
    "app_id": "backend",
    "priority": 7,
    "expires_at": SENT + timedelta(days=10_000),
    "headers": {"tenant": "a", "x-request-id": "r-1", "nested": {"CC": [1]}},
    "timestamp": SENT,
    "trace": TRACE,
    "enqueued_ms": 1234,
    "counted_attempts": 2,
    "deliveries": 4,
    "copy": "an older copy",
}


def copies_of(delivery: Delivery) -> list[OutgoingMessage]:
    return [
        messages.retry_copy(delivery, "q", RETRIED),
        messages.requeued_copy(delivery, "q", REQUEUED),
        messages.dead_letter(delivery, "q", DIED),
    ]


def test_a_result_has_the_properties_of_its_type_and_job() -> None:
    before = datetime.now(UTC)
    reply = messages.reply(a_delivery(**FULL), RESULT, "results.a", exchange="replies")
    assert reply.body == RESULT.to_body()
    assert (reply.exchange, reply.routing_key, reply.mandatory) == ("replies", "results.a", True)
    assert (reply.content_type, reply.type, reply.app_id) == (
        "application/json",
        "vqa.result.v1",
        "vqa-worker",
    )
    assert reply.correlation_id == "c-1"
    assert reply.timestamp is not None
    assert before <= reply.timestamp <= datetime.now(UTC)
    assert reply.headers == TRACE
    assert reply.reply_to is None


@pytest.mark.parametrize(
    ("correlation_id", "job_id", "expected"),
    [
        ("c", "j", "c"),
        (None, "j", "j"),
        (None, None, None),
        ("c", None, "c"),
        (None, "j" * 255, "j" * 255),
        (None, "j" * 256, None),
        (None, "é" * 128, None),
    ],
)
def test_a_correlation_id_is_echoed_and_falls_back_to_the_jobs_id_if_it_fits(
    correlation_id: str | None, job_id: str | None, expected: str | None
) -> None:
    delivery = a_delivery(correlation_id=correlation_id)
    result = Result(id=job_id, status="failed")
    assert messages.reply(delivery, result, "results", exchange="").correlation_id == expected


def test_every_publish_of_a_result_has_a_new_message_id() -> None:
    replies = [messages.reply(a_delivery(**FULL), RESULT, "results.a", exchange="") for _ in range(2)]
    replies.append(messages.undeliverable(replies[0], "results"))
    ids = [reply.message_id for reply in replies]
    assert len({*ids, "m-1"}) == 4
    assert all(uuid.UUID(message_id) for message_id in ids)


def test_an_unroutable_result_goes_to_the_results_queue_with_its_original_reply_to() -> None:
    reply = messages.reply(a_delivery(**FULL), RESULT, "results.a", exchange="replies")
    undeliverable = messages.undeliverable(reply, "results")
    assert (undeliverable.exchange, undeliverable.routing_key) == ("replies", "results")
    assert undeliverable.headers == {**TRACE, "vqa-undeliverable-to": "results.a"}
    assert (undeliverable.body, undeliverable.correlation_id) == (reply.body, reply.correlation_id)
    assert reply.headers == TRACE


def test_a_direct_reply_uses_the_default_exchange_and_is_not_mandatory() -> None:
    reply = messages.reply(a_delivery(**FULL), RESULT, "amq.rabbitmq.reply-to.x", exchange="replies")
    direct = messages.to_direct_reply(reply)
    assert (direct.exchange, direct.mandatory, direct.routing_key) == ("", False, "amq.rabbitmq.reply-to.x")


@pytest.mark.parametrize("nth", range(3))
def test_a_copy_of_a_job_has_its_body_and_properties(nth: int) -> None:
    copy = copies_of(a_delivery(**FULL))[nth]
    assert (copy.exchange, copy.routing_key, copy.mandatory) == ("", "q", True)
    for name in (
        "body", "message_id", "correlation_id", "reply_to", "content_type", "content_encoding", "timestamp",
        "type", "app_id", "priority",
    ):  # fmt: skip
        assert getattr(copy, name) == FULL[name]
    assert FULL["headers"].items() <= copy.headers.items()
    assert TRACE.items() <= copy.headers.items()
    assert copy.headers["timestamp_in_ms"] == 1234


EXPIRES_AT = messages.rfc3339(FULL["expires_at"])


def own_headers(message: OutgoingMessage) -> dict[str, Any]:
    return {name: value for name, value in message.headers.items() if name.startswith("vqa-")}


def test_a_retry_carries_the_attempts_and_resets_the_delivery_count() -> None:
    headers = own_headers(messages.retry_copy(a_delivery(**FULL), "q", RETRIED))
    assert headers.pop("vqa-copy") not in {None, "an older copy"}
    assert headers == {"vqa-attempts": 3, "vqa-expires-at": EXPIRES_AT}


@pytest.mark.parametrize(
    ("attempts", "deliveries", "expected"),
    [
        (0, 1, {}),
        (2, 1, {"vqa-attempts": 2}),
        (0, 4, {"vqa-deliveries": 3}),
        (2, 4, {"vqa-attempts": 2, "vqa-deliveries": 3}),
    ],
)
def test_a_requeued_job_has_the_counts_from_before_this_delivery(
    attempts: int, deliveries: int, expected: dict[str, int]
) -> None:
    delivery = a_delivery(counted_attempts=attempts, deliveries=deliveries)
    headers = own_headers(messages.requeued_copy(delivery, "q", REQUEUED))
    assert headers.pop("vqa-copy")
    assert headers == expected


def test_a_dead_letter_has_the_reason_and_the_time() -> None:
    headers = own_headers(messages.dead_letter(a_delivery(**FULL), "q", DIED))
    died_at = datetime.fromisoformat(headers.pop("vqa-died-at"))
    assert abs((datetime.now(UTC) - died_at).total_seconds()) < 60
    assert headers == {
        "vqa-error-code": "attempts_exhausted",
        "vqa-error-message": "5 attempts failed",
        "vqa-attempts": 5,
    }


def wired(message: OutgoingMessage) -> Delivery:
    """Return the message as a consumer receives it."""
    properties = message.to_amqp().properties
    raw = {
        name: short(value.encode())
        for name in ("message_id", "correlation_id", "reply_to", "content_encoding", "expiration", "app_id")
        if (value := getattr(properties, name))
    }
    if properties.priority is not None:
        raw["priority"] = bytes([properties.priority])
    return delivered({**raw, "headers": pamqp.encode.field_table(dict(message.headers))})


@pytest.mark.parametrize(("restored_attempts", "left"), [(0, 3), (1, 2), (3, None)])
def test_a_requeued_job_has_fewer_attempts_if_an_outage_caused_some(
    restored_attempts: int, left: int | None
) -> None:
    delivery = a_delivery(counted_attempts=3)
    copy = messages.requeued_copy(delivery, "q", replace(REQUEUED, restored_attempts=restored_attempts))
    assert copy.headers.get("vqa-attempts") == left


@given(attempts=st.integers(0, 20), deliveries=st.integers(1, 50), times=st.integers(1, 5))
def test_requeueing_any_number_of_times_keeps_the_counts(attempts: int, deliveries: int, times: int) -> None:
    delivery = a_delivery(b"{}", counted_attempts=attempts, deliveries=deliveries)
    for _ in range(times):
        again = wired(messages.requeued_copy(delivery, "q", REQUEUED))
        assert (again.counted_attempts, again.deliveries) == (attempts, deliveries)
        assert again.key != delivery.key
        delivery = again


def test_a_retry_arrives_with_its_attempts_as_a_first_delivery() -> None:
    again = wired(messages.retry_copy(a_delivery(counted_attempts=2, deliveries=4), "q", RETRIED))
    assert (again.counted_attempts, again.deliveries) == (3, 1)


def test_a_replayed_dead_letter_has_no_attempts() -> None:
    again = wired(
        messages.dead_letter(a_delivery(counted_attempts=4, deliveries=4, message_id="m"), "q", DIED)
    )
    assert (again.counted_attempts, again.deliveries, again.message_id) == (0, 1, "m")


@pytest.mark.parametrize("nth", range(3))
def test_the_copy_of_a_job_without_a_message_id_has_none(nth: int) -> None:
    copy = copies_of(a_delivery(message_id=None))[nth]
    assert wired(copy).message_id is None
    assert wired(copies_of(wired(copy))[nth]).message_id is None


# Expiration


@pytest.mark.parametrize("nth", range(2), ids=["retried", "requeued"])
def test_a_copy_keeps_the_rest_of_its_expiration(nth: int) -> None:
    expires_at = datetime.now(UTC) + timedelta(seconds=60)
    copy = copies_of(a_delivery(expires_at=expires_at))[nth]
    assert copy.expires_in_s is not None
    assert 30 < copy.expires_in_s <= 60
    assert own_headers(copy)["vqa-expires-at"] == messages.rfc3339(expires_at)


@pytest.mark.parametrize(
    "expires_at", [None, datetime(2020, 1, 1, tzinfo=UTC), datetime.max.replace(tzinfo=UTC)]
)
def test_a_copy_has_no_expiration_that_rabbitmq_would_refuse(expires_at: datetime | None) -> None:
    for copy in copies_of(a_delivery(expires_at=expires_at))[:2]:
        assert copy.expires_in_s is None
        assert ("vqa-expires-at" in copy.headers) == (expires_at is not None)


def test_a_dead_letter_and_its_replay_do_not_expire() -> None:
    dead_letter = messages.dead_letter(a_delivery(**FULL), "q", DIED)
    by_broker = a_delivery(**FULL)
    for message in (dead_letter, messages.replayed(by_broker, "q")):
        assert message.expires_in_s is None
        assert "vqa-expires-at" not in message.headers
        assert wired(message).expires_at is None


@given(times=st.integers(1, 5), retried=st.booleans())
def test_the_expiry_stays_the_same_in_all_copies(times: int, *, retried: bool) -> None:
    delivery = a_delivery(expires_at=datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1))
    for _ in range(times):
        copy = (
            messages.retry_copy(delivery, "q", RETRIED)
            if retried
            else messages.requeued_copy(delivery, "q", REQUEUED)
        )
        assert wired(copy).expires_at == delivery.expires_at
        delivery = wired(copy)


@pytest.mark.parametrize("nth", range(3))
@pytest.mark.parametrize("priority", [None, 1, 255])
def test_a_job_without_a_priority_gets_none(priority: int | None, nth: int) -> None:
    copy = copies_of(a_delivery(priority=priority))[nth]
    assert copy.to_amqp().properties.priority == priority
    assert wired(copy).priority == priority


# Headers

FORBIDDEN = [
    "CC",
    "BCC",
    "cc",
    "x-death",
    "x-first-death-queue",
    "x-last-death-reason",
    "x-delivery-count",
    "x-acquired-count",
    "x-received-from",
    "x-opt-count",
    "x-stream-offset",
    "vqa-undeliverable-to",
    "vqa-anything",
]
WORKERS = {
    "traceparent", "tracestate", "timestamp_in_ms", "vqa-attempts", "vqa-deliveries", "vqa-copy",
    "vqa-error-code", "vqa-error-message", "vqa-died-at", "vqa-expires-at", "vqa-malformed-answers",
    "vqa-unusable-usage",
}  # fmt: skip


@given(
    headers=st.dictionaries(
        st.sampled_from([*FORBIDDEN, *WORKERS]) | st.text(max_size=10),
        st.text(max_size=10) | st.integers(0, 9) | st.lists(st.text(max_size=3), max_size=2),
        max_size=6,
    )
)
def test_copies_have_the_publishers_headers_and_a_result_has_none(headers: dict[str, Any]) -> None:
    delivery = delivered({"headers": pamqp.encode.field_table(headers), "expiration": short(b"1000")})
    reply = messages.reply(delivery, RESULT, "results", exchange="")
    assert set(reply.headers) <= {"traceparent", "tracestate"}
    own = {
        name: value for name, value in headers.items() if name not in WORKERS and name not in FORBIDDEN
        and not name.lower().startswith("vqa-")
    }  # fmt: skip
    for copy in copies_of(delivery):
        assert {name: value for name, value in copy.headers.items() if name not in WORKERS} == own
        assert copy.to_amqp().user_id is None


@pytest.mark.parametrize(
    "headers",
    [
        {f"header {n}": n for n in range(1001)},
        {"list": list(range(1000))},
        {"nested": [[1] * 10] * 100},
        {"long": "x" * 70_000},
        {f"long {n}": "x" * 1000 for n in range(70)},
    ],
)
def test_headers_that_would_not_fit_are_not_copied(headers: dict[str, Any]) -> None:
    delivery = delivered({"headers": pamqp.encode.field_table({**headers, "vqa-attempts": 2})})
    for copy in copies_of(delivery):
        assert set(copy.headers) <= WORKERS
    assert messages.requeued_copy(delivery, "q", REQUEUED).headers["vqa-attempts"] == 2


def test_a_header_that_cannot_be_encoded_again_is_left_out() -> None:
    long = "é" * 65
    headers = {"set": {1}, long: 1, "nested": [{long: 1}], "fine": "x", "é" * 64: 1}
    for copy in copies_of(a_delivery(headers=headers)):
        assert not {"set", long, "nested"} & copy.headers.keys()
        assert {"fine", "é" * 64} <= copy.headers.keys()


def test_copies_carry_the_usage_of_unusable_answers() -> None:
    usage = Usage(prompt_tokens=3, completion_tokens=None, total_tokens=9, cost_usd=1e-7, cached_tokens=2)
    for copy, expected in (
        (messages.retry_copy(a_delivery(), "q", RETRIED), None),
        (messages.retry_copy(a_delivery(), "q", replace(RETRIED, unusable=usage)), usage),
        (messages.requeued_copy(a_delivery(), "q", replace(REQUEUED, unusable=usage)), usage),
        (messages.replayed(a_delivery(unusable=usage), "q"), None),
    ):
        assert wired(copy).unusable == expected


@pytest.mark.parametrize("value", ["", "{", "[]", '{"prompt_tokens":-1}', '{"x":1}', 5, "9" * 2000, None])
def test_a_usage_in_a_header_that_cannot_be_read_is_ignored(value: Any) -> None:
    headers = pamqp.encode.field_table({"vqa-unusable-usage": value})
    assert delivered({"headers": headers}).unusable is None


def test_copies_carry_the_number_of_malformed_answers() -> None:
    for copy, expected in (
        (messages.retry_copy(a_delivery(), "q", RETRIED), 0),
        (messages.retry_copy(a_delivery(), "q", replace(RETRIED, malformed_answers=1)), 1),
        (messages.requeued_copy(a_delivery(), "q", replace(REQUEUED, malformed_answers=1)), 1),
        (messages.replayed(a_delivery(malformed_answers=1), "q"), 0),
    ):
        assert wired(copy).malformed_answers == expected
