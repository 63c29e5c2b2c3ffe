"""Results: strict JSON for any API response, and a schema that describes them."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.unit.fakes import a_delivery
from vqa_worker.messages.error_codes import ErrorCode
from vqa_worker.messages.result import JobFailure, Result, Timings, Usage
from worker.clock import Clock
from worker.jobs.attempt import Attempt
from worker.jobs.outcome import Failed, Outcome, Succeeded
from worker.jobs.outcome_builder import OutcomeBuilder
from worker.model.answer import Answer, ErrorInAnswerError, MalformedAnswerError, parse_answer
from worker.observability.redaction import Redactor

# All characters including lone surrogates: an answer may end in the middle of an emoji.
ANY_TEXT = st.text(st.characters(exclude_categories=[]), max_size=10)
ANY_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=8,
)
USAGES = st.fixed_dictionaries(
    {},
    optional={
        name: ANY_VALUE | st.integers(0, 10**400) | st.sampled_from([1e308, 5.0, -1, True])
        for name in ("prompt_tokens", "completion_tokens", "total_tokens", "estimated_cost")
    },
)
MESSAGES = st.fixed_dictionaries(
    {"content": ANY_VALUE | ANY_TEXT},
    optional={"refusal": ANY_VALUE, "tool_calls": ANY_VALUE, "reasoning_content": ANY_VALUE},
)
RESPONSES = st.fixed_dictionaries(
    {
        "choices": st.lists(
            st.fixed_dictionaries(
                {"message": MESSAGES}, optional={"finish_reason": ANY_VALUE, "logprobs": ANY_VALUE}
            ),
            max_size=2,
        )
    },
    optional={"usage": USAGES | ANY_VALUE, "id": ANY_VALUE, "model": ANY_VALUE},
)


class Dear:
    """A price that leads to an infinite cost."""

    prompt = 1e308
    completion = 1e308
    cached_prompt = None


def answered(answer: Answer, *, include_response: bool) -> Outcome:
    outcomes = OutcomeBuilder(Redactor([]), Clock(), include_response=include_response)
    return outcomes.for_answer(Attempt.from_delivery(a_delivery()), answer)


def strictly(body: bytes) -> Any:
    """Parse strict RFC 8259 JSON in UTF-8."""

    def refuse(name: str) -> float:
        raise AssertionError(name)

    return json.loads(body.decode("utf-8"), parse_constant=refuse)


@given(response=RESPONSES | ANY_VALUE, price=st.sampled_from([None, Dear()]), include_response=st.booleans())
def test_the_result_is_strict_json_for_every_answer_of_the_api(
    response: Any, price: Dear | None, include_response: bool
) -> None:
    try:
        answer = parse_answer(json.dumps(response).encode(), price)
    except (MalformedAnswerError, ErrorInAnswerError):
        return
    outcome = answered(answer, include_response=include_response)
    assert isinstance(outcome, Succeeded | Failed)
    body = strictly(outcome.result.to_body())
    assert body["status"] == ("succeeded" if isinstance(outcome, Succeeded) else "failed")
    assert body["answer"] is None or body["answer"].strip()
    usage = body["usage"]
    if usage is not None:
        assert all(
            usage[name] is None or isinstance(usage[name], int) for name in usage if name != "cost_usd"
        )
        assert usage["cost_usd"] is None or math.isfinite(usage["cost_usd"])


def test_a_lone_surrogate_becomes_a_question_mark_and_loses_no_answer() -> None:
    answer = parse_answer(
        b'{"choices":[{"message":{"content":"cut \\ud83d","x":{"\\udc00":["\\ud83d"]}}}]}', None
    )
    outcome = answered(answer, include_response=True)
    assert isinstance(outcome, Succeeded)
    body = strictly(outcome.result.to_body())
    assert body["answer"] == "cut ?"
    assert body["response"]["choices"][0]["message"]["x"] == {"?": ["?"]}


USAGE = st.builds(
    Usage,
    prompt_tokens=st.none() | st.integers(0, 2**53),
    completion_tokens=st.none() | st.integers(0, 2**53),
    total_tokens=st.none() | st.integers(0, 2**54),
    cost_usd=st.none() | st.floats(0, 1e300),
    cached_tokens=st.none() | st.integers(0, 2**53),
    reasoning_tokens=st.none() | st.integers(0, 2**53),
)
SECONDS = st.none() | st.floats(0, 1e9)
TIMINGS = st.builds(Timings, queued_s=SECONDS, fetch_s=SECONDS, model_s=SECONDS, total_s=st.floats(0, 1e9))
FAILURES = st.builds(JobFailure, code=st.sampled_from(ErrorCode), message=st.text(), retryable=st.booleans())
PLAIN_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.text(), PLAIN_VALUE, max_size=3)
RESULTS = st.builds(
    Result,
    id=st.none() | st.text(),
    status=st.sampled_from(["succeeded", "failed"]),
    answer=st.none() | st.text(),
    model=st.none() | st.text(),
    finish_reason=st.none() | st.text(),
    usage=st.none() | USAGE,
    timings=TIMINGS,
    attempts=st.integers(1, 1000),
    metadata=OBJECTS,
    error=st.none() | FAILURES,
    response=st.none() | OBJECTS,
    provider=st.none() | st.text(),
    answered_model=st.none() | st.text(),
    service_tier=st.none() | st.text(),
)


@given(result=RESULTS)
def test_a_result_can_be_read_back_from_its_body(result: Result) -> None:
    assert Result.model_validate(strictly(result.to_body())) == result


def test_the_sum_of_usages_knows_what_both_know() -> None:
    first = Usage(prompt_tokens=1, completion_tokens=2, total_tokens=3, cost_usd=0.5, cached_tokens=1)
    second = Usage(prompt_tokens=10, completion_tokens=None, total_tokens=30, cost_usd=0.25)
    assert first + second == Usage(prompt_tokens=11, total_tokens=33, cost_usd=0.75)


def test_every_result_has_all_fields() -> None:
    body = strictly(Result(id=None, status="failed").to_body())
    assert set(body) == set(Result.model_fields)
    assert set(body["timings"]) == set(Timings.model_fields)
    assert body["id"] is None
    assert body["attempts"] == 1


def test_text_is_not_escaped_more_than_needed() -> None:
    body = Result(id="é", status="succeeded", answer="猫 😀").to_body()
    assert "猫 😀".encode() in body


@pytest.mark.parametrize(
    "fields",
    [
        {"status": "done"},
        {"attempts": 0},
        {"usage": {"prompt_tokens": -1}},
        {"surprise": 1},
        {"status": None},
    ],
)
def test_a_result_with_invalid_fields_is_rejected(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Result.model_validate({"id": "a", "status": "failed", **fields})


def test_the_schema_of_results_contains_every_field_and_code() -> None:
    schema = Result.model_json_schema()
    assert set(schema["properties"]) == set(Result.model_fields)
    assert schema["$defs"]["ErrorCode"]["enum"] == [code.value for code in ErrorCode]
    assert set(schema["required"]) == {"id", "status"}
    json.dumps(schema)
