"""Results that are too large for a message are written to S3, and nothing is billed twice for that."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aio_pika
import pytest
from pydantic import BaseModel

from deploy.local.model_simulator.behavior import Answer
from deploy.local.model_simulator.calls import Call
from deploy.local.stack import Stack
from tests.breaking import events, job, model_answered, results, statuses
from tests.conftest import BUCKET, MakeClient, StartWorker
from tests.fake_s3 import FakeS3, refuse
from tests.integration.cli.running import channel_of, commands, ended
from tests.proxy import Proxy
from tests.running import Client, Worker, calls_with, until
from tests.unit.s3 import isolate
from vqa_worker import AsyncClient, LargeResultError, Replies
from vqa_worker import Client as SyncClient
from worker.cli.submit.limits import FIRST_JOBS
from worker.cli.submit.state import Counts, read_state

# RabbitMQ 4's default.
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
LARGE_BYTES = 40_000_000
# AMQP 0-9-1: class and method of a frame from the worker to the broker.
BASIC_PUBLISH = b"\x00\x3c\x00\x28"

# For tests that need no broker with a limit.
MAX_RESULT_BYTES = 5_000
TEXT = "x" * MAX_RESULT_BYTES


@pytest.fixture
def written_to() -> str:
    """Return the URL of the test's own large results."""
    return f"s3://{BUCKET}/large-{uuid.uuid4().hex}"


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stack: Stack) -> None:
    """Give this process, in which clients run, the credentials of `stack`."""
    isolate(monkeypatch, tmp_path)
    use_credentials(monkeypatch, stack)


def use_credentials(monkeypatch: pytest.MonkeyPatch, stack: Stack) -> None:
    for name, value in stack.environment().items():
        if not name.startswith("VQA_"):
            monkeypatch.setenv(name, value)


def objects(stack: Stack, url: str) -> dict[str, bytes]:
    """Return the contents of the results below a URL by their URLs."""
    s3, prefix = stack.s3.client(), f"{url.removeprefix(f's3://{BUCKET}/')}/"
    keys = [it["Key"] for it in s3.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])]
    return {
        f"s3://{BUCKET}/{key}": s3.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        for key in keys
        # What the worker writes at its start.
        if key != f"{prefix}check"
    }


def large_client(stack: Stack, worker: Worker, **options: Any) -> AsyncClient:
    return AsyncClient(
        stack.rabbitmq.url, jobs_queue=worker.jobs_queue, s3_endpoint_url=stack.s3.endpoint_url, **options
    )


# RabbitMQ's limit


@pytest.fixture(scope="module")
async def limited_stack(own_stack: Stack) -> AsyncIterator[Stack]:
    """A stack whose broker has the limit of RabbitMQ 4."""

    async def limit(size: int) -> None:
        await asyncio.to_thread(
            own_stack.rabbitmq.ctl, "eval", f"application:set_env(rabbit, max_message_size, {size})."
        )

    await limit(MAX_MESSAGE_BYTES)
    try:
        yield own_stack
    finally:
        await limit(128 * 1024 * 1024)


