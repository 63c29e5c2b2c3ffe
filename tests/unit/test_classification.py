"""What the error answers of model APIs mean: recorded answers, in other words, by provider."""

import base64
import json
import random
import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cpu_time import is_within
from tests.running import ROOT
from worker.model.classification import Classification, classify, effective_status
from worker.model.error_body import parse_error_body
from worker.model.retry_hints import MAX_RETRY_AFTER_S
from worker.providers import GENERIC as GENERIC_NAME
from worker.providers import Category, Profile, Rule, load_profile, provider_names

NOW = 1_900_000_000.0
MODEL = "vision-1"

JOB = Category.JOB
MODEL_JOB = Category.MODEL_JOB
CAPACITY = Category.CAPACITY
TRANSIENT = Category.TRANSIENT
CONFIGURATION = Category.CONFIGURATION
ONE_MODEL = Category.MODEL
UNKNOWN = Category.UNKNOWN


def found(
    status: int, body: Any = b"", provider: str = "generic", headers: dict[str, str] | None = None
) -> Classification:
    raw = body if isinstance(body, bytes) else _encoded(body)
    return classify(status, headers or {}, raw, profile=load_profile(provider), model=MODEL, now=NOW)


def _encoded(body: Any) -> bytes:
    """Return JSON; of a page or text, as it is."""
    return (body if isinstance(body, str) else json.dumps(body)).encode()


def error(message: str, **fields: Any) -> dict[str, Any]:
    return {"error": {"message": message, **fields}}


def gemini(code: int, message: str, status: str, *details: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"error": {"code": code, "message": message, "status": status, "details": [*details]}}]


# Answers as providers send them, in other words: see tests/data/README.md.
RECORDED: list[dict[str, Any]] = json.loads((ROOT / "tests/data/error-answers.json").read_text("utf-8"))


@pytest.mark.parametrize("row", RECORDED, ids=lambda row: f"{row['provider']}-{row['status']}")
def test_a_recorded_answer_is_understood(row: dict[str, Any]) -> None:
    classification = found(row["status"], row["body"], row["provider"])
    assert classification.category == row["category"]
    assert classification.isolated == row.get("isolated", classification.isolated)


@pytest.mark.parametrize(
    "row",
    [row for row in RECORDED if row.get("generic", True)],
    ids=lambda row: f"{row['provider']}-{row['status']}",
)
def test_a_recorded_answer_is_understood_behind_a_gateway(row: dict[str, Any]) -> None:
    assert found(row["status"], row["body"]).category == row["category"]


def _idle_rules(profile: Profile, rows: Sequence[tuple[int, Any]], count: int) -> list[Rule]:
    """Return those of the first `count` rules without which every answer would mean the same."""
    deciding = set()
    for status, body in rows:
        answer = parse_error_body(body if isinstance(body, bytes) else _encoded(body))
        seen = effective_status(status, answer), answer.codes, answer.words_without_quotes(MODEL), MODEL
        matching = [n for n, rule in enumerate(profile.rules) if rule.matches(*seen)]
        first, second = (_meaning(profile.rules, n) for n in [*matching, -1, -1][:2])
        if first != second:
            deciding.add(matching[0])
    return [profile.rules[n] for n in range(count) if n not in deciding]


def _meaning(rules: Sequence[Rule], n: int) -> tuple[Category, bool, bool]:
    rule = rules[n] if n >= 0 else Rule(category=UNKNOWN)
    return rule.category, rule.likely, rule.isolated


@pytest.mark.parametrize("provider", provider_names()[1:])
def test_each_rule_of_a_provider_decides_a_recorded_answer(provider: str) -> None:
    profile, generic = load_profile(provider), load_profile(GENERIC_NAME)
    rows = [(row["status"], row["body"]) for row in RECORDED if row["provider"] == provider]
    assert _idle_rules(profile, rows, len(profile.rules) - len(generic.rules)) == []


def test_each_generic_rule_decides_an_answer_of_these_tables() -> None:
    generic = load_profile(GENERIC_NAME)
    rows = [(row["status"], row["body"]) for row in RECORDED]
    rows += [(status, body) for status, body, _ in [*GENERIC, *BLAME]]
    rows += [(status, error(message)) for status, message, _ in [*NOT_THE_JOBS, *QUOTING]]
    assert _idle_rules(generic, rows, len(generic.rules)) == []


