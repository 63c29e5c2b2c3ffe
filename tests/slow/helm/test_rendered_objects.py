"""The rendered objects with real services: a worker with the environment of its pod, and the broker."""

import asyncio
import base64
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import Request, urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from deploy.local.ports import PortBlock
from deploy.local.stack import Stack
from tests.conftest import BUCKET, MakeClient, PutImage
from tests.running import Ended, Worker, until
from tests.slow.helm.pods import environment_in
from tests.slow.helm.rendering import Object, Rendered, Values, decoded, keda, minimal, render
from worker.cli.exit_codes import EXIT_FAILURE

Start = Callable[..., Worker]


@pytest.fixture
def rendered(stack: Stack) -> Iterator[Rendered]:
    ports = PortBlock()
    yield render(_values(stack.environment(), ports.take()))
    ports.close()


def _values(of_stack: dict[str, str], port: int) -> Values:
    """Return values for the stack."""
    name = f"t{uuid.uuid4().hex[:10]}"
    return minimal(
        {
            "settings": {
                "jobsQueue": f"{name}.jobs",
                "resultsQueue": f"{name}.results",
                "s3EndpointUrl": of_stack["VQA_S3_ENDPOINT_URL"],
                "allowedBuckets": [BUCKET],
                "modelBaseUrl": of_stack["VQA_MODEL_BASE_URL"],
                "model": of_stack["VQA_MODEL"],
                "httpHost": "127.0.0.1",
                "httpPort": port,
            },
            "secrets": {
                "rabbitmqUrl": of_stack["VQA_RABBITMQ_URL"],
                "modelApiKey": of_stack["VQA_MODEL_API_KEY"],
                "asFiles": True,
            },
            "aws": {"region": of_stack["AWS_REGION"], "existingSecret": "s3-credentials"},
        }
    )


def _environment(stack: Stack, rendered: Rendered, pod: Object, folder: Path) -> dict[str, str]:
    """Return the environment of a container; only the pod configures the broker, the model API and S3."""
    of_stack = stack.environment()
    credentials = {name: text for name, text in of_stack.items() if name.startswith("AWS_")}
    of_pod = environment_in(folder, rendered, pod, {"s3-credentials": credentials})
    of_machine = {name: text for name, text in os.environ.items() if not name.startswith(("VQA_", "AWS_"))}
    no_proxy = {name: text for name, text in of_stack.items() if name.lower() == "no_proxy"}
    return {**of_machine, **no_proxy, **of_pod}


@pytest.fixture
async def hook(stack: Stack, rendered: Rendered, tmp_path: Path) -> Ended:
    """Run the hook's container, as Helm does before it creates the workers."""
    pod = rendered.one("Job")["spec"]["template"]
    environment = _environment(stack, rendered, pod, tmp_path / "hook")
    job = Worker(environment, tmp_path / "hook.log")
    job.command = [*job.command[:-1], *pod["spec"]["containers"][0]["args"]]
    return await job.run_to_end()


@pytest.fixture
def start(stack: Stack, rendered: Rendered, hook: Ended, tmp_path: Path) -> Iterator[Start]:
    """Return a function that creates workers from the pod."""
    assert hook.code == 0, hook.errors
    environment = _environment(stack, rendered, rendered.pod, tmp_path / "pod")
    workers = []

    def make(**changes: str) -> Worker:
        workers.append(Worker({**environment, **changes}, tmp_path / "worker.log"))
        return workers[-1]

    yield make
    for worker in workers:
        worker.kill()


async def test_the_hook_declares_the_queues_for_the_worker(
    stack: Stack, rendered: Rendered, hook: Ended, start: Start
) -> None:
    assert (hook.code, hook.errors) == (0, [])
    settings = rendered.settings
    listed = await asyncio.to_thread(stack.rabbitmq.ctl, "list_queues", "name")
    queue, results = settings["VQA_JOBS_QUEUE"], settings["VQA_RESULTS_QUEUE"]
    retries = [f"{queue}.retry.{delay}s" for delay in settings["VQA_RETRY_DELAYS"].split(",")]
    assert {queue, results, f"{queue}.dead", *retries} <= set(listed.split())
    # The worker does not declare queues.
    assert settings["VQA_DECLARE_TOPOLOGY"] == "false"
    pod = await start().start()
    assert await pod.stop() == 0


async def test_the_worker_answers_a_job_and_its_probes_succeed(
    rendered: Rendered, start: Start, client_of: MakeClient, put_image: PutImage
) -> None:
    pod = start()
    container = rendered.container
    assert container["args"] == [*pod.command[-1:]]
    await pod.start()
    assert pod.port == container["ports"][0]["containerPort"]
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert pod.get(container[name]["httpGet"]["path"])[0] == 200

    client = await client_of(pod)
    reply = await client.ask(question="What is it?", images=[put_image()])
    assert reply.body["status"] == "succeeded", reply.body

    assert [line["event"] for line in pod.log() if line["level"] != "info"] == []
    assert await pod.stop() == 0


