"""Parsing of the API's response: it is billed, so only an unusable one is rejected."""

import json
import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqa_worker.messages.result import Usage
from worker.model.answer import (
    Answer,
    ErrorInAnswerError,
    MalformedAnswerError,
    deserialize_answer,
    parse_answer,
    serialize_answer,
)
from worker.model.classification import classify
from worker.model.usage import MAX_AMOUNT
from worker.providers import GENERIC, load_profile


@dataclass(frozen=True)
class PerMillion:
    """USD per million tokens."""

    prompt: float
    completion: float
    cached_prompt: float | None = None


def read(message: Any, *, price: PerMillion | None = None, **fields: Any) -> Answer:
    choice = {"index": 0, "message": message, **fields.pop("choice", {})}
    return parse_answer(json.dumps({"choices": [choice], **fields}).encode(), price)


Counts = tuple[int | None, int | None, int | None, float | None]


def usage_of(price: PerMillion | None = None, **usage: Any) -> Counts | None:
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
        ([{"type": "thinking", "text": "hm"}, {"type": "text", "text": "A cat."}], "A cat."),
        ([{"type": "reasoning", "text": "hm"}, {"type": "output_text", "text": "A cat."}], "A cat."),
        ([{"type": "reasoning_text", "text": "hm"}, {"text": "A cat."}], "A cat."),
        ([{"type": "text", "text": "hm", "thought": True}, {"type": "text", "text": "A cat."}], "A cat."),
        ([{"type": "reasoning", "text": "hm"}], None),
        ({"type": "text", "text": "A cat."}, "A cat."),
        # This may be the answer to a question about XML.
        ("<think>hm</think>A cat.", "<think>hm</think>A cat."),
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
        b"<html></html>", b"\xff", b"\x1f\x8b\x08",
        b"data: {}\n\n", b"data: [DONE]\n\n", b": comment\n\n", b"data: {\n\ndata: [DONE]\n\n",
        b'{"choices":null}', b'{"choices":{}}', b'{"choices":"a"}',
        b'{"choices":[null]}',
        b'{"choices":["a"]}', b'{"choices":[[]]}', b'{"choices":[{}]}', b'{"choices":[{"message":null}]}',
        b'{"choices":[{"message":5}]}', b'{"choices":[{"message":{"content":5}}]}',
        b'{"choices":[{"message":{"content":{}}}]}', b'{"choices":[{"message":{"content":true}}]}',
        b'{"choices":[{"message":{"content":"a"}}]',
        b'{"choices":[]}', b'{"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":0}}',
        b'{"usage":{"prompt_tokens":7,"completion_tokens":0}}',
        b'{"choices":null,"usage":{"prompt_tokens":0,"completion_tokens":0,"total_tokens":0}}',
        b'{"choices":null,"usage":null}',
        b"[" * 100_000, b'{"a":' * 100_000, b"{" * 100_000, b"x{" * 100_000,
    ],
)  # fmt: skip
def test_a_body_that_is_not_a_chat_completion_is_malformed(body: bytes) -> None:
    with pytest.raises(MalformedAnswerError):
        parse_answer(body, None)


# Wrappings


GOOD = json.dumps(
    {
        "model": "m-1",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "A {cat}."}, "finish_reason": "stop"}
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
    }
)
PRETTY = json.dumps(json.loads(GOOD), indent=2)


def events(*data: Any, end: str = "\n\n", done: bool = True) -> str:
    lines = [f"data: {it if isinstance(it, str) else json.dumps(it)}" for it in data]
    return end.join([*lines, *(["data: [DONE]"] if done else []), ""])


def delta(content: Any = None, *, finish_reason: str | None = None, **fields: Any) -> dict[str, Any]:
    message = {**({} if content is None else {"content": content}), **fields}
    return {
        "object": "chat.completion.chunk",
        "model": "m-1",
        "choices": [{"index": 0, "delta": message, "finish_reason": finish_reason}],
        "usage": None,
    }


FINAL = {
    "object": "chat.completion.chunk",
    "choices": [],
    "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
}
CHUNKS = [delta("", role="assistant"), delta("A {c"), delta("at}."), delta(finish_reason="stop"), FINAL]
STREAM = events(*CHUNKS)


