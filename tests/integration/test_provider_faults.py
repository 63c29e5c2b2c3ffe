"""A model API that limits, rejects, fails or hangs: its outages use up no attempts."""

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
        pytest.param(Error(status=404), "404.*VQA_MODEL_BASE_URL", id="unknown model"),
        pytest.param(None, "cannot be reached", id="unreachable"),
        pytest.param(Error(status=403), "different jobs.*403", id="forbidden for everyone"),
        pytest.param(Error(status=502), "different jobs.*5xx", id="failing for everyone"),
        pytest.param(Reset(), "different jobs.*connection", id="reset"),
        pytest.param(Hang(), "different jobs.*timeout", id="hanging"),
    ],
)


@dataclass(frozen=True)
class Scene:
    """A worker, its publisher, and the network between the worker and the model API."""

    stack: Stack
    worker: Worker
    client: Client
    proxy: Proxy

    async def is_idle(self) -> bool:
        """Return whether the worker consumes and its queues are empty."""
        names = (self.worker.jobs_queue, self.worker.dead_letter_queue)
        depths = [await self.client.depth(name) for name in names]
        return self.worker.ready() == (200, {"status": "ready", "reasons": []}) and not any(depths)

    async def fail_with(self, outcome: Outcome | None, marker: str) -> None:
        """Set the outcome of jobs with this marker; None: the API is unreachable."""
        if outcome is None:
            await self.proxy.refuse()
            self.proxy.reset()
        else:
            self.stack.model.play(outcome, marker=marker, times=None)

    async def repair(self) -> None:
        await self.proxy.accept()
        self.stack.model.configure(rules=[])

    def warnings_(self) -> list[str]:
        """Return the events that the worker has logged as warnings or errors."""
        return [line["event"] for line in self.worker.log() if line.get("level") in ("warning", "error")]


@asynccontextmanager
async def _scene(stack: Stack, folder: Path, **settings: str) -> AsyncIterator[Scene]:
    stack.model.reset()
    async with Proxy.before(stack.model.base_url) as proxy:
        worker = Worker.of(
            stack,
            folder,
            VQA_MODEL_BASE_URL=proxy.url(stack.model.base_url),
            VQA_MODEL_TIMEOUT="2",
            VQA_MAX_ATTEMPTS="3",
            **settings,
        )
        try:
            await worker.start()
            async with Client.of(stack, worker) as client:
                SCENES.append(scene := Scene(stack, worker, client, proxy))
                yield scene
            assert await worker.stop() == 0, worker.output()
        finally:
            worker.kill()


# The scenes of this module, whose APIs are reset after each test.
SCENES: list[Scene] = []


@pytest.fixture(autouse=True)
async def repaired() -> AsyncIterator[None]:
    """Reset the APIs after each test."""
    yield
    for scene in SCENES:
        await scene.repair()


