"""Error messages for invalid settings: one line each, without secrets."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from pydantic import ValidationError

from worker.settings.urls import FALLBACK_KEYS

PREFIX: Final = "VQA_"
MAX_SHOWN_CHARS: Final = 80

_WHOLE_NUMBER: Final = "must be a whole number"
# By pydantic's type of the error, with the fields of its context.
_REASONS: Final[Mapping[str, str]] = {
    "int_parsing": _WHOLE_NUMBER,
    "int_parsing_size": "is too large",
    "int_type": _WHOLE_NUMBER,
    "int_from_float": _WHOLE_NUMBER,
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_parsing": "must be true or false",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
    "string_type": "must be text",
    "path_not_file": "must be an existing file",
    "path_not_directory": "must be an existing folder",
    "missing": "is missing",
    "extra_forbidden": "is not a known field",
    "too_long": "must not have more than {max_length} items",
    "named_tuple_type": "must be a JSON object or a list",
}


class SettingsError(Exception):
    """The settings are invalid.

    Attributes:
        faults: one line for each problem, beginning with the variable's name; without secrets.
    """

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = list(faults)


def variable(field: str) -> str:
    """Return the environment variable of a field; providers' own keys have no `VQA_` prefix."""
    name = field.upper()
    return name if name in FALLBACK_KEYS.values() else PREFIX + name


def shown(value: object) -> str:
    """Quote a value for a message, on one line and shortened."""
    text = repr(str(value))
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}…'"


def fault_lines(error: ValidationError) -> Iterator[str]:
    """Yield a line for each problem that pydantic found."""
    for fault in error.errors(include_url=False):
        field, *inside = fault["loc"]
        place = "/".join(_place(part) for part in inside if part != "[key]")
        yield f"{variable(str(field))}: {f'{place!r} ' if place else ''}{_reason(fault, inside=bool(inside))}"


def _place(part: int | str) -> str:
    return f"item {part + 1}" if isinstance(part, int) else part


def _reason(fault: Any, *, inside: bool) -> str:
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])
    limits = fault.get("ctx", {}).items()
    words = {name: f"{value:g}" if isinstance(value, float) else value for name, value in limits}
    text = _REASONS.get(fault["type"])
    # No setting has another type of error today.
    reason = text.format_map(words) if text else fault["msg"]
    # Strings and values inside a JSON object may be secrets; the rest are numbers, choices and paths.
    is_harmless = isinstance(fault["input"], str) and not inside and not fault["type"].startswith("string_")
    return f"{reason}, not {shown(fault['input'])}" if is_harmless else reason