@pytest.mark.parametrize(
    "body",
    [
        GOOD,
        PRETTY,
        f"\ufeff{GOOD}",
        f"\n\n  {GOOD}\r\n \n",
        f"\ufeff\n{GOOD}\n",
        f": OPENROUTER PROCESSING\n\n: OPENROUTER PROCESSING\n\n{GOOD}",
        f": keep-alive {{\n\n{PRETTY}\n\n: keep-alive\n",
        f")]}}',\n{GOOD}",
        f"```json\n{PRETTY}\n```",
        f"{GOOD}}}",
        f"{GOOD}\n<!-- served by cache {{1}} -->",
        f"{GOOD}\n{json.dumps({'usage': {'prompt_tokens': 9}})}",
        json.dumps(GOOD),
        f"[{GOOD}]",
        json.dumps({"success": True, "errors": [], "result": json.loads(GOOD)}),
        json.dumps({"statusCode": 200, "body": GOOD}),
        events(GOOD),
        events(GOOD, done=False),
        f"event: message\nid: 1\nretry: 5\n{events(GOOD)}",
        "".join(f"data: {line}\n" for line in PRETTY.splitlines()) + "\n",
        STREAM,
        STREAM.replace("\n", "\r\n"),
        STREAM.replace("\n", "\r"),
        STREAM.replace("\n\n", "\n"),
        STREAM.replace("data: ", "data:"),
        STREAM.replace("\n\n", "\n\n: OPENROUTER PROCESSING\n\n"),
        f"\ufeff{STREAM}",
        events(*CHUNKS, done=False),
        events(*CHUNKS[:3], FINAL, done=False),
        "\n".join(map(json.dumps, CHUNKS)),
        json.dumps(CHUNKS),
        events({**FINAL, "usage": None}, *CHUNKS),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_good_answer_is_found_in_every_wrapping(body: str, encoding: str) -> None:
    answer = parse_answer(body.encode(encoding), None)
    assert (answer.text, answer.finish_reason, answer.answered_model) in [
        ("A {cat}.", "stop", "m-1"),
        ("A {cat}.", None, "m-1"),
    ]
    assert answer.usage == Usage(prompt_tokens=3, completion_tokens=4, total_tokens=7)
    assert answer.is_plain


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        ({"message": "A cat."}, "A cat."),
        ({"text": "A cat."}, "A cat."),
        ({"delta": {"content": "A cat."}, "finish_reason": "stop"}, "A cat."),
        ({"delta": {"content": "A c"}, "message": {"content": "A cat."}, "finish_reason": "stop"}, "A c"),
    ],
)
def test_an_answer_may_be_in_the_fields_of_a_similar_api(choice: dict[str, Any], text: str) -> None:
    assert parse_answer(json.dumps({"choices": [choice]}).encode(), None).text == text


def stream_of(*chunks: Any) -> Answer:
    return parse_answer(events(*chunks, FINAL).encode(), None)


def test_the_pieces_of_a_streamed_tool_call_are_joined() -> None:
    def call(**fields: Any) -> dict[str, Any]:
        return delta(None, tool_calls=[fields])

    answer = stream_of(
        delta(None, role="assistant"),
        call(index=0, id="a", type="function", function={"name": "look", "arguments": ""}),
        call(index=0, function={"arguments": '{"x"'}),
        call(index=1, id="b", type="function", function={"name": "see", "arguments": "{}"}),
        call(index=0, id="a", function={"name": "look", "arguments": ":1}"}),
        delta(finish_reason="tool_calls"),
    )
    assert answer.calls_tools
    assert not answer.is_plain
    (choice,) = answer.response["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["tool_calls"] == [
        {"index": 0, "id": "a", "type": "function", "function": {"name": "look", "arguments": '{"x":1}'}},
        {"index": 1, "id": "b", "type": "function", "function": {"name": "see", "arguments": "{}"}},
    ]


def test_streamed_reasoning_and_log_probabilities_are_in_the_response_only() -> None:
    thinking = delta("A ", reasoning_content="h")
    thinking["choices"][0]["logprobs"] = {"content": [{"token": "A"}]}
    more = delta("cat.", reasoning_content="m", finish_reason="stop")
    more["choices"][0]["logprobs"] = {"content": [{"token": "cat"}]}
    answer = stream_of(thinking, more)
    assert (answer.text, answer.is_plain) == ("A cat.", False)
    (choice,) = answer.response["choices"]
    assert choice["message"]["reasoning_content"] == "hm"
    assert choice["logprobs"] == {"content": [{"token": "A"}, {"token": "cat"}]}


