"""Check each error code: its cause, the result that reports it, and whether the model was called."""

import base64
import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import aio_pika
import pytest
from aio_pika.abc import AbstractIncomingMessage

from deploy.local.model_simulator.behavior import Answer, Error, Hang, Malformed, Outcome, Reset
from deploy.local.stack import Stack
from tests.conftest import BUCKET, PutImage, picture
from tests.running import Client, Reply, Worker, calls_with, until

MAX_IMAGE_BYTES = 3000
MAX_IMAGES = 3
MAX_JOB_BYTES = 40_000

PRESIGNED = (
    "https://bucket.s3.amazonaws.com/private.png?X-Amz-Algorithm=AWS4-HMAC-SHA256"
    "&X-Amz-Credential=AKIAIOSFODNN7EXAMPLE%2F20300101&X-Amz-Signature=5ec7e7&X-Amz-Expires=60"
)


@dataclass(frozen=True)
class Strict:
    """A worker with low limits: the second attempt is the last, and starts after one minute."""

    worker: Worker
    client: Client
    dead_letters: list[AbstractIncomingMessage]

    async def fail(self, code: str, *, retryable: bool = False, **job: Any) -> dict[str, Any]:
        """Return the result of a job that fails with this code."""
        reply = await self.client.ask(**job)
        return _failure(reply, code, retryable=retryable)

    async def dead_letter_of(self, job_id: str) -> AbstractIncomingMessage:
        """Return the dead letter of a job."""
        found: list[AbstractIncomingMessage] = await until(
            lambda: [it for it in self.dead_letters if job_id.encode() in it.body],
            f"the dead letter of {job_id}",
        )
        return found[0]


@pytest.fixture(scope="module")
async def strict(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Strict]:
    async with (
        Worker.running(
            stack,
            tmp_path_factory.mktemp("strict"),
            VQA_ALLOWED_BUCKETS="test-*",
            VQA_ALLOWED_LINK_HOSTS="*.Example.com,images.example.org",
            VQA_MAX_IMAGES_PER_JOB=str(MAX_IMAGES),
            VQA_MAX_IMAGE_BYTES=str(MAX_IMAGE_BYTES),
            VQA_MAX_JOB_BYTES=str(MAX_JOB_BYTES),
            VQA_IMAGE_CONVERT="never",
            VQA_MAX_ATTEMPTS="2",
            VQA_RETRY_DELAYS="60",
            VQA_MODEL_TIMEOUT="3",
        ) as worker,
        Client.of(stack, worker) as client,
        client.reading(worker.dead_letter_queue) as dead_letters,
    ):
        yield Strict(worker, client, dead_letters)


def _failure(reply: Reply, code: str, *, retryable: bool = False) -> dict[str, Any]:
    """Check the fields that all failed results share; return the body."""
    body = reply.body
    assert body["status"] == "failed"
    assert body["answer"] is None
    assert body["error"]["code"] == code, body["error"]
    assert body["error"]["retryable"] is retryable
    assert set(body["error"]) == {"code", "message", "retryable"}
    return body


