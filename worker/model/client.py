"""The client of the OpenAI-compatible model API.

The openai SDK sends the requests. Its retries are off, because the worker retries jobs itself.
"""

import asyncio
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import aiohttp
import httpx2
import openai

from vqa_worker.messages.result import Usage
from worker import __version__
from worker.errors import (
    MALFORMED_RESPONSE,
    Dependency,
    DependencyDownError,
    JobError,
    RateLimitedError,
    TransientError,
)
from worker.http.client import open_session
from worker.model.answer import (
    Answer,
    ErrorInAnswerError,
    MalformedAnswerError,
    parse_answer,
    parse_model_list,
)
from worker.model.answered_model import AnsweredModels
from worker.model.content_encoding import ACCEPT_ENCODING
from worker.model.error_body import parse_error_body
from worker.model.errors import connection_lost, translate_answer, unreachable, was_never_sent
from worker.model.instrumentation import RequestObserver, observed_request
from worker.model.request import RequestBody
from worker.model.transport import AiohttpClient, parse_url
from worker.model.usage import Price
from worker.observability.redaction import Redactor
from worker.providers import GENERIC, Profile, load_profile
from worker.settings.urls import CHAT_COMPLETIONS, endpoint

CONNECT_TIMEOUT_S = 10.0
LIST_TIMEOUT_S = 30.0

_OMITTED = dict.fromkeys(("x-stainless-retry-count", "x-stainless-read-timeout"), openai.Omit())
_NO_MODEL_LIST = frozenset({404, 405, 501})
_FAILURES = (openai.APIError, httpx2.HTTPError, TimeoutError, MalformedAnswerError, ErrorInAnswerError)
# OpenAI and Groq, "Flex processing": the tier is busy, and the request is not billed.
_TIER_IS_BUSY = frozenset({"resourceunavailable", "capacityexceeded"})
# OpenAI, "Rate limits": "Rate limit reached for … on tokens per min (TPM)", `rate_limit_exceeded`.
_ACCOUNT_LIMIT_CODE = "ratelimitexceeded"
_ACCOUNT_LIMIT = re.compile(
    r"rate[ _-]?limit|too many requests|quota|throttl|concurren|limit (reached|exceeded)|\byour .{0,40}limit"
    r"|\b(requests|tokens|images) (per|a) |\b[rt]p[smhd]\b",
    re.IGNORECASE,
)


