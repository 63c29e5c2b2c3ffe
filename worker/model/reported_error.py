"""Find an error in the body of a response with status 200, and the status that it should have had."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from vqa_worker.messages.serialization import to_json

# For an error that says nothing about its kind: it is transient until other jobs show that it is not.
UNKNOWN_STATUS: Final = 500

_STATUS: Final = re.compile(r"\b([45]\d\d)\b")
# The words of a capacity or transient error, also in a message.
_STATUS_OF_MESSAGES: Final = (
    (re.compile(r"rate.?limit|quota|resource.?exhausted|too.?many.?requests|throttl"), 429),
    (re.compile(r"overloaded|unavailable|capacity|busy"), 503),
    (re.compile(r"deadline.?exceeded|time.?out|timed.?out"), 504),
)
# The words in codes and types: OpenAI docs (Error codes), Google API design guide (Handling errors),
# Anthropic docs (Errors). The first match counts.
_STATUS_OF_CODES: Final = (
    *_STATUS_OF_MESSAGES,
    (re.compile(r"unauthenticated|authentication|invalid.?api.?key|unauthorized"), 401),
    (re.compile(r"billing|insufficient.?(balance|credit|fund)|payment|arrear"), 402),
    (re.compile(r"permission|forbidden|access.?denied"), 403),
    (re.compile(r"not.?found"), 404),
    (re.compile(r"content.?(filter|policy)|inspection"), 400),
    (re.compile(r"invalid|bad.?request|context.?length|unprocessable|unsupported"), 400),
)
_CODES: Final = ("code", "status", "status_code", "statusCode", "http_code", "type")


class ReportedError(NamedTuple):
    """An error: the HTTP status that it should have had, and the JSON body of that response."""

    status: int
    body: bytes


def error_in(response: Mapping[str, Any]) -> ReportedError | None:
    """Return the error that a response reports, or None.

    It is in `error`, in the first of `errors`, in `choices[0].error` (OpenRouter docs, Errors), or the whole
    body (vLLM and FastAPI).
    """
    error = next((found for found in _candidates(response) if found), None)
    if error is None:
        return None
    return ReportedError(_status_of(error), to_json({"error": error}))


def _candidates(response: Mapping[str, Any]) -> Iterator[Any]:
    yield response.get("error")
    errors = response.get("errors")
    yield errors[0] if isinstance(errors, list) and errors else errors
    choices = response.get("choices")
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        yield choices[0].get("error")
    if "choices" not in response and _is_error(response):
        yield response


def _is_error(response: Mapping[str, Any]) -> bool:
    if "error" in (response.get("object"), response.get("type")) or "detail" in response:
        return True
    return any(_status_in(response.get(name)) for name in _CODES)


def _status_of(error: object) -> int:
    """Return the first status in an error's codes, or else the one that their words mean."""
    codes = [error.get(name) for name in _CODES] if isinstance(error, Mapping) else [error]
    for code in codes:
        if (status := _status_in(code)) is not None:
            return status
    words = " ".join(code for code in codes if isinstance(code, str)).lower()
    if isinstance(error, Mapping) and not words:
        return _first_match(_STATUS_OF_MESSAGES, str(error.get("message")).lower())
    # A sentence in the place of the object is a message, not a code.
    is_message = isinstance(error, str) and " " in error.strip()
    return _first_match(_STATUS_OF_MESSAGES if is_message else _STATUS_OF_CODES, words)


def _first_match(statuses: Sequence[tuple[re.Pattern[str], int]], words: str) -> int:
    return next((status for pattern, status in statuses if pattern.search(words)), UNKNOWN_STATUS)


def _status_in(code: object) -> int | None:
    """Return a status from 400 to 599 that is a number, or at the beginning of a text such as `"429"`."""
    found = _STATUS.match(str(code)) if isinstance(code, (int, str)) and not isinstance(code, bool) else None
    return int(found[1]) if found else None
