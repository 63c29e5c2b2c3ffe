"""The soak test: measure memory, open files and tasks of one worker. Linux only: reads /proc."""

import asyncio
import contextlib
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from deploy.local.stack import Stack
from tests.chaos import plan, report
from tests.chaos.environment import Environment
from tests.chaos.run import Observer, Options
from tests.chaos.run import run as run_chaos
from tests.running import Worker
from worker.http.client import KEEP_ALIVE_S

WARM_UP_S: Final = 120.0
SAMPLE_S: Final = 30.0
SETTLE_S: Final = 5.0
# Idle connections are closed after one to two times the keep-alive.
IDLE_S: Final = 2 * KEEP_ALIVE_S + SETTLE_S
# Between the medians of the first and the last fifth. It includes what a worker caches: about
# 1 kB for each of its latest 10,000 jobs, full after about ten minutes.
GROWTH_ALLOWED: Final = 0.20
# Between the medians of the third and the last fifth, after that cache is full.
LATE_GROWTH_ALLOWED: Final = 0.03
FULL_AFTER_JOBS: Final = 25_000
# The number of idle connections to a service varies.
FILES_ALLOWED: Final = 3
# The channel that fetches single jobs is opened when consumption first pauses, and kept.
TASKS_ALLOWED: Final = 1


@dataclass(frozen=True)
class Sample:
    """Resources of the worker at one time."""

    at: float
    memory_mb: float
    files: int
    tasks: int


@dataclass(frozen=True)
class SoakResult:
    """Samples of the idle worker before and after, and of the busy worker between."""

    before: Sample
    busy: Sequence[Sample]
    after: Sample
    jobs: int

    def growth(self, since: int = 0) -> float:
        """Return the relative growth of median memory from fifth number `since` to the last fifth."""
        fifth = max(1, len(self.busy) // 5)
        first, last = self.busy[since * fifth : (since + 1) * fifth], self.busy[-fifth:]
        return _median_mb(last) / _median_mb(first) - 1

    def faults(self) -> list[str]:
        """Return the exceeded limits."""
        faults = []
        if self.growth() > GROWTH_ALLOWED:
            faults.append(f"memory grew by {self.growth():.1%} (allowed: {GROWTH_ALLOWED:.0%})")
        if self.jobs >= FULL_AFTER_JOBS and self.growth(since=2) > LATE_GROWTH_ALLOWED:
            faults.append(f"memory grew by {self.growth(since=2):.1%} in the second half")
        if self.after.files > self.before.files + FILES_ALLOWED:
            faults.append(f"{self.after.files - self.before.files} more open files than before")
        if self.after.tasks > self.before.tasks + TASKS_ALLOWED:
            faults.append(f"{self.after.tasks - self.before.tasks} more tasks than before")
        return faults

    def __str__(self) -> str:
        memory = [sample.memory_mb for sample in self.busy]
        rows = [
            ("memory, MB: idle at the start", f"{self.before.memory_mb:.1f}"),
            ("memory, MB: lowest while busy", f"{min(memory):.1f}"),
            ("memory, MB: median while busy", f"{statistics.median(memory):.1f}"),
            ("memory, MB: highest while busy", f"{max(memory):.1f}"),
            ("memory, MB: idle at the end", f"{self.after.memory_mb:.1f}"),
            ("growth between the first and the last fifth (medians)", f"{self.growth():+.1%}"),
            ("growth between the third and the last fifth", f"{self.growth(since=2):+.1%}"),
            ("open files: idle at the start", self.before.files),
            ("open files: most while busy", max(sample.files for sample in self.busy)),
            ("open files: idle at the end", self.after.files),
            ("tasks: idle at the start", self.before.tasks),
            ("tasks: most while busy", max(sample.tasks for sample in self.busy)),
            ("tasks: idle at the end", self.after.tasks),
            ("samples while busy", len(self.busy)),
        ]
        growth = "; ".join(self.faults()) or "flat"
        return f"{report.table('Resources of the worker', rows)}\n\nGrowth: {growth}"


def soak_options(options: Options) -> Options:
    """Return options with one worker and the faults of the soak test."""
    return replace(options, workers=1, faults=plan.MILD, every_s=max(options.every_s, 12.0))


async def run(stack: Stack, folder: Path, options: Options, log: Callable[[str], None]) -> tuple[str, bool]:
    """Run the soak test; return the report, and whether it passed."""
    observer = _MemoryObserver(log, min(WARM_UP_S, options.seconds / 5), min(SAMPLE_S, options.seconds / 50))
    ended = await run_chaos(stack, folder, options, log, observer)
    soak_result = observer.soak_result(len(ended.records.jobs))
    return f"{ended}\n\n{soak_result}", ended.evaluation.passed and not soak_result.faults()


class _MemoryObserver(Observer):
    """Sample the only worker."""

    def __init__(self, log: Callable[[str], None], warm_up_s: float, every_s: float) -> None:
        self._log = log
        self._warm_up_s = warm_up_s
        self._every_s = every_s
        self._samples: list[Sample] = []
        self._ends: list[Sample] = []

    @contextlib.asynccontextmanager
    async def observing(self, environment: Environment) -> AsyncIterator[None]:
        worker = environment.slots[0].process.worker
        self._ends.append(await _idle_sample(worker, SETTLE_S))
        sampling = asyncio.create_task(self._take_samples(worker))
        try:
            yield
        finally:
            sampling.cancel()
        self._log("  looking at the idle worker")
        self._ends.append(await _idle_sample(worker, IDLE_S))

    def soak_result(self, jobs: int) -> SoakResult:
        """All samples, when it is over."""
        before, after = self._ends
        return SoakResult(before, self._samples, after, jobs)

    async def _take_samples(self, worker: Worker) -> None:
        await asyncio.sleep(self._warm_up_s)
        while True:
            taken = await asyncio.to_thread(sample, worker)
            self._samples.append(taken)
            self._log(f"  {taken.memory_mb:.1f} MB, {taken.files} open files, {taken.tasks} tasks")
            await asyncio.sleep(self._every_s)


async def _idle_sample(worker: Worker, after_s: float) -> Sample:
    await asyncio.sleep(after_s)
    return await asyncio.to_thread(sample, worker)


def sample(worker: Worker) -> Sample:
    """Return the current resources of a worker."""
    assert worker.process is not None
    folder = Path("/proc") / str(worker.process.pid)
    (line,) = [it for it in (folder / "status").read_text().splitlines() if it.startswith("VmRSS:")]
    tasks = int(worker.metric("python_asyncio_tasks"))
    return Sample(time.time(), int(line.split()[1]) * 1024 / 1e6, len(list((folder / "fd").iterdir())), tasks)


def _median_mb(samples: Sequence[Sample]) -> float:
    return statistics.median(it.memory_mb for it in samples)