# invalid_job (test_unreadable_messages.py covers bodies that are not JSON)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"model": "somebody/else"}, "model: "),
        ({"model": ""}, "model: "),
        ({"model": 7}, "model: "),
        ({"question": " \n"}, "question: "),
        ({"question": None}, "question and images"),
        ({"images": []}, "images: "),
        ({"images": None}, "question and images"),
        ({"images": [7]}, "images.0"),
        ({"images": [{"url": "s3://a/b", "type": "png"}]}, "images.0"),
        ({"images": [{}]}, "images.0"),
        ({"images": "s3://a/b"}, "images: "),
        ({"messages": [{"role": "user", "content": "?"}]}, "question belongs to the short form"),
        ({"params": {"model": "x"}}, "params: must not contain model"),
        (
            {"params": {"stream": False, "n": 1, "messages": []}},
            "params: must not contain messages, n, stream",
        ),
        ({"params": []}, "params: "),
        ({"deadline": "tomorrow"}, "deadline: must be an RFC 3339 time"),
        ({"deadline": "2030-01-31T12:00:00"}, "deadline: must be an RFC 3339 time"),
        ({"deadline": "2030-02-31T12:00:00Z"}, "deadline: is not a valid time"),
        ({"deadline": 1893456000}, "deadline: must be an RFC 3339 time"),
        ({"metadata": {"x": "y" * 16384}}, "metadata: must be at most 16384 bytes"),
        ({"metadata": ["x"]}, "metadata: "),
        ({"system": ["x"]}, "system: "),
        ({"Question": "?"}, "Question: unknown field"),
        ({"images": ["s3://test-images"]}, "images[0] (s3://test-images): must be s3://bucket/key"),
        ({"images": ["s3:///key"]}, "images[0] (s3:///key): must be s3://bucket/key"),
        (
            {"images": ["s3://test-images/a\nb"]},
            r"images[0] (s3://test-images/a\nb): the object key contains control",
        ),
        ({"images": ["s3://test-images/\x7f"]}, "control characters"),
        ({"images": ["s3://test-images/\x85"]}, "control characters"),
        ({"images": ["s3://test-images/" + "é" * 513]}, "the object key is longer than 1024 bytes"),
        (
            {"images": ["https://a b.example.com/"]},
            "images[0] (https://a b.example.com/): must be a valid https:// URL",
        ),
        ({"images": ["https:///x"]}, "must be a valid https:// URL"),
        ({"images": ["data:image/png,raw"]}, "images[0] (data: URL): a data: URL must have the form"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
async def test_invalid_job_names_the_field(
    strict: Strict, stack: Stack, fields: dict[str, Any], names: str
) -> None:
    question = uuid.uuid4().hex
    job = {"question": question, "images": ["data:image/png;base64,"], **fields}
    body = await strict.fail("invalid_job", **job)

    assert names in body["error"]["message"]
    assert body["attempts"] == 1
    assert body["usage"] is None
    assert calls_with(stack, question) == []


@pytest.mark.parametrize(
    ("messages", "names"),
    [
        ([], "messages: "),
        ([{"content": "?"}], "messages.0.role"),
        ([{"role": "", "content": "?"}], "messages.0.role"),
        ([{"role": "user", "content": 7}], "messages.0.content"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages.0.content.0.text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "image_url.url"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "s3://a/b"}]}], "image_url"),
        ([{"role": "user", "content": [{"type": "video"}]}], "messages.0.content.0: type must be one of"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
async def test_invalid_job_names_the_position_in_the_long_form(
    strict: Strict, messages: list[Any], names: str
) -> None:
    body = await strict.fail("invalid_job", messages=messages)
    assert names in body["error"]["message"]


async def test_a_misspelt_field_is_reported_for_every_job(strict: Strict) -> None:
    body = await strict.fail("invalid_job", question="?", images=["x"], imagse=[], Params={}, meta=1)
    assert body["error"]["message"].count("unknown field") == 3


# Images


@pytest.mark.parametrize("url", [f"s3://{BUCKET}/no such?/key#.png", "s3://test-no-such-bucket/key.png"])
async def test_image_not_found(strict: Strict, stack: Stack, put_image: PutImage, url: str) -> None:
    question = uuid.uuid4().hex
    body = await strict.fail("image_not_found", question=question, images=[put_image(), url])

    assert body["error"]["message"].startswith(f"images[1] ({url}): S3 has no such object")
    assert body["timings"]["fetch_s"] > 0
    assert body["timings"]["model_s"] is None
    assert calls_with(stack, question) == []


@pytest.fixture(scope="module")
def forbidden_url(stack: Stack) -> str:
    """Return the URL of an object in a bucket whose policy denies all access."""
    s3, bucket = stack.s3.client(), "test-forbidden"
    s3.create_bucket(Bucket=bucket)
    s3.put_object(Bucket=bucket, Key="a b.png", Body=picture())
    statement = {
        "Effect": "Deny",
        "Principal": "*",
        "Action": "s3:GetObject",
        "Resource": f"arn:aws:s3:::{bucket}/*",
    }
    s3.put_bucket_policy(
        Bucket=bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    )
    return f"s3://{bucket}/a b.png"


async def test_image_forbidden(strict: Strict, stack: Stack, forbidden_url: str) -> None:
    url = forbidden_url
    question = uuid.uuid4().hex
    body = await strict.fail("image_forbidden", question=question, images=[url])

    assert body["error"]["message"].startswith(f"images[0] ({url}): ")
    assert "s3:GetObject" in body["error"]["message"]
    assert calls_with(stack, question) == []


@pytest.mark.parametrize(
    ("url", "says"),
    [
        (
            "s3://other/key.png",
            "images[1] (s3://other/key.png): bucket other is not in VQA_ALLOWED_BUCKETS",
        ),
        ("s3://Test-images/key.png", "bucket Test-images is not in"),
        (
            "https://user:secret-1@evil.example.net/x.png?sig=secret-2#secret-3",
            "images[1] (https://evil.example.net/x.png): host evil.example.net is not in VQA_ALLOWED_LINK",
        ),
        ("https://example.com/", "host example.com is not in"),
        ("https://a.example.com@evil.example/", "host evil.example is not in"),
        ("https://evil.example/a.example.com", "host evil.example is not in"),
        ("https://evil.example?a.example.com", "host evil.example is not in"),
        (
            "http://a.example.com/x",
            "x): must be an s3://bucket/key, https:// or data: URL",
        ),
        ("ftp://a.example.com/x", "must be an s3://"),
        ("file:///etc/passwd", "images[1] (file:///etc/passwd): must be an s3://"),
        ("gs://bucket/key", "must be an s3://"),
        ("iVBORw0KGgoAAAANSUhEUg", "images[1] (text of 22 characters): must be an s3://"),
        ("/etc/passwd", "must be an s3://"),
        ("", "must be an s3://"),
        (" https://a.example.com/", "must be an s3://"),
        ("//a.example.com/", "must be an s3://"),
        ("javascript:alert(1)", "must be an s3://"),
    ],
)
async def test_image_source_not_allowed(strict: Strict, stack: Stack, url: str, says: str) -> None:
    question = uuid.uuid4().hex
    images = ["https://fine.example.com/1.png", url]
    body = await strict.fail("image_source_not_allowed", question=question, images=images)

    assert says in body["error"]["message"]
    assert "secret" not in body["error"]["message"]
    assert calls_with(stack, question) == []


@pytest.mark.parametrize(
    "url",
    [
        "https://IMAGES.example.org./x.png",
        "https://deep.down.example.com:8443/x.png?a=b",
        "https://a:b@cdn.EXAMPLE.COM/",
    ],
)
async def test_hosts_are_compared_as_in_dns(strict: Strict, stack: Stack, url: str) -> None:
    question = uuid.uuid4().hex
    reply = await strict.client.ask(question=question, images=[url])
    assert reply.body["status"] == "succeeded", reply.body["error"]
    assert calls_with(stack, question)[0].links == [url]


async def test_image_too_large_is_exact_to_the_byte(
    strict: Strict, stack: Stack, put_image: PutImage
) -> None:
    fits = picture().ljust(MAX_IMAGE_BYTES, b"\0")
    question = uuid.uuid4().hex
    for content, is_small in ((fits, True), (fits + b"\0", False)):
        for url, shown in ((put_image(content), f"s3://{BUCKET}/"), (_data_url(content), "data: URL)")):
            reply = await strict.client.ask(question=question, images=["https://a.example.com/", url])
            if is_small:
                assert reply.body["status"] == "succeeded"
                continue
            message = _failure(reply, "image_too_large")["error"]["message"]
            assert message.startswith(f"images[1] ({shown}")
            assert "has 3001 bytes; VQA_MAX_IMAGE_BYTES allows 3000" in message
    assert len(calls_with(stack, question)) == 2


async def test_a_far_too_large_embedded_image_is_not_decoded(strict: Strict) -> None:
    url = "data:image/png;base64," + "!" * (MAX_JOB_BYTES // 2)
    body = await strict.fail("image_too_large", question="?", images=[url])
    assert "!!" not in body["error"]["message"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG"),
        (b"\0\0\0\x20ftypmp42", "a video"),
        (b"\x1f\x8b\x08\0" + bytes(40), "a gzip file"),
        (b"RIFF\0\0\0\0WAVEfmt ", ""),
        (b"\x89PNG\r\n\x1a", ""),
        (b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>", "an"),
        (b"x", ""),
    ],
    ids=["SVG", "MP4", "gzip", "WAV", "a truncated signature", "an error of S3", "a byte"],
)
async def test_image_unsupported_type(
    strict: Strict, stack: Stack, put_image: PutImage, content: bytes, says: str
) -> None:
    question = uuid.uuid4().hex
    for url, shown in (
        (put_image(content, f"{uuid.uuid4().hex}.png"), f"s3://{BUCKET}/"),
        (_data_url(content), "data: URL)"),
    ):
        body = await strict.fail("image_unsupported_type", question=question, images=[{"url": url}])
        assert body["error"]["message"].startswith(f"images[0] ({shown}")
        assert f"): the content is {says}" in body["error"]["message"]
    assert calls_with(stack, question) == []


@pytest.mark.parametrize(
    ("encoded", "says"),
    [
        ("iVBORw0KGgo*", "the base64 is invalid: character 12 is '*'"),
        ("iVBORw0KGgoAA", "the base64 is invalid: its end is missing or its padding is wrong"),
        ("iVBOR===", "the base64 is invalid: its end is missing or its padding is wrong"),
        ("iVBORw0K=Ggo", "the base64 is invalid: character 10 comes after the padding"),
        ("é", "the base64 is invalid: character 1 is 'é'"),
        ("iVBORw0KGgo%3D%40", "the base64 is invalid: character 15 is '%'"),
        ("", "is empty"),
        (" \n", "is empty"),
    ],
)
async def test_image_corrupt(strict: Strict, stack: Stack, encoded: str, says: str) -> None:
    question = uuid.uuid4().hex
    url = f"data:image/png;base64,{encoded}"
    body = await strict.fail("image_corrupt", question=question, images=[_data_url(picture()), url])
    assert body["error"]["message"] == f"images[1] (data: URL): {says}"
    assert calls_with(stack, question) == []


async def test_an_empty_object_is_image_corrupt(strict: Strict, put_image: PutImage) -> None:
    url = put_image(b"", f"{uuid.uuid4().hex}.png")
    body = await strict.fail("image_corrupt", question="?", images=[url])
    assert body["error"]["message"] == f"images[0] ({url}): is empty"


async def test_too_many_images_in_either_form(strict: Strict, stack: Stack) -> None:
    question = uuid.uuid4().hex
    url = "https://a.example.com/x.png"
    image = {"type": "image_url", "image_url": {"url": url}}
    turn = {"role": "user", "content": [{"type": "text", "text": question}, image, image]}
    for form in ({"question": question, "images": [url] * 4}, {"messages": [turn, turn]}):
        body = await strict.fail("too_many_images", **form)
        assert body["error"]["message"] == "the job has 4 images; VQA_MAX_IMAGES_PER_JOB allows 3"
    assert calls_with(stack, question) == []


async def test_of_several_faulty_images_the_first_is_named(strict: Strict, put_image: PutImage) -> None:
    good, missing, text = put_image(), f"s3://{BUCKET}/missing", put_image(b"text")
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in (good, text, missing)]
    in_turns = [{"role": "user", "content": "?"}, {"role": "user", "content": parts}]
    short = await strict.fail("image_not_found", question="?", images=[good, missing, text])
    long = await strict.fail("image_unsupported_type", messages=in_turns)

    assert short["error"]["message"].startswith(f"images[1] ({missing}): ")
    assert long["error"]["message"].startswith(f"messages[1].content[1] ({text}): ")


# Responses of the API


@pytest.mark.parametrize("status", [400, 413, 422, 451])
async def test_model_rejected_reports_the_api_s_message_without_secrets(
    strict: Strict, stack: Stack, status: int
) -> None:
    said = f"cannot read {PRESIGNED} with key {stack.model.api_key}: Bearer abcdef0123456789abcdef"
    error = Error(status=status, message=said, code="content_policy_violation")
    body, calls = await _ask_once(strict, stack, error, "model_rejected")

    message = body["error"]["message"]
    assert message.startswith(f"the API answered {status}: cannot read https://bucket.s3.amazonaws.com/")
    for secret in ("5ec7e7", "AKIAIOSFODNN7EXAMPLE", stack.model.api_key, "abcdef0123456789"):
        assert secret not in message
        assert secret not in strict.worker.output()
    assert calls == 1
    assert body["attempts"] == 1
    assert body["timings"]["model_s"] > 0


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("<html><body>too\nlarge</body></html>", "too large (an HTML page)"),
        ({"detail": [{"loc": ["body", "seed"], "msg": "is odd"}]}, "is odd"),
        ({"detail": "so much for that"}, "so much for that"),
        ({"error": "in a word"}, "in a word"),
        ({"error": {"code": "E1", "text": "unusual"}}, "unusual"),
        ({"message": "flat"}, "flat"),
        ("", "413"),
        ("x" * 100_000, "xxx"),
        ("\x1b[31m\u202e\x00red", "[31m  red"),
    ],
    ids=range(9),
)
async def test_model_rejected_finds_the_message_in_every_form_of_body(
    strict: Strict, stack: Stack, body: str | dict[str, Any], says: str
) -> None:
    result, _ = await _ask_once(strict, stack, Error(status=413, body=body), "model_rejected")
    await _succeed(strict)
    assert says in result["error"]["message"]
    assert len(result["error"]["message"]) <= 2000
    assert result["error"]["message"].isprintable()


