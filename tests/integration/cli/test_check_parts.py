"""What `vqa-worker check` says of the broker, S3 and the API, asked in this process."""

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
from worker.cli.check.api import api_findings, red_square
from worker.cli.check.broker import broker_findings
from worker.cli.check.finding import Finding
from worker.cli.check.storage import storage_findings
from worker.cli.shell import broker_of
from worker.rabbitmq import connection, permission_checks
from worker.rabbitmq.permission_checks import NotAllowedError, Probes
from worker.rabbitmq.session import Session
from worker.rabbitmq.topology import Part, Topology, create
from worker.settings import Settings, load_settings

Findings = dict[str, tuple[str, str]]
EXCHANGES = {"VQA_REPLY_EXCHANGE": "vqa.replies", "VQA_JOBS_EXCHANGE": "vqa.back"}
FAR = "http://127.0.0.1:1"


@dataclass
class Doctor:
    """Looks at a virtual host of its own, where nothing is, and at the stack's S3 and model."""

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
        return await gathered(broker_findings(settings, broker_of(settings), 15.0))

    async def storage(self, *images: str, **changed: str) -> Findings:
        return await gathered(storage_findings(self.settings(**changed), images))

    async def api(self, *, ask: bool = False, **changed: str) -> Findings:
        return await gathered(api_findings(self.settings(**changed), ask=ask))

    async def make(self, **changed: str) -> None:
        """The queues and exchanges of these settings."""
        settings = self.settings(**changed)
        topology = Topology.from_settings(settings)
        await Session.once(broker_of(settings), 15.0, lambda it: create(it, topology))


async def gathered(findings: AsyncIterator[Finding]) -> Findings:
    """Status and message by what was looked at."""
    return {it.check: (it.status, it.message) async for it in findings}


def troubles(findings: Findings) -> list[str]:
    return [check for check, (status, _) in findings.items() if status == "failed"]


@pytest.fixture
def vhost(stack: Stack) -> Iterator[str]:
    with own_vhost(stack) as name:
        yield name


@pytest.fixture
def doctor(stack: Stack, vhost: str, monkeypatch: pytest.MonkeyPatch) -> Doctor:
    url = url_as(stack, "guest", "guest", vhost)
    queues = {"VQA_JOBS_QUEUE": "jobs", "VQA_RESULTS_QUEUE": "results"}
    changed = {"VQA_RABBITMQ_URL": url, "VQA_ALLOWED_BUCKETS": BUCKET, "VQA_RETRY_DELAYS": "1"}
    return Doctor({**stack.environment(), **queues, **changed}, monkeypatch)


def there(stack: Stack, vhost: str) -> object:
    """All that is in a virtual host, as its administrator sees it."""
    return administer(stack, "GET", f"/api/definitions/{vhost}")


# The broker


async def test_what_is_not_there_yet_is_told_and_not_made(stack: Stack, doctor: Doctor, vhost: str) -> None:
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
            "does not exist yet: a worker makes it at its start, or `vqa-worker topology apply`",
        )
    checked_only = await doctor.broker(VQA_DECLARE_TOPOLOGY="false", **EXCHANGES)
    assert checked_only["queue jobs"] == ("failed", "does not exist: `vqa-worker topology apply` makes it")
    assert checked_only["exchange jobs.control"][0] == "warning"
    assert checked_only["exchange vqa.replies (VQA_REPLY_EXCHANGE)"][0] == "failed"
    assert there(stack, vhost) == before


async def test_jobs_that_nobody_takes_and_dead_letters_are_told(doctor: Doctor) -> None:
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
    assert findings["queue jobs"][1] == "1 waiting, 0 consumers; as the worker needs it"
    assert findings["workers"] == ("warning", "none takes jobs from jobs at the moment")
    assert findings["dead letters"] == ("warning", "1 letter on jobs.dead: `vqa-worker dlq list`")


async def test_a_queue_with_other_arguments_is_told_with_the_difference(
    stack: Stack, doctor: Doctor, vhost: str
) -> None:
    classic = {"durable": True, "arguments": {}}
    administer(stack, "PUT", f"/api/queues/{vhost}/jobs", classic)
    status, message = (await doctor.broker())["queue jobs"]
    assert status == "failed"
    assert "inequivalent arg 'x-" in message
    assert message.endswith("delete it, change it by a policy, or name another")
    lenient = await doctor.broker(VQA_DECLARE_TOPOLOGY="false")
    assert lenient["queue jobs"][0] == "warning"


