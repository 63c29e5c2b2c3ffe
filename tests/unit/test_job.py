"""Job parsing: accepted and rejected bodies, error messages, and the model request."""

import copy
import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqa_worker.messages.conversation import Conversation, ImageRef
from vqa_worker.messages.decoding import InvalidJobError, decode
from vqa_worker.messages.job import (
    MAX_ID_CHARS,
    MAX_METADATA_BYTES,
    RESERVED_PARAMS,
    Job,
    PromptOrder,
    valid_id,
)
from vqa_worker.messages.serialization import to_json

SHORT: dict[str, Any] = {"id": "a", "question": "What is it?", "images": ["s3://b/k"]}
LONG: dict[str, Any] = {"id": "a", "messages": [{"role": "user", "content": "Hello"}]}
NO_LIMIT = 10**9
FORM_BY_FIELD = {"question": SHORT, "images": SHORT, "system": SHORT, "messages": LONG}

PRINTABLE = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=20)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=8), VALUES, max_size=3)
PARAMS = OBJECTS.filter(lambda params: not RESERVED_PARAMS & params.keys())
# Extra fields of the long form, which the worker passes on without knowing them.
EXTRAS = st.dictionaries(st.text(max_size=8).map(lambda name: f"x{name}"), VALUES, max_size=2)

URLS = st.text(max_size=20)
DETAILS = st.sampled_from(["auto", "low", "high"])
VERSIONS = st.none() | st.text("aB3._-+/", min_size=1, max_size=20)
IMAGE_OBJECTS = st.fixed_dictionaries(
    {"url": URLS}, optional={"detail": st.none() | DETAILS, "version_id": VERSIONS}
)
TEXT_PARTS = st.fixed_dictionaries({"type": st.just("text"), "text": st.text(max_size=10)})
IMAGE_PARTS = st.fixed_dictionaries(
    {
        "type": st.just("image_url"),
        "image_url": st.builds(lambda extra, image: {**extra, **image}, EXTRAS, IMAGE_OBJECTS),
    }
)
PARTS = st.builds(lambda extra, part: {**extra, **part}, EXTRAS, TEXT_PARTS | IMAGE_PARTS)
CONTENTS = st.none() | st.text(max_size=10) | st.lists(PARTS, max_size=4)
TURNS = st.builds(
    lambda extra, turn: {**extra, **turn},
    EXTRAS,
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"])}, optional={"content": CONTENTS}
    ),
)
FORMS = st.fixed_dictionaries(
    {
        "question": st.text(max_size=10).map(lambda text: f"{text}?"),
        "images": st.lists(URLS | IMAGE_OBJECTS, min_size=1, max_size=4),
    },
    optional={"system": st.none() | st.text(max_size=10)},
) | st.fixed_dictionaries({"messages": st.lists(TURNS, min_size=1, max_size=4)})
JOBS = st.builds(
    lambda form, rest: {**form, **rest},
    FORMS,
    st.fixed_dictionaries(
        {"id": PRINTABLE},
        optional={
            "model": st.none() | st.text(max_size=10),
            "params": st.none() | PARAMS,
            "deadline": st.none() | st.datetimes(timezones=st.just(UTC)).map(lambda time: time.isoformat()),
            "metadata": st.none() | OBJECTS,
        },
    ),
)


def read(fields: dict[str, Any], message_id: str | None = None) -> Job:
    return decode(json.dumps(fields).encode(), message_id, NO_LIMIT)


def fault(body: bytes | dict[str, Any], message_id: str | None = None) -> InvalidJobError:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(InvalidJobError) as caught:
        decode(raw, message_id, NO_LIMIT)
    return caught.value


def error_message(body: bytes) -> str:
    """Return why a body is not a job; an empty string if it is one."""
    try:
        decode(body, None, NO_LIMIT)
    except InvalidJobError as error:
        return error.message
    return ""