@pytest.mark.usefixtures("hook")
async def test_helm_test_succeeds_without_workers(stack: Stack, rendered: Rendered, tmp_path: Path) -> None:
    check = await _run_check(stack, rendered, tmp_path)
    assert check.code == 0, check.output
    assert f"bucket {BUCKET}: readable" in check.output


@pytest.mark.usefixtures("hook")
async def test_helm_test_fails_for_a_bucket_that_cannot_be_read(
    stack: Stack, rendered: Rendered, tmp_path: Path
) -> None:
    check = await _run_check(stack, rendered, tmp_path, VQA_ALLOWED_BUCKETS="missing")
    assert check.code == EXIT_FAILURE
    assert "bucket missing: does not exist" in check.output


async def _run_check(stack: Stack, rendered: Rendered, folder: Path, **changes: str) -> Ended:
    """Run the container of the pod that `helm test` creates."""
    pod = rendered.one("Pod")
    environment = _environment(stack, rendered, pod, folder / "check")
    check = Worker({**environment, **changes}, folder / "check.log")
    check.command = [*check.command[:-1], *pod["spec"]["containers"][0]["args"]]
    return await check.run_to_end()


async def test_without_a_broker_the_worker_is_live_and_not_ready(rendered: Rendered, start: Start) -> None:
    """A rollout waits, and Kubernetes does not restart the pod."""
    # No server listens on port 1.
    pod = start(VQA_RABBITMQ_URL="amqp://guest:guest@127.0.0.1:1/")
    await pod.serve()
    probes = rendered.container
    await until(lambda: pod.get(probes["livenessProbe"]["httpGet"]["path"])[0] == 200, "the worker is live")
    assert pod.get(probes["startupProbe"]["httpGet"]["path"])[0] == 200
    assert pod.get(probes["readinessProbe"]["httpGet"]["path"])[0] == 503


async def test_keda_can_read_the_queue_depth_with_the_permissions_of_its_user(
    stack: Stack, rendered: Rendered, start: Start, client_of: MakeClient
) -> None:
    """The URL is built from the ScaledObject as KEDA's scaler does."""
    user, password = f"keda-{uuid.uuid4().hex}", "p/a:s@s#1"
    stack.rabbitmq.ctl("add_user", user, password)
    stack.rabbitmq.ctl("set_user_tags", user, "management")
    stack.rabbitmq.ctl("set_permissions", user, "^$", "^$", "^$")
    given = {"host": stack.rabbitmq.management_url, "username": user, "password": password}
    jobs = rendered.settings["VQA_JOBS_QUEUE"]
    scaled = render(keda({"settings": {"jobsQueue": jobs}, "autoscaling": {"keda": given}}))
    metadata = scaled.one("ScaledObject")["spec"]["triggers"][0]["metadata"]
    login = decoded(scaled.one("Secret", "demo-vqa-worker-keda"))
    place = f"{quote(metadata['vhostName'], safe='')}/{quote(metadata['queueName'], safe='')}"
    url = f"{metadata['host']}api/queues/{place}"

    # The worker is not started.
    client = await client_of(start())
    for _ in range(3):
        await client.publish({"id": uuid.uuid4().hex, "question": "?", "images": ["s3://missing/image"]})

    await until(lambda: _read(url, login).get("messages") == 3, "the management API has counted them")


async def test_rabbitmq_exposes_the_metric_of_the_hpa(stack: Stack, rendered: Rendered, hook: Ended) -> None:
    assert hook.code == 0, hook.errors
    jobs = rendered.settings["VQA_JOBS_QUEUE"]
    hpa = render(minimal({"settings": {"jobsQueue": jobs}, "autoscaling": {"mode": "hpa"}}))
    (metric,) = hpa.one("HorizontalPodAutoscaler")["spec"]["metrics"]
    asked = metric["external"]["metric"]
    url = f"{stack.rabbitmq.prometheus_url}/metrics/detailed?family=queue_coarse_metrics"

    def is_shown() -> bool:
        return any(
            sample.name == asked["name"] and asked["selector"]["matchLabels"].items() <= sample.labels.items()
            for family in text_string_to_metric_families(_text(url))
            for sample in family.samples
        )

    await until(is_shown, "RabbitMQ exposes the metric of the queue")


def _read(url: str, login: Mapping[str, str]) -> Any:
    return json.loads(_text(url, f"{login['username']}:{login['password']}"))


def _text(url: str, login: str = "") -> str:
    headers = {"Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"} if login else {}
    with urlopen(Request(url, headers=headers), timeout=10) as response:  # noqa: S310 - the local broker
        text: str = response.read().decode()
        return text
