"""Makes the stand-in's answers from what it saw."""

import json
import math
import re
import time
import uuid
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from deploy.local.model_simulator.behavior import Answer
from deploy.local.model_simulator.calls import Picture
from deploy.local.model_simulator.request import Conversation, RefusedError

PREFIX = "[simulated model]"

# The made-up price list: the order of magnitude of hosted vision models, in USD per token.
_PROMPT_PRICE = 0.35e-6
_COMPLETION_PRICE = 0.40e-6

_CHARACTERS_PER_TOKEN = 4
_TOKENS_PER_TEXT = 4
_PATCH_PIXELS = 28
_MAX_TOKENS_PER_PICTURE = 16_384

_DIGEST_SHOWN = 12
_ASKS_FOR_TEXT = re.compile(
    r"\b(text|read|says?|signs?|written|word|words|total|price|cost|much|number|name|title|label|line|date|"
    r"receipt|store|shop|month|paid)\b",
    re.IGNORECASE,
)
_TOTAL = re.compile(r"\b(total|sum|amount due)\b", re.IGNORECASE)


def asks_for_text(question: str) -> bool:
    """Tell whether reading the text in the pictures may help with a question."""
    return _ASKS_FOR_TEXT.search(question) is not None


def describe(conversation: Conversation, pictures: Sequence[Picture]) -> str:
    """Return the answer in words."""
    seen = [_describe_picture(picture, conversation.question) for picture in pictures]
    seen += [f"a link to {urlsplit(link).hostname}, not opened" for link in conversation.links]
    if not seen:
        return (
            f"{PREFIX} There is no picture here, so I can only tell that you wrote {_quoted(conversation)}."
        )
    if len(seen) == 1:
        return f"{PREFIX} I see {seen[0]}."
    listed = "; ".join(f"({number}) {what}" for number, what in enumerate(seen, start=1))
    return f"{PREFIX} I see {len(seen)} pictures: {listed}."


def body(
    request: dict[str, Any],
    conversation: Conversation,
    pictures: Sequence[Picture],
    *,
    changes: Answer | None = None,
    estimated_cost: bool = True,
) -> dict[str, Any]:
    """Return the whole response body.

    Args:
        request: The request's body.
        conversation: Its messages, taken apart.
        pictures: What was seen in its pictures.
        changes: A scripted departure from the usual answer.
        estimated_cost: Whether `usage` has the provider's own price.

    Raises:
        RefusedError: The request asks for something that cannot be.
    """
    changes = changes or Answer()
    text = describe(conversation, pictures) if changes.text is None else changes.text
    message, finish_reason = _message(request, text, pictures, changes)
    completion_tokens = tokens_of(str(message["content"] or "") + (changes.reasoning_content or ""))
    if "tool_calls" in message:
        completion_tokens = tokens_of(json.dumps(message["tool_calls"]))
    choice = {
        "index": 0,
        "message": message,
        "finish_reason": changes.finish_reason or finish_reason,
        "logprobs": _logprobs(text, request) if request.get("logprobs") else None,
    }
    answer: dict[str, Any] = {
        "id": f"chatcmpl-simulated-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request["model"],
        "system_fingerprint": "model-simulator",
        "choices": [] if changes.no_choices else [choice],
    }
    if changes.usage != "none":
        prompt_tokens = prompt_tokens_of(conversation, pictures)
        with_cost = estimated_cost and changes.usage == "full"
        answer["usage"] = _usage(prompt_tokens, completion_tokens, with_cost=with_cost)
    answer["simulator"] = {
        "images": [picture.model_dump() for picture in pictures],
        "links": conversation.links,
    }
    return answer | changes.extra


def prompt_tokens_of(conversation: Conversation, pictures: Sequence[Picture]) -> int:
    """Return 4 tokens for each text, one for 4 characters of it, and one for each patch of a picture.

    Patches have 28 by 28 pixels, as with several open models; begun ones count; 16,384 at most for a picture.
    """
    text = sum(_TOKENS_PER_TEXT + tokens_of(text) for text in conversation.texts)
    return text + sum(_tokens_of_picture(picture) for picture in pictures)


def tokens_of(text: str) -> int:
    """Return one token for 4 characters, a begun one included."""
    return math.ceil(len(text) / _CHARACTERS_PER_TOKEN)


def _tokens_of_picture(picture: Picture) -> int:
    patches = math.ceil(picture.width / _PATCH_PIXELS) * math.ceil(picture.height / _PATCH_PIXELS)
    return min(patches, _MAX_TOKENS_PER_PICTURE)


def _usage(prompt_tokens: int, completion_tokens: int, *, with_cost: bool) -> dict[str, Any]:
    usage: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    if with_cost:
        cost = prompt_tokens * _PROMPT_PRICE + completion_tokens * _COMPLETION_PRICE
        usage["estimated_cost"] = round(cost, 10)
    return usage