def saying(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def rendered(fields: dict[str, Any], *, send_detail: bool = True) -> list[dict[str, Any]]:
    conversation = Conversation(read(fields))
    return conversation.render("u", send_detail=send_detail)


# Reading


@given(fields=JOBS)
def test_every_field_of_a_valid_job_is_parsed(fields: dict[str, Any]) -> None:
    job = read(fields)
    for name in ("id", "model", "params", "metadata", "system", "question"):
        assert getattr(job, name) == fields.get(name)
    deadline = fields.get("deadline")
    assert job.deadline == (datetime.fromisoformat(deadline) if deadline else None)
    dumped = job.model_dump(exclude_unset=True)
    assert dumped.get("images") == fields.get("images")
    assert dumped.get("messages") == fields.get("messages")


@given(fields=JOBS)
def test_a_parsed_job_can_be_serialized_and_parsed_again(fields: dict[str, Any]) -> None:
    job = read(fields)
    assert decode(job.model_dump_json(exclude_unset=True).encode(), None, NO_LIMIT) == job


@given(body=st.binary(max_size=200))
def test_all_bytes_are_a_job_or_an_invalid_one(body: bytes) -> None:
    with pytest.raises(InvalidJobError):
        decode(body, None, NO_LIMIT)


@given(value=VALUES | st.fixed_dictionaries({}, optional=dict.fromkeys(Job.model_fields, VALUES)))
def test_all_json_is_a_job_or_an_invalid_one(value: Any) -> None:
    error_message(json.dumps(value).encode())


def _refuse_constant(name: str) -> float:
    raise ValueError(name)


@given(
    fields=JOBS,
    where=st.floats(0, 1),
    cut=st.integers(0, 4),
    put=st.binary(max_size=3)
    | st.sampled_from([b"NaN", b"-Infinity", b"\\ud800", b"\xed\xa0\x80", b"01", b"\x00"]),
)
def test_accepted_bodies_are_strict_json_to_another_parser_too(
    fields: dict[str, Any], where: float, cut: int, put: bytes
) -> None:
    body = json.dumps(fields, ensure_ascii=False).encode()
    at = int(where * len(body))
    damaged = body[:at] + put + body[at + cut :]
    try:
        job = decode(damaged, "m", NO_LIMIT)
    except InvalidJobError:
        return
    again = json.loads(damaged.decode("utf-8-sig"), parse_constant=_refuse_constant)
    assert job.id == (again.get("id") or "m")
    to_json(job.model_dump(mode="json")).decode()


@pytest.mark.parametrize(
    "token",
    [
        "NaN", "-NaN", "Infinity", "-Infinity", "1e999", "-1e999", "+1", "01", "1.", ".5", "0x1", "'a'",
        "True", "nul", '"\\ud800"', '"\\udc00"', '"\\ud800\\ud800"', '"\\x41"', '"\x01"',
        '"\n"', "[1,]", "[1 2]",
        "/**/1", '{"a":1,}', "{1:2}", "",
    ],
)  # fmt: skip
def test_json_beyond_rfc_8259_is_rejected(token: str) -> None:
    body = json.dumps({**SHORT, "params": {"x": 0}}).replace(": 0}", f": {token}}}").encode()
    fault(body)


def test_almost_strict_json_is_rejected() -> None:
    body = json.dumps(SHORT).encode()
    for damaged in (
        b"\xef\xbb\xbf" * 2 + body,
        body.decode().encode("utf-16"),
        body + b"{}",
        body + b"\x00",
        b"",
    ):
        fault(damaged)
    fault(body.replace(b"What", b"\xff\xfe"))
    fault(body.replace(b"What", b"\xed\xa0\x80"))


@pytest.mark.parametrize("body", [b"[]", b"null", b'"job"', b"1", b"true"])
def test_json_that_is_not_an_object_is_rejected(body: bytes) -> None:
    assert "must be a JSON object" in fault(body).message


@pytest.mark.parametrize("depth", [250, 5_000, 200_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_a_too_deeply_nested_body_is_rejected(depth: int, opening: str, closing: str) -> None:
    nested = opening * depth + "1" + closing * depth
    body = json.dumps({**SHORT, "metadata": {"a": 0}}).replace(": 0}", f": {nested}}}")
    assert re.search("strict JSON|too deeply|JSON values|1000000 bytes", fault(body.encode()).message)
    fault((opening * depth).encode())


def test_a_moderately_nested_body_is_read_and_echoed() -> None:
    nested: Any = 1
    for _ in range(150):
        nested = [nested]
    metadata = read({**SHORT, "metadata": {"a": nested}}).metadata
    assert json.loads(to_json(metadata)) == {"a": nested}


# Types and fields


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id", 1), ("id", True), ("id", ["a"]), ("id", ""), ("id", "a\nb"), ("id", "a\x00"),
        ("id", "a\u200e"), ("id", "x" * (MAX_ID_CHARS + 1)),
        ("question", 1), ("question", ""), ("question", " \n\u2003"), ("question", ["What?"]),
        ("images", []), ("images", "s3://b/k"), ("images", {"url": "s3://b/k"}), ("images", [1]),
        ("images", [None]), ("images", [["s3://b/k"]]), ("images", [{}]), ("images", [{"url": 1}]),
        ("images", [{"url": None}]),
        ("images", [{"url": "u", "version_id": 1}]), ("images", [{"url": "u", "version_id": ""}]),
        ("images", [{"url": "u", "version_id": "a b"}]), ("images", [{"url": "u", "version_id": "x" * 1025}]),
        ("images", [{"url": "u", "detail": 1}]), ("images", [{"url": "u", "details": "low"}]),
        ("system", 1), ("system", ["s"]),
        ("prompt_order", "images"), ("prompt_order", 1), ("prompt_order", ["images_first"]),
        ("model", 1), ("model", ["m"]),
        ("params", []), ("params", "x"), ("params", 1),
        ("metadata", []), ("metadata", "x"), ("metadata", 1),
        ("messages", []), ("messages", "Hello"), ("messages", {}), ("messages", [None]),
        ("messages", ["Hello"]), ("messages", [{"content": "x"}]), ("messages", [{"role": ""}]),
        ("messages", [{"role": 1}]),
        ("messages", [{"role": "user", "content": 1}]), ("messages", [{"role": "user", "content": {}}]),
        ("messages", saying("x")),
        ("messages", saying({"text": "x"})),
        ("messages", saying({"type": "text"})),
        ("messages", saying({"type": "text", "text": 1})),
        ("messages", saying({"type": "image", "text": "x"})),
        ("messages", saying({"type": "image_url", "image_url": "s3://b/k"})),
        ("messages", saying({"type": "image_url", "image_url": {}})),
        ("messages", saying({"type": "image_url", "image_url": {"url": 1}})),
        ("messages", saying({"type": "image_url", "image_url": {"url": "", "detail": 1}})),
        ("messages", saying({"type": "image_url", "image_url": {"url": "", "version_id": "\n"}})),
    ],
)  # fmt: skip
def test_an_invalid_value_is_rejected_and_its_field_is_named(field: str, value: Any) -> None:
    error = fault({**FORM_BY_FIELD.get(field, SHORT), field: value})
    assert error.message.startswith(field)
    assert (error.job_id, error.id_in_body) == ((None, False) if field == "id" else ("a", True))


@pytest.mark.parametrize(
    "field", ["image", "Question", "message", "meta-data", "n", "stream", "type", "", " id"]
)
def test_an_unknown_field_is_rejected_and_named(field: str) -> None:
    assert fault({**SHORT, field: None}).message == (f"{field}: unknown field" if field else "unknown field")


@pytest.mark.parametrize("field", ["id", "model", "system", "prompt_order", "params", "deadline", "metadata"])
def test_null_is_the_same_as_a_missing_field(field: str) -> None:
    without = {name: value for name, value in SHORT.items() if name != field}
    assert read({**SHORT, field: None}, "m") == read({**without, field: None}, "m")
    assert getattr(read({**SHORT, field: None}, "m"), field) == ("m" if field == "id" else None)


@pytest.mark.parametrize(
    "fields",
    [
        {"id": "a"},
        {"id": "a", "question": "What?"},
        {"id": "a", "images": ["s3://b/k"]},
        {"id": "a", "question": "What?", "images": None},
        {"id": "a", "system": "s", "messages": None},
    ],
)
def test_half_a_form_is_rejected_and_the_fields_of_both_forms_are_named(fields: dict[str, Any]) -> None:
    message = fault(fields).message
    assert all(word in message for word in ("question", "images", "messages"))


@pytest.mark.parametrize("field", ["question", "images", "system", "prompt_order"])
def test_the_two_forms_are_not_mixed(field: str) -> None:
    value = {"images": ["s3://b/k"], "prompt_order": "images_first"}.get(field, "text")
    assert field in fault({**LONG, field: value}).message
    read({**LONG, field: None})


@pytest.mark.parametrize("name", sorted(RESERVED_PARAMS))
def test_fields_that_the_worker_sets_are_not_allowed_in_params(name: str) -> None:
    message = fault({**SHORT, "params": {"temperature": 0, name: None}}).message
    assert message.startswith("params: ")
    assert name in message


@given(params=PARAMS)
def test_all_other_params_are_read_unchanged(params: dict[str, Any]) -> None:
    assert read({**SHORT, "params": params}).params == params


def test_true_is_not_1_and_1_is_not_a_string() -> None:
    params = {"a": True, "b": 1, "c": "1", "d": 1.0, "e": None}
    taken = read({**SHORT, "params": params}).params
    assert taken is not None
    assert [type(value) for value in taken.values()] == [type(value) for value in params.values()]


@pytest.mark.parametrize("filler", ["x", "ü", "猫", "😀", '"', "\x7f"])
def test_metadata_may_have_exactly_16_kib_of_compact_json(filler: str) -> None:
    width = len(to_json(filler)) - 2
    count, padding = divmod(MAX_METADATA_BYTES - len(b'{"k":""}'), width)
    metadata = {"k": filler * count + "x" * padding}
    assert len(to_json(metadata)) == MAX_METADATA_BYTES
    # White space between tokens and escapes do not count.
    body = json.dumps({**SHORT, "metadata": metadata}, indent=8, ensure_ascii=True).encode()
    assert decode(body, None, NO_LIMIT).metadata == metadata

    metadata["k"] += "x"
    message = fault({**SHORT, "metadata": metadata}).message
    assert message == f"metadata: must be at most {MAX_METADATA_BYTES} bytes of JSON"


# Identity


@pytest.mark.parametrize(
    "text", ["a", " ", "é 猫 😀", "x" * MAX_ID_CHARS, "{}", "👩‍🚀".replace("\u200d", "")]
)
def test_an_id_is_printable_text_of_up_to_256_characters(text: str) -> None:
    assert valid_id(text) == text
    assert read({**SHORT, "id": text}).id == text


@given(value=VALUES | st.text(st.characters(exclude_categories=[])))
def test_a_readable_id_is_short_printable_text(value: Any) -> None:
    if valid_id(value) is not None:
        assert value.isprintable()
        assert 1 <= len(value) <= MAX_ID_CHARS
        value.encode()


def test_the_id_in_the_body_takes_precedence_over_the_message_id() -> None:
    assert read(SHORT, "m").id == "a"
    assert read({**SHORT, "id": None}, "m").id == "m"
    without = {"question": "What?", "images": ["u"]}
    assert read(without, "m").id == "m"
    for message_id in (None, "", "a\nb", "x" * 257):
        error = fault(without, message_id)
        assert (error.job_id, error.id_in_body) == (None, False)
        assert error.message.startswith("id: ")


@pytest.mark.parametrize(
    ("body", "own"),
    [
        (b'{"id": "a"}', "a"),
        (b'{"id": "a", "x": NaN}', "a"),
        (b'{"id": "a", "x": "\\ud800"}', "a"),
        (b'{"id": "a", "x": "\xed\xa0\x80\xff"}', "a"),
        (b'{"id": "\xc3\xa4", "x": "\xff"}', "ä"),
        (b'{"id": "\xff"}', None),
        (b'{"id": "\\ud800"}', None),
        (b'{"id": "a\\nb"}', None),
        (b'{"id": 5}', None),
        (b'{"id": "a"', None),
        (b'["id", "a"]', None),
        (b'{"x": {"id": "a"}}', None),
    ],
)
def test_the_id_of_an_invalid_job_is_read_if_possible(body: bytes, own: str | None) -> None:
    error = fault(body, "m")
    assert (error.job_id, error.id_in_body) == (own or "m", own is not None)


def test_every_body_over_the_limit_is_rejected() -> None:
    body = json.dumps(SHORT).encode()
    assert decode(body, None, len(body)).id == "a"
    with pytest.raises(InvalidJobError, match="VQA_MAX_JOB_BYTES") as caught:
        decode(body, None, len(body) - 1)
    assert (caught.value.job_id, caught.value.id_in_body) == ("a", True)


@pytest.mark.parametrize(
    ("body", "own"),
    [
        (b'{"id": "a", "images": ["data:image/png;base64,' + b"A" * 1000 + b'"]}', "a"),
        (b'{"id": "a", "question": "' + "é".encode() * 500 + b'"}', "a"),
        (b'{"question": "' + b"A" * 1000 + b'", "id": "a"}', None),
        (b'{"id": "' + b"A" * 1000 + b'"}', None),
        (b'{"id": "a\\n", "x": "' + b"A" * 1000 + b'"}', None),
        (b"[" * 1000, None),
        (b'"' + b"A" * 1000, None),
        (b"\xff" * 1000, None),
    ],
)
@pytest.mark.parametrize("limit", [101, 102])
def test_the_id_of_too_large_a_body_is_read_within_the_limit(
    body: bytes, own: str | None, limit: int
) -> None:
    with pytest.raises(InvalidJobError, match="VQA_MAX_JOB_BYTES") as caught:
        decode(body, "m", limit)
    assert (caught.value.job_id, caught.value.id_in_body) == (own or "m", own is not None)


# The deadline


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2030-01-31T12:00:00Z", datetime(2030, 1, 31, 12, tzinfo=UTC)),
        ("2030-01-31t12:00:00z", datetime(2030, 1, 31, 12, tzinfo=UTC)),
        ("2030-01-31 12:00:00Z", datetime(2030, 1, 31, 12, tzinfo=UTC)),
        ("2030-01-31T12:00:00+05:30", datetime(2030, 1, 31, 6, 30, tzinfo=UTC)),
        ("2030-01-31T12:00:00-23:59", datetime(2030, 2, 1, 11, 59, tzinfo=UTC)),
        ("2030-01-31T12:00:00-00:00", datetime(2030, 1, 31, 12, tzinfo=UTC)),
        ("2030-01-31T12:00:00.5Z", datetime(2030, 1, 31, 12, 0, 0, 500_000, tzinfo=UTC)),
        ("2030-01-31T12:00:00.123456Z", datetime(2030, 1, 31, 12, 0, 0, 123_456, tzinfo=UTC)),
        ("2030-01-31T12:00:00.1234569999Z", datetime(2030, 1, 31, 12, 0, 0, 123_456, tzinfo=UTC)),
        ("2028-02-29T00:00:00Z", datetime(2028, 2, 29, tzinfo=UTC)),
        ("1990-12-31T23:59:60Z", datetime(1990, 12, 31, 23, 59, 59, tzinfo=UTC)),
        ("1990-12-31T15:59:60.25-08:00", datetime(1990, 12, 31, 23, 59, 59, 250_000, tzinfo=UTC)),
        ("0001-01-01T00:00:00Z", datetime(1, 1, 1, tzinfo=UTC)),
        ("9999-12-31T23:59:59Z", datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)),
        ("9999-12-31T23:59:60Z", datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)),
    ],
)
def test_a_deadline_is_an_rfc_3339_time(text: str, expected: datetime) -> None:
    assert read({**SHORT, "deadline": text}).deadline == expected


