"""Make the simulator's answers from the request and its decoded images."""

import json
import math
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from deploy.local.model_simulator.behavior import Answer, Wrapping
from deploy.local.model_simulator.calls import Picture
from deploy.local.model_simulator.request import Conversation, RefusedError

PREFIX = "[simulated model]"

# USD per token: the order of magnitude of hosted vision models.
_PROMPT_PRICE = 0.35e-6
_COMPLETION_PRICE = 0.40e-6

_CHARACTERS_PER_TOKEN = 4
_TOKENS_PER_TEXT = 4
_PATCH_PIXELS = 28
_MAX_TOKENS_PER_PICTURE = 16_384
_DIGEST_CHARACTERS = 12
_QUOTED_CHARACTERS = 80


def describe(conversation: Conversation, pictures: Sequence[Picture]) -> str:
    """Return the answer's text."""
    seen = [_describe_picture(picture) for picture in pictures]
    seen += [f"a link to {urlsplit(link).hostname}, not opened" for link in conversation.links]
    if not seen:
        question = conversation.question
        dots = "…" if len(question) > _QUOTED_CHARACTERS else ""
        return f"{PREFIX} I see no picture; you wrote “{question[:_QUOTED_CHARACTERS]}{dots}”."
    if len(seen) == 1:
        return f"{PREFIX} I see {seen[0]}."
    listed = "; ".join(f"({number}) {what}" for number, what in enumerate(seen, start=1))
    return f"{PREFIX} I see {len(seen)} pictures: {listed}."


def _describe_picture(picture: Picture) -> str:
    *others, last = picture.colours or [""]
    colours = f"{', '.join(others)} and {last}" if others else last
    look = f", mostly {colours}" if colours else ""
    size = f"{picture.width}x{picture.height} pixels"
    return f"a {picture.format} picture of {size}{look} (sha256 {picture.sha256[:_DIGEST_CHARACTERS]})"


def body(
    request: dict[str, Any], conversation: Conversation, pictures: Sequence[Picture], changes: Answer
) -> dict[str, Any]:
    """Return the response body.

    Args:
        request: The request's body.
        conversation: Its parsed messages.
        pictures: Its images.
        changes: How the answer differs from the usual one.

    Raises:
        RefusedError: The request contains an invalid `response_format` or `tool_choice`.
    """
    text = describe(conversation, pictures) if changes.text is None else changes.text
    message, finish_reason = _message(request, text, pictures, changes)
    choice = {
        "index": 0,
        "message": message,
        "finish_reason": changes.finish_reason or finish_reason,
        "logprobs": {"content": [], "refusal": None} if request.get("logprobs") else None,
    }
    answer: dict[str, Any] = {
        "id": f"chatcmpl-simulated-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request["model"],
        "system_fingerprint": "model-simulator",
        "choices": [] if changes.no_choices else [choice],
        "simulator": {
            "images": [picture.model_dump() for picture in pictures],
            "links": conversation.links,
        },
    }
    if changes.usage != "none":
        answer["usage"] = _usage(conversation, pictures, message)
        if changes.usage == "no_cost":
            del answer["usage"]["estimated_cost"]
    return answer | changes.extra


def wrap(answer: dict[str, Any], wrapping: Wrapping | None) -> bytes:
    """Return the JSON of an answer with something around it."""
    raw = json.dumps(answer).encode()
    match wrapping:
        case None:
            return raw
        case "bom":
            return b"\xef\xbb\xbf" + raw
        case "comments":
            return b": processing\n\n: processing\n\n" + raw + b"\n"
        case "object":
            return json.dumps({"success": True, "result": answer}).encode()
        case "stream":
            return b"".join(b"data: " + json.dumps(it).encode() + b"\n\n" for it in _chunks(answer)) + (
                b"data: [DONE]\n\n"
            )


def interrupted(answer: dict[str, Any]) -> dict[str, Any]:
    """Return the answer with half of its text, and the finish reason `error`."""
    choices = [
        {**choice, "message": {**choice["message"], "content": "half of"}, "finish_reason": "error"}
        for choice in answer["choices"]
    ]
    return {**answer, "choices": choices}


