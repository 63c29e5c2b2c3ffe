"""Without traces OpenTelemetry is not imported; a failing collector does not affect jobs."""

import json
import sys
import uuid
from collections import Counter
from typing import Any

import pytest

from deploy.local.ports import PortBlock
from tests.conftest import MakeClient, PutImage, StartWorker
from tests.otlp import Receiver
from tests.running import Client, Worker, until
from worker.cli.exit_codes import EXIT_CONFIG
from worker.observability.log_sampling import MAX_SHOWN

# Run the worker, then print the modules that it imported.
RUN_AND_PRINT_MODULES = """
import json, sys
from worker.__main__ import main
code = main(["run"])
print(json.dumps({"event": "modules", "modules": sorted(sys.modules)}), flush=True)
sys.exit(code)
"""
# Hide the packages of `vqa-worker[tracing]`.
WITHOUT_EXTRA = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "opentelemetry":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from worker.__main__ import main
sys.exit(main(["run"]))
"""


async def _asks_one_job(client: Client, put_image: PutImage) -> dict[str, Any]:
    """Return the result's headers."""
    reply = await client.ask(question="What?", images=[put_image()])
    assert reply.body["status"] == "succeeded"
    return dict(reply.message.headers)


def _loaded(worker: Worker) -> set[str]:
    (line,) = (line for line in worker.log() if line.get("event") == "modules")
    return {name for name in line["modules"] if name.partition(".")[0] == "opentelemetry"}


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_TRACES_EXPORTER": "none"},
    ],
    ids=["no variables", "no traces"],
)
async def test_without_traces_opentelemetry_is_not_imported(
    start_worker: StartWorker, client_of: MakeClient, put_image: PutImage, variables: dict[str, str]
) -> None:
    worker = await start_worker(wait=False, **variables)
    worker.command = [sys.executable, "-c", RUN_AND_PRINT_MODULES]
    await worker.start()
    headers = await _asks_one_job(await client_of(worker), put_image)
    assert await worker.stop() == 0, worker.output()
    assert headers == {}
    assert _loaded(worker) == set()


async def test_with_traces_opentelemetry_is_imported(
    start_worker: StartWorker, client_of: MakeClient, put_image: PutImage
) -> None:
    async with Receiver.serving() as receiver:
        worker = await start_worker(wait=False, **receiver.environment())
        worker.command = [sys.executable, "-c", RUN_AND_PRINT_MODULES]
        await worker.start()
        headers = await _asks_one_job(await client_of(worker), put_image)
        assert await worker.stop() == 0, worker.output()
    assert headers.keys() == {"traceparent"}
    assert "opentelemetry.sdk.trace" in _loaded(worker)


async def test_traces_without_the_extra_are_an_error(start_worker: StartWorker) -> None:
    worker = await start_worker(wait=False, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9")
    worker.command = [sys.executable, "-c", WITHOUT_EXTRA]
    ended = await worker.run_to_end()
    assert ended.code == EXIT_CONFIG
    (line,) = ended.errors
    assert line.startswith("OTEL_EXPORTER_OTLP_ENDPOINT: ")
    assert "install vqa-worker with its extra `tracing`" in line


async def test_variables_that_the_library_rejects_are_an_error(start_worker: StartWorker) -> None:
    worker = await start_worker(
        wait=False, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9", OTEL_BSP_MAX_QUEUE_SIZE="1"
    )
    ended = await worker.run_to_end()
    assert ended.code == EXIT_CONFIG
    (line,) = ended.errors
    assert line.startswith("OTEL_BSP_")
    assert "max_queue_size" in line


# A failing collector


async def test_a_collector_that_rejects_spans_affects_no_job_and_logs_few_lines(
    start_worker: StartWorker, client_of: MakeClient, put_image: PutImage
) -> None:
    async with Receiver.serving() as receiver:
        receiver.status = 500
        worker = await start_worker(**receiver.environment())
        image = put_image()
        client = await client_of(worker)
        while len(receiver.bodies) < MAX_SHOWN + 3:
            reply = await client.ask(question="What?", images=[image])
            assert reply.body["status"] == "succeeded"
        assert await worker.stop() == 0, worker.output()
    lines = Counter(line["message"] for line in worker.log() if line["logger"].startswith("opentelemetry."))
    (failures,) = (event for event in lines if event.startswith("Failed to export spans batch code: 500"))
    assert lines[failures] == MAX_SHOWN
    (repeated,) = (line for line in worker.log() if line["event"] == "events_suppressed")
    assert repeated["suppressed_event"].startswith("Failed to export %s batch")
    assert repeated["count"] >= 3


async def test_a_hanging_collector_blocks_neither_jobs_nor_the_stop(
    start_worker: StartWorker, client_of: MakeClient, put_image: PutImage
) -> None:
    async with Receiver.serving() as receiver:
        receiver.answering.clear()
        worker = await start_worker(**receiver.environment(), OTEL_EXPORTER_OTLP_TIMEOUT="600")
        client = await client_of(worker)
        await _asks_one_job(client, put_image)
        await until(lambda: receiver.bodies, "spans have been sent")
        await _asks_one_job(client, put_image)
        # The receiver never responds, and the library would wait for ten minutes.
        assert await worker.stop() == 0, worker.output()
        assert not receiver.answering.is_set()
    assert [line["level"] for line in worker.log() if line["event"] == "trace_export_failed"] == ["warning"]


async def test_an_unreachable_collector_affects_no_job(
    start_worker: StartWorker, client_of: MakeClient, put_image: PutImage
) -> None:
    ports = PortBlock()
    try:
        worker = await start_worker(OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{ports.take()}")
        await _asks_one_job(await client_of(worker), put_image)
        assert await worker.stop() == 0, worker.output()
    finally:
        ports.close()


# The other standard variables


async def test_the_library_s_own_variables_are_used(
    start_worker: StartWorker, client_of: MakeClient, put_image: PutImage
) -> None:
    key = uuid.uuid4().hex
    async with Receiver.serving() as receiver:
        worker = await start_worker(
            OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=f"{receiver.url}/v1/traces",
            OTEL_EXPORTER_OTLP_HEADERS=f"api-key={key}",
            OTEL_SERVICE_NAME="pictures",
            OTEL_RESOURCE_ATTRIBUTES="deployment.environment.name=staging",
            OTEL_TRACES_SAMPLER="parentbased_always_off",
        )
        client = await client_of(worker)
        await client.ask(question="What?", images=[put_image()])
        trace_id, job_id = uuid.uuid4().hex, uuid.uuid4().hex
        job = {"id": job_id, "question": "What?", "images": [put_image()]}
        await client.publish(job, headers={"traceparent": f"00-{trace_id}-{'1' * 16}-01"})
        await client.result(job_id)
        # The remaining spans are sent before the worker exits.
        assert await worker.stop() == 0, worker.output()
        assert {span.trace_id for span in receiver.spans} == {trace_id}
        resource = receiver.spans[0].resource
        assert (resource["service.name"], resource["deployment.environment.name"]) == ("pictures", "staging")
        assert {headers.get("api-key") for headers in receiver.headers} == {key}
    assert key not in json.dumps(worker.log())
