"""Error answers as providers send them: whose fault they are, alone and among good jobs."""

import asyncio
import json
import re
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from deploy.local.model_simulator.behavior import Error
from deploy.local.stack import Stack
from tests.breaking import PICTURE, calls_begun, events, hasty, job, publish, results, said, statuses
from tests.conftest import BUCKET
from tests.running import Client, Worker, calls_with

GOOD = 20


def error(status: int, message: str, **fields: Any) -> Error:
    body = {"error": {"message": message, "type": None, "code": None, **fields}}
    return Error(status=status, body=json.dumps(body))


@pytest.fixture(scope="module")
async def worker(own_stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Worker]:
    own_stack.model.reset()
    folder = tmp_path_factory.mktemp("answers")
    worker = hasty(Worker.of(own_stack, folder, VQA_MAX_ATTEMPTS="3", VQA_RETRY_DELAYS="1"))
    try:
        await worker.start()
        yield worker
        assert await worker.stop() == 0, worker.output()
    finally:
        worker.kill()


@pytest.fixture
async def client(own_stack: Stack, worker: Worker) -> AsyncIterator[Client]:
    async with Client.of(own_stack, worker) as client:
        yield client
    own_stack.model.configure(rules=[])


OF_THE_JOB = pytest.mark.parametrize(
    ("answer", "says"),
    [
        (error(403, "Your input was flagged", code=403), "the API answered 403: Your input was flagged"),
        (error(500, "cannot identify image file"), "the API answered 500: cannot identify image file"),
        (error(400, "Request payload size exceeds the limit"), "the API answered 400: Request payload size"),
        (
            Error(status=400, body='[{"error": {"code": 400, "message": "Provided image is not valid."}}]'),
            "the API answered 400: Provided image is not valid.",
        ),
        (
            Error(status=422, body='{"detail": [{"loc": ["body", "top_p"], "msg": "is too large"}]}'),
            "the API answered 422: top_p: is too large",
        ),
        (
            Error(status=413, body="<html><head><title>413 Too Large</title></head><body><hr></body></html>"),
            "the API answered 413: 413 Too Large (an HTML page)",
        ),
    ],
    ids=range(6),
)  # fmt: skip


@OF_THE_JOB
async def test_a_job_that_the_api_refuses_fails_at_once(
    own_stack: Stack, client: Client, answer: Error, says: str
) -> None:
    marker = uuid.uuid4().hex
    own_stack.model.play(answer, marker=marker, times=None)
    reply = await client.ask(**job(marker))
    assert reply.body["error"]["code"] == "model_rejected"
    assert reply.body["error"]["message"].startswith(says)
    assert reply.body["attempts"] == 1
    assert len(calls_with(own_stack, marker)) == 1


async def test_refused_jobs_among_good_jobs_stop_nobody(own_stack: Stack, client: Client) -> None:
    bad, good = uuid.uuid4().hex, uuid.uuid4().hex
    own_stack.model.play(error(500, "Failed to decode image"), marker=bad, times=None)
    refused, fine = await asyncio.gather(publish(client, 10, bad), publish(client, GOOD, good))
    assert statuses(await results(client, fine)) == {"succeeded": GOOD}
    assert statuses(await results(client, refused)) == {"model_rejected": 10}
    assert len(calls_with(own_stack, bad)) == 10


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (error(401, "No auth credentials found", code=401), "attempts_exhausted"),
        (error(402, "You can only afford 1432 tokens", code=402), "model_rejected"),
        (error(404, "No endpoints found that support image input", code=404), "model_rejected"),
        (error(400, "Zwrzl grmpf"), "model_rejected"),
    ],
    ids=range(4),
)
async def test_what_a_router_refuses_for_a_few_jobs_pauses_nobody(
    own_stack: Stack, worker: Worker, client: Client, answer: Error, code: str
) -> None:
    bad, good = uuid.uuid4().hex, uuid.uuid4().hex
    pauses = len(events(worker, "consumption_paused"))
    await results(client, await publish(client, 3, good))
    own_stack.model.play(answer, marker=bad, times=None)
    refused = await publish(client, 2, bad)
    while not all(client.replies.get(it) for it in refused):
        assert statuses(await results(client, await publish(client, 5, good))) == {"succeeded": 5}
    assert statuses(await results(client, refused)) == {code: 2}
    assert len(events(worker, "consumption_paused")) == pauses


