"""`AsyncClient` on the real stack, and the package `vqa_worker`."""

import asyncio
import json
import subprocess
import sys
import uuid
import zipfile
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aio_pika
import pytest
from pydantic import BaseModel

from deploy.local.model_simulator.behavior import Answer
from deploy.local.stack import Stack
from tests.breaking import BrokerUser, url_as
from tests.conftest import PutImage, StartWorker, picture
from tests.integration.cli.running import depth
from tests.proxy import Proxy
from tests.running import ROOT, Worker, build_wheel, calls_with, until
from vqa_worker import (
    AsyncClient,
    BrokerRefusedError,
    BrokerUnreachableError,
    ErrorCode,
    InvalidJobError,
    Job,
    JobFailedError,
    NoSuchQueueError,
    Replies,
    ReplyLostError,
    Result,
    TopologyError,
)
from worker import __version__ as worker_version

MODES: tuple[Replies, ...] = ("queue", "exclusive", "direct")


def text_job(text: str, **fields: Any) -> dict[str, Any]:
    """Return a job without images."""
    return {"messages": [{"role": "user", "content": text}], **fields}


def client_of(stack: Stack, worker: Worker, **options: Any) -> AsyncClient:
    return AsyncClient(stack.rabbitmq.url, jobs_queue=worker.jobs_queue, **options)


@pytest.fixture
async def asking(stack: Stack, worker: Worker) -> AsyncIterator[AsyncClient]:
    async with client_of(stack, worker) as client:
        yield client


# Publishing


@pytest.mark.parametrize("replies", MODES)
async def test_a_question_is_answered(
    stack: Stack, worker: Worker, put_image: PutImage, replies: Replies
) -> None:
    async with client_of(stack, worker, replies=replies) as client:
        result = await client.ask(put_image(), "What is this?", timeout=30)
        assert result.succeeded
        assert result.error is None
        assert "PNG" in str(result.answer)
        assert result.usage is not None
        assert result.usage.total_tokens


async def test_every_field_of_a_job_reaches_the_worker(
    asking: AsyncClient, stack: Stack, put_image: PutImage
) -> None:
    marker = uuid.uuid4().hex
    result = await asking.ask(
        [put_image(), put_image()],
        marker,
        id=f"id-{marker}",
        system="Be brief.",
        model="simulated/vision-small",
        params={"max_tokens": 9},
        metadata={"order": 17},
        deadline=datetime.now(UTC) + timedelta(minutes=1),
    )
    (call,) = calls_with(stack, marker)
    assert (result.id, result.model, result.metadata) == (f"id-{marker}", call.model, {"order": 17})
    assert call.params == {"max_tokens": 9}
    assert call.messages[0] == {"role": "system", "content": "Be brief."}
    assert [part["type"] for part in call.messages[1]["content"]] == ["image_url", "image_url", "text"]


async def test_a_job_that_fails_is_a_result_too(asking: AsyncClient) -> None:
    result = await asking.ask("s3://no-such-bucket/key", "What?")
    assert not result.succeeded
    assert result.answer is None
    assert result.error is not None
    assert result.error.code is ErrorCode.IMAGE_NOT_FOUND
    with pytest.raises(JobFailedError, match=r"^image_not_found: images\[0\]"):
        result.raise_for_error()
    past = await asking.ask("s3://b/k", "What?", deadline=datetime.now(UTC) - timedelta(seconds=1))
    assert past.error is not None
    assert past.error.code == "deadline_exceeded"


async def test_an_invalid_job_is_rejected_at_once(asking: AsyncClient) -> None:
    for job, text in (
        ({}, "needs question and images"),
        (text_job("?", imags=[]), "imags: unknown field"),
        (text_job("?", params={"stream": True}), "must not contain stream"),
    ):
        with pytest.raises(InvalidJobError, match=text):
            await asking.ask_job(job)


async def test_jobs_may_have_local_images(asking: AsyncClient, tmp_path: Path) -> None:
    path = tmp_path / "photo"
    path.write_bytes(picture("JPEG"))
    jobs = [{"question": "?", "images": [image]} for image in (str(path), path, picture("JPEG"))]
    async with aclosing(asking.ask_many(jobs, timeout=60)) as results:
        answers = [str(result.raise_for_error().answer) async for result in results]
    assert ["JPEG" in answer for answer in answers] == [True] * 3
    for image, error in (("nowhere.png", FileNotFoundError), (b"<html>", InvalidJobError)):
        with pytest.raises(error):
            await asking.ask(image, "?")


class Seen(BaseModel):
    colour: str
    count: int


