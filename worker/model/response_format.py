"""The JSON schema in a request's `response_format`, and how a model is asked to follow it."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from vqa_worker.messages.serialization import to_json

FIELD: Final = "response_format"
SCHEMA_PATH: Final = f"params.{FIELD}.json_schema.schema"
# Of an answer that is shown to the model again. It has seen longer ones, but they would cost more.
MAX_SHOWN_CHARS: Final = 32_000

_IN_PROMPT: Final = (
    "Answer with one JSON value that satisfies this JSON schema, without any other text and without code"
    " fences:\n{}"
)
_REPAIR: Final = (
    "Your answer does not satisfy the JSON schema: {}.\nAnswer again: with the whole corrected JSON value"
    " only, without any other text and without code fences."
)


def schema_of(params: Mapping[str, Any]) -> Any:
    """Return the JSON schema that the answer must satisfy, as the job has it; None if it has none."""
    match params.get(FIELD):
        case {"type": "json_schema", "json_schema": {"schema": schema}}:
            return schema
    return None


def with_schema_in_prompt(
    messages: Sequence[Mapping[str, Any]], params: Mapping[str, Any], *, json_mode: bool
) -> tuple[list[dict[str, Any]], Mapping[str, Any]]:
    """Return the messages and fields of a request with the schema as text, for an API that takes none.

    Args:
        messages: of the conversation; the text is added to the last one of the user.
        params: further fields of the request.
        json_mode: whether the API takes `{"type": "json_object"}`.
    """
    changed, schema = [dict(message) for message in messages], schema_of(params)
    if schema is None:
        return changed, params
    text = _IN_PROMPT.format(to_json(schema).decode())
    asked = next((it for it in reversed(changed) if it.get("role") == "user"), None)
    if asked is None:
        changed.append({"role": "user", "content": text})
    elif isinstance(asked.get("content"), list):
        asked["content"] = [*asked["content"], {"type": "text", "text": text}]
    else:
        asked["content"] = "\n\n".join(filter(None, (asked.get("content"), text)))
    others = {name: value for name, value in params.items() if name != FIELD}
    return changed, {**others, FIELD: {"type": "json_object"}} if json_mode else others


def repair_messages(answer: str, errors: str) -> list[dict[str, Any]]:
    """Return the messages that ask for a corrected answer."""
    shown = answer if len(answer) <= MAX_SHOWN_CHARS else f"{answer[:MAX_SHOWN_CHARS]}…"
    return [
        {"role": "assistant", "content": shown},
        {"role": "user", "content": _REPAIR.format(errors)},
    ]
