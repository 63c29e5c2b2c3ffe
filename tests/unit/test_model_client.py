"""One model request over real HTTP: each possible end, and the outcome that it leads to."""

import asyncio
import base64
import email.utils
import gzip
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from typing import Any, Self

import pytest
import uvloop
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.running import until
from vqa_worker.messages.error_codes import ErrorCode
from vqa_worker.messages.result import Usage
from worker.errors import Dependency, DependencyDownError, JobError, RateLimitedError, TransientError
from worker.http.client import proxy_options
from worker.model.client import Model
from worker.model.content_encoding import MAX_RESPONSE_BYTES
from worker.model.errors import MAX_API_MESSAGE_CHARS, MAX_OPERATOR_CHARS, operator_message
from worker.model.request import RequestBody, body_parts
from worker.model.retry_hints import MAX_RETRY_AFTER_S
from worker.observability import metrics
from worker.observability.redaction import Redactor
from worker.providers import GENERIC, load_profile
from worker.providers.profile import Tier

KEY = "sk-secret-of-the-worker"
MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "What is it? 猫"}]
# In every request: some gateways stream if `stream` is missing.
SENT: dict[str, Any] = {"model": "m", "stream": False, "messages": MESSAGES}
COMPLETION: dict[str, Any] = {
    "choices": [{"message": {"role": "assistant", "content": "A cat."}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
}


@dataclass
class Request:
    """A request of the client."""

    line: str
    headers: dict[str, str]
    body: bytes


def response(
    status: int = 200, body: Any = COMPLETION, *, length: int | None = None, **headers: Any
) -> bytes:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [
        f"HTTP/1.1 {status} Reason",
        f"Content-Length: {len(raw) if length is None else length}",
        *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
    ]
    if "Content_Type" not in headers:
        lines.append("Content-Type: application/json")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + raw


Answering = Callable[[asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Api:
    """A server that sends the configured bytes of HTTP or calls a function to answer."""

    port: int = 0
    says: bytes | Answering = b""
    requests: list[Request] = field(default_factory=list)
    end: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1/openai"

    @classmethod
    @asynccontextmanager
    async def serving(cls) -> AsyncIterator[Self]:
        api = cls()
        server = await asyncio.start_server(api.serve, "127.0.0.1", 0)
        api.port = server.sockets[0].getsockname()[1]
        async with server:
            yield api
            api.end.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                self.requests.append(await _read(reader))
                says = self.says
                if callable(says):
                    await says(writer)
                    return
                writer.write(says)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()


async def _read(reader: asyncio.StreamReader) -> Request:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    line, *lines = head.strip().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return Request(line, headers, await reader.readexactly(int(headers.get("content-length", 0))))


@pytest.fixture(scope="module")
async def running_api() -> AsyncIterator[Api]:
    async with Api.serving() as api:
        yield api


@pytest.fixture
def api(running_api: Api) -> Api:
    running_api.requests.clear()
    running_api.says = response()
    return running_api


@asynccontextmanager
async def a_model(base_url: str, *, timeout_s: float = 30.0, **fields: Any) -> AsyncIterator[Model]:
    usual: dict[str, Any] = {
        "base_url": base_url,
        "api_key": KEY,
        "headers": {},
        "timeout_s": timeout_s,
        "prices": {},
        "redact": Redactor([KEY]),
        "profile": load_profile(GENERIC),
    }
    model = Model(**{**usual, **fields})
    try:
        yield model
    finally:
        await model.close()


@pytest.fixture(scope="module")
async def model(running_api: Api) -> AsyncIterator[Model]:
    async with a_model(running_api.url) as model:
        yield model


async def ask(model: Model, *, time_left_s: float = 60.0, **params: Any) -> Any:
    return await model.complete("m", a_body(params), time_left_s=time_left_s)


def a_body(params: Mapping[str, Any]) -> RequestBody:
    return RequestBody(body_parts("m", MESSAGES, params), [])


async def fault(model: Model, **params: Any) -> Exception:
    """Return the exception that a call raises."""
    with pytest.raises((JobError, TransientError, RateLimitedError, DependencyDownError)) as caught:
        await ask(model, **params)
    # The SDK's exceptions hold headers and bodies: none is chained, so that no log can contain it.
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    return caught.value


def value(name: str, **labels: str) -> float:
    return metrics.REGISTRY.get_sample_value(name, {"model": "m", **labels}) or 0.0


def calls(code: str) -> float:
    return value("vqa_model_requests_total", code=code)


def ambiguous() -> float:
    return value("vqa_ambiguous_calls_total")


# Requests


async def test_a_call_is_one_post_with_key_model_and_messages(api: Api, model: Model) -> None:
    answer = await ask(model, temperature=0.5)
    assert answer.text == "A cat."
    (request,) = api.requests
    assert request.line == "POST /v1/openai/chat/completions HTTP/1.1"
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.headers["content-type"] == "application/json"
    assert json.loads(request.body) == {**SENT, "temperature": 0.5}


async def test_params_are_passed_on_as_they_are(api: Api, model: Model) -> None:
    params: dict[str, Any] = {
        "seed": 10**30,
        "x": [None, {"y": None}, -0.0, 1e-7, True, "1", 1, 1.0],
        "stop": None,
        "response_format": {"type": "json_schema", "json_schema": {"schema": {"é": "猫 😀"}}},
        "extra_body": {"z": 1},
        "timeout": 1,
    }
    await ask(model, **params)
    assert json.loads(api.requests[0].body) == {**params, **SENT}
    # An API may distinguish True and 1.0 from 1.
    assert [type(it) for it in json.loads(api.requests[0].body)["x"]] == [type(it) for it in params["x"]]


async def test_params_replace_neither_model_nor_messages(api: Api, model: Model) -> None:
    await model.complete("m", a_body({"model": "dear", "stream": True, "messages": []}), time_left_s=60)
    assert json.loads(api.requests[0].body) == SENT


async def test_extra_headers_are_sent_and_may_replace_the_key(api: Api) -> None:
    async with a_model(api.url, headers={"X-Team": "vision", "authorization": "Basic abc"}) as model:
        await ask(model)
    assert api.requests[0].headers["x-team"] == "vision"
    assert api.requests[0].headers["authorization"] == "Basic abc"


async def test_openais_own_variables_are_ignored(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    canary = "canary-of-the-environment"
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID", "WEBHOOK_SECRET", "API_VERSION"):
        monkeypatch.setenv(f"OPENAI_{name}", canary)
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:9/{canary}")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"Authorization: Bearer {canary}\nX-Canary: {canary}")
    async with a_model(api.url, headers={"X-Team": "vision"}) as model:
        await ask(model)
    (request,) = api.requests
    assert canary not in f"{request.line} {request.headers} {request.body!r}"
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.headers["x-team"] == "vision"
    assert not {name for name in request.headers if name.startswith("openai-")}


@pytest.mark.parametrize("ending", ["", "/"])
async def test_a_base_url_may_end_with_a_slash(api: Api, ending: str) -> None:
    async with a_model(f"{api.url}{ending}") as model:
        await ask(model)
    assert api.requests[0].line.startswith("POST /v1/openai/chat/completions ")


async def test_the_query_of_a_base_url_is_kept(api: Api) -> None:
    async with a_model(f"{api.url}?api-version=2024-10-21") as model:
        await ask(model)
        await model.list_models()
    lines = [request.line.partition(" HTTP")[0] for request in api.requests]
    assert lines == [
        "POST /v1/openai/chat/completions?api-version=2024-10-21",
        "GET /v1/openai/models?api-version=2024-10-21",
    ]


async def test_azure_gets_the_key_in_its_own_header(api: Api) -> None:
    async with a_model(api.url, profile=load_profile("azure")) as model:
        await ask(model)
    assert api.requests[0].headers["api-key"] == KEY
    assert "authorization" not in api.requests[0].headers


@pytest.mark.parametrize("user", ["", "user:p%40ss@"])
async def test_hosts_that_only_the_proxy_can_resolve_are_reached_through_it(
    api: Api, monkeypatch: pytest.MonkeyPatch, user: str
) -> None:
    monkeypatch.setenv("http_proxy", f"http://{user}127.0.0.1:{api.port}")
    proxy_options.cache_clear()
    try:
        async with a_model("http://api.invalid/v1") as model:
            await ask(model)
    finally:
        proxy_options.cache_clear()
    (request,) = api.requests
    assert request.line == "POST http://api.invalid/v1/chat/completions HTTP/1.1"
    assert request.headers["authorization"] == f"Bearer {KEY}"
    expected = f"Basic {base64.b64encode(b'user:p@ss').decode()}" if user else None
    assert request.headers.get("proxy-authorization") == expected


async def test_a_host_in_no_proxy_is_reached_directly(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    proxy_options.cache_clear()
    try:
        async with a_model(api.url) as model:
            assert (await ask(model)).text == "A cat."
    finally:
        proxy_options.cache_clear()


# Responses


async def test_an_answer_is_parsed_and_counted(api: Api) -> None:
    class Price:
        prompt, completion, cached_prompt = 1_000_000.0, 0.0, None

    def figures() -> dict[str, float]:
        return {
            "calls": calls("200"),
            "prompt": value("vqa_tokens_total", type="prompt"),
            "completion": value("vqa_tokens_total", type="completion"),
            "cost": value("vqa_cost_usd_total"),
        }

    before, before_ambiguous = figures(), ambiguous()
    async with a_model(api.url, prices={"m": Price(), "other": None}) as model:
        answer = await ask(model)
    assert answer.usage.cost_usd == 3.0
    assert answer.provider == "127.0.0.1"
    grown = {name: figure - before[name] for name, figure in figures().items()}
    assert grown == {"calls": 1, "prompt": 3, "completion": 4, "cost": 3.0}
    assert ambiguous() == before_ambiguous


ANSWER = json.dumps(COMPLETION).encode()
DEFLATED = zlib.compress(ANSWER)


@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        (gzip.compress(ANSWER), "gzip"),
        (gzip.compress(ANSWER), "x-gzip"),
        (gzip.compress(ANSWER), "GZIP"),
        (gzip.compress(ANSWER), "identity, gzip"),
        (zlib.compress(gzip.compress(ANSWER)), "gzip, deflate"),
        (DEFLATED, "deflate"),
        (DEFLATED[2:-4], "deflate"),
        # Labelled wrongly by a proxy.
        (gzip.compress(ANSWER), "deflate"),
        (gzip.compress(ANSWER), None),
        (ANSWER, "gzip"),
        (ANSWER, "br"),
        (b"\n" + ANSWER, "gzip"),
    ],
)
async def test_a_compressed_answer_is_decoded(
    api: Api, model: Model, body: bytes, encoding: str | None
) -> None:
    headers: dict[str, Any] = {} if encoding is None else {"Content_Encoding": encoding}
    api.says = response(body=body, **headers)
    assert (await ask(model)).text == "A cat."
    assert api.requests[0].headers["accept-encoding"] == "gzip, deflate"


@pytest.mark.parametrize(
    ("body", "encoding", "said"),
    [
        (b"\x0b\x02\x80{}\x03", "br", "encoded as 'br'"),
        (b"\x28\xb5\x2f\xfd", "zstd", "encoded as 'zstd'"),
        (b"this is not gzip", "gzip", "cannot be decoded as gzip"),
        (gzip.compress(ANSWER)[:-10], "gzip", "cannot be decoded as gzip"),
        (gzip.compress(ANSWER)[:-10], None, "cannot be decoded as gzip"),
    ],
)
async def test_an_answer_in_an_unknown_or_broken_encoding_is_malformed(
    api: Api, model: Model, body: bytes, encoding: str | None, said: str
) -> None:
    headers: dict[str, Any] = {} if encoding is None else {"Content_Encoding": encoding}
    api.says = response(body=body, **headers)
    before = calls("malformed")
    error = await interrupted(model)
    assert error.reason == "malformed_response"
    assert said in error.message
    assert calls("malformed") == before + 1


TOO_LARGE = b" " * (MAX_RESPONSE_BYTES + 1)


@pytest.mark.parametrize("status", [200, 503])
@pytest.mark.parametrize("levels", [0, 1, 2])
async def test_a_response_is_read_and_decoded_up_to_a_limit(
    api: Api, model: Model, levels: int, status: int
) -> None:
    body = TOO_LARGE + ANSWER
    for _ in range(levels):
        body = gzip.compress(body, compresslevel=1, mtime=0)
    api.says = response(status, body, Content_Encoding=", ".join(["gzip"] * levels) or "identity")
    error = await fault(model)
    if status == 200:
        assert isinstance(error, TransientError)
        assert (error.reason, "more than 33554432 bytes" in error.message) == ("malformed_response", True)
    else:
        assert isinstance(error, RateLimitedError)


async def test_a_response_just_below_the_limit_is_read(api: Api, model: Model) -> None:
    body = b" " * (MAX_RESPONSE_BYTES - len(ANSWER)) + ANSWER
    api.says = response(body=gzip.compress(body, compresslevel=1), Content_Encoding="gzip")
    assert (await ask(model)).text == "A cat."


async def test_an_error_in_an_unknown_encoding_has_its_status(api: Api, model: Model) -> None:
    api.says = response(429, b"\x0b\x02\x80{}\x03", Content_Encoding="br", Retry_After="7")
    error = await fault(model)
    assert isinstance(error, RateLimitedError)
    assert error.retry_after_s == 7


@pytest.mark.parametrize("name", ["Accept-Encoding", "accept-encoding"])
async def test_the_accepted_encodings_can_be_configured(api: Api, name: str) -> None:
    async with a_model(api.url, headers={name: "identity"}) as model:
        await ask(model)
    assert api.requests[0].headers["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    "headers",
    [
        {"Set_Cookie": "c" * 50_000},
        {f"X_{n}": "v" for n in range(500)},
        {f"X_{n}": "v" * 7000 for n in range(30)},
    ],
    ids=["a long one", "many", "many long ones"],
)
async def test_a_response_may_have_long_and_many_headers(
    api: Api, model: Model, headers: dict[str, Any]
) -> None:
    api.says = response(**headers)
    assert (await ask(model)).text == "A cat."


async def test_an_answer_may_be_chunked(api: Api, model: Model) -> None:
    body = ANSWER
    head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    api.says = f"{head}{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
    assert (await ask(model)).text == "A cat."


@pytest.mark.parametrize(
    "content_type", ["text/html", "text/plain; charset=latin-1", "application/octet-stream"]
)
async def test_an_answer_is_json_with_any_content_type(api: Api, model: Model, content_type: str) -> None:
    body = json.dumps({"choices": [{"message": {"content": "猫"}}]}, ensure_ascii=False).encode()
    api.says = response(body=body, Content_Type=content_type)
    assert (await ask(model)).text == "猫"


@pytest.mark.parametrize(
    ("status", "body"),
    [(200, b""), (200, b"<html>"), (200, {"choices": []}), (200, []), (204, b"")],
)
async def test_a_200_without_a_completion_is_a_transient_malformed_response(
    api: Api, model: Model, status: int, body: Any
) -> None:
    api.says = response(status, body)
    before, unclear = calls("malformed"), ambiguous()
    error = await fault(model)
    assert isinstance(error, TransientError)
    assert (error.dependency, error.reason, error.refused) == (
        Dependency.MODEL,
        "malformed_response",
        False,
    )
    assert calls("malformed") == before + 1
    # The API generated something and is likely to bill it.
    assert ambiguous() == unclear + 1


def figures() -> dict[str, float]:
    return {
        "prompt": value("vqa_tokens_total", type="prompt"),
        "completion": value("vqa_tokens_total", type="completion"),
        "cost": value("vqa_cost_usd_total"),
        "ambiguous": ambiguous(),
    }


USAGE = {"prompt_tokens": 3, "completion_tokens": "4", "cost": 0.5}
BAD = {"code": 400, "type": "content_policy_violation"}


@pytest.mark.parametrize(
    ("choice", "error", "code", "expected"),
    [
        ({"message": {"content": "half"}, "finish_reason": "error"}, None, "malformed", TransientError),
        ({"message": {"content": 5}}, None, "malformed", TransientError),
        ({"message": {"content": "half"}, "finish_reason": "error"}, {"code": 502}, "502", TransientError),
        ({"message": {"content": "half"}, "finish_reason": "error"}, BAD, "400", JobError),
    ],
)
async def test_the_usage_of_an_unusable_answer_is_counted_and_reported(
    api: Api, model: Model, choice: Any, error: Any, code: str, expected: type[Exception]
) -> None:
    api.says = response(body={"choices": [choice], "error": error, "usage": USAGE})
    before, requests = figures(), calls(code)
    raised = await fault(model)
    assert isinstance(raised, expected)
    assert isinstance(raised, TransientError | JobError)
    if isinstance(raised, TransientError):
        assert raised.reason == "malformed_response"
    assert raised.usage == Usage(prompt_tokens=3, completion_tokens=4, total_tokens=7, cost_usd=0.5)
    assert calls(code) == requests + 1
    assert {name: figure - before[name] for name, figure in figures().items()} == {
        "prompt": 3, "completion": 4, "cost": 0.5, "ambiguous": 1
    }  # fmt: skip


async def test_unknown_figures_are_not_counted(api: Api, model: Model) -> None:
    api.says = response(body={**COMPLETION, "usage": {"prompt_tokens": None, "completion_tokens": 4}})
    before, observed = figures(), value_of_input_tokens()
    answer = await ask(model)
    assert (answer.usage.prompt_tokens, answer.usage.cost_usd) == (None, None)
    assert {name: figure - before[name] for name, figure in figures().items()} == {
        "prompt": 0, "completion": 4, "cost": 0, "ambiguous": 0
    }  # fmt: skip
    assert value_of_input_tokens() == observed


def value_of_input_tokens() -> float:
    labels = {
        "gen_ai_operation_name": "chat",
        "gen_ai_provider_name": "127.0.0.1",
        "gen_ai_request_model": "m",
        "gen_ai_token_type": "input",
    }
    return metrics.REGISTRY.get_sample_value("gen_ai_client_token_usage_count", labels) or 0.0


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ({"code": 400, "message": "bad image"}, JobError),
        ({"code": "429", "message": "slow down"}, RateLimitedError),
        ({"code": 401, "message": "bad key"}, DependencyDownError),
        ({"code": 502, "message": "bad gateway"}, TransientError),
        ({"message": "what"}, TransientError),
        ("rate_limit_exceeded", RateLimitedError),
    ],
)
async def test_an_error_in_a_200_is_treated_as_its_status(
    api: Api, model: Model, error: Any, expected: type[Exception]
) -> None:
    api.says = response(body={"error": error})
    before = ambiguous()
    assert isinstance(await fault(model), expected)
    assert ambiguous() == before


async def test_an_error_in_a_200_may_say_when_to_try_again(api: Api, model: Model) -> None:
    api.says = response(body={"error": {"code": 429, "message": "slow down"}}, Retry_After="7")
    error = await fault(model)
    assert isinstance(error, RateLimitedError)
    assert error.retry_after_s == 7


BOUGHT = {"choices": [{"message": {"content": "half"}, "finish_reason": "error"}], "usage": USAGE}


@pytest.mark.parametrize(
    "body",
    [
        {**BOUGHT, "error": {"code": 429, "message": "Rate limit reached"}},
        {**BOUGHT, "error": {"code": 503, "message": "no capacity"}},
        {**BOUGHT, "error": {"code": 529, "type": "overloaded_error", "message": "Overloaded"}},
        {**BOUGHT, "error": {"message": "Overloaded"}},
        {**BOUGHT, "error": {"code": 402, "message": "Insufficient credits"}},
        {**BOUGHT, "error": {"code": 404, "message": "The model `m` does not exist"}},
        {**BOUGHT, "error": {"code": 502, "message": "bad gateway"}},
        # No text, but the API says that it generated some.
        {"choices": [], "error": {"code": 503, "message": "Overloaded"}, "usage": USAGE},
    ],
)
async def test_a_part_of_an_answer_is_a_malformed_one_whatever_the_error(
    api: Api, model: Model, body: dict[str, Any]
) -> None:
    """It is billed: as a rate limit, it would be bought without end."""
    api.says = response(body=body, Retry_After="1")
    unclear = ambiguous()
    error = await fault(model)
    assert isinstance(error, TransientError)
    assert (error.reason, ambiguous()) == ("malformed_response", unclear + 1)
    assert error.usage == Usage(prompt_tokens=3, completion_tokens=4, total_tokens=7, cost_usd=0.5)
    assert body["error"]["message"] in error.message
    assert body["error"]["message"] not in error.log_message


@pytest.mark.parametrize("usage", [None, {"prompt_tokens": 3, "completion_tokens": 0}])
async def test_an_error_without_any_answer_is_no_malformed_one(api: Api, model: Model, usage: Any) -> None:
    api.says = response(body={"error": {"code": 429, "message": "busy"}, "usage": usage})
    assert isinstance(await fault(model), RateLimitedError)


@pytest.mark.parametrize(
    ("status", "error", "tier", "expected"),
    [
        # OpenAI's, Groq's and DeepInfra's answers when the tier is busy.
        (429, {"code": "resource_unavailable", "type": "rate_limit_error", "message": "Busy"}, "flex", True),
        (498, {"code": "capacity_exceeded", "message": "Flex tier capacity exceeded"}, "flex", True),
        (429, {"message": "Model busy, retry later"}, "flex", True),
        (503, {"message": "Service overloaded"}, "flex", True),
        (503, {}, "flex", True),
        (200, {"code": 503, "message": "Overloaded"}, "flex", True),
        (503, {"message": "Service overloaded"}, None, False),
        # Those when the account has reached its limit.
        (429, {"code": "rate_limit_exceeded", "message": "Slow down"}, "flex", False),
        (429, {"message": "Rate limit reached for m on tokens per min (TPM): Limit 1"}, "flex", False),
        (429, {"message": "Too Many Requests"}, "flex", False),
        (429, {"message": "You exceeded your concurrency limit of 200 requests"}, "flex", False),
        (200, {"code": 429, "message": "Rate limit reached"}, "flex", False),
    ],
)
async def test_a_limit_concerns_the_tier_unless_it_is_the_account_s(
    api: Api, model: Model, status: int, error: Any, tier: str | None, *, expected: bool
) -> None:
    api.says = response(status, {"error": error})
    body = RequestBody(body_parts("m", MESSAGES, {}), [], service_tier=tier)
    with pytest.raises(RateLimitedError) as caught:
        await model.complete("m", body, time_left_s=30)
    assert caught.value.concerns_tier is expected


@pytest.mark.parametrize(("tier", "is_in_time"), [("flex", True), ("priority", False), (None, False)])
async def test_a_request_may_take_as_long_as_its_tier(
    api: Api, tier: str | None, *, is_in_time: bool
) -> None:
    async def slowly(writer: asyncio.StreamWriter) -> None:
        await expired.wait()
        writer.write(response())
        await writer.drain()

    api.says = slowly
    expired = asyncio.Event()
    profile = load_profile("generic").model_copy(update={"tiers": {"flex": Tier(timeout_s=60)}})
    async with a_model(api.url, profile=profile, timeout_s=0.3) as model:
        asyncio.get_running_loop().call_later(0.6, expired.set)
        body = RequestBody(body_parts("m", MESSAGES, {}), [], service_tier=tier)
        if is_in_time:
            assert (await model.complete("m", body, time_left_s=30)).text == "A cat."
        else:
            with pytest.raises(TransientError, match="did not answer within"):
                await model.complete("m", body, time_left_s=30)


@pytest.mark.parametrize(
    ("name", "provider"), [("generic", "127.0.0.1"), ("vllm", "vllm"), ("deepinfra", "deepinfra")]
)
async def test_the_provider_is_the_profile_s_or_the_host(api: Api, name: str, provider: str) -> None:
    async with a_model(api.url, profile=load_profile(name)) as model:
        assert (await ask(model)).provider == provider


# An answer before the end of the request


class Pieces:
    """An image of which each piece but the first waits until the server has answered and closed."""

    def __init__(self, wait: Callable[[], Awaitable[None]]) -> None:
        self._wait = wait
        self.length = 8 * len(PIECE)

    async def pieces(self) -> AsyncIterator[bytes]:
        yield PIECE
        await self._wait()
        for _ in range(7):
            yield PIECE


# The first one fits into the buffers of a socket, so that it is sent whether or not the server reads it.
PIECE = b"A" * 64 * 1024


def answer_early(listener: socket.socket, answer: bytes, closed: threading.Event) -> None:
    """Answer to the beginning of a request, and close with a part unread, which resets the connection."""
    connection, _ = listener.accept()
    with connection:
        head = b""
        while b"\r\n\r\n" not in head:
            head += connection.recv(1000)
        # More than the head has arrived.
        connection.recv(1000)
        connection.sendall(answer)
    closed.set()


async def outcome_of_early(answer: bytes, *, blocks: bool) -> Exception:
    """Return the error of a request that is answered early.

    Args:
        answer: the bytes of the response.
        blocks: whether the event loop is busy from before the answer until after the reset, so that it
            notices the failed write first.
    """
    closed = threading.Event()

    async def wait() -> None:
        if blocks:
            closed.wait(30)
        else:
            await asyncio.to_thread(closed.wait, 30)

    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        server = threading.Thread(target=answer_early, args=(listener, answer, closed), daemon=True)
        server.start()
        port = listener.getsockname()[1]
        async with a_model(f"http://127.0.0.1:{port}/v1") as model:
            body = RequestBody([b'{"x":"', b'"}'], [Pieces(wait)])
            with pytest.raises((JobError, TransientError, RateLimitedError, DependencyDownError)) as caught:
                await model.complete("m", body, time_left_s=30)
        await asyncio.to_thread(server.join)
    return caught.value


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize(
    ("status", "expected"), [(413, TransientError), (429, RateLimitedError), (401, DependencyDownError)]
)
async def test_an_early_answer_is_used(
    run: Callable[[Any], Any], status: int, expected: type[Exception], *, blocks: bool
) -> None:
    answer = response(status, {"error": {"message": "m" * 10_000}}, Connection="close", Retry_After="7")
    error = await asyncio.to_thread(run, outcome_of_early(answer, blocks=blocks))
    assert isinstance(error, expected), error
    if isinstance(error, RateLimitedError):
        assert error.retry_after_s == 7


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
async def test_a_reset_within_the_request_without_an_answer_is_transient(run: Callable[[Any], Any]) -> None:
    error = await asyncio.to_thread(run, outcome_of_early(b"", blocks=True))
    assert isinstance(error, TransientError)
    assert error.reason == "connection_error"


async def test_an_early_answer_is_used_at_once_though_the_server_reads_no_further() -> None:
    done = asyncio.Event()

    async def never() -> None:
        await done.wait()

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(response(413))
        await done.wait()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with a_model(f"http://127.0.0.1:{port}/v1") as model, asyncio.timeout(20):
            with pytest.raises(TransientError, match="413"):
                await model.complete("m", RequestBody([b"", b""], [Pieces(never)]), time_left_s=30)
        done.set()


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
async def test_localhost_is_reached_at_both_of_its_addresses(api: Api, address: str) -> None:
    async with await asyncio.start_server(api.serve, address, 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with a_model(f"http://localhost:{port}/v1") as model:
            for _ in range(3):
                assert (await ask(model)).text == "A cat."


# Each status


@pytest.mark.parametrize(
    ("status", "said"), [(400, "Invalid image"), (413, "The prompt is too long"), (403, "It was flagged")]
)
async def test_a_permanently_rejected_request_fails_the_job(
    api: Api, model: Model, status: int, said: str
) -> None:
    api.says = response(status, {"error": {"message": said, "code": "x"}})
    before, before_ambiguous = calls(str(status)), ambiguous()
    error = await fault(model)
    assert isinstance(error, JobError)
    assert error.code is ErrorCode.MODEL_REJECTED
    assert error.message == f"the API answered {status}: {said}"
    assert error.log_message == f"the API answered {status}"
    assert calls(str(status)) == before + 1
    assert ambiguous() == before_ambiguous


@pytest.mark.parametrize("status", [400, 403, 418, 422])
async def test_a_refusal_that_no_rule_knows_can_concern_all_jobs(api: Api, model: Model, status: int) -> None:
    api.says = response(status, {"error": {"message": "no such luck", "code": "x"}})
    error = await fault(model)
    assert isinstance(error, TransientError)
    assert (error.refused, error.model) == (True, "")
    assert error.message == f"the API answered {status}: no such luck"


@pytest.mark.parametrize(
    ("status", "said"),
    [(400, "Your tenant is odd"), (413, "Request Entity Too Large"), (422, "x: Field required")],
)
async def test_a_rejection_in_general_words_is_only_likely_the_job_s(
    api: Api, model: Model, status: int, said: str
) -> None:
    api.says = response(status, {"error": {"message": said, "type": "invalid_request_error"}})
    error = await fault(model)
    assert isinstance(error, TransientError)
    assert (error.refused, error.is_likely_the_jobs, error.model) == (True, True, "")
    assert error.message == f"the API answered {status}: {said}"


async def test_a_refusal_of_one_job_with_one_model_names_the_model(api: Api, model: Model) -> None:
    api.says = response(404, {"error": {"message": "No endpoints found that support image input"}})
    error = await fault(model)
    assert isinstance(error, TransientError)
    assert (error.refused, error.model) == (True, "m")


@pytest.mark.parametrize("status", [301, 400, 401, 404, 405, 411, 429, 500, 502])
async def test_any_answer_can_concern_one_job_while_others_succeed(
    api: Api, model: Model, status: int
) -> None:
    api.says = response(
        status, {"error": {"message": "The API key is expired", "code": "insufficient_quota"}}
    )
    error = await fault(model)
    assert isinstance(error, DependencyDownError)
    assert error.may_be_the_jobs


async def test_a_missing_model_is_down_alone(api: Api, model: Model) -> None:
    api.says = response(400, {"error": {"message": "no", "code": "model_decommissioned"}})
    error = await fault(model)
    assert isinstance(error, DependencyDownError)
    assert error.model == "m"
    assert "check VQA_MODEL and VQA_ALLOWED_MODELS" in error.message


async def test_the_operator_reads_the_api_s_sentence_without_data_of_the_job(api: Api) -> None:
    said = (
        f"Invalid key {KEY} for https://photos.example/secret.png and {'QUJD' * 40}, see"
        f" https://console.x.ai/keys. {'All details. ' * 60}"
    )
    api.says = response(401, {"error": {"message": said}})
    async with a_model(api.url, profile=load_profile("xai")) as model:
        error = await fault(model)
    assert isinstance(error, DependencyDownError)
    assert len(error.message) <= MAX_OPERATOR_CHARS
    assert "[URL] and [data], see https://console.x.ai/keys." in error.message
    for secret in (KEY, "secret.png", "QUJD"):
        assert secret not in error.message


@pytest.mark.parametrize(
    ("provider", "url", "is_shown"),
    [
        ("openai", "https://platform.openai.com/account/api-keys", True),
        ("openai", "https://api.openai.com/v1", True),
        ("azure", "https://a-resource.openai.azure.com/openai", True),
        ("openrouter", "https://openrouter.ai/credits", True),
        ("dashscope", "https://tenant-photos.oss-cn.aliyuncs.com/patients/anna-meyer.jpg", False),
        ("gemini", "https://storage.googleapis.com/patients/anna-meyer.jpg", False),
        ("azure", "https://photos.blob.core.azure.com/anna-meyer.jpg", False),
        ("generic", "https://api.openai.com/v1", False),
    ],
)
def test_the_operator_reads_urls_of_the_provider_only(provider: str, url: str, is_shown: bool) -> None:
    text = operator_message("no", f"see {url}", load_profile(provider))
    assert text == f'no ("see {url if is_shown else "[URL]"}")'


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
async def test_the_operator_does_not_read_words_of_the_job(api: Api, model: Model, status: int) -> None:
    question = 'Which "medicine" does Jane\nDoe take, and since when?'
    body = body_parts("m", [{"role": "user", "content": question}], {})
    api.says = response(status, {"error": {"message": f"cannot process: {question}"}})
    with pytest.raises((TransientError, RateLimitedError, DependencyDownError)) as caught:
        await model.complete("m", RequestBody(body, []), time_left_s=60)
    error = caught.value
    assert isinstance(error, TransientError | RateLimitedError | DependencyDownError)
    for_operators = error.cause if isinstance(error, TransientError) else error.message
    assert for_operators.startswith(f"the API answered {status}")
    assert "Doe" not in for_operators


@pytest.mark.parametrize(
    ("status", "hint"),
    [(401, "VQA_MODEL_API_KEY"), (402, "credit"), (404, "VQA_MODEL_BASE_URL"), (405, "VQA_MODEL_BASE_URL")],
)
async def test_a_rejection_that_concerns_all_jobs_is_an_outage(
    api: Api, model: Model, status: int, hint: str
) -> None:
    api.says = response(status, {"error": {"message": f"wrong key {KEY}"}})
    error = await fault(model)
    assert isinstance(error, DependencyDownError)
    assert error.dependency is Dependency.MODEL
    assert str(status) in error.message
    assert hint in error.message
    assert KEY not in error.message


@pytest.mark.parametrize(
    ("status", "reason", "refused"),
    [
        (403, "http_403", True), (408, "http_408", False), (409, "http_409", False), (421, "http_4xx", False),
        (500, "http_500", False), (501, "http_5xx", False), (502, "http_5xx", False),
        (504, "http_5xx", False), (507, "http_5xx", False),
    ],
)  # fmt: skip
async def test_a_transient_status_is_retried(
    api: Api, model: Model, status: int, reason: str, refused: bool
) -> None:
    api.says = response(status, {"error": {"message": "oops"}}, Retry_After="7")
    error = await fault(model)
    assert isinstance(error, TransientError)
    assert (error.reason, error.refused) == (reason, refused)
    assert error.message == f"the API answered {status}: oops"
    # Only the reason of a pause quotes the API.
    assert error.log_message == f"the API answered {status}"
    assert error.cause == f'the API answered {status} ("oops")'
    # The SDK's own retries are disabled.
    assert len(api.requests) == 1


@pytest.mark.parametrize("status", [503, 529, 498])
async def test_an_overloaded_api_is_not_down(api: Api, model: Model, status: int) -> None:
    api.says = response(status, {"error": {"message": "busy"}}, Retry_After="7")
    error = await fault(model)
    assert isinstance(error, RateLimitedError)
    assert (error.retry_after_s, error.is_overloaded) == (7.0, True)
    assert error.message == f'the API answered {status} ("busy")'
    assert len(api.requests) == 1


@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 307, 308])
async def test_a_redirect_is_reported_and_not_followed(api: Api, model: Model, status: int) -> None:
    api.says = response(status, b"", Location=f"{api.url}/elsewhere")
    error = await fault(model)
    assert isinstance(error, DependencyDownError)
    assert f"redirect ({status})" in error.message
    assert "VQA_MODEL_BASE_URL" in error.message
    assert len(api.requests) == 1


async def test_secrets_and_images_in_error_messages_are_redacted(api: Api, model: Model) -> None:
    said = f"key {KEY} url https://h/p?X-Amz-Signature=abc image data:image/png;base64,{'A' * 5000} end"
    api.says = response(400, {"error": {"message": said, "code": "invalid_image"}})
    error = await fault(model)
    assert isinstance(error, JobError)
    for secret in (KEY, "abc", "AAAA"):
        assert secret not in error.message
    assert error.message.endswith(" end")


async def test_a_long_error_message_of_the_api_is_truncated(api: Api, model: Model) -> None:
    api.says = response(400, {"error": {"message": f"image {'x' * 500_000}", "code": "invalid_image"}})
    error = await fault(model)
    assert isinstance(error, JobError)
    assert len(error.message) < MAX_API_MESSAGE_CHARS + 100


# 429


async def retry_after(api: Api, model: Model, body: Any = None, **headers: Any) -> float | None:
    api.says = response(429, body or {"error": {"message": "Model busy, retry later"}}, **headers)
    error = await fault(model)
    assert isinstance(error, RateLimitedError)
    return error.retry_after_s


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("7", 7.0), ("0", 0.0), ("0.25", 0.25), (" 7 ", 7.0), ("1e1", 10.0), ("-7", 0.0),
        ("86400", MAX_RETRY_AFTER_S),
        ("9" * 400, MAX_RETRY_AFTER_S), ("inf", MAX_RETRY_AFTER_S), ("-inf", 0.0), ("nan", None),
        ("", None),
        ("soon", None), ("7 seconds", 7.0), ("0x7", None), ("2099-01-01T00:00:00Z", MAX_RETRY_AFTER_S),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0), ("Wed, 21 Oct 2099 07:28:00 GMT", MAX_RETRY_AFTER_S),
        ("Wed, 21 Oct 99999999999999999999 07:28:00 GMT", None), ("Thu, 99 Jan 2099 00:00:00 GMT", None),
    ],
)  # fmt: skip
async def test_retry_after_is_read_in_every_form(
    api: Api, model: Model, said: str, seconds: float | None
) -> None:
    assert await retry_after(api, model, Retry_After=said) == seconds


