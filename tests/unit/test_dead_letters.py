"""Dead letters are read with any content, and commands select and show them."""

import asyncio
import base64
import gzip
import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aio_pika
import pamqp.decode
import pamqp.encode
import pamqp.frame
import pytest
from aiormq.abc import DeliveredMessage
from hypothesis import example, given
from hypothesis import strategies as st
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from vqa_worker.rabbitmq.outgoing import OutgoingMessage
from worker.cli.dlq import render
from worker.cli.dlq.commands import Filters
from worker.cli.shell import CommandError
from worker.cli.state_dir import append_lines
from worker.cli.times import parse_time
from worker.rabbitmq import messages
from worker.rabbitmq.dead_letter_record import DeadLetter
from worker.rabbitmq.dead_letters import FetchedDeadLetter
from worker.rabbitmq.properties import install_tolerant_decoders, is_encodable

NOW = datetime(2030, 1, 31, 12, 0, tzinfo=UTC)

install_tolerant_decoders()


def arrived(body: bytes, properties: Basic.Properties) -> FetchedDeadLetter:
    """Return a message with these properties as a client library delivers it."""
    get = Basic.GetOk(1, False, "", "dead", 0)  # noqa: FBT003 - the library's own order
    header = ContentHeader(0, len(body), properties)
    message: Any = DeliveredMessage(delivery=get, header=header, body=body, channel=None)  # type: ignore[arg-type]
    return FetchedDeadLetter(aio_pika.IncomingMessage(message))


def record(body: bytes = b"{}", headers: Mapping[str, Any] | None = None, **properties: Any) -> DeadLetter:
    return arrived(body, Basic.Properties(headers=dict(headers or {}), **properties)).record


def sent(message: OutgoingMessage) -> FetchedDeadLetter:
    """Return a message of the worker's publisher after encoding and decoding."""
    made = message.to_amqp()
    frame = pamqp.frame.marshal(ContentHeader(0, len(made.body), made.properties), 1)
    _, _, header = pamqp.frame.unmarshal(frame)
    assert isinstance(header, ContentHeader)
    return arrived(message.body, header.properties)


_names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5) | st.sampled_from(
    [
        "vqa-error-code",
        "vqa-error-message",
        "vqa-died-at",
        "vqa-attempts",
        "vqa-copy",
        "x-death",
        "CC",
        "traceparent",
    ]
)
_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"), max_size=5)
    | st.binary(max_size=5)
    | st.integers(0, 2**32 - 1).map(lambda seconds: datetime.fromtimestamp(seconds, UTC)),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(_names, inner, max_size=2),
    max_leaves=4,
)
_bodies = st.binary(max_size=8) | st.sampled_from(
    [
        b'{"id": "a", "model": "m"}',
        b'{"model": 1, "deadline": []}',
        b"[" * 100_000,
        b'{"id": "\\ud800"}',
        b"null",
    ]
)


@given(
    _bodies, st.dictionaries(_names, _values, max_size=4), st.none() | st.text("ab", min_size=1, max_size=3)
)
@example(b"{}", {"x-death": [{"reason": "rejected", "time": NOW, "count": 1}]}, None)
@example(b"{}", {"vqa-died-at": "2030-01-31T12:00:00.5+01:00", "vqa-error-code": 7}, "a")
def test_any_dead_letter_can_be_read_and_is_the_same_when_renewed(
    body: bytes, headers: dict[str, Any], message_id: str | None
) -> None:
    held = arrived(body, Basic.Properties(headers=headers, message_id=message_id))
    new = sent(messages.renewed(held.delivery, "dead", held.record.headers_when_renewed(held.headers)))
    assert new.record == held.record
    assert new.body == body
    for name, value in held.headers.items():
        if name not in messages.DROPPED_HEADERS | {"vqa-copy"} and is_encodable(name, value):
            # pamqp encodes floating-point numbers in single precision.
            _, said = pamqp.decode.field_table(pamqp.encode.field_table({name: value}))
            assert new.headers[name] == said[name]
    json.dumps(render.full_json(held))
    assert all(line.isprintable() for line in [*render.table([held.record]), *render.page(held)])


def test_a_dead_letter_of_the_worker_has_every_field() -> None:
    body = json.dumps({"id": "a", "model": "m", "deadline": "2030-01-31T12:00:00Z"}).encode()
    headers = {
        "vqa-error-code": "attempts_exhausted",
        "vqa-error-message": "the API answered 500",
        "vqa-attempts": 5,
        "vqa-died-at": "2030-01-31T13:00:00.250+01:00",
        "x-delivery-count": 2,
    }
    found = record(body, headers, message_id="i", correlation_id="c", reply_to="r")
    assert (found.job_id, found.model, found.code) == ("a", "m", "attempts_exhausted")
    assert (found.message, found.attempts, found.returns) == ("the API answered 500", 5, 2)
    assert found.died_at == NOW + timedelta(milliseconds=250)
    assert found.deadline == NOW
    assert (found.message_id, found.correlation_id, found.reply_to) == ("i", "c", "r")


def test_missing_fields_are_unknown() -> None:
    found = record(b"\xff")
    assert (found.job_id, found.model, found.code, found.died_at) == (None, "unknown", "unknown", None)
    assert record(b"{}").model == "default"
    assert record(b'{"model": 3}').model == "unknown"
    assert record(b"{}", message_id="by-property").job_id == "by-property"


