"""Asking the model: one call to `/chat/completions`, its errors sorted by whose fault they are.

The openai SDK carries the call; its retries are off, since retrying is decided by the worker alone.
"""

import asyncio
import email.utils
import json
import math
import time
from collections.abc import Mapping

import aiohttp
import httpx2
import openai

from worker import __version__
from worker.errors import (
    Dependency,
    DependencyDownError,
    ErrorCode,
    JobError,
    RateLimitedError,
    TransientError,
)
from worker.http.client import open_session
from worker.model.answer import Answer, MalformedAnswerError, Price, parse_answer, parse_model_list
from worker.model.call import Call, observed
from worker.model.request import RequestBody
from worker.model.transport import AiohttpClient, parsed
from worker.observability.redaction import Redactor

CONNECT_TIMEOUT_S = 10.0
# The API's word is obeyed, but a mistaken one must not silence a worker for days.
MAX_RETRY_AFTER_S = 3600.0
LIST_TIMEOUT_S = 30.0
MAX_API_MESSAGE_CHARS = 1000

_BEFORE_SENDING = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError, httpx2.UnsupportedProtocol)
_OMITTED = dict.fromkeys(("x-stainless-retry-count", "x-stainless-read-timeout"), openai.Omit())
_TRANSIENT_STATUS = frozenset({408, 409})
_NO_SUCH_LIST = frozenset({404, 405, 501})
_REFUSES_EVERYBODY = {
    401: "check the key in VQA_MODEL_API_KEY",
    402: "the account has no credit left",
    404: "check VQA_MODEL_BASE_URL and that the model still exists",
}


class _Client(openai.AsyncOpenAI):
    """The SDK with headers of the worker's own.

    Its own describe this machine to every API, and some come from the environment: they are OpenAI's, and
    this may be somebody else's API.
    """

    def __init__(
        self, headers: Mapping[str, str], base_url: str, api_key: str, http_client: httpx2.AsyncClient
    ) -> None:
        super().__init__(base_url=base_url, api_key=api_key, max_retries=0, http_client=http_client)
        self._headers = {
            "Accept": "application/json",
            "Content-Type": "application/json",
            "User-Agent": f"vqa-worker/{__version__}",
            **headers,
        }

    @property
    def default_headers(self) -> dict[str, str | openai.Omit]:
        """What every request says, next to the key."""
        return {**self._headers}

    def _prepare_url(self, url: str) -> httpx2.URL:
        # The SDK takes the URL apart again for each call, a fiftieth of a job's cost.
        return parsed(url)


