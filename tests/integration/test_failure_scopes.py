"""Whose failure it is: the API's capacity, one model's, one job's, or everybody's."""

import uuid
from collections.abc import AsyncIterator

import pytest

from deploy.local.model_simulator.behavior import Error
from deploy.local.stack import Stack
from tests.breaking import events, hasty, publish, results, said, statuses
from tests.conftest import MakeClient, StartWorker
from tests.running import calls_with, until

USUAL, SMALL = "simulated/vision", "simulated/vision-small"
RETIRED = Error(status=404, message="The model was retired", code="model_not_found")


@pytest.fixture(autouse=True)
async def reset_model(own_stack: Stack) -> AsyncIterator[None]:
    """Reset the API after each test."""
    yield
    own_stack.model.reset()


@pytest.mark.parametrize("status", [429, 503, 529])
async def test_an_api_that_is_busy_answers_every_job_and_no_pause_begins(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient, status: int
) -> None:
    marker = uuid.uuid4().hex
    worker = await start_own_worker(VQA_MAX_CONCURRENCY="32")
    client = await own_client_of(worker)
    own_stack.model.configure(max_concurrent=8, busy_status=status, latency=0.2)
    replies = await results(client, await publish(client, 100, marker))
    assert {(reply.body["status"], reply.body["attempts"]) for reply in replies} == {("succeeded", 1)}
    assert {call.status for call in calls_with(own_stack, marker)} == {200, status}
    assert not events(worker, "consumption_paused")
    assert not events(worker, "job_retried")


async def test_an_api_that_is_always_busy_pauses_the_worker_and_uses_no_attempt(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    """As while a local server loads its model: one job is enough."""
    marker = uuid.uuid4().hex
    worker = await start_own_worker(VQA_MAX_ATTEMPTS="2")
    client = await own_client_of(worker)
    own_stack.model.play(Error(status=503, message="Loading model"), marker=marker, times=None)
    ids = await publish(client, 1, marker)
    _, (reason,) = await said(worker, "paused")
    assert "Loading model" in reason
    own_stack.model.configure(rules=[])
    (reply,) = await results(client, ids)
    assert (reply.body["status"], reply.body["attempts"]) == ("succeeded", 1)


async def test_a_model_that_is_retired_pauses_only_its_jobs(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    retired, good = uuid.uuid4().hex, uuid.uuid4().hex
    worker = await start_own_worker(VQA_ALLOWED_MODELS=f"{USUAL},{SMALL}")
    client = await own_client_of(worker)
    own_stack.model.play(RETIRED, marker=retired, times=None)
    waiting = await publish(client, 10, retired, model=SMALL)
    (paused,) = await until(lambda: events(worker, "model_paused"), "the model is paused")
    assert paused["model"] == SMALL
    assert "The model was retired" in paused["reason"]
    assert statuses(await results(client, await publish(client, 100, good))) == {"succeeded": 100}
    status, body = worker.ready()
    assert (status, body["status"]) == (200, "ready")
    assert SMALL in body["reasons"][0]
    assert client.replies.keys().isdisjoint(waiting)
    assert not events(worker, "consumption_paused")

    own_stack.model.configure(rules=[])
    replies = await results(client, waiting)
    assert {(reply.body["status"], reply.body["attempts"]) for reply in replies} == {("succeeded", 1)}
    assert events(worker, "model_resumed")
    assert worker.ready() == (200, {"status": "ready", "reasons": []})


async def test_jobs_that_are_answered_500_end_and_a_good_one_among_them_is_answered(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    """As with pictures that the API cannot decode: their failures look like an outage, but they must end."""
    bad, good = uuid.uuid4().hex, uuid.uuid4().hex
    worker = await start_own_worker(wait=False, VQA_MAX_ATTEMPTS="2")
    await hasty(worker).start()
    client = await own_client_of(worker)
    own_stack.model.play(Error(status=500, message="It hurts"), marker=bad, times=None)
    ids = await publish(client, 10, bad)
    await said(worker, "paused")
    assert statuses(await results(client, await publish(client, 1, good))) == {"succeeded": 1}
    assert statuses(await results(client, ids)) == {"attempts_exhausted": 10}


@pytest.mark.parametrize("status", [403, 418, 451])
async def test_an_answer_that_no_rule_knows_pauses_the_worker_instead_of_failing_the_queue(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient, status: int
) -> None:
    marker = uuid.uuid4().hex
    worker = await start_own_worker()
    client = await own_client_of(worker)
    own_stack.model.play(Error(status=status, message="Zwrzl grmpf"), marker=marker, times=None)
    ids = await publish(client, 30, marker)
    _, (reason,) = await said(worker, "paused")
    assert str(status) in reason
    assert client.replies.keys().isdisjoint(ids)
    own_stack.model.configure(rules=[])
    replies = await results(client, ids)
    assert {(reply.body["status"], reply.body["attempts"]) for reply in replies} == {("succeeded", 1)}


async def test_a_malformed_answer_is_bought_twice_and_not_five_times(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    bad, good = uuid.uuid4().hex, uuid.uuid4().hex
    worker = await start_own_worker()
    client = await own_client_of(worker)
    own_stack.model.play(Error(status=200, body="<p>no JSON"), marker=bad, times=None)
    ids = await publish(client, 1, bad)
    assert statuses(await results(client, ids)) == {"attempts_exhausted": 1}
    assert len(calls_with(own_stack, bad)) == 2
    assert statuses(await results(client, await publish(client, 3, good))) == {"succeeded": 3}


async def test_a_rejection_that_no_rule_knows_fails_three_jobs_and_then_pauses(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    """As with a gateway that answers 400 because of an account: three jobs fail, and not the queue."""
    marker = uuid.uuid4().hex
    worker = await start_own_worker(VQA_MAX_CONCURRENCY="1")
    client = await own_client_of(worker)
    unknown = Error(status=400, body={"error": {"message": "Zwrzl grmpf", "type": "grmpf"}})
    own_stack.model.play(unknown, marker=marker, times=None)
    ids = await publish(client, 30, marker)
    _, (reason,) = await said(worker, "paused")
    assert "4 different jobs in a row were rejected" in reason
    assert "Zwrzl grmpf" in reason
    own_stack.model.configure(rules=[])
    assert statuses(await results(client, ids)) == {"model_rejected": 3, "succeeded": 27}
