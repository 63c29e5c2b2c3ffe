"""The result store: no job is billed twice, whichever worker receives it again."""

import asyncio
import uuid
from typing import Any

import pytest
from aiohttp import web

from deploy.local.model_simulator.behavior import Answer, Error
from deploy.local.stack import Stack
from tests.breaking import calls_begun, job, model_answered, publish, results, said, statuses
from tests.conftest import BUCKET, MakeClient, PutImage, StartWorker
from tests.fake_s3 import FakeS3
from tests.proxy import Proxy
from tests.running import Client, Reply, Worker, calls_with, until


@pytest.fixture
def kept_at() -> str:
    """Return the URL of the test's own store."""
    return f"s3://{BUCKET}/answers/{uuid.uuid4().hex}"


def reported(reply: Reply) -> dict[str, Any]:
    """Return a result without its timings."""
    return {name: value for name, value in reply.body.items() if name != "timings"}


async def two_results(client: Client, job_id: str) -> list[Reply]:
    await until(lambda: len(client.replies.get(job_id, ())) == 2, f"two results for {job_id}")
    return client.replies[job_id]


async def test_a_job_submitted_again_is_answered_from_the_store(
    stack: Stack, start_worker: StartWorker, client_of: MakeClient, put_image: PutImage, kept_at: str
) -> None:
    worker = await start_worker(VQA_RESULT_STORE=kept_at)
    client, marker = await client_of(worker), uuid.uuid4().hex
    short = job(f"What is {marker}?", put_image(), params={"seed": 7, "max_tokens": 50}, system="Be brief.")
    await client.publish(short)
    first = await client.result(short["id"])
    # Equivalent jobs: other order and white space in JSON, the long form, another publisher.
    image = {"type": "image_url", "image_url": {"url": short["images"][0]}}
    turns = [
        {"role": "system", "content": "Be brief."},
        {"content": [image, {"type": "text", "text": short["question"]}], "role": "user"},
    ]
    again = {
        "params": {"max_tokens": 50, "seed": 7},
        "messages": turns,
        "id": short["id"],
        "metadata": {"n": 2},
    }
    await client.publish(again, correlation_id="another sender's")
    replies = await two_results(client, short["id"])

    assert first.body["answer"]
    assert reported(replies[1]) == {**reported(first), "metadata": {"n": 2}}
    assert replies[1].message.correlation_id == "another sender's"
    assert len(calls_with(stack, marker)) == 1
    assert worker.metric("vqa_result_store_operations_total", result="reused") == 1
    assert worker.metric("vqa_model_requests_total") == 1
    # An answer from the store costs nothing.
    assert worker.metric("vqa_tokens_total", type="prompt") == first.body["usage"]["prompt_tokens"]


async def test_the_same_id_with_different_content_is_another_job(
    stack: Stack, start_worker: StartWorker, client_of: MakeClient, put_image: PutImage, kept_at: str
) -> None:
    worker = await start_worker(VQA_RESULT_STORE=kept_at)
    client, marker = await client_of(worker), uuid.uuid4().hex
    original = job(f"What is {marker}?", put_image())
    others: list[dict[str, Any]] = [
        {"question": f"What else is {marker}?"},
        {"images": [put_image()]},
        {"images": original["images"] * 2},
        {"params": {"seed": 1}},
        {"system": "Be brief."},
        {"model": stack.model.models[1]},
    ]
    for changes in ({}, *others):
        await client.publish({**original, **changes})
    await until(lambda: len(client.replies.get(original["id"], ())) == 7, "the results")
    assert len(calls_with(stack, marker)) == 7
    assert worker.metric("vqa_result_store_operations_total", result="stored") == 7


async def test_only_billed_answers_are_stored(
    stack: Stack, start_worker: StartWorker, client_of: MakeClient, kept_at: str
) -> None:
    worker = await start_worker(VQA_RESULT_STORE=kept_at)
    client = await client_of(worker)
    refused, empty = uuid.uuid4().hex, uuid.uuid4().hex
    stack.model.play(Error(status=400), marker=refused)
    stack.model.play(Answer(text="", finish_reason="length"), marker=empty)
    for marker, calls in ((refused, 2), (empty, 1)):
        it = job(marker)
        await client.publish(it)
        await client.result(it["id"])
        await client.publish(it)
        first, second = await two_results(client, it["id"])
        assert len(calls_with(stack, marker)) == calls
        if marker == empty:
            assert reported(first) == reported(second)
            assert second.body["error"]["code"] == "empty_answer"
        else:
            assert (first.body["status"], second.body["status"]) == ("failed", "succeeded")