def test_streamed_parts_and_text_are_joined_in_order() -> None:
    answer = stream_of(
        delta(""),
        delta([{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}]),
        delta("A c"),
        delta([{"type": "text", "text": "at."}], finish_reason="stop"),
    )
    assert (answer.text, answer.is_plain) == ("A cat.", False)


@pytest.mark.parametrize(
    "chunks",
    [
        [delta("A c")],
        [delta("A c"), '{"choices": [{"delta": {"cont'],
        [delta("A c"), delta("at", finish_reason="error")],
        [delta("A c"), {"choices": [], "usage": None}],
    ],
)
def test_a_stream_that_was_interrupted_is_malformed(chunks: list[Any]) -> None:
    with pytest.raises(MalformedAnswerError, match="interrupted"):
        parse_answer(events(*chunks, done=False).encode(), None)


# Nothing in it


@pytest.mark.parametrize(
    ("fields", "finish_reason"),
    [
        ({"choices": None, "usage": {"prompt_tokens": 7}}, None),
        ({"choices": None, "usage": {"prompt_tokens": 7, "completion_tokens": 0, "total_tokens": 7}}, None),
        ({"choices": None, "usage": {"total_tokens": 7}}, None),
        ({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}, None),
        ({"usage": {"prompt_tokens": 7, "completion_tokens": 3}}, None),
        ({"choices": [{"message": None}], "usage": {"prompt_tokens": 7}}, None),
        ({"choices": [{"message": None, "finish_reason": "content_filter"}]}, "content_filter"),
        ({"choices": [{"finish_reason": "content_filter: OTHER"}], "usage": {"prompt_tokens": 7}},
         "content_filter: OTHER"),
        ({"choices": [{"message": {}}]}, None),
    ],
)  # fmt: skip
def test_a_billed_answer_without_content_is_empty(fields: dict[str, Any], finish_reason: str | None) -> None:
    answer = parse_answer(json.dumps(fields).encode(), PerMillion(1_000_000, 0))
    assert answer.is_empty
    assert answer.is_plain
    assert answer.finish_reason == finish_reason
    if fields.get("usage", {}).get("completion_tokens") is not None:
        assert answer.usage is not None
        assert answer.usage.cost_usd == 7


@pytest.mark.parametrize(
    "body",
    [
        {"choices": [{"message": {"content": "half"}, "finish_reason": "error"}]},
        {"choices": [{"message": {"content": "half"}, "finish_reason": "abort"}]},
        {"choices": [{"message": {"content": "half"}, "finish_reason": "insufficient_system_resource"}]},
        {"choices": [{"message": {"content": None}, "finish_reason": "error"}]},
        {"choices": [{"message": {"tool_calls": [{"id": "1"}]}, "finish_reason": "abort"}]},
        {"choices": []},
        {"choices": [{"message": {"content": 5}}]},
        "A cat.",
    ],
)
def test_a_malformed_answer_has_its_usage(body: Any) -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 0}
    body = {**body, "usage": usage} if isinstance(body, dict) else {"answer": body, "usage": usage}
    with pytest.raises(MalformedAnswerError) as caught:
        parse_answer(json.dumps(body).encode(), None)
    assert caught.value.usage == Usage(prompt_tokens=3, completion_tokens=0, total_tokens=3)


# Errors