async def test_model_rejected_when_403_is_for_this_job_only(
    client: Client, worker: Worker, stack: Stack
) -> None:
    job_id, marker = uuid.uuid4().hex, uuid.uuid4().hex
    stack.model.play(Error(status=403, message="not your picture"), marker=marker, times=None)
    await client.publish({"id": job_id, "question": marker, "images": [_data_url(picture())]})
    await until(lambda: worker.metric("vqa_retries_total", reason="http_403") > 0, "the first 403")
    # A success of another job distinguishes this failure from an outage.
    other = await client.ask(question="?", images=[_data_url(picture())])
    body = _failure(await client.result(job_id), "model_rejected")

    assert other.body["status"] == "succeeded"
    assert body["error"]["message"] == "the API answered 403: not your picture"
    assert 2 <= body["attempts"] <= 3
    assert len(calls_with(stack, marker)) == body["attempts"]


@pytest.mark.parametrize(
    ("answer", "finish_reason", "says"),
    [
        (Answer(null_content=True), "stop", "neither text nor a tool call"),
        (Answer(text=""), "stop", "neither text nor a tool call"),
        (Answer(text=" \n\t\u00a0"), "stop", "neither text nor a tool call"),
        (Answer(text="", parts=True), "stop", "neither text nor a tool call"),
        (Answer(no_choices=True), None, "neither text nor a tool call"),
        (Answer(text="", finish_reason="length"), "length", "raise params.max_tokens"),
        (Answer(text="", finish_reason="content_filter"), "content_filter", "content filter"),
        (Answer(refusal="I would rather not."), "stop", "refused to answer: I would rather not."),
    ],
    ids=range(8),
)
async def test_empty_answer_is_billed_and_never_retried(
    strict: Strict, stack: Stack, answer: Answer, finish_reason: str | None, says: str
) -> None:
    body, calls = await _ask_once(strict, stack, answer, "empty_answer")

    assert says in body["error"]["message"]
    assert body["finish_reason"] == finish_reason
    assert body["usage"]["prompt_tokens"] > 0
    assert body["usage"]["total_tokens"] == sum(
        body["usage"][kind] for kind in ("prompt_tokens", "completion_tokens")
    )
    assert body["usage"]["cost_usd"] > 0
    assert calls == 1