async def test_an_answer_can_be_an_instance_of_a_pydantic_model(asking: AsyncClient) -> None:
    seen = await asking.ask(picture("JPEG"), "Which colour, and how many?", returns=Seen, timeout=60)
    assert isinstance(seen, Seen)


async def test_many_jobs_are_published_some_at_a_time(stack: Stack, worker: Worker) -> None:
    taken = 0

    def jobs() -> Iterator[Job]:
        nonlocal taken
        for number in range(100):
            taken += 1
            yield Job.model_validate(text_job("Many?", id=f"{uuid.uuid4().hex}-{number}"))

    async with client_of(stack, worker, max_in_flight=10) as client:
        seen: list[Result] = []
        async with aclosing(client.ask_many(jobs())) as results:
            async for result in results:
                seen.append(result)
                assert taken - len(seen) <= 10 + 1
    numbers = sorted(int(str(result.id).rpartition("-")[2]) for result in seen)
    assert numbers == list(range(100))
    assert all(result.succeeded for result in seen)


async def test_jobs_may_be_produced_one_by_one(asking: AsyncClient) -> None:
    """Results are returned before the next job is available."""
    more = asyncio.Event()

    async def jobs() -> AsyncIterator[dict[str, Any]]:
        yield text_job("First?")
        await more.wait()
        yield text_job("Second?")

    async with aclosing(asking.ask_many(jobs())) as results:
        assert (await anext(results)).succeeded
        more.set()
        assert (await anext(results)).succeeded
        assert await anext(results, None) is None


async def test_an_id_can_be_in_flight_only_once(asking: AsyncClient, stack: Stack) -> None:
    marker = uuid.uuid4().hex
    stack.model.play(Answer(after=1.0), marker=marker, times=None)
    first = asyncio.create_task(asking.ask_job(text_job(marker, id=marker)))
    await until(lambda: calls_with(stack, marker), "the first call")
    with pytest.raises(ValueError, match="is already in flight"):
        await asking.ask_job(text_job(marker, id=marker))
    assert (await first).succeeded


# Cancelling


async def test_a_job_is_cancelled_when_its_caller_stops_waiting(
    stack: Stack, start_worker: StartWorker
) -> None:
    worker = await start_worker(VQA_MAX_CONCURRENCY="1")
    marker = uuid.uuid4().hex
    stack.model.play(Answer(after=60), marker=marker, times=None)
    async with client_of(stack, worker) as client:
        with pytest.raises(TimeoutError):
            await client.ask_job(text_job(marker), timeout=1.0)
        # The next job gets the only slot, because the call was cancelled.
        assert (await client.ask_job(text_job("Next?"), timeout=60)).succeeded
    await until(lambda: worker.metric("vqa_jobs_total", error="cancelled") == 1, "the job is counted")


async def test_jobs_in_flight_are_cancelled_when_the_iteration_ends_early(
    stack: Stack, start_worker: StartWorker
) -> None:
    worker = await start_worker(VQA_MAX_CONCURRENCY="8")
    marker = uuid.uuid4().hex
    stack.model.play(Answer(after=60), marker=marker, times=None)
    async with client_of(stack, worker) as client:
        jobs = [text_job("Quick?"), *(text_job(marker) for _ in range(3))]
        async with aclosing(client.ask_many(jobs)) as results:
            assert (await anext(results)).succeeded
            await until(lambda: len(calls_with(stack, marker)) == 3, "the other calls")
    await until(lambda: worker.metric("vqa_jobs_total", error="cancelled") == 3, "they are cancelled")


async def test_a_job_whose_task_is_cancelled_just_before_the_end_is_cancelled(
    stack: Stack, start_worker: StartWorker
) -> None:
    worker = await start_worker()
    marker = uuid.uuid4().hex
    stack.model.play(Answer(after=60), marker=marker, times=None)
    async with client_of(stack, worker) as client:
        asking = asyncio.create_task(client.ask_job(text_job(marker)))
        await until(lambda: calls_with(stack, marker), "the call")
        asking.cancel()
    await until(lambda: worker.metric("vqa_jobs_total", error="cancelled") == 1, "it is cancelled")
    assert asking.cancelled()


async def test_a_job_can_be_cancelled_by_its_id(asking: AsyncClient, stack: Stack) -> None:
    marker = uuid.uuid4().hex
    stack.model.play(Answer(after=60), marker=marker, times=None)
    answer = asyncio.create_task(asking.ask_job(text_job(marker, id=marker)))
    await until(lambda: calls_with(stack, marker), "the call")
    await asking.cancel(marker)
    result = await answer
    assert result.error is not None
    assert result.error.code is ErrorCode.CANCELLED


