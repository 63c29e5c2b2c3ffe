"""What a job and a pod cost the services, measured: what limits many pods follows from it."""

import asyncio
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Final

from PIL import Image

from deploy.local.stack import Stack
from tests.bench import machine
from tests.running import Client, until
from tests.scaling import broker
from tests.scaling.cluster import installed
from tests.scaling.deployment import Deployment
from tests.scaling.release import Release

PODS: Final = 2
JOBS: Final = 3000
WARM_UP: Final = 500
IDLE_S: Final = 5.0


@dataclass(frozen=True)
class Costs:
    """For one job, in milliseconds of CPU; and for one pod.

    Attributes:
        broker_cpu_ms: beyond what the broker spends with idle pods.
        connections: of a pod to the broker.
        broker_pod_kb: memory that the broker keeps for these.
        worker_mb: the most that a worker had resident.
    """

    jobs: int
    image_bytes: int
    worker_cpu_ms: float
    broker_cpu_ms: float
    s3_cpu_ms: float
    connections: float
    broker_pod_kb: float
    worker_mb: float


def picture(size: tuple[int, int] = (182, 182)) -> bytes:
    """A PNG of about 100 KB: noise, which cannot be compressed."""
    buffer = BytesIO()
    Image.frombytes("RGB", size, os.urandom(3 * size[0] * size[1])).save(buffer, "PNG")
    return buffer.getvalue()


async def measure(stack: Stack, folder: Path, image: str, image_bytes: int) -> Costs:
    """Let two workers answer some thousand jobs as fast as they can."""
    release = Release.of(stack, name=f"costs-{uuid.uuid4().hex[:8]}", concurrency=64, provider=64 * PODS)
    async with installed(stack, folder, release) as cluster:
        client, deployment = cluster.client, cluster.deployment
        before = await _of_broker(stack)
        deployment.scale(PODS)
        await until(lambda: deployment.ready == PODS, "the workers are ready")
        idle = await _of_broker(stack)
        await _answer(client, image, WARM_UP)
        resting = await _spent(stack, deployment, asyncio.sleep(IDLE_S))
        working = await _spent(stack, deployment, _answer(client, image, JOBS))
        worker_mb = max(map(machine.peak_mb, _pids(deployment)))
        deployment.scale(0)
        await until(lambda: not deployment.ending, "the workers end")
    rest_s = resting["broker"] / resting["seconds"] * working["seconds"]
    return Costs(
        jobs=JOBS,
        image_bytes=image_bytes,
        worker_cpu_ms=1000 * working["workers"] / JOBS,
        broker_cpu_ms=1000 * (working["broker"] - rest_s) / JOBS,
        s3_cpu_ms=1000 * working["s3"] / JOBS,
        connections=(idle["connections"] - before["connections"]) / PODS,
        broker_pod_kb=(idle["bytes"] - before["bytes"]) / PODS / 1000,
        worker_mb=worker_mb,
    )


async def _answer(client: Client, image: str, count: int) -> None:
    jobs = [uuid.uuid4().hex for _ in range(count)]
    for job in jobs:
        await client.publish({"id": job, "question": "What is it?", "images": [image]})
    await until(lambda: all(client.replies.get(job) for job in jobs), "the results", 120)


async def _spent(stack: Stack, deployment: Deployment, work: Any) -> Mapping[str, float]:
    """CPU seconds of everybody while something is done, and the seconds that it took."""
    pids = {"broker": stack.rabbitmq.pids, "s3": stack.s3.pids, "workers": _pids(deployment)}
    began = asyncio.get_running_loop().time()
    before = {who: sum(map(machine.cpu_s, them)) for who, them in pids.items()}
    await work
    spent = {who: sum(map(machine.cpu_s, them)) - before[who] for who, them in pids.items()}
    return {**spent, "seconds": asyncio.get_running_loop().time() - began}


def _pids(deployment: Deployment) -> list[int]:
    return [pod.worker.process.pid for pod in deployment.pods if pod.worker.process]


async def _of_broker(stack: Stack) -> Mapping[str, float]:
    """Its connections, and the memory that it says it spends on connections."""
    # Its own figures of memory come with the others, once a second.
    await asyncio.sleep(2 * broker.SAMPLING_S)
    async with broker.administrator(stack) as ask:
        (node,) = await ask("nodes")
        memory = (await ask(f"nodes/{node['name']}/memory"))["memory"]
        connections = await ask("connections")
    spent = sum(count for name, count in memory.items() if name.startswith("connection_"))
    return {"connections": len(connections), "bytes": spent}