async def test_empty_answer_includes_the_billed_reasoning(strict: Strict, stack: Stack) -> None:
    answer = Answer(text="", reasoning_content="Hmm. " * 50, finish_reason="length", usage="none")
    body, calls = await _ask_once(strict, stack, answer, "empty_answer")

    assert body["response"]["choices"][0]["message"]["reasoning_content"] == "Hmm. " * 50
    assert body["usage"] is None
    assert calls == 1


# deadline_exceeded


async def test_deadline_exceeded_before_images_are_fetched_and_the_model_is_called(
    strict: Strict, stack: Stack
) -> None:
    question = uuid.uuid4().hex
    deadline = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
    images = [f"s3://{BUCKET}/missing"]
    body = await strict.fail("deadline_exceeded", question=question, images=images, deadline=deadline)

    assert "deadline" in body["error"]["message"]
    assert body["timings"]["fetch_s"] is None
    assert calls_with(stack, question) == []


async def test_deadline_exceeded_if_the_next_attempt_would_be_too_late(strict: Strict, stack: Stack) -> None:
    deadline = (datetime.now(UTC) + timedelta(seconds=45)).isoformat()
    body, calls = await _ask_once(
        strict, stack, Error(status=504, message="come back later"), "deadline_exceeded", deadline=deadline
    )
    assert "deadline" in body["error"]["message"]
    assert "the API answered 504: come back later" in body["error"]["message"]
    assert calls == 1
    await _succeed(strict)


