"""Classify an error answer of the model API: whose fault it is, by status, codes, words and the profile."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

from worker.errors import HTTP_500
from worker.model.error_body import ErrorBody, parse_error_body
from worker.model.retry_hints import retry_after_s
from worker.providers import Category, Profile, Rule

_SERVER_ERROR: Final = 500
# Groq's status for "no capacity". All other capacity answers that do not concern the account are 5xx.
_NO_CAPACITY: Final = 498
# They say that the request is wrong, as gateways do for a wrong key too.
_REJECTIONS: Final = frozenset({400, 413, 422})
_OWN_REASONS: Final = frozenset({403, 408, 409})
_UNKNOWN: Final = Rule(category=Category.UNKNOWN)


@dataclass(frozen=True, slots=True)
class Classification:
    """What an error answer means.

    Attributes:
        category: whose fault it is.
        status: the HTTP status, or the one in the body if the response's own says less.
        reason: the label of metrics, from a closed set.
        said: the API's words, not redacted.
        isolated: whether a transient error concerns only this job.
        is_likely: whether the job is only likely to blame: many different jobs in a row are an outage.
        advice: for the operator: what to check; empty if nothing can be done.
        retry_after_s: when the API wants to be asked again, in seconds from now.
    """

    category: Category
    status: int
    reason: str
    said: str
    isolated: bool
    is_likely: bool
    advice: str
    retry_after_s: float | None

    @property
    def is_overloaded(self) -> bool:
        """Whether the API has no capacity, rather than a limit for this account."""
        return self.category is Category.CAPACITY and self.status >= _NO_CAPACITY


def classify(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    profile: Profile,
    model: str = "",
    now: float | None = None,
) -> Classification:
    """Classify an answer that is an error, by its status or by an `error` object in a 200.

    Args:
        status: of the response.
        headers: of the response.
        body: of the response, at most as large as responses may be.
        profile: the rules; the first that matches counts.
        model: that was asked.
        now: Unix time, for points in time in headers; None: now.
    """
    error = parse_error_body(body)
    effective = _effective_status(status, error)
    # An error object without a status in a 200 is classified as a 500 would be.
    asked = effective if effective >= HTTPStatus.MULTIPLE_CHOICES else _SERVER_ERROR
    codes, words = error.codes, error.words_without_quotes(model)
    rule = next((it for it in profile.rules if it.matches(asked, codes, words, model)), _UNKNOWN)
    hint = retry_after_s(
        {name.lower(): value for name, value in headers.items()},
        error.values,
        error.words,
        hints=profile.retry,
        now=time.time() if now is None else now,
    )
    return Classification(
        category=rule.category,
        status=effective,
        reason=_reason(effective),
        said=error.said(effective),
        isolated=rule.isolated,
        is_likely=rule.likely or (rule.category is Category.UNKNOWN and status in _REJECTIONS),
        advice=rule.advice,
        retry_after_s=hint,
    )


def _effective_status(status: int, error: ErrorBody) -> int:
    """Return the status in the body if the response is a 200, or a gateway's 5xx for another status."""
    is_vague = status < HTTPStatus.MULTIPLE_CHOICES or status >= _SERVER_ERROR
    return error.status if is_vague and error.status is not None else status


def _reason(status: int) -> str:
    if status < HTTPStatus.BAD_REQUEST:
        return "malformed_response"
    if status in _OWN_REASONS:
        return f"http_{status}"
    if status >= _SERVER_ERROR:
        return HTTP_500 if status == _SERVER_ERROR else "http_5xx"
    return "http_4xx"