async def test_a_timeout_is_the_job_s_deadline(stack: Stack) -> None:
    queue = f"lone-{uuid.uuid4().hex}"
    async with await aio_pika.connect(stack.rabbitmq.url) as connection:
        channel = await connection.channel()
        declared = await channel.declare_queue(queue, exclusive=True)
        async with AsyncClient(stack.rabbitmq.url, jobs_queue=queue) as client:
            before = datetime.now(UTC)
            with pytest.raises(TimeoutError):
                await client.ask_job(text_job("?"), timeout=1.0)
            message = await declared.get(no_ack=True)
            assert message is not None
            deadline = datetime.fromisoformat(json.loads(message.body)["deadline"])
            assert before + timedelta(seconds=1) <= deadline <= datetime.now(UTC) + timedelta(seconds=1)
            # Without a control exchange the cancellation cannot be published, which raises.
            with pytest.raises(ConnectionError, match=rf"{queue}\.control"):
                await client.cancel("any")


# Connections


async def test_jobs_survive_a_lost_connection(stack: Stack, worker: Worker) -> None:
    marker = uuid.uuid4().hex
    stack.model.play(Answer(after=2.0), marker=marker, times=None)
    async with Proxy.before(stack.rabbitmq.url) as proxy:
        url = proxy.url(stack.rabbitmq.url)
        async with AsyncClient(url, jobs_queue=worker.jobs_queue) as client:
            answers = [asyncio.create_task(client.ask_job(text_job(f"{marker} {n}"))) for n in range(5)]
            await until(lambda: len(calls_with(stack, marker)) == 5, "all calls")
            await proxy.refuse()
            proxy.reset()
            # The results arrive while the client is disconnected.
            await until(lambda: all(call.ended for call in calls_with(stack, marker)), "all are answered")
            asked_meanwhile = asyncio.create_task(client.ask_job(text_job("Meanwhile?")))
            await proxy.accept()
            assert all(result.succeeded for result in await asyncio.gather(*answers, asked_meanwhile))
    assert len(calls_with(stack, marker)) == 5


@pytest.mark.parametrize("replies", ["exclusive", "direct"])
async def test_a_result_that_is_lost_with_the_connection_raises(
    stack: Stack, worker: Worker, replies: Replies
) -> None:
    marker = uuid.uuid4().hex
    stack.model.play(Answer(after=1.0), marker=marker, times=None)
    async with Proxy.before(stack.rabbitmq.url) as proxy:
        url = proxy.url(stack.rabbitmq.url)
        async with AsyncClient(url, jobs_queue=worker.jobs_queue, replies=replies) as client:
            answer = asyncio.create_task(client.ask_job(text_job(marker)))
            await until(lambda: calls_with(stack, marker), "the call")
            # An unconfirmed job would be published again, and answered.
            await until(lambda: client._confirmed, "the confirm")  # noqa: SLF001 - nothing else shows it
            proxy.reset()
            with pytest.raises(ReplyLostError):
                await answer
            assert (await client.ask_job(text_job("Again?"), timeout=60)).succeeded


@pytest.mark.parametrize("replies", ["queue", "exclusive"])
async def test_a_deleted_reply_queue_is_created_again(stack: Stack, worker: Worker, replies: Replies) -> None:
    async with (
        client_of(stack, worker, replies=replies) as client,
        await aio_pika.connect(stack.rabbitmq.url) as connection,
    ):
        requests = client._requests  # noqa: SLF001 - nobody else needs to know its queue
        first = requests.reply_to
        if replies == "queue":
            await (await connection.channel()).queue_delete(first)
        else:
            # Only the declaring connection can delete an exclusive queue.
            assert requests._channel is not None  # noqa: SLF001
            await requests._channel.queue_delete(first)  # noqa: SLF001
        await until(lambda: not requests.connected.is_set(), "the session ends")
        assert (await client.ask_job(text_job("Still there?"), timeout=60)).succeeded


async def test_the_reply_queue_is_deleted_with_the_client(stack: Stack, worker: Worker) -> None:
    async with client_of(stack, worker) as client:
        assert (await client.ask_job(text_job("Hello?"))).succeeded
        queue = client._requests.reply_to  # noqa: SLF001 - nobody else needs to know it
        assert queue.startswith("vqa.results.client-")
        assert await depth(stack, queue) == 0
    assert await depth(stack, queue) is None
    with pytest.raises(RuntimeError, match="the client is not open"):
        await client.ask_job(text_job("Hello?"))


@pytest.mark.parametrize("url", ["", "rabbitmq:5672", "http://rabbitmq:15672/"])
def test_a_url_of_another_kind_is_refused(url: str) -> None:
    for urls in ([], ["amqp://a/", "b"], "amqp://a/,amqps://b/", ["amqp://a/v", "amqp://b/w"]):
        with pytest.raises(ValueError, match=r"^the "):
            AsyncClient(urls)
    with pytest.raises(ValueError, match=r"^the broker's URL must begin with amqp:// or amqps://$"):
        AsyncClient(url)