def test_every_provider_has_recorded_answers() -> None:
    assert {row["provider"] for row in RECORDED} == {*provider_names()}


GENERIC: list[tuple[int, Any, Category]] = [
    # A redirect, TLS, a proxy
    (301, b"", CONFIGURATION),
    (400, b"Client sent an HTTP request to an HTTPS server.\n", CONFIGURATION),
    (497, b"", CONFIGURATION),
    (407, b"<html><head><title>407 Proxy Authentication Required</title></head></html>", CONFIGURATION),
    # For everyone, unless the words say otherwise
    (405, {"detail": "Method Not Allowed"}, CONFIGURATION),
    (410, b"", CONFIGURATION),
    (410, error(f"{MODEL} has reached its end of life"), ONE_MODEL),
    (411, b"", CONFIGURATION),
    (415, b"", CONFIGURATION),
    (415, error("image/heic is an unsupported image"), JOB),
    (404, {"detail": "Not Found"}, CONFIGURATION),
    (401, b"", CONFIGURATION),
    (401, error(f"this key cannot use {MODEL}"), ONE_MODEL),
    (402, b"", CONFIGURATION),
    # Capacity and transient errors
    (429, b"", CAPACITY),
    (429, error("Quota exceeded for requests per minute"), CAPACITY),
    (429, error("nope", type="quota_exceeded_insufficient_balance"), CONFIGURATION),
    (429, error("余额不足"), CONFIGURATION),
    (503, b"", CAPACITY),
    (529, error("Overloaded", type="overloaded_error"), CAPACITY),
    (498, b"", CAPACITY),
    (500, error("upstream says: too many requests"), CAPACITY),
    (400, {"fault": {"faultstring": "the model is overloaded"}}, CAPACITY),
    (400, b'{"error": {"message": "the model is overlo', JOB),
    (400, b'{"error": {"message": "the model is overloaded", "co', CAPACITY),
    (500, error("CUDA out of memory while processing image"), TRANSIENT),
    *((status, b"", TRANSIENT) for status in (408, 409, 421, 423, 424, 425, 444, 449, 460, 499)),
    *((status, b"", TRANSIENT) for status in (500, 501, 502, 504, 507, 520, 524)),
    (424, error("timeout while fetching the image from the url"), TRANSIENT),
    # The job's own
    (400, error("no", type="invalid_request_error"), JOB),
    (
        422,
        {"detail": [{"loc": ["body", "temperature"], "msg": "Input should be less than 2", "type": "x"}]},
        JOB,
    ),
    (413, b"<html><head><title>413 Request Entity Too Large</title></head></html>", JOB),
    (451, error("blocked by the content policy"), JOB),
    (500, error("Failed to decode image"), JOB),
    (500, b"ValueError: broken data stream when reading image file", JOB),
    (502, error("Error: could not parse base64 of image 3"), JOB),
    (400, error("This endpoint does not support image urls"), JOB),
    (400, error("Unsupported image format: image/tiff"), JOB),
    # One model
    (400, error("This model does not support image input"), ONE_MODEL),
    (
        422,
        error("Failed to deserialize: messages[0]: unknown variant `image_url`, expected `text`"),
        ONE_MODEL,
    ),
    (400, error("this model does not support tools"), MODEL_JOB),
    (400, error("response_format is not supported with this model"), MODEL_JOB),
    # Configuration
    (
        400,
        error("Your credit balance is too low to access the API.", type="invalid_request_error"),
        CONFIGURATION,
    ),
    (422, error("no", type="budget_exceeded"), CONFIGURATION),
    (403, error("Your account has been deactivated"), CONFIGURATION),
    (500, error("AuthenticationError: the api key is invalid"), CONFIGURATION),
    (400, error("API version not supported"), CONFIGURATION),
    (
        400,
        error("ExpiredTokenException: The security token included in the request is expired"),
        CONFIGURATION,
    ),
    # No rule
    (400, error("no such luck", code="x"), UNKNOWN),
    (400, b"", UNKNOWN),
    (422, error("computer says no"), UNKNOWN),
    (403, error("forbidden"), UNKNOWN),
    (418, b"", UNKNOWN),
    # An error object in a 200
    (200, error("Internal", code=500), TRANSIENT),
    (200, error("slow down", type="rate_limit_error"), CAPACITY),
    (200, error("no", code="insufficient_quota"), CONFIGURATION),
    (200, error("bad picture", code=400, type="invalid_request_error"), JOB),
    (200, error("Provider returned error"), TRANSIENT),
    # A gateway's 500 for another status
    (500, error("nope", code=429), CAPACITY),
    (502, error("nope", code="401"), CONFIGURATION),
]


