"""Parse the response of the model API. It was billed, so odd fields do not make it invalid."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from pydantic import TypeAdapter, ValidationError

from vqa_worker.messages.result import Usage
from vqa_worker.messages.serialization import to_json

# The fields of a plain text message; any other field that is set needs the whole response.
_PLAIN_MESSAGE_FIELDS = frozenset({"role", "content", "name"})
TOKENS_PER_PRICE = 1_000_000
# Larger counts and costs are ignored: 64-bit floats, and so metrics, are exact up to here.
MAX_AMOUNT = 2**53


class Price(Protocol):
    """USD per million tokens."""

    @property
    def prompt(self) -> float:
        """Of prompt tokens, images included."""

    @property
    def completion(self) -> float:
        """Of completion tokens."""


class MalformedAnswerError(Exception):
    """The body of a 200 response is not a chat completion; the message says why."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of the model.

    Attributes:
        text: None if there is none, or only white space.
        calls_tools: whether the model requests a tool call.
        finish_reason: as the API reports it.
        usage: tokens and cost, if the API reports them.
        refusal: the text of the field `refusal`, if the model refused.
        is_plain: whether `text` is all; if not, the result includes `response`.
        response: the whole body.
    """

    text: str | None
    calls_tools: bool
    finish_reason: str | None
    usage: Usage | None
    refusal: str | None
    is_plain: bool
    response: dict[str, Any]

    @property
    def is_empty(self) -> bool:
        """Whether there is neither text nor a tool call."""
        return self.text is None and not self.calls_tools


def serialize_answer(answer: Answer) -> bytes:
    """Return an answer as JSON for the result store."""
    return to_json(_adapter().dump_python(answer))


def deserialize_answer(stored: bytes) -> Answer | None:
    """Return an answer from the result store, or None if the JSON is not an answer."""
    try:
        return _adapter().validate_json(stored)
    except ValidationError:
        return None


@cache
def _adapter() -> TypeAdapter[Answer]:
    return TypeAdapter(Answer)


def parse_answer(body: bytes, price: Price | None) -> Answer:
    """Parse the body of a 200 response; only the message itself must be valid.

    Raises:
        MalformedAnswerError: the body is not a chat completion.
    """
    response = _parse_object(body)
    choice = _first_choice(response)
    message = choice.get("message")
    if not isinstance(message, dict):
        raise MalformedAnswerError("the first choice has no message")
    content = message.get("content")
    text = _text_of(content)
    finish_reason = choice.get("finish_reason")
    refusal = message.get("refusal")
    return Answer(
        text=text if text is not None and text.strip() else None,
        calls_tools=bool(message.get("tool_calls") or message.get("function_call")),
        finish_reason=finish_reason if isinstance(finish_reason, str) else None,
        usage=_usage_of(response.get("usage"), price),
        refusal=refusal if isinstance(refusal, str) and refusal else None,
        is_plain=_is_plain(response, choice, message),
        response=response,
    )


def parse_model_list(body: bytes) -> frozenset[str] | None:
    """Return the ids of `{"data": [{"id": …}]}` or of the list alone; None if it is not a list of models."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    entries = value.get("data") if isinstance(value, dict) else value
    if not isinstance(entries, list):
        return None
    ids = [entry.get("id") for entry in entries if isinstance(entry, dict)]
    return frozenset(name for name in ids if isinstance(name, str)) or None


def _parse_object(body: bytes) -> dict[str, Any]:
    try:
        # NaN and 1e999, which the JSON of the result cannot contain, become null.
        value = json.loads(body, parse_constant=lambda _: None, parse_float=_finite_float)
    except (ValueError, RecursionError):
        raise MalformedAnswerError("the body is not JSON") from None
    if not isinstance(value, dict):
        raise MalformedAnswerError("the body is not a JSON object")
    return value


def _finite_float(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


def _first_choice(response: Mapping[str, Any]) -> dict[str, Any]:
    """Return the first choice, or one with an empty message if the list is empty."""
    choices = response.get("choices")
    if not isinstance(choices, list):
        raise MalformedAnswerError("the body has no list of choices")
    if not choices:
        return {"message": {}}
    if not isinstance(choices[0], dict):
        raise MalformedAnswerError("the first choice is not an object")
    return choices[0]


def _text_of(content: object) -> str | None:
    """Return the text of a message's content.

    Raises:
        MalformedAnswerError: the content is not a string, null or a list of parts.
    """
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(text for text in texts if isinstance(text, str))
    raise MalformedAnswerError("the message's content is neither text nor parts")


def _is_plain(response: Mapping[str, Any], choice: Mapping[str, Any], message: Mapping[str, Any]) -> bool:
    extras = [value for field, value in message.items() if field not in _PLAIN_MESSAGE_FIELDS]
    several = isinstance(message.get("content"), list) or len(response["choices"]) > 1
    return not (any(extras) or several or choice.get("logprobs"))


def _usage_of(usage: object, price: Price | None) -> Usage | None:
    """Return the reported usage, even if incomplete; None if nothing is reported."""
    if not isinstance(usage, dict):
        return None
    prompt, completion = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
    total, cost = _count(usage.get("total_tokens")), _reported_cost(usage)
    if all(amount is None for amount in (prompt, completion, total, cost)):
        return None
    # Without any count, the computed cost would be 0.
    if cost is None and (prompt is not None or completion is not None):
        cost = _computed_cost(prompt or 0, completion or 0, price)
    prompt, completion = prompt or 0, completion or 0
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=total or prompt + completion,
        cost_usd=cost,
    )


def _count(value: object) -> int | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_AMOUNT:
        return value
    return None


def _reported_cost(usage: Mapping[str, Any]) -> float | None:
    reported = usage.get("estimated_cost")
    if isinstance(reported, (int, float)) and not isinstance(reported, bool) and 0 <= reported <= MAX_AMOUNT:
        return float(reported)
    return None


def _computed_cost(prompt: int, completion: int, price: Price | None) -> float | None:
    if price is None:
        return None
    cost = (prompt * price.prompt + completion * price.completion) / TOKENS_PER_PRICE
    return cost if math.isfinite(cost) else None