async def test_a_result_of_40_mb_arrives_at_the_client_and_on_the_command_line(
    limited_stack: Stack,
    start_own_worker: StartWorker,
    written_to: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stack, marker = limited_stack, uuid.uuid4().hex
    use_credentials(monkeypatch, stack)
    # The result has it twice: the worker reads no response of 40 MB.
    text = "".join(f"{n:07}," for n in range(LARGE_BYTES // 16))
    stack.model.play(Answer(text=text), marker=marker, times=None)
    worker = await start_own_worker(VQA_LARGE_RESULTS=written_to, VQA_INCLUDE_RESPONSE="true")
    async with large_client(stack, worker) as client:
        result = await client.ask_job(job(marker, metadata={"whose": "mine"}))
    assert result.raise_for_error().answer == text
    assert result.response is not None
    assert len(result.to_body()) > LARGE_BYTES
    assert result.metadata == {"whose": "mine"}
    assert result.usage is not None
    assert result.result_url in objects(stack, written_to)

    with commands(stack, tmp_path, worker) as cli:
        cli.write("jobs.jsonl", job(marker))
        done = await cli.run("submit", "jobs.jsonl", "--wait", "-o", "out.jsonl")
        assert done.code == 0, done.err
        (line,) = cli.read("out.jsonl")
    assert line["answer"] == line["response"]["choices"][0]["message"]["content"] == text
    assert line["result_url"] in objects(stack, written_to)
    assert len(calls_with(stack, marker)) == 2
    # After the first refusal, the worker knows the limit.
    await until(lambda: len(events(worker, "job_finished")) == 2, "both jobs are logged")
    assert {it["result_url"] for it in events(worker, "job_finished")} == set(objects(stack, written_to))


async def test_without_the_setting_the_answer_is_in_the_result_store_until_there_is_a_place_for_it(
    limited_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient, written_to: str
) -> None:
    stack, marker = limited_stack, uuid.uuid4().hex
    text = "y" * (MAX_MESSAGE_BYTES + 1)
    stack.model.play(Answer(text=text), marker=marker)
    store = {"VQA_RESULT_STORE": f"s3://{BUCKET}/answers/{uuid.uuid4().hex}"}
    before = await start_own_worker(**store)
    client, it = await own_client_of(before), job(marker)
    await client.publish(it)
    failed = (await client.result(it["id"])).body
    assert failed["error"]["code"] == "result_too_large"
    assert "VQA_LARGE_RESULTS" in failed["error"]["message"]
    assert failed["usage"]["completion_tokens"] > 0
    assert await before.stop() == 0

    await start_own_worker(like=before, VQA_LARGE_RESULTS=written_to, **store)
    await client.publish(it)
    await until(lambda: len(client.replies[it["id"]]) == 2, "the second result")
    again = client.replies[it["id"]][1].body
    assert (again["status"], again["answer"]) == ("succeeded", None)
    assert json.loads(objects(stack, written_to)[again["result_url"]])["answer"] == text
    assert len(calls_with(stack, marker)) == 1


# VQA_MAX_RESULT_BYTES


async def limited(start: StartWorker, written_to: str, **settings: str) -> Worker:
    """Start a worker that writes results of some kilobytes to S3."""
    return await start(VQA_LARGE_RESULTS=written_to, VQA_MAX_RESULT_BYTES=str(MAX_RESULT_BYTES), **settings)


async def test_only_a_result_over_the_limit_is_written_and_its_message_has_all_but_the_answer(
    stack: Stack, start_worker: StartWorker, client_of: MakeClient, written_to: str
) -> None:
    worker = await limited(start_worker, written_to, VQA_INCLUDE_RESPONSE="true")
    client, marker = await client_of(worker), uuid.uuid4().hex
    stack.model.play(Answer(text=TEXT), marker=marker)
    small = (await client.ask(**job(metadata={"n": 1}))).body
    assert small["result_url"] is None
    assert small["answer"]
    reply = await client.ask(**job(marker, metadata={"n": 2}))
    ((url, content),) = objects(stack, written_to).items()
    whole = json.loads(content)
    assert reply.body == {**whole, "answer": None, "parsed": None, "response": None, "result_url": url}
    assert (whole["answer"], whole["metadata"], whole["result_url"]) == (TEXT, {"n": 2}, None)
    assert whole["response"]["choices"][0]["message"]["content"] == TEXT
    head = stack.s3.client().head_object(Bucket=BUCKET, Key=url.removeprefix(f"s3://{BUCKET}/"))
    assert head["ContentType"] == "application/json"
    await until(lambda: len(events(worker, "job_finished")) == 2, "both jobs are logged")
    assert [it.get("result_url") for it in events(worker, "job_finished")] == [None, url]


async def test_the_limit_alone_makes_a_larger_result_a_failed_one(
    stack: Stack, start_worker: StartWorker, client_of: MakeClient
) -> None:
    worker = await start_worker(VQA_MAX_RESULT_BYTES=str(MAX_RESULT_BYTES))
    client, marker = await client_of(worker), uuid.uuid4().hex
    stack.model.play(Answer(text=TEXT), marker=marker)
    error = (await client.ask(**job(marker))).body["error"]
    assert error["code"] == "result_too_large"
    assert f"VQA_MAX_RESULT_BYTES is {MAX_RESULT_BYTES}" in error["message"]
    assert "set VQA_LARGE_RESULTS" in error["message"]


class Item(BaseModel):
    """A structured answer."""

    text: str


@pytest.mark.parametrize("replies", ["queue", "exclusive", "direct"])
async def test_every_kind_of_reply_is_followed_also_for_structured_answers(
    stack: Stack, start_worker: StartWorker, written_to: str, replies: Replies
) -> None:
    worker, marker = await limited(start_worker, written_to), uuid.uuid4().hex
    stack.model.play(Answer(text=json.dumps({"text": TEXT})), marker=marker, times=None)
    async with large_client(stack, worker, replies=replies) as client:
        item = await client.ask(job()["images"], marker, returns=Item)
    assert item == Item(text=TEXT)
    (content,) = objects(stack, written_to).values()
    assert json.loads(content)["parsed"] == {"text": TEXT}


async def test_the_client_without_asyncio_follows_a_result_too(
    stack: Stack, start_worker: StartWorker, written_to: str
) -> None:
    worker, marker = await limited(start_worker, written_to), uuid.uuid4().hex
    stack.model.play(Answer(text=TEXT), marker=marker)

    def ask() -> str | None:
        queue, url = worker.jobs_queue, stack.s3.endpoint_url
        with SyncClient(stack.rabbitmq.url, jobs_queue=queue, s3_endpoint_url=url) as client:
            return client.ask_job(job(marker)).answer

    assert await asyncio.to_thread(ask) == TEXT


async def test_an_object_that_cannot_be_read_is_an_exception_with_the_rest_of_the_result(
    stack: Stack, start_worker: StartWorker, written_to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, marker = await limited(start_worker, written_to), uuid.uuid4().hex
    stack.model.play(Answer(text=TEXT), marker=marker)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    async with large_client(stack, worker) as client:
        with pytest.raises(LargeResultError, match=f"{written_to}/.* cannot be read: ") as caught:
            await client.ask_job(job(marker, metadata={"n": 1}))
    result = caught.value.result
    assert (result.status, result.answer, result.metadata) == ("succeeded", None, {"n": 1})
    assert result.usage is not None
    assert result.result_url in objects(stack, written_to)
    assert len(calls_with(stack, marker)) == 1


async def test_a_read_that_takes_too_long_does_not_lose_the_result_and_cancels_nothing(
    stack: Stack, start_worker: StartWorker, written_to: str
) -> None:
    worker, marker = await limited(start_worker, written_to), uuid.uuid4().hex
    stack.model.play(Answer(text=TEXT), marker=marker, times=None)
    async with Proxy.before(stack.s3.endpoint_url) as s3:
        s3.freeze()
        url = s3.url(stack.s3.endpoint_url)
        async with AsyncClient(
            stack.rabbitmq.url, jobs_queue=worker.jobs_queue, s3_endpoint_url=url
        ) as client:
            it, error = await until(lambda: read_too_slowly(client, marker), "an exception")
        s3.reset()
    assert "was not read within" in str(error)
    assert error.result.result_url in objects(stack, written_to)
    async with large_client(stack, worker) as client:
        assert (await client.ask_job(it)).raise_for_error().answer == TEXT


async def read_too_slowly(client: AsyncClient, marker: str) -> tuple[dict[str, Any], LargeResultError] | None:
    """Ask and wait for some seconds; return the job and the exception, or None if there is no answer yet."""
    # Otherwise the timeout would be the deadline.
    it = job(marker, deadline="2999-01-01T00:00:00Z")
    try:
        await client.ask_job(it, timeout=5)
    except LargeResultError as error:
        return it, error
    except TimeoutError:
        return None
    raise AssertionError("the result was read")


WRONG_URLS: dict[str, tuple[Any, str]] = {
    "of another scheme": ("https://host/object", "not of the form s3://bucket/key"),
    "of a file": ("file:///etc/passwd", "not of the form s3://bucket/key"),
    "a bucket": (f"s3://{BUCKET}", "not of the form s3://bucket/key"),
    "with control characters": (f"s3://{BUCKET}/a\x1b[2J", "not of the form s3://bucket/key"),
    "empty": ("", "not of the form s3://bucket/key"),
    "of an object that is not JSON": ("text", "is not a result"),
    "of JSON that is not a result": ("[1]", "is not a result"),
    "of a deeply nested object": ("[" * 100_000, "is not a result"),
    "of another job's result": ('{"id": "other", "status": "succeeded"}', "is the result of another job"),
    "of a failed result": ('{"id": "%(id)s", "status": "failed"}', "is the result of another job"),
}


def url_for(stack: Stack, url: str, job_id: str) -> str:
    """Return a URL of the table; a content is put into an object first."""
    if "://" in url or not url:
        return url
    key = f"wrong/{uuid.uuid4().hex}"
    stack.s3.client().put_object(Bucket=BUCKET, Key=key, Body=(url.replace("%(id)s", job_id)).encode())
    return f"s3://{BUCKET}/{key}"


@pytest.mark.parametrize("case", WRONG_URLS)
async def test_a_wrong_url_is_an_exception_of_the_client(
    stack: Stack, start_worker: StartWorker, case: str
) -> None:
    """Somebody else answers, instead of a worker."""
    url, message = WRONG_URLS[case]
    worker, it = await start_worker(), job()
    # Only its queue is needed.
    assert await worker.stop() == 0
    async with large_client(stack, worker) as client, channel_of(stack) as channel:
        asking = asyncio.create_task(client.ask_job(it))
        queue = await channel.get_queue(worker.jobs_queue)
        asked = await until(lambda: queue.get(fail=False), "the job")
        body = {
            "id": it["id"],
            "status": "succeeded",
            "result_url": url_for(stack, url, it["id"]),
        }
        await channel.default_exchange.publish(
            aio_pika.Message(json.dumps(body).encode()), str(asked.reply_to)
        )
        await asked.ack()
        with pytest.raises(LargeResultError, match=message):
            await asking


# On the command line


async def sent_by_hand(stack: Stack, submitted: dict[str, Any], *bodies: dict[str, Any]) -> None:
    async with channel_of(stack) as channel:
        for body in bodies:
            message = aio_pika.Message(json.dumps({"status": "succeeded", **body}).encode())
            await channel.default_exchange.publish(message, submitted["reply_to"])


async def test_wrong_urls_fail_their_jobs_on_the_command_line_and_no_others(
    stack: Stack, tmp_path: Path
) -> None:
    wrong = {**WRONG_URLS, "a number": (5, "not of the form s3://bucket/key")}
    with commands(stack, tmp_path) as cli:
        assert (await cli.run("topology", "apply")).code == 0
        ids = [uuid.uuid4().hex for _ in wrong]
        whole = uuid.uuid4().hex
        cli.write("jobs.jsonl", *(job(id=it) for it in [*ids, whole]))
        submitted = (await cli.run("submit", "jobs.jsonl", "--json")).summary
        bodies = [
            {"id": it, "result_url": url_for(stack, url, it) if isinstance(url, str) else url}
            for it, (url, _) in zip(ids, wrong.values(), strict=True)
        ]
        # A result of a job that nobody submitted is not read.
        unknown = {"id": "unknown", "result_url": f"s3://{BUCKET}/none"}
        await sent_by_hand(stack, submitted, unknown, *bodies, {"id": whole, "answer": "right"})
        done = await cli.run("submissions", "collect", submitted["name"], "-o", "out.jsonl", "--json")
        assert done.code == 1, done.err
        assert (done.summary["succeeded"], done.summary["failed"]) == (1, len(wrong))
        found = {line["id"]: line for line in cli.read("out.jsonl")}
    assert found[whole]["answer"] == "right"
    for it, (_, message) in zip(ids, wrong.values(), strict=True):
        assert found[it]["status"] == "failed"
        assert found[it]["error"]["code"] == "invalid_result_url"
        assert message in found[it]["error"]["message"]


async def test_a_result_that_cannot_be_read_stays_in_the_queue_and_the_others_are_collected(
    stack: Stack, tmp_path: Path
) -> None:
    with commands(stack, tmp_path) as cli:
        assert (await cli.run("topology", "apply")).code == 0
        missing, other = uuid.uuid4().hex, uuid.uuid4().hex
        key = f"later/{missing}.json"
        url = f"s3://{BUCKET}/{key}"
        cli.write("jobs.jsonl", job(id=missing), job(id=other))
        submitted = (await cli.run("submit", "jobs.jsonl", "--json")).summary
        bodies = {"id": missing, "result_url": url}, {"id": other, "answer": "right"}
        await sent_by_hand(stack, submitted, *bodies)
        collect = ("submissions", "collect", submitted["name"], "-o", "out.jsonl")
        for arguments in ((), ("--no-wait",)):
            failed = await cli.run(*collect, *arguments)
            assert failed.code == 1
            assert "1 result in S3 cannot be read." in failed.err
            assert f"{url} cannot be read: the object does not exist" in failed.err
            assert submitted["reply_to"] in failed.err
            assert [line["id"] for line in cli.read("out.jsonl")] == [other]
        denied = await cli.run(*collect, AWS_SECRET_ACCESS_KEY="wrong")
        assert denied.code == 1
        assert f"{url} cannot be read: S3 answered SignatureDoesNotMatch" in denied.err

        whole = {"id": missing, "status": "succeeded", "answer": "left"}
        stack.s3.client().put_object(Bucket=BUCKET, Key=key, Body=json.dumps(whole).encode())
        done = await cli.run(*collect)
        assert done.code == 0, done.err
        assert [line["answer"] for line in cli.read("out.jsonl")] == ["left", "right"]


async def test_many_results_that_cannot_be_read_end_the_command(stack: Stack, tmp_path: Path) -> None:
    with commands(stack, tmp_path) as cli:
        assert (await cli.run("topology", "apply")).code == 0
        ids = [uuid.uuid4().hex for _ in range(20)]
        cli.write("jobs.jsonl", *(job(id=it) for it in ids))
        submitted = (await cli.run("submit", "jobs.jsonl", "--json")).summary
        await sent_by_hand(
            stack, submitted, *({"id": it, "result_url": f"s3://{BUCKET}/none/{it}"} for it in ids)
        )
        done = await cli.run("submissions", "collect", submitted["name"])
        assert done.code == 1
        assert "10 results in S3 cannot be read." in done.err


async def test_a_submission_does_not_wait_for_the_cost_of_results_that_cannot_be_read(
    stack: Stack, tmp_path: Path
) -> None:
    """With a limit, further jobs are sent only as the costs of the first ones become known."""
    with commands(stack, tmp_path) as cli:
        assert (await cli.run("topology", "apply")).code == 0
        cli.write("jobs.jsonl", *(job(id=f"{n}") for n in range(30)))
        submitting = cli.start("submit", "jobs.jsonl", "--wait", "--max-cost", "1")
        await until(lambda: (cli.counts() or Counts()).confirmed == FIRST_JOBS, "the first jobs are sent")
        head, _ = read_state(cli.state_files[0])
        bodies = [{"id": f"{n}", "answer": "without a cost"} for n in range(FIRST_JOBS - 3)]
        bodies += [{"id": f"{FIRST_JOBS - n}", "result_url": f"s3://{BUCKET}/none/{n}"} for n in (1, 2, 3)]
        await sent_by_hand(stack, head, *bodies)
        done = await ended(submitting)
        assert done.code == 1
        assert "3 results in S3 cannot be read." in done.err
        counts = cli.counts() or Counts()
        assert (counts.succeeded, counts.confirmed) == (FIRST_JOBS - 3, FIRST_JOBS)


# Failures of S3 and of workers


async def test_while_s3_refuses_results_are_kept_and_nothing_is_billed_twice(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient, written_to: str
) -> None:
    marker = uuid.uuid4().hex
    own_stack.model.play(Answer(text=TEXT), marker=marker, times=None)
    async with Proxy.before(own_stack.s3.endpoint_url) as s3:
        worker = await limited(
            start_own_worker, written_to, VQA_S3_ENDPOINT_URL=s3.url(own_stack.s3.endpoint_url)
        )
        client = await own_client_of(worker)
        await s3.refuse()
        s3.reset()
        jobs = [job(f"{marker} {n}") for n in range(3)]
        for it in jobs:
            await client.publish(it)
        await until(lambda: events(worker, "large_result_write_failed"), "a warning")
        await model_answered(own_stack, marker)
        assert client.replies == {}
        await s3.accept()
        replies = await results(client, [it["id"] for it in jobs])
    assert statuses(replies) == {"succeeded": 3}
    assert {reply.body["result_url"] for reply in replies} == set(objects(own_stack, written_to))
    assert len(calls_with(own_stack, marker)) == 3


async def test_a_worker_that_may_not_write_reports_it_at_its_start(start_worker: StartWorker) -> None:
    async with FakeS3.serving(b"") as fake:
        fake.answer = refuse(403, "AccessDenied")
        settings = {"VQA_LARGE_RESULTS": "s3://bucket/large", "VQA_S3_ENDPOINT_URL": fake.url}
        worker = await start_worker(**settings)
        (line,) = events(worker, "large_results_unavailable")
        assert line["level"] == "warning"
        assert line["reason"] == (
            "VQA_LARGE_RESULTS: S3 answered 403 AccessDenied: the worker must be allowed to put objects there"
        )
        assert await worker.stop() == 0
    assert {(it.method, it.target) for it in fake.asked} == {("PUT", "/bucket/large/check")}


@dataclass(frozen=True)
class Life:
    """A job with a large result in a worker that will be killed."""

    stack: Stack
    worker: Worker
    client: Client
    broker: Proxy
    s3: Proxy
    model: Proxy
    written_to: str
    marker: str
    job: dict[str, Any]

    def calls(self) -> list[Call]:
        # The last message of a repair is not the job's question.
        return [call for call in self.stack.model.calls("") if self.marker in str(call.messages)]


async def between_answer_and_s3(life: Life) -> None:
    prefix = life.written_to.removeprefix("s3://")
    life.s3.freezes_on = f"PUT /{prefix}/".encode()
    await life.client.publish(life.job)
    await until(lambda: life.s3.held, "the worker writes the result to S3")
    stored = "vqa_result_store_operations_total"
    assert life.worker.metric(stored, result="stored") == 1
    assert objects(life.stack, life.written_to) == {}


async def between_s3_and_publish(life: Life) -> None:
    life.broker.holds_up = BASIC_PUBLISH
    await life.client.publish(life.job)
    await until(lambda: life.broker.holds_up is None, "the worker publishes the result")
    assert len(objects(life.stack, life.written_to)) == 1


async def between_call_and_repair(life: Life) -> None:
    life.stack.model.play(Answer(text=f"wrong {TEXT}"), marker=life.marker)
    life.model.freezes_on, life.model.passes = life.marker.encode(), 1
    await life.client.publish(life.job)
    await until(lambda: life.model.held, "the worker asks for a repair")
    assert len(life.calls()) == 1


@pytest.mark.parametrize(
    ("dies", "calls"),
    [(between_answer_and_s3, 1), (between_s3_and_publish, 1), (between_call_and_repair, 2)],
    ids=lambda value: value.__name__ if callable(value) else None,
)
async def test_nothing_is_billed_twice_when_the_worker_is_killed_on_the_way_to_s3(
    own_stack: Stack,
    start_own_worker: StartWorker,
    own_client_of: MakeClient,
    written_to: str,
    dies: Callable[[Life], Awaitable[None]],
    calls: int,
) -> None:
    """With a result store. A repair is a call more in any case."""
    store = {"VQA_RESULT_STORE": f"s3://{BUCKET}/answers/{uuid.uuid4().hex}"}
    right, marker = json.dumps({"text": TEXT}), uuid.uuid4().hex
    schema = {"type": "json_schema", "json_schema": {"name": "item", "schema": Item.model_json_schema()}}
    async with AsyncExitStack() as proxies:
        broker, s3, model = [
            await proxies.enter_async_context(Proxy.before(url))
            for url in (own_stack.rabbitmq.url, own_stack.s3.endpoint_url, own_stack.model.base_url)
        ]
        doomed = await limited(
            start_own_worker,
            written_to,
            VQA_RABBITMQ_URL=broker.url(own_stack.rabbitmq.url),
            VQA_S3_ENDPOINT_URL=s3.url(own_stack.s3.endpoint_url),
            VQA_MODEL_BASE_URL=model.url(own_stack.model.base_url),
            **store,
        )
        client = await own_client_of(doomed)
        asked = job(marker, params={"response_format": schema})
        life = Life(own_stack, doomed, client, broker, s3, model, written_to, marker, asked)
        if dies is not between_call_and_repair:
            own_stack.model.play(Answer(text=right), marker=marker, times=None)
        await dies(life)
        doomed.kill()
    own_stack.model.play(Answer(text=right), marker=marker, times=None)
    worker = await limited(start_own_worker, written_to, **{**store, **_queues(doomed)})
    reply = await client.result(asked["id"])
    ((url, content),) = objects(own_stack, written_to).items()
    assert (reply.body["status"], reply.body["result_url"]) == ("succeeded", url)
    assert json.loads(content)["parsed"] == {"text": TEXT}
    assert await worker.stop() == 0, worker.output()
    assert len(client.replies[asked["id"]]) == 1
    assert len(life.calls()) == calls
    assert await client.depth(worker.jobs_queue) == await client.depth(worker.dead_letter_queue) == 0


def _queues(worker: Worker) -> dict[str, str]:
    return {"VQA_JOBS_QUEUE": worker.jobs_queue, "VQA_RESULTS_QUEUE": worker.results_queue}