@pytest.mark.parametrize(("status", "body", "category"), GENERIC)
def test_an_answer_of_any_api_is_understood(status: int, body: Any, category: Category) -> None:
    assert found(status, body).category is category


@pytest.mark.parametrize(
    ("status", "overloaded"), [(429, False), (503, True), (529, True), (498, True), (500, True), (403, False)]
)
def test_an_overloaded_api_is_distinguished_from_a_limited_account(status: int, overloaded: bool) -> None:
    answer = found(status, error("too many requests"))
    assert answer.category is CAPACITY
    assert answer.is_overloaded is overloaded


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (400, "http_4xx"), (403, "http_403"), (408, "http_408"), (409, "http_409"), (421, "http_4xx"),
        (500, "http_500"), (502, "http_5xx"), (200, "http_500"),
    ],
)  # fmt: skip
def test_the_reason_is_from_a_closed_set(status: int, reason: str) -> None:
    assert found(status, error("no")).reason == reason


# The words of the job, which the API quotes, do not decide.
QUOTING: list[tuple[int, str, Category]] = [
    (400, "Invalid role: 'rate limit'", JOB),
    (400, "Unsupported value: 'is the backup server busy?'", JOB),
    (400, 'Unsupported value: "what is a spending limit exceeded notice?"', JOB),
    (400, "Unsupported value: is the backup server busy?", JOB),
    (400, "Invalid message \u201cmy api key has expired\u201d", JOB),
    (400, "Invalid content: `too many requests`", JOB),
    (400, "Invalid value: 'what's the overloaded truck\u2026", JOB),
    (403, "Your input 'is this truck overloaded?' was flagged by moderation", JOB),
    (403, f"{MODEL} requires moderation on OpenAI. Your input was flagged for violence.", JOB),
    (400, "Your prompt was flagged. Repeated violations may get your account suspended.", JOB),
    (403, "Your account has been suspended for violating our usage policies", CONFIGURATION),
    (403, "Your account was flagged and has been deactivated", CONFIGURATION),
    (400, "Could not download image: 403: access token expired", JOB),
    (422, "Failed to fetch the picture at the url: invalid credentials", JOB),
    (400, "Image usage limit exceeded: 10 images", JOB),
    (400, "You exceeded the maximum image budget of 20 tiles", JOB),
    (400, "You can send at most 5 images in a request on your current plan. Upgrade your plan.", JOB),
    (400, "Usage limit exceeded: upgrade your plan", CONFIGURATION),
    # Messages of other APIs, names of fields and of the model are not the job's words.
    (400, "Error code: 400 - {'error': {'message': 'The model is overloaded', 'param': None}}", CAPACITY),
    (400, "BadRequestError: [{'msg': 'too many requests'}]", CAPACITY),
    (400, "the users' requests can't be served: server overloaded", CAPACITY),
    (404, f"'{MODEL}' was not found", ONE_MODEL),
    (400, "The model 'somebody/elses-large-model' is not supported", ONE_MODEL),
    (400, "'response_format' is not supported with this model", MODEL_JOB),
    (400, "unknown variant `image_url`, expected `text`", ONE_MODEL),
]


@pytest.mark.parametrize(("status", "message", "category"), QUOTING)
def test_the_words_of_the_job_do_not_decide(status: int, message: str, category: Category) -> None:
    assert found(status, error(message)).category is category
    assert found(status, error(message), "litellm").category is category


