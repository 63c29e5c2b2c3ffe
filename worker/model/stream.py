"""Join the chunks of a streamed chat completion into one response."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

# The finish reason of an answer that was interrupted: OpenRouter docs, Errors (mid-stream errors).
INTERRUPTED: Final = "error"

# Text that comes in pieces. Other text (ids, names, roles) is complete whenever it comes.
_TEXT_IN_PIECES: Final = frozenset(
    {"content", "reasoning_content", "reasoning", "thinking", "refusal", "arguments", "text", "transcript"}
)


def is_chunk(value: object) -> bool:
    """Return whether a JSON value is a chunk of a streamed chat completion."""
    if not isinstance(value, Mapping):
        return False
    choices = value.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    if isinstance(first, Mapping) and ("delta" in first or "message" in first):
        return isinstance(first.get("delta"), Mapping)
    return value.get("object") == "chat.completion.chunk"


def join_chunks(chunks: Sequence[Mapping[str, Any]], *, has_end: bool) -> dict[str, Any]:
    """Return the response that the chunks are parts of.

    Args:
        chunks: in order, with the events that have no choices, such as the last one with the usage.
        has_end: whether the stream says that it is complete. If neither this nor a finish reason nor a last
            chunk with the usage says so, the choices get the finish reason `error`.
    """
    response: dict[str, Any] = {}
    choices: dict[object, dict[str, Any]] = {}
    for chunk in chunks:
        found = chunk.get("choices")
        for position, choice in enumerate(found if isinstance(found, list) else ()):
            if isinstance(choice, Mapping):
                index = choice.get("index")
                _add_choice(choices.setdefault(index if isinstance(index, int) else position, {}), choice)
        response.update({name: it for name, it in chunk.items() if name != "choices" and it is not None})
    joined = [*choices.values()]
    if not (has_end or _has_final_usage(chunks) or any(it.get("finish_reason") for it in joined)):
        joined = [{**choice, "finish_reason": INTERRUPTED} for choice in joined]
    return {**response, "object": "chat.completion", "choices": joined}


def _has_final_usage(chunks: Sequence[Mapping[str, Any]]) -> bool:
    last = chunks[-1] if chunks else {}
    return bool(last.get("usage")) and not last.get("choices")


def _add_choice(joined: dict[str, Any], choice: Mapping[str, Any]) -> None:
    """Add a choice of a chunk; one with a whole `message` has the same text again, unless it has no delta."""
    delta, message = choice.get("delta"), choice.get("message")
    if isinstance(delta, Mapping):
        _add_fields(joined.setdefault("message", {}), delta)
    elif isinstance(message, Mapping):
        joined["message"] = {**message}
    for name, value in choice.items():
        if name == "text" and isinstance(value, str):
            _add_fields(joined.setdefault("message", {}), {"content": value})
        elif name == "logprobs" and isinstance(value, Mapping):
            _add_fields(joined.setdefault("logprobs", {}), value)
        elif name not in ("delta", "message") and value is not None:
            joined[name] = value


def _add_fields(joined: dict[str, Any], delta: Mapping[str, Any]) -> None:
    for name, value in delta.items():
        before = joined.get(name)
        if isinstance(value, list) or isinstance(before, list):
            joined[name] = _as_items(before)
            _add_items(joined[name], _as_items(value))
        elif isinstance(value, Mapping) and isinstance(before, dict):
            _add_fields(before, value)
        elif isinstance(value, str) and isinstance(before, str):
            joined[name] = _add_text(name, before, value)
        elif value is not None or before is None:
            joined[name] = value


def _add_text(name: str, before: str, value: str) -> str:
    if name in _TEXT_IN_PIECES or (name == "name" and value != before):
        return before + value
    return value or before


def _as_items(value: object) -> list[Any]:
    """Return a list as it is, and text as a list with one part."""
    if isinstance(value, list):
        return value
    return [{"type": "text", "text": value}] if isinstance(value, str) and value else []


def _add_items(joined: list[Any], items: Sequence[Any]) -> None:
    """Add items to a list; a piece of a tool call is added to the item with its `index`."""
    for item in items:
        index = item.get("index") if isinstance(item, Mapping) else None
        same = (it for it in joined if isinstance(it, dict) and it.get("index") == index)
        earlier = None if index is None else next(same, None)
        if earlier is None:
            joined.append(item)
        else:
            _add_fields(earlier, item)