@pytest.mark.parametrize(
    "text",
    [
        "2030-01-31", "2030-01-31T12:00Z", "2030-01-31T12:00:00", "2030-01-31T12:00:00+0530",
        "20300131T120000Z", "2030-01-31T12:00:00+05", "2030-01-31T12:00:00,5Z", "2030-01-31T12:00:00.Z",
        "2030-01-31T12:00:00 Z",
        "2030-W05-4T12:00:00Z", "2030-031T12:00:00Z", "+2030-01-31T12:00:00Z", "12030-01-31T12:00:00Z",
        "2030-01-31T12:00:00Z\n", " 2030-01-31T12:00:00Z", "2030-01-31_12:00:00Z",
        "\u0662030-01-31T12:00:00Z", "2030-01-31T12:00:00+00:00:30", "2030-01-31T12:00:00+00:60",
        "tomorrow", "", "1893456000",
        "2030-02-30T12:00:00Z", "2030-13-01T12:00:00Z", "2030-01-31T24:00:00Z", "2030-01-31T12:60:00Z",
        "2030-01-31T12:00:61Z", "2030-01-31T12:00:00+24:00", "2029-02-29T00:00:00Z",
        "9999-12-31T23:59:59-01:00", "0001-01-01T00:00:00+01:00",
    ],
)  # fmt: skip
def test_every_other_time_format_is_rejected(text: str) -> None:
    assert fault({**SHORT, "deadline": text}).message.startswith("deadline: ")