@pytest.mark.parametrize(
    ("error", "status", "category"),
    [
        ({"message": "x", "code": 400}, 400, "unknown"),
        ({"message": "x", "code": 429}, 429, "capacity"),
        ({"message": "x", "code": 502}, 502, "transient"),
        ({"message": "x", "code": "503"}, 503, "capacity"),
        ({"message": "x", "code": "429 Too Many Requests"}, 429, "capacity"),
        ({"message": "x", "status": 402}, 402, "configuration"),
        ({"message": "x", "code": 429, "status": "RESOURCE_EXHAUSTED"}, 429, "capacity"),
        ({"message": "x", "status": "UNAVAILABLE"}, 503, "capacity"),
        ({"message": "x", "status": "DEADLINE_EXCEEDED"}, 504, "transient"),
        ({"message": "x", "type": "rate_limit_error", "code": None}, 429, "capacity"),
        ({"message": "x", "type": "insufficient_quota", "code": "insufficient_quota"}, 429, "configuration"),
        ({"message": "x", "type": "invalid_request_error", "code": "model_not_found"}, 400, "model"),
        ({"message": "x", "type": "invalid_request_error", "code": "invalid_api_key"}, 400, "configuration"),
        ({"message": "x", "type": "invalid_request_error", "code": "context_length_exceeded"}, 400, "job"),
        ({"message": "x", "code": "content_policy_violation"}, 500, "job"),
        ({"message": "x", "code": "DataInspectionFailed"}, 500, "job"),
        ({"message": "x", "code": "Arrearage"}, 500, "configuration"),
        ({"message": "x", "type": "overloaded_error"}, 529, "capacity"),
        ({"message": "x", "type": "server_error"}, 500, "transient"),
        ({"message": "x", "code": 0}, 500, "transient"),
        ({"message": "x", "code": 20015}, 500, "transient"),
        ({"message": "x", "code": True}, 500, "transient"),
        ({"message": "Model busy, retry later"}, 500, "capacity"),
        ({"message": "The engine is overloaded"}, 500, "capacity"),
        ({"message": "Rate limit reached"}, 500, "capacity"),
        ({"message": "invalid"}, 500, "transient"),
        ({"message": None}, 500, "transient"),
        ({"code": [400]}, 400, "unknown"),
        ("rate_limit_exceeded", 429, "capacity"),
        ("invalid_request_error", 400, "job"),
        ("the service is unavailable now", 500, "capacity"),
        ("an invalid thing happened", 500, "transient"),
        ("429", 429, "capacity"),
        (["x"], 500, "transient"),
    ],
)
@pytest.mark.parametrize("place", ["error", "errors", "choice", "event", "list", "no answer"])
def test_an_error_in_a_200_has_the_status_and_the_category_that_it_means(
    error: Any, status: int, category: str, place: str
) -> None:
    empty = {"message": {"content": ""}, "finish_reason": None}
    body = {
        "error": {"error": error},
        "errors": {"errors": [error]},
        "choice": {"choices": [{**empty, "error": error}]},
        "event": {"error": error},
        "list": [{"error": error}],
        "no answer": {"error": error, "choices": [empty]},
    }[place]
    text = events(body) if place == "event" else json.dumps(body)
    with pytest.raises(ErrorInAnswerError) as caught:
        parse_answer(text.encode(), None)
    assert caught.value.status == status
    assert json.loads(caught.value.body) == {"error": error}
    answer = classify(status, {}, caught.value.body, profile=load_profile(GENERIC))
    assert (answer.category, answer.status) == (category, status)
    assert (caught.value.usage, caught.value.is_partial) == (None, False)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"object": "error", "message": "x", "type": "BadRequestError", "code": 400}, 400),
        ({"type": "error", "error": {"type": "overloaded_error", "message": "x"}}, 529),
        ({"detail": "x"}, 500),
        ({"code": 401, "message": "x"}, 401),
        ({"status": 503, "title": "x"}, 503),
        ({"detail": {"error": {"code": 429, "message": "x"}}}, 429),
    ],
)
def test_a_body_may_be_an_error_as_a_whole(body: dict[str, Any], status: int) -> None:
    with pytest.raises(ErrorInAnswerError) as caught:
        parse_answer(json.dumps(body).encode(), None)
    assert caught.value.status == status


@pytest.mark.parametrize("finish_reason", ["error", "abort"])
@pytest.mark.parametrize("place", ["response", "choice", "stream"])
def test_an_error_after_half_an_answer_is_an_error_with_its_usage(finish_reason: str, place: str) -> None:
    error = {"code": 502, "message": "the provider went away"}
    usage = {"prompt_tokens": 3, "completion_tokens": 4}
    choice = {"message": {"content": "half"}, "finish_reason": finish_reason}
    body = {
        "response": json.dumps({"choices": [choice], "error": error, "usage": usage}),
        "choice": json.dumps({"choices": [{**choice, "error": error}], "usage": usage}),
        "stream": events(delta("ha"), delta("lf"), {**delta(finish_reason=finish_reason), "error": error,
                                                    "usage": usage}, done=False),
    }[place]  # fmt: skip
    with pytest.raises(ErrorInAnswerError) as caught:
        parse_answer(body.encode(), None)
    assert (caught.value.status, caught.value.is_partial) == (502, True)
    assert caught.value.usage == Usage(prompt_tokens=3, completion_tokens=4, total_tokens=7)


