"""Real workers in the place of pods: started, and asked to stop by SIGTERM, as a Deployment does."""

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

# The header by which the simulator's calls tell who made them.
POD_HEADER: Final = "x-scaling-pod"


@dataclass
class Pod:
    """One worker process; times are Unix times."""

    number: int
    worker: Worker
    wanted_at: float = field(default_factory=time.time)
    ready_at: float | None = None
    told_at: float | None = None
    ended_at: float | None = None
    code: int | None = None

    @property
    def is_ready(self) -> bool:
        """Whether it takes jobs."""
        return self.ready_at is not None and self.told_at is None

    async def start(self) -> None:
        """Start, and wait until it takes jobs."""
        await self.worker.start()
        self.ready_at = time.time()

    async def end(self) -> None:
        """SIGTERM, and wait."""
        # None if it was not even started.
        self.code = await self.worker.stop(patience_s=60) if self.worker.process else 0
        self.ended_at = time.time()


class Deployment:
    """So many workers at one queue as are asked for."""

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
        """Without pods as yet; none is left afterwards."""
        deployment = cls(stack, folder, settings)
        try:
            async with deployment._tasks:
                yield deployment
        finally:
            for pod in deployment.pods:
                pod.worker.kill()

    @property
    def wanted(self) -> list[Pod]:
        """The pods that were not asked to stop."""
        return [pod for pod in self.pods if pod.told_at is None]

    @property
    def ready(self) -> int:
        """How many take jobs."""
        return sum(pod.is_ready for pod in self.pods)

    @property
    def ending(self) -> int:
        """How many were asked to stop and still run."""
        return sum(pod.told_at is not None and pod.ended_at is None for pod in self.pods)

    def scale(self, replicas: int) -> None:
        """Start workers, or tell some to stop."""
        while len(self.wanted) < replicas:
            self._start()
        while len(self.wanted) > replicas:
            self._tell_to_stop(self._least_wanted())

    def _start(self) -> None:
        number = len(self.pods)
        headers = json.dumps({POD_HEADER: str(number)})
        worker = Worker.of(self._stack, self._folder, **self._settings, VQA_MODEL_HEADERS=headers)
        pod = Pod(number, worker)
        self.pods.append(pod)
        self._starting[number] = self._tasks.create_task(pod.start())

    def _tell_to_stop(self, pod: Pod) -> None:
        pod.told_at = time.time()
        self._starting.pop(pod.number).cancel()
        self._tasks.create_task(pod.end())

    def _least_wanted(self) -> Pod:
        """One that is not ready, else the youngest: `ActivePodsWithRanks` in controller_utils.go."""
        return max(self.wanted, key=lambda pod: (not pod.is_ready, pod.ready_at or pod.wanted_at))