def test_different_dead_letters_have_different_names() -> None:
    names = {
        record(b"1").name,
        record(b"2").name,
        record(b"1", message_id="a").name,
        record(b"1", correlation_id="a").name,
        record(b"1", reply_to="a").name,
        record(b"1", {"vqa-error-code": "a"}).name,
        record(b"1", {"vqa-died-at": "2030-01-31T12:00:00Z"}).name,
    }
    assert len(names) == 7
    assert record(b"1", {"vqa-copy": "a", "x-delivery-count": 3}).name == record(b"1").name


# Filters


def a_dead_letter(
    code: str = "attempts_exhausted", died_at: datetime | None = NOW, body: str = "{}", **more: Any
) -> DeadLetter:
    headers = {"vqa-error-code": code}
    if died_at is not None:
        headers["vqa-died-at"] = messages.rfc3339(died_at)
    return record(body.encode(), headers, **more)


def test_a_dead_letter_is_selected_by_one_value_of_each_option() -> None:
    one, other = a_dead_letter(), a_dead_letter("invalid_job")
    assert one in Filters(codes=["attempts_*"])
    assert other not in Filters(codes=["attempts_*"])
    assert other in Filters(codes=["attempts_*", "invalid_job"])
    assert Filters().matches_all
    assert not Filters(ids=["a"]).matches_all


def test_time_ranges_include_their_ends_and_exclude_dead_letters_without_a_time() -> None:
    assert a_dead_letter() in Filters(since=NOW, until=NOW)
    assert a_dead_letter() not in Filters(since=NOW + timedelta(seconds=1))
    assert a_dead_letter() not in Filters(until=NOW - timedelta(seconds=1))
    assert a_dead_letter(died_at=None) not in Filters(since=NOW)
    assert a_dead_letter(died_at=None) in Filters()


def test_a_dead_letter_is_selected_by_its_job_id_and_by_a_prefix_of_its_name() -> None:
    it = a_dead_letter(message_id="the-job")
    for name in ("the-job", it.name, it.name[:4]):
        assert it in Filters(ids=["another", name])
    for name in ("the", it.name[:3], ""):
        assert it not in Filters(ids=[name])


def test_a_time_has_several_formats() -> None:
    assert parse_time("2030-01-31T13:00:00+01:00", from_now=-1) == NOW
    assert parse_time("2030-01-31", from_now=-1) == NOW.replace(hour=0)
    for text, ago in {"90s": 90, "2m": 120, "1.5h": 5400, "1d": 86400, "1w": 604800}.items():
        found = parse_time(text, from_now=-1)
        assert abs(found - (datetime.now(UTC) - timedelta(seconds=ago))) < timedelta(minutes=1)


@pytest.mark.parametrize(
    "text", ["", "2", "h", "2030-02-30", "2030-01-31T12:00:00", "999999999w", "-2h", "2 h"]
)
def test_an_invalid_time_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a time|is too long"):
        parse_time(text, from_now=-1)


# Output


def test_long_images_are_shown_by_their_length_and_the_rest_in_full() -> None:
    url = "data:image/png;base64," + "A" * 1000
    body = json.dumps({"id": "a", "question": "q" * 500, "images": [url, {"url": url}], "more": 1.5}).encode()
    page = "\n".join(render.page(arrived(body, Basic.Properties())))
    assert page.count("… (1,022 characters)") == 2
    assert "q" * 500 in page
    assert "A" * 100 not in page


def test_a_body_that_is_not_json_is_shown_escaped_and_shortened() -> None:
    page = render.page(arrived(b"\x1b[31m\xff" + b"x" * 5000, Basic.Properties()))
    assert page[-2].startswith('  "body": "\\u001b[31m\\\\xffxxx')
    assert page[-2].endswith('x… (5,009 characters)"')


def test_a_compressed_body_is_read_and_shown_decompressed_and_saved_unchanged() -> None:
    body = gzip.compress(b'{"id": "a", "model": "m"}')
    held = arrived(body, Basic.Properties(content_encoding="gzip"))
    assert (held.record.job_id, held.record.model, held.record.size) == ("a", "m", len(body))
    assert '    "id": "a",' in render.page(held)
    full = render.full_json(held)
    assert (base64.b64decode(full["body_base64"]), full["content_encoding"]) == (body, "gzip")


@pytest.mark.parametrize(("encoding", "body"), [("gzip", b"damaged"), ("br", b"{}")])
def test_a_body_that_cannot_be_decompressed_is_shown_unchanged(encoding: str, body: bytes) -> None:
    held = arrived(body, Basic.Properties(content_encoding=encoding))
    shown = json.loads("\n".join(render.page(held)))["body"]
    assert shown in (body.decode(), json.loads(b"{}"))


# Records


def test_lines_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lines.jsonl"
    for number in range(2):
        append_lines(path, {"number": number, "text": "ä\n\ud800"})
    assert [json.loads(line)["number"] for line in path.read_text().splitlines()] == [0, 1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_ends_the_command() -> None:
    with pytest.raises(CommandError, match="cannot write /dev/full: No space left"):
        append_lines(Path("/dev/full"), {})


async def test_a_dead_letter_is_requeued_without_waiting() -> None:
    async with asyncio.timeout(60):
        await arrived(b"{}", Basic.Properties()).delivery.wait_until_requeue_is_safe()