@pytest.mark.parametrize(
    "fields",
    [
        {"error": {"code": 400, "message": "x"}},
        {"error": None},
        {"error": {}},
        {"error": ""},
        {"errors": [{"message": "a plugin failed"}]},
        {"code": 500},
        {"detail": "x"},
        {"choice": {"error": {"code": 502, "message": "x"}}},
    ],
)
def test_a_whole_answer_stays_an_answer_with_a_field_that_looks_like_an_error(fields: dict[str, Any]) -> None:
    choice = {"finish_reason": "stop", **fields.pop("choice", {})}
    assert read({"content": "A cat."}, choice=choice, **fields).text == "A cat."
    assert read({"tool_calls": [{"id": "1"}]}, choice=choice, **fields).calls_tools


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
        ({"prompt_tokens": 3}, (3, None, None, None)),
        ({"prompt_tokens": 3.0, "completion_tokens": 4.5}, (3, None, None, None)),
        ({"prompt_tokens": None, "completion_tokens": 4}, (None, 4, None, None)),
        ({"prompt_tokens": None, "completion_tokens": 4, "total_tokens": 7}, (None, 4, 7, None)),
        ({"prompt_tokens": -3, "completion_tokens": 4}, (None, 4, None, None)),
        ({"prompt_tokens": True, "completion_tokens": 4}, (None, 4, None, None)),
        ({"prompt_tokens": "3", "completion_tokens": 4}, (3, 4, 7, None)),
        ({"prompt_tokens": " 12 ", "completion_tokens": "4.0"}, (12, 4, 16, None)),
        ({"prompt_tokens": "", "completion_tokens": 4}, (None, 4, None, None)),
        ({"prompt_tokens": "1,624", "completion_tokens": 4}, (None, 4, None, None)),
        ({"prompt_tokens": "0x10", "completion_tokens": 4}, (None, 4, None, None)),
        ({"prompt_tokens": "\u0663", "completion_tokens": 4}, (None, 4, None, None)),
        ({"prompt_tokens": "-3", "completion_tokens": 4}, (None, 4, None, None)),
        ({"prompt_tokens": "9" * 5000, "completion_tokens": 4}, (None, 4, None, None)),
        ({"prompt_tokens": [3], "completion_tokens": {"n": 4}, "total_tokens": 7}, (None, None, 7, None)),
        ({"prompt_tokens": MAX_AMOUNT, "completion_tokens": 0}, (MAX_AMOUNT, 0, MAX_AMOUNT, None)),
        ({"prompt_tokens": 10**400, "completion_tokens": 4}, (None, 4, None, None)),
        ({"prompt_tokens": 1e300, "completion_tokens": 4}, (None, 4, None, None)),
        ({"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}, (0, 0, 0, None)),
        ({"total_tokens": 7}, (None, None, 7, None)),
        ({"total_tokens": 5, "estimated_cost": 0.1}, (None, None, 5, 0.1)),
        ({"estimated_cost": 0.1}, (None, None, None, 0.1)),
        ({"estimated_cost": 0}, (None, None, None, 0.0)),
        ({"total_tokens": "7", "estimated_cost": "0.1"}, (None, None, 7, 0.1)),
        ({"prompt_tokens": "3"}, (3, None, None, None)),
        ({"input_tokens": 3, "output_tokens": 4}, (3, 4, 7, None)),
        ({"promptTokenCount": 3, "candidatesTokenCount": 4, "totalTokenCount": 9}, (3, 4, 9, None)),
        ({"prompt_tokens": "many"}, None),
        ({}, None),
    ],
)
def test_valid_fields_of_the_usage_are_read(usage: dict[str, Any], expected: Any) -> None:
    assert usage_of(**usage) == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"x_groq": {"id": "r", "usage": {"prompt_tokens": 3, "completion_tokens": 4}}},
        {"usage": None, "usageMetadata": {"promptTokenCount": 3, "candidatesTokenCount": 4}},
        {"usage": {"prompt_tokens": 3, "completion_tokens": 4}, "x_groq": {"usage": {"prompt_tokens": 9}}},
    ],
)
def test_the_usage_may_be_in_another_field(fields: dict[str, Any]) -> None:
    assert read({"content": "a"}, **fields).usage == Usage(
        prompt_tokens=3, completion_tokens=4, total_tokens=7
    )