def _message(
    request: dict[str, Any], text: str, pictures: Sequence[Picture], changes: Answer
) -> tuple[dict[str, Any], str]:
    """Return the assistant's message and why it ended."""
    message: dict[str, Any] = {"role": "assistant", "content": None}
    if changes.reasoning_content is not None:
        message["reasoning_content"] = changes.reasoning_content
    if changes.refusal is not None:
        message["refusal"] = changes.refusal
    tool = _tool_to_call(request)
    if tool is not None and changes.text is None:
        message["tool_calls"] = [_tool_call(tool, text, pictures)]
        return message, "tool_calls"
    if changes.null_content or (changes.refusal is not None and changes.text is None):
        return message, "stop"
    if changes.text is None:
        text = _formatted(request, text, pictures)
    text, finish_reason = _cut(request, text)
    message["content"] = [{"type": "text", "text": text}] if changes.parts else text
    return message, finish_reason


def _formatted(request: dict[str, Any], text: str, pictures: Sequence[Picture]) -> str:
    """Return the text in the form of the request's `response_format`."""
    match request.get("response_format"):
        case {"type": "json_object"}:
            plain = {"answer": text, "images": [_in_json(picture) for picture in pictures]}
            return json.dumps(plain, ensure_ascii=False)
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return json.dumps(_fill(schema, text, len(pictures)), ensure_ascii=False)
        case None | {"type": "text"}:
            return text
        case _:
            raise RefusedError("'response_format' is not one of those known here", param="response_format")


def _cut(request: dict[str, Any], text: str) -> tuple[str, str]:
    """Return the text up to the token limit or a stop sequence, and why it ends there."""
    stop = request.get("stop") or []
    for sequence in [stop] if isinstance(stop, str) else stop:
        text = text.partition(sequence)[0]
    limit = request.get("max_completion_tokens") or request.get("max_tokens")
    if isinstance(limit, int) and tokens_of(text) > limit:
        return text[: limit * _CHARACTERS_PER_TOKEN], "length"
    return text, "stop"


def _tool_to_call(request: dict[str, Any]) -> dict[str, Any] | None:
    """Return the function that the request demands to be called; the stand-in never calls one by itself."""
    functions: list[dict[str, Any]] = [tool.get("function", {}) for tool in request.get("tools") or []]
    match request.get("tool_choice"):
        case "required" if functions:
            return functions[0]
        case {"type": "function", "function": {"name": str(name)}}:
            for function in functions:
                if function.get("name") == name:
                    return function
            raise RefusedError(f"tool_choice names {name!r}, which is none of the tools", param="tool_choice")
        case _:
            return None


def _tool_call(function: dict[str, Any], text: str, pictures: Sequence[Picture]) -> dict[str, Any]:
    arguments = _fill(function.get("parameters") or {"type": "object"}, text, len(pictures))
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": function.get("name"), "arguments": json.dumps(arguments, ensure_ascii=False)},
    }


def _fill(schema: dict[str, Any], text: str, count: int) -> Any:
    """Return a value that a simple JSON schema allows: the answer for strings, the count for numbers."""
    if schema.get("enum"):
        return schema["enum"][0]
    plain = {"string": text, "integer": count, "number": count, "boolean": count > 0, "null": None}
    kind = schema.get("type", "object")
    if kind == "array":
        return [_fill(schema.get("items", {"type": "string"}), text, count)]
    if kind == "object":
        return {name: _fill(inner, text, count) for name, inner in schema.get("properties", {}).items()}
    return plain.get(kind)


def _logprobs(text: str, request: dict[str, Any]) -> dict[str, Any]:
    """Return a structure of the right form; the figures mean nothing."""
    alternatives = request.get("top_logprobs") or 0
    content = []
    for token in re.findall(r"\s*\S+", text)[:50]:
        likely = {"token": token, "logprob": -0.01, "bytes": list(token.encode())}
        other = [likely | {"logprob": -0.01 - rank} for rank in range(alternatives)]
        content.append(likely | {"top_logprobs": other})
    return {"content": content, "refusal": None}


def _in_json(picture: Picture) -> dict[str, Any]:
    return picture.model_dump(include={"sha256", "format", "width", "height", "colours", "text"})


def _describe_picture(picture: Picture, question: str) -> str:
    colours = _listed(picture.colours)
    look = f", mostly {colours}" if colours else ""
    described = f"a {picture.format} picture of {picture.width}x{picture.height} pixels{look}"
    return f"{described}{_describe_text(picture, question)} (sha256 {picture.sha256[:_DIGEST_SHOWN]})"


def _describe_text(picture: Picture, question: str) -> str:
    if not picture.text:
        return ""
    totals = [line for line in picture.text if _TOTAL.search(line)]
    if totals and _TOTAL.search(question):
        return f", where it reads “{totals[-1]}”"
    return f", where it reads “{' / '.join(picture.text)}”"


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def _quoted(conversation: Conversation, longest: int = 80) -> str:
    question = conversation.question
    return f"“{question[:longest]}{'…' if len(question) > longest else ''}”"
