"""Large images are streamed unchanged through a real worker; errors are reported and nothing hangs."""

import asyncio
import base64
import hashlib
import json
import random
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

from deploy.local.model_simulator.behavior import Error
from deploy.local.model_simulator.calls import Call
from deploy.local.stack import Stack
from tests.authority import Authority
from tests.breaking import events
from tests.conftest import BUCKET, PutImage, picture
from tests.fake_s3 import Answer, FakeS3, give, head, refuse, say
from tests.running import Client, Reply, Worker, calls_with, until
from vqa_worker.messages.image_types import SIGNATURE_BYTES

MIB = 1024 * 1024
SMALL_BYTES = 256 * 1024
"""Up to this size an image is read before the model request; larger ones are streamed."""
NOISE = random.Random(1).randbytes(9 * MIB)  # noqa: S311 - image bytes, not secrets


def an_image(size: int) -> bytes:
    """Return bytes of this size that start like an image and occur nowhere else."""
    start = picture()
    return (start + NOISE)[:size]


LARGE = an_image(MIB + 1)
SMALL = an_image(500)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


async def model_request(client: Client, stack: Stack, *images: object) -> Call:
    """Return the model request for a job with these images."""
    question = f"What is {uuid.uuid4().hex}?"
    reply = await client.ask(question=question, images=images)
    assert reply.body["status"] == "succeeded", reply.body
    (call,) = calls_with(stack, question)
    return call


# Unchanged images


async def test_images_of_all_sources_and_sizes_in_one_request_arrive_unchanged(
    client: Client, stack: Stack, put_image: PutImage
) -> None:
    small, large = an_image(999), an_image(2 * MIB + 1)
    embedded, large_embedded = an_image(1000), an_image(MIB + 2)
    link = "https://images.example/cat.png?x=%2F"
    call = await model_request(
        client,
        stack,
        put_image(large),
        link,
        data_url(embedded),
        put_image(small),
        data_url(large_embedded),
        put_image(large),
    )
    contents = [large, embedded, small, large_embedded, large]
    assert [image.sha256 for image in call.images] == [sha256(content) for content in contents]
    assert call.links == [link]


