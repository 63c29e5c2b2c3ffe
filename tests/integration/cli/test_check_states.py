"""Broken dependencies: `vqa-worker check` and the worker itself name the same cause."""

import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import aio_pika
import pytest

from deploy.local.ports import PortBlock
from deploy.local.s3 import S3, Certificate
from deploy.local.stack import Stack
from tests.authority import Authority
from tests.breaking import BrokerUser, administer, job, own_vhost, said, url_as
from tests.conftest import BUCKET, MakeClient, PutImage, StartWorker
from tests.fake_s3 import FakeS3, refuse
from tests.integration.cli.running import Cli
from tests.running import Worker, until

CLOSED = "127.0.0.1:1"


@dataclass(frozen=True)
class Servers:
    """The working services, a TLS port, and an HTTP server that returns a page for every request."""

    stack: Stack
    tls: str
    pages: str

    def model(self, scheme: str, path: str) -> str:
        return f"{scheme}://{urlsplit(self.stack.model_api.base_url).netloc}{path}"

    def s3(self, scheme: str) -> str:
        return f"{scheme}://{urlsplit(self.stack.s3.endpoint_url).netloc}"


@pytest.fixture(scope="module")
def tls_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return host and port of a SeaweedFS that speaks TLS with a certificate of an unknown authority."""
    folder = tmp_path_factory.mktemp("tls")
    authority = Authority.made_in(folder / "authority")
    certificate = Certificate(authority.folder / "server.pem", authority.folder / "server.key")
    ports = PortBlock()
    server = S3(folder / "s3", ports, certificate)
    try:
        server.launch()
        server.wait_until_ready()
        yield urlsplit(server.https_endpoint_url or "").netloc
    finally:
        server.close()
        ports.close()


@pytest.fixture
async def servers(stack: Stack, tls_address: str) -> AsyncIterator[Servers]:
    async with FakeS3.serving(b"<html>Welcome</html>") as pages:
        yield Servers(stack, tls_address, urlsplit(pages.url).netloc)


@dataclass(frozen=True)
class State:
    """A broken dependency: the failing check and its message; the worker's reason, if it has other words."""

    name: str
    settings: Callable[[Servers], dict[str, str]]
    check: str
    message: str
    reason: str = ""


NOT_S3 = "without an S3 error code: check VQA_S3_ENDPOINT_URL (is it an S3 server, does the port need https?)"
NO_TLS = "no TLS at this port: does it need http://?"


def s3_at(url: str) -> dict[str, str]:
    return {"VQA_S3_ENDPOINT_URL": url}


def model_at(url: str) -> dict[str, str]:
    return {"VQA_MODEL_BASE_URL": url}


