"""A Deployment with worker processes instead of pods, started and stopped with SIGTERM."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from deploy.local.stack import Stack
from tests.running import Worker

# The request header with the number of the pod.
POD_HEADER: Final = "x-scaling-pod"


@dataclass
class Pod:
    """One worker process; times are Unix times."""

    number: int
    worker: Worker
    created_at: float = field(default_factory=time.time)
    ready_at: float | None = None
    stopped_at: float | None = None
    exited_at: float | None = None
    code: int | None = None

    @property
    def is_ready(self) -> bool:
        """Whether it consumes jobs."""
        return self.ready_at is not None and self.stopped_at is None

    async def start(self) -> None:
        """Start the worker and wait until it is ready."""
        await self.worker.start()
        self.ready_at = time.time()

    async def end(self) -> None:
        """Send SIGTERM and wait for the exit."""
        # There is no process yet if the start was cancelled early.
        self.code = await self.worker.stop(patience_s=60) if self.worker.process else 0
        self.exited_at = time.time()


class Deployment:
    """Worker processes that consume one queue."""

    def __init__(self, stack: Stack, folder: Path, settings: dict[str, str]) -> None:
        self._stack = stack
        self._folder = folder
        self._settings = settings
        self.pods: list[Pod] = []
        self._tasks = asyncio.TaskGroup()
        self._starting: dict[int, asyncio.Task[None]] = {}

    @classmethod
    @contextlib.asynccontextmanager
    async def empty(cls, stack: Stack, folder: Path, settings: dict[str, str]) -> AsyncIterator[Self]:
        """Create a Deployment with zero replicas; kill all workers at the end of the context."""
        deployment = cls(stack, folder, settings)
        try:
            async with deployment._tasks:
                yield deployment
        finally:
            for pod in deployment.pods:
                pod.worker.kill()

    @property
    def desired(self) -> list[Pod]:
        """The pods that are not terminating."""
        return [pod for pod in self.pods if pod.stopped_at is None]

    @property
    def ready(self) -> int:
        """The number of ready pods."""
        return sum(pod.is_ready for pod in self.pods)

    @property
    def terminating(self) -> int:
        """The number of terminating pods."""
        return sum(pod.stopped_at is not None and pod.exited_at is None for pod in self.pods)

    def scale(self, replicas: int) -> None:
        """Start or stop workers."""
        while len(self.desired) < replicas:
            self._start()
        while len(self.desired) > replicas:
            self._stop(self._pod_to_stop())

    def _start(self) -> None:
        number = len(self.pods)
        headers = json.dumps({POD_HEADER: str(number)})
        worker = Worker.of(self._stack, self._folder, **self._settings, VQA_MODEL_HEADERS=headers)
        pod = Pod(number, worker)
        self.pods.append(pod)
        self._starting[number] = self._tasks.create_task(pod.start())

    def _stop(self, pod: Pod) -> None:
        pod.stopped_at = time.time()
        self._starting.pop(pod.number).cancel()
        self._tasks.create_task(pod.end())

    def _pod_to_stop(self) -> Pod:
        """Return a pod that is not ready, else the youngest: `ActivePodsWithRanks` in controller_utils.go."""
        return max(self.desired, key=lambda pod: (not pod.is_ready, pod.ready_at or pod.created_at))