async def test_a_client_that_cannot_publish_raises_at_once(stack: Stack) -> None:
    with pytest.raises(BrokerUnreachableError, match="the broker cannot be reached"):
        async with AsyncClient("amqp://guest:guest@127.0.0.1:1/", connect_timeout=0.5):
            pass
    with pytest.raises(BrokerRefusedError, match="the broker's URL: the broker refuses this user name"):
        async with AsyncClient(url_as(stack, "guest", "wr0ng")):
            pass
    with BrokerUser.of(stack, configure="^$") as user:
        with pytest.raises(TopologyError, match="lacks a permission"):
            async with AsyncClient(user.url):
                pass
        async with AsyncClient(user.url, replies="direct", jobs_queue="no-such-queue") as client:
            with pytest.raises(NoSuchQueueError, match="no-such-queue"):
                await client.ask_job(text_job("?"))


async def test_unknown_fields_and_codes_of_a_newer_worker_are_accepted() -> None:
    body = {
        "id": "x",
        "status": "failed",
        "error": {"code": "new_code", "message": "…", "retryable": False, "more": 1},
        "timings": {"total_s": 1.0, "new_s": 2.0},
        "colour": "blue",
    }
    result = Result.model_validate_json(json.dumps(body), extra="ignore")
    assert result.error is not None
    assert result.error.code == "new_code"


def test_mypy_checks_programs_that_use_the_client(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "from vqa_worker import AsyncClient, Client\n"
        "async def main() -> None:\n"
        "    async with AsyncClient('amqp://') as client:\n"
        "        result = await client.ask('s3://b/k', 'What?')\n"
        "        reveal_type(result.answer)\n"
        "        async for one in client.ask_many([{'question': '?'}]):\n"
        "            reveal_type(one)\n"
        "        await client.ask('s3://b/k')\n"
        "with Client('amqp://', max_in_flight='1') as client:\n"
        "    reveal_type(client.ask(b'', '?', id='x').raise_for_error())\n"
    )
    # The types of third-party libraries do not matter here, and take most of the time.
    quick = ("--no-site-packages", "--follow-imports=silent", "--ignore-missing-imports")
    checked = subprocess.run(  # noqa: S603 - a test's own
        [
            *(sys.executable, "-m", "mypy", "--strict", "--config-file=", *quick),
            *(f"--cache-dir={ROOT / '.mypy_cache/programs'}", str(program)),
        ],
        capture_output=True,
        text=True,
        env={"MYPYPATH": str(ROOT), "PATH": ""},
        cwd=tmp_path,
        check=False,
    )
    shown = checked.stdout
    assert '"str | None"' in shown, shown + checked.stderr
    assert shown.count('"vqa_worker.results.Result"') == 2
    assert 'No overload variant of "ask" of "AsyncClient" matches argument type "str"' in shown
    assert 'Argument "max_in_flight" to "Client" has incompatible type "str"' in shown
    assert "Found 2 errors in 1 file" in shown


# Packaging

# Prints an answer, and the modules that must not have been imported.
OWN_PROGRAM = """\
import sys
sys.modules.update(dict.fromkeys(("aiohttp", "boto3", "botocore", "openai", "pydantic_settings", "typer")))
import vqa_worker
with vqa_worker.Client(sys.argv[1], jobs_queue=sys.argv[2]) as client:
    print(client.ask(sys.argv[3], "What is this?").raise_for_error().answer)
print(vqa_worker.__file__, "worker" in sys.modules)
import worker
"""


def test_the_client_s_wheel_works_in_a_program_with_a_module_named_worker(
    stack: Stack, worker: Worker, tmp_path: Path
) -> None:
    wheel = build_wheel(ROOT / "vqa_worker", tmp_path)
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    assert {path.name for path in installed.iterdir()} == {
        "vqa_worker",
        f"vqa_worker_client-{worker_version}.dist-info",
    }
    assert (installed / "vqa_worker/py.typed").exists()
    (tmp_path / "photo.png").write_bytes(picture())
    (tmp_path / "worker.py").write_text("print('my own worker')")
    (tmp_path / "program.py").write_text(OWN_PROGRAM)
    done = subprocess.run(  # noqa: S603 - a test's own
        [sys.executable, "program.py", stack.rabbitmq.url, worker.jobs_queue, "photo.png"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(installed)},
        cwd=tmp_path,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    answer, *others = done.stdout.splitlines()
    assert "PNG" in answer
    assert others == [f"{installed}/vqa_worker/__init__.py False", "my own worker"]
