"""The model request of a job, and its key in the result store."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from tests.unit.fakes import a_delivery
from vqa_worker.messages.conversation import ImageRef
from worker.images.source import ImageSource, SourcePolicy, parse_source
from worker.jobs.attempt import Attempt
from worker.jobs.request import Request, RequestRules, check_job, read_job
from worker.model.request import with_token_bounds, with_token_limit

RULES = RequestRules("m", {"m"}, 1_000_000, 3, send_image_detail=False, stores_results=True)
ANYWHERE = SourcePolicy(["*"], ["*"])
LARGE = "data:image/png;base64," + base64.b64encode(b"a" * 10_000).decode()
OTHER = "data:image/png;base64," + base64.b64encode(b"b" * 10_000).decode()
SMALL = "data:image/png;base64,QUJD"


def check(refs: Sequence[ImageRef], body: bytes) -> list[ImageSource]:
    return [ImageSource(ref.location, parse_source(ref.url, "it", ANYWHERE, body)) for ref in refs]


def request_of(
    job: Mapping[str, object], *, indent: int | None = None, rules: RequestRules = RULES
) -> Request:
    delivery = a_delivery(json.dumps(job, indent=indent).encode())
    attempt = Attempt.from_delivery(delivery)
    return check_job(read_job(delivery, attempt, rules), delivery, attempt, rules, check)


def key(job: Mapping[str, object], *, indent: int | None = None) -> str:
    return request_of(job, indent=indent).store_key


@pytest.mark.parametrize(
    ("tier", "falls_back", "has_fallback"),
    [("flex", True, True), ("flex", False, False), ("priority", True, False), (None, True, False)],
)
def test_a_job_in_the_tier_flex_has_a_fallback_if_configured(
    tier: str | None, *, falls_back: bool, has_fallback: bool
) -> None:
    params: dict[str, object] = {"seed": 1} if tier is None else {"seed": 1, "service_tier": tier}
    job = {"id": "a", "question": "x", "images": ["s3://b/k"], "params": params}
    request = request_of(job, rules=replace(RULES, flex_fallback=falls_back))
    assert request.service_tier == tier
    assert (request.fallback is not None) is has_fallback
    if request.fallback is not None:
        body, fallback = (b"u".join(it.body_parts) for it in (request, request.fallback))
        assert json.loads(body) == {**json.loads(fallback), "service_tier": "flex"}
        assert request.fallback.service_tier is None
        assert request.fallback.store_key == request.store_key


@pytest.mark.parametrize("streams", [True, False])
def test_a_stream_is_requested_only_from_a_model_that_answers_in_no_other_way(*, streams: bool) -> None:
    rules = replace(RULES, flex_fallback=True, stream_only_models={"m"} if streams else set())
    params = {"service_tier": "flex", "seed": 1}
    request = request_of({"id": "a", "question": "x", "images": ["s3://b/k"], "params": params}, rules=rules)
    assert request.fallback is not None
    for it in (request, request.fallback):
        body = json.loads(b"u".join(it.body_parts))
        assert (body["stream"], body["seed"]) == (streams, 1)
        assert body.get("stream_options") == ({"include_usage": True} if streams else None)


def test_a_service_tier_that_is_not_text_is_passed_on_only() -> None:
    job = {"id": "a", "question": "x", "images": ["s3://b/k"], "params": {"service_tier": ["flex"]}}
    assert request_of(job).service_tier is None


@pytest.mark.parametrize(
    ("name", "params", "sent"),
    [
        ("max_completion_tokens", {"seed": 1, "max_tokens": 5}, {"seed": 1, "max_completion_tokens": 5}),
        ("max_tokens", {"max_completion_tokens": 5}, {"max_tokens": 5}),
        ("max_tokens", {"max_tokens": 5}, {"max_tokens": 5}),
        ("max_tokens", {"max_tokens": 5, "max_completion_tokens": 6},
         {"max_tokens": 5, "max_completion_tokens": 6}),
        ("as given", {"max_completion_tokens": 5}, {"max_completion_tokens": 5}),
    ],
)  # fmt: skip
def test_the_token_limit_has_the_name_that_the_api_takes(
    name: str, params: Mapping[str, object], sent: Mapping[str, object]
) -> None:
    assert with_token_limit(params, name) == sent


@pytest.mark.parametrize(
    ("params", "default", "limit", "sent"),
    [
        ({}, None, None, {}),
        ({}, 100, None, {"max_tokens": 100}),
        ({}, None, 50, {"max_tokens": 50}),
        ({}, 100, 50, {"max_tokens": 50}),
        ({"max_tokens": None}, 100, None, {"max_tokens": 100}),
        ({"max_tokens": 9}, 100, 50, {"max_tokens": 9}),
        ({"max_tokens": 900}, 100, 50, {"max_tokens": 50}),
        ({"max_completion_tokens": 900}, 100, 50, {"max_completion_tokens": 50}),
        ({"max_completion_tokens": 900}, 100, None, {"max_completion_tokens": 900}),
        # The API says what is wrong with it.
        ({"max_tokens": "many"}, 100, 50, {"max_tokens": "many"}),
    ],
)
def test_the_token_limit_has_a_default_and_a_ceiling(
    params: dict[str, Any], default: int | None, limit: int | None, sent: dict[str, Any]
) -> None:
    others = {"temperature": 0.5}
    assert with_token_bounds({**others, **params}, default=default, limit=limit) == {**others, **sent}


@pytest.mark.parametrize("image", [LARGE, SMALL, "s3://b/k"])
def test_the_key_depends_neither_on_the_order_of_fields_nor_on_white_space(image: str) -> None:
    job = {"id": "a", "question": "x", "images": [image], "params": {"seed": 1, "top_p": 0.5}}
    reordered = {"params": {"top_p": 0.5, "seed": 1}, "images": [image], "question": "x", "id": "a"}
    assert key(job) == key(reordered, indent=4)


def test_the_key_depends_on_everything_in_the_model_request() -> None:
    job = {"id": "a", "question": "x", "images": [LARGE, "s3://b/k"]}
    changes: list[dict[str, object]] = [
        {},
        {"id": "b"},
        {"question": "y"},
        {"images": [OTHER, "s3://b/k"]},
        {"images": ["s3://b/k", LARGE]},
        {"images": [SMALL, "s3://b/k"]},
        {"images": [LARGE, "s3://b/other"]},
        {"images": [LARGE, {"url": "s3://b/k", "version_id": "1"}]},
        {"images": [LARGE, {"url": "s3://b/k", "version_id": "2"}]},
        {"params": {"seed": 1}},
        {"prompt_order": "question_first"},
    ]
    assert len({key({**job, **change}) for change in changes}) == len(changes)
