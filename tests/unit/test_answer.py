"""Parsing of the API's response: it is billed, so only an unusable one is rejected."""

import json
import math
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.model.answer import (
    MAX_AMOUNT,
    Answer,
    MalformedAnswerError,
    deserialize_answer,
    parse_answer,
    serialize_answer,
)


@dataclass(frozen=True)
class PerMillion:
    """USD per million tokens."""

    prompt: float
    completion: float


def read(message: Any, *, price: PerMillion | None = None, **fields: Any) -> Answer:
    choice = {"index": 0, "message": message, **fields.pop("choice", {})}
    return parse_answer(json.dumps({"choices": [choice], **fields}).encode(), price)


def usage_of(price: PerMillion | None = None, **usage: Any) -> tuple[int, int, int, float | None] | None:
    found = read({"content": "a"}, usage=usage, price=price).usage
    if found is None:
        return None
    return found.prompt_tokens, found.completion_tokens, found.total_tokens, found.cost_usd


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("A cat.", "A cat."),
        (" A cat.\n", " A cat.\n"),
        ("", None),
        (" \n\t\u2003", None),
        (None, None),
        ([], None),
        ([{"type": "text", "text": "A "}, {"type": "text", "text": "cat."}], "A cat."),
        ([{"type": "text"}, {"type": "text", "text": None}, {"type": "text", "text": 5}], None),
        ([{"type": "image"}, "odd", None, 5, {"type": "text", "text": "A cat."}], "A cat."),
        ([{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "A cat."}], "A cat."),
    ],
)
def test_the_text_is_found_in_every_form_of_content(content: Any, text: str | None) -> None:
    assert read({"role": "assistant", "content": content}).text == text


def test_a_message_without_content_is_empty() -> None:
    answer = read({"role": "assistant"})
    assert (answer.text, answer.is_empty) == (None, True)


@pytest.mark.parametrize(
    "body",
    [
        b"", b" ", b"null", b"[]", b'"text"', b"5", b"true", b"{}", b"{", b"A cat.",
        b"<html></html>", b"\xff",
        b"data: {}\n\n", b'{"choices":null}', b'{"choices":{}}', b'{"choices":"a"}', b'{"choices":[null]}',
        b'{"choices":["a"]}', b'{"choices":[[]]}', b'{"choices":[{}]}', b'{"choices":[{"message":null}]}',
        b'{"choices":[{"message":"a"}]}', b'{"choices":[{"message":{"content":5}}]}',
        b'{"error":{"message":"x"}}',
        b'{"choices":[{"message":{"content":{}}}]}', b'{"choices":[{"message":{"content":true}}]}',
        b'{"choices":[{"text":"a"}]}', b'{"choices":[{"delta":{"content":"a"}}]}',
        b'{"choices":[{"message":{"content":"a"}}]', b'{"choices":[{"message":{"content":"a"}}]}}',
        b"[" * 100_000, b'{"a":' * 100_000,
    ],
)  # fmt: skip
def test_a_body_that_is_not_a_chat_completion_is_malformed(body: bytes) -> None:
    with pytest.raises(MalformedAnswerError):
        parse_answer(body, None)


def test_an_answer_without_choices_is_well_formed_and_empty() -> None:
    body = b'{"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":0}}'
    answer = parse_answer(body, PerMillion(1_000_000, 0))
    assert answer.is_empty
    assert answer.finish_reason is None
    assert answer.usage is not None
    assert answer.usage.cost_usd == 7


@pytest.mark.parametrize(
    ("message", "calls_tools"),
    [
        ({"content": None, "tool_calls": [{"id": "1"}]}, True),
        ({"content": "", "function_call": {"name": "f"}}, True),
        ({"content": None, "tool_calls": []}, False),
        ({"content": None, "tool_calls": None, "function_call": None}, False),
        ({"content": None, "refusal": "I can't."}, False),
        ({"content": None, "reasoning_content": "Let me think."}, False),
    ],
)
def test_without_text_only_a_tool_call_is_an_answer(message: dict[str, Any], calls_tools: bool) -> None:
    answer = read(message)
    assert answer.calls_tools is calls_tools
    assert answer.is_empty is not calls_tools


@pytest.mark.parametrize(
    ("refusal", "reported"), [("I can't.", "I can't."), ("", None), (None, None), (5, None), ({"a": 1}, None)]
)
def test_a_refusal_is_reported(refusal: Any, reported: str | None) -> None:
    assert read({"content": None, "refusal": refusal}).refusal == reported