@pytest.mark.parametrize("value", [1893456000, 1893456000.5, True, [], {}])
def test_a_deadline_is_text(value: Any) -> None:
    assert fault({**SHORT, "deadline": value}).message.startswith("deadline: ")


@given(
    moment=st.datetimes(min_value=datetime(2, 1, 1), max_value=datetime(9998, 1, 1)),  # noqa: DTZ001 - see below
    offset=st.integers(-1439, 1439),
    separator=st.sampled_from("Tt "),
)
def test_a_deadline_is_the_same_instant_in_every_utc_offset(
    moment: datetime, offset: int, separator: str
) -> None:
    sign, minutes = "-" if offset < 0 else "+", abs(offset)
    text = f"{moment.isoformat(sep=separator)}{sign}{minutes // 60:02}:{minutes % 60:02}"
    expected = moment.replace(tzinfo=UTC) - timedelta(minutes=offset)
    assert read({**SHORT, "deadline": text}).deadline == expected


# Error messages

CANARY, NUMBER = "CANARY", 987654321
NAMES = [
    *Job.model_fields, "role", "content", "type", "text", "image_url", "url", "detail", "refusal", "unknown",
]  # fmt: skip
SAID = st.sampled_from(
    [
        CANARY,
        f"{CANARY}\n",
        f"s3://{CANARY}",
        f"2030-01-31T12:00:00Z{CANARY}",
        NUMBER,
        float(NUMBER),
        None,
        True,
    ]
)
KINDS = st.sampled_from(["text", "image_url", "refusal", CANARY, NUMBER, None])
ODD_PARTS = st.dictionaries(
    st.sampled_from(NAMES), SAID | st.dictionaries(st.sampled_from(NAMES), SAID), max_size=3
)
ODD_TURNS = st.fixed_dictionaries(
    {
        "role": SAID,
        "content": SAID | st.lists(st.builds(lambda p, t: {**p, "type": t}, ODD_PARTS, KINDS) | SAID),
    }
)
ODD_VALUES = st.recursive(
    SAID,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
    max_leaves=6,
)
ODD_JOBS = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(Job.model_fields, ODD_VALUES),
        "images": st.lists(SAID | ODD_PARTS, max_size=3),
        "messages": st.lists(SAID | ODD_TURNS, max_size=3),
        "question": SAID,
        "unknown": SAID,
    },
)


