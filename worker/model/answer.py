"""Parse the response of the model API. It was billed, so odd fields do not make it invalid."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from vqa_worker.messages.result import SentImage, Usage
from vqa_worker.messages.serialization import to_json
from worker.model.answer_schema import Checked
from worker.model.classification import effective_status
from worker.model.error_body import parse_error_body
from worker.model.reported_error import error_in
from worker.model.response_body import MalformedBodyError, read_object
from worker.model.stream import INTERRUPTED
from worker.model.usage import Price, read_usage

_NO_HEADERS: Final[Mapping[str, str]] = {}

# The fields of a plain text message; any other field that is set needs the whole response.
_PLAIN_MESSAGE_FIELDS: Final = frozenset({"role", "content", "name"})
# Content parts that are not the answer: Mistral docs (Reasoning), Anthropic docs (Extended thinking), and
# OpenAI's Responses API.
_REASONING_PARTS: Final = frozenset(
    {"reasoning", "reasoning_content", "reasoning_text", "redacted_thinking", "thinking", "thought"}
)
# The answer was interrupted: OpenRouter (Errors), vLLM and SGLang (an aborted request), and DeepSeek docs
# (Chat Completions).
_INTERRUPTED: Final = frozenset({INTERRUPTED, "abort", "insufficient_system_resource"})


class MalformedAnswerError(Exception):
    """The body of a 200 response is not a chat completion; the message says why.

    Attributes:
        usage: tokens and cost, if the response reports them.
    """

    def __init__(self, message: str, usage: Usage | None = None) -> None:
        super().__init__(message)
        self.usage = usage


class ErrorInAnswerError(Exception):
    """A 200 response reports an error instead of an answer, or after a part of it.

    Attributes:
        status: the HTTP status that the error should have had; 500 if it says nothing about it.
        body: the JSON of the error response that it should have been.
        usage: tokens and cost, if the response reports them.
        is_partial: whether there is a part of an answer, which was probably billed.
        headers: of the response.
    """

    def __init__(self, body: bytes, usage: Usage | None, *, is_partial: bool) -> None:
        self.status = effective_status(HTTPStatus.OK, parse_error_body(body))
        super().__init__(f"the API answered 200 with an error of status {self.status}")
        self.body = body
        self.usage = usage
        self.is_partial = is_partial
        self.headers: Mapping[str, str] = _NO_HEADERS


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of the model.

    Attributes:
        text: None if there is none, or only white space.
        calls_tools: whether the model requests a tool call.
        finish_reason: as the API reports it.
        usage: tokens and cost, if the API reports them; of all calls, if this answer repairs another one.
        refusal: the text of the field `refusal`, if the model refused.
        is_plain: whether `text` is all; if not, the result includes `response`.
        response: the whole body.
        answered_model: the model that answered, as the API reports it.
        service_tier: of the answer, as the API reports it.
        provider: that answered.
        images: what was sent of the images that the worker read; None: of none.
        checked: the value of the text, or what is wrong with it; None: the job has no JSON schema.
        repairs: how many answers before this one did not satisfy the schema.
    """

    text: str | None
    calls_tools: bool
    finish_reason: str | None
    usage: Usage | None
    refusal: str | None
    is_plain: bool
    response: dict[str, Any]
    answered_model: str | None = None
    service_tier: str | None = None
    provider: str | None = None
    images: list[SentImage] | None = None
    checked: Checked | None = None
    repairs: int = 0

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


def parse_answer(body: bytes, price: Price | None, headers: Mapping[str, str] = _NO_HEADERS) -> Answer:
    """Parse the body of a 200 response; only the message itself must be valid.

    Args:
        body: see `read_object` for what may be around the JSON.
        price: of the model.
        headers: of the response, in which some providers report the cost.

    Raises:
        MalformedAnswerError: the body is not a chat completion, or the answer was interrupted.
        ErrorInAnswerError: the body is an error.
    """
    try:
        response = read_object(body)
    except MalformedBodyError as error:
        raise MalformedAnswerError(str(error)) from None
    usage = read_usage(_reported_usage(response), price, headers)
    try:
        answer = _answer_of(response, usage)
    except MalformedAnswerError as error:
        error.usage = usage
        if (reported := error_in(response)) is not None:
            raise ErrorInAnswerError(reported, usage, is_partial=False) from None
        raise
    is_interrupted = (answer.finish_reason or "").lower() in _INTERRUPTED
    if (answer.is_empty or is_interrupted) and (reported := error_in(response)) is not None:
        raise ErrorInAnswerError(reported, usage, is_partial=not answer.is_empty)
    if is_interrupted:
        raise MalformedAnswerError(
            f"the answer was interrupted (finish_reason {answer.finish_reason})", usage
        )
    return answer


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