async def test_links_that_the_api_cannot_download_in_time_are_tried_again_and_pause_nobody(
    own_stack: Stack, worker: Worker, client: Client
) -> None:
    slow, late = uuid.uuid4().hex, uuid.uuid4().hex
    pauses = len(events(worker, "consumption_paused"))
    timeout = error(400, "Timeout while downloading https://slow.example/1.png", code="invalid_image_url")
    own_stack.model.play(timeout, marker=late)
    own_stack.model.play(timeout, marker=slow, times=None)
    once = await client.ask(**job(late, "https://slow.example/1.png"))
    assert (once.body["status"], once.body["attempts"]) == ("succeeded", 2)
    ids = await publish(client, 8, slow, image="https://slow.example/1.png")
    assert statuses(await results(client, ids)) == {"attempts_exhausted": 8}
    assert len(events(worker, "consumption_paused")) == pauses


@pytest.mark.parametrize(
    "answer",
    [
        Error(status=503, headers={"Retry-After": "1"}),
        Error(status=529),
        Error(status=498),
        error(503, "Loading model", type="unavailable_error"),
        Error(status=429, body='[{"error": {"code": 429, "details": [{"retryDelay": "0.2s"}]}}]'),
        Error(status=429, headers={"x-ratelimit-reset-requests": "100ms"}),
        error(429, "Rate limit reached. Please try again in 0.3s."),
    ],
    ids=range(7),
)
async def test_an_answer_without_capacity_costs_no_attempt(
    own_stack: Stack, client: Client, answer: Error
) -> None:
    marker = uuid.uuid4().hex
    own_stack.model.play(answer, marker=marker, times=2)
    reply = await client.ask(**job(marker))
    assert (reply.body["status"], reply.body["attempts"]) == ("succeeded", 1)
    assert len(calls_with(own_stack, marker)) == 3


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (
            error(400, "API key expired. Please renew the API key.", type="INVALID_ARGUMENT"),
            r'the API answered 400: check the key in VQA_MODEL_API_KEY \("API key expired',
        ),
        (error(400, "make sure your account is in good standing", code="Arrearage"), "check the account"),
        (error(400, "Budget has been exceeded!", type="budget_exceeded"), "budget is used up"),
        (error(429, "You exceeded", type="insufficient_quota"), "quota or credit is used up.*You exceeded"),
        (Error(status=405, body="<html><title>Not here</title></html>"), "VQA_MODEL_BASE_URL.*Not here"),
        (Error(status=411, body=""), "VQA_MODEL_BASE_URL"),
    ],
    ids=range(6),
)  # fmt: skip
async def test_a_wrong_configuration_pauses_and_names_the_setting_and_the_api_s_words(
    own_stack: Stack, worker: Worker, client: Client, answer: Error, says: str
) -> None:
    marker = uuid.uuid4().hex
    own_stack.model.play(answer, marker=marker, times=None)
    ids = await publish(client, 6, marker)
    _, (reason,) = await said(worker, "paused")
    assert re.search(says, reason), reason
    await calls_begun(own_stack, marker, 1)
    own_stack.model.configure(rules=[])
    replies = await results(client, ids)
    assert {(it.body["status"], it.body["attempts"]) for it in replies} == {("succeeded", 1)}
    await said(worker, "ready")


@pytest.mark.parametrize(
    ("broken", "code"),
    [
        (f"s3://{BUCKET}/none.png", "image_not_found"),
        ("data:image/png;base64,bm8gcGljdHVyZQ==", "image_unsupported_type"),
        ("data:image/png;base64,bm8gcGljdHVyZQ=!", "image_corrupt"),
    ],
)
async def test_the_broken_one_of_many_images_is_named(client: Client, broken: str, code: str) -> None:
    images = [PICTURE] * 12
    images[5] = broken
    reply = await client.ask(**{**job(), "images": images})
    assert reply.body["error"]["code"] == code
    assert reply.body["error"]["message"].startswith("images[5] (")


async def test_the_limit_of_tokens_and_the_rules_follow_the_profile(
    own_stack: Stack, start_own_worker: Any, own_client_of: Any, tmp_path: Path
) -> None:
    profile = tmp_path / "profile.toml"
    profile.write_text(
        '[request]\ntoken_limit = "max_completion_tokens"\n'
        '[[rules]]\nstatus = [418]\nwords = ["not my cup"]\ncategory = "job"\n'
    )
    worker = await start_own_worker(VQA_PROVIDER_PROFILE=str(profile), VQA_PROVIDER="vllm")
    client = await own_client_of(worker)
    marker = uuid.uuid4().hex
    own_stack.model.play(error(418, "This is not my cup of tea"), marker=marker)
    refused = await client.ask(**job(marker))
    assert refused.body["error"]["code"] == "model_rejected"
    assert (await client.ask(**job("?", params={"max_tokens": 1}))).body["finish_reason"] == "length"
