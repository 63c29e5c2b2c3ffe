"""The services and the workers, with a proxy between each worker and each service."""

import asyncio
import contextlib
import json
import signal
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Self

from deploy.local.model_simulator.behavior import Rule
from deploy.local.model_simulator.calls import Call
from deploy.local.stack import Stack
from tests.chaos import jobs
from tests.proxy import Proxy
from tests.running import Worker, sample_sum

# Longer than a slow answer, and shorter than the hangs of the plan.
MODEL_TIMEOUT_S: Final = 6.0
# Seconds; both ends close a connection after two or three missed heartbeats.
HEARTBEAT_S: Final = 3
LATENCY_S: Final = 0.15
# The request header with the name of the worker process.
WORKER_HEADER: Final = "x-chaos-worker"
_SCRAPE_S: Final = 1.0

Ending = Literal["killed", "SIGTERM", "none"]


@dataclass
class WorkerProcess:
    """A worker process with its start and exit (Unix time)."""

    name: str
    worker: Worker
    started: float = field(default_factory=time.time)
    ended: float | None = None
    ending: Ending | None = None
    code: int | None = None
    exceeded_grace_period: bool = False
    """Whether it cancelled jobs at shutdown."""
    metrics: str = ""
    """The last scrape."""

    def total(self, metric: str, **labels: str) -> float:
        """Return the sum of a metric's samples with these labels."""
        return sample_sum(self.metrics, metric, **labels)


@dataclass
class WorkerSlot:
    """A worker's proxies, and its processes: each restart adds one."""

    number: int
    broker: Proxy
    s3: Proxy
    model: Proxy
    processes: list[WorkerProcess] = field(default_factory=list)

    @property
    def process(self) -> WorkerProcess:
        return self.processes[-1]


class Environment:
    """The services, the workers and the proxies between them."""

    def __init__(self, stack: Stack, folder: Path, settings: dict[str, str]) -> None:
        self.stack = stack
        self.slots: list[WorkerSlot] = []
        self._folder = folder
        name = f"chaos-{uuid.uuid4().hex[:8]}"
        self.private_queue = f"vqa.results.{name}"
        self._settings = {
            "VQA_JOBS_QUEUE": f"{name}.jobs",
            "VQA_RESULTS_QUEUE": f"{name}.results",
            **settings,
        }
        self._calls: list[Call] = []

    @classmethod
    @contextlib.asynccontextmanager
    async def set_up(cls, stack: Stack, folder: Path, workers: int, **settings: str) -> AsyncIterator[Self]:
        """Start the workers; kill them at the end of the context."""
        environment = cls(stack, folder, settings)
        async with AsyncExitStack() as resources:
            resources.callback(environment.kill_all)
            for number in range(workers):
                broker, s3, model = [
                    await resources.enter_async_context(Proxy.before(url))
                    for url in (stack.rabbitmq.url, stack.s3.endpoint_url, stack.model.base_url)
                ]
                environment.slots.append(WorkerSlot(number, broker, s3, model))
            await asyncio.to_thread(environment.reset_model)
            await asyncio.gather(*(environment.start_worker(slot) for slot in environment.slots))
            scraping = asyncio.create_task(environment._scrape_forever())
            resources.callback(scraping.cancel)
            yield environment

    @property
    def processes(self) -> list[WorkerProcess]:
        """All worker processes, running and exited."""
        return [process for slot in self.slots for process in slot.processes]

    def slots_of(self, who: int | None) -> list[WorkerSlot]:
        """Return the slots affected by a fault."""
        return self.slots if who is None else [self.slots[who]]

    def reset_model(self, *first: Rule, **behaviour: object) -> None:
        """Reset the simulator to its defaults, except for the given rules and settings."""
        usual: dict[str, object] = {
            "latency": LATENCY_S,
            "max_concurrent": None,
            "busy_status": 429,
            "retry_after": None,
            "early_status": None,
            "wrapping": None,
        }
        rules = [*first, *jobs.MARKER_RULES]
        self.stack.model.configure(**{**usual, **behaviour, "rules": rules})

    def save_calls(self) -> None:
        """Save the simulator's calls before it is killed; no worker may reach it any more."""
        self._calls += self.stack.model.calls()

    def calls(self) -> list[Call]:
        """Return all calls, including those before restarts of the simulator."""
        return [*self._calls, *self.stack.model.calls()]

    async def start_worker(self, slot: WorkerSlot) -> None:
        """Start a new worker; its dependencies may be unreachable."""
        stack, name = self.stack, f"{slot.number}.{len(slot.processes)}"
        settings = {
            "VQA_RABBITMQ_URL": f"{slot.broker.url(stack.rabbitmq.url)}?heartbeat={HEARTBEAT_S}",
            "VQA_S3_ENDPOINT_URL": slot.s3.url(stack.s3.endpoint_url),
            "VQA_MODEL_BASE_URL": slot.model.url(stack.model.base_url),
            "VQA_MODEL_HEADERS": json.dumps({WORKER_HEADER: name}),
            **self._settings,
        }
        worker = Worker.of(stack, self._folder, **settings)
        slot.processes.append(WorkerProcess(name, worker))
        await worker.serve()

    async def kill_worker(self, slot: WorkerSlot) -> None:
        """Send SIGKILL."""
        process = slot.process
        await asyncio.to_thread(self._scrape, process)
        process.ending = "killed"
        process.worker.kill()
        self._record_exit(process)

    async def stop_worker(self, slot: WorkerSlot, patience_s: float = 60.0) -> None:
        """Send SIGTERM and wait for the exit."""
        process = slot.process
        await asyncio.to_thread(self._scrape, process)
        process.ending = "SIGTERM"
        await process.worker.stop(signal.SIGTERM, patience_s)
        self._record_exit(process)

    def kill_all(self) -> None:
        """Kill the workers that still run."""
        for process in self.processes:
            process.worker.kill()

    def record_crashes(self) -> None:
        """Record the workers that exited without a signal."""
        for process in self.processes:
            popen = process.worker.process
            if process.ending is None and popen is not None and popen.poll() is not None:
                process.ending = "none"
                self._record_exit(process)

    def logged(self, event: str) -> Iterator[dict[str, Any]]:
        """Yield the log lines of all workers with this event."""
        for process in self.processes:
            yield from (line for line in process.worker.log() if line.get("event") == event)

    async def is_idle(self) -> bool:
        """Return whether every worker is ready and has no job in flight."""
        return all(await asyncio.gather(*(asyncio.to_thread(_is_idle, it.process) for it in self.slots)))

    def _record_exit(self, process: WorkerProcess) -> None:
        process.ended = time.time()
        assert process.worker.process is not None
        process.code = process.worker.process.returncode
        process.exceeded_grace_period = any(
            line.get("event") == "grace_period_expired" for line in process.worker.log()
        )

    async def _scrape_forever(self) -> None:
        while True:
            alive = [slot.process for slot in self.slots if slot.process.ended is None]
            await asyncio.gather(*(asyncio.to_thread(self._scrape, process) for process in alive))
            await asyncio.sleep(_SCRAPE_S)

    def _scrape(self, process: WorkerProcess) -> None:
        status, text = process.worker.get("/metrics")
        if status == 200:
            process.metrics = text


def _is_idle(process: WorkerProcess) -> bool:
    # Without a job for a probe a worker stays paused.
    if process.worker.ready()[1].get("status") not in ("ready", "paused"):
        return False
    return process.worker.metric("vqa_jobs_in_flight") == 0
