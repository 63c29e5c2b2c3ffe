"""A worker that runs with just what its rendered pod gives it: environment, mounted files, port, probes."""

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.local.ports import PortBlock
from deploy.local.stack import Stack
from tests.conftest import BUCKET, MakeClient, PutImage
from tests.helm.pods import environment_in
from tests.helm.rendering import Rendered, Values, minimal, render
from tests.running import Worker, until

Start = Callable[..., Worker]


@pytest.fixture
def rendered(stack: Stack) -> Iterator[Rendered]:
    ports = PortBlock()
    yield render(_values(stack.environment(), ports.take()))
    ports.close()


def _values(of_stack: dict[str, str], port: int) -> Values:
    """The stack as a user would describe it in values."""
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
            "topology": {"hook": {"enabled": False}},
        }
    )


@pytest.fixture
def start(stack: Stack, rendered: Rendered, tmp_path: Path) -> Iterator[Start]:
    """Makes a worker that is told of the broker, the API and S3 by nothing but the pod."""
    of_stack = stack.environment()
    credentials = {name: text for name, text in of_stack.items() if name.startswith("AWS_")}
    of_pod = environment_in(tmp_path, rendered, rendered.pod, {"s3-credentials": credentials})
    of_machine = {name: text for name, text in os.environ.items() if not name.startswith(("VQA_", "AWS_"))}
    no_proxy = {name: text for name, text in of_stack.items() if name.lower() == "no_proxy"}
    workers = []

    def make(**changes: str) -> Worker:
        workers.append(Worker({**of_machine, **no_proxy, **of_pod, **changes}, tmp_path / "worker.log"))
        return workers[-1]

    yield make
    for worker in workers:
        worker.kill()


async def test_it_answers_and_its_probes_are_answered_where_they_ask(
    rendered: Rendered, start: Start, client_of: MakeClient, put_image: PutImage
) -> None:
    pod = start()
    container = rendered.container
    assert container["args"] == pod.command[-1:]
    await pod.start()
    assert pod.port == container["ports"][0]["containerPort"]
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert pod.get(container[name]["httpGet"]["path"])[0] == 200

    client = await client_of(pod)
    reply = await client.ask(question="What is it?", images=[put_image()])
    assert reply.body["status"] == "succeeded", reply.body

    assert [line["event"] for line in pod.log() if line["level"] != "info"] == []
    assert await pod.stop() == 0


async def test_while_it_has_no_broker_it_lives_and_is_not_ready(rendered: Rendered, start: Start) -> None:
    """So that a rollout waits, and nothing is restarted in vain."""
    # Port 1: nobody is there.
    pod = start(VQA_RABBITMQ_URL="amqp://guest:guest@127.0.0.1:1/")
    await pod.serve()
    probes = rendered.container
    await until(lambda: pod.get(probes["livenessProbe"]["httpGet"]["path"])[0] == 200, "it lives")
    assert pod.get(probes["startupProbe"]["httpGet"]["path"])[0] == 200
    assert pod.get(probes["readinessProbe"]["httpGet"]["path"])[0] == 503