# attempts_exhausted


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (Error(status=500), "the API answered 500: Scripted failure"),
        (
            Error(status=502, body="<html>Bad gateway</html>"),
            "the API answered 502: Bad gateway (an HTML page)",
        ),
        (Error(status=504, body=""), "the API answered 504"),
        (Error(status=408), "the API answered 408"),
        (Error(status=409), "the API answered 409"),
        (Malformed(how="not_json"), "the API answered 200, but the body is not JSON"),
        (Malformed(how="cut_json"), "the API answered 200, but the body is not JSON"),
        (
            Answer(usage="none", extra={"choices": 7}),
            "the API answered 200, but the body has no list of choices",
        ),
        (Malformed(how="truncated"), "the connection to the API was lost"),
        (Answer(usage="none", extra={"choices": [{}]}), "the first choice has no message"),
        (Answer(usage="none", extra={"choices": []}), "the list of choices is empty"),
        (Answer(extra={"choices": [{"message": {"content": 7}}]}), "neither text nor parts"),
        (Answer(extra={"choices": [None]}), "the first choice is not an object"),
        (Answer(usage="none", extra={"choices": None}), "the body has no list of choices"),
        (Reset(), "the connection to the API was lost"),
        (Hang(), "the API did not answer within 3 s"),
    ],
    ids=lambda value: f"{value.kind}-{getattr(value, 'status', '')}" if isinstance(value, Outcome) else "",
)
async def test_attempts_exhausted_reports_the_last_error_and_dead_letters_the_job(
    strict: Strict, stack: Stack, fault: Outcome, says: str
) -> None:
    job_id, marker = uuid.uuid4().hex, uuid.uuid4().hex
    stack.model.play(fault, marker=marker, times=None)
    job = {"id": job_id, "question": marker, "images": [_data_url(picture())]}
    await strict.client.publish(job, headers={"vqa-attempts": 1})
    body = _failure(await strict.client.result(job_id), "attempts_exhausted", retryable=True)
    kept = await strict.dead_letter_of(job_id)

    assert body["attempts"] == 2
    assert body["error"]["message"].startswith("2 attempts failed, the last one because ")
    assert says in body["error"]["message"]
    assert len(calls_with(stack, marker)) == 1
    assert json.loads(kept.body) == job
    assert kept.headers["vqa-error-code"] == "attempts_exhausted"
    assert kept.headers["vqa-error-message"] == body["error"]["message"]
    assert kept.headers["vqa-attempts"] == 2
    await _succeed(strict)