class _Client(openai.AsyncOpenAI):
    """The SDK client without its own headers, which describe this machine and its environment."""

    def __init__(
        self,
        headers: Mapping[str, str],
        base_url: str,
        api_key: str,
        http_client: httpx2.AsyncClient,
        key_header: str,
    ) -> None:
        super().__init__(base_url=base_url, api_key=api_key, max_retries=0, http_client=http_client)
        self._key_header = key_header
        standard = {
            "Accept": "application/json",
            "Accept-Encoding": ACCEPT_ENCODING,
            "Content-Type": "application/json",
            "User-Agent": f"vqa-worker/{__version__}",
        }
        configured = {name.lower() for name in headers}
        self._headers = {
            **{name: value for name, value in standard.items() if name.lower() not in configured},
            **headers,
        }

    @property
    def default_headers(self) -> dict[str, str | openai.Omit]:
        """The headers of every request, without the API key."""
        return {**self._headers}

    def _auth_headers(self, security: Any) -> dict[str, str]:
        if self._key_header == "authorization":
            return super()._auth_headers(security)
        return {self._key_header: self.api_key}

    def _validate_headers(self, headers: Any, custom_headers: Any) -> None:
        """Accept requests without `Authorization`: the key can be in another header."""

    def _prepare_url(self, url: str) -> httpx2.URL:
        # The SDK would parse the URL for each request, which takes 2 % of the CPU time of a job.
        return parse_url(url)


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
        profile: Profile | None = None,
    ) -> None:
        """`profile`: of the provider; None: the generic one."""
        self._timeout_s = timeout_s
        self._prices = prices
        self._redact = redact
        self._provider = _provider_name(base_url)
        self._answered_models = AnsweredModels()
        self._profile = profile or load_profile(GENERIC)
        # What results say: the profile's name, or the host if only the generic profile fits.
        self._profile_name = self._provider if self._profile.name == GENERIC else self._profile.name
        # The SDK uses a complete URL as it is; it would join a path with the base URL for each request.
        self._url = endpoint(base_url, CHAT_COMPLETIONS)
        self._models_url = endpoint(base_url, "/models")
        session = AiohttpClient(_open_session(timeout_s))
        self._client = _Client(headers, base_url, api_key, session, self._profile.key_header)

    async def complete(self, model: str, body: RequestBody, *, time_left_s: float) -> Answer:
        """Send one request, limited to `VQA_MODEL_TIMEOUT` (or its tier's timeout) and to `time_left_s`.

        Raises:
            JobError: the API rejects this request permanently, or an image is corrupt.
            RateLimitedError: the API answered 429, or has no capacity.
            TransientError: the request or the reading of an image failed with a transient error.
            DependencyDownError: the API, or the source of an image, is unreachable or rejects every request.
        """
        started = time.monotonic()
        with observed_request(model, self._provider, lambda: body.is_sent) as observer:
            try:
                async with asyncio.timeout(min(self._timeout_of(body.service_tier), time_left_s)):
                    response = await self._client.post(
                        self._url,
                        cast_to=httpx2.Response,
                        content=body,
                        options={"headers": {**_OMITTED, "Content-Length": str(body.length)}},
                    )
                answer = self._parse(model, response)
            except _FAILURES as error:
                if (image_error := _image_error(error, body)) is not None:
                    raise image_error from None
                took_s = time.monotonic() - started
                raise self._translate(model, error, observer, took_s, body) from None
            observer.answered(answer)
            return answer

    async def list_models(self) -> frozenset[str] | None:
        """Return the models that the API lists, or None if it has no list.

        Raises:
            DependencyDownError: the API is unreachable, failing or denies access.
        """
        try:
            async with asyncio.timeout(min(self._timeout_s, LIST_TIMEOUT_S)):
                response = await self._client.get(self._models_url, cast_to=httpx2.Response)
        except openai.APIStatusError as error:
            if error.status_code in _NO_MODEL_LIST:
                return None
            text = str(self._translate_answer("", error.response))
            raise DependencyDownError(Dependency.MODEL, text) from None
        except (openai.APIError, httpx2.HTTPError, TimeoutError) as error:
            raise unreachable(error) from None
        return parse_model_list(response.content)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    def _parse(self, model: str, response: httpx2.Response) -> Answer:
        """Return the answer in a 200 response.

        Raises:
            MalformedAnswerError, ErrorInAnswerError: see `parse_answer`.
        """
        try:
            answer = parse_answer(response.content, self._prices.get(model), response.headers)
        except ErrorInAnswerError as error:
            # They may say when to try again.
            error.headers = response.headers
            raise
        self._answered_models.check(model, answer.answered_model)
        return replace(answer, provider=self._profile_name)

    def _timeout_of(self, service_tier: str | None) -> float:
        """Return the timeout of a request in seconds; a tier can wait longer for its capacity."""
        tier = self._profile.tiers.get(service_tier or "")
        return self._timeout_s if tier is None else max(self._timeout_s, tier.timeout_s)

    def _translate_answer(
        self, model: str, answer: httpx2.Response, quotes: Callable[[str], bool] = lambda _: False
    ) -> Exception:
        return translate_answer(
            answer.status_code,
            answer.headers,
            answer.content,
            profile=self._profile,
            model=model,
            redact=self._redact,
            quotes=quotes,
        )

    def _translate_error_in_answer(
        self, model: str, error: ErrorInAnswerError, quotes: Callable[[str], bool]
    ) -> Exception:
        answer = httpx2.Response(error.status, headers=error.headers, content=error.body)
        translated = self._translate_answer(model, answer, quotes)
        if _is_billed(error):
            # It is requested as rarely as after another malformed answer.
            translated = _as_malformed(translated)
        return _with_usage(translated, error.usage)

    def _translate(
        self, model: str, error: Exception, observer: RequestObserver, took_s: float, body: RequestBody
    ) -> Exception:
        """Return the worker's error, and count the request as failed."""
        is_sent = body.is_sent
        match error:
            case openai.APIStatusError():
                observer.failed(str(error.status_code))
                translated = self._translate_answer(model, error.response, body.quotes)
                return _of_tier(translated, error.response.content, body)
            case ErrorInAnswerError():
                observer.failed(str(error.status), ambiguous=_is_billed(error), usage=error.usage)
                translated = self._translate_error_in_answer(model, error, body.quotes)
                return _of_tier(translated, error.body, body)
            case openai.APIConnectionError(__cause__=httpx2.DecodingError() as cause):
                observer.failed("malformed", ambiguous=True)
                text = f"the API answered 200, but {cause}"
                return TransientError(Dependency.MODEL, MALFORMED_RESPONSE, text)
            case MalformedAnswerError():
                # The request has probably been billed.
                observer.failed("malformed", ambiguous=True, usage=error.usage)
                text = f"the API answered 200, but {error}"
                return _with_usage(TransientError(Dependency.MODEL, MALFORMED_RESPONSE, text), error.usage)
            case _ if was_never_sent(error):
                observer.failed("connection")
                return unreachable(error)
            case TimeoutError() | openai.APITimeoutError() | httpx2.TimeoutException():
                observer.failed("timeout", ambiguous=is_sent)
                text = f"the API did not answer within {took_s:.0f} s"
                return TransientError(Dependency.MODEL, "timeout", text)
            case _:
                observer.failed("connection", ambiguous=is_sent)
                return connection_lost(error)