# Whether a job alone is to blame.
BLAME: list[tuple[int, Any, bool]] = [
    (400, error("This model's maximum context length is 8192 tokens.", type="invalid_request_error"), False),
    (400, error("no", code="content_filter"), False),
    (400, error("Invalid image", type="invalid_request_error"), False),
    (400, error("max_tokens is too large", type="invalid_request_error"), False),
    (400, error("temperature must be less than 2", type="invalid_request_error"), False),
    (500, error("cannot identify image file"), False),
    (400, error("Could not process image", type="invalid_request_error"), False),
    (400, error("Unable to process input image. Please retry or report."), False),
    (400, error("Image exceeds 5 MB maximum", type="invalid_request_error"), False),
    (400, error("Too many images: 20 > 16", type="invalid_request_error"), False),
    (400, error("no", type="invalid_request_error"), True),
    (400, error("no such luck"), True),
    (400, error("Daily image limit exceeded", type="invalid_request_error"), True),
    (400, error("The requests must use zero data retention", type="invalid_request_error"), True),
    (400, error("The project you are requesting is odd", type="invalid_request_error"), True),
    (400, error("Tenant content type not enabled"), True),
    (400, error("Missing required parameter: 'x-version'", code="missing_required_parameter"), True),
    (422, {"detail": [{"loc": ["header", "x-tenant-id"], "msg": "Field required", "type": "missing"}]}, True),
    (413, b"<html><head><title>413 Request Entity Too Large</title></head></html>", True),
    (500, error("could not load the image"), True),
]


@pytest.mark.parametrize(("status", "body", "likely"), BLAME)
def test_a_rejection_in_general_words_can_concern_all_jobs(status: int, body: Any, likely: bool) -> None:
    answer = found(status, body)
    assert answer.category in (JOB, UNKNOWN)
    assert answer.is_likely is likely


NOT_THE_JOBS: list[tuple[int, str, Category]] = [
    (400, "Your organization must be verified to use the model", CONFIGURATION),
    (400, "The project you are requesting has been archived", CONFIGURATION),
    (400, "Invocation of model ID a.b with on-demand throughput isn't supported", ONE_MODEL),
    (400, "The model is offline", ONE_MODEL),
    (400, "missing required parameter: api-version", CONFIGURATION),
    (500, "cannot load image: [Errno 28] No space left on device", TRANSIENT),
    (500, "could not load image processor for model", TRANSIENT),
    (502, "failed to load image from cache backend", TRANSIENT),
]


@pytest.mark.parametrize(("status", "message", "category"), NOT_THE_JOBS)
def test_what_is_wrong_for_all_jobs_is_no_job_s(status: int, message: str, category: Category) -> None:
    assert found(status, error(message, type="invalid_request_error")).category is category


@pytest.mark.parametrize(
    ("status", "message", "isolated"),
    [
        (400, "Timeout while downloading https://a.example/b", True),
        (400, "Download the media resource timed out during the data inspection process.", True),
        (422, "The image url could not be fetched within 10 seconds (timeout)", True),
        (400, "Failed to load image from url: connect timeout", True),
        (400, "Could not download file: timeout", False),
        (504, "upstream timed out accessing http://vllm:8000", False),
        (502, "error fetching response from backend: timeout", False),
        (503, "Could not fetch worker: dial tcp i/o timeout", False),
        (500, "litellm.Timeout: the request timed out loading https://vllm.example/v1/images", False),
        (408, "timed out while fetching the image", False),
    ],
)
def test_only_links_of_the_job_are_its_own(status: int, message: str, isolated: bool) -> None:
    answer = found(status, error(message))
    assert answer.category is (CAPACITY if status == 503 else TRANSIENT)
    assert answer.isolated is isolated


# The API's own words


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (error("too long", type="t"), "too long"),
        ({"error": "too long"}, "too long"),
        ({"detail": "too long"}, "too long"),
        ({"detail": {"error": "too long"}}, "too long"),
        ({"errors": [{"message": "too long"}]}, "too long"),
        ([error("too long")], "too long"),
        (["too long"], "too long"),
        ({"detail": [{"loc": ["body", "top_p"], "msg": "too long", "input": "a secret"}]}, "top_p: too long"),
        (error("Provider returned error", metadata={"raw": '{"error": {"message": "too long"}}'}),
         "Provider returned error; too long"),
        (error("Provider returned error", metadata={"raw": "too long"}), "Provider returned error; too long"),
        (error("litellm.BadRequestError: x - b'{\\n \"error\": {\"message\": \"too long\"}}'"),
         "litellm.BadRequestError: x; too long"),
        (b"too long", "too long"),
        (b'"too long"', "too long"),
        (b'\xef\xbb\xbf{"error": "too long"}', "too long"),
        (b'data: {"error": "too long"}\n\n', "too long"),
        (b': comment\nevent: error\ndata: {"error": "too long"}\n\ndata: [DONE]\n\n', "too long"),
        (b"<!DOCTYPE html><html><title>502 Bad\n Gateway &amp; more</title><body>x</body></html>",
         "502 Bad Gateway & more (an HTML page)"),
        (b"<html><body><h1>Busy</h1>markup</body></html>", "Busy (an HTML page)"),
        (b"<html><script>x</script><body>some <b>markup</b></body></html>", "some markup (an HTML page)"),
        (b"<html></html>", "(an HTML page)"),
        (b"", "Bad Request"),
        (b"null", "Bad Request"),
        (b"5", "5"),
        ({"error": {"code": 5}}, '{"error": {"code": 5}}'),
        (b"\xff\xfe", "\ufffd\ufffd"),
    ],
)  # fmt: skip
def test_the_api_s_sentence_is_found_in_every_form(body: Any, said: str) -> None:
    assert found(400, body).said == said


