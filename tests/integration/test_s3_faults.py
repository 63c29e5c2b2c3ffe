"""S3 is unreachable, denies access, or is interrupted in the middle of an image."""

import asyncio
import itertools
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from io import BytesIO

import pytest
from aiohttp import web
from PIL import Image

from deploy.local.model_simulator.behavior import Error
from deploy.local.stack import Stack
from tests.breaking import events, hasty, publish, results, said
from tests.conftest import BUCKET, MakeClient, StartWorker, picture
from tests.fake_s3 import Answer, FakeS3, give, refuse
from tests.proxy import Proxy
from tests.running import Client, Worker, calls_with, until

PICTURE_BYTES = 100_000
PAGE = b"<html><head><title>A proxy</title></head></html>"


def put(stack: Stack) -> str:
    """Upload an image of noise, which does not compress; return its URL."""
    buffer = BytesIO()
    Image.effect_noise((400, 400), 100).save(buffer, "PNG")
    assert len(buffer.getvalue()) > PICTURE_BYTES
    key = f"{uuid.uuid4().hex}.png"
    stack.s3.client().put_object(Bucket=BUCKET, Key=key, Body=buffer.getvalue())
    return f"s3://{BUCKET}/{key}"


@dataclass(frozen=True)
class Scene:
    """A worker, its publisher, and the network between the worker and S3."""

    stack: Stack
    worker: Worker
    client: Client
    proxy: Proxy