@pytest.mark.parametrize(
    ("reason", "reported"), [("stop", "stop"), ("", ""), (None, None), (5, None), (["stop"], None)]
)
def test_a_finish_reason_is_text_or_none(reason: Any, reported: str | None) -> None:
    assert read({"content": "a"}, choice={"finish_reason": reason}).finish_reason == reported


@pytest.mark.parametrize(
    ("message", "choice", "is_plain"),
    [
        ({"role": "assistant", "content": "a"}, {}, True),
        ({"content": "a", "name": "bot"}, {}, True),
        ({"content": "a", "tool_calls": None, "refusal": None, "audio": None}, {"logprobs": None}, True),
        ({"content": "a", "tool_calls": [], "annotations": []}, {}, True),
        ({"content": "a", "reasoning_content": ""}, {}, True),
        ({"content": "a", "reasoning_content": "hm"}, {}, False),
        ({"content": "a", "reasoning": "hm"}, {}, False),
        ({"content": "a", "refusal": "no"}, {}, False),
        ({"content": "a", "tool_calls": [{"id": "1"}]}, {}, False),
        ({"content": [{"type": "text", "text": "a"}]}, {}, False),
        ({"content": "a"}, {"logprobs": {"content": [{"token": "a"}]}}, False),
        ({"content": "a"}, {"logprobs": {}}, True),
    ],
)
def test_an_answer_is_plain_if_it_has_nothing_but_text(
    message: dict[str, Any], choice: dict[str, Any], is_plain: bool
) -> None:
    assert read(message, choice=choice).is_plain is is_plain


def test_the_first_of_several_choices_is_the_answer_and_none_is_lost() -> None:
    choices = [{"message": {"content": text}, "finish_reason": text} for text in ("first", "second")]
    answer = parse_answer(json.dumps({"choices": choices}).encode(), None)
    assert (answer.text, answer.finish_reason, answer.is_plain) == ("first", "first", False)
    assert answer.response["choices"] == choices


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}, (3, 4, 7, None)),
        ({"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 9}, (3, 4, 9, None)),
        ({"prompt_tokens": 3, "completion_tokens": 4}, (3, 4, 7, None)),
        ({"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": "many"}, (3, 4, 7, None)),
        ({"prompt_tokens": 3}, (3, 0, 3, None)),
        ({"prompt_tokens": 3.0, "completion_tokens": 4.5}, (3, 0, 3, None)),
        ({"prompt_tokens": None, "completion_tokens": 4}, (0, 4, 4, None)),
        ({"prompt_tokens": -3, "completion_tokens": 4}, (0, 4, 4, None)),
        ({"prompt_tokens": True, "completion_tokens": 4}, (0, 4, 4, None)),
        ({"prompt_tokens": "3", "completion_tokens": 4}, (0, 4, 4, None)),
        ({"prompt_tokens": MAX_AMOUNT, "completion_tokens": 0}, (MAX_AMOUNT, 0, MAX_AMOUNT, None)),
        ({"prompt_tokens": 10**400, "completion_tokens": 4}, (0, 4, 4, None)),
        ({"prompt_tokens": 1e300, "completion_tokens": 4}, (0, 4, 4, None)),
        ({"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}, (0, 0, 0, None)),
        ({"total_tokens": 7}, (0, 0, 7, None)),
        ({"total_tokens": 5, "estimated_cost": 0.1}, (0, 0, 5, 0.1)),
        ({"estimated_cost": 0.1}, (0, 0, 0, 0.1)),
        ({"estimated_cost": 0}, (0, 0, 0, 0.0)),
        ({"total_tokens": "7", "estimated_cost": "0.1"}, None),
        ({"prompt_tokens": "3"}, None),
        ({}, None),
    ],
)
def test_valid_fields_of_the_usage_are_read(usage: dict[str, Any], expected: Any) -> None:
    assert usage_of(**usage) == expected


@pytest.mark.parametrize("usage", [None, [], "many", 7, True])
def test_invalid_usage_does_not_invalidate_the_answer(usage: Any) -> None:
    answer = read({"content": "a"}, usage=usage)
    assert (answer.text, answer.usage) == ("a", None)


TOKENS: dict[str, Any] = {"prompt_tokens": 2_000_000, "completion_tokens": 500_000}


@pytest.mark.parametrize(
    ("stated", "cost"),
    [
        (0.25, 0.25), (0, 0.0), (3, 3.0), (0.0, 0.0), (1e-12, 1e-12),
        (None, 4.0), (-1, 4.0), ("0.25", 4.0), (True, 4.0), ({}, 4.0), (10**400, 4.0), (1e300, 4.0),
    ],
)  # fmt: skip
def test_the_providers_cost_takes_precedence_over_the_price_list(stated: Any, cost: float) -> None:
    found = usage_of(PerMillion(prompt=1.0, completion=4.0), **TOKENS, estimated_cost=stated)
    assert found is not None
    assert found[3] == cost


def test_without_a_price_the_cost_is_unknown() -> None:
    assert usage_of(**TOKENS) == (2_000_000, 500_000, 2_500_000, None)
    assert usage_of(PerMillion(0, 0), **TOKENS) == (2_000_000, 500_000, 2_500_000, 0.0)
    assert usage_of(PerMillion(1e308, 1e308), **TOKENS) == (2_000_000, 500_000, 2_500_000, None)


def test_without_the_priced_token_counts_only_the_providers_cost_is_known() -> None:
    assert usage_of(PerMillion(1, 4), total_tokens=5) == (0, 0, 5, None)
    assert usage_of(PerMillion(1, 4), total_tokens=5, estimated_cost=0.1) == (0, 0, 5, 0.1)
    assert usage_of(PerMillion(1, 4), completion_tokens=500_000) == (0, 500_000, 500_000, 2.0)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_a_number_that_json_cannot_represent_becomes_null(number: str) -> None:
    body = (
        f'{{"x":{number},"choices":[{{"message":{{"content":"a"}}}}],"usage":{{"prompt_tokens":{number}}}}}'
    )
    answer = parse_answer(body.encode(), None)
    assert answer.text == "a"
    assert answer.response["x"] is None
    assert answer.usage is None


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_an_answer_is_read_in_every_unicode_encoding(encoding: str) -> None:
    body = json.dumps({"choices": [{"message": {"content": "猫"}}]}, ensure_ascii=False)
    assert parse_answer(body.encode(encoding), None).text == "猫"


ANY_TEXT = st.text(st.characters(exclude_categories=[]), max_size=8)
ANY_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(ANY_TEXT, inner, max_size=2)
        | st.fixed_dictionaries({}, optional=dict.fromkeys(("message", "content", "type", "text"), inner))
    ),
    max_leaves=10,
)


