"""A model API that limits, refuses, fails or hangs: what is the API's trouble costs the jobs nothing."""

import email.utils
import re
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest

from deploy.local.stack import Stack
from deploy.local.standin.behaviour import Error, Hang, Outcome
from tests.breaking import calls_begun, events, publish, results, said, statuses
from tests.proxy import Proxy
from tests.running import Client, Worker, calls_with, until

JOBS = 12
# Faults that are not plainly everybody's are the jobs' own until five different ones have met them.
SUSPECTS = 4


@dataclass(frozen=True)
class Scene:
    """A worker, its publisher, and the network between the worker and the model."""

    stack: Stack
    worker: Worker
    client: Client
    proxy: Proxy

    async def is_at_peace(self) -> bool:
        """Whether the worker consumes again, and nothing is left in its queues."""
        names = (self.worker.jobs_queue, self.worker.dead_letter_queue)
        depths = [await self.client.depth(name) for name in names]
        return self.worker.ready() == (200, {"status": "ready", "reasons": []}) and not any(depths)


@pytest.fixture(scope="module")
async def scene(own_stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    own_stack.model.reset()
    async with Proxy.before(own_stack.model.base_url) as proxy:
        worker = Worker.of(
            own_stack,
            tmp_path_factory.mktemp("provider"),
            VQA_MODEL_BASE_URL=proxy.url(own_stack.model.base_url),
            VQA_MODEL_TIMEOUT="1",
            VQA_MAX_ATTEMPTS="3",
            VQA_MAX_CONCURRENCY="16",
        )
        try:
            await worker.start()
            async with Client.of(own_stack, worker) as client:
                yield Scene(own_stack, worker, client, proxy)
            assert await worker.stop() == 0, worker.output()
        finally:
            worker.kill()


async def paused(scene: Scene) -> str:
    """Wait until the worker is paused; returns why."""
    status, (reason,) = await said(scene.worker, "paused")
    assert status == 200
    return reason


@pytest.mark.parametrize(
    ("outcome", "reason", "suspects"),
    [
        pytest.param(Error(status=401), "401.*VQA_MODEL_API_KEY", 0, id="wrong key"),
        pytest.param(Error(status=402), "402.*credit", 0, id="no credit"),
        pytest.param(Error(status=404), "404.*VQA_MODEL_BASE_URL", 0, id="model gone"),
        pytest.param(None, "cannot be reached", 0, id="unreachable"),
        pytest.param(Error(status=403), "different jobs.*403", SUSPECTS, id="forbidden for everyone"),
        pytest.param(Error(status=503), "different jobs.*5xx", SUSPECTS, id="failing for everyone"),
        pytest.param(Hang(), "different jobs.*timeout", SUSPECTS, id="hanging"),
    ],
)
async def test_an_outage_pauses_the_worker_costs_no_job_and_ends_by_itself(
    scene: Scene, outcome: Outcome | None, reason: str, suspects: int
) -> None:
    worker, client, marker = scene.worker, scene.client, uuid.uuid4().hex
    pauses, resumptions = len(events(worker, "paused")), len(events(worker, "resumed"))
    if outcome is None:
        await scene.proxy.refuse()
        scene.proxy.reset()
    else:
        scene.stack.model.play(outcome, marker=marker, times=None)

    ids = await publish(client, JOBS, marker)
    why = await paused(scene)
    assert re.search(f"^model: .*{reason}", why), why
    assert worker.metric("vqa_dependency_up", dependency="model") == 0
    ids += await publish(client, 2, marker)
    retry_queue = f"{worker.jobs_queue}.retry.1s"

    async def are_back() -> bool:
        return await client.depth(worker.jobs_queue) + await client.depth(retry_queue) >= len(ids) - 1

    await until(are_back, "the jobs are given back")
    # One call a job at the most, and single trials afterwards.
    assert len(calls_with(scene.stack, marker)) <= JOBS + 4
    assert client.replies.keys().isdisjoint(ids)

    await scene.proxy.accept()
    scene.stack.model.configure(rules=[])
    replies = await results(client, ids)
    assert statuses(replies) == {"succeeded": len(ids)}
    tried_before = [reply.body["attempts"] for reply in replies if reply.body["attempts"] > 1]
    assert len(tried_before) <= suspects
    assert set(tried_before) <= {2}
    await until(scene.is_at_peace, "all is well again")
    assert len(events(worker, "paused")) == pauses + 1
    assert len(events(worker, "resumed")) == resumptions + 1
    assert worker.metric("vqa_dependency_up", dependency="model") == 1
    assert {len(client.replies[it]) for it in ids} == {1}


async def test_a_paused_worker_tries_seldom_and_each_time_with_another_job(scene: Scene) -> None:
    marker = uuid.uuid4().hex
    scene.stack.model.play(Error(status=401), marker=marker, times=None)
    ids = await publish(scene.client, 4, marker)

    async def are_back() -> bool:
        return await scene.client.depth(scene.worker.jobs_queue) == 4

    await paused(scene)
    await until(are_back, "the jobs are given back")
    before = len(calls_with(scene.stack, marker))
    await calls_begun(scene.stack, marker, before + 1)
    scene.stack.model.configure(rules=[])
    assert statuses(await results(scene.client, ids)) == {"succeeded": 4}

    # A trial that went wrong, the next one after at least twice the first second, and then the other jobs.
    failed, tried = calls_with(scene.stack, marker)[before : before + 2]
    assert (failed.status, tried.status) == (401, 200)
    assert tried.started - failed.started > 1.9
    assert tried.question != failed.question
    assert len(calls_with(scene.stack, marker)) == before + 1 + 4
    await until(scene.is_at_peace, "all is well again")


def _in_two_seconds() -> str:
    return email.utils.format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)


