"""Build the container image and run it as in a cluster."""

import asyncio
import json
import platform
import re
import signal
import subprocess
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pillow_heif
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.local.stack import Stack
from tests.breaking import job
from tests.conftest import MakeClient, PutImage, picture
from tests.fake_s3 import FakeS3, give
from tests.proxy import Proxy
from tests.running import Worker, until
from tests.slow.image.engine import ROOT, Engine, python_image, run
from worker import __version__

pillow_heif.register_heif_opener()

# The first test includes the installation of packages and the build.
pytestmark = pytest.mark.timeout(900)

NOTHING = "0000000000000000"
CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
StartContainer = Callable[..., Awaitable[Worker]]


@pytest.fixture
async def start_container(
    stack: Stack, engine: Engine, image: str, tmp_path: Path
) -> AsyncIterator[StartContainer]:
    """Start a container with the given settings, named like its jobs queue."""
    workers: list[Worker] = []

    async def start(*flags: str, wait: bool = True, without: tuple[str, ...] = (), **settings: str) -> Worker:
        worker = Worker.of(stack, tmp_path, **settings)
        variables = [
            f"--env={name}"
            for name in worker.environment
            if name.startswith(("VQA_", "AWS_")) and name not in without
        ]
        worker.command = engine.start(image, flags=(f"--name={worker.jobs_queue}", *variables, *flags))
        workers.append(worker)
        if wait:
            return await worker.start()
        worker.launch()
        return worker

    yield start
    for worker in workers:
        engine.remove(worker.jobs_queue)
        worker.kill()


def test_the_image_has_labels(config: dict[str, Any]) -> None:
    revision = run("git", "rev-parse", "HEAD").strip()
    labels = {
        name: value for name, value in config["Labels"].items() if name.startswith("org.opencontainers")
    }
    assert labels == {
        "org.opencontainers.image.title": "vqa-worker",
        "org.opencontainers.image.description": "Answers questions about images, from RabbitMQ to RabbitMQ",
        "org.opencontainers.image.licenses": "Apache-2.0",
        "org.opencontainers.image.version": __version__,
        "org.opencontainers.image.revision": revision,
        "org.opencontainers.image.base.name": python_image(),
    }


def test_process_1_is_the_worker_as_a_numeric_user_other_than_root(config: dict[str, Any]) -> None:
    # In exec form, so that the worker receives signals directly.
    assert config["Entrypoint"] == ["vqa-worker"]
    assert config["Cmd"] == ["run"]
    assert config["User"] == "10001:10001"
    assert config["StopSignal"] == "SIGTERM"
    assert list(config["ExposedPorts"]) == ["8080/tcp"]


def test_the_environment_has_no_variables_of_the_build_machine(config: dict[str, Any]) -> None:
    names = {variable.split("=")[0] for variable in config["Env"]}
    base = {"GPG_KEY", "LANG", "PYTHON_SHA256", "PYTHON_VERSION"}
    assert names - base == {"PATH", "PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"}


def test_the_user_has_no_privileges(inside: dict[str, Any]) -> None:
    assert inside["user"] == [10001, 10001]
    assert set(inside["groups"]) <= {10001}
    capabilities = {name: value for name, value in inside["process"].items() if name.startswith("Cap")}
    assert set(capabilities.values()) == {NOTHING}
    assert inside["process"]["NoNewPrivs"] == "1"
    assert inside["writable_to_the_user"] == []


def test_the_worker_runs_without_a_writable_folder(inside: dict[str, Any]) -> None:
    # EACCES for folders that the user cannot enter.
    assert set(inside["attempts_to_write"]) <= {"EROFS", "EACCES"}
    assert inside["attempts_to_write"]["EROFS"] > 100


def test_its_packages_are_exactly_the_lock_and_the_worker(inside: dict[str, Any]) -> None:
    minor = ".".join(inside["python"].split(".")[:2])
    found = {(canonicalize_name(name), version) for name, version in inside["distributions"]}
    assert found == {*locked(minor), ("vqa-worker", __version__)}


def locked(python: str) -> Iterator[tuple[str, str]]:
    """Yield names and versions of the lock for this Python version."""
    environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    for line in re.findall(r"^[a-z][^\\\n]+", (ROOT / "requirements.lock").read_text(), re.MULTILINE):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            yield requirement.name, str(requirement.specifier).removeprefix("==")


def test_it_imports_only_its_own_packages_and_the_standard_library(inside: dict[str, Any]) -> None:
    assert inside["foreign_modules"] == []


def test_it_contains_no_tools(inside: dict[str, Any]) -> None:
    assert "vqa-worker" in inside["commands"]
    assert not {"pip", "pip3", "pytest", "hatch", "cc"} & set(inside["commands"])


def test_all_modules_that_the_worker_imports_are_compiled(inside: dict[str, Any]) -> None:
    assert inside["not_compiled"] == []


