"""Read when an API wants to be asked again: headers, fields of the body, words."""

import email.utils
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Final

from worker.providers.profile import RetryHints

# A wrong hint must not stop a worker for days.
MAX_RETRY_AFTER_S: Final = 3600.0
# Larger numbers are points in time, in seconds or milliseconds since 1970.
_EPOCH_S: Final = 1e9
_EPOCH_MS: Final = 1e11

_UNITS: Final[Mapping[str, float]] = {
    "ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0,
}  # fmt: skip
_UNIT: Final = r"milliseconds?|ms|ns|µs|us|seconds?|secs?|s|minutes?|mins?|m|hours?|hrs?|h|days?|d"
_PART: Final = re.compile(rf"(\d+(?:\.\d+)?)\s*({_UNIT})(?![a-z])", re.IGNORECASE)
_PARTS: Final = rf"(?:\d+(?:\.\d+)?\s*(?:{_UNIT})(?![a-z])\s*(?:and )?)+"
_DURATION: Final = re.compile(_PARTS, re.IGNORECASE)
_WORDS: Final = re.compile(
    rf"\b(?:again|retry(?:ing)?|wait|available|resets?|back off)\b[^.\d]{{0,40}}({_PARTS})", re.IGNORECASE
)
# RFC draft "RateLimit header fields": `limit=10, remaining=0, reset=5`, or `"default";r=0;t=5`.
_STRUCTURED: Final = re.compile(r"\b(?:reset|t)\s*=\s*(\d+(?:\.\d+)?)", re.IGNORECASE)
_STRUCTURED_LEFT: Final = re.compile(r"\b(?:remaining|r)\s*=\s*(\d+)", re.IGNORECASE)


def retry_after_s(
    headers: Mapping[str, str],
    values: Sequence[tuple[str, str]],
    words: str,
    *,
    hints: RetryHints,
    now: float,
) -> float | None:
    """Return how long to wait, in seconds, at most `MAX_RETRY_AFTER_S`; None without a hint.

    Args:
        headers: of the response, names in lower case.
        values: names in lower case and values of the body's fields.
        words: the sentences of the body.
        hints: where to look, from the profile.
        now: Unix time.
    """
    found = next(_seconds(headers, values, words, hints, now), None)
    return None if found is None else min(max(found, 0.0), MAX_RETRY_AFTER_S)


def _seconds(
    headers: Mapping[str, str],
    values: Sequence[tuple[str, str]],
    words: str,
    hints: RetryHints,
    now: float,
) -> Iterator[float]:
    for glob in hints.headers:
        yield from _of_headers(headers, glob.lower(), now)
    for glob in hints.body:
        for name, value in values:
            if fnmatchcase(name, glob.lower()) and (seconds := _parsed(name, value, now)) is not None:
                yield seconds
    if match := _WORDS.search(words):
        yield _duration(match[1])


def _of_headers(headers: Mapping[str, str], glob: str, now: float) -> Iterator[float]:
    """Yield the longest time of the headers that match, without those of limits that are not used up."""
    names = [name for name in headers if fnmatchcase(name, glob) and not _has_more(name, headers)]
    times = [_parsed(name, headers[name], now) for name in names]
    if known := [seconds for seconds in times if seconds is not None]:
        yield max(known)


def _has_more(name: str, headers: Mapping[str, str]) -> bool:
    """Return whether the limit of a `…-reset…` header has requests or tokens left."""
    if "reset" in name:
        left = headers.get(name.replace("reset", "remaining"), "")
    else:
        match = _STRUCTURED_LEFT.search(headers[name])
        left = match[1] if match else ""
    return (_number(left) or 0.0) > 0.0


def _parsed(name: str, text: str, now: float) -> float | None:
    """Return seconds from now for a number, a duration (`6m0s`), a date, or a point in time."""
    text = text.strip()
    number = _number(text)
    if number is not None:
        if name.endswith(("-ms", "_ms")):
            return number / 1000
        if number >= _EPOCH_MS:
            return number / 1000 - now
        return number - now if number >= _EPOCH_S else number
    if _DURATION.fullmatch(text):
        return _duration(text)
    if match := _STRUCTURED.search(text):
        return float(match[1])
    moment = _moment(text)
    return None if moment is None else moment - now


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return None if math.isnan(number) else number


def _duration(text: str) -> float:
    return sum(float(number) * _UNITS[_unit(unit.lower())] for number, unit in _PART.findall(text))


def _unit(name: str) -> str:
    return name if name in _UNITS else "ms" if name.startswith("milli") else name[0]


def _moment(text: str) -> float | None:
    """Return the Unix time of an HTTP date (RFC 9110, 5.6.7) or an ISO 8601 time (without a zone: UTC)."""
    try:
        return email.utils.parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, OverflowError):
        pass
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None