@given(fields=ODD_JOBS)
def test_error_messages_do_not_contain_values_of_the_job(fields: dict[str, Any]) -> None:
    words = error_message(json.dumps(fields).encode())
    assert CANARY not in words
    assert str(NUMBER) not in words


@given(where=st.floats(0, 1), put=st.sampled_from(["", '"', "\\", "\x00", "\\ud800", "\\u12", "}", "NaN"]))
def test_error_messages_about_invalid_json_do_not_contain_its_text(where: float, put: str) -> None:
    body = json.dumps({**SHORT, "question": CANARY * 5, "metadata": {CANARY: [CANARY]}})
    at = int(where * len(body))
    for damaged in (body[:at] + put + body[at:], body[:at] + put):
        assert not re.search("CANA|NARY", error_message(damaged.encode()))


def test_the_first_errors_are_named_and_the_rest_counted() -> None:
    message = fault({**SHORT, **{f"x{n}": n for n in range(12)}}).message
    assert message.count("unknown field") == 5
    assert message.endswith("; and 7 more")


def test_an_unsupported_part_type_is_reported_with_the_supported_ones() -> None:
    message = fault({"id": "a", "messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}).message
    assert "messages.0.content.0: type must be one of 'text', 'image_url', 'refusal'" in message


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([{"url": "u", "sharpness": 1}], "images.0.sharpness: unknown field"),
        (["u", {}], "images.1.url: missing"),
        ([{"url": 5, "str": 1}], "images.0.url: must be a string; images.0.str: unknown field"),
        ([5], "images.0: must be a string or an object with url"),
        (
            [5, {}],
            "images.0: must be a string or an object with url",
        ),
    ],
)
def test_errors_of_an_image_are_those_of_its_form(images: list[Any], message: str) -> None:
    assert fault({**SHORT, "images": images}).message == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "text"}], "messages.0.content.0.text: missing"),
        ([{"type": "image_url", "image_url": {}}], "messages.0.content.0.image_url.url: missing"),
        (
            [{"type": "image_url", "image_url": "u"}],
            "messages.0.content.0.image_url: must be an object with url",
        ),
        (["text"], "messages.0.content.0: must be an object"),
        (
            5,
            "messages.0.content: must be a string or a list",
        ),
    ],
)
def test_errors_of_a_messages_content_are_those_of_its_form(content: Any, message: str) -> None:
    assert fault({"id": "a", "messages": [{"role": "user", "content": content}]}).message == message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"question": 5}, "question: must be a string"),
        ({"images": "u"}, "images: must be a list"),
        ({"images": []}, "images: must not be empty"),
        ({"params": []}, "params: must be an object"),
        ({"metadata": "m"}, "metadata: must be an object"),
        ({"model": {}}, "model: must be a string"),
        ({"messages": [5]}, "messages.0: must be an object with role and content"),
        ({"messages": []}, "messages: must not be empty"),
        ({"messages": [{"role": ""}]}, "messages.0.role: must not be empty"),
        ({"messages": [{}]}, "messages.0.role: missing"),
        ({"messages": [{"role": "user", "content": [{}]}]}, "messages.0.content.0: type: missing"),
    ],
)
def test_errors_use_plain_words(fields: dict[str, Any], message: str) -> None:
    own = {"id": "a", **fields} if "messages" in fields else {**SHORT, **fields}
    assert fault(own).message == message


