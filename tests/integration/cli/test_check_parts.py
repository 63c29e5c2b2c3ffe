"""The checks of RabbitMQ, S3 and the API that `vqa-worker check` runs."""

import base64
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO

import aio_pika
import pytest
from aiohttp import web
from PIL import Image

from deploy.local.stack import Stack
from tests.breaking import BrokerUser, administer, own_vhost, url_as
from tests.conftest import BUCKET, PutImage
from tests.fake_s3 import Answer, FakeS3, give, refuse
from vqa_worker.rabbitmq import connection
from vqa_worker.rabbitmq.session import Session
from worker.cli.check import Finding
from worker.cli.check.api import RED_PNG, api_findings
from worker.cli.check.broker import broker_findings
from worker.cli.check.storage import storage_findings
from worker.cli.shell import broker_of
from worker.rabbitmq import permission_checks
from worker.rabbitmq.permission_checks import NotAllowedError, Probes
from worker.rabbitmq.topology import Part, Topology, create
from worker.settings import Settings, load_settings

Findings = dict[str, tuple[str, str]]
EXCHANGES = {"VQA_REPLY_EXCHANGE": "vqa.replies", "VQA_JOBS_EXCHANGE": "vqa.back"}


@dataclass
class Checks:
    """Return checks of an empty virtual host and of the stack's S3 and model."""

    environment: Mapping[str, str]
    monkeypatch: pytest.MonkeyPatch

    def settings(self, **changed: str) -> Settings:
        for name in os.environ:
            if name.startswith(("VQA_", "AWS_")):
                self.monkeypatch.delenv(name)
        for name, text in {**self.environment, **changed}.items():
            self.monkeypatch.setenv(name, text)
        return load_settings(env_file=None)

    async def broker(self, **changed: str) -> Findings:
        settings = self.settings(**changed)
        return await collected(broker_findings(settings, broker_of(settings), 15.0))

    async def storage(self, *images: str, **changed: str) -> Findings:
        return await collected(storage_findings(self.settings(**changed), images))

    async def api(self, *, ask: bool = False, **changed: str) -> Findings:
        return await collected(api_findings(self.settings(**changed), ask=ask))

    async def make(self, **changed: str) -> None:
        """Create the queues and exchanges of the settings."""
        settings = self.settings(**changed)
        topology = Topology.from_settings(settings)
        await Session.once(broker_of(settings), 15.0, lambda it: create(it, topology))


async def collected(findings: AsyncIterator[Finding]) -> Findings:
    """Return status and message by check."""
    return {it.check: (it.status, it.message) async for it in findings}


def failures(findings: Findings) -> list[str]:
    return [check for check, (status, _) in findings.items() if status == "failed"]


@pytest.fixture
def vhost(stack: Stack) -> Iterator[str]:
    with own_vhost(stack) as name:
        yield name


@pytest.fixture
def doctor(stack: Stack, vhost: str, monkeypatch: pytest.MonkeyPatch) -> Checks:
    url = url_as(stack, "guest", "guest", vhost)
    queues = {"VQA_JOBS_QUEUE": "jobs", "VQA_RESULTS_QUEUE": "results"}
    changed = {"VQA_RABBITMQ_URL": url, "VQA_ALLOWED_BUCKETS": BUCKET, "VQA_RETRY_DELAYS": "1"}
    return Checks({**stack.environment(), **queues, **changed}, monkeypatch)


def there(stack: Stack, vhost: str) -> object:
    """Return the definitions of a virtual host."""
    return administer(stack, "GET", f"/api/definitions/{vhost}")


# The broker


async def test_missing_queues_are_reported_and_not_created(stack: Stack, doctor: Checks, vhost: str) -> None:
    before = there(stack, vhost)
    findings = await doctor.broker()
    for part in (
        "queue jobs",
        "queue results",
        "queue jobs.dead",
        "queue jobs.retry.1s",
        "exchange jobs.control",
    ):
        assert findings[part] == (
            "warning",
            "does not exist yet. Start a worker or run `vqa-worker topology apply`.",
        )
    checked_only = await doctor.broker(VQA_DECLARE_TOPOLOGY="false", **EXCHANGES)
    assert checked_only["queue jobs"] == ("failed", "does not exist. Run `vqa-worker topology apply`.")
    assert checked_only["exchange jobs.control"][0] == "warning"
    assert checked_only["exchange vqa.replies (VQA_REPLY_EXCHANGE)"][0] == "failed"
    assert there(stack, vhost) == before


STREAM = ("failed", "queue jobs is a stream, which keeps the jobs")
SINGLE = ("warning", "single active consumer: only one worker at a time gets jobs")