@given(body=st.binary())
def test_all_bytes_are_malformed_or_an_answer(body: bytes) -> None:
    try:
        parse_answer(body, None)
    except MalformedAnswerError:
        return


@given(choices=ANY_VALUE | st.lists(ANY_VALUE, min_size=1, max_size=2), usage=ANY_VALUE)
def test_all_json_is_malformed_or_an_answer(choices: Any, usage: Any) -> None:
    body = json.dumps({"choices": choices, "usage": usage}).encode()
    try:
        answer = parse_answer(body, PerMillion(1e300, 1e300))
    except MalformedAnswerError:
        return
    assert answer.text is None or answer.text.strip()
    if answer.usage is not None and answer.usage.cost_usd is not None:
        assert math.isfinite(answer.usage.cost_usd)


@given(
    prompt=st.integers(0, MAX_AMOUNT),
    completion=st.integers(0, MAX_AMOUNT),
    price=st.builds(PerMillion, prompt=st.floats(0, 1e6), completion=st.floats(0, 1e6)),
)
def test_a_cost_is_tokens_times_price(prompt: int, completion: int, price: PerMillion) -> None:
    found = usage_of(price, prompt_tokens=prompt, completion_tokens=completion)
    assert found is not None
    assert found[3] == pytest.approx(prompt / 1e6 * price.prompt + completion / 1e6 * price.completion)


def test_a_stored_answer_can_be_read_back() -> None:
    body = (
        b'{"choices":[{"finish_reason":"stop","message":{"content":"a cat","tool_calls":[{"id":"1"}]}}],'
        b'"usage":{"prompt_tokens":3,"completion_tokens":4,"estimated_cost":0.25}}'
    )
    answer = parse_answer(body, None)
    assert deserialize_answer(serialize_answer(answer)) == answer


def test_an_answer_with_a_lone_surrogate_can_be_stored() -> None:
    answer = parse_answer(b'{"choices":[{"message":{"content":"cut \\ud83d"}}]}', None)
    kept = deserialize_answer(serialize_answer(answer))
    assert kept is not None
    assert kept.text == "cut ?"


@pytest.mark.parametrize("kept", [b"", b"{}", b"[]", b"not JSON", b'{"text": 1}'])
def test_a_stored_object_that_is_not_an_answer_is_rejected(kept: bytes) -> None:
    assert deserialize_answer(kept) is None
