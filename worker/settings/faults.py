"""Error messages for invalid settings: one line each, without secrets."""

from collections.abc import Iterator, Sequence
from typing import Any, Final

from pydantic import ValidationError

from worker.settings.urls import FALLBACK_KEYS

PREFIX: Final = "VQA_"
MAX_SHOWN_CHARS: Final = 80


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
    reason = fault["msg"].replace("Input should be", "must be")
    # Strings and values inside a JSON object may be secrets; the rest are numbers, choices and paths.
    is_harmless = isinstance(fault["input"], str) and not inside and not fault["type"].startswith("string_")
    given = f", not {shown(fault['input'])}" if is_harmless else ""
    return f"{reason[0].lower()}{reason[1:]}{given}"
