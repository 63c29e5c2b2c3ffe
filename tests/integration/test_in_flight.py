"""SIGUSR1 logs the jobs in flight in every state of the worker; SIGUSR2 prints its stack traces."""

import asyncio
import signal
import sys
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

from deploy.local.model_simulator.behavior import Error, Hang
from deploy.local.stack import Stack
from tests.breaking import calls_begun, events, publish, results, said, statuses
from tests.conftest import MakeClient, StartWorker
from tests.proxy import Proxy
from tests.running import Client, Worker, until
from worker.app.runner import MAX_LOGGED_JOBS

ALARM = ("set_vm_memory_high_watermark", "0.00001")
NO_ALARM = ("set_vm_memory_high_watermark", "0.4")

# Sends SIGUSR1 before the handler is installed, and again after it was removed.
ASKED_TOO_EARLY_AND_TOO_LATE = """
import os, signal, sys
import worker.__main__ as main
import worker.settings as settings

def asking(function):
    def asked(**options):
        os.kill(os.getpid(), signal.SIGUSR1)
        return function(**options)
    return asked

settings.load_settings = asking(settings.load_settings)
main._has_blocked_threads = asking(main._has_blocked_threads)
sys.exit(main.main(["run"]))
"""


@dataclass(frozen=True)
class Seen:
    """The logged summary of a worker, and its jobs in order."""

    state: dict[str, Any]
    jobs: list[dict[str, Any]]

    @property
    def ids(self) -> list[str]:
        return [job["job_id"] for job in self.jobs]


async def asked(worker: Worker) -> Seen:
    """Send SIGUSR1; return what the worker logs."""
    states, jobs = len(events(worker, "in_flight_summary")), len(events(worker, "in_flight_job"))
    assert worker.process is not None
    worker.process.send_signal(signal.SIGUSR1)

    def all_of_it() -> Seen | None:
        reported = events(worker, "in_flight_summary")[states:]
        listed = events(worker, "in_flight_job")[jobs:]
        is_all = reported and len(listed) == reported[0]["jobs"] - reported[0]["not_shown"]
        return Seen(reported[0], listed) if is_all else None

    seen: Seen = await until(all_of_it, "the worker logs the jobs in flight")
    return seen


@dataclass(frozen=True)
class Scene:
    """A worker, its publisher, and the network between it and the model."""

    stack: Stack
    worker: Worker
    client: Client
    model: Proxy

    async def has(self, stages: dict[str, int]) -> Seen:
        """Send SIGUSR1 until these numbers of jobs are in these stages."""

        async def look() -> Seen | None:
            seen = await asked(self.worker)
            return seen if seen.state["stages"] == stages else None

        seen: Seen = await until(look, f"jobs in {stages}")
        return seen