async def test_rights_that_are_missing_are_told_one_by_one(stack: Stack, doctor: Doctor, vhost: str) -> None:
    await doctor.make(**EXCHANGES)
    with BrokerUser.of(stack, vhost=vhost) as user:
        limited = {"VQA_RABBITMQ_URL": user.url, **EXCHANGES}
        # As docs would have it for a worker that only checks.
        user.permit(configure=r"^amq\.gen", write=r"^(vqa\..*|amq\.gen.*)$", read=r"^(jobs.*|amq\.gen.*)$")
        findings = await doctor.broker(VQA_DECLARE_TOPOLOGY="false", **limited)
        assert troubles(findings) == []
        assert findings["queue jobs"][1].endswith(
            "(its arguments were not compared: this user may not declare it)"
        )
        assert findings["right to publish results"] == ("ok", "granted by exchange vqa.replies")
        assert findings["direct reply-to"][0] == "skipped"
        assert findings["cancellations"] == ("ok", "can be heard")

        user.permit(configure="^$", write="^$", read="^results$")
        findings = await doctor.broker(**limited)
        assert {
            "queue jobs",
            "right to take jobs",
            "right to publish results",
            "right to publish jobs back",
        } < set(troubles(findings))
        assert all("lacks a permission" in findings[check][1] for check in troubles(findings))
        assert "VQA_DECLARE_TOPOLOGY=false" in findings["queue jobs"][1]
        assert findings["exchange jobs.control"][0] == "warning"
        assert findings["cancellations"][0] == "warning"


async def test_what_the_broker_does_not_show_is_not_taken_for_missing(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As RabbitMQ 4.3 does: here every version.
    async def find(_: Probes, part: Part) -> None:
        raise NotAllowedError(f"{part} is not for you")

    await doctor.make()
    monkeypatch.setattr(Probes, "find", find)
    findings = await doctor.broker(VQA_DECLARE_TOPOLOGY="false")
    assert findings["queue jobs"] == ("skipped", "this user may not look for it: queue jobs is not for you")
    assert troubles(findings) == []
    assert findings["right to take jobs"] == ("ok", "granted")
    assert findings["cancellations"] == ("ok", "can be heard")
    declaring = await doctor.broker()
    assert declaring["queue jobs"] == (
        "failed",
        "queue jobs is not for you; or set VQA_DECLARE_TOPOLOGY=false",
    )
    assert declaring["exchange jobs.control"][0] == "skipped"


# S3


async def test_buckets_and_images_that_cannot_be_had_are_told(
    stack: Stack, doctor: Doctor, put_image: PutImage
) -> None:
    large, text = put_image(), put_image(b"no picture at all")
    others = (f"s3://{BUCKET}/no", "s3://other/k", "http://x/y", "https://x/y", "data:image/png;base64,AA==")
    limits = {"VQA_ALLOWED_BUCKETS": f"{BUCKET},missing,cat-*", "VQA_MAX_IMAGE_BYTES": "20"}
    findings = await doctor.storage(large, text, *others, **limits)
    assert findings["bucket missing"][1].startswith("does not exist: check VQA_ALLOWED_BUCKETS")
    assert "VQA_MAX_IMAGE_BYTES allows 20" in findings[f"image {large}"][1]
    assert findings[f"image {text}"] == ("failed", "is neither JPEG nor PNG nor WebP")
    assert "no such object" in findings[f"image s3://{BUCKET}/no"][1]
    assert "bucket other is not in VQA_ALLOWED_BUCKETS" in findings["image s3://other/k"][1]
    assert findings["image http://x/y"][0] == "failed"
    assert findings["image data: URL"] == ("skipped", "is in the job itself")
    assert findings["image https://x/y"] == ("ok", "is allowed, and left to the API to fetch")
    any_bucket = await doctor.storage(VQA_ALLOWED_BUCKETS="*")
    assert any_bucket["buckets"] == ("skipped", "*: name an object to try, --image s3://bucket/key")
    assert stack.s3.endpoint_url in any_bucket["S3"][1]


async def test_an_s3_that_refuses_or_is_away_is_told(doctor: Doctor) -> None:
    findings = await doctor.storage(AWS_SECRET_ACCESS_KEY="wrong")
    assert "the secret key is wrong" in findings[f"bucket {BUCKET}"][1]
    findings = await doctor.storage(VQA_S3_ENDPOINT_URL=FAR)
    assert "S3 cannot be reached" in findings[f"bucket {BUCKET}"][1]
    nobody = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_EC2_METADATA_DISABLED": "true"}
    findings = await doctor.storage(**nobody)
    assert findings["S3"][1].startswith("there are no AWS credentials")
    findings = await doctor.storage(AWS_CA_BUNDLE="/no/such/file")
    assert "AWS_CA_BUNDLE" in findings["S3"][1]


async def test_an_s3_that_neither_gives_nor_denies_is_told_as_such(doctor: Doctor) -> None:
    async with FakeS3.serving(b"") as s3:
        s3.answer = refuse(403, "AccessDenied")
        findings = await doctor.storage(VQA_S3_ENDPOINT_URL=s3.url)
    status, message = findings[f"bucket {BUCKET}"]
    assert status == "warning"
    assert f"--image s3://{BUCKET}/key" in message


async def test_a_result_store_that_cannot_be_used_is_told_with_the_reason(doctor: Doctor) -> None:
    async with FakeS3.serving(b"") as s3:
        store = {"VQA_S3_ENDPOINT_URL": s3.url, "VQA_RESULT_STORE": f"s3://{BUCKET}/answers"}
        s3.answer = refuse(404, "NoSuchBucket")
        missing = await doctor.storage(**store)
        assert missing["result store"][1].startswith("VQA_RESULT_STORE: S3 answered 404 NoSuchBucket")
        # Takes every condition for fulfilled, as stores do that do not know them.
        s3.answer = give(b"", ETag='"1"')
        findings = await doctor.storage(**store)
        assert findings["result store"][1].startswith("VQA_RESULT_STORE: it does not heed If-None-Match")
        assert s3.asked[-1].method == "DELETE"


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ({"PUT": refuse(412, "PreconditionFailed")}, "a new object was taken for an old one"),
        ({"GET": give(b"other", ETag='"1"')}, "what was put is not what is read"),
        ({"list": give(b"<ListBucketResult/>")}, "what was put is not listed"),
    ],
)
async def test_a_result_store_that_does_otherwise_than_s3_is_told_with_what_it_does(
    doctor: Doctor, answers: Mapping[str, Answer], told: str
) -> None:
    put: list[str] = []

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        """A store that does one thing only wrong."""
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
        f"VQA_RESULT_STORE: {told}: answers cannot be kept safely in such a store",
    )


