"""Translate errors of the model API and of the connection to it."""

import re
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Final
from urllib.parse import urlsplit

import httpx2

from vqa_worker.messages.error_codes import ErrorCode
from worker.errors import Dependency, DependencyDownError, JobError, RateLimitedError, TransientError
from worker.http.client import describe_failure
from worker.model.classification import Classification, classify
from worker.observability.redaction import Redactor
from worker.providers import Category, Profile

MAX_API_MESSAGE_CHARS: Final = 1000
# Of a message for the operator, in the log and in `/readyz`.
MAX_OPERATOR_CHARS: Final = 300

_BEFORE_SENDING = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError, httpx2.UnsupportedProtocol)
_REFUSALS: Final = frozenset({Category.JOB, Category.UNKNOWN, Category.MODEL_JOB})
_WRONG_PATH: Final = frozenset({301, 302, 307, 308, 404, 405})
# Of a provider's console and documentation.
_SITES: Final = ("platform", "console", "docs", "help", "www", "dashboard")
_NO_ADVICE: Final = "check VQA_MODEL_BASE_URL and VQA_MODEL_API_KEY"
_URL: Final = re.compile(r"\b[a-z][a-z0-9+.-]{1,20}://[^\s\"'<>)\]]+|\bdata:[^\s\"'<>]+", re.IGNORECASE)
# Base64 and other data: no word of a sentence is as long.
_DATA: Final = re.compile(r"[A-Za-z0-9+/=_-]{60,}")


def translate_answer(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    profile: Profile,
    model: str,
    redact: Redactor,
    quotes: Callable[[str], bool] = lambda _: False,
) -> Exception:
    """Return the worker's error for an answer that is an error.

    Args:
        status: of the response; 200 if the body is an `error` object.
        headers: of the response.
        body: of the response.
        profile: of the provider.
        model: that was asked; empty for the list of models.
        redact: removes secrets.
        quotes: whether a text repeats a part of the request: such words of the API are not for operators.
    """
    found = classify(status, headers, body, profile=profile, model=model)
    answered = _answered(found)
    said = redact(found.said)
    message = f"{answered}: {said[:MAX_API_MESSAGE_CHARS]}"
    # The request has the name of the model too.
    said = "" if quotes(said.replace(model, "")) else said
    match found.category:
        case Category.JOB if not found.is_likely:
            return JobError(ErrorCode.MODEL_REJECTED, message, log_message=answered)
        case Category.CAPACITY:
            text = operator_message(answered, said, profile)
            return RateLimitedError(found.retry_after_s, text, is_overloaded=found.is_overloaded)
        case Category.CONFIGURATION | Category.MODEL:
            start = f"{answered}: {found.advice or _NO_ADVICE}{_form(found, profile)}"
            # Routers pass on what the provider of one model answers, and gateways what concerns one request.
            return DependencyDownError(
                Dependency.MODEL,
                operator_message(start, said, profile),
                model=model if found.category is Category.MODEL else "",
                may_be_the_jobs=True,
            )
    error = TransientError(
        Dependency.MODEL,
        found.reason,
        message,
        log_message=answered,
        refused=found.category in _REFUSALS,
        model=model if found.category is Category.MODEL_JOB else "",
        is_duplicate=found.isolated,
    )
    error.is_likely_the_jobs = found.is_likely
    error.cause = operator_message(answered, said, profile)
    return error


def operator_message(start: str, said: str, profile: Profile) -> str:
    """Return a message with the API's words, at most 300 characters, without data and URLs of the job.

    Args:
        start: of the worker's own words.
        said: the API's words, redacted.
        profile: of the provider, whose own URLs stay: of its API, its console and its documentation.
    """
    words = _URL.sub(lambda url: url[0] if _is_own(_host(url[0]), profile) else "[URL]", said)
    words = _DATA.sub("[data]", words)
    left = MAX_OPERATOR_CHARS - len(start) - len(' ("")')
    if not words or left <= 0:
        return start
    return f'{start} ("{words if len(words) <= left else f"{words[: left - 1]}…"}")'


def unreachable(error: Exception) -> DependencyDownError:
    """Return the error for a connection that could not be opened."""
    text = f"the model API cannot be reached: {describe_failure(error)}"
    return DependencyDownError(Dependency.MODEL, text)


def connection_lost(error: Exception) -> TransientError:
    """Return the error for a connection that was lost during a request."""
    text = f"the connection to the API was lost: {describe_failure(error)}"
    return TransientError(Dependency.MODEL, "connection_error", text)


def was_never_sent(error: Exception) -> bool:
    """Return whether a request failed before anything was sent, so that it cannot be billed."""
    return isinstance(error, _BEFORE_SENDING) or isinstance(error.__cause__, _BEFORE_SENDING)


def _answered(found: Classification) -> str:
    if found.status < HTTPStatus.MULTIPLE_CHOICES:
        return f"the API answered {found.status} with an error"
    if found.status < HTTPStatus.BAD_REQUEST:
        return f"the API answered with a redirect ({found.status})"
    return f"the API answered {found.status}"


def _form(found: Classification, profile: Profile) -> str:
    """Return the form of the base URL if the answer can be due to a wrong one."""
    is_possible = found.category is Category.CONFIGURATION and found.status in _WRONG_PATH
    return f" (its form: {profile.base_url})" if is_possible else ""


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _is_own(host: str, profile: Profile) -> bool:
    """Return whether a host is the provider's. Others of its domain can be customers' buckets."""
    domains = {_domain(api) for api in profile.hosts}
    sites = {f"{name}.{domain}" for domain in domains for name in _SITES}
    return host in sites or any(f".{host}".endswith(f".{api}") for api in profile.hosts)


def _domain(host: str) -> str:
    """Return the last two labels of a host."""
    return ".".join(host.lower().split(".")[-2:])
