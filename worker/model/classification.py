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
# Codes that stand for a status: Anthropic docs (Errors), Google API design guide (Handling errors), OpenAI
# docs (Error codes), and the names of the OpenAI SDK's exceptions, which vLLM and SGLang answer.
_STATUS_OF_CODE: Final = {
    "invalidrequesterror": 400, "authenticationerror": 401, "permissionerror": 403, "notfounderror": 404,
    "requesttoolarge": 413, "ratelimiterror": 429, "apierror": 500, "overloadederror": 529,
    "invalidargument": 400, "failedprecondition": 400, "outofrange": 400, "unauthenticated": 401,
    "permissiondenied": 403, "notfound": 404, "aborted": 409, "resourceexhausted": 429, "cancelled": 499,
    "internal": 500, "unimplemented": 501, "unavailable": 503, "deadlineexceeded": 504,
    "insufficientquota": 429, "ratelimitexceeded": 429, "servererror": 500,
    "badrequesterror": 400, "permissiondeniederror": 403, "conflicterror": 409,
    "unprocessableentityerror": 422, "internalservererror": 500,
}  # fmt: skip


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
    effective = effective_status(status, error)
    codes, words = error.codes, error.words_without_quotes(model)
    rule = next((it for it in profile.rules if it.matches(effective, codes, words, model)), _UNKNOWN)
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


def effective_status(status: int, error: ErrorBody) -> int:
    """Return the status in the body if the response is a 200, or a gateway's 5xx for another status.

    An error in a 200 that says nothing about its status is a 500: transient, until other jobs show that it is
    not.
    """
    is_success = status < HTTPStatus.MULTIPLE_CHOICES
    if error.status is not None and (is_success or status >= _SERVER_ERROR):
        return error.status
    if is_success:
        return next((_STATUS_OF_CODE[code] for code in error.codes if code in _STATUS_OF_CODE), _SERVER_ERROR)
    return status


def _reason(status: int) -> str:
    if status in _OWN_REASONS:
        return f"http_{status}"
    if status >= _SERVER_ERROR:
        return HTTP_500 if status == _SERVER_ERROR else "http_5xx"
    return "http_4xx"