@pytest.mark.parametrize("usage", [None, [], "many", 7, True])
def test_invalid_usage_does_not_invalidate_the_answer(usage: Any) -> None:
    answer = read({"content": "a"}, usage=usage)
    assert (answer.text, answer.usage) == ("a", None)


TOKENS: dict[str, Any] = {"prompt_tokens": 2_000_000, "completion_tokens": 500_000}


@pytest.mark.parametrize(
    ("stated", "cost"),
    [
        (0.25, 0.25), (0, 0.0), (3, 3.0), (0.0, 0.0), (1e-12, 1e-12),
        ("0.25", 0.25), ("1.5e-05", 1.5e-5),
        (None, 4.0), (-1, 4.0), ("free", 4.0), (True, 4.0), ({}, 4.0), (10**400, 4.0), (1e300, 4.0),
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
    assert usage_of(PerMillion(1, 4), total_tokens=5) == (None, None, 5, None)
    assert usage_of(PerMillion(1, 4), total_tokens=5, estimated_cost=0.1) == (None, None, 5, 0.1)
    assert usage_of(PerMillion(1, 4), completion_tokens=500_000) == (None, 500_000, None, None)


@pytest.mark.parametrize(
    ("usage", "cost"),
    [
        ({"estimated_cost": 0.5}, 0.5),
        ({"cost": 0.5}, 0.5),
        ({"cost": 0.5, "cost_details": {"upstream_inference_cost": 2.0}}, 0.5),
        ({"cost": 0.5, "is_byok": True, "cost_details": {"upstream_inference_cost": 2.0}}, 2.5),
        ({"cost": 0.5, "is_byok": True, "cost_details": None}, 0.5),
        ({"cost_in_usd_ticks": 37_756_000}, 0.0037756),
        ({"cost_in_usd_ticks": 37_756_000, "cost": 9}, 0.0037756),
        ({"cost": {"input_tokens_cost": 0.1, "total_cost": 0.5}}, 0.5),
        ({"cost": {"total_cost": None}}, 4.0),
    ],
)
def test_the_cost_is_read_in_each_providers_spelling(usage: dict[str, Any], cost: float) -> None:
    found = usage_of(PerMillion(prompt=1.0, completion=4.0), **TOKENS, **usage)
    assert found is not None
    assert found[3] == pytest.approx(cost)


@pytest.mark.parametrize(
    ("header", "usage", "cost"),
    [
        ("0.25", {}, 0.25),
        ("1.5e-05", {}, 1.5e-5),
        ("0.25", {"cost": 0.5}, 0.5),
        ("None", {}, 4.0),
        ("", {}, 4.0),
    ],
)
def test_the_cost_may_be_in_litellms_header(header: str, usage: dict[str, Any], cost: float) -> None:
    body = json.dumps({"choices": [{"message": {"content": "a"}}], "usage": {**TOKENS, **usage}}).encode()
    answer = parse_answer(body, PerMillion(1.0, 4.0), {"x-litellm-response-cost": header})
    assert answer.usage is not None
    assert answer.usage.cost_usd == pytest.approx(cost)


@pytest.mark.parametrize(
    ("usage", "cached", "reasoning"),
    [
        ({}, None, None),
        ({"prompt_tokens_details": {"cached_tokens": 5}}, 5, None),
        ({"prompt_tokens_details": None, "completion_tokens_details": "none"}, None, None),
        ({"prompt_tokens_details": {"cached_tokens": 0}, "prompt_cache_hit_tokens": 9}, 0, None),
        ({"prompt_cache_hit_tokens": 5, "prompt_cache_miss_tokens": 2}, 5, None),
        ({"input_tokens_details": {"cached_tokens": "5"}}, 5, None),
        ({"cache_read_input_tokens": 5}, 5, None),
        ({"cachedContentTokenCount": 5, "thoughtsTokenCount": 6}, 5, 6),
        ({"cached_tokens": 5, "reasoning_tokens": 6}, 5, 6),
        ({"completion_tokens_details": {"reasoning_tokens": 6}}, None, 6),
        ({"output_tokens_details": {"reasoning_tokens": 6.0}}, None, 6),
        ({"completion_tokens_details": {"reasoning_tokens": "many"}}, None, None),
    ],
)
def test_cached_and_reasoning_tokens_are_read_in_each_providers_spelling(
    usage: dict[str, Any], cached: int | None, reasoning: int | None
) -> None:
    found = read({"content": "a"}, usage={**TOKENS, **usage}).usage
    assert found is not None
    assert (found.cached_tokens, found.reasoning_tokens) == (cached, reasoning)
    present = {"cached_tokens", "reasoning_tokens"} & found.model_dump().keys()
    assert present == {
        name for name, it in (("cached_tokens", cached), ("reasoning_tokens", reasoning)) if it is not None
    }


@pytest.mark.parametrize(
    ("cached_price", "cached", "cost"),
    [(0.25, 1_000_000, 3.25), (None, 1_000_000, 4.0), (0.25, 0, 4.0), (0.0, 9_000_000, 2.0)],
)
def test_cached_tokens_have_their_own_price(cached_price: float | None, cached: int, cost: float) -> None:
    price = PerMillion(1.0, 4.0, cached_price)
    found = usage_of(price, **TOKENS, prompt_tokens_details={"cached_tokens": cached})
    assert found is not None
    assert found[3] == pytest.approx(cost)


@pytest.mark.parametrize(
    ("total", "cost"), [(2_500_000, 4.0), (2_750_000, 5.0), (2_600_000, 4.0), (None, 4.0)]
)
def test_reasoning_tokens_that_only_the_total_includes_are_priced(total: int | None, cost: float) -> None:
    details = {"reasoning_tokens": 250_000}
    found = usage_of(PerMillion(1.0, 4.0), **TOKENS, total_tokens=total, completion_tokens_details=details)
    assert found is not None
    assert found[3] == pytest.approx(cost)


@pytest.mark.parametrize(
    ("fields", "model", "tier"),
    [
        ({"model": "m-2", "service_tier": "flex"}, "m-2", "flex"),
        ({}, None, None),
        ({"model": "", "service_tier": ""}, None, None),
        ({"model": 5, "service_tier": ["flex"]}, None, None),
    ],
)
def test_the_answering_model_and_its_tier_are_reported(
    fields: dict[str, Any], model: str | None, tier: str | None
) -> None:
    answer = read({"content": "a"}, **fields)
    assert (answer.answered_model, answer.service_tier) == (model, tier)


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
    with suppress(MalformedAnswerError, ErrorInAnswerError):
        parse_answer(body, None)


@given(
    chunks=st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "choices": ANY_VALUE
                | st.lists(
                    st.fixed_dictionaries(
                        {},
                        optional=dict.fromkeys(("index", "delta", "message", "finish_reason"), ANY_VALUE),
                    ),
                    max_size=2,
                ),
                "usage": ANY_VALUE,
                "error": ANY_VALUE,
            },
        ),
        max_size=4,
    )
)
def test_all_streams_are_malformed_or_an_answer(chunks: list[Any]) -> None:
    with suppress(MalformedAnswerError, ErrorInAnswerError):
        parse_answer(events(*chunks).encode(), None)