@pytest.mark.parametrize("way", ["s3", "data"])
async def test_images_with_sizes_around_boundaries_arrive_unchanged(
    client: Client, stack: Stack, put_image: PutImage, way: str
) -> None:
    # JSON, base64 and the connection's chunks all have their own boundaries.
    bounds = [SMALL_BYTES * 3 // 4, SMALL_BYTES, 400 * 1024 * 3 // 4]
    sizes = [bound + more for bound in bounds for more in (-1, 0, 1, 2)]
    contents = [an_image(size) for size in sizes]
    call = await model_request(
        client, stack, *[(put_image if way == "s3" else data_url)(it) for it in contents]
    )
    assert [image.bytes for image in call.images] == sizes
    assert [image.sha256 for image in call.images] == [sha256(content) for content in contents]


async def test_a_data_url_may_have_json_escapes(client: Client, stack: Stack) -> None:
    # PHP escapes each slash. The base64 of 0xFF bytes has only slashes.
    contents = [an_image(MIB) + b"\xff" * SMALL_BYTES, picture() + b"\xff" * 3000]
    marker = uuid.uuid4().hex
    job = {"id": marker, "question": marker, "images": [data_url(it) for it in contents]}
    await client.publish(json.dumps(job).replace("/", "\\/").encode())
    reply = await client.result(marker)
    assert reply.body["status"] == "succeeded"
    (call,) = calls_with(stack, marker)
    assert [image.sha256 for image in call.images] == [sha256(content) for content in contents]


async def test_white_space_in_a_data_url_does_not_truncate_the_image(client: Client, stack: Stack) -> None:
    content = an_image(MIB)
    encoded = base64.b64encode(content).decode()
    blanks = " " * 600_000
    urls = [
        f"data:image/png;base64,{encoded[:at]}{blanks}{encoded[at:]}" for at in (0, 500_000, len(encoded))
    ]
    call = await model_request(client, stack, *urls)
    assert [image.sha256 for image in call.images] == [sha256(content)] * 3


async def test_a_429_sends_the_whole_image_again(client: Client, stack: Stack, put_image: PutImage) -> None:
    question, content = f"What is {uuid.uuid4().hex}?", an_image(3 * MIB)
    stack.model.play(Error(status=429, headers={"Retry-After": "0.1"}), marker=question, times=2)
    reply = await client.ask(question=question, images=[put_image(content), data_url(content)])
    assert reply.body["status"] == "succeeded"
    calls = calls_with(stack, question)
    assert [[image.sha256 for image in call.images] for call in calls] == [[sha256(content)] * 2] * 3


# A faulty S3


@dataclass
class Scene:
    """A worker with a fake S3, and its client."""

    stack: Stack
    s3: FakeS3
    worker: Worker
    client: Client

    def metric(self, name: str, **labels: str) -> float:
        return self.worker.metric(name, **labels)


@pytest.fixture(scope="module")
async def scene(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    folder = tmp_path_factory.mktemp("fake-s3")
    async with (
        FakeS3.serving(LARGE) as s3,
        Worker.running(stack, folder, VQA_S3_ENDPOINT_URL=s3.url, VQA_MAX_ATTEMPTS="2") as worker,
        Client.of(stack, worker) as client,
    ):
        yield Scene(stack, s3, worker, client)


@asynccontextmanager
async def answering(scene: Scene, answer: Answer) -> AsyncIterator[None]:
    scene.s3.asked.clear()
    scene.s3.answer = answer
    try:
        yield
    finally:
        scene.s3.answer = give(LARGE)


async def ask(scene: Scene, answer: Answer, question: str, key: str = "large.png") -> Reply:
    async with answering(scene, answer):
        return await scene.client.ask(question=question, images=[f"s3://{BUCKET}/{key}"])


def begun(content: bytes, size: int) -> bytes:
    """Return the head of a response and the first `size` bytes of its body."""
    return head(len(content)) + content[:size]


async def reset(request: web.BaseRequest) -> web.StreamResponse:
    """Send half of the image, then reset the connection."""
    response = web.StreamResponse(headers={"Content-Length": str(len(LARGE))})
    await response.prepare(request)
    await response.write(LARGE[: len(LARGE) // 2])
    # The half must arrive before the reset, which drops unread data.
    await asyncio.sleep(0.1)
    assert request.transport is not None
    request.transport.abort()
    return response


BROKEN: dict[str, Callable[[], Answer]] = {
    "a reset": lambda: reset,
    "an early end": lambda: say(begun(LARGE, len(LARGE) // 2)),
    "one byte too few": lambda: say(begun(LARGE, len(LARGE) - 1)),
}


@pytest.mark.parametrize("broken", BROKEN)
async def test_an_interrupted_large_image_is_reported_and_no_model_request_is_counted(
    scene: Scene, broken: str
) -> None:
    calls, ambiguous = scene.metric("vqa_model_requests_total"), scene.metric("vqa_ambiguous_calls_total")
    retries = scene.metric("vqa_retries_total", reason="connection_error")
    images = scene.metric("vqa_image_bytes_total")
    question = f"What is {uuid.uuid4().hex}?"
    reply = await ask(scene, BROKEN[broken](), question)

    assert reply.body["error"]["code"] == "attempts_exhausted"
    assert f"images[0] (s3://{BUCKET}/large.png): " in reply.body["error"]["message"]
    assert "S3" in reply.body["error"]["message"]
    assert reply.body["attempts"] == 2
    assert scene.metric("vqa_retries_total", reason="connection_error") == retries + 1
    # The API received an incomplete request at most.
    assert calls_with(scene.stack, question) == []
    assert scene.metric("vqa_model_requests_total") == calls
    assert scene.metric("vqa_ambiguous_calls_total") == ambiguous
    assert scene.metric("vqa_image_bytes_total") == images
    dead_letter = await scene.client.take(scene.worker.dead_letter_queue)
    assert "large.png" in str(dead_letter.headers["vqa-error-message"])


async def test_the_model_request_in_progress_is_aborted_at_once(scene: Scene) -> None:
    """The API has the first part of the request while S3 hangs; the reset of S3 aborts the request."""
    model, proceed = scene.stack.model, asyncio.Event()

    async def wait(request: web.BaseRequest) -> web.StreamResponse:
        if len(scene.s3.asked) > 1:
            return await give(LARGE)(request)
        assert request.transport is not None
        request.transport.write(begun(LARGE, len(LARGE) // 2))
        await proceed.wait()
        request.transport.abort()
        return web.Response()

    # With the interrupted images before, more than three jobs in a row would fail, which is an outage.
    assert (await ask(scene, give(LARGE), "?")).body["status"] == "succeeded"
    at_first = model.state().in_progress
    question = f"What is {uuid.uuid4().hex}?"
    asking = asyncio.create_task(ask(scene, wait, question))
    try:
        await until(lambda: model.state().in_progress > at_first, "the call begins")
    finally:
        proceed.set()
    reply = await asking
    assert reply.body["status"] == "succeeded"
    assert reply.body["attempts"] == 2
    (call,) = calls_with(scene.stack, question)
    assert [image.sha256 for image in call.images] == [sha256(LARGE)]
    aborted = [call for call in model.calls() if call.disconnected and not call.question]
    assert aborted


@pytest.mark.parametrize("closes", [True, False])
async def test_bytes_after_the_content_length_of_s3_are_ignored(scene: Scene, closes: bool) -> None:
    question = f"What is {uuid.uuid4().hex}?"
    answer = say(head(len(LARGE)), LARGE, b"\x00 and more", pause_s=0.05, closes=closes)
    reply = await ask(scene, answer, question)
    assert reply.body["status"] == "succeeded"
    (call,) = calls_with(scene.stack, question)
    assert [image.sha256 for image in call.images] == [sha256(LARGE)]


@pytest.mark.parametrize("size", [1000, SMALL_BYTES + 1])
async def test_an_image_in_small_chunks_arrives_unchanged(scene: Scene, size: int) -> None:
    content = an_image(size)
    pieces = [content[start : start + 5] for start in range(0, 500, 5)]
    question = f"What is {uuid.uuid4().hex}?"
    answer = say(head(size), *pieces, content[500:], pause_s=0.001)
    reply = await ask(scene, answer, question)
    assert reply.body["status"] == "succeeded", reply.body
    (call,) = calls_with(scene.stack, question)
    assert [image.sha256 for image in call.images] == [sha256(content)]


@pytest.mark.parametrize(
    ("answer", "content"),
    [
        (say(head(None, "Connection: close"), LARGE), LARGE),
        (
            say(head(None, "Transfer-Encoding: chunked"), b"%x\r\n%s\r\n0\r\n\r\n" % (len(SMALL), SMALL)),
            SMALL,
        ),
    ],
    ids=["up to the end", "chunked"],
)
async def test_a_response_without_content_length_is_read(
    scene: Scene, answer: Answer, content: bytes
) -> None:
    question = f"What is {uuid.uuid4().hex}?"
    reply = await ask(scene, answer, question)
    assert reply.body["status"] == "succeeded", reply.body
    (call,) = calls_with(scene.stack, question)
    assert [image.sha256 for image in call.images] == [sha256(content)]


async def test_a_single_slow_down_of_s3_uses_no_attempt(scene: Scene) -> None:
    async def slow_down(request: web.BaseRequest) -> web.StreamResponse:
        is_first = len(scene.s3.asked) == 1
        return await (refuse(503, "SlowDown") if is_first else give(LARGE))(request)

    reply = await ask(scene, slow_down, "What is it?")
    assert (reply.body["status"], reply.body["attempts"]) == ("succeeded", 1)
    assert len(scene.s3.asked) == 2


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (refuse(200, "SlowDown"), "image_unsupported_type"),
        (give(b"<html>" + b"Log in to this network! " * 40_000, Content_Type="image/png"),
         "image_unsupported_type"),
        (give(b"", Content_Type="image/png"), "image_corrupt"),
    ],
    ids=["an error with 200", "a page with 200", "nothing"],
)  # fmt: skip
async def test_a_response_that_is_not_an_image_is_never_sent(scene: Scene, answer: Answer, code: str) -> None:
    question = f"What is {uuid.uuid4().hex}?"
    reply = await ask(scene, answer, question)
    assert reply.body["error"]["code"] == code, reply.body
    assert "images[0]" in reply.body["error"]["message"]
    assert calls_with(scene.stack, question) == []


@pytest.mark.parametrize(
    "answer",
    [give(LARGE, 403), give(LARGE, 206, Content_Range=f"bytes 0-{len(LARGE) - 1}/99999999")],
    ids=["an error that looks like an image", "a part"],
)
async def test_another_status_without_an_s3_error_code_requeues_the_job(scene: Scene, answer: Answer) -> None:
    marker = uuid.uuid4().hex
    requeued = scene.metric("vqa_jobs_requeued_total")
    async with answering(scene, answer):
        await scene.client.publish({"id": marker, "question": marker, "images": [f"s3://{BUCKET}/large.png"]})
        await until(lambda: scene.metric("vqa_jobs_requeued_total") > requeued, "the job is requeued")
        assert calls_with(scene.stack, marker) == []
    reply = await scene.client.result(marker)
    assert (reply.body["status"], reply.body["attempts"]) == ("succeeded", 1)


async def test_images_arrive_unchanged_after_these_errors(scene: Scene) -> None:
    """An interrupted request leaves no half-used connection in the pool."""
    calls = await asyncio.gather(
        *[model_request(scene.client, scene.stack, f"s3://{BUCKET}/it") for _ in range(10)]
    )
    assert {image.sha256 for call in calls for image in call.images} == {sha256(LARGE)}
    assert scene.worker.ready() == (200, {"status": "ready", "reasons": []})


# The times in the result


async def test_waiting_for_s3_during_the_call_counts_as_fetch_time(scene: Scene) -> None:
    async def slowly(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(LARGE))})
        await response.prepare(request)
        for start in range(0, len(LARGE), len(LARGE) // 4 + 1):
            await response.write(LARGE[start : start + len(LARGE) // 4 + 1])
            await asyncio.sleep(0.25)
        return response

    slow = await ask(scene, slowly, "What is it?")
    fast = await ask(scene, give(LARGE), "What is it?")
    assert slow.body["status"] == fast.body["status"] == "succeeded"
    slow_s, fast_s = slow.body["timings"], fast.body["timings"]
    # Three of the four pauses are before the last bytes.
    assert slow_s["fetch_s"] >= 0.7
    assert slow_s["fetch_s"] > slow_s["model_s"]
    assert slow_s["fetch_s"] + slow_s["model_s"] <= slow_s["total_s"]
    assert fast_s["fetch_s"] < 0.7


async def test_a_timeout_caused_by_a_slow_s3_is_attributed_to_s3(
    stack: Stack, tmp_path_factory: pytest.TempPathFactory, scene: Scene
) -> None:
    """The API waited for the body: no failure of the model is counted."""
    folder = tmp_path_factory.mktemp("slow-s3")
    async with (
        Worker.running(
            stack, folder, VQA_S3_ENDPOINT_URL=scene.s3.url, VQA_MODEL_TIMEOUT="1", VQA_MAX_ATTEMPTS="1"
        ) as worker,
        Client.of(stack, worker) as client,
        answering(scene, say(begun(LARGE, len(LARGE) // 2), closes=False)),
    ):
        reply = await client.ask(question="What is it?", images=[f"s3://{BUCKET}/slow.png"])
        assert reply.body["error"]["code"] == "attempts_exhausted"
        says = f"images[0] (s3://{BUCKET}/slow.png): the timeout expired while S3 was still sending it"
        assert says in reply.body["error"]["message"]
        assert worker.metric("vqa_model_requests_total") == 0
        assert worker.metric("vqa_ambiguous_calls_total") == 0


# Shared images


async def test_concurrent_jobs_with_one_image_share_its_read(scene: Scene) -> None:
    """S3 gets one request while all jobs wait for the image."""
    jobs, question = 20, uuid.uuid4().hex

    async def when_all_are_there(request: web.BaseRequest) -> web.StreamResponse:
        await until(lambda: scene.metric("vqa_jobs_in_flight") >= jobs, "all jobs are in flight")
        return await give(LARGE)(request)

    async with answering(scene, when_all_are_there):
        asking = [
            scene.client.ask(question=f"{question} {n}", images=[f"s3://{BUCKET}/page.png"])
            for n in range(jobs)
        ]
        replies = await asyncio.gather(*asking)
        assert len(scene.s3.asked) < jobs / 2
    assert {reply.body["status"] for reply in replies} == {"succeeded"}
    calls = calls_with(scene.stack, question)
    assert [[image.sha256 for image in call.images] for call in calls] == [[sha256(LARGE)]] * jobs


async def test_each_job_reports_an_interrupted_shared_image_with_its_own_position(scene: Scene) -> None:
    # The same number of consecutive failures with different causes would be an outage.
    jobs = 8
    pauses = len(events(scene.worker, "consumption_paused"))

    async def when_all_are_there(request: web.BaseRequest) -> web.StreamResponse:
        await until(lambda: scene.metric("vqa_jobs_in_flight") >= jobs, "all jobs are in flight")
        return await say(begun(LARGE, len(LARGE) // 2))(request)

    url = f"s3://{BUCKET}/torn.png"
    link = "https://images.example/a.png"
    async with answering(scene, when_all_are_there):
        replies = await asyncio.gather(
            *[scene.client.ask(question="?", images=[link] * n + [url]) for n in range(jobs)]
        )
    for n, reply in enumerate(replies):
        assert reply.body["error"]["code"] == "attempts_exhausted"
        assert f"images[{n}] ({url}): " in reply.body["error"]["message"]
        assert reply.body["attempts"] == 2
    # All jobs share one error of S3.
    assert scene.metric("vqa_dependency_up", dependency="s3") == 1
    assert len(events(scene.worker, "consumption_paused")) == pauses


async def test_images_in_flight_do_not_exceed_the_buffer(
    stack: Stack, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Each of the distinct images needs 768 KiB of the buffer; all jobs succeed."""
    jobs, question = 8, uuid.uuid4().hex

    async def slowly(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(LARGE))})
        await response.prepare(request)
        await response.write(LARGE[:MIB])
        await asyncio.sleep(0.1)
        await response.write(LARGE[MIB:])
        return response

    folder = tmp_path_factory.mktemp("buffer")
    async with (
        FakeS3.serving(LARGE) as s3,
        Worker.running(
            stack, folder, VQA_S3_ENDPOINT_URL=s3.url, VQA_IMAGE_BUFFER_BYTES=str(2 * MIB)
        ) as worker,
        Client.of(stack, worker) as client,
    ):
        s3.answer = slowly
        replies = await asyncio.gather(
            *[client.ask(question=question, images=[f"s3://{BUCKET}/{n}.png"]) for n in range(jobs)]
        )
        assert {reply.body["status"] for reply in replies} == {"succeeded"}
        assert 1 <= s3.most_at_once <= 3
        # A job whose images exceed the buffer gets the whole buffer.
        call = await model_request(client, stack, *[f"s3://{BUCKET}/x{n}.png" for n in range(5)])
        assert [image.sha256 for image in call.images] == [sha256(LARGE)] * 5


# Checked presigned URLs


@dataclass
class Linked:
    s3: FakeS3
    checked: Client
    unchecked: Client


@pytest.fixture(scope="module")
async def linked(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Linked]:
    """Two workers with `VQA_IMAGE_DELIVERY=link`, one of which checks images; their S3 uses TLS."""
    folder = tmp_path_factory.mktemp("linked")
    authority = Authority.made_in(folder / "tls")
    async with FakeS3.serving(LARGE, tls=authority.server_context()) as s3:
        settings = {
            "VQA_S3_ENDPOINT_URL": s3.url,
            "VQA_IMAGE_DELIVERY": "link",
            "VQA_MAX_IMAGE_BYTES": "1000",
            "VQA_IMAGE_CONVERT": "never",
            "AWS_CA_BUNDLE": authority.certificate,
        }
        async with (
            Worker.running(stack, folder, **settings, VQA_CHECK_LINKED_IMAGES="true") as checked,
            Worker.running(stack, folder, **settings) as unchecked,
            Client.of(stack, checked) as client,
            Client.of(stack, unchecked) as other,
        ):
            yield Linked(s3, client, other)


def part(content: bytes) -> Answer:
    """Return S3's response to a request for the first bytes."""

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        if "Range" not in request.headers:
            return await give(content)(request)
        if not content:
            return await refuse(416, "InvalidRange", Content_Range="bytes */0")(request)
        beginning = content[:SIGNATURE_BYTES]
        span = f"bytes 0-{len(beginning) - 1}/{len(content)}"
        return await give(beginning, 206, Content_Range=span)(request)

    return answer


@pytest.mark.parametrize(
    ("answer", "code", "words"),
    [
        (part(an_image(1001)), "image_too_large", "has 1001 bytes; VQA_MAX_IMAGE_BYTES allows 1000"),
        (part(b"GIF89a and so on"), "image_unsupported_type", "the content is image/gif"),
        (part(b""), "image_corrupt", "empty"),
        (refuse(404, "NoSuchKey"), "image_not_found", "NoSuchKey"),
        (refuse(403, "AccessDenied"), "image_forbidden", "AccessDenied"),
    ],
    ids=["too large", "no image", "empty", "missing", "forbidden"],
)
async def test_a_check_of_a_linked_image_reports_errors_before_the_model_is_called(
    stack: Stack,
    linked: Linked,
    answer: Answer,
    code: str,
    words: str,
) -> None:
    s3, client = linked.s3, linked.checked
    s3.answer, question = answer, f"What is {uuid.uuid4().hex}?"
    s3.asked.clear()
    reply = await client.ask(question=question, images=[f"s3://{BUCKET}/it"])
    assert reply.body["error"]["code"] == code, reply.body
    assert f"images[0] (s3://{BUCKET}/it): " in reply.body["error"]["message"]
    assert words in reply.body["error"]["message"]
    assert calls_with(stack, question) == []
    (asked,) = s3.asked
    assert asked.headers["range"] == f"bytes=0-{SIGNATURE_BYTES - 1}"
    # Without the setting S3 gets no request and the API checks the images.
    s3.asked.clear()
    assert (await model_request(linked.unchecked, stack, f"s3://{BUCKET}/it")).links
    assert s3.asked == []


async def test_a_valid_linked_image_is_requested_once_and_passed_on_as_a_presigned_url(
    stack: Stack, linked: Linked
) -> None:
    s3, client = linked.s3, linked.checked
    s3.answer = part(an_image(1000))
    s3.asked.clear()
    call = await model_request(client, stack, f"s3://{BUCKET}/well.png")
    assert call.images == []
    (link,) = call.links
    assert link.startswith(f"{s3.url}/{BUCKET}/well.png?")
    (asked,) = s3.asked
    assert (asked.method, asked.headers["range"]) == ("GET", f"bytes=0-{SIGNATURE_BYTES - 1}")


# An API that responds before the end of the request


@dataclass
class EarlyApi:
    """Respond after a part of a request; answer complete requests like an API."""

    url: str = ""
    says: bytes | None = None
    closes: bool = False
    heads: list[bytes] = field(default_factory=list)
    """The received parts of all requests."""
    bodies: list[bytes] = field(default_factory=list)
    """The complete requests."""
    connections: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                await self._serve_one(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        start = await reader.readuntil(b"\r\n\r\n")
        self.heads.append(start)
        length = int(start.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        says, self.says = self.says, None
        if says is None:
            self.bodies.append(await reader.readexactly(length))
            writer.write(answered(200, COMPLETION))
            return
        await reader.readexactly(1000)
        writer.write(says)
        await writer.drain()
        if self.closes and writer.can_write_eof():
            writer.write_eof()
        # After an early response servers continue to read for a while.
        while await reader.read(1 << 16):
            pass
        raise ConnectionResetError


COMPLETION = {"choices": [{"message": {"content": "A cat."}, "finish_reason": "stop"}]}


def answered(status: int, body: object, *more: str) -> bytes:
    raw = json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} Reason", "Content-Type: application/json", *more]
    return "\r\n".join([*lines, f"Content-Length: {len(raw)}", "", ""]).encode() + raw


@dataclass
class EarlyApiScene:
    api: EarlyApi
    s3: FakeS3
    worker: Worker
    client: Client


@pytest.fixture(scope="module")
async def early_api(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EarlyApiScene]:
    folder, api = tmp_path_factory.mktemp("early_api"), EarlyApi()
    async with await asyncio.start_server(api.serve, "127.0.0.1", 0) as server:
        api.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        async with (
            FakeS3.serving(LARGE) as s3,
            Worker.running(
                stack, folder, VQA_S3_ENDPOINT_URL=s3.url, VQA_MODEL_BASE_URL=api.url, VQA_MAX_ATTEMPTS="2"
            ) as worker,
            Client.of(stack, worker) as client,
        ):
            yield EarlyApiScene(api, s3, worker, client)


@asynccontextmanager
async def half_an_image(scene: EarlyApiScene) -> AsyncIterator[None]:
    """Respond to the first request with half of the image and then hang."""
    first = True

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        nonlocal first
        if not first:
            return await give(LARGE)(request)
        first = False
        return await say(begun(LARGE, len(LARGE) // 2), closes=False)(request)

    scene.s3.answer = answer
    try:
        yield
    finally:
        scene.s3.answer = give(LARGE)


EARLY: dict[int, dict[str, Any]] = {
    413: {"code": "model_rejected", "attempts": 1, "words": "the API answered 413: too much"},
    422: {"code": "model_rejected", "attempts": 1, "words": "the API answered 422: too much"},
    401: {"code": None, "attempts": 1},
    429: {"code": None, "attempts": 1},
    500: {"code": None, "attempts": 2},
}


@pytest.mark.parametrize("closes", [True, False], ids=["closing", "staying"])
@pytest.mark.parametrize("status", EARLY)
async def test_an_early_response_of_the_api_is_handled_like_a_normal_one(
    early_api: EarlyApiScene, status: int, closes: bool
) -> None:
    api, expected = early_api.api, EARLY[status]
    counted = early_api.worker.metric("vqa_model_requests_total", code=str(status))
    ambiguous = early_api.worker.metric("vqa_ambiguous_calls_total")
    more = ["Retry-After: 0.1", *(["Connection: close"] if closes else [])]
    api.says, api.closes = answered(status, {"error": {"message": "too much"}}, *more), closes
    api.bodies.clear()
    async with half_an_image(early_api):
        reply = await early_api.client.ask(question="What is it?", images=[f"s3://{BUCKET}/it.png"])
    assert (reply.body["error"] or {}).get("code") == expected["code"], reply.body
    assert reply.body["attempts"] == expected["attempts"]
    assert expected.get("words", "") in (reply.body["error"] or {}).get("message", "")
    assert early_api.worker.metric("vqa_model_requests_total", code=str(status)) == counted + 1
    assert early_api.worker.metric("vqa_ambiguous_calls_total") == ambiguous
    # The read of the image is cancelled.
    await until(lambda: early_api.s3.at_once == 0, "the read is cancelled")
    # The next job does not get a connection with an incomplete request.
    reply = await early_api.client.ask(question="What is it?", images=[f"s3://{BUCKET}/it.png"])
    assert reply.body["answer"] == "A cat."
    sent = json.loads(api.bodies[-1])["messages"][0]["content"][0]["image_url"]["url"]
    assert sent == data_url(LARGE)
