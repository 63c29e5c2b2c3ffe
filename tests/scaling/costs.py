"""Measure the CPU time of a job and the memory of a pod, to compute the bottlenecks of large fleets."""

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
    """The cost of one job, in milliseconds of CPU, and of one pod.

    Attributes:
        broker_cpu_ms: without the broker's CPU time for idle pods.
        connections: connections of a pod to the broker.
        broker_pod_kb: memory of the broker for these connections.
        worker_mb: peak resident memory of a worker.
    """

    jobs: int
    image_bytes: int
    worker_cpu_ms: float
    broker_cpu_ms: float
    s3_cpu_ms: float
    connections: float
    broker_pod_kb: float
    worker_mb: float


def noise_image(size: tuple[int, int] = (182, 182)) -> bytes:
    """Return a PNG of noise, about 100 KB."""
    buffer = BytesIO()
    Image.frombytes("RGB", size, os.urandom(3 * size[0] * size[1])).save(buffer, "PNG")
    return buffer.getvalue()


async def measure(stack: Stack, folder: Path, image: str, image_bytes: int) -> Costs:
    """Measure two workers at full speed."""
    release = Release.of(stack, name=f"costs-{uuid.uuid4().hex[:8]}", concurrency=64, provider=64 * PODS)
    async with installed(stack, folder, release) as cluster:
        client, deployment = cluster.client, cluster.deployment
        before = await _broker_usage(stack)
        deployment.scale(PODS)
        await until(lambda: deployment.ready == PODS, "the workers are ready")
        idle = await _broker_usage(stack)
        await _run_jobs(client, image, WARM_UP)
        resting = await _cpu_used(stack, deployment, asyncio.sleep(IDLE_S))
        working = await _cpu_used(stack, deployment, _run_jobs(client, image, JOBS))
        worker_mb = max(map(machine.peak_mb, _pids(deployment)))
        deployment.scale(0)
        await until(lambda: not deployment.terminating, "the workers end")
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


async def _run_jobs(client: Client, image: str, count: int) -> None:
    jobs = [uuid.uuid4().hex for _ in range(count)]
    for job in jobs:
        await client.publish({"id": job, "question": "What is it?", "images": [image]})
    await until(lambda: all(client.replies.get(job) for job in jobs), "the results", 120)


async def _cpu_used(stack: Stack, deployment: Deployment, work: Any) -> Mapping[str, float]:
    """Return the CPU seconds of each service during `work`, and its duration."""
    pids = {"broker": stack.rabbitmq.pids, "s3": stack.s3.pids, "workers": _pids(deployment)}
    started = asyncio.get_running_loop().time()
    before = {who: sum(map(machine.cpu_s, them)) for who, them in pids.items()}
    await work
    used = {who: sum(map(machine.cpu_s, them)) - before[who] for who, them in pids.items()}
    return {**used, "seconds": asyncio.get_running_loop().time() - started}


def _pids(deployment: Deployment) -> list[int]:
    return [pod.worker.process.pid for pod in deployment.pods if pod.worker.process]


async def _broker_usage(stack: Stack) -> Mapping[str, float]:
    """Return the number of connections and their memory, as reported by the broker."""
    # Memory statistics have the same age as the others.
    await asyncio.sleep(2 * broker.SAMPLING_S)
    async with broker.administrator(stack) as ask:
        (node,) = await ask("nodes")
        memory = (await ask(f"nodes/{node['name']}/memory"))["memory"]
        connections = await ask("connections")
    used = sum(count for name, count in memory.items() if name.startswith("connection_"))
    return {"connections": len(connections), "bytes": used}