@given(choices=ANY_VALUE | st.lists(ANY_VALUE, min_size=1, max_size=2), usage=ANY_VALUE)
def test_all_json_is_malformed_or_an_answer(choices: Any, usage: Any) -> None:
    body = json.dumps({"choices": choices, "usage": usage}).encode()
    try:
        answer = parse_answer(body, PerMillion(1e300, 1e300))
    except (MalformedAnswerError, ErrorInAnswerError):
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


def test_an_answer_that_an_earlier_version_stored_can_be_read() -> None:
    stored = json.loads(serialize_answer(read({"content": "a"}, usage=TOKENS)))
    for name in ("answered_model", "service_tier", "provider"):
        del stored[name]
    kept = deserialize_answer(json.dumps(stored).encode())
    assert kept is not None
    assert (kept.text, kept.provider) == ("a", None)


def test_an_answer_with_a_lone_surrogate_can_be_stored() -> None:
    answer = parse_answer(b'{"choices":[{"message":{"content":"cut \\ud83d"}}]}', None)
    kept = deserialize_answer(serialize_answer(answer))
    assert kept is not None
    assert kept.text == "cut ?"


@pytest.mark.parametrize("kept", [b"", b"{}", b"[]", b"not JSON", b'{"text": 1}'])
def test_a_stored_object_that_is_not_an_answer_is_rejected(kept: bytes) -> None:
    assert deserialize_answer(kept) is None
