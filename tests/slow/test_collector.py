"""The OpenTelemetry Collector accepts the worker's spans and sends them on unchanged."""

import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deploy.local.stack import Stack
from tests.authority import Authority
from tests.conftest import PutImage
from tests.observability.collector import BUILD_TIMEOUT_S, Collector
from tests.otlp import Receiver, Seen
from tests.running import Client, Worker, until

pytestmark = pytest.mark.timeout(2 * BUILD_TIMEOUT_S)

PARENT_ID = "00f067aa0ba902b7"
TRACESTATE = "congo=t61rcWkgMzE"


@dataclass(frozen=True)
class Scene:
    """A worker, and what receives its spans from the collector."""

    worker: Worker
    client: Client
    receiver: Receiver

    async def spans_of_a_job(self, image: str) -> list[Seen]:
        """Publish a job in a new trace; return the spans that the collector sent on."""
        trace_id, job_id = uuid.uuid4().hex, uuid.uuid4().hex
        headers: dict[str, Any] = {"traceparent": f"00-{trace_id}-{PARENT_ID}-01", "tracestate": TRACESTATE}
        job = {"id": job_id, "question": "What?", "images": [image]}
        await self.client.publish(job, headers=headers)
        await self.client.result(job_id)
        await until(lambda: len(self.receiver.of(trace_id)) == 4, "four spans have arrived")
        return self.receiver.of(trace_id)


@pytest.fixture(scope="module", params=["http", "https"])
def environment(
    request: pytest.FixtureRequest, receiver: Receiver, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mapping[str, str]]:
    """The variables of a worker that sends its spans to a collector."""
    tls, certificate = None, {}
    if request.param == "https":
        authority = Authority.made_in(tmp_path_factory.mktemp("tls") / "authority")
        tls = {
            name: str(authority.folder / f"server.{end}")
            for name, end in (("cert_file", "pem"), ("key_file", "key"))
        }
        certificate = {"OTEL_EXPORTER_OTLP_CERTIFICATE": authority.certificate}
    with Collector.sending_to(receiver.url, tls) as collector:
        endpoint = f"{request.param}://127.0.0.1:{collector.port}"
        yield {**receiver.environment(), "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, **certificate}


@pytest.fixture(scope="module")
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver.serving() as receiver:
        yield receiver


@pytest.fixture(params=["none", "gzip"])
async def scene(
    request: pytest.FixtureRequest,
    stack: Stack,
    environment: Mapping[str, str],
    receiver: Receiver,
    tmp_path: Path,
) -> AsyncIterator[Scene]:
    compression = {"OTEL_EXPORTER_OTLP_COMPRESSION": request.param}
    async with (
        Worker.running(stack, tmp_path, **environment, **compression) as worker,
        Client.of(stack, worker) as client,
    ):
        yield Scene(worker, client, receiver)


async def test_the_spans_of_a_job_arrive_unchanged(scene: Scene, put_image: PutImage) -> None:
    process, fetch, chat, publish = await scene.spans_of_a_job(put_image())

    assert [span.name.split(" ")[0] for span in (process, fetch, chat, publish)] == [
        "process",
        "fetch",
        "chat",
        "publish",
    ]
    assert [span.kind for span in (process, fetch, chat, publish)] == [
        "CONSUMER",
        "CLIENT",
        "CLIENT",
        "PRODUCER",
    ]
    assert process.parent_id == PARENT_ID
    assert {span.parent_id for span in (fetch, chat, publish)} == {process.span_id}
    assert {span.tracestate for span in (process, fetch, chat, publish)} == {TRACESTATE}
    assert process.attributes["vqa.outcome"] == "succeeded"
    assert process.attributes["messaging.destination.name"] == scene.worker.jobs_queue
    assert chat.attributes["gen_ai.response.finish_reasons"] == ["stop"]
    assert chat.attributes["gen_ai.usage.input_tokens"] > 0
    assert process.resource["service.name"] == "vqa-worker"


async def test_the_last_spans_are_sent_at_the_stop(
    stack: Stack, environment: Mapping[str, str], receiver: Receiver, put_image: PutImage, tmp_path: Path
) -> None:
    an_hour_ms = "3600000"
    settings = {**environment, "OTEL_BSP_SCHEDULE_DELAY": an_hour_ms}
    job_id = uuid.uuid4().hex
    async with Worker.running(stack, tmp_path, **settings) as worker, Client.of(stack, worker) as client:
        await client.publish({"id": job_id, "question": "What?", "images": [put_image()]})
        await client.result(job_id)

    def arrived() -> list[Seen]:
        return [span for span in receiver.spans if span.attributes.get("vqa.job.id") == job_id]

    await until(arrived, "the span of the job has arrived")
    assert not [line for line in worker.log() if line["event"] == "trace_export_failed"]