async def test_a_job_is_attempted_as_often_as_configured_and_can_be_replayed(
    client: Client, worker: Worker, stack: Stack
) -> None:
    job_id, marker = uuid.uuid4().hex, uuid.uuid4().hex
    for fault in (Error(status=500), Reset(), Error(status=502, message="the last one")):
        stack.model.play(fault, marker=marker)
    job = {"id": job_id, "question": marker, "images": [_data_url(picture())]}
    sent = datetime(2031, 2, 3, 4, 5, 6, tzinfo=UTC)
    async with client.reading(worker.dead_letter_queue) as dead_letters:
        await client.publish(
            job,
            message_id=f"m-{job_id}",
            correlation_id=f"c-{job_id}",
            reply_to=worker.results_queue,
            timestamp=sent,
            headers={"x-own": "kept"},
        )
        reply = await client.result(job_id)
        (kept,) = await until(
            lambda: [it for it in dead_letters if job_id.encode() in it.body], "the dead letter"
        )

    body = _failure(reply, "attempts_exhausted", retryable=True)
    assert body["attempts"] == 3
    assert len(calls_with(stack, marker)) == 3
    assert body["error"]["message"].endswith("the API answered 502: the last one")
    assert reply.message.correlation_id == f"c-{job_id}"
    assert json.loads(kept.body) == job
    assert (kept.message_id, kept.correlation_id) == (f"m-{job_id}", f"c-{job_id}")
    assert (kept.reply_to, kept.timestamp) == (worker.results_queue, sent)
    assert kept.delivery_mode is aio_pika.DeliveryMode.PERSISTENT
    died_at = datetime.fromisoformat(str(kept.headers.pop("vqa-died-at")))
    assert timedelta(0) <= datetime.now(UTC) - died_at < timedelta(minutes=1)
    assert kept.headers == {
        "x-own": "kept",
        "vqa-error-code": "attempts_exhausted",
        "vqa-error-message": body["error"]["message"],
        "vqa-attempts": 3,
    }
    await _can_be_replayed(client, kept, job_id, died_at)