def _of_tier(error: Exception, answer: bytes, body: RequestBody) -> Exception:
    """Return the error; of a request in a service tier, say whether only that has no capacity."""
    if isinstance(error, RateLimitedError) and body.service_tier is not None:
        said = parse_error_body(answer)
        is_of_account = _ACCOUNT_LIMIT_CODE in said.codes or _ACCOUNT_LIMIT.search(said.words) is not None
        error.concerns_tier = not is_of_account or not _TIER_IS_BUSY.isdisjoint(said.codes)
    return error


def _is_billed(error: ErrorInAnswerError) -> bool:
    """Return whether the API has generated a part of an answer, which is probably billed."""
    usage = error.usage
    return error.is_partial or (usage is not None and bool(usage.completion_tokens or usage.cost_usd))


def _as_malformed(error: Exception) -> Exception:
    """Return the error as one of a billed answer, so that only a few are bought; a JobError ends the job."""
    if isinstance(error, TransientError):
        error.reason = MALFORMED_RESPONSE
    if not isinstance(error, RateLimitedError | DependencyDownError):
        return error
    text = "the API answered 200 with a part of an answer and an error"
    malformed = TransientError(
        Dependency.MODEL, MALFORMED_RESPONSE, f"{text}: {error.message}", log_message=text
    )
    malformed.cause = error.message
    return malformed


def _with_usage(error: Exception, usage: Usage | None) -> Exception:
    """Return the error with the usage of the answer that cannot be used, for the result of the job."""
    if isinstance(error, JobError | TransientError):
        error.usage = usage
    return error


def _image_error(error: Exception, body: RequestBody) -> Exception | None:
    """Return the error of an image that could not be sent: the API has not received the whole request."""
    if isinstance(error, openai.APIStatusError):
        return None
    return body.failure or (body.late_image_error if isinstance(error, TimeoutError) else None)


def _open_session(timeout_s: float) -> aiohttp.ClientSession:
    # Less than the request's timeout, so that an unreachable API is not mistaken for a slow one.
    connect_timeout_s = min(CONNECT_TIMEOUT_S, timeout_s / 2)
    return open_session(connect_timeout_s=connect_timeout_s, read_timeout_s=None)


def _provider_name(base_url: str) -> str:
    """Return the `gen_ai.provider.name`: a well-known name if there is one, else the host of the API."""
    host = httpx2.URL(base_url).host
    known = {"api.openai.com": "openai", "api.deepinfra.com": "deepinfra"}
    return known.get(host, host)
