"""Workers on a cluster of three nodes: no failure of nodes loses a job, or bills one without need.

`make test-cluster` runs these tests, which take several minutes.
"""

import asyncio
import contextlib
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

import pytest

from deploy.local.model_simulator.behavior import Behavior
from deploy.local.stack import Stack
from tests.chaos.backend import Backend
from tests.chaos.environment import Environment
from tests.chaos.evaluation import REDELIVERED, Records, calls_by_job, evaluate, is_billed
from tests.chaos.faults import InjectedFault
from tests.chaos.jobs import Jobs
from tests.chaos.plan import Fault
from tests.chaos.run import ANSWERS, connected, put_images
from tests.chaos.traffic import Traffic
from tests.rabbitmq_cluster import PartitionHandling, RabbitMQCluster
from tests.running import Worker, until

pytestmark = pytest.mark.timeout(900)

WORKERS: Final = 2
CONCURRENCY: Final = 8
RATE: Final = 8.0
# With slow answers, so that requests are in flight at each fault.
KINDS: Final = ("one image in S3", "a slow answer", "a private reply queue", "text only")
PATIENCE_S: Final = 240.0
# The time in which workers without a majority are watched.
OBSERVED_S: Final = 5.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[RabbitMQCluster]:
    with RabbitMQCluster.start() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def cluster_stack(cluster: RabbitMQCluster) -> Iterator[Stack]:
    with Stack.start({"VQA_RABBITMQ_URL": cluster.url}, simulator=Behavior(decode=False)) as stack:
        yield stack


@dataclass
class Scene:
    """Two workers on the cluster, and jobs that are published all the time.

    Attributes:
        faults: the intervals in which nodes failed or came back (Unix time).
    """

    cluster: RabbitMQCluster
    environment: Environment
    backend: Backend
    traffic: Traffic
    with_store: bool
    faults: list[tuple[float, float]] = field(default_factory=list)

    @classmethod
    @contextlib.asynccontextmanager
    async def of(
        cls, cluster: RabbitMQCluster, stack: Stack, folder: Path, *, with_store: bool
    ) -> AsyncIterator[Self]:
        """Publish jobs in this context; at its end, wait for the last result and check all of them."""
        settings = {
            "VQA_RABBITMQ_URL": cluster.url,
            "VQA_MODEL_TIMEOUT": "30",
            "VQA_MAX_CONCURRENCY": str(CONCURRENCY),
            **({"VQA_RESULT_STORE": f"s3://{ANSWERS}/{uuid.uuid4().hex}"} if with_store else {}),
        }
        await asyncio.to_thread(stack.model.reset)
        async with Environment.set_up(stack, folder, WORKERS, **settings) as environment:
            inputs = await asyncio.to_thread(put_images, stack, environment.private_queue, 1)
            async with connected(environment) as backend:
                scene = cls(cluster, environment, backend, Traffic(backend), with_store)
                async with scene.traffic.publishing(Jobs(uuid.uuid4().int, inputs, KINDS), RATE):
                    await scene.progress()
                    yield scene
                    await scene.progress()
                await until(lambda: not scene.traffic.waiting(), "all results", PATIENCE_S)
                await until(environment.is_idle, "the workers have no job in flight", PATIENCE_S)
                await asyncio.gather(*(environment.stop_worker(slot) for slot in environment.slots))
            scene.check()

    async def progress(self) -> None:
        """Wait until a job is answered that was submitted from now on."""
        since = time.time()

        def answered() -> bool:
            return any(
                it.sent_at and it.sent_at[0] > since and self.backend.received[it.id]
                for it in self.traffic.jobs[-300:]
            )

        await until(answered, "the result of a new job", PATIENCE_S)

    @contextlib.asynccontextmanager
    async def disturbed(self) -> AsyncIterator[None]:
        """Record an interval in which the cluster is disturbed; it ends when jobs are answered again."""
        started = time.time()
        yield
        await self.progress()
        self.faults.append((started, time.time()))

    async def complete(self) -> None:
        """Wait until all nodes run and all queues have all members."""
        await until(
            lambda: asyncio.to_thread(self.cluster.is_complete), "the cluster is complete", PATIENCE_S
        )

    def check(self) -> None:
        """Check that no job is lost, no result is wrong, and no more is billed again than was in flight."""
        records = Records(
            jobs=self.traffic.jobs,
            results=self.backend.results,
            dead_letters=self.backend.dead_letters,
            calls=self.environment.calls(),
            injected=[
                InjectedFault(Fault(0.0, ended - started, "broker killed"), started, ended)
                for started, ended in self.faults
            ],
            processes=self.environment.processes,
            private_queue=self.environment.private_queue,
            with_store=self.with_store,
        )
        found = evaluate(records)
        billed = sum(found.billed_again.values())
        lasted = [round(end - start, 1) for start, end in self.faults]
        print(f"{len(records.jobs)} jobs, {billed} billed again, faults of {lasted} s")  # noqa: T201 to read with `pytest -s`
        assert found.passed, found
        # An outage of nodes does not use up attempts.
        assert {got.json()["attempts"] for got in records.results} == {1}
        again = found.billed_again[REDELIVERED]
        assert again == 0 or not self.with_store
        assert again <= len(self.faults) * WORKERS * CONCURRENCY
        for job_id, times in self._billed(records).items():
            assert times <= 1 + self._disturbances_of(job_id, records), records.history_of(job_id)

    def _billed(self, records: Records) -> Counter[str]:
        """Return how often each job was billed, without those that were published again."""
        unconfirmed = Counter({job.id: job.unconfirmed for job in records.jobs if not self.with_store})
        calls = calls_by_job(records.calls).items()
        return Counter({job_id: sum(map(is_billed, made)) for job_id, made in calls}) - unconfirmed

    def _disturbances_of(self, job_id: str, records: Records) -> int:
        """Return at how many of the faults a job was in flight."""
        began = min(call.started for call in calls_by_job(records.calls)[job_id])
        ended = min(got.at for got in records.results if got.json()["id"] == job_id)
        return sum(began <= end and ended >= start for start, end in self.faults)


