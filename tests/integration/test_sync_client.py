"""The client without asyncio, on the real stack; `AsyncClient` does the work, see test_client.py."""

import asyncio
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from deploy.local.model_simulator.behavior import Answer
from deploy.local.stack import Stack
from tests.conftest import PutImage, StartWorker, picture
from tests.running import ROOT, Worker, calls_with, until
from vqa_worker import BrokerUnreachableError, Client, ErrorCode, JobFailedError, NoSuchQueueError

ASK_AND_WAIT = """\
import sys
from vqa_worker import Client
url, queue, question = sys.argv[1:]
with Client(url, jobs_queue=queue) as client:
    client.ask_job({"messages": [{"role": "user", "content": question}]})
"""


def text_job(text: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **fields}


@pytest.fixture
def client(stack: Stack, worker: Worker) -> Iterator[Client]:
    with Client(stack.rabbitmq.url, jobs_queue=worker.jobs_queue, max_in_flight=5) as client:
        yield client


def test_a_question_about_local_and_remote_images_is_answered(
    client: Client, put_image: PutImage, tmp_path: Path
) -> None:
    (tmp_path / "photo").write_bytes(picture("JPEG"))
    for image, kind in ((tmp_path / "photo", "JPEG"), (picture("WEBP"), "WEBP"), (put_image(), "PNG")):
        result = client.ask(image, "What is this?", metadata={"order": 17}, timeout=30)
        assert kind in str(result.raise_for_error().answer)
        assert result.metadata == {"order": 17}


def test_a_failed_job_raises_when_asked_to(client: Client) -> None:
    result = client.ask("s3://no-such-bucket/key", "What?", timeout=30)
    with pytest.raises(JobFailedError, match=r"^image_not_found: images\[0\]") as caught:
        result.raise_for_error()
    assert caught.value.code is ErrorCode.IMAGE_NOT_FOUND
    assert not caught.value.retryable
    assert caught.value.result is result


def test_many_jobs_are_taken_in_the_calling_thread_some_at_a_time(client: Client) -> None:
    taken = 0

    def jobs() -> Iterator[dict[str, Any]]:
        nonlocal taken
        for number in range(30):
            taken += 1
            yield text_job("Many?", id=f"{uuid.uuid4().hex}-{number}")

    seen = []
    for result in client.ask_many(jobs(), timeout=60):
        seen.append(int(str(result.raise_for_error().id).rpartition("-")[2]))
        assert taken - len(seen) <= 5
    assert sorted(seen) == list(range(30))


def test_threads_share_a_client(client: Client) -> None:
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda _: client.ask_job(text_job("Hello?"), timeout=60), range(16)))
    assert all(result.succeeded for result in results)
    assert len({result.id for result in results}) == 16


async def test_jobs_in_flight_are_cancelled_when_the_iteration_ends_early(
    stack: Stack, start_worker: StartWorker
) -> None:
    worker = await start_worker(VQA_MAX_CONCURRENCY="8")
    marker = uuid.uuid4().hex
    stack.model.play(Answer(after=60), marker=marker, times=None)

    def ask_some() -> None:
        with Client(stack.rabbitmq.url, jobs_queue=worker.jobs_queue) as client:
            for result in client.ask_many([text_job("Quick?"), text_job(marker), text_job(marker)]):
                assert result.succeeded
                break

    await asyncio.to_thread(ask_some)
    await until(lambda: worker.metric("vqa_jobs_total", error="cancelled") == 2, "they are cancelled")


async def test_ctrl_c_cancels_the_job(stack: Stack, start_worker: StartWorker, tmp_path: Path) -> None:
    worker = await start_worker(VQA_MAX_CONCURRENCY="1")
    marker = uuid.uuid4().hex
    stack.model.play(Answer(after=60), marker=marker, times=None)
    program = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-c", ASK_AND_WAIT, stack.rabbitmq.url, worker.jobs_queue, marker),
        env={"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        stderr=subprocess.PIPE,
    )
    await until(lambda: calls_with(stack, marker), "the call")
    program.send_signal(signal.SIGINT)
    _, errors = await program.communicate()
    assert errors.endswith(b"\nKeyboardInterrupt\n")
    await until(lambda: worker.metric("vqa_jobs_total", error="cancelled") == 1, "it is cancelled")


async def test_closing_cancels_the_jobs_of_other_threads(stack: Stack, start_worker: StartWorker) -> None:
    worker = await start_worker()
    marker = uuid.uuid4().hex
    stack.model.play(Answer(after=60), marker=marker, times=None)
    client = Client(stack.rabbitmq.url, jobs_queue=worker.jobs_queue)
    await asyncio.to_thread(client.connect)
    waiting = asyncio.create_task(asyncio.to_thread(client.ask_job, text_job(marker, id=marker)))
    await until(lambda: calls_with(stack, marker), "the call")
    await asyncio.to_thread(client.cancel, marker)
    assert (await waiting).error is not None
    again = asyncio.create_task(asyncio.to_thread(client.ask_job, text_job(marker)))
    await until(lambda: len(calls_with(stack, marker)) == 2, "the second call")
    await asyncio.to_thread(client.close)
    with pytest.raises(ConnectionError, match="the client is closed"):
        await again
    await until(lambda: worker.metric("vqa_jobs_total", error="cancelled") == 2, "it is cancelled too")
    with pytest.raises(RuntimeError, match="the client is not open"):
        client.ask_job(text_job("?"))


def test_a_client_that_cannot_publish_raises_at_once(stack: Stack) -> None:
    with (
        pytest.raises(BrokerUnreachableError, match="the broker cannot be reached"),
        Client("amqp://guest:guest@127.0.0.1:1/", connect_timeout=0.5),
    ):
        pass
    with (
        Client(stack.rabbitmq.url, jobs_queue="no-such-queue") as client,
        pytest.raises(NoSuchQueueError, match="no-such-queue"),
    ):
        client.ask_job(text_job("?"), timeout=30)