async def _can_be_replayed(
    client: Client, kept: AbstractIncomingMessage, job_id: str, died_at: datetime
) -> None:
    """Replay a dead letter with all its headers: it is a new job with all its attempts left."""
    client.replies.pop(job_id)
    await client.publish(
        kept.body,
        message_id=kept.message_id,
        correlation_id=kept.correlation_id,
        reply_to=kept.reply_to,
        timestamp=kept.timestamp,
        headers={**kept.headers, "vqa-died-at": died_at.isoformat()},
    )
    body = (await client.result(job_id)).body
    assert body["status"] == "succeeded"
    assert body["attempts"] == 1


async def test_attempts_exhausted_when_a_job_is_always_requeued(strict: Strict, stack: Stack) -> None:
    """The message has the headers of a job that was requeued many times."""
    job_id, marker = uuid.uuid4().hex, uuid.uuid4().hex
    job = {"id": job_id, "question": marker, "images": [_data_url(picture())]}
    await strict.client.publish(job, headers={"vqa-deliveries": 20})
    body = _failure(await strict.client.result(job_id), "attempts_exhausted", retryable=True)
    kept = await strict.dead_letter_of(job_id)

    assert "delivered 21 times without an outcome (VQA_DELIVERY_LIMIT)" in body["error"]["message"]
    assert kept.headers["vqa-error-code"] == "attempts_exhausted"
    assert calls_with(stack, marker) == []