def test_base64_is_not_among_the_words() -> None:
    data = base64.b64encode(random.Random(1).randbytes(900)).decode()  # noqa: S311 - not a secret
    assert found(400, error(f"bad: {data} end")).said == "bad: [1200 characters] end"
    assert found(400, error(f"url data:image/png;base64,{data} end")).said.endswith(
        "base64,[1200 characters] end"
    )


def test_the_quoted_request_is_not_among_the_words() -> None:
    quoted = (
        "1 validation error: [{'loc': ('body',), 'msg': 'Field required', 'input': {'content': 'secret'}}]"
    )
    answer = found(400, error(quoted))
    assert "secret" not in answer.said
    assert answer.category is JOB


# When to try again


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7.0),
        ({"Retry-After": "-7"}, 0.0),
        ({"Retry-After": "86400"}, MAX_RETRY_AFTER_S),
        ({"Retry-After": "nan"}, None),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "7 seconds"}, 7.0),
        ({"Retry-After": "Sun, 17 Mar 2030 17:47:00 GMT"}, 20.0),
        ({"Retry-After": "2030-03-17T17:47:00Z"}, 20.0),
        ({"retry-after-ms": "1500", "Retry-After": "7"}, 1.5),
        ({"x-ms-retry-after-ms": "1500"}, 1.5),
        ({"x-ratelimit-reset-requests": "1s"}, 1.0),
        ({"x-ratelimit-reset-tokens": "6m0s"}, 360.0),
        ({"x-ratelimit-reset-tokens": "88ms"}, 0.088),
        ({"x-ratelimit-reset-requests": "2m59.56s"}, 179.56),
        ({"x-ratelimit-reset": "1900000030"}, 30.0),
        ({"x-ratelimit-reset": "1900000030000"}, 30.0),
        ({"x-ratelimit-reset": "1800000000"}, 0.0),
        ({"anthropic-ratelimit-requests-reset": "2030-03-17T17:47:10Z"}, 30.0),
        ({"RateLimit": "limit=10, remaining=0, reset=5"}, 5.0),
        ({"RateLimit": '"default";r=0;t=5'}, 5.0),
        ({"RateLimit": '"default";r=3;t=5'}, None),
        ({"RateLimit-Reset": "5"}, 5.0),
        ({"RateLimit-Limit": "5000", "RateLimit-Remaining": "0", "RateLimit-Reset": "3"}, 3.0),
        ({"RateLimit-Limit": "5000", "RateLimit-Remaining": "7", "RateLimit-Reset": "3"}, None),
        ({"RateLimit-Limit": "5000", "RateLimit-Remaining": "0", "RateLimit-Policy": "5000;w=3600"}, None),
        # The limit that is used up counts; of several, the longest.
        ({"x-ratelimit-reset-requests": "1s", "x-ratelimit-remaining-requests": "0",
          "x-ratelimit-reset-tokens": "6m0s", "x-ratelimit-remaining-tokens": "90"}, 1.0),
        ({"x-ratelimit-reset-requests": "1s", "x-ratelimit-reset-tokens": "6s"}, 6.0),
        ({"Retry-After": "3", "x-ratelimit-reset-tokens": "6m0s"}, 3.0),
        ({}, None),
    ],
)  # fmt: skip
def test_headers_say_when_to_try_again(headers: dict[str, str], seconds: float | None) -> None:
    hint = found(429, b"", headers=headers).retry_after_s
    assert hint == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize(
    ("body", "seconds"),
    [
        (gemini(429, "Quota", "RESOURCE_EXHAUSTED", {"@type": "RetryInfo", "retryDelay": "27s"}), 27.0),
        (gemini(429, "Quota", "RESOURCE_EXHAUSTED", {"@type": "RetryInfo", "retryDelay": "27.5s"}), 27.5),
        (error("slow down", retry_after=9), 9.0),
        (error("slow down", retry_after_ms=900), 0.9),
        (error("slow", metadata={"headers": {"X-RateLimit-Reset": "1900000060000"}}), 60.0),
        ({"error": "Model m is currently loading", "estimated_time": 20.5}, 20.5),
        (error("Please try again in 7.66s."), 7.66),
        (error("Please try again in 1m26.4s. Visit x."), 86.4),
        (error("Please retry after 6 seconds."), 6.0),
        (error("Retry in 2 minutes and 3 seconds"), 123.0),
        (error("Try again in 120ms"), 0.12),
        (error("Try again later"), None),
    ],
)
def test_the_body_says_when_to_try_again(body: Any, seconds: float | None) -> None:
    hint = found(429, body).retry_after_s
    assert hint == (None if seconds is None else pytest.approx(seconds))