@pytest.mark.parametrize("permitted", [True, False])
@pytest.mark.parametrize(
    ("arguments", "waiting", "expected"),
    [
        ({"x-queue-type": "stream"}, 0, STREAM),
        ({"x-queue-type": "quorum", "x-single-active-consumer": True}, 0, SINGLE),
        ({"x-queue-type": "quorum", "x-single-active-consumer": True}, 1, SINGLE),
        ({"x-queue-type": "quorum"}, 0, None),
        ({"x-queue-type": "quorum"}, 1, None),
        ({}, 0, None),
        ({"x-max-priority": 10, "x-expires": 900_000}, 1, None),
    ],
)
async def test_a_jobs_queue_that_others_declared_is_checked_for_its_type(
    stack: Stack,
    doctor: Checks,
    vhost: str,
    arguments: dict[str, str | bool | int],
    waiting: int,
    expected: tuple[str, str] | None,
    *,
    permitted: bool,
) -> None:
    with BrokerUser.of(stack, vhost=vhost, configure=".*" if permitted else "^$") as user:
        async with await aio_pika.connect(doctor.environment["VQA_RABBITMQ_URL"]) as connection:
            channel = await connection.channel()
            await channel.declare_queue("jobs", durable=True, arguments=dict(arguments))
            for _ in range(waiting):
                await channel.default_exchange.publish(aio_pika.Message(b"{}"), "jobs")
            before = there(stack, vhost)
            findings = await doctor.broker(VQA_RABBITMQ_URL=user.url, VQA_DECLARE_TOPOLOGY="false")
            assert there(stack, vhost) == before
            queue = await channel.get_queue("jobs", ensure=False)
            if waiting and expected is None:
                message = await queue.get()
                assert not message.redelivered
    assert findings["broker"][0] == "ok"
    kind = findings.get("type of queue jobs")
    if expected is None or (waiting and not permitted):
        # A user who may not declare it sees the type of an empty queue only.
        assert kind is None
    else:
        assert kind is not None
        assert (kind[0], kind[1][: len(expected[1])]) == expected


async def test_missing_consumers_and_dead_letters_are_warnings(doctor: Checks) -> None:
    await doctor.make()
    async with await aio_pika.connect(doctor.environment["VQA_RABBITMQ_URL"]) as connection:
        channel = await connection.channel()
        for queue in ("jobs", "jobs.dead"):
            await channel.default_exchange.publish(aio_pika.Message(b"{}"), queue)
        findings = await doctor.broker()
        jobs = await channel.declare_queue("jobs", passive=True)
        assert jobs.declaration_result.message_count == 1
        message = await jobs.get()
        assert not message.redelivered
        await message.nack()
    state = "1 ready, 0 consumers; arguments OK"
    assert findings["queue jobs"] == ("warning", f"{state}. Start a worker.")
    assert findings["queue jobs.dead"] == ("warning", f"{state}. Run `vqa-worker dlq list`.")


async def test_a_queue_with_other_arguments_is_reported_with_the_difference(
    stack: Stack, doctor: Checks, vhost: str
) -> None:
    classic = {"durable": True, "arguments": {}}
    administer(stack, "PUT", f"/api/queues/{vhost}/jobs", classic)
    status, message = (await doctor.broker())["queue jobs"]
    assert status == "failed"
    assert "inequivalent arg 'x-" in message
    assert message.endswith("Delete it, change it with a policy, or configure another name.")
    lenient = await doctor.broker(VQA_DECLARE_TOPOLOGY="false")
    assert lenient["queue jobs"][0] == "warning"


async def test_each_missing_permission_is_reported(stack: Stack, doctor: Checks, vhost: str) -> None:
    await doctor.make(**EXCHANGES)
    with BrokerUser.of(stack, vhost=vhost) as user:
        limited = {"VQA_RABBITMQ_URL": user.url, **EXCHANGES}
        # The documented permissions of a worker that only checks the topology.
        user.permit(configure=r"^amq\.gen", write=r"^(vqa\..*|amq\.gen.*)$", read=r"^(jobs.*|amq\.gen.*)$")
        findings = await doctor.broker(VQA_DECLARE_TOPOLOGY="false", **limited)
        assert failures(findings) == []
        assert findings["queue jobs"][0] == "ok"
        assert findings["queue jobs"][1].endswith("; arguments not checked (this user may not declare it)")
        assert findings["permission to publish results"] == ("ok", "granted")
        assert findings["permission to publish to vqa.results.*"] == ("ok", "granted")
        assert findings["permission to receive cancellations"] == ("ok", "granted")

        user.permit(configure="^$", write="^$", read="^results$")
        findings = await doctor.broker(**limited)
        assert {
            "queue jobs",
            "permission to consume jobs",
            "permission to publish results",
            "permission to requeue jobs",
        } < set(failures(findings))
        assert all("lacks a permission" in findings[check][1] for check in failures(findings))
        assert "VQA_DECLARE_TOPOLOGY=false" in findings["queue jobs"][1]
        assert findings["exchange jobs.control"][0] == "warning"
        assert findings["permission to receive cancellations"][0] == "warning"