S3_STATES = [
    State(
        "unreachable", lambda _: s3_at(f"http://{CLOSED}"), "S3", "S3 cannot be reached: Connection refused"
    ),
    State("unknown host", lambda _: s3_at("http://s3.invalid"), "S3", "the host name cannot be resolved"),
    State(
        "wrong secret key",
        lambda _: {"AWS_SECRET_ACCESS_KEY": "x"},
        "S3",
        "SignatureDoesNotMatch: the secret key is wrong",
    ),
    State(
        "wrong access key",
        lambda _: {"AWS_ACCESS_KEY_ID": "x"},
        "S3",
        "InvalidAccessKeyId: the access key does not exist",
    ),
    State(
        "no keys",
        lambda _: {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_EC2_METADATA_DISABLED": "true"},
        "S3",
        "there are no AWS credentials",
    ),
    State("http to TLS", lambda it: s3_at(f"http://{it.tls}"), "S3", f"the server answered 400 {NOT_S3}"),
    State("https to plain", lambda it: s3_at(it.s3("https")), "S3", NO_TLS),
    State("unknown authority", lambda it: s3_at(f"https://{it.tls}"), "S3", "its certificate is not trusted"),
    State(
        "RabbitMQ's management",
        lambda it: s3_at(it.stack.rabbitmq.management_url),
        "S3",
        f"the server answered 404 {NOT_S3}",
    ),
    State(
        "the broker",
        lambda it: s3_at(f"http://{urlsplit(it.stack.rabbitmq.url).netloc.rpartition('@')[2]}"),
        "S3",
        "the answer is not HTTP",
    ),
]
MODEL_STATES = [
    State(
        "unreachable",
        lambda _: model_at(f"http://{CLOSED}/v1"),
        "model API",
        "the model API cannot be reached: Connection refused",
    ),
    State(
        "no /v1",
        lambda it: model_at(it.model("http", "")),
        "model API",
        "the API answered 404: check VQA_MODEL_BASE_URL",
    ),
    State(
        "wrong key",
        lambda _: {"VQA_MODEL_API_KEY": "wrong"},
        "model API",
        "the API answered 401: check the key in VQA_MODEL_API_KEY",
    ),
    State(
        "http to TLS",
        lambda it: model_at(f"http://{it.tls}/v1"),
        "model API",
        "the port expects TLS: change VQA_MODEL_BASE_URL to https://",
    ),
    State("https to plain", lambda it: model_at(it.model("https", "/v1")), "model API", NO_TLS),
    State(
        "S3",
        lambda it: model_at(f"{it.s3('http')}/v1"),
        "model API",
        "the API answered 405: check VQA_MODEL_BASE_URL",
    ),
    State(
        "a web page",
        lambda it: model_at(f"http://{it.pages}/v1"),
        "model API",
        "the API answered 200, but the body is not JSON",
    ),
    State(
        "no such model",
        lambda _: {"VQA_MODEL": "simulated/visio", "VQA_ALLOWED_MODELS": "simulated/visio"},
        "model simulated/visio",
        "not listed by the API. Check VQA_MODEL and VQA_ALLOWED_MODELS (did you mean simulated/vision?).",
        "that the model still exists",
    ),
]


@pytest.mark.parametrize(
    "state", [pytest.param(it, id=f"{it.check} {it.name}") for it in (*S3_STATES, *MODEL_STATES)]
)
async def test_check_fails_and_the_worker_pauses_for_the_same_cause(
    stack: Stack,
    servers: Servers,
    state: State,
    tmp_path: Path,
    start_worker: StartWorker,
    client_of: MakeClient,
    put_image: PutImage,
) -> None:
    changed = state.settings(servers)
    worker = await start_worker(**changed)
    cli = Cli(tmp_path, {**stack.environment(), "VQA_RETRY_DELAYS": "1", **queues(worker), **changed})
    found = await findings(cli, code=1)
    assert [name for name, (status, _) in found.items() if status == "failed"] == [state.check]
    assert state.message in found[state.check][1]
    client = await client_of(worker)
    for _ in range(3):
        image = {"image": put_image()} if state in S3_STATES else {}
        await client.publish(job(**image))
    _, reasons = await said(worker, "paused")
    assert (state.reason or state.message) in reasons[0]
    await until(lambda: (state.reason or state.message) in worker.output(), "the worker logs the cause")


def queues(worker: Worker) -> dict[str, str]:
    names = ("VQA_JOBS_QUEUE", "VQA_RESULTS_QUEUE")
    return {name: worker.environment[name] for name in names}


async def findings(cli: Cli, code: int) -> dict[str, tuple[str, str]]:
    """Return status and message by check."""
    return {
        it["check"]: (it["status"], it["message"])
        for it in await cli.run_json("check", "--timeout=1", code=code)
    }


# RabbitMQ


@dataclass(frozen=True)
class BrokerState:
    """A broker that a worker cannot use.

    Attributes:
        failed: the failing checks.
        message: of the first one, and of the worker.
        url: of the broker, of a user in a new virtual host.
        rights: of that user.
        settings: of the worker.
        create: whether the queues exist: as they should, or jobs as a classic queue.
        exits: whether the worker exits with 78; else it keeps trying.
    """

    name: str
    failed: tuple[str, ...]
    message: str
    url: Callable[[Servers, BrokerUser], str] = lambda _, user: user.url
    rights: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    create: Literal["", "right", "classic"] = ""
    exits: bool = True


QUEUES = ("queue jobs.dead", "queue results", "queue jobs", "queue jobs.retry.1s")
NO_DECLARE = {"VQA_DECLARE_TOPOLOGY": "false"}
BROKER_STATES = [
    BrokerState("unreachable", ("broker",), "[Errno 111] Conn", lambda *_: f"amqp://{CLOSED}/", exits=False),
    BrokerState(
        "amqp to TLS",
        ("broker",),
        "does the port need amqps://?",
        lambda it, _: f"amqp://{it.tls}/",
        exits=False,
    ),
    BrokerState(
        "amqps to plain",
        ("broker",),
        "no TLS with the broker (WRONG_VERSION_NUMBER)",
        lambda _, user: user.url.replace("amqp:", "amqps:"),
    ),
    BrokerState(
        "wrong password",
        ("broker",),
        "refuses this user name and password",
        lambda it, _: url_as(it.stack, "guest", "wrong"),
    ),
    BrokerState(
        "no virtual host",
        ("broker",),
        "the virtual host does not exist",
        lambda it, _: url_as(it.stack, "guest", "guest", "nowhere"),
    ),
    BrokerState(
        "may not configure",
        QUEUES,
        "access to queue 'jobs.dead'",
        rights={"configure": "^$"},
    ),
    BrokerState(
        "may not write to the dead-letter exchange",
        (*QUEUES[2:], "permission to publish results"),
        "access to exchange 'amq.default'",
        rights={"write": "^(amq.gen.*|vqa.*)$"},
        settings={"VQA_JOBS_EXCHANGE": "vqa.back"},
    ),
    BrokerState(
        "may not read",
        ("permission to consume jobs",),
        "access to queue 'jobs'",
        rights={"read": "^amq.gen.*$"},
        settings=NO_DECLARE,
        create="right",
        exits=False,
    ),
    BrokerState(
        "may not write",
        ("permission to publish results", "permission to requeue jobs"),
        "access to exchange 'amq.default'",
        rights={"write": "^amq.gen.*$"},
        settings=NO_DECLARE,
        create="right",
        exits=False,
    ),
    BrokerState("queues missing", QUEUES, "does not exist", settings=NO_DECLARE),
    BrokerState("other arguments", ("queue jobs",), "inequivalent arg 'x-", create="classic"),
]


@pytest.mark.parametrize("state", [pytest.param(it, id=it.name) for it in BROKER_STATES])
async def test_check_fails_and_the_worker_names_the_same_cause(
    stack: Stack, servers: Servers, state: BrokerState, tmp_path: Path, start_worker: StartWorker
) -> None:
    with own_vhost(stack) as vhost, BrokerUser.of(stack, vhost=vhost) as user:
        names = {"VQA_JOBS_QUEUE": "jobs", "VQA_RESULTS_QUEUE": "results", "VQA_RETRY_DELAYS": "1"}
        cli = Cli(tmp_path, {**stack.environment(), **names, "VQA_RABBITMQ_URL": user.url})
        if state.create == "classic":
            administer(stack, "PUT", f"/api/queues/{vhost}/jobs", {"durable": True})
        elif state.create:
            assert (await cli.run("topology", "apply")).code == 0
        user.permit(**state.rights)
        changed = {"VQA_RABBITMQ_URL": state.url(servers, user), **state.settings}
        before = administer(stack, "GET", f"/api/definitions/{vhost}")
        found = await findings(cli.with_settings(**changed), code=1)
        assert administer(stack, "GET", f"/api/definitions/{vhost}") == before
        assert tuple(name for name, (status, _) in found.items() if status == "failed") == state.failed
        assert state.message in found[state.failed[0]][1]
        worker = await start_worker(wait=False, **names, **changed)
        worker.launch()
        if state.create == "right":
            async with await aio_pika.connect(url_as(stack, "guest", "guest", vhost)) as connection:
                channel = await connection.channel()
                message = aio_pika.Message(json.dumps(job()).encode())
                await channel.default_exchange.publish(message, "jobs")
        await until(lambda: state.message in worker.output(), "the worker reports the cause")
        assert worker.process is not None
        if state.exits:
            assert await until(worker.process.poll, "the worker exits") == 78
        else:
            assert worker.process.poll() is None


@pytest.mark.parametrize(
    ("rights", "status", "message"),
    [
        ({}, "ok", "granted"),
        ({"configure": "^$"}, "skipped", "(needed: configure on queue vqa.results.check)"),
        ({"read": "^jobs$"}, "skipped", "(needed: read on queue vqa.results.check)"),
        ({"write": "^jobs$"}, "skipped", "(needed: write on the default exchange)"),
    ],
)
async def test_the_permission_to_submit_is_checked(
    stack: Stack, tmp_path: Path, rights: dict[str, str], status: str, message: str
) -> None:
    with own_vhost(stack) as vhost, BrokerUser.of(stack, vhost=vhost) as user:
        user.permit(**rights)
        cli = Cli(tmp_path, {**stack.environment(), "VQA_RABBITMQ_URL": user.url})
        reported = (await cli.run("check", "--json")).objects
    (found,) = [it for it in reported if it["check"] == "permission to submit jobs"]
    assert found["status"] == status
    assert found["message"].endswith(message)


# Only `check` sees these


@pytest.mark.parametrize("key", ["right", "wrong"])
async def test_the_base_url_is_suggested(servers: Servers, tmp_path: Path, key: str) -> None:
    environment = {**servers.stack.environment(), **model_at(servers.model("http", ""))}
    if key == "wrong":
        environment["VQA_MODEL_API_KEY"] = "wrong"
    found = await findings(Cli(tmp_path, environment), code=1)
    status, message = found["model API"]
    assert status == "failed"
    assert message.endswith(f": set VQA_MODEL_BASE_URL={servers.model('http', '/v1')}")


async def test_a_base_url_with_chat_completions_is_right(servers: Servers, tmp_path: Path) -> None:
    url = servers.model("http", "/v1/chat/completions")
    found = await findings(Cli(tmp_path, {**servers.stack.environment(), **model_at(url)}), code=0)
    assert found["model API"][0] == "ok"


async def test_a_server_with_a_page_for_every_url_is_not_s3(servers: Servers, tmp_path: Path) -> None:
    environment = {**servers.stack.environment(), **s3_at(f"http://{servers.pages}")}
    for buckets, check in (("*", "S3"), ("photos", "bucket photos")):
        found = await findings(Cli(tmp_path, {**environment, "VQA_ALLOWED_BUCKETS": buckets}), code=1)
        assert found[check][0] == "failed"
        assert "returns content for an object that does not exist" in found[check][1]


async def test_the_wrong_region_is_reported(stack: Stack, tmp_path: Path) -> None:
    async with FakeS3.serving(b"") as s3:
        s3.answer = refuse(400, "AuthorizationHeaderMalformed", "<Region>eu-west-1</Region>")
        found = await findings(Cli(tmp_path, {**stack.environment(), **s3_at(s3.url)}), code=1)
    assert found["S3"][0] == "failed"
    assert "AuthorizationHeaderMalformed: the signature's region is wrong: set AWS_REGION" in found["S3"][1]


async def test_a_literal_bucket_is_checked_with_the_credentials(stack: Stack, tmp_path: Path) -> None:
    wrong = {"AWS_SECRET_ACCESS_KEY": "wrong", "VQA_ALLOWED_BUCKETS": f"{BUCKET},cat-*"}
    found = await findings(Cli(tmp_path, {**stack.environment(), **wrong}), code=1)
    assert "S3" not in found
    assert "SignatureDoesNotMatch" in found[f"bucket {BUCKET}"][1]
    assert found["buckets"] == (
        "skipped",
        "cat-*: wildcards. To check a bucket, use --image s3://bucket/key.",
    )