def test_a_503_has_a_hint_as_a_429_has() -> None:
    assert found(503, b"", headers={"Retry-After": "4"}).retry_after_s == 4.0


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.sampled_from(["error", "code", "message", "x"]), inner)
    ),
)


@given(status=st.integers(200, 999), body=st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_answer_has_a_category_and_words(status: int, body: bytes) -> None:
    answer = found(status, body)
    assert answer.said
    assert answer.retry_after_s is None or 0 <= answer.retry_after_s <= MAX_RETRY_AFTER_S


@given(
    value=st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40),
    name=st.sampled_from(["retry-after", "retry-after-ms", "x-ratelimit-reset-tokens", "ratelimit"]),
)
def test_any_header_is_a_hint_or_none(value: str, name: str) -> None:
    hint = found(429, b"", headers={name: value}).retry_after_s
    assert hint is None or 0 <= hint <= MAX_RETRY_AFTER_S


@pytest.mark.parametrize("provider", provider_names())
def test_a_huge_answer_is_read_quickly_and_bounded(provider: str) -> None:
    for text in ("a" * 5_000_000, "model " * 100_000, '{"error": ' * 100_000, "not image " * 100_000):
        assert len(found(400, text.encode(), provider).said) <= 4000


# One classification runs in the event loop; all other requests wait for it.
MAX_CPU_S = 0.05


def _literals(pattern: str) -> set[str]:
    """Return the words of a pattern."""
    return set(re.findall(r"[a-z]{3,}", re.sub(r"\\[a-zA-Z]", " ", pattern)))


def is_quick(status: int, body: bytes, provider: str, limit_s: float = MAX_CPU_S) -> bool:
    return is_within(limit_s, lambda: found(status, body, provider))


@pytest.mark.parametrize("provider", provider_names())
def test_repeated_words_of_a_pattern_are_classified_quickly(provider: str) -> None:
    common = () if provider == GENERIC_NAME else load_profile(GENERIC_NAME).rules
    own = [rule for rule in load_profile(provider).rules if rule not in common]
    words = {word for rule in own for pattern in rule.words for word in _literals(pattern)}
    slow = [
        (status, text[:20])
        for word in sorted(words)
        for status, separator in ((400, ""), (429, " "), (500, " "))
        for text in (f"{word}{separator}" * (3900 // len(word)),)
        if not is_quick(status, json.dumps(error(f"Invalid: {text}")).encode(), provider)
    ]
    assert not slow


@pytest.mark.parametrize(
    "text",
    [
        "<title>",
        "<h1 ",
        "<script>",
        "<",
        "<html",
        "{",
        '"',
        "'",
        "1s",
        "9",
        " 'a",
        "again ",
        "base64,",
        "\n",
        "a" * 499 + " ",
    ],
)
def test_a_repeated_text_is_read_quickly(text: str) -> None:
    for body in (
        f"<html>{text}" + text * (900_000 // len(text)),
        json.dumps(error(text * (190_000 // len(text)))),
    ):
        assert is_quick(500, body.encode(), "generic", 10 * MAX_CPU_S)