def test_it_has_certificate_authorities(inside: dict[str, Any]) -> None:
    assert inside["authorities"] > 50


def test_it_has_the_aws_services_that_it_uses(inside: dict[str, Any]) -> None:
    assert inside["clients"] == ["s3", "signin", "sso", "sso-oidc", "sts"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the figures are those of x86-64")
@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ("native libraries", "native"),
        ("compiled Python of the worker", "compiled"),
        ("their sources", "sources"),
        ("data", "data"),
        ("compiled Python of the standard", "standard library"),
    ],
)
def test_its_size_is_as_documented(inside: dict[str, Any], row: str, kind: str) -> None:
    page = (ROOT / "docs" / "deployment.md").read_text()
    documented = re.search(rf"^\| {row}[^|]*\| (\d+) \|$", page, re.MULTILINE)
    assert documented
    assert inside["megabytes"][kind] == pytest.approx(int(documented[1]), rel=0.1, abs=1)


async def test_the_container_answers_a_job_and_drains_when_the_engine_stops_it(
    stack: Stack,
    engine: Engine,
    start_container: StartContainer,
    client_of: MakeClient,
    put_image: PutImage,
) -> None:
    async with Proxy.before(stack.model.base_url) as model:
        worker = await start_container(VQA_MODEL_BASE_URL=model.url(stack.model.base_url))
        client = await client_of(worker)
        reply = await client.ask(question=f"What is it? {uuid.uuid4().hex}", images=[put_image()])
        assert reply.body["status"] == "succeeded", reply.body
        await until(lambda: worker.metric("vqa_jobs_total", status="succeeded") == 1, "it is counted")
        # It has the libraries that convert images, and converts without a writable folder.
        converted = await client.ask(
            question="?", images=[put_image(picture(kind)) for kind in ("HEIF", "AVIF", "PDF")]
        )
        assert converted.body["status"] == "succeeded", converted.body
        types = [image["source_type"] for image in converted.body["images"]]
        assert types == ["image/heic", "image/avif", "application/pdf"]

        # Stop as an orchestrator does, with a grace period: jobs in flight finish.
        model.freeze()
        running = job()
        await client.publish(running)
        await until(lambda: model.held == 1, "a model request is open")
        stopping = asyncio.create_task(
            asyncio.to_thread(engine, "stop", "--time=60", worker.jobs_queue), name="stop"
        )
        await until(lambda: worker.ready()[0] == 503, "the worker drains")
        model.thaw()
        assert (await client.result(running["id"])).body["status"] == "succeeded"
        await stopping
        assert await worker.ended() == 0, worker.output()


async def test_the_command_line_works_in_the_container(
    engine: Engine, start_container: StartContainer
) -> None:
    """As in the runbook: with the settings and the read-only folders of the worker."""
    worker = await start_container()
    shown = await asyncio.to_thread(engine, "exec", worker.jobs_queue, "vqa-worker", "check", "--json")
    findings = [json.loads(line) for line in shown.splitlines()]
    assert len(findings) > 10
    assert "failed" not in {finding["status"] for finding in findings}
    listed = await asyncio.to_thread(engine, "exec", worker.jobs_queue, "vqa-worker", "dlq", "list", "--json")
    assert listed == ""
    help_page = await asyncio.to_thread(engine, "exec", worker.jobs_queue, "vqa-worker", "--help")
    assert "Usage: vqa-worker" in help_page


async def test_the_compose_healthcheck_reports_readiness(
    stack: Stack, engine: Engine, services: dict[str, Any], start_container: StartContainer
) -> None:
    async with Proxy.before(stack.rabbitmq.url) as broker:
        worker = await start_container(VQA_RABBITMQ_URL=broker.url(stack.rabbitmq.url))
        check = [part.replace(":8080/", f":{worker.port}/") for part in check_of(services["worker"])]
        assert check != check_of(services["worker"])
        assert engine.tries("exec", worker.jobs_queue, *check)
        await broker.refuse()
        broker.reset()
        await until(lambda: worker.ready()[0] == 503, "it has no broker")
        assert not engine.tries("exec", worker.jobs_queue, *check)


def check_of(service: dict[str, Any]) -> list[str]:
    kind, *command = service["healthcheck"]["test"]
    assert kind == "CMD"
    return [str(part) for part in command]


async def test_sigterm_during_its_start_ends_it_at_once(
    engine: Engine, start_container: StartContainer
) -> None:
    """Linux ignores a signal to process 1 without a handler: the worker installs one before its imports."""
    worker = await start_container(wait=False)
    process = await until(lambda: process_of(engine, worker.jobs_queue), "the container runs")
    await until(lambda: handles_sigterm(process), "the handler is installed")
    assert not worker.log()
    engine("kill", "--signal=TERM", worker.jobs_queue)
    assert await worker.ended(10) == 128 + signal.SIGTERM, worker.output()