class Model:
    """The chat completions API of one provider."""

    def __init__(
        self,
        *,
        base_url: str,
        api_key: str,
        headers: Mapping[str, str],
        timeout_s: float,
        prices: Mapping[str, Price],
        redact: Redactor,
    ) -> None:
        self._timeout_s = timeout_s
        self._prices = prices
        self._redact = redact
        self._provider = _provider_name(base_url)
        # The whole of it, which the SDK takes as it is; a path would be put together with the base each time.
        self._url = f"{base_url.rstrip('/')}/chat/completions"
        self._client = _Client(headers, base_url, api_key, AiohttpClient(_open_session(timeout_s)))

    async def complete(self, model: str, body: RequestBody, *, time_left_s: float) -> Answer:
        """Make one call, bounded by `VQA_MODEL_TIMEOUT` and by `time_left_s`.

        Raises:
            JobError: the API refuses this request permanently.
            RateLimitedError: the API answered 429.
            TransientError: the request failed and may succeed later, or an image could not be read.
            DependencyDownError: the API, or an image's source, is unreachable or refuses everybody.
        """
        started = time.monotonic()
        with observed(model, self._provider, lambda: body.is_sent) as call:
            try:
                async with asyncio.timeout(min(self._timeout_s, time_left_s)):
                    response = await self._client.post(
                        self._url,
                        cast_to=httpx2.Response,
                        content=body,
                        options={"headers": {**_OMITTED, "Content-Length": str(body.length)}},
                    )
                answer = parse_answer(response.content, self._prices.get(model))
            except (openai.APIError, httpx2.HTTPError, TimeoutError, MalformedAnswerError) as error:
                failure = body.failure or (body.lateness if isinstance(error, TimeoutError) else None)
                if failure is not None and not isinstance(error, openai.APIStatusError):
                    # The API never had the whole request: there is nothing to count, and nothing was paid.
                    raise failure from None
                raise self._translate(error, call, time.monotonic() - started, is_sent=body.is_sent) from None
            call.answered(answer)
            return answer

    async def list_models(self) -> frozenset[str] | None:
        """The models that the API lists; None if it has no such list, as not every server has.

        Raises:
            DependencyDownError: the API is unreachable, failing or refuses; the message says what to do.
        """
        url = f"{self._url.removesuffix('/chat/completions')}/models"
        try:
            async with asyncio.timeout(min(self._timeout_s, LIST_TIMEOUT_S)):
                response = await self._client.get(url, cast_to=httpx2.Response)
        except openai.APIStatusError as error:
            if error.status_code in _NO_SUCH_LIST:
                return None
            raise DependencyDownError(Dependency.MODEL, str(self._translate_status(error))) from None
        except (openai.APIError, httpx2.HTTPError, TimeoutError) as error:
            text = f"the model API cannot be reached: {_name_of(error)}"
            raise DependencyDownError(Dependency.MODEL, text) from None
        return parse_model_list(response.content)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    def _translate(self, error: Exception, call: Call, took_s: float, *, is_sent: bool) -> Exception:
        match error:
            case openai.APIStatusError():
                call.failed(str(error.status_code))
                return self._translate_status(error)
            case MalformedAnswerError():
                # Such a response is likely to be billed.
                call.failed("malformed", ambiguous=True)
                return TransientError(
                    Dependency.MODEL, "malformed_response", f"the API answered 200, but {error}"
                )
            case _ if _was_never_sent(error):
                call.failed("connection")
                return DependencyDownError(
                    Dependency.MODEL, f"the model API cannot be reached: {_name_of(error)}"
                )
            case TimeoutError() | openai.APITimeoutError() | httpx2.TimeoutException():
                call.failed("timeout", ambiguous=is_sent)
                return TransientError(
                    Dependency.MODEL, "timeout", f"the API did not answer within {took_s:.0f} s"
                )
            case _:
                call.failed("connection", ambiguous=is_sent)
                return TransientError(
                    Dependency.MODEL,
                    "connection_error",
                    f"the connection to the API was interrupted: {_name_of(error)}",
                )

    def _translate_status(self, error: openai.APIStatusError) -> Exception:
        status, said = error.status_code, self._redact(_api_message(error))[:MAX_API_MESSAGE_CHARS]
        message = f"the API answered {status}: {said}"
        if status == httpx2.codes.TOO_MANY_REQUESTS:
            if error.code == "insufficient_quota":
                return DependencyDownError(
                    Dependency.MODEL, "the API answered 429: the account's quota is used up"
                )
            return RateLimitedError(_retry_after_s(error.response.headers))
        if status in _REFUSES_EVERYBODY:
            return DependencyDownError(
                Dependency.MODEL,
                f"the API answered {status}: {_REFUSES_EVERYBODY[status]}",
                # Of several models, one may be missing.
                may_be_partial=status == httpx2.codes.NOT_FOUND,
            )
        if status < httpx2.codes.BAD_REQUEST:
            text = f"the API answered with a redirect ({status}): check VQA_MODEL_BASE_URL"
            return DependencyDownError(Dependency.MODEL, text)
        if status == httpx2.codes.FORBIDDEN:
            return TransientError(Dependency.MODEL, "http_403", message, forbidden=True)
        if status in _TRANSIENT_STATUS:
            return TransientError(Dependency.MODEL, f"http_{status}", message)
        if status >= httpx2.codes.INTERNAL_SERVER_ERROR:
            return TransientError(Dependency.MODEL, "http_5xx", message)
        return JobError(ErrorCode.MODEL_REJECTED, message)


def _open_session(timeout_s: float) -> aiohttp.ClientSession:
    return open_session(
        # Half the time at most: a connection that nobody answers must be distinguished from a slow answer.
        connect_timeout_s=min(CONNECT_TIMEOUT_S, timeout_s / 2),
        read_timeout_s=None,
    )


def _provider_name(base_url: str) -> str:
    """`gen_ai.provider.name`: a well-known name where there is one, else the API's host."""
    host = httpx2.URL(base_url).host
    known = {"api.openai.com": "openai", "api.deepinfra.com": "deepinfra"}
    return known.get(host, host)


def _was_never_sent(error: Exception) -> bool:
    return isinstance(error, _BEFORE_SENDING) or isinstance(error.__cause__, _BEFORE_SENDING)


def _name_of(error: Exception) -> str:
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {cause}"


def _api_message(error: openai.APIStatusError) -> str:
    """The API's own words: `error.message` where the body has the usual form, else the body's text."""
    body = error.body
    if isinstance(body, dict):
        message = body.get("message") or body.get("detail") or body.get("error")
        return message if isinstance(message, str) else json.dumps(body)
    return str(body or error.response.reason_phrase)


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """`Retry-After` in seconds (a number or an HTTP date, RFC 9110 §10.2.3), or `retry-after-ms`."""
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
