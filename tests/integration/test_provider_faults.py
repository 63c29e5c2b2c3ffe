"""A model API that limits, refuses, fails or hangs: what is the API's trouble costs the jobs nothing."""

import email.utils
import re
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from deploy.local.model_simulator.behavior import Answer, Error, Hang, Outcome, Reset
from deploy.local.stack import Stack
from tests.breaking import calls_begun, events, hasty, job, publish, results, said, statuses
from tests.conftest import MakeClient, StartWorker
from tests.proxy import Proxy
from tests.running import Client, Worker, calls_with, until

JOBS = 12
KINDS = pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        pytest.param(Error(status=401), "401.*VQA_MODEL_API_KEY", id="wrong key"),
        pytest.param(Error(status=402), "402.*credit", id="no credit"),
        pytest.param(Error(status=404), "404.*VQA_MODEL_BASE_URL", id="model gone"),
        pytest.param(None, "cannot be reached", id="unreachable"),
        pytest.param(Error(status=403), "different jobs.*403", id="forbidden for everyone"),
        pytest.param(Error(status=503), "different jobs.*5xx", id="failing for everyone"),
        pytest.param(Reset(), "different jobs.*connection", id="reset"),
        pytest.param(Hang(), "different jobs.*timeout", id="hanging"),
    ],
)


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

    async def breaks(self, outcome: Outcome | None, marker: str) -> None:
        """From now on jobs with this marker get this outcome; None: the provider cannot be reached."""
        if outcome is None:
            await self.proxy.refuse()
            self.proxy.reset()
        else:
            self.stack.model.play(outcome, marker=marker, times=None)

    async def is_repaired(self) -> None:
        await self.proxy.accept()
        self.stack.model.configure(rules=[])

    def warnings_(self) -> list[str]:
        """The events that the worker has logged as warnings or worse."""
        return [line["event"] for line in self.worker.log() if line.get("level") in ("warning", "error")]


@asynccontextmanager
async def _scene(stack: Stack, folder: Path, **settings: str) -> AsyncIterator[Scene]:
    stack.model.reset()
    async with Proxy.before(stack.model.base_url) as proxy:
        worker = Worker.of(
            stack,
            folder,
            VQA_MODEL_BASE_URL=proxy.url(stack.model.base_url),
            VQA_MODEL_TIMEOUT="1",
            VQA_MAX_ATTEMPTS="3",
            **settings,
        )
        try:
            await worker.start()
            async with Client.of(stack, worker) as client:
                yield Scene(stack, worker, client, proxy)
            assert await worker.stop() == 0, worker.output()
        finally:
            worker.kill()