@pytest.mark.parametrize("field", ["str", "ImageObject", "TextPart", "list[x]"])
def test_a_field_with_the_name_of_a_type_is_named_too(field: str) -> None:
    assert fault({**SHORT, field: 1}).message == f"{field}: unknown field"
    assert fault({**SHORT, "images": [{"url": "u", field: 1}]}).message == f"images.0.{field}: unknown field"


# The model request


@given(turns=st.lists(TURNS, min_size=1, max_size=4), send_detail=st.booleans())
def test_the_long_form_is_sent_unchanged_except_for_its_urls(
    turns: list[dict[str, Any]], send_detail: bool
) -> None:
    conversation = Conversation(read({"id": "a", "messages": turns}))
    given_urls, expected = [], copy.deepcopy(turns)
    for turn in expected:
        for part in turn.get("content") or ():
            if isinstance(part, dict) and part["type"] == "image_url":
                given_urls.append(part["image_url"]["url"])
                part["image_url"]["url"] = "placeholder"
                part["image_url"].pop("version_id", None)
                if not send_detail or part["image_url"].get("detail") is None:
                    part["image_url"].pop("detail", None)
    assert [ref.url for ref in conversation.images()] == given_urls
    messages = conversation.render("placeholder", send_detail=send_detail)
    assert messages == expected
    # After a 429 the request is sent again: nothing of the first one may remain in it.
    for message in messages:
        message.clear()
    assert conversation.render("placeholder", send_detail=send_detail) == expected


