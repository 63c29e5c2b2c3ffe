"""The printed schemas match the worker's behaviour; the AsyncAPI document is valid."""

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jsonschema import Draft7Validator, Draft202012Validator

from docs import generate
from vqa_worker.messages.decoding import InvalidJobError, decode
from vqa_worker.messages.error_codes import ErrorCode
from vqa_worker.messages.job import RESERVED_PARAMS, Job
from vqa_worker.messages.result import JobFailure, Result, Usage
from worker.rabbitmq import schemas as schema
from worker.settings import BrokerSettings, load_broker_settings

TESTS = Path(__file__).parents[1]
SHORT = {"id": "a", "question": "What?", "images": ["s3://b/k"]}
LONG = {"id": "a", "messages": [{"role": "user", "content": "What?"}]}
# White space in Python's regular expressions only.
ODD_BLANKS = "\x1c\x1d\x1e\x1f"


@cache
def jobs() -> Draft202012Validator:
    Draft202012Validator.check_schema(schema.job_schema())
    return Draft202012Validator(schema.job_schema())


@cache
def results() -> Draft202012Validator:
    Draft202012Validator.check_schema(schema.result_schema())
    return Draft202012Validator(schema.result_schema())


def why_refused(job: Any) -> str | None:
    """Return the worker's error message; None if it accepts the job."""
    try:
        decode(json.dumps(job).encode(), "a-message-id", 10**9)
    except InvalidJobError as error:
        return error.message
    return None


# Jobs

_texts = st.text(st.characters(exclude_characters=ODD_BLANKS, exclude_categories=["Cs"]), max_size=4)
_leaves = st.one_of(st.none(), st.booleans(), st.integers(-5, 5), _texts)
_anything = st.recursive(
    _leaves,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(_texts, inner, max_size=2),
    max_leaves=4,
)
_image_urls = st.fixed_dictionaries(
    {}, optional={"url": _texts | _leaves, "detail": _texts | _leaves, "more": _leaves}
)
_parts = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["text", "image_url", "refusal", "video", 1]),
        "text": _texts | _leaves,
        "image_url": _image_urls | _leaves,
        "refusal": _texts | _leaves,
    },
)
_good_part = st.sampled_from(
    [
        {"type": "text", "text": "?"},
        {"type": "image_url", "image_url": {"url": "s3://b/k", "detail": None, "more": 1}, "more": 1},
        {"type": "refusal", "refusal": "no"},
    ]
)
_messages = st.fixed_dictionaries(
    {},
    optional={
        "role": _texts | _leaves,
        "content": _texts | st.lists(_parts | _good_part, max_size=2) | _leaves,
        "tool_calls": _anything,
    },
)
_params = st.dictionaries(_texts | st.sampled_from(sorted(RESERVED_PARAMS)), _anything, max_size=2)
_deadlines = st.sampled_from(
    [
        "2030-01-31T12:00:00Z",
        "2030-01-31 12:00:00.123456+01:30",
        "2030-02-30T12:00:00Z",
        "2030-01-31T12:00:60Z",
        "2030-01-31T12:00:00",
        "2030-01-31",
        "soon",
        "",
    ]
)
_fields: dict[str, st.SearchStrategy[Any]] = {
    "id": _texts | st.sampled_from(["a" * 256, "a" * 257, "ä\u2028", "tab\t"]) | _leaves,
    "question": _texts | _leaves,
    "images": st.lists(_texts | _image_urls | _leaves, max_size=2) | _leaves,
    "messages": st.lists(_messages | _leaves, max_size=2) | _leaves,
    "system": _texts | _leaves,
    "prompt_order": st.sampled_from(["images_first", "question_first", "first"]) | _leaves,
    "model": _texts | _leaves,
    "params": _params | _leaves,
    "deadline": _deadlines | _leaves,
    "metadata": _params | _leaves,
}
_any_jobs = st.fixed_dictionaries({}, optional={**_fields, "unknown": _anything})


@st.composite
def _nearly_jobs(draw: st.DrawFn) -> dict[str, Any]:
    """Return a valid job in which one or two fields may be invalid."""
    job = dict(draw(st.sampled_from([SHORT, LONG])))
    for name in draw(st.lists(st.sampled_from(sorted(_fields)), max_size=2)):
        job[name] = draw(_fields[name])
    return job


@given(_nearly_jobs() | _any_jobs)
@example(SHORT | {"messages": None, "system": "s"})
@example(LONG | {"question": None, "images": None})
@example(LONG | {"system": "s"})
@example({"question": "no id", "images": [{"url": "s3://b/k"}]})
def test_the_schema_accepts_what_the_worker_accepts_as_far_as_json_schema_can_express(
    job: dict[str, Any],
) -> None:
    refused = why_refused(job)
    if refused is None:
        jobs().validate(job)
    elif jobs().is_valid(job):
        # Rules that JSON Schema cannot express.
        assert re.search(r"printable characters|is not a valid time|bytes of JSON", refused), refused


