"""Which dead letters a command is about."""

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


def moment(text: str) -> datetime:
    """`2h` (ago; s, m, h, d, w), `2030-01-31` (in UTC) or an RFC 3339 time, as a moment in UTC.

    Raises:
        BadParameter: it is none of these.
    """
    from worker.messages.job import parse_deadline

    try:
        if ago := _AGO.fullmatch(text):
            return datetime.now(UTC) - timedelta(**{_UNITS[ago[2]]: float(ago[1])})
        found = parse_deadline(f"{text}T00:00:00Z" if _DATE.fullmatch(text) else text)
    except (ValueError, OverflowError):
        found = None
    if found is None:
        raise typer.BadParameter(
            f"{text!r} is no time: say 2h (ago; s, m, h, d or w), 2030-01-31, or 2030-01-31T12:00:00Z"
        )
    return found.astimezone(UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a letter has to be like; each that is given has to hold, and of several of a kind one.

    Attributes:
        codes: of errors; globs.
        models: as the jobs name them; globs.
        ids: of jobs, or names of letters (or their beginnings).
        since: when it died, at the earliest; a letter that doesn't say when is not chosen then.
        until: when it died, at the latest.
    """

    codes: Sequence[str] = ()
    models: Sequence[str] = ()
    ids: Sequence[str] = ()
    since: datetime | None = None
    until: datetime | None = None

    @property
    def is_any(self) -> bool:
        """Whether it leaves no letter out."""
        return not (self.codes or self.models or self.ids or self.since or self.until)

    def __contains__(self, letter: "DeadLetter") -> bool:
        return (
            _fits(letter.code, self.codes)
            and _fits(letter.model, self.models)
            and (not self.ids or any(is_called(letter, name) for name in self.ids))
            and self._is_in_time(letter.died_at)
        )

    def _is_in_time(self, died_at: datetime | None) -> bool:
        if self.since is None and self.until is None:
            return True
        if died_at is None:
            return False
        return (self.since is None or died_at >= self.since) and (self.until is None or died_at <= self.until)


# Shorter beginnings of names would be found in a job's id typed in part.
MIN_NAME_CHARS: Final = 4


def is_called(letter: "DeadLetter", name: str) -> bool:
    """Whether this is the job's id, or the letter's name or its beginning."""
    return letter.job_id == name or (len(name) >= MIN_NAME_CHARS and letter.name.startswith(name))


def _fits(text: str, globs: Sequence[str]) -> bool:
    return not globs or any(fnmatchcase(text, glob) for glob in globs)