def process_of(engine: Engine, container: str) -> Path | None:
    """Return the folder below /proc of a container's process 1, if it runs the worker."""
    if not engine.tries("container", "inspect", container):
        return None
    folder = Path("/proc", engine("inspect", "--format={{.State.Pid}}", container).strip())
    command = folder / "cmdline"
    return folder if command.exists() and b"vqa-worker" in command.read_bytes() else None


def handles_sigterm(process: Path) -> bool:
    caught = re.search(r"^SigCgt:\t(\w+)$", (process / "status").read_text(), re.MULTILINE)
    assert caught
    return bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


async def test_sigterm_ends_it_with_0(start_container: StartContainer) -> None:
    worker = await start_container()
    assert await worker.stop() == 0, worker.output()


async def test_a_web_identity_token_provides_credentials(
    start_container: StartContainer, client_of: MakeClient, tmp_path: Path
) -> None:
    content = picture()
    (tmp_path / "token").write_text("a-token-of-the-cluster")
    (tmp_path / "token").chmod(0o444)
    async with FakeS3.serving(content) as s3, FakeS3.serving(b"") as sts:
        sts.answer = give(ROLE_GRANTED.encode(), Content_Type="text/xml")
        worker = await start_container(
            f"--volume={tmp_path / 'token'}:/var/run/secrets/token:ro",
            without=CREDENTIALS,
            AWS_ROLE_ARN="arn:aws:iam::123456789012:role/reader",
            AWS_WEB_IDENTITY_TOKEN_FILE="/var/run/secrets/token",
            AWS_ENDPOINT_URL_STS=sts.url,
            VQA_S3_ENDPOINT_URL=s3.url,
        )
        client = await client_of(worker)
        reply = await client.ask(question="What is it?", images=["s3://photos/cat.png"])
        assert reply.body["status"] == "succeeded", reply.body
        assert s3.asked[0].signed_by[0] == "AKIDROLE"
        assert len(sts.asked) == 1


ROLE_GRANTED = (
    "<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials>"
    "<AccessKeyId>AKIDROLE</AccessKeyId><SecretAccessKey>s</SecretAccessKey><SessionToken>t</SessionToken>"
    "<Expiration>2999-01-01T00:00:00Z</Expiration>"
    "</Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
)


def test_invalid_settings_end_it_with_78_and_a_line_for_each(engine: Engine, image: str) -> None:
    done = subprocess.run(
        engine.start(image, flags=("--env=VQA_MAX_ATTEMPTS=none",)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 78
    faults = done.stderr.splitlines()
    assert [fault.removeprefix("Error: ").partition(":")[0] for fault in faults] == [
        "VQA_MAX_ATTEMPTS",
        "VQA_ALLOWED_BUCKETS",
        "VQA_MODEL_API_KEY",
    ]


@pytest.fixture
def simulator(engine: Engine, simulator_image: str) -> Iterator[str]:
    """The name of a container with the model simulator, without a network."""
    name = f"simulator-{uuid.uuid4().hex[:8]}"
    process = subprocess.Popen(
        engine.start(simulator_image, flags=(f"--name={name}",), network="none"), stdout=subprocess.DEVNULL
    )
    yield name
    engine.remove(name)
    process.wait()


async def test_the_image_of_the_model_simulator_serves_the_model(
    engine: Engine, services: dict[str, Any], simulator: str
) -> None:
    assert "command" not in services["model"]
    await until(lambda: engine.tries("exec", simulator, *check_of(services["model"])), "it is healthy")
    assert engine("exec", simulator, "id", "-u").strip() == "10001"
    listed = engine("exec", simulator, "python", "-c", LIST_MODELS)
    assert services["worker"]["environment"]["VQA_MODEL"].endswith(f":-{listed.split()[0]}}}")


LIST_MODELS = """
import json, urllib.request
for model in json.load(urllib.request.urlopen("http://127.0.0.1:8000/v1/models"))["data"]:
    print(model["id"])
"""


async def test_the_image_of_the_model_simulator_runs_the_sample_jobs(
    stack: Stack,
    engine: Engine,
    simulator_image: str,
    services: dict[str, Any],
    start_container: StartContainer,
) -> None:
    worker = await start_container()
    environment = {**worker.environment, "VQA_DEMO_BUCKET": stack.s3.bucket}
    flags = [f"--env={name}" for name in environment if name.startswith(("VQA_", "AWS_"))]
    flags += [f"--tmpfs={folder}" for folder in services["ask"]["tmpfs"]]
    done = await asyncio.to_thread(
        subprocess.run,
        engine.start(simulator_image, *services["ask"]["command"], flags=tuple(flags)),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "receipt.jpg" in done.stdout
    assert "image_not_found" in done.stdout