async def test_an_answer_survives_a_worker_that_is_killed_before_publishing_it(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient, kept_at: str
) -> None:
    marker = uuid.uuid4().hex
    own_stack.model.play(Answer(after=2), marker=marker, times=None)
    async with Proxy.before(own_stack.rabbitmq.url) as broker:
        url = broker.url(own_stack.rabbitmq.url)
        doomed = await start_own_worker(VQA_RESULT_STORE=kept_at, VQA_RABBITMQ_URL=url)
        client = await own_client_of(doomed)
        ids = await publish(client, 3, marker)
        await calls_begun(own_stack, marker, 3)
        broker.freeze()
        await model_answered(own_stack, marker)
        await until(
            lambda: doomed.metric("vqa_result_store_operations_total", result="stored") == 3,
            "the answers are stored",
        )
        doomed.kill()
        broker.reset()
        assert client.replies == {}
        worker = await start_own_worker(like=doomed, VQA_RESULT_STORE=kept_at)
        assert statuses(await results(client, ids)) == {"succeeded": 3}
    assert len(calls_with(own_stack, marker)) == 3
    assert worker.metric("vqa_result_store_operations_total", result="reused") == 3
    assert worker.metric("vqa_model_requests_total") == 0


async def test_of_two_workers_with_the_same_job_one_calls_the_model_and_the_other_waits(
    stack: Stack, start_worker: StartWorker, client_of: MakeClient, kept_at: str
) -> None:
    marker = uuid.uuid4().hex
    stack.model.play(Answer(after=2), marker=marker, times=None)
    settings = {"VQA_RESULT_STORE": kept_at, "VQA_MAX_CONCURRENCY": "2"}
    workers: list[Worker] = [await start_worker(**settings)]
    workers.append(await start_worker(like=workers[0], **settings))
    client = await client_of(workers[0])
    it = job(marker)
    # Two deliveries for each job: those in the same worker wait as well.
    await asyncio.gather(*(client.publish(it, message_id=str(n)) for n in range(4)))
    await until(lambda: len(client.replies.get(it["id"], ())) == 4, "the results")

    assert len({reply.body["answer"] for reply in client.replies[it["id"]]}) == 1
    assert len(calls_with(stack, marker)) == 1
    await until(
        lambda: {worker.metric("vqa_jobs_total", status="succeeded") for worker in workers} == {2},
        "both workers have counted two jobs",
    )
    assert sum(worker.metric("vqa_result_store_operations_total", result="waited") for worker in workers) >= 1
    assert await asyncio.gather(*(worker.stop() for worker in workers)) == [0, 0]
    # Their heartbeat objects are deleted with them.
    listed = stack.s3.client().list_objects_v2(Bucket=BUCKET, Prefix=kept_at.partition(f"{BUCKET}/")[2])
    assert [
        key.rpartition("/")[0].rpartition("/")[2] for key in (it["Key"] for it in listed["Contents"])
    ] == ["jobs"]


async def test_a_hundred_jobs_delivered_twice_at_once_are_billed_once(
    stack: Stack, start_worker: StartWorker, client_of: MakeClient, kept_at: str
) -> None:
    """Try a possible race between two workers a hundred times."""
    marker = uuid.uuid4().hex
    workers: list[Worker] = [await start_worker(VQA_RESULT_STORE=kept_at)]
    workers.append(await start_worker(like=workers[0], VQA_RESULT_STORE=kept_at))
    client = await client_of(workers[0])
    jobs = [job(f"{marker} {n}") for n in range(100)]
    for it in jobs:
        await asyncio.gather(*(client.publish(it, message_id=f"{it['id']} {n}") for n in range(2)))
    for it in jobs:
        first, second = await two_results(client, it["id"])
        assert first.body["answer"] == second.body["answer"]
    assert len(calls_with(stack, marker)) == 100
    assert (
        sum(
            worker.metric("vqa_result_store_operations_total", result="stored_by_another")
            for worker in workers
        )
        == 0
    )
    done = [worker.metric("vqa_jobs_total", status="succeeded") for worker in workers]
    assert sum(done) == 200
    assert min(done) > 20


async def test_a_requeued_job_leaves_no_claim(
    stack: Stack, start_worker: StartWorker, client_of: MakeClient, kept_at: str
) -> None:
    marker = uuid.uuid4().hex
    stack.model.play(Error(status=401), marker=marker, times=None)
    barred = await start_worker(VQA_RESULT_STORE=kept_at)
    client = await client_of(barred)
    ids = await publish(client, 3, marker)
    await said(barred, "paused")
    stack.model.configure(rules=[])
    assert await barred.stop() == 0
    worker = await start_worker(like=barred, VQA_RESULT_STORE=kept_at)
    assert statuses(await results(client, ids)) == {"succeeded": 3}
    assert worker.metric("vqa_result_store_operations_total", result="waited") == 0


@pytest.mark.parametrize("code", ["NoSuchBucket", "AccessDenied", "SignatureDoesNotMatch"])
async def test_an_unusable_store_pauses_the_worker_before_any_call(
    stack: Stack, start_worker: StartWorker, client_of: MakeClient, code: str
) -> None:
    marker = uuid.uuid4().hex

    async def refuse(_: web.BaseRequest) -> web.StreamResponse:
        page = f"<Error><Code>{code}</Code></Error>"
        return web.Response(status=404 if code == "NoSuchBucket" else 403, text=page)

    async with FakeS3.serving(b"") as fake:
        fake.answer = refuse
        worker = await start_worker(VQA_RESULT_STORE="s3://bucket/x", VQA_S3_ENDPOINT_URL=fake.url)
        client = await client_of(worker)
        await publish(client, 2, marker)
        _, (reason,) = await said(worker, "paused")
        assert reason.startswith("s3: VQA_RESULT_STORE: S3 answered ")
        assert code in reason
        assert client.replies == {}
        worker.kill()
    assert calls_with(stack, marker) == []