@pytest.mark.parametrize(
    "job",
    [
        SHORT | {"unknown": 1},
        SHORT | {"id": ""},
        SHORT | {"id": "a" * 257},
        SHORT | {"id": "a\tb"},
        SHORT | {"question": " "},
        SHORT | {"images": []},
        SHORT | {"images": [{"url": "s3://b/k", "more": 1}]},
        SHORT | LONG,
        LONG | {"system": "s"},
        LONG | {"prompt_order": "images_first"},
        SHORT | {"prompt_order": "last"},
        LONG | {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
        SHORT | {"params": {"n": 2}},
        SHORT | {"deadline": "2030-01-31"},
        {"id": "a"},
        {"question": "What?"},
        [],
    ],
)
def test_the_schema_rejects_common_mistakes(job: Any) -> None:
    assert not jobs().is_valid(job)
    assert why_refused(job) is not None


def test_the_examples_in_the_docs_match_the_schemas() -> None:
    page = (TESTS.parent / "docs" / "messages.md").read_text(encoding="utf-8")
    examples = [json.loads(text) for text in re.findall(r"```json\n(.*?)```", page, re.DOTALL)]
    found = ["result" if "status" in it else "job" if "id" in it else "cancellation" for it in examples]
    assert found == ["job", "job", "result", "result", "cancellation"]
    for kind, it in zip(found, examples, strict=True):
        if kind != "cancellation":
            (jobs() if kind == "job" else results()).validate(it)


def test_every_field_of_a_job_is_in_its_schema_with_a_description() -> None:
    fields = schema.job_schema()["properties"]
    assert list(fields) == list(Job.model_fields)
    assert all(field["description"] for field in fields.values())


# Results


def test_results_match_their_schema() -> None:
    usage = Usage(prompt_tokens=1, completion_tokens=2, total_tokens=3)
    failure = JobFailure(code=ErrorCode.EMPTY_ANSWER, message="m", retryable=False)
    unclear = Usage(prompt_tokens=1, cached_tokens=0, reasoning_tokens=2)
    for result in (
        Result(id="a", status="succeeded", answer="b", usage=usage, metadata={"a": 1}, response={"b": []}),
        Result(id="a", status="succeeded", answer="b", usage=unclear, provider="p", service_tier="flex"),
        Result(id=None, status="failed", error=failure),
    ):
        results().validate(json.loads(result.to_body()))


def test_the_schema_of_results_accepts_additions_of_later_versions() -> None:
    result = json.loads(Result(id="a", status="failed", error=None).to_body())
    result["error"] = {"code": "new_code", "message": "m", "retryable": True, "new": 1}
    results().validate({**result, "new": 1, "timings": {**result["timings"], "new_s": 1.0}})
    assert not results().is_valid({**result, "status": "perhaps"})
    assert not results().is_valid({key: it for key, it in result.items() if key != "answer"})


def test_known_error_codes_are_listed() -> None:
    code = schema.result_schema()["$defs"]["JobFailure"]["properties"]["code"]
    assert code["examples"] == list(ErrorCode)


# AsyncAPI


@cache
def objects() -> Draft7Validator:
    return Draft7Validator(json.loads((TESTS / "data" / "asyncapi-3.0.0.json").read_text()))


def references(value: Any) -> Iterator[str]:
    match value:
        case dict():
            if isinstance(ref := value.get("$ref"), str):
                yield ref
            for item in value.values():
                yield from references(item)
        case list():
            for item in value:
                yield from references(item)


def test_the_document_is_valid_asyncapi_3() -> None:
    document = schema.asyncapi(generate.default_settings())
    objects().validate(document)
    document["operations"]["receiveJob"]["action"] = "take"
    assert not objects().is_valid(document)


def test_every_reference_in_the_document_has_a_target() -> None:
    document = schema.asyncapi(generate.default_settings())
    found = set(references(document))
    assert {"#/channels/jobs", "#/components/schemas/Job", "#/components/schemas/Usage"} <= found
    for ref in found:
        place: Any = document
        for step in ref.removeprefix("#/").split("/"):
            place = place[step]
        assert place
    named = {ref.rpartition("/")[2] for ref in found if ref.startswith("#/components/")}
    parts = document["components"]
    assert named == {*parts["messages"], *parts["schemas"]}


def test_the_document_has_the_queues_and_the_broker_of_the_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VQA_RABBITMQ_URL", "amqps://user:s3cr3t@broker.example/my%2Fhost")
    monkeypatch.setenv("VQA_JOBS_QUEUE", "pictures")
    settings: BrokerSettings = load_broker_settings(env_file=None)
    document = schema.asyncapi(settings)
    objects().validate(document)
    server = document["servers"]["rabbitmq"]
    assert (server["host"], server["protocol"]) == ("broker.example:5671", "amqps")
    channels = document["channels"]
    assert {name: channel["address"] for name, channel in channels.items()} == {
        "jobs": "pictures",
        "results": "vqa.results",
        "replies": None,
        "deadLetters": "pictures.dead",
        "control": "pictures.control",
    }
    queue = channels["jobs"]["bindings"]["amqp"]["queue"]
    assert (queue["name"], queue["vhost"]) == ("pictures", "my/host")
    assert channels["jobs"]["x-queue-arguments"]["x-delivery-limit"] == 100
    assert "s3cr3t" not in json.dumps(document)


def test_the_document_has_a_server_for_each_node_of_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VQA_RABBITMQ_URL", "amqp://u:s3cr3t@b/my%2Fhost,amqp://u:s3cr3t@a:5673/my%2Fhost")
    document = schema.asyncapi(load_broker_settings(env_file=None))
    objects().validate(document)
    hosts = {name: server["host"] for name, server in document["servers"].items()}
    assert hosts == {"rabbitmq": "a:5673", "rabbitmq-2": "b:5672"}
    assert document["channels"]["jobs"]["bindings"]["amqp"]["queue"]["vhost"] == "my/host"