@pytest.mark.parametrize(
    ("header", "attempts"),
    [
        (0, 1),
        (1, 2),
        (7, 8),
        (-1, 1),
        (10**6, 1),
        (-(2**31), 1),
        (2**62, 1),
        ("1", 1),
        ("", 1),
        (1.0, 1),
        (Decimal("1.0"), 1),
        (True, 1),
        (None, 1),
        (bytearray(b"\xff\xfe"), 1),
        ([1], 1),
        ({"a": {"b": 1}}, 1),
        (datetime(2030, 1, 1, tzinfo=UTC), 1),
    ],
    ids=str,
)
async def test_the_attempts_header_must_be_a_small_whole_number(
    strict: Strict, header: Any, attempts: int
) -> None:
    job_id = uuid.uuid4().hex
    job = {"id": job_id, "question": "?", "images": ["https://a.example.com/"]}
    await strict.client.publish(job, headers={"vqa-attempts": header})
    assert (await strict.client.result(job_id)).body["attempts"] == attempts


# Dead-lettering


async def test_only_a_job_that_exhausted_its_attempts_is_dead_lettered(
    strict: Strict, stack: Stack, forbidden_url: str
) -> None:
    marker = uuid.uuid4().hex
    stack.model.play(Error(status=422), marker=f"{marker} rejected")
    stack.model.play(Answer(text=""), marker=f"{marker} empty")
    stack.model.play(Error(status=500), marker=f"{marker} exhausted")
    image = _data_url(picture())
    jobs: dict[str, dict[str, Any]] = {
        "invalid_job": {"images": [image], "model": "another"},
        "image_not_found": {"images": [f"s3://{BUCKET}/missing"]},
        "image_forbidden": {"images": [forbidden_url]},
        "image_source_not_allowed": {"images": ["http://a.example.com"]},
        "image_too_large": {"images": [_data_url(bytes(MAX_IMAGE_BYTES + 1))]},
        "image_unsupported_type": {"images": [_data_url(b"?")]},
        "image_corrupt": {"images": [_data_url(b"")]},
        "too_many_images": {"images": [image] * 4},
        "model_rejected": {"images": [image], "question": f"{marker} rejected"},
        "empty_answer": {"images": [image], "question": f"{marker} empty"},
        "deadline_exceeded": {"images": [image], "deadline": "2020-01-01T00:00:00Z"},
        "attempts_exhausted": {"images": [image], "question": f"{marker} exhausted"},
    }
    failed_before = strict.worker.metric("vqa_jobs_total", status="failed")
    kept_before = strict.worker.metric("vqa_dead_letters_total")
    for code, job in jobs.items():
        body = {"id": f"{marker} {code}", "question": "?", **job}
        await strict.client.publish(body, headers={"vqa-attempts": 1})
    for code in jobs:
        reply = await strict.client.result(f"{marker} {code}")
        _failure(reply, code, retryable=code == "attempts_exhausted")

    # The metrics change after the settlement.
    await until(
        lambda: strict.worker.metric("vqa_jobs_total", status="failed") == failed_before + len(jobs),
        "all failures are counted",
    )
    assert strict.worker.metric("vqa_dead_letters_total") == kept_before + 1
    await strict.dead_letter_of(f"{marker} attempts_exhausted")
    await _succeed(strict)


async def _ask_once(
    strict: Strict, stack: Stack, outcome: Outcome, code: str, **fields: Any
) -> tuple[dict[str, Any], int]:
    """Return the result of a job with this outcome at every call, and the number of calls."""
    marker = uuid.uuid4().hex
    stack.model.play(outcome, marker=marker, times=None)
    body = await strict.fail(code, question=marker, images=[_data_url(picture())], **fields)
    return body, len(calls_with(stack, marker))


async def _succeed(strict: Strict) -> None:
    """Run a job that succeeds: several failures without a success in between would look like an outage."""
    reply = await strict.client.ask(question="?", images=["https://a.example.com/"])
    assert reply.body["status"] == "succeeded"


def _data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"