# The API


async def test_an_api_that_refuses_or_has_not_the_model_is_told(stack: Stack, doctor: Doctor) -> None:
    wrong = await doctor.api(VQA_MODEL_API_KEY="wrong")
    assert wrong["model API"][1].endswith("the API answered 401: check the key in VQA_MODEL_API_KEY")
    far = await doctor.api(VQA_MODEL_BASE_URL=f"{FAR}/v1")
    assert "the model API cannot be reached" in far["model API"][1]
    names = "simulated/visio,simulated/vision-small"
    findings = await doctor.api(ask=True, VQA_MODEL="simulated/visio", VQA_ALLOWED_MODELS=names)
    assert findings["model simulated/visio"][1].endswith("did you mean simulated/vision?")
    assert findings["model simulated/vision-small"] == ("ok", "is there")
    assert findings["question to simulated/visio"][0] == "failed"
    assert stack.model_api.models[0] == "simulated/vision"


async def test_an_api_without_a_list_of_models_is_left_to_a_question(doctor: Doctor) -> None:
    async def answer(request: web.BaseRequest) -> web.Response:
        if request.path == "/v1/chat/completions":
            return web.json_response({"choices": [{"message": {"content": "Red."}, "finish_reason": "stop"}]})
        return web.Response(status=404)

    async with FakeS3.serving(b"") as api:
        api.answer = answer
        bare = f"{api.url}/v1"
        findings = await doctor.api(VQA_MODEL_BASE_URL=bare)
        assert findings["model API"][0] == "skipped"
        assert findings["model API"][1].endswith("--ask does")
        findings = await doctor.api(ask=True, VQA_MODEL_BASE_URL=bare)
    assert findings["question to simulated/vision"][1].endswith(" s, without telling the tokens")
    assert not any(check.startswith("model stand-in") for check in findings)


def test_the_picture_in_the_question_is_one() -> None:
    image = Image.open(BytesIO(red_square(64)))
    image.load()
    assert (image.format, image.size, image.getcolors()) == ("PNG", (64, 64), [(64 * 64, (255, 0, 0))])


async def test_a_broker_that_takes_no_messages_is_told(
    own_stack: Stack, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
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
    assert findings["cancellations"][0] == "ok"