async def test_a_store_that_ignores_preconditions_is_not_used(
    stack: Stack, start_worker: StartWorker, client_of: MakeClient
) -> None:
    marker = uuid.uuid4().hex

    async def yes_to_all(_: web.BaseRequest) -> web.StreamResponse:
        return web.Response(headers={"ETag": '"1"'})

    async with FakeS3.serving(b"") as fake:
        fake.answer = yes_to_all
        worker = await start_worker(VQA_RESULT_STORE="s3://bucket/x", VQA_S3_ENDPOINT_URL=fake.url)
        client = await client_of(worker)
        await publish(client, 1, marker)
        _, (reason,) = await said(worker, "paused")
        assert "If-None-Match" in reason
        worker.kill()
    assert calls_with(stack, marker) == []


async def test_an_answer_that_cannot_be_stored_is_published(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient, kept_at: str
) -> None:
    marker = uuid.uuid4().hex
    own_stack.model.play(Answer(after=1), marker=marker, times=None)
    async with Proxy.before(own_stack.s3.endpoint_url) as s3:
        url = s3.url(own_stack.s3.endpoint_url)
        worker = await start_own_worker(VQA_RESULT_STORE=kept_at, VQA_S3_ENDPOINT_URL=url)
        client = await own_client_of(worker)
        ids = await publish(client, 1, marker)
        await calls_begun(own_stack, marker, 1)
        await s3.refuse()
        s3.reset()
        assert statuses(await results(client, ids, patience_s=60)) == {"succeeded": 1}
        assert worker.metric("vqa_result_store_operations_total", result="store_failed") == 1
        assert len(calls_with(own_stack, marker)) == 1


async def test_past_its_deadline_a_job_gets_the_stored_answer(
    stack: Stack, start_worker: StartWorker, client_of: MakeClient, kept_at: str
) -> None:
    worker = await start_worker(VQA_RESULT_STORE=kept_at)
    client, marker = await client_of(worker), uuid.uuid4().hex
    paid, unpaid = job(marker), job(marker)
    await client.publish(paid)
    await client.result(paid["id"])
    past = {"deadline": "2020-01-01T00:00:00Z"}
    await client.publish({**paid, **past})
    await client.publish({**unpaid, **past})
    first, second = await two_results(client, paid["id"])
    assert reported(first) == reported(second)
    assert (await client.result(unpaid["id"])).body["error"]["code"] == "deadline_exceeded"
    assert len(calls_with(stack, marker)) == 1


async def test_an_answer_that_is_being_stored_at_the_end_of_the_grace_period_is_published(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient, kept_at: str
) -> None:
    marker = uuid.uuid4().hex
    own_stack.model.play(Answer(after=1), marker=marker, times=None)
    async with Proxy.before(own_stack.s3.endpoint_url) as s3:
        url = s3.url(own_stack.s3.endpoint_url)
        worker = await start_own_worker(
            VQA_RESULT_STORE=kept_at, VQA_S3_ENDPOINT_URL=url, VQA_SHUTDOWN_GRACE="0.5"
        )
        client = await own_client_of(worker)
        ids = await publish(client, 1, marker)
        await calls_begun(own_stack, marker, 1)
        s3.freeze()
        await model_answered(own_stack, marker)
        await until(lambda: worker.metric("vqa_model_requests_total", code="200") == 1, "the model answers")
        assert await worker.stop() == 0
    assert statuses(await results(client, ids)) == {"succeeded": 1}
    assert await client.depth(worker.jobs_queue) == 0
    assert len(calls_with(own_stack, marker)) == 1


async def test_the_store_costs_one_request_per_job_before_the_call(
    stack: Stack, start_worker: StartWorker, client_of: MakeClient, kept_at: str
) -> None:
    """A second request stores the answer; the first job also tests the store."""
    async with Proxy.before(stack.s3.endpoint_url) as s3:
        worker = await start_worker(
            VQA_RESULT_STORE=kept_at, VQA_S3_ENDPOINT_URL=s3.url(stack.s3.endpoint_url)
        )
        client = await client_of(worker)
        await results(client, await publish(client, 1, "What is it?"))
        before = sum(bytes(link.sent).count(b" HTTP/1.1\r\n") for link in s3.links)
        await results(client, await publish(client, 10, "What is it?"))
        asked = sum(bytes(link.sent).count(b" HTTP/1.1\r\n") for link in s3.links) - before
    # Heartbeats are written every few seconds, independent of the number of jobs.
    assert 20 <= asked <= 22
