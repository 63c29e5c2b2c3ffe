"""Times and durations on the command line."""

import re
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Final

_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)([smhdw])", re.ASCII)
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_DATE: Final = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)


def parse_duration(text: str) -> timedelta:
    """Parse `90s`, `30m`, `2h`, `1d` or `1w`.

    Raises:
        ValueError: the text has another form, or the duration is too long.
    """
    found = _DURATION.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is not a duration such as 90s, 30m, 2h, 1d or 1w")
    try:
        return timedelta(**{_UNITS[found[2]]: float(found[1])})
    except OverflowError:
        raise ValueError(f"{text!r} is too long") from None


def parse_time(text: str, *, from_now: int) -> datetime:
    """Parse an RFC 3339 time, a date (0:00 UTC), or a duration from now; return a time in UTC.

    `from_now`: 1 if a duration is in the future, -1 if it is ago.

    Raises:
        ValueError: the text has another form, or is not a valid time.
    """
    from vqa_worker.messages.job import parse_deadline

    if _DURATION.fullmatch(text):
        try:
            return datetime.now(UTC) + from_now * parse_duration(text)
        except OverflowError:
            raise ValueError(f"{text!r} is too long") from None
    with suppress(ValueError):
        if found := parse_deadline(f"{text}T00:00:00Z" if _DATE.fullmatch(text) else text):
            return found.astimezone(UTC)
    raise ValueError(
        f"{text!r} is not a time such as 2030-01-31 or 2030-01-31T12:00:00Z, or a duration such as 2h"
    )