async def test_a_queue_hidden_from_the_user_is_not_reported_as_missing(
    doctor: Checks, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in RabbitMQ 4.3, here for every version.
    async def find(_: Probes, part: Part) -> None:
        raise NotAllowedError(f"{part} is not for you")

    await doctor.make()
    monkeypatch.setattr(Probes, "find", find)
    findings = await doctor.broker(VQA_DECLARE_TOPOLOGY="false")
    assert findings["queue jobs"] == ("skipped", "hidden from this user: queue jobs is not for you")
    assert failures(findings) == []
    assert findings["permission to consume jobs"] == ("ok", "granted")
    assert findings["permission to receive cancellations"] == ("ok", "granted")
    declaring = await doctor.broker()
    assert declaring["queue jobs"] == (
        "failed",
        "queue jobs is not for you; or set VQA_DECLARE_TOPOLOGY=false",
    )
    assert declaring["exchange jobs.control"][0] == "warning"


# S3


async def test_unreadable_buckets_and_images_are_reported(
    stack: Stack, doctor: Checks, put_image: PutImage
) -> None:
    large, text = put_image(), put_image(b"not an image")
    others = (f"s3://{BUCKET}/no", "s3://other/k", "http://x/y", "https://x/y", "data:image/png;base64,AA==")
    limits = {
        "VQA_ALLOWED_BUCKETS": f"{BUCKET},missing,cat-*",
        "VQA_MAX_IMAGE_BYTES": "20",
        "VQA_MAX_SOURCE_BYTES": "20",
    }
    findings = await doctor.storage(large, text, *others, **limits)
    assert findings["bucket missing"][1].startswith("does not exist. Check VQA_ALLOWED_BUCKETS")
    assert "bytes; VQA_MAX_SOURCE_BYTES allows 20" in findings[f"image {large}"][1]
    assert findings[f"image {text}"] == ("failed", "the content is plain text: check the URL or the key")
    assert "no such object" in findings[f"image s3://{BUCKET}/no"][1]
    assert "bucket other is not in VQA_ALLOWED_BUCKETS" in findings["image s3://other/k"][1]
    assert findings["image http://x/y"][0] == "failed"
    assert findings["image data: URL"][0] == "failed"
    assert findings["image https://x/y"] == ("ok", "allowed; the API fetches it")
    any_bucket = await doctor.storage(VQA_ALLOWED_BUCKETS="*")
    assert any_bucket["S3"] == ("ok", f"{stack.s3.endpoint_url} accepts the credentials")
    wildcards = "*: wildcards. To check a bucket, use --image s3://bucket/key."
    assert any_bucket["buckets"] == ("skipped", wildcards)
    assert (await doctor.storage(AWS_CA_BUNDLE="/no/such/file"))["S3"][1].startswith("AWS_CA_BUNDLE")


async def test_the_check_of_an_image_says_what_would_be_sent(doctor: Checks, put_image: PutImage) -> None:
    buffer = BytesIO()
    Image.new("RGB", (1024, 768)).save(buffer, "BMP")
    scan, photo = put_image(buffer.getvalue()), put_image()
    model = {"VQA_MODEL": "qwen2.5-vl-7b", "VQA_ALLOWED_MODELS": "qwen2.5-vl-7b"}
    findings = await doctor.storage(scan, photo, VQA_IMAGE_MAX_EDGE="560", **model)
    assert findings[f"image {scan}"][0] == "ok"
    assert findings[f"image {scan}"][1].startswith("image/bmp, 2,359,350 bytes; sent as image/")
    assert findings[f"image {scan}"][1].endswith("bytes, 560 × 420, about 302 tokens")
    assert findings[f"image {photo}"][1].endswith("48 × 32, about 8 tokens; sent unchanged")


async def test_a_bucket_that_cannot_be_listed_is_a_warning(doctor: Checks) -> None:
    async with FakeS3.serving(b"") as s3:
        s3.answer = refuse(403, "AccessDenied")
        findings = await doctor.storage(VQA_S3_ENDPOINT_URL=s3.url)
        any_bucket = await doctor.storage(VQA_S3_ENDPOINT_URL=s3.url, VQA_ALLOWED_BUCKETS="*")
    assert any_bucket["S3"][0] == "warning"
    status, message = findings[f"bucket {BUCKET}"]
    assert status == "warning"
    assert f"--image s3://{BUCKET}/key" in message


async def test_an_unusable_result_store_is_reported_with_the_reason(doctor: Checks) -> None:
    async with FakeS3.serving(b"") as s3:
        store = {"VQA_S3_ENDPOINT_URL": s3.url, "VQA_RESULT_STORE": f"s3://{BUCKET}/answers"}
        s3.answer = refuse(404, "NoSuchBucket")
        missing = await doctor.storage(**store)
        assert missing["result store"][1].startswith("VQA_RESULT_STORE: S3 answered 404 NoSuchBucket")
        # Like a store that ignores preconditions.
        s3.answer = give(b"check", ETag='"1"')
        findings = await doctor.storage(**store)
        assert findings["result store"][1].startswith("VQA_RESULT_STORE: it ignores If-None-Match")
        assert s3.asked[-1].method == "DELETE"


async def test_large_results_that_cannot_be_written_are_reported_with_the_reason(doctor: Checks) -> None:
    async with FakeS3.serving(b"") as s3:
        settings = {"VQA_S3_ENDPOINT_URL": s3.url, "VQA_LARGE_RESULTS": f"s3://{BUCKET}/large"}
        assert (await doctor.storage(**settings))["large results"] == ("ok", "objects can be written")
        s3.answer = refuse(403, "AccessDenied")
        status, message = (await doctor.storage(**settings))["large results"]
    assert status == "failed"
    assert message.startswith(
        "VQA_LARGE_RESULTS: S3 answered 403 AccessDenied: the worker must be allowed to put"
    )


@pytest.mark.parametrize(
    ("answers", "reported"),
    [
        ({"PUT": refuse(412, "PreconditionFailed")}, "it does not return the object that was written"),
        ({"GET": give(b"other", ETag='"1"')}, "it does not return the object that was written"),
        ({"list": give(b"<ListBucketResult/>")}, "a new object is not listed"),
    ],
)
async def test_a_result_store_that_differs_from_s3_is_reported_with_the_difference(
    doctor: Checks, answers: Mapping[str, Answer], reported: str
) -> None:
    put: list[str] = []

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        """Respond like a store with one defect."""
        kind = "list" if "list-type" in request.rel_url.query else request.method
        if kind in answers:
            return await answers[kind](request)
        if kind == "PUT" and request.headers.get("If-None-Match") and put:
            return await refuse(412, "PreconditionFailed")(request)
        if kind == "PUT":
            put.append(request.path)
        return await give(b"check", ETag='"1"')(request)

    async with FakeS3.serving(b"") as s3:
        s3.answer = answer
        findings = await doctor.storage(VQA_S3_ENDPOINT_URL=s3.url, VQA_RESULT_STORE=f"s3://{BUCKET}/answers")
    status, message = findings["result store"]
    assert (status, message) == (
        "failed",
        f"VQA_RESULT_STORE: {reported}. Use an S3 service with conditional writes.",
    )


# The API


async def test_an_api_without_a_list_of_models_is_checked_with_a_question(doctor: Checks) -> None:
    async def answer(request: web.BaseRequest) -> web.Response:
        if request.path == "/v1/chat/completions":
            return web.json_response({"choices": [{"message": {"content": "Red."}, "finish_reason": "stop"}]})
        return web.Response(status=404)

    async with FakeS3.serving(b"") as api:
        api.answer = answer
        no_extra_cli = f"{api.url}/v1"
        findings = await doctor.api(VQA_MODEL_BASE_URL=no_extra_cli)
        assert findings["model API"][0] == "skipped"
        assert findings["model API"][1].endswith("lists no models. Check the model with --ask.")
        findings = await doctor.api(ask=True, VQA_MODEL_BASE_URL=no_extra_cli)
    assert findings["question to simulated/vision"][1].endswith(" s, no token usage reported")
    assert not any(check.startswith("model other") for check in findings)


def test_the_image_of_the_question_is_a_valid_png() -> None:
    image = Image.open(BytesIO(base64.b64decode(RED_PNG)))
    image.load()
    assert (image.format, image.size, image.getcolors()) == ("PNG", (64, 64), [(64 * 64, (255, 0, 0))])


async def test_a_resource_alarm_is_reported(
    own_stack: Stack, doctor: Checks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(permission_checks, "ANSWER_TIMEOUT_S", 1.0)
    monkeypatch.setattr(connection, "CONNECT_TIMEOUT_S", 1.0)
    await doctor.make(VQA_RABBITMQ_URL=own_stack.rabbitmq.url)
    own_stack.rabbitmq.ctl("set_vm_memory_high_watermark", "absolute", "1")
    try:
        findings = await doctor.broker(VQA_RABBITMQ_URL=own_stack.rabbitmq.url)
    finally:
        own_stack.rabbitmq.ctl("set_vm_memory_high_watermark", "0.9")
    assert findings["publishing"] == ("failed", permission_checks.BLOCKED)
    assert findings["permission to receive cancellations"][0] == "ok"
