"""Filters for dead letters."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final

import typer

if TYPE_CHECKING:
    from worker.rabbitmq.dead_letter_record import DeadLetter

_AGO: Final = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_DATE: Final = re.compile(r"\d{4}-\d\d-\d\d")


def parse_time(text: str) -> datetime:
    """Parse `2h` (ago; s, m, h, d, w), `2030-01-31` (UTC) or an RFC 3339 time.

    Raises:
        BadParameter: the text has another form.
    """
    from vqa_worker.messages.job import parse_deadline

    try:
        if ago := _AGO.fullmatch(text):
            return datetime.now(UTC) - timedelta(**{_UNITS[ago[2]]: float(ago[1])})
        found = parse_deadline(f"{text}T00:00:00Z" if _DATE.fullmatch(text) else text)
    except (ValueError, OverflowError):
        found = None
    if found is None:
        raise typer.BadParameter(
            f"{text!r} is not a time. Use 2h (ago; s, m, h, d or w), 2030-01-31 or 2030-01-31T12:00:00Z."
        )
    return found.astimezone(UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Conditions on dead letters: all that are given must match; of several codes, models or ids, one.

    Attributes:
        codes: globs on the error code.
        models: globs on the model that the job names.
        ids: job ids, or names of dead letters or prefixes of them.
        since: dead-lettered at this time or later; excludes messages without a time.
        until: dead-lettered at this time or earlier; excludes messages without a time.
    """

    codes: Sequence[str] = ()
    models: Sequence[str] = ()
    ids: Sequence[str] = ()
    since: datetime | None = None
    until: datetime | None = None

    @property
    def matches_all(self) -> bool:
        """Whether no condition is given."""
        return not (self.codes or self.models or self.ids or self.since or self.until)

    def __contains__(self, dead_letter: "DeadLetter") -> bool:
        return (
            _matches(dead_letter.code, self.codes)
            and _matches(dead_letter.model, self.models)
            and (not self.ids or any(matches_id(dead_letter, name) for name in self.ids))
            and self._is_in_range(dead_letter.died_at)
        )

    def _is_in_range(self, died_at: datetime | None) -> bool:
        if self.since is None and self.until is None:
            return True
        if died_at is None:
            return False
        return (self.since is None or died_at >= self.since) and (self.until is None or died_at <= self.until)


# A shorter prefix could match by accident.
MIN_PREFIX_CHARS: Final = 4


def matches_id(dead_letter: "DeadLetter", name: str) -> bool:
    """Return whether `name` is the job's id, or the dead letter's name or a prefix of it."""
    return dead_letter.job_id == name or (len(name) >= MIN_PREFIX_CHARS and dead_letter.name.startswith(name))


def _matches(text: str, globs: Sequence[str]) -> bool:
    return not globs or any(fnmatchcase(text, glob) for glob in globs)