@pytest.fixture(scope="module")
async def scene(own_stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    async with _scene(own_stack, tmp_path_factory.mktemp("provider"), VQA_MAX_CONCURRENCY="16") as scene:
        yield scene


@pytest.fixture(scope="module")
async def narrow(own_stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    """A worker with a concurrency of 1: no other call helps to diagnose a failure."""
    async with _scene(own_stack, tmp_path_factory.mktemp("narrow"), VQA_MAX_CONCURRENCY="1") as scene:
        yield scene


async def paused(scene: Scene) -> str:
    """Wait until the worker is paused; return the reason."""
    status, (reason,) = await said(scene.worker, "paused")
    assert status == 200
    return reason


@KINDS
async def test_an_outage_pauses_the_worker_uses_no_attempt_and_ends_automatically(
    scene: Scene, outcome: Outcome | None, reason: str
) -> None:
    worker, client, marker = scene.worker, scene.client, uuid.uuid4().hex
    resumptions, warnings_ = len(events(worker, "consumption_resumed")), len(scene.warnings_())
    await scene.fail_with(outcome, marker)

    ids = await publish(client, JOBS, marker)
    why = await paused(scene)
    assert re.search(f"^model: .*{reason}", why), why
    assert worker.metric("vqa_dependency_up", dependency="model") == 0
    ids += await publish(client, 2, marker)

    async def are_requeued() -> bool:
        return await client.depth(worker.jobs_queue) >= len(ids) - 1

    await until(are_requeued, "the jobs are requeued")
    # At most one call for each job, and single probes.
    assert len(calls_with(scene.stack, marker)) <= JOBS + 4
    assert client.replies.keys().isdisjoint(ids)

    await scene.repair()
    replies = await results(client, ids)
    assert {(reply.body["status"], reply.body["attempts"]) for reply in replies} == {("succeeded", 1)}
    await until(scene.is_idle, "the worker is idle")
    # On a busy machine the first failures may be counted before the outage is detected.
    assert set(scene.warnings_()[warnings_:]) - {"job_retried"} == {"consumption_paused"}
    (resumed,) = events(worker, "consumption_resumed")[resumptions:]
    assert resumed["after_s"] > 0.9
    assert worker.metric("vqa_dependency_up", dependency="model") == 1
    assert {len(client.replies[it]) for it in ids} == {1}


@KINDS
async def test_an_outage_uses_no_attempt_with_a_concurrency_of_1(
    narrow: Scene, outcome: Outcome | None, reason: str
) -> None:
    """The first attempts are counted before the outage is detected, and restored."""
    worker, client, marker = narrow.worker, narrow.client, uuid.uuid4().hex
    warnings_ = len(narrow.warnings_())
    await narrow.fail_with(outcome, marker)
    ids = await publish(client, 3, marker)
    assert re.search(f"^model: .*{reason}", await paused(narrow))

    async def are_requeued() -> bool:
        return await client.depth(worker.jobs_queue) == 3

    await until(are_requeued, "the jobs are requeued")
    await narrow.repair()
    replies = await results(client, ids)
    assert {(reply.body["status"], reply.body["attempts"]) for reply in replies} == {("succeeded", 1)}
    await until(narrow.is_idle, "the worker is idle")
    # One call for each job, perhaps probes after 1 s and 2 s, and the answers.
    assert len(calls_with(narrow.stack, marker)) <= 3 + 3 + 3
    assert sorted(set(narrow.warnings_()[warnings_:])) in (
        ["consumption_paused"],
        ["consumption_paused", "job_retried"],
    )


async def test_an_outage_with_hundreds_of_jobs_in_flight_is_logged_once(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    marker = uuid.uuid4().hex
    worker = await start_own_worker(VQA_MAX_CONCURRENCY="200")
    client = await own_client_of(worker)
    own_stack.model.play(Error(status=500, after=1), marker=marker, times=None)
    ids = await publish(client, 200, marker)
    await said(worker, "paused")

    async def are_requeued() -> bool:
        return await client.depth(worker.jobs_queue) >= len(ids) - 1

    await until(are_requeued, "the jobs are requeued")
    # The initial concurrency; the jobs that took the slots of the first failures; probes.
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


async def test_probes_of_a_paused_worker_are_rare_and_take_another_job_each_time(scene: Scene) -> None:
    marker = uuid.uuid4().hex
    scene.stack.model.play(Error(status=401), marker=marker, times=None)
    ids = await publish(scene.client, 4, marker)

    async def are_requeued() -> bool:
        return await scene.client.depth(scene.worker.jobs_queue) == 4

    await paused(scene)
    await until(are_requeued, "the jobs are requeued")
    before = len(calls_with(scene.stack, marker))
    await calls_begun(scene.stack, marker, before + 1)
    scene.stack.model.configure(rules=[])
    assert statuses(await results(scene.client, ids)) == {"succeeded": 4}

    # A failed probe, the next one after at least 2 s, and then the other jobs.
    failed, tried = calls_with(scene.stack, marker)[before : before + 2]
    assert (failed.status, tried.status) == (401, 200)
    assert tried.started - failed.started > 1.9
    assert tried.question != failed.question
    assert len(calls_with(scene.stack, marker)) == before + 1 + 4
    await until(scene.is_idle, "the worker is idle")


def _in_two_seconds() -> str:
    return email.utils.format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)


@pytest.mark.parametrize(
    ("retry_after", "at_least_s"),
    [
        pytest.param(lambda: "2", 1.9, id="seconds"),
        # An HTTP date has whole seconds.
        pytest.param(_in_two_seconds, 0.9, id="date"),
        # A fraction of a call's duration, here almost 0.
        pytest.param(lambda: None, 0.03, id="missing"),
    ],
)
async def test_a_429_is_retried_after_retry_after_and_uses_no_attempt(
    scene: Scene, retry_after: Callable[[], str | None], at_least_s: float
) -> None:
    marker = uuid.uuid4().hex
    value = retry_after()
    headers = {} if value is None else {"Retry-After": value}
    scene.stack.model.play(Error(status=429, headers=headers), marker=marker)
    ids = await publish(scene.client, 1, marker)
    (reply,) = await results(scene.client, ids)

    assert (reply.body["status"], reply.body["attempts"]) == ("succeeded", 1)
    limited, answered = calls_with(scene.stack, marker)
    assert limited.ended is not None
    assert (limited.status, answered.status) == (429, 200)
    assert answered.started - limited.ended > at_least_s
    assert scene.worker.ready()[1]["status"] == "ready"
    await until(scene.is_idle, "the worker is idle")


async def test_an_api_with_little_capacity_answers_every_job(scene: Scene) -> None:
    marker = uuid.uuid4().hex
    before = scene.worker.metric("vqa_model_requests_total", code="429")
    scene.stack.model.configure(max_concurrent=4, latency=0.4, retry_after="1")
    try:
        # A model without earlier calls: the limit of the other one is adapted already.
        ids = await publish(scene.client, 12, marker, model=scene.stack.model.models[1])
        replies = await results(scene.client, ids)
    finally:
        scene.stack.model.configure(max_concurrent=None, latency=0, retry_after=None)

    assert {(reply.body["status"], reply.body["attempts"]) for reply in replies} == {("succeeded", 1)}
    assert {call.status for call in calls_with(scene.stack, marker)} == {429, 200}
    assert scene.worker.metric("vqa_model_requests_total", code="429") > before
    await until(scene.is_idle, "the worker is idle")


@pytest.mark.parametrize("status", [500, 403])
@pytest.mark.parametrize("count", [1, 2])
async def test_jobs_that_always_fail_exhaust_their_attempts_without_an_outage(
    scene: Scene, count: int, status: int
) -> None:
    """First without other jobs, where only their number excludes an outage; then just after an outage."""
    bad_marker = uuid.uuid4().hex
    # With those of an earlier test, more than three would fail in a row.
    assert statuses(await results(scene.client, await publish(scene.client, 1, uuid.uuid4().hex))) == {
        "succeeded": 1
    }
    scene.stack.model.play(Error(status=status, message="It hurts"), marker=bad_marker, times=None)
    await exhaust(scene, bad_marker, count)

    down = uuid.uuid4().hex
    scene.stack.model.play(Error(status=401), marker=down, times=None)
    ids = await publish(scene.client, 1, down)
    await paused(scene)
    scene.stack.model.configure(rules=[])
    scene.stack.model.play(Error(status=status, message="It hurts"), marker=bad_marker, times=None)
    await results(scene.client, ids)
    await exhaust(scene, bad_marker, count)


async def exhaust(scene: Scene, bad_marker: str, count: int) -> None:
    """Publish bad jobs to an idle worker: each of them ends, and none causes an outage."""
    await until(scene.is_idle, "the worker is idle")
    pauses, calls = len(events(scene.worker, "consumption_paused")), len(calls_with(scene.stack, bad_marker))
    ids = await publish(scene.client, count, bad_marker)
    for reply in await results(scene.client, ids):
        assert reply.body["error"]["code"] in ("attempts_exhausted", "model_rejected")
        assert "It hurts" in reply.body["error"]["message"]
        if reply.body["error"]["code"] == "attempts_exhausted":
            assert reply.body["attempts"] == 3
            dead = await scene.client.take(scene.worker.dead_letter_queue)
            assert bad_marker in dead.body.decode()
            assert dead.headers["vqa-error-code"] == "attempts_exhausted"
            assert dead.headers["vqa-attempts"] == 3
    assert len(calls_with(scene.stack, bad_marker)) - calls <= 3 * count
    assert len(events(scene.worker, "consumption_paused")) == pauses
    await until(scene.is_idle, "the worker is idle")


async def test_a_batch_of_bad_jobs_does_not_stop_good_ones_for_long(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    """Twelve that fail at once while slower good ones run look like an outage for a while."""
    bad_marker, good = uuid.uuid4().hex, uuid.uuid4().hex
    worker = await start_own_worker(wait=False, VQA_MAX_ATTEMPTS="2", VQA_MAX_CONCURRENCY="16")
    await hasty(worker).start()
    client = await own_client_of(worker)
    own_stack.model.play(Error(status=500), marker=bad_marker, times=None)
    own_stack.model.play(Answer(after=0.3), marker=good, times=None)
    bad = await publish(client, 12, bad_marker)
    ids = await publish(client, 12, good)
    assert statuses(await results(client, ids)) == {"succeeded": 12}
    # Only further good jobs show that it is not an outage.
    for _ in range(20):
        if client.replies.keys() >= set(bad):
            break
        await results(client, await publish(client, 2, good))
    assert statuses(await results(client, bad)) == {"attempts_exhausted": 12}
    assert await client.depth(worker.dead_letter_queue) == 12


async def test_jobs_survive_many_probes_by_many_workers_without_a_counted_attempt(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    """VQA_DELIVERY_LIMIT does not count deliveries that the worker requeued."""
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


async def test_a_job_whose_deadline_passes_in_an_outage_fails_without_a_call(scene: Scene) -> None:
    down, late = uuid.uuid4().hex, uuid.uuid4().hex
    scene.stack.model.play(Error(status=401), marker=down, times=None)
    ids = await publish(scene.client, 1, down)
    await paused(scene)
    deadline = (datetime.now(UTC) + timedelta(seconds=0.2)).isoformat()
    expired = await publish(scene.client, 5, late, deadline=deadline)
    assert statuses(await results(scene.client, expired)) == {"deadline_exceeded": 5}
    assert calls_with(scene.stack, late) == []
    assert scene.worker.ready()[1]["status"] == "paused"
    scene.stack.model.configure(rules=[])
    assert statuses(await results(scene.client, ids)) == {"succeeded": 1}
    await until(scene.is_idle, "the worker is idle")


async def test_a_paused_worker_without_jobs_resumes_with_the_first_that_arrives(
    scene: Scene,
) -> None:
    down, good = uuid.uuid4().hex, uuid.uuid4().hex
    scene.stack.model.play(Error(status=401), marker=down, times=None)
    await publish(scene.client, 1, down)
    await paused(scene)
    # No job is left for a probe.
    await scene.client.take(scene.worker.jobs_queue)
    assert scene.worker.ready()[1]["status"] == "paused"
    ids = await publish(scene.client, 3, good)
    assert statuses(await results(scene.client, ids)) == {"succeeded": 3}
    scene.stack.model.configure(rules=[])
    await until(scene.is_idle, "the worker is idle")


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
    await until(scene.is_idle, "the worker is idle")