def _chunks(answer: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the chunks of an answer: each choice, then its end, then the usage."""
    common = {**answer, "object": "chat.completion.chunk", "choices": [], "usage": None}
    for choice in answer["choices"]:
        index = choice["index"]
        delta = {"index": index, "delta": choice["message"], "finish_reason": None}
        yield {**common, "choices": [delta]}
        yield {**common, "choices": [{"index": index, "delta": {}, "finish_reason": choice["finish_reason"]}]}
    yield {**common, "usage": answer.get("usage")}


def _usage(
    conversation: Conversation, pictures: Sequence[Picture], message: dict[str, Any]
) -> dict[str, Any]:
    """Count 4 tokens for each text, one for 4 characters, and one for each 28 by 28 pixels of an image."""
    prompt = sum(_TOKENS_PER_TEXT + _tokens_of(text) for text in conversation.texts)
    prompt += sum(map(_tokens_of_picture, pictures))
    if "tool_calls" in message:
        completion = _tokens_of(json.dumps(message["tool_calls"]))
    else:
        completion = _tokens_of(str(message["content"] or "") + message.get("reasoning_content", ""))
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "estimated_cost": round(prompt * _PROMPT_PRICE + completion * _COMPLETION_PRICE, 10),
    }


def _tokens_of(text: str) -> int:
    return math.ceil(len(text) / _CHARACTERS_PER_TOKEN)


def _tokens_of_picture(picture: Picture) -> int:
    patches = math.ceil(picture.width / _PATCH_PIXELS) * math.ceil(picture.height / _PATCH_PIXELS)
    return min(patches, _MAX_TOKENS_PER_PICTURE)


def _message(
    request: dict[str, Any], text: str, pictures: Sequence[Picture], changes: Answer
) -> tuple[dict[str, Any], str]:
    """Return the assistant's message and its finish reason."""
    message: dict[str, Any] = {"role": "assistant", "content": None}
    for name in ("reasoning_content", "refusal"):
        if (value := getattr(changes, name)) is not None:
            message[name] = value
    tool = _tool_to_call(request)
    if tool is not None and changes.text is None:
        message["tool_calls"] = [_tool_call(tool, text, pictures)]
        return message, "tool_calls"
    if changes.null_content or (changes.refusal is not None and changes.text is None):
        return message, "stop"
    if changes.text is None:
        text = _formatted(request, text, pictures)
    text, finish_reason = _truncated(request, text)
    message["content"] = [{"type": "text", "text": text}] if changes.parts else text
    return message, finish_reason


def _formatted(request: dict[str, Any], text: str, pictures: Sequence[Picture]) -> str:
    """Return the text in the request's `response_format`."""
    match request.get("response_format"):
        case {"type": "json_object"}:
            seen = {"sha256", "format", "width", "height", "colours"}
            images = [picture.model_dump(include=seen) for picture in pictures]
            return json.dumps({"answer": text, "images": images}, ensure_ascii=False)
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return json.dumps(_fill(schema, text, len(pictures)), ensure_ascii=False)
        case None | {"type": "text"}:
            return text
        case _:
            raise RefusedError("'response_format' is not supported", param="response_format")


def _truncated(request: dict[str, Any], text: str) -> tuple[str, str]:
    """Return the text up to a stop sequence or the token limit, and the finish reason."""
    stop = request.get("stop") or []
    for sequence in [stop] if isinstance(stop, str) else stop:
        text = text.partition(sequence)[0]
    limit = request.get("max_completion_tokens") or request.get("max_tokens")
    if isinstance(limit, int) and _tokens_of(text) > limit:
        return text[: limit * _CHARACTERS_PER_TOKEN], "length"
    return text, "stop"


def _tool_to_call(request: dict[str, Any]) -> dict[str, Any] | None:
    """Return the function that the request demands to be called; other tools are never called."""
    choice = request.get("tool_choice")
    if choice in (None, "none", "auto"):
        return None
    name = choice["function"]["name"] if isinstance(choice, dict) else None
    for tool in request.get("tools") or []:
        function: dict[str, Any] = tool["function"]
        if name in (None, function["name"]):
            return function
    raise RefusedError(f"tool_choice: there is no tool {name!r}", param="tool_choice")


def _tool_call(function: dict[str, Any], text: str, pictures: Sequence[Picture]) -> dict[str, Any]:
    arguments = _fill(function.get("parameters") or {"type": "object"}, text, len(pictures))
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": function.get("name"), "arguments": json.dumps(arguments, ensure_ascii=False)},
    }


def _fill(schema: dict[str, Any], text: str, count: int) -> Any:
    """Return a value for a simple JSON schema: the text for strings, the count for numbers."""
    if schema.get("enum"):
        return schema["enum"][0]
    kind = schema.get("type", "object")
    if kind == "object":
        return {name: _fill(inner, text, count) for name, inner in schema.get("properties", {}).items()}
    return {"string": text, "integer": count, "number": count, "boolean": count > 0, "array": []}.get(kind)
