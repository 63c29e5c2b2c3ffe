"""Translate errors of the model API and of the connection to it."""

import email.utils
import json
import math
import time
from collections.abc import Mapping

import httpx2
import openai

from vqa_worker.messages.error_codes import ErrorCode
from worker.errors import Dependency, DependencyDownError, JobError, RateLimitedError, TransientError
from worker.http.client import describe_failure
from worker.observability.redaction import Redactor

# A wrong Retry-After header must not stop a worker for days.
MAX_RETRY_AFTER_S = 3600.0
MAX_API_MESSAGE_CHARS = 1000

_BEFORE_SENDING = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError, httpx2.UnsupportedProtocol)
_TRANSIENT_STATUS = frozenset({408, 409})
# These concern the account or the configuration, so every request fails.
_CONFIGURATION_ERRORS = {
    401: "check the key in VQA_MODEL_API_KEY",
    402: "the account has no credit left",
    404: "check VQA_MODEL_BASE_URL and that the model still exists",
    405: "check VQA_MODEL_BASE_URL",
}


def translate_status(error: openai.APIStatusError, redact: Redactor) -> Exception:
    """Return the worker's error for an HTTP status other than 200."""
    status = error.status_code
    if status == httpx2.codes.TOO_MANY_REQUESTS:
        if error.code == "insufficient_quota":
            return _down("the API answered 429: the account's quota is used up")
        return RateLimitedError(_retry_after_s(error.response.headers))
    if status in _CONFIGURATION_ERRORS:
        # 404 can concern one of several models.
        is_partial = status == httpx2.codes.NOT_FOUND
        return _down(f"the API answered {status}: {_CONFIGURATION_ERRORS[status]}", may_be_partial=is_partial)
    if text := _wrong_address(error):
        return _down(text)
    answered = f"the API answered {status}"
    message = f"{answered}: {redact(_api_message(error))[:MAX_API_MESSAGE_CHARS]}"
    if status == httpx2.codes.FORBIDDEN:
        return TransientError(Dependency.MODEL, "http_403", message, log_message=answered, refused=True)
    if status in _TRANSIENT_STATUS:
        return TransientError(Dependency.MODEL, f"http_{status}", message, log_message=answered)
    if status >= httpx2.codes.INTERNAL_SERVER_ERROR:
        return TransientError(Dependency.MODEL, "http_5xx", message, log_message=answered)
    return JobError(ErrorCode.MODEL_REJECTED, message, log_message=answered)


def _wrong_address(error: openai.APIStatusError) -> str:
    """Return the error of a response that is not the API's; empty for any other."""
    status = error.status_code
    if status < httpx2.codes.BAD_REQUEST:
        return f"the API answered with a redirect ({status}): check VQA_MODEL_BASE_URL"
    # A TLS server (of Go, nginx or Apache) answers http:// with a text or a page.
    if status == httpx2.codes.BAD_REQUEST and isinstance(error.body, str) and "HTTPS" in error.body:
        return "the port expects TLS: change VQA_MODEL_BASE_URL to https://"
    return ""


def unreachable(error: Exception) -> DependencyDownError:
    """Return the error for a connection that could not be opened."""
    return _down(f"the model API cannot be reached: {describe_failure(error)}")


def connection_lost(error: Exception) -> TransientError:
    """Return the error for a connection that was lost during a request."""
    text = f"the connection to the API was lost: {describe_failure(error)}"
    return TransientError(Dependency.MODEL, "connection_error", text)


def was_never_sent(error: Exception) -> bool:
    """Return whether a request failed before anything was sent, so that it cannot be billed."""
    return isinstance(error, _BEFORE_SENDING) or isinstance(error.__cause__, _BEFORE_SENDING)


def _down(message: str, *, may_be_partial: bool = False) -> DependencyDownError:
    return DependencyDownError(Dependency.MODEL, message, may_be_partial=may_be_partial)


def _api_message(error: openai.APIStatusError) -> str:
    """Return `error.message` of the response body, or else the whole body."""
    body = error.body
    if isinstance(body, dict):
        message = body.get("message") or body.get("detail") or body.get("error")
        return message if isinstance(message, str) else json.dumps(body)
    return str(body or error.response.reason_phrase)


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return `Retry-After` in seconds (a number or an HTTP date, RFC 9110 §10.2.3), or `retry-after-ms`."""
    milliseconds, value = _number(headers.get("retry-after-ms", "")), headers.get("retry-after", "")
    seconds = _number(value) if milliseconds is None else milliseconds / 1000
    if seconds is None:
        seconds = _seconds_until(value)
    return None if seconds is None else min(max(seconds, 0.0), MAX_RETRY_AFTER_S)


def _number(value: str) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return None if math.isnan(number) else number


def _seconds_until(date: str) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(date).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return None
