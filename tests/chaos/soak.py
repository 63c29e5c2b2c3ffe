"""The soak: one worker that is never killed, and whether it grows. Linux only: it reads /proc."""

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
from tests.chaos.run import Options, Watch
from tests.chaos.run import run as run_chaos
from tests.chaos.scene import Scene
from tests.running import Worker
from worker.http.client import KEEP_ALIVE_S

WARM_UP_S: Final = 120.0
SAMPLE_S: Final = 30.0
SETTLE_S: Final = 5.0
# Idle connections are closed when they have been so for one to two such times.
IDLE_S: Final = 2 * KEEP_ALIVE_S + SETTLE_S
# Of the medians of the first fifth and of the last. Within it is what a worker remembers on purpose: a
# kilobyte or so for each of its latest 10,000 jobs, which is full after ten minutes or so.
GROWTH_ALLOWED: Final = 0.20
# Of the medians of the third fifth and of the last, when that is full: then nothing may grow any more.
LATE_GROWTH_ALLOWED: Final = 0.03
FULL_AFTER_JOBS: Final = 25_000
# A connection more or less at a service is none left behind.
FILES_ALLOWED: Final = 3


@dataclass(frozen=True)
class Sample:
    """What the worker holds."""

    at: float
    memory_mb: float
    files: int
    tasks: int


@dataclass(frozen=True)
class Soaked:
    """Samples: of the idle worker before and after, and of the busy one in between."""

    before: Sample
    busy: Sequence[Sample]
    after: Sample
    jobs: int

    def growth(self, since: int = 0) -> float:
        """How much larger the last fifth's median of memory is than that of fifth `since`, as a share."""
        fifth = max(1, len(self.busy) // 5)
        first, last = self.busy[since * fifth : (since + 1) * fifth], self.busy[-fifth:]
        return _median_mb(last) / _median_mb(first) - 1

    def faults(self) -> list[str]:
        """What is not flat."""
        faults = []
        if self.growth() > GROWTH_ALLOWED:
            faults.append(f"memory grew by {self.growth():.1%} (allowed: {GROWTH_ALLOWED:.0%})")
        if self.jobs >= FULL_AFTER_JOBS and self.growth(since=2) > LATE_GROWTH_ALLOWED:
            faults.append(f"memory still grew, by {self.growth(since=2):.1%}, in the second half")
        if self.after.files > self.before.files + FILES_ALLOWED:
            faults.append(f"{self.after.files - self.before.files} more open files than before")
        if self.after.tasks > self.before.tasks:
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
        verdict = "; ".join(self.faults()) or "flat"
        return f"{report.table('What the worker held', rows)}\n\nVerdict: {verdict}"


def milder(options: Options) -> Options:
    """One worker, and faults that it has to live with."""
    return replace(options, workers=1, faults=plan.MILD, every_s=max(options.every_s, 12.0))


async def run(stack: Stack, folder: Path, options: Options, tell: Callable[[str], None]) -> tuple[str, bool]:
    """Run it; returns the report, and whether all is well."""
    watch = _Watch(tell, min(WARM_UP_S, options.seconds / 5), min(SAMPLE_S, options.seconds / 50))
    ended = await run_chaos(stack, folder, options, tell, watch)
    soaked = watch.soaked(len(ended.records.asked))
    return f"{ended}\n\n{soaked}", ended.verdict.is_good and not soaked.faults()


class _Watch(Watch):
    """Takes samples of the only worker."""

    def __init__(self, tell: Callable[[str], None], warm_up_s: float, every_s: float) -> None:
        self._tell = tell
        self._warm_up_s = warm_up_s
        self._every_s = every_s
        self._samples: list[Sample] = []
        self._ends: list[Sample] = []

    @contextlib.asynccontextmanager
    async def around(self, scene: Scene) -> AsyncIterator[None]:
        worker = scene.places[0].life.worker
        self._ends.append(await _idle_sample(worker, SETTLE_S))
        sampling = asyncio.create_task(self._take_samples(worker))
        try:
            yield
        finally:
            sampling.cancel()
        self._tell("  looking at the idle worker")
        self._ends.append(await _idle_sample(worker, IDLE_S))

    def soaked(self, jobs: int) -> Soaked:
        """All samples, when it is over."""
        before, after = self._ends
        return Soaked(before, self._samples, after, jobs)

    async def _take_samples(self, worker: Worker) -> None:
        await asyncio.sleep(self._warm_up_s)
        while True:
            taken = await asyncio.to_thread(sample, worker)
            self._samples.append(taken)
            self._tell(f"  {taken.memory_mb:.1f} MB, {taken.files} open files, {taken.tasks} tasks")
            await asyncio.sleep(self._every_s)


async def _idle_sample(worker: Worker, after_s: float) -> Sample:
    await asyncio.sleep(after_s)
    return await asyncio.to_thread(sample, worker)


def sample(worker: Worker) -> Sample:
    """What this worker holds now."""
    assert worker.process is not None
    folder = Path("/proc") / str(worker.process.pid)
    (line,) = [it for it in (folder / "status").read_text().splitlines() if it.startswith("VmRSS:")]
    tasks = int(worker.metric("python_asyncio_tasks"))
    return Sample(time.time(), int(line.split()[1]) * 1024 / 1e6, len(list((folder / "fd").iterdir())), tasks)


def _median_mb(samples: Sequence[Sample]) -> float:
    return statistics.median(it.memory_mb for it in samples)
