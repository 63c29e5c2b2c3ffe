"""Explain to a publisher why a message is not a job, without quoting its values."""

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

MAX_REPORTED_ERRORS = 5
MAX_NAME_CHARS = 100

_TYPE = "must be "
# By pydantic's type of error; its own messages are written for programmers.
_TEXTS = {
    "extra_forbidden": "unknown field",
    "missing": "missing",
    "string_type": f"{_TYPE}a string",
    "list_type": f"{_TYPE}a list",
    "dict_type": f"{_TYPE}an object",
    "too_short": "must not be empty",
    "string_too_short": "must not be empty",
    "union_tag_not_found": "type: missing",
}
# By the name of the class, the object that is expected.
_OBJECTS = {
    "ImageUrl": "an object with url",
    "ImageObject": "an object with url",
    "ChatMessage": "an object with role and content",
}

_Location = tuple[int | str, ...]


def explain(error: Exception) -> str:
    """Return what is wrong with a message: a ValidationError, RecursionError or ValueError of its reading."""
    if isinstance(error, ValidationError):
        details = error.errors(include_input=False, include_url=False)
        texts: dict[str, list[str]] = {}
        for detail in _without_other_types(details):
            texts.setdefault(_field_path(detail["loc"]), []).append(_explain_one(detail))
        errors = [f"{path}: {_joined(found)}" if path else _joined(found) for path, found in texts.items()]
        more = len(errors) - MAX_REPORTED_ERRORS
        return "; ".join(errors[:MAX_REPORTED_ERRORS]) + (f"; and {more} more" if more > 0 else "")
    if isinstance(error, RecursionError):
        return "the body's JSON is nested too deeply"
    return f"the body is not strict JSON (RFC 8259): {error}"


def shorten(name: str) -> str:
    """Return a field name of at most 100 characters."""
    return name if len(name) <= MAX_NAME_CHARS else f"{name[: MAX_NAME_CHARS - 1]}…"


def _without_other_types(details: Sequence[Any]) -> list[Any]:
    """Return the errors without those of the union types that the value was not meant to be.

    pydantic reports an error for each type of a union. An error inside a value shows that the value has that
    type, so the errors of the other types are noise.
    """
    values = [_split(detail["loc"]) for detail in details]
    with_inner_errors = {value for value, inside in values if len(inside) > 1}
    return [
        detail
        for detail, (value, inside) in zip(details, values, strict=True)
        if len(inside) != 1 or value not in with_inner_errors
    ]


def _split(location: _Location) -> tuple[_Location, _Location]:
    """Return the location of the value of a union type, and the rest: the type's name and the path inside.

    The type's name is recognised by its position, because a job may have a field of the same name. The rest
    is empty outside unions.
    """
    match location:
        case ("images", int(), _, *_):
            at = 2
        case ("messages", int(), "content", _, *_):
            at = 3
        case _:
            at = len(location)
    return location[:at], location[at:]


def _field_path(location: _Location) -> str:
    """Return the location as a dotted path in the job, without the names of union types ("str", …)."""
    value, inside = _split(location)
    # In a message's content, the part's number is followed by the name of the part's type.
    type_names = (0, 2) if value[:1] == ("messages",) else (0,)
    names = [*value, *(name for n, name in enumerate(inside) if n not in type_names)]
    return ".".join(shorten(str(name)) for name in names)


def _joined(texts: Sequence[str]) -> str:
    """Join the texts about one value; the types that it can have are alternatives."""
    first, *others = dict.fromkeys(texts)
    if all(text.startswith(_TYPE) for text in (first, *others)):
        return " or ".join((first, *(text.removeprefix(_TYPE) for text in others)))
    return "; ".join((first, *others))


def _explain_one(detail: Any) -> str:
    kind = detail["type"]
    if kind == "union_tag_invalid":  # pydantic's message quotes the job's value
        return f"type must be one of {detail['ctx']['expected_tags']}"
    if kind in ("model_type", "model_attributes_type"):
        return f"{_TYPE}{_OBJECTS.get(detail.get('ctx', {}).get('class_name'), 'an object')}"
    return _TEXTS.get(kind) or detail["msg"].removeprefix("Value error, ")