@pytest.fixture
async def scene(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> AsyncIterator[Scene]:
    own_stack.model.reset()
    async with Proxy.before(own_stack.model.base_url) as model:
        worker = await start_own_worker(
            VQA_MODEL_BASE_URL=model.url(own_stack.model.base_url), VQA_MAX_CONCURRENCY="300"
        )
        yield Scene(own_stack, worker, await own_client_of(worker), model)
        model.thaw()


async def test_the_oldest_jobs_are_logged_and_the_others_counted(scene: Scene) -> None:
    scene.model.freeze()
    secret, jobs = uuid.uuid4().hex, MAX_LOGGED_JOBS + 7
    (oldest,) = await publish(scene.client, 1, secret)
    await scene.has({"model": 1})
    ids = [oldest, *await publish(scene.client, jobs - 1, secret)]
    limit = int(scene.worker.metric("vqa_concurrency_limit"))
    seen = await scene.has({"model": limit, "wait": jobs - limit})

    assert seen.state["status"] == "ready"
    assert (seen.state["jobs"], seen.state["not_shown"]) == (jobs, 7)
    assert len(seen.jobs) == MAX_LOGGED_JOBS
    assert seen.ids[0] == oldest
    assert set(seen.ids) <= set(ids)
    assert [job["age_s"] for job in seen.jobs] == sorted((job["age_s"] for job in seen.jobs), reverse=True)
    for job in seen.jobs:
        assert 0 <= job["stage_s"] <= job["age_s"]
        assert (job["attempts"], job["model"]) == (1, scene.stack.model.models[0])
    assert Counter(job["stage"] for job in seen.jobs).keys() == {"model", "wait"}
    assert secret not in scene.worker.output()
    scene.model.thaw()
    assert statuses(await results(scene.client, ids)) == {"succeeded": jobs}
    # A result can arrive before the worker has the confirm.
    assert (await scene.has({})).state["jobs"] == 0


async def test_the_attempt_and_the_trace_are_logged(scene: Scene) -> None:
    marker, trace_id = uuid.uuid4().hex, uuid.uuid4().hex
    scene.stack.model.play(Error(status=500), marker=marker)
    scene.stack.model.play(Hang(), marker=marker)
    job_id = uuid.uuid4().hex
    await scene.client.publish(
        {"id": job_id, "question": marker, "images": ["https://example.com/a.png"]},
        headers={"traceparent": f"00-{trace_id}-{'1' * 16}-00"},
    )
    await calls_begun(scene.stack, marker, 2)
    (job,) = (await asked(scene.worker)).jobs
    assert (job["job_id"], job["attempts"], job["trace_id"]) == (job_id, 2, trace_id)


async def test_a_paused_worker_logs_the_reason(scene: Scene) -> None:
    marker = uuid.uuid4().hex
    scene.stack.model.play(Error(status=402), marker=marker, times=None)
    ids = await publish(scene.client, 3, marker)
    await said(scene.worker, "paused")
    seen = await asked(scene.worker)
    assert seen.state["status"] == "paused"
    (reason,) = seen.state["reasons"]
    assert "credit" in reason
    assert seen.state["jobs"] <= 3
    scene.stack.model.configure(rules=[])
    assert statuses(await results(scene.client, ids)) == {"succeeded": 3}


async def test_a_stopping_worker_logs_the_jobs_that_it_waits_for(scene: Scene) -> None:
    scene.model.freeze()
    ids = await publish(scene.client, 2, "while it stops")
    await scene.has({"model": 2})
    assert scene.worker.process is not None
    scene.worker.process.send_signal(signal.SIGTERM)
    await said(scene.worker, "stopping")
    seen = await scene.has({"model": 2})
    assert seen.state["status"] == "stopping"
    assert sorted(seen.ids) == sorted(ids)
    scene.model.thaw()
    assert await scene.worker.ended() == 0
    assert statuses(await results(scene.client, ids)) == {"succeeded": 2}


async def test_a_blocked_worker_logs_jobs_in_stage_publish(scene: Scene) -> None:
    scene.model.freeze()
    (job_id,) = await publish(scene.client, 1, "while the broker is blocked")
    await scene.has({"model": 1})
    try:
        await asyncio.to_thread(scene.stack.rabbitmq.ctl, *ALARM)
        scene.model.thaw()
        seen = await scene.has({"publish": 1})
        assert seen.ids == [job_id]
    finally:
        await asyncio.to_thread(scene.stack.rabbitmq.ctl, *NO_ALARM)
    assert statuses(await results(scene.client, [job_id])) == {"succeeded": 1}


async def test_sigusr1_during_start_and_exit_is_ignored(
    start_own_worker: StartWorker,
) -> None:
    worker = await start_own_worker(wait=False)
    worker.command = [sys.executable, "-c", ASKED_TOO_EARLY_AND_TOO_LATE]
    await worker.start()
    assert await worker.stop() == 0, worker.output()
    assert events(worker, "in_flight_summary") == []


async def test_sigusr2_prints_stack_traces(scene: Scene) -> None:
    assert scene.worker.process is not None
    scene.worker.process.send_signal(signal.SIGUSR2)
    # The main thread's stack is the last, and begins in the event loop.
    await until(lambda: "worker/__main__.py" in scene.worker.output(), "the stacks")
    assert "most recent call first" in scene.worker.output()
    assert scene.worker.ready()[0] == 200
