"""The HTTP endpoints of a worker in each state, from before it has a broker until its exit."""

import asyncio
import http.client
import signal
import socket
import uuid

import pytest
from prometheus_client.parser import text_string_to_metric_families

from deploy.local.model_simulator.behavior import Answer
from deploy.local.stack import Stack
from tests.conftest import BUCKET, MakeClient, StartWorker
from tests.proxy import Proxy
from tests.running import Worker, calls_with, until

LINK = "https://example.com/x.png"


async def test_readyz_fails_without_a_broker(
    stack: Stack, start_worker: StartWorker, client_of: MakeClient
) -> None:
    async with Proxy.before(stack.rabbitmq.url, listens=False) as broker:
        worker = await start_worker(wait=False, VQA_RABBITMQ_URL=broker.url(stack.rabbitmq.url))
        await worker.serve()
        _has_no_broker(worker)

        await broker.accept()
        await until(lambda: worker.ready() == (200, {"status": "ready", "reasons": []}), "readyz succeeds")
        assert worker.metric("vqa_dependency_up", dependency="rabbitmq") == 1
        client = await client_of(worker)
        assert (await client.ask(question="?", images=[LINK])).body["status"] == "succeeded"

        await broker.refuse()
        broker.reset()
        await until(lambda: worker.ready()[0] == 503, "readyz fails")
        _has_no_broker(worker)
        assert await worker.stop() == 0


def _has_no_broker(worker: Worker) -> None:
    assert worker.ready() == (503, {"status": "no_broker", "reasons": ["not connected to RabbitMQ"]})
    assert worker.get("/livez")[0] == 200
    assert worker.metric("vqa_dependency_up", dependency="rabbitmq") == 0


async def test_after_sigterm_readyz_fails_and_livez_succeeds_until_the_exit(
    stack: Stack, start_worker: StartWorker, client_of: MakeClient
) -> None:
    worker = await start_worker()
    client = await client_of(worker)
    job_id, marker = uuid.uuid4().hex, uuid.uuid4().hex
    stack.model.play(Answer(after=2.0), marker=marker)
    await client.publish({"id": job_id, "question": marker, "images": [LINK]})
    await until(lambda: calls_with(stack, marker), "the call")
    assert worker.metric("vqa_jobs_in_flight") == 1

    stopping = asyncio.create_task(worker.stop())
    await until(lambda: worker.ready()[0] == 503, "readyz fails")
    assert worker.ready() == (503, {"status": "stopping", "reasons": ["the worker was asked to stop"]})
    assert worker.get("/livez")[0] == 200
    assert worker.metric("vqa_jobs_in_flight") == 1

    assert (await client.result(job_id)).body["status"] == "succeeded"
    assert await stopping == 0
    assert worker.get("/livez") == (0, "")


async def test_readyz_succeeds_during_a_pause_and_shows_the_reason(
    start_worker: StartWorker, client_of: MakeClient
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{unused.getsockname()[1]}"
        worker = await start_worker(VQA_S3_ENDPOINT_URL=nowhere)
        client = await client_of(worker)
        job_id = uuid.uuid4().hex
        await client.publish({"id": job_id, "question": "?", "images": [f"s3://{BUCKET}/x"]})
        await until(lambda: worker.ready()[1]["status"] == "paused", "the worker pauses")

        status, body = worker.ready()
        assert status == 200
        assert [reason.partition(": ")[0] for reason in body["reasons"]] == ["s3"]
        assert "cannot be reached" in body["reasons"][0]
        assert worker.get("/livez")[0] == 200
        up = {
            kind: worker.metric("vqa_dependency_up", dependency=kind) for kind in ("model", "s3", "rabbitmq")
        }
        assert up == {"model": 1, "s3": 0, "rabbitmq": 1}
        assert await worker.stop() == 0
    assert job_id not in client.replies
    await until(lambda: client.depth(worker.jobs_queue), "the job is requeued")


async def test_livez_reports_when_the_event_loop_last_ran(worker: Worker) -> None:
    status, body, content_type = _request(worker, "GET", "/livez")
    assert status == 200
    assert content_type.startswith("application/json")
    assert body.startswith(b'{"status": "alive", "heartbeat_age_s": ')


async def test_every_heartbeat_records_its_delay(worker: Worker) -> None:
    def beats() -> float:
        return worker.metric("vqa_event_loop_lag_seconds_count")

    before = beats()
    await until(lambda: beats() >= before + 2, "two more heartbeats")
    assert 0 <= worker.metric("vqa_event_loop_lag_seconds_sum") < beats()


async def test_a_suspended_process_reports_the_lag(start_worker: StartWorker) -> None:
    worker = await start_worker()
    await until(lambda: worker.metric("vqa_event_loop_lag_seconds_count") >= 1, "the first heartbeat")
    assert worker.process is not None
    worker.process.send_signal(signal.SIGSTOP)
    # The time that the process is suspended.
    await asyncio.sleep(2.5)
    worker.process.send_signal(signal.SIGCONT)
    await until(lambda: worker.metric("vqa_event_loop_lag_seconds_sum") > 1, "the lag is reported")
    assert await worker.stop() == 0


async def test_readyz_is_json(worker: Worker) -> None:
    status, body, content_type = _request(worker, "GET", "/readyz")
    assert (status, body) == (200, b'{"status": "ready", "reasons": []}')
    assert content_type.startswith("application/json")


async def test_metrics_are_in_prometheus_text_format(worker: Worker) -> None:
    status, body, content_type = _request(worker, "GET", "/metrics")
    assert status == 200
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    names = {family.name for family in text_string_to_metric_families(body.decode())}
    assert {"vqa_jobs", "process_cpu_seconds", "python_gc_objects_collected"} <= names


@pytest.mark.parametrize(
    "path", ["/", "/healthz", "/livez/", "/metrics/x", "//livez", "/%2e%2e/metrics", "/x?livez"]
)
async def test_other_paths_are_not_found(worker: Worker, path: str) -> None:
    assert _request(worker, "GET", path)[0] == 404


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics"])
async def test_probes_may_use_head_but_not_post_put_or_delete(worker: Worker, path: str) -> None:
    status, body, _ = _request(worker, "HEAD", f"{path}?from=a-probe")
    assert (status, body) == (200, b"")
    for method in ("POST", "PUT", "DELETE"):
        assert _request(worker, method, path)[0] == 405


async def test_a_hundred_idle_connections_do_not_block_probes(worker: Worker) -> None:
    idle = [socket.create_connection(("127.0.0.1", worker.port), timeout=5) for _ in range(100)]
    try:
        idle[0].sendall(b"GET /livez HT")
        idle[1].sendall(b"\x16\x03\x01 no HTTP\r\n\r\n")
        assert worker.get("/livez")[0] == 200
    finally:
        for connection in idle:
            connection.close()


async def test_a_port_in_use_is_an_error_at_the_start(start_worker: StartWorker, worker: Worker) -> None:
    taken = await start_worker(wait=False, VQA_HTTP_PORT=str(worker.port))
    ended = await taken.run_to_end()
    assert ended.code == 78
    (line,) = ended.errors
    assert line.startswith(f"VQA_HTTP_HOST, VQA_HTTP_PORT: cannot listen on 127.0.0.1:{worker.port}")


def _request(worker: Worker, method: str, path: str) -> tuple[int, bytes, str]:
    """Request a path without normalisation; return status, body and content type."""
    connection = http.client.HTTPConnection("127.0.0.1", worker.port, timeout=10)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read(), response.headers["Content-Type"]
    finally:
        connection.close()