@given(
    images=st.lists(URLS | IMAGE_OBJECTS, min_size=1, max_size=4),
    question=st.text(max_size=10).map(lambda text: f"{text}?"),
    system=st.none() | st.text(max_size=10),
    send_detail=st.booleans(),
)
def test_the_short_form_sends_the_same_request_as_the_long_one(
    images: list[Any], question: str, system: str | None, send_detail: bool
) -> None:
    short = {"id": "a", "question": question, "images": images, "system": system}
    parts = [
        {"type": "image_url", "image_url": {"url": image} if isinstance(image, str) else image}
        for image in images
    ]
    turns: list[dict[str, Any]] = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    assert rendered(short, send_detail=send_detail) == rendered(
        {"id": "a", "messages": turns}, send_detail=send_detail
    )


@pytest.mark.parametrize(
    ("asked", "usual", "kinds"),
    [
        (None, "images_first", ["image_url", "image_url", "text"]),
        (None, "question_first", ["text", "image_url", "image_url"]),
        ("images_first", "question_first", ["image_url", "image_url", "text"]),
        ("question_first", "images_first", ["text", "image_url", "image_url"]),
    ],
)
def test_the_question_comes_before_or_after_the_images(
    asked: str | None, usual: PromptOrder, kinds: list[str]
) -> None:
    job = read({**SHORT, "images": ["s3://b/k", "s3://b/l"], "prompt_order": asked, "system": "s"})
    system, user = Conversation(job).render("u", send_detail=False, prompt_order=usual)
    assert system == {"role": "system", "content": "s"}
    assert [part["type"] for part in user["content"]] == kinds