async def test_retry_after_may_be_a_date(api: Api, model: Model) -> None:
    seconds = await retry_after(
        api, model, Retry_After=email.utils.formatdate(time.time() + 100, usegmt=True)
    )
    assert seconds == pytest.approx(100, abs=30)


async def test_retry_after_may_be_in_milliseconds_or_missing(api: Api, model: Model) -> None:
    assert await retry_after(api, model, retry_after_ms="1500") == 1.5
    assert await retry_after(api, model, retry_after_ms="1500", Retry_After="7") == 1.5
    assert await retry_after(api, model, retry_after_ms="soon", Retry_After="7") == 7.0
    assert await retry_after(api, model) is None


@hypothesis_settings(max_examples=60)
@given(
    said=st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40),
    name=st.sampled_from(["Retry_After", "retry_after_ms"]),
)
async def test_a_429_with_any_body_is_a_429(running_api: Api, model: Model, said: str, name: str) -> None:
    seconds = await retry_after(running_api, model, **{name: said})
    assert seconds is None or 0 <= seconds <= MAX_RETRY_AFTER_S


async def test_an_exhausted_quota_is_an_outage_and_not_a_rate_limit(api: Api, model: Model) -> None:
    body = {"error": {"message": "You exceeded", "type": "insufficient_quota", "code": "insufficient_quota"}}
    api.says = response(429, body, Retry_After="1")
    error = await fault(model)
    assert isinstance(error, DependencyDownError)
    assert "quota" in error.message


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"null", b"slow down", {"error": "x"}, {"error": {"code": 429}}]
)
async def test_the_body_of_a_429_may_have_any_form(api: Api, model: Model, body: Any) -> None:
    assert await retry_after(api, model, body, Retry_After="7") == 7.0