@pytest.fixture(scope="module")
async def scene(own_stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    async with _scene(own_stack, tmp_path_factory.mktemp("provider"), VQA_MAX_CONCURRENCY="16") as scene:
        yield scene


@pytest.fixture(scope="module")
async def narrow(own_stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    """With a worker that has one job at a time, so that nobody else's call says anything about it."""
    async with _scene(own_stack, tmp_path_factory.mktemp("narrow"), VQA_MAX_CONCURRENCY="1") as scene:
        yield scene


async def paused(scene: Scene) -> str:
    """Wait until the worker is paused; returns why."""
    status, (reason,) = await said(scene.worker, "paused")
    assert status == 200
    return reason


@KINDS
async def test_an_outage_pauses_the_worker_costs_no_attempt_and_ends_by_itself(
    scene: Scene, outcome: Outcome | None, reason: str
) -> None:
    worker, client, marker = scene.worker, scene.client, uuid.uuid4().hex
    resumptions, warnings_ = len(events(worker, "consumption_resumed")), len(scene.warnings_())
    await scene.breaks(outcome, marker)

    ids = await publish(client, JOBS, marker)
    why = await paused(scene)
    assert re.search(f"^model: .*{reason}", why), why
    assert worker.metric("vqa_dependency_up", dependency="model") == 0
    ids += await publish(client, 2, marker)

    async def are_back() -> bool:
        return await client.depth(worker.jobs_queue) >= len(ids) - 1

    await until(are_back, "the jobs are given back")
    # One call a job at the most, and single trials afterwards.
    assert len(calls_with(scene.stack, marker)) <= JOBS + 4
    assert client.replies.keys().isdisjoint(ids)

    await scene.is_repaired()
    replies = await results(client, ids)
    assert {(reply.body["status"], reply.body["attempts"]) for reply in replies} == {("succeeded", 1)}
    await until(scene.is_at_peace, "all is well again")
    assert scene.warnings_()[warnings_:] == ["consumption_paused"]
    (resumed,) = events(worker, "consumption_resumed")[resumptions:]
    assert resumed["after_s"] > 0.9
    assert worker.metric("vqa_dependency_up", dependency="model") == 1
    assert {len(client.replies[it]) for it in ids} == {1}


@KINDS
async def test_an_outage_costs_no_attempt_where_jobs_come_one_by_one(
    narrow: Scene, outcome: Outcome | None, reason: str
) -> None:
    """The first ones are counted before anybody can know, and that is taken back."""
    worker, client, marker = narrow.worker, narrow.client, uuid.uuid4().hex
    warnings_ = len(narrow.warnings_())
    await narrow.breaks(outcome, marker)
    ids = await publish(client, 3, marker)
    assert re.search(f"^model: .*{reason}", await paused(narrow))

    async def are_back() -> bool:
        return await client.depth(worker.jobs_queue) == 3

    await until(are_back, "the jobs are given back")
    await narrow.is_repaired()
    replies = await results(client, ids)
    assert {(reply.body["status"], reply.body["attempts"]) for reply in replies} == {("succeeded", 1)}
    await until(narrow.is_at_peace, "all is well again")
    # One call each, trials after 1 s and 2 s perhaps, and the answers.
    assert len(calls_with(narrow.stack, marker)) <= 3 + 3 + 3
    assert sorted(set(narrow.warnings_()[warnings_:])) in (
        ["consumption_paused"],
        ["consumption_paused", "job_retried"],
    )


async def test_an_outage_with_hundreds_of_jobs_in_flight_is_one_line_in_the_log(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    marker = uuid.uuid4().hex
    worker = await start_own_worker(VQA_MAX_CONCURRENCY="200")
    client = await own_client_of(worker)
    own_stack.model.play(Error(status=500, after=1), marker=marker, times=None)
    ids = await publish(client, 200, marker)
    await said(worker, "paused")

    async def are_back() -> bool:
        return await client.depth(worker.jobs_queue) >= len(ids) - 1

    await until(are_back, "the jobs are given back")
    # As many as may call at once when nothing is known yet; those that got a place when these failed; trials.
    assert len(calls_with(own_stack, marker)) <= 32 + 32 + 3
    own_stack.model.configure(rules=[])
    replies = await results(client, ids)
    assert {(reply.body["status"], reply.body["attempts"]) for reply in replies} == {("succeeded", 1)}
    logged = [
        line["event"] for line in worker.log() if line.get("level") != "info" or "job" not in line["event"]
    ]
    expected = ["consumption_paused", "consumption_resumed"]
    assert [event for event in logged if event in {*expected, "job_retried"}] == expected
    assert len(logged) < 10


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
        # A share of what calls take, and theirs take no time here.
        pytest.param(lambda: None, 0.03, id="not said"),
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
    refused = scene.worker.metric("vqa_model_requests_total", code="429")
    scene.stack.model.configure(max_concurrent=4, latency=0.4, retry_after="1")
    try:
        # A model that nobody has asked yet: of the other one it is known what it takes.
        ids = await publish(scene.client, 12, marker, model=scene.stack.model.models[1])
        replies = await results(scene.client, ids)
    finally:
        scene.stack.model.configure(max_concurrent=None, latency=0, retry_after=None)

    assert {(reply.body["status"], reply.body["attempts"]) for reply in replies} == {("succeeded", 1)}
    assert {call.status for call in calls_with(scene.stack, marker)} == {429, 200}
    assert scene.worker.metric("vqa_model_requests_total", code="429") > refused
    await until(scene.is_at_peace, "nothing is left")


@pytest.mark.parametrize("status", [500, 403])
@pytest.mark.parametrize("count", [1, 2])
async def test_jobs_that_always_fail_exhaust_their_own_attempts_and_disturb_no_other(
    scene: Scene, count: int, status: int
) -> None:
    """First alone, when only their number tells their trouble from an outage, then just after an outage."""
    poison = uuid.uuid4().hex
    scene.stack.model.play(Error(status=status, message="It hurts"), marker=poison, times=None)
    await exhaust(scene, poison, count)

    barred = uuid.uuid4().hex
    scene.stack.model.play(Error(status=401), marker=barred, times=None)
    ids = await publish(scene.client, 1, barred)
    await paused(scene)
    scene.stack.model.configure(rules=[])
    scene.stack.model.play(Error(status=status, message="It hurts"), marker=poison, times=None)
    await results(scene.client, ids)
    await exhaust(scene, poison, count)


async def exhaust(scene: Scene, poison: str, count: int) -> None:
    """Publish poisonous jobs while all is well; they all come to their own end, and stop nobody."""
    await until(scene.is_at_peace, "all is well")
    pauses, calls = len(events(scene.worker, "consumption_paused")), len(calls_with(scene.stack, poison))
    ids = await publish(scene.client, count, poison)
    for reply in await results(scene.client, ids):
        assert reply.body["error"]["code"] in ("attempts_exhausted", "model_rejected")
        assert "It hurts" in reply.body["error"]["message"]
        if reply.body["error"]["code"] == "attempts_exhausted":
            assert reply.body["attempts"] == 3
            dead = await scene.client.take(scene.worker.dead_letter_queue)
            assert poison in dead.body.decode()
            assert dead.headers["vqa-error-code"] == "attempts_exhausted"
            assert dead.headers["vqa-attempts"] == 3
    assert len(calls_with(scene.stack, poison)) - calls <= 3 * count
    assert len(events(scene.worker, "consumption_paused")) == pauses
    await until(scene.is_at_peace, "nothing is left")


async def test_a_batch_of_bad_jobs_among_good_ones_stops_none_of_those_for_long(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    """A dozen that fail at once while the good ones take their time look like an outage, for a while."""
    poison, good = uuid.uuid4().hex, uuid.uuid4().hex
    worker = await start_own_worker(wait=False, VQA_MAX_ATTEMPTS="2", VQA_MAX_CONCURRENCY="16")
    await hasty(worker).start()
    client = await own_client_of(worker)
    own_stack.model.play(Error(status=500), marker=poison, times=None)
    own_stack.model.play(Answer(after=0.3), marker=good, times=None)
    bad = await publish(client, 12, poison)
    ids = await publish(client, 12, good)
    assert statuses(await results(client, ids)) == {"succeeded": 12}
    # As long as nothing else comes there is no telling them from an outage; then there is.
    for _ in range(20):
        if client.replies.keys() >= set(bad):
            break
        await results(client, await publish(client, 2, good))
    assert statuses(await results(client, bad)) == {"attempts_exhausted": 12}
    assert await client.depth(worker.dead_letter_queue) == 12


async def test_what_waits_through_many_trials_and_many_workers_is_neither_lost_nor_counted(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    """A limit of three deliveries survives dozens: each is given back on purpose."""
    marker = uuid.uuid4().hex
    own_stack.model.play(Error(status=401), marker=marker, times=None)
    settings = {"VQA_DELIVERY_LIMIT": "3", "VQA_MAX_ATTEMPTS": "1"}
    worker = hasty(await start_own_worker(wait=False, **settings))
    await worker.start()
    client = await own_client_of(worker)
    tried, fresh = job(marker), job(marker)
    await client.publish(tried, headers={"vqa-attempts": 4})
    await client.publish(fresh)
    for nth in (1, 2, 3):
        await calls_begun(own_stack, marker, 10 * nth)
        assert await worker.stop() == 0, worker.output()
        assert await client.depth(worker.jobs_queue) == 2
        worker = hasty(await start_own_worker(wait=False, like=worker, **settings))
        await worker.start()
    assert client.replies == {}

    own_stack.model.configure(rules=[])
    replies = await results(client, [tried["id"], fresh["id"]])
    assert [reply.body["status"] for reply in replies] == ["succeeded", "succeeded"]
    assert [reply.body["attempts"] for reply in replies] == [5, 1]
    assert await client.depth(worker.dead_letter_queue) == 0
    assert {len(found) for found in client.replies.values()} == {1}


async def test_a_job_whose_deadline_passes_in_an_outage_is_told_so_and_not_called_for(scene: Scene) -> None:
    barred, late = uuid.uuid4().hex, uuid.uuid4().hex
    scene.stack.model.play(Error(status=401), marker=barred, times=None)
    ids = await publish(scene.client, 1, barred)
    await paused(scene)
    deadline = (datetime.now(UTC) + timedelta(seconds=0.2)).isoformat()
    expired = await publish(scene.client, 5, late, deadline=deadline)
    assert statuses(await results(scene.client, expired)) == {"deadline_exceeded": 5}
    assert calls_with(scene.stack, late) == []
    assert scene.worker.ready()[1]["status"] == "paused"
    scene.stack.model.configure(rules=[])
    assert statuses(await results(scene.client, ids)) == {"succeeded": 1}
    await until(scene.is_at_peace, "nothing is left")


async def test_a_worker_that_waits_for_a_job_to_try_with_resumes_with_the_first_that_comes(
    scene: Scene,
) -> None:
    barred, good = uuid.uuid4().hex, uuid.uuid4().hex
    scene.stack.model.play(Error(status=401), marker=barred, times=None)
    await publish(scene.client, 1, barred)
    await paused(scene)
    # Nobody is left to try with.
    await scene.client.take(scene.worker.jobs_queue)
    assert scene.worker.ready()[1]["status"] == "paused"
    ids = await publish(scene.client, 3, good)
    assert statuses(await results(scene.client, ids)) == {"succeeded": 3}
    scene.stack.model.configure(rules=[])
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