def _answer_of(response: dict[str, Any], usage: Usage | None) -> Answer:
    """Return the answer in a response.

    Raises:
        MalformedAnswerError: there is no message, and nothing says that an empty one was billed.
    """
    choice = _first_choice(response, usage)
    message = _message_of(choice, usage)
    text = _text_of(message.get("content"))
    return Answer(
        text=text if text is not None and text.strip() else None,
        calls_tools=bool(message.get("tool_calls") or message.get("function_call")),
        finish_reason=_text(choice.get("finish_reason")),
        usage=usage,
        refusal=_text(message.get("refusal")) or None,
        is_plain=_is_plain(response, choice, message),
        response=response,
        answered_model=_text(response.get("model")) or None,
        service_tier=_text(response.get("service_tier")) or None,
    )


def _reported_usage(response: Mapping[str, Any]) -> object:
    """Return the field with the usage: Groq has it elsewhere in streams, and Gemini's own API everywhere."""
    groq = response.get("x_groq")
    in_groq = groq.get("usage") if isinstance(groq, dict) else None
    return response.get("usage") or in_groq or response.get("usageMetadata")


def _first_choice(response: Mapping[str, Any], usage: Usage | None) -> Mapping[str, Any]:
    """Return the first choice, or an empty one if the response was billed without any.

    `"choices": null` is what some APIs answer to a blocked prompt, of which they bill the prompt.
    """
    choices = response.get("choices")
    if isinstance(choices, list) and choices:
        if isinstance(choices[0], dict):
            return choices[0]
        raise MalformedAnswerError("the first choice is not an object")
    is_blocked = choices is None and "choices" in response
    if choices in (None, []) and usage is not None and _is_billed(usage, with_prompt=is_blocked):
        return {"message": {}}
    is_list = isinstance(choices, list)
    raise MalformedAnswerError(
        "the list of choices is empty" if is_list else "the body has no list of choices"
    )


def _message_of(choice: Mapping[str, Any], usage: Usage | None) -> Mapping[str, Any]:
    """Return the message of a choice; an empty one for null that was billed, or that has a finish reason."""
    message = choice.get("message", choice.get("delta"))
    if isinstance(message, dict):
        return message
    if isinstance(message, str):
        return {"content": message}
    if isinstance(choice.get("text"), str):
        # The format of OpenAI's older completions API.
        return {"content": choice["text"]}
    is_billed = usage is not None and _is_billed(usage, with_prompt=True)
    if message is None and (is_billed or choice.get("finish_reason")):
        return {}
    raise MalformedAnswerError("the first choice has no message")


def _is_billed(usage: Usage, *, with_prompt: bool) -> bool:
    return bool(usage.completion_tokens or (with_prompt and (usage.prompt_tokens or usage.total_tokens)))


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _text_of(content: object) -> str | None:
    """Return the text of a message's content, without the model's reasoning.

    Raises:
        MalformedAnswerError: the content is not a string, null, a part or a list of parts.
    """
    if content is None or isinstance(content, str):
        return content
    parts = [content] if isinstance(content, dict) and "text" in content else content
    if not isinstance(parts, list):
        raise MalformedAnswerError("the message's content is neither text nor parts")
    texts = [part.get("text") for part in parts if isinstance(part, dict) and not _is_reasoning(part)]
    return "".join(text for text in texts if isinstance(text, str))


def _is_reasoning(part: Mapping[str, Any]) -> bool:
    # Gemini docs, Thinking: `thought` marks a summary of the reasoning.
    return part.get("thought") is True or str(part.get("type")) in _REASONING_PARTS


def _is_plain(response: Mapping[str, Any], choice: Mapping[str, Any], message: Mapping[str, Any]) -> bool:
    extras = [value for field, value in message.items() if field not in _PLAIN_MESSAGE_FIELDS]
    several = isinstance(message.get("content"), (list, dict)) or len(response.get("choices") or ()) > 1
    return not (any(extras) or several or choice.get("logprobs"))
