"""Reading the API's answer, which is paid for: only what makes it useless is refused."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from pydantic import TypeAdapter, ValidationError

from worker.messages.result import Usage
from worker.messages.serialization import to_json

# Fields of a choice's message that plain text comes with; anything else that is set is "more".
_PLAIN_MESSAGE_FIELDS = frozenset({"role", "content", "name"})
TOKENS_PER_PRICE = 1_000_000
# Tokens or dollars beyond it are not believed: up to here a 64-bit float, and so a metric, is exact.
MAX_FIGURE = 2**53


class Price(Protocol):
    """USD per million tokens."""

    @property
    def prompt(self) -> float:
        """Of the request, images included."""

    @property
    def completion(self) -> float:
        """Of the answer."""


class MalformedAnswerError(Exception):
    """A 200 whose body is not a chat completion; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the API answered.

    Attributes:
        text: the answer's text; None where there is none (or only white space).
        calls_tools: whether the model asked for a tool call.
        finish_reason: the API's own word for why it stopped.
        usage: tokens and cost, where the API gave them.
        refusal: what the model refused with, where it said so apart from the content.
        is_plain: whether `text` says it all; if not, the result carries `response`.
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
        """Whether nothing was answered: no text and no tool call."""
        return self.text is None and not self.calls_tools


def serialize_answer(answer: Answer) -> bytes:
    """An answer as the result store keeps it."""
    return to_json(_kept().dump_python(answer))


def deserialize_answer(kept: bytes) -> Answer | None:
    """An answer that was kept; None if it is not one."""
    try:
        return _kept().validate_json(kept)
    except ValidationError:
        return None


@cache
def _kept() -> TypeAdapter[Answer]:
    return TypeAdapter(Answer)


def parse_answer(body: bytes, price: Price | None) -> Answer:
    """Read the body of a 200.

    Lenient in everything but the message itself: an answer must not be lost to an odd usage field.

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
    """The ids in a list of models, `{"data": [{"id": …}]}` or the list alone; None if it is none."""
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
        # What JSON cannot say again in the result (NaN, 1e999) becomes null.
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
    """The first choice; one with an empty message where the API well-formedly gave none."""
    choices = response.get("choices")
    if not isinstance(choices, list):
        raise MalformedAnswerError("the body has no list of choices")
    if not choices:
        return {"message": {}}
    if not isinstance(choices[0], dict):
        raise MalformedAnswerError("the first choice is not an object")
    return choices[0]


def _text_of(content: object) -> str | None:
    """The text of a message's content, which is a string, null, or a list of parts.

    Raises:
        MalformedAnswerError: it is none of these.
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
    """What the API reported as usage, however little it is; None if that is nothing."""
    if not isinstance(usage, dict):
        return None
    prompt, completion = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
    total, cost = _count(usage.get("total_tokens")), _stated_cost(usage)
    if all(figure is None for figure in (prompt, completion, total, cost)):
        return None
    # Without either count the price list would make the answer free, which nobody said.
    if cost is None and (prompt is not None or completion is not None):
        cost = _listed_cost(prompt or 0, completion or 0, price)
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
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_FIGURE:
        return value
    return None


def _stated_cost(usage: Mapping[str, Any]) -> float | None:
    stated = usage.get("estimated_cost")
    if isinstance(stated, (int, float)) and not isinstance(stated, bool) and 0 <= stated <= MAX_FIGURE:
        return float(stated)
    return None


def _listed_cost(prompt: int, completion: int, price: Price | None) -> float | None:
    if price is None:
        return None
    cost = (prompt * price.prompt + completion * price.completion) / TOKENS_PER_PRICE
    return cost if math.isfinite(cost) else None