@pytest.fixture(params=["with the store", "without a store"])
async def scene(
    request: pytest.FixtureRequest, cluster: RabbitMQCluster, cluster_stack: Stack, tmp_path: Path
) -> AsyncIterator[Scene]:
    cluster.start_nodes(*cluster.nodes)
    await until(lambda: asyncio.to_thread(cluster.is_complete), "the cluster is complete", PATIENCE_S)
    with_store = request.param == "with the store"
    async with Scene.of(cluster, cluster_stack, tmp_path, with_store=with_store) as scene:
        yield scene


async def test_each_node_in_turn_is_killed(scene: Scene) -> None:
    for node in scene.cluster.nodes:
        async with scene.disturbed():
            await asyncio.to_thread(node.kill)
        await asyncio.to_thread(node.start)
        await scene.complete()


async def test_a_node_is_silent_and_comes_back(scene: Scene) -> None:
    for node in scene.cluster.nodes[:2]:
        async with scene.disturbed():
            scene.cluster.pause(node)
        async with scene.disturbed():
            scene.cluster.resume(node)
            await scene.complete()


async def test_the_leaders_of_the_queues_move(scene: Scene) -> None:
    for node in scene.cluster.nodes:
        async with scene.disturbed():
            await asyncio.to_thread(scene.cluster.move_leaders, node)
            await until(lambda at=node: asyncio.to_thread(scene.cluster.leads, at), "the leaders have moved")


async def test_a_rolling_restart_with_maintenance_mode(scene: Scene) -> None:
    for node in scene.cluster.nodes:
        async with scene.disturbed():
            await asyncio.to_thread(node.tool, "rabbitmq-upgrade", "drain")
            await asyncio.to_thread(node.stop)
        await asyncio.to_thread(node.start)
        await asyncio.to_thread(node.tool, "rabbitmq-upgrade", "revive")
        await scene.complete()


@pytest.mark.parametrize("handling", ["pause_minority", "ignore"])
async def test_without_a_majority_the_workers_wait_and_report_it(
    scene: Scene, handling: PartitionHandling
) -> None:
    """A node without a majority closes its connections, or keeps them and its queues do not work."""
    await asyncio.to_thread(scene.cluster.set_partition_handling, handling)
    stopped = scene.cluster.nodes[:2]
    workers = [slot.process.worker for slot in scene.environment.slots]
    async with scene.disturbed():
        since = time.time()
        for node in stopped:
            await asyncio.to_thread(node.kill)
        for worker in workers:
            await until(
                lambda at=worker: reports_or_is_idle(at), "the worker reports the failure", PATIENCE_S
            )
        await asyncio.sleep(OBSERVED_S)
        calls = [it for it in scene.environment.calls() if it.started > since]
        assert len(calls) <= WORKERS * CONCURRENCY
        assert all(reports_or_is_idle(worker) for worker in workers)
        await asyncio.to_thread(scene.cluster.start_nodes, *stopped)
        await scene.complete()
    events = {line["event"] for worker in workers for line in worker.log()}
    assert events & {"rabbitmq_unreachable", "publish_failed", "publish_unconfirmed"}


def reports_or_is_idle(worker: Worker) -> bool:
    """Return whether `/readyz` reports a failure, or no result waits."""
    status, body = worker.ready()
    return status == 503 or bool(body["reasons"]) or not worker.metric("vqa_jobs_in_flight")
