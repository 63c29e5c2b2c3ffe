"""How a fault of the settings reads: one line for a person, which never holds a secret."""

from collections.abc import Iterator, Sequence
from typing import Any, Final

from pydantic import ValidationError

from worker.settings.urls import FALLBACK_KEYS

PREFIX: Final = "VQA_"
MAX_SHOWN_CHARS: Final = 80


class SettingsError(Exception):
    """The settings are wrong.

    Attributes:
        faults: one line each, with the variable's name first; never a secret's value.
    """

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = list(faults)


def variable(field: str) -> str:
    """The environment variable of a field; providers' own keys have no prefix of ours."""
    name = field.upper()
    return name if name in FALLBACK_KEYS.values() else PREFIX + name


def shown(value: object) -> str:
    """A value in a message: quoted, on one line, not too long."""
    text = repr(str(value))
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}…'"


def fault_lines(error: ValidationError) -> Iterator[str]:
    """What pydantic found, a line each."""
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
    # Texts, and what stands inside a JSON object, may be secrets; the rest are numbers, choices and paths.
    is_harmless = isinstance(fault["input"], str) and not inside and not fault["type"].startswith("string_")
    given = f", not {shown(fault['input'])}" if is_harmless else ""
    return f"{reason[0].lower()}{reason[1:]}{given}"