@pytest.fixture(scope="module")
async def scene(own_stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    async with Proxy.before(own_stack.s3.endpoint_url) as proxy:
        worker = Worker.of(
            own_stack,
            tmp_path_factory.mktemp("s3"),
            VQA_S3_ENDPOINT_URL=proxy.url(own_stack.s3.endpoint_url),
            VQA_JOB_TIMEOUT="2.5",
        )
        try:
            await worker.start()
            async with Client.of(own_stack, worker) as client:
                yield Scene(own_stack, worker, client, proxy)
        finally:
            worker.kill()


async def ask(scene: Scene, image: str) -> tuple[str, int]:
    """The outcome of a job, and its number of attempts."""
    (reply,) = await results(scene.client, await publish(scene.client, 1, "What is it?", image=image))
    return (reply.body["error"] or {}).get("code", reply.body["status"]), reply.body["attempts"]


async def test_jobs_wait_while_s3_is_down_and_lose_no_attempt(own_stack: Stack, scene: Scene) -> None:
    image, marker = put(own_stack), uuid.uuid4().hex
    worker, client = scene.worker, scene.client
    # With the proxy, the port would still be open.
    await scene.proxy.refuse()
    await asyncio.to_thread(own_stack.s3.stop)
    scene.proxy.reset()
    try:
        ids = await publish(client, 8, marker, image=image)
        status, reasons = await said(worker, "paused")
        assert status == 200
        assert [reason.partition(":")[0] for reason in reasons] == ["s3"]
        assert worker.metric("vqa_dependency_up", dependency="s3") == 0
        assert worker.metric("vqa_dependency_up", dependency="model") == 1
        await until(lambda: client.depth(worker.jobs_queue), "jobs are requeued")
    finally:
        await asyncio.to_thread(own_stack.s3.start)
        await scene.proxy.accept()
    replies = await results(client, ids)

    assert {(reply.body["status"], reply.body["attempts"]) for reply in replies} == {("succeeded", 1)}
    assert len(calls_with(own_stack, marker)) == 8
    assert [event["dependency"] for event in events(worker, "consumption_paused")] == ["s3"]
    assert worker.ready() == (200, {"status": "ready", "reasons": []})
    assert worker.metric("vqa_dependency_up", dependency="s3") == 1
    assert await client.depth(worker.jobs_queue) == await client.depth(worker.dead_letter_queue) == 0


async def test_wrong_credentials_pause_the_worker_and_another_worker_answers_the_jobs(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    wrong = await start_own_worker(AWS_SECRET_ACCESS_KEY="not-the-secret-key")
    client = await own_client_of(wrong)
    ids = await publish(client, 3, "What is it?", image=put(own_stack))
    status, (reason,) = await said(wrong, "paused")
    assert status == 200
    assert "SignatureDoesNotMatch" in reason
    assert "AWS credentials" in reason
    assert client.replies == {}

    right = await start_own_worker(wait=False, like=wrong, VQA_DELIVERY_LIMIT="1")
    assert await wrong.stop() == 0
    await right.start()
    replies = await results(client, ids)
    assert {(reply.body["status"], reply.body["attempts"]) for reply in replies} == {("succeeded", 1)}
    assert "not-the-secret-key" not in wrong.output()


@pytest.mark.parametrize("politely", [False, True], ids=["reset", "truncated"])
async def test_an_interrupted_image_is_read_again(scene: Scene, *, politely: bool) -> None:
    image = put(scene.stack)
    scene.proxy.cuts_politely, scene.proxy.cut_after = politely, PICTURE_BYTES // 2
    # A pooled connection would not be interrupted.
    scene.proxy.reset()
    retries = scene.worker.metric("vqa_retries_total", reason="connection_error")
    asked = asyncio.create_task(ask(scene, image))
    try:
        await until(
            lambda: scene.worker.metric("vqa_retries_total", reason="connection_error") > retries, "a retry"
        )
    finally:
        scene.proxy.cut_after = None
    status, attempts = await asked

    assert status == "succeeded"
    assert attempts >= 2
    assert scene.worker.ready()[1]["status"] == "ready"


async def test_a_slow_network_only_delays_jobs(scene: Scene) -> None:
    scene.proxy.delay_s = 0.1
    try:
        status, _ = await ask(scene, put(scene.stack))
        assert status == "succeeded"
    finally:
        scene.proxy.delay_s = 0


async def test_a_missing_object_is_not_a_failure_of_s3(scene: Scene) -> None:
    for _ in range(6):
        assert await ask(scene, f"s3://{BUCKET}/{uuid.uuid4().hex}") == ("image_not_found", 1)
    assert scene.worker.ready()[1]["status"] == "ready"


async def test_an_unresponsive_s3_uses_no_attempt(scene: Scene) -> None:
    images = [put(scene.stack) for _ in range(5)]
    pauses = len(events(scene.worker, "consumption_paused"))
    scene.proxy.freeze()
    try:
        ids = [(await publish(scene.client, 1, "What is it?", image=image))[0] for image in images]
        _, (reason,) = await said(scene.worker, "paused")
        assert "different jobs in a row failed: timeout" in reason
    finally:
        scene.proxy.thaw()
    replies = await results(scene.client, ids)
    assert {(reply.body["status"], reply.body["attempts"]) for reply in replies} == {("succeeded", 1)}
    assert len(events(scene.worker, "consumption_paused")) == pauses + 1


async def test_an_s3_that_hangs_during_a_read_blocks_neither_the_job_nor_the_stop(scene: Scene) -> None:
    """This is the last test of the scene: it stops the worker."""
    image = put(scene.stack)
    scene.proxy.freeze()
    timeouts = scene.worker.metric("vqa_retries_total", reason="timeout")
    ids = await publish(scene.client, 1, "What is it?", image=image)
    await until(lambda: scene.worker.metric("vqa_retries_total", reason="timeout") > timeouts, "a retry")
    # A thread still waits for S3.
    assert await scene.worker.stop(patience_s=60) == 0, scene.worker.output()
    scene.proxy.thaw()
    await scene.worker.start()
    (reply,) = await results(scene.client, ids)
    assert reply.body["status"] == "succeeded"
    assert reply.body["attempts"] >= 2


# Failures that a real S3 cannot be made to produce


@dataclass(frozen=True)
class FakedS3:
    """A worker with a fake S3, and its publisher."""

    stack: Stack
    worker: Worker
    client: Client
    s3: FakeS3

    async def publish(self, count: int, question: str, key: str = "") -> list[str]:
        """Publish jobs, each with its own image or all with the image of this key."""
        keys = [key or f"{uuid.uuid4().hex}.png" for _ in range(count)]
        return [(await publish(self.client, 1, question, image=f"s3://{BUCKET}/{each}"))[0] for each in keys]

    async def succeed(self, ids: list[str]) -> None:
        """Check that these jobs succeed without counted attempts."""
        replies = await results(self.client, ids)
        assert {(reply.body["status"], reply.body["attempts"]) for reply in replies} == {("succeeded", 1)}
        await said(self.worker, "ready")

    def pauses(self) -> list[str]:
        return [event["dependency"] for event in events(self.worker, "consumption_paused")]


@pytest.fixture(scope="module")
async def faked_s3(own_stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[FakedS3]:
    async with FakeS3.serving(picture()) as s3:
        worker = hasty(Worker.of(own_stack, tmp_path_factory.mktemp("faked_s3"), VQA_S3_ENDPOINT_URL=s3.url))
        try:
            await worker.start()
            async with Client.of(own_stack, worker) as client:
                yield FakedS3(own_stack, worker, client, s3)
            assert await worker.stop() == 0, worker.output()
        finally:
            worker.kill()


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (400, "ExpiredToken", "the credentials have expired"),
        (403, "InvalidAccessKeyId", "check the AWS credentials"),
        (403, "RequestTimeTooSkewed", "clock is wrong"),
        (403, "AccountProblem", "the account has a problem"),
        (503, "SlowDown", "S3 answered 503 SlowDown"),
        (500, "InternalError", "S3 answered 500 InternalError"),
        (400, "Throttling", "S3 answered 400 Throttling"),
        (429, "", "answered 429"),
        (408, "", "answered 408"),
        (409, "OperationAborted", "S3 answered 409 OperationAborted"),
        (425, "", "answered 425"),
        (301, "PermanentRedirect", "AWS_REGION or VQA_S3_ENDPOINT_URL"),
        (400, "AuthorizationHeaderMalformed", "the signature's region is wrong"),
        *[(status, "", "check VQA_S3_ENDPOINT_URL") for status in (301, 400, 401, 403, 404, 405)],
        (407, "", "the proxy requires a user name"),
        (403, "NeverHeardOf", "different jobs in a row failed: s3_refused, S3 answered 403 NeverHeardOf"),
        (400, "KMS.DisabledException", "is it disabled or deleted?"),
    ],
)
async def test_an_s3_that_denies_all_requests_pauses_the_worker_and_uses_no_attempt(
    faked_s3: FakedS3, status: int, code: str, says: str
) -> None:
    well, pauses = faked_s3.s3.answer, len(faked_s3.pauses())
    faked_s3.s3.answer = refuse(status, code) if code else give(PAGE, status)
    try:
        ids = await faked_s3.publish(6, "What is it?")
        http_status, (reason,) = await said(faked_s3.worker, "paused")
        assert http_status == 200
        assert reason.startswith("s3: ")
        assert says in reason
        assert faked_s3.worker.metric("vqa_dependency_up", dependency="s3") == 0
        assert faked_s3.client.replies.keys().isdisjoint(ids)
    finally:
        faked_s3.s3.answer = well
    await faked_s3.succeed(ids)
    assert faked_s3.pauses()[pauses:] == ["s3"]


async def test_a_throttled_queue_loses_no_job_and_no_attempt(faked_s3: FakedS3) -> None:
    """Every other request is throttled, with a status that is not a server error."""
    well, answered = faked_s3.s3.answer, itertools.count()

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        return await (well if next(answered) % 2 else refuse(400, "SlowDown"))(request)

    faked_s3.s3.answer = answer
    try:
        await faked_s3.succeed(await faked_s3.publish(60, "What is it?"))
    finally:
        faked_s3.s3.answer = well


WRONG_CHECKSUM = give(picture(), x_amz_checksum_crc32="AAAAAA==")


@pytest.mark.parametrize(
    ("answer", "code", "says"),
    [
        (refuse(404, "NoSuchBucket"), "image_not_found", "no bucket of this name"),
        (refuse(403, "InvalidObjectState"), "image_forbidden", "archived"),
        (refuse(403, "NeverHeardOf", message="Ask my owner."), "image_forbidden", "Ask my owner."),
        (refuse(400, "KMS.DisabledException"), "image_forbidden", "is it disabled or deleted?"),
        (WRONG_CHECKSUM, "image_corrupt", "checksum"),
        (give(PAGE, 404), "attempts_exhausted", "check VQA_S3_ENDPOINT_URL"),
        (refuse(500, "InternalError"), "attempts_exhausted", "S3 answered 500 InternalError"),
    ],
    ids=["bucket", "archived", "unknown", "KMS", "checksum", "page", "failing"],
)
async def test_one_object_among_good_ones_fails_alone_and_ends(
    faked_s3: FakedS3, answer: Answer, code: str, says: str
) -> None:
    well, bad = faked_s3.s3.answer, f"{uuid.uuid4().hex}.png"

    async def respond(request: web.BaseRequest) -> web.StreamResponse:
        return await (answer if bad in request.raw_path else well)(request)

    faked_s3.s3.answer = respond
    try:
        (bad_id,) = await faked_s3.publish(1, "What is it?", bad)
        good: list[str] = []
        while bad_id not in faked_s3.client.replies:
            good += await faked_s3.publish(5, "What is it?")
            await results(faked_s3.client, good)
    finally:
        faked_s3.s3.answer = well
    error = faked_s3.client.replies[bad_id][0].body["error"]
    assert error["code"] == code
    assert says in error["message"]
    await faked_s3.succeed(good)
    # The log has the reason, without the key.
    assert bad.removesuffix(".png") not in "".join(
        str(line.get("reason")) for line in events(faked_s3.worker, "job_finished")
    )


async def test_throttling_of_one_object_is_not_an_outage_and_uses_no_attempt(
    faked_s3: FakedS3,
) -> None:
    well, pauses, hot = faked_s3.s3.answer, len(faked_s3.pauses()), f"{uuid.uuid4().hex}.png"
    refused: list[str] = []

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        # One more than the retries of a read.
        if hot in request.raw_path and len(refused) < 4:
            refused.append(request.raw_path)
            return await refuse(503, "SlowDown")(request)
        return await well(request)

    await faked_s3.succeed(await faked_s3.publish(1, "What is it?"))
    faked_s3.s3.answer = answer
    try:
        # Several jobs share the read of the throttled object.
        ids = await faked_s3.publish(4, "What is it?", hot) + await faked_s3.publish(6, "What is it?")
        await faked_s3.succeed(ids)
    finally:
        faked_s3.s3.answer = well
    assert len(refused) == 4
    assert faked_s3.pauses()[pauses:] == []


async def test_any_number_of_denied_objects_is_not_an_outage(faked_s3: FakedS3) -> None:
    well, pauses = faked_s3.s3.answer, len(faked_s3.pauses())
    faked_s3.s3.answer = refuse(403, "AccessDenied")
    try:
        replies = await results(faked_s3.client, await faked_s3.publish(6, "What is it?"))
    finally:
        faked_s3.s3.answer = well
    assert {(reply.body["error"]["code"], reply.body["attempts"]) for reply in replies} == {
        ("image_forbidden", 1)
    }
    assert faked_s3.pauses()[pauses:] == []


async def test_two_outages_at_once_are_both_reported_and_both_waited_for(faked_s3: FakedS3) -> None:
    well, pauses, marker = faked_s3.s3.answer, len(faked_s3.pauses()), uuid.uuid4().hex
    faked_s3.s3.answer = refuse(403, "ExpiredToken")
    faked_s3.stack.model.play(Error(status=401), marker=marker, times=None)
    try:
        ids = await faked_s3.publish(2, marker)
        await said(faked_s3.worker, "paused")
        ids += await publish(faked_s3.client, 2, marker)

        def reasons() -> set[str]:
            return {reason.partition(":")[0] for reason in faked_s3.worker.ready()[1]["reasons"]}

        await until(lambda: reasons() == {"s3", "model"}, "both are reported")
        faked_s3.s3.answer = well
        await until(lambda: reasons() == {"model"}, "one outage ends")
    finally:
        faked_s3.s3.answer = well
        faked_s3.stack.model.configure(rules=[])
    await faked_s3.succeed(ids)
    assert faked_s3.pauses()[pauses:] == ["s3", "model"]