@pytest.mark.parametrize(
    ("retry_after", "at_least_s"),
    [
        pytest.param(lambda: "2", 1.9, id="seconds"),
        # An HTTP date has whole seconds.
        pytest.param(_in_two_seconds, 0.9, id="date"),
        pytest.param(lambda: None, 0.9, id="not said"),
    ],
)
async def test_a_429_is_waited_out_and_costs_no_attempt(
    scene: Scene, retry_after: Callable[[], str | None], at_least_s: float
) -> None:
    marker = uuid.uuid4().hex
    word = retry_after()
    headers = {} if word is None else {"Retry-After": word}
    scene.stack.model.play(Error(status=429, headers=headers), marker=marker)
    ids = await publish(scene.client, 1, marker)
    (reply,) = await results(scene.client, ids)

    assert (reply.body["status"], reply.body["attempts"]) == ("succeeded", 1)
    refused, answered = calls_with(scene.stack, marker)
    assert refused.ended is not None
    assert (refused.status, answered.status) == (429, 200)
    assert answered.started - refused.ended > at_least_s
    assert scene.worker.ready()[1]["status"] == "ready"
    await until(scene.is_at_peace, "nothing is left")


async def test_an_api_that_takes_few_calls_at_once_gets_fewer_and_answers_every_job(scene: Scene) -> None:
    marker = uuid.uuid4().hex
    before = scene.worker.metric("vqa_concurrency_limit")
    scene.stack.model.configure(max_concurrent=4, latency=0.1, retry_after="1")
    try:
        ids = await publish(scene.client, 12, marker)
        await until(lambda: scene.worker.metric("vqa_concurrency_limit") < before, "the limit falls")
        replies = await results(scene.client, ids)
    finally:
        scene.stack.model.configure(max_concurrent=None, latency=0, retry_after=None)

    assert {(reply.body["status"], reply.body["attempts"]) for reply in replies} == {("succeeded", 1)}
    assert {call.status for call in calls_with(scene.stack, marker)} == {429, 200}
    assert scene.worker.metric("vqa_model_requests_total", code="429") > 0
    await until(scene.is_at_peace, "nothing is left")


async def test_a_job_that_always_fails_exhausts_its_own_attempts_and_disturbs_no_other(scene: Scene) -> None:
    """First alone, when only their number tells its trouble from an outage, then in company."""
    pauses = len(events(scene.worker, "paused"))
    for company in (0, 6):
        poison, good = uuid.uuid4().hex, uuid.uuid4().hex
        scene.stack.model.play(Error(status=500, message="It hurts"), marker=poison, times=None)
        (bad,) = await publish(scene.client, 1, poison)
        others = await publish(scene.client, company, good)
        assert statuses(await results(scene.client, others)) == ({"succeeded": company} if company else {})
        (reply,) = await results(scene.client, [bad])

        assert reply.body["error"]["code"] == "attempts_exhausted"
        assert "It hurts" in reply.body["error"]["message"]
        assert reply.body["attempts"] == 3
        assert len(calls_with(scene.stack, poison)) == 3
        dead = await scene.client.take(scene.worker.dead_letter_queue)
        assert bad in dead.body.decode()
        assert dead.headers["vqa-error-code"] == "attempts_exhausted"
        assert dead.headers["vqa-attempts"] == 3
    assert len(events(scene.worker, "paused")) == pauses
    await until(scene.is_at_peace, "nothing is left")


async def test_a_job_that_is_forbidden_while_others_succeed_is_rejected(scene: Scene) -> None:
    marker, good = uuid.uuid4().hex, uuid.uuid4().hex
    scene.stack.model.play(Error(status=403, message="Not this one"), marker=marker, times=None)
    (bad,) = await publish(scene.client, 1, marker)
    await calls_begun(scene.stack, marker, 1)
    others = await publish(scene.client, 3, good)
    assert statuses(await results(scene.client, others)) == {"succeeded": 3}
    (reply,) = await results(scene.client, [bad])

    assert reply.body["error"]["code"] == "model_rejected"
    assert "Not this one" in reply.body["error"]["message"]
    assert scene.worker.ready()[1]["status"] == "ready"
    await until(scene.is_at_peace, "nothing is left")