# No response, or a part of one


async def interrupted(model: Model) -> TransientError:
    """Return the error of a call that may have been billed; check that it is counted as such."""
    before = ambiguous()
    error = await fault(model)
    assert isinstance(error, TransientError)
    assert error.dependency is Dependency.MODEL
    assert ambiguous() == before + 1
    return error


@pytest.mark.parametrize("part", ["nothing", "half a head", "half a body"])
async def test_a_reset_is_a_transient_error(api: Api, model: Model, part: str) -> None:
    sent = {
        "nothing": b"",
        "half a head": b"HTTP/1.1 200 OK\r\nConte",
        "half a body": response(body=ANSWER[:-1], length=10_000),
    }[part]

    async def reset(writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        await writer.drain()
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    api.says = reset
    assert (await interrupted(model)).reason == "connection_error"


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"HTTP/1.1 200 OK\r\n",
        response(body=ANSWER[:-1], length=10_000),
        response(body=b"", length=10_000),
        response(body=gzip.compress(ANSWER)[:-9], length=10_000, Content_Encoding="gzip"),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n{",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n{}",
    ],
    ids=[
        "nothing",
        "a head",
        "a body",
        "no body",
        "a compressed body",
        "a chunk",
        "an odd chunk",
        "another protocol",
        "no length",
    ],
)
async def test_an_incomplete_response_is_a_transient_error(api: Api, model: Model, sent: bytes) -> None:
    async def half(writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        await writer.drain()

    api.says = half
    assert (await interrupted(model)).reason == "connection_error"


def chunked(body: bytes) -> bytes:
    """Return a response without its last chunk."""
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"%x\r\n%b\r\n" % (len(body), body)


STREAM = b'data: {"choices": [{"delta": {"content": "A cat."}}]}\n\ndata: [DONE]\n\n'


@pytest.mark.parametrize("ends", ["close", "reset"])
@pytest.mark.parametrize(
    "sent",
    [response(length=10_000), chunked(ANSWER), chunked(STREAM)],
    ids=["length", "chunks", "stream"],
)
async def test_an_answer_that_is_complete_without_the_end_of_its_response_is_used(
    api: Api, model: Model, sent: bytes, ends: str
) -> None:
    async def close(writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        await writer.drain()
        if ends == "reset":
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    api.says = close
    assert (await ask(model)).text == "A cat."


async def test_half_of_an_error_is_an_error(api: Api, model: Model) -> None:
    async def close(writer: asyncio.StreamWriter) -> None:
        writer.write(response(413, {"error": {"message": "too large"}}, length=10_000))
        await writer.drain()

    api.says = close
    error = await fault(model)
    assert isinstance(error, TransientError)
    assert error.is_likely_the_jobs
    assert "too large" in error.message


async def test_a_body_longer_than_its_content_length_is_invalid_and_may_have_been_billed(api: Api) -> None:
    api.says = response(length=20)
    async with a_model(api.url) as model:
        assert (await interrupted(model)).reason == "connection_error"


@pytest.mark.parametrize(
    "sent", [b"", response(length=10_000)], ids=["before the answer", "within the answer"]
)
@pytest.mark.parametrize("bound", ["call", "delivery"])
async def test_a_response_that_times_out_may_have_been_billed(api: Api, sent: bytes, bound: str) -> None:
    async def hang(writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        await api.end.wait()

    api.says = hang
    before = calls("timeout")
    async with a_model(api.url, timeout_s=0.3 if bound == "call" else 30.0) as model:
        begun = ambiguous()
        error = await fault(model, time_left_s=60.0 if bound == "call" else 0.3)
    assert isinstance(error, TransientError)
    assert error.reason == "timeout"
    assert (calls("timeout"), ambiguous()) == (before + 1, begun + 1)


async def test_the_timeout_applies_to_the_whole_response(api: Api) -> None:
    """Bytes keep arriving: a timeout between two bytes would never expire."""

    async def trickle(writer: asyncio.StreamWriter) -> None:
        writer.write(response(length=1_000_000))
        while not writer.is_closing() and not api.end.is_set():
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.02)

    api.says = trickle
    async with asyncio.timeout(60), a_model(api.url, timeout_s=0.4) as model:
        error = await fault(model)
    assert isinstance(error, TransientError)
    assert error.reason == "timeout"


async def test_an_unreachable_api_is_down_and_nothing_was_billed() -> None:
    with closing(socket.socket()) as nobody:
        nobody.bind(("127.0.0.1", 0))
        before = ambiguous()
        async with a_model(f"http://127.0.0.1:{nobody.getsockname()[1]}/v1") as model:
            error = await fault(model)
    assert isinstance(error, DependencyDownError)
    assert error.dependency is Dependency.MODEL
    assert "cannot be reached" in error.message
    assert ambiguous() == before


async def plain(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(response(400))
    await writer.drain()
    writer.close()


async def test_an_api_without_tls_is_down() -> None:
    async with await asyncio.start_server(plain, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with a_model(f"https://127.0.0.1:{port}/v1") as model:
            error = await fault(model)
    assert isinstance(error, DependencyDownError)
    assert KEY not in error.message


async def test_a_cancelled_call_is_aborted_and_counted(api: Api, model: Model) -> None:
    async def hang(_: asyncio.StreamWriter) -> None:
        await api.end.wait()

    api.says = hang
    before = ambiguous()
    task = asyncio.create_task(ask(model))
    await until(lambda: api.requests, "the call arrives")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ambiguous() == before + 1


async def test_many_calls_run_concurrently(api: Api, model: Model) -> None:
    together = asyncio.Event()

    async def wait_for_all(writer: asyncio.StreamWriter) -> None:
        if len(api.requests) == 104:
            together.set()
        await together.wait()
        writer.write(response())
        await writer.drain()

    api.says = wait_for_all
    async with asyncio.timeout(60):
        answers = await asyncio.gather(*(ask(model) for _ in range(104)))
    assert {answer.text for answer in answers} == {"A cat."}