@pytest.mark.parametrize(
    ("detail", "send_detail", "sent"),
    [("low", True, {"detail": "low"}), ("low", False, {}), (None, True, {}), (None, False, {})],
)
def test_detail_is_sent_only_if_configured_and_present(
    detail: str | None, send_detail: bool, sent: dict[str, str]
) -> None:
    image = {"url": "u", "detail": detail}
    short = {**SHORT, "images": [image]}
    long = {"id": "a", "messages": saying({"type": "image_url", "image_url": image})}
    for fields in (short, long):
        part = rendered(fields, send_detail=send_detail)[0]["content"][0]
        assert part == {"type": "image_url", "image_url": {"url": "u", **sent}}


def test_images_are_named_by_their_position_in_the_job() -> None:
    short = Conversation(read({**SHORT, "system": "s", "images": ["u", {"url": "v", "detail": "low"}]}))
    assert short.images() == [ImageRef("images[0]", "u"), ImageRef("images[1]", "v", "low")]
    image = {"type": "image_url", "image_url": {"url": "u"}}
    text = {"type": "text", "text": "?"}
    turns = [{"role": "user", "content": c} for c in ("Hi", [text, image], None, [image, text, image])]
    where = [ref.location for ref in Conversation(read({"id": "a", "messages": turns})).images()]
    assert where == ["messages[1].content[1]", "messages[3].content[0]", "messages[3].content[2]"]


@given(value=VALUES | st.text(st.characters(exclude_categories=[])))
def test_json_that_the_worker_writes_is_strict_utf_8(value: Any) -> None:
    again = json.loads(to_json(value).decode(), parse_constant=_refuse_constant)
    if not isinstance(value, str):
        assert again == value


def test_a_lone_surrogate_that_is_written_becomes_a_question_mark() -> None:
    assert to_json({"\ud800": ["a\udc00b"]}) == b'{"?":["a?b"]}'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [float("-inf")]])
def test_json_that_the_worker_writes_has_strict_numbers_only(value: Any) -> None:
    with pytest.raises(ValueError, match="JSON"):
        to_json(value)
