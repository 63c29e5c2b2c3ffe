"""Workers that die without a word: the broker hands their jobs to the next one."""

import uuid
from collections import Counter

from deploy.local.stack import Stack
from deploy.local.standin.behaviour import Answer, Hang
from tests.breaking import calls_begun, job, publish, results, statuses
from tests.conftest import MakeClient, StartWorker
from tests.running import calls_with, until


async def test_a_hundred_jobs_whose_worker_is_killed_half_way_are_all_answered(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    marker = uuid.uuid4().hex
    own_stack.model.play(Answer(after=0.02), marker=marker, times=50)
    own_stack.model.play(Hang(), marker=marker, times=10)
    doomed = await start_own_worker(VQA_MAX_CONCURRENCY="10")
    client = await own_client_of(doomed)
    ids = await publish(client, 100, marker)
    await calls_begun(own_stack, marker, 60)
    await until(lambda: len(client.replies) == 50, "half of the answers")
    doomed.kill()

    worker = await start_own_worker(like=doomed, VQA_MAX_CONCURRENCY="10")
    assert statuses(await results(client, ids)) == {"succeeded": 100}
    assert await worker.stop() == 0
    assert await client.depth(worker.jobs_queue) == await client.depth(worker.dead_letter_queue) == 0
    # What the dead worker was at, and no more than that, is called for a second time.
    calls = Counter(call.question for call in calls_with(own_stack, marker))
    assert Counter(calls.values()) == {1: 90, 2: 10}


async def test_a_job_that_kills_every_worker_is_taken_out_of_the_queue(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    """Here the test does the killing, whenever a worker is at that job."""
    marker = uuid.uuid4().hex
    own_stack.model.play(Hang(), marker=marker, times=None)
    worker = await start_own_worker(VQA_DELIVERY_LIMIT="2")
    client = await own_client_of(worker)
    poison = job(marker)
    await client.publish(poison, correlation_id="its sender's")
    for nth in (1, 2):
        await calls_begun(own_stack, marker, nth)
        assert client.replies == {}
        worker.kill()
        worker = await start_own_worker(like=worker, VQA_DELIVERY_LIMIT="2")

    (reply,) = await results(client, [poison["id"]])
    assert reply.body["error"]["code"] == "attempts_exhausted"
    assert "VQA_DELIVERY_LIMIT" in reply.body["error"]["message"]
    dead = await client.take(worker.dead_letter_queue)
    assert poison["id"] in dead.body.decode()
    assert dead.correlation_id == "its sender's"
    assert dead.headers["vqa-error-code"] == "attempts_exhausted"
    assert len(calls_with(own_stack, marker)) == 2
    assert await worker.stop() == 0
    assert await client.depth(worker.jobs_queue) == 0
