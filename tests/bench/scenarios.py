"""What is measured, one function a scenario; each adds its figures to the notebook."""

import asyncio
import statistics
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tests.bench import machine
from tests.bench.contenders import WORKER, Contender
from tests.bench.figures import Notebook
from tests.bench.load import Batch
from tests.bench.pictures import Picture
from tests.bench.running import Bench, Running, Setup, elapsed_since_start_s

KB: Final = 1000
MB: Final = 1000 * KB
BROKER_ALONE: Final = "RabbitMQ alone"

# More objects than jobs are ever in flight, so that none is in flight twice.
_SPARE_PICTURES: Final = 16
# A plain worker holds the base64 text and the request's JSON, and for a moment more: up to 41 MB for 10 MB.
_PLAIN_COPIES: Final = 4.5
# Pictures of other cases are there already, and RabbitMQ and the system need some room too.
_DISK_COPIES: Final = 2
_LEAST_WARM_UP: Final = 16
_WARM_UP_SIZE: Final = 10 * KB
_WARM_UP_BATCH: Final = 600
# A worker whose limit grows too slowly is measured as far as it got; the report says how far that was.
_MOST_WARM_UP_BATCHES: Final = 12
_WARM_UP_LATENCY_S: Final = 0.02
# The more there is, the longer it takes until all of it has arrived: beyond this the model thinks longer.
_BYTES_IN_TIME: Final = 1000 * MB
_SETTLED_S: Final = 1.5
_LATENCY_S: Final = 0.1
_IN_FLIGHT_FOR_LATENCY: Final = 256
_JOBS_AT_MOST: Final = 1500


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    contenders: Sequence[Contender]
    rounds: int
    cpu_jobs: dict[int, int]
    """By the picture's size: jobs in one measurement."""
    memory: Sequence[tuple[int, int]]
    """Pairs of picture size and jobs in flight."""
    memory_for_worker_only: Sequence[tuple[int, int]] = ()
    thinking_s: float = 15.0
    starts: int = 3
    load_s: float = 15.0
    loads: Sequence[float] = (0.1, 0.25, 0.5, 0.75, 0.9)
    flat_jobs: int = 2000
    deep_queue: int = 1_000_000

    def only(self, *names: str) -> list[Contender]:
        """Those of the contenders that have these names."""
        return [it for it in self.contenders if it.name in names]


Scenario = Callable[[Bench, Plan, Notebook], Coroutine[Any, Any, None]]


async def cpu(bench: Bench, plan: Plan, notebook: Notebook) -> None:
    """CPU per job by the picture's size, plain HTTP."""
    for number in range(plan.rounds):
        for contender in plan.contenders:
            async with bench.running(contender, Setup()) as running:
                for size, count in plan.cpu_jobs.items():
                    figures = await _cpu_of(bench, running, _pictures(bench, size), count)
                    notebook.add("cpu", contender.name, shown_size(size), number, figures)


async def tls(bench: Bench, plan: Plan, notebook: Notebook) -> None:
    """CPU per job with TLS to S3 and to the API."""
    for number in range(plan.rounds):
        for contender in plan.contenders:
            async with bench.running(contender, Setup(tls=True)) as running:
                for size in (100 * KB, 10 * MB):
                    count = plan.cpu_jobs[size] * 2 // 3
                    figures = await _cpu_of(bench, running, _pictures(bench, size), count)
                    notebook.add("tls", contender.name, shown_size(size), number, figures)


async def standin(bench: Bench, plan: Plan, notebook: Notebook) -> None:
    """Whether the simulator's speed shows in the contenders' figures: the CPU per job when it is slower."""
    for number in range(plan.rounds):
        for contender in plan.only(WORKER, "aio-pika"):
            async with bench.running(contender, Setup()) as running:
                for size in (100 * KB, 10 * MB):
                    bench.standin.set_latency(0.05)
                    count = plan.cpu_jobs[size] * 2 // 3
                    figures = await _cpu_of(bench, running, _pictures(bench, size), count)
                    notebook.add("standin", contender.name, shown_size(size), number, figures)


async def memory(bench: Bench, plan: Plan, notebook: Notebook) -> None:
    """Peak memory while so many jobs wait for the model."""
    cases = [(it, plan.contenders) for it in plan.memory]
    cases += [(it, plan.only(WORKER)) for it in plan.memory_for_worker_only]
    for (size, in_flight), contenders in cases:
        for contender in contenders:
            if in_flight <= contender.most_in_flight:
                case = f"{in_flight} × {shown_size(size)}"
                if _fits(contender, case, in_flight * size / MB, notebook):
                    figures = await _memory_of(bench, contender, size, in_flight, plan.thinking_s)
                    notebook.add("memory", contender.name, case, 0, figures)


async def link(bench: Bench, plan: Plan, notebook: Notebook) -> None:
    """CPU per job when the API gets presigned links."""
    for number in range(plan.rounds):
        for contender in plan.contenders:
            if contender.takes_links:
                async with bench.running(contender, Setup(as_link=True)) as running:
                    count = plan.cpu_jobs[100 * KB] * 2
                    figures = await _cpu_of(bench, running, _pictures(bench, 100 * KB), count)
                    notebook.add("link", contender.name, "link", number, figures)


async def start(bench: Bench, plan: Plan, notebook: Notebook) -> None:
    """From the process's start to the first answer of a job that waits."""
    pictures = _pictures(bench, 100 * KB)
    for number in range(plan.starts):
        for contender in plan.contenders:
            async with bench.prepared(contender, Setup()) as running:
                waiting = running.batch(pictures, 1)
                await running.load.publish(waiting, range(1))
                running.launch()
                await running.load.wait_for(waiting, 1)
                took_s, cpu_s = elapsed_since_start_s(running.pid), running.cpu_s()
                await asyncio.sleep(_SETTLED_S)
                figures = {"seconds": took_s, "cpu_s": cpu_s, "idle_mb": machine.resident_mb(running.pid)}
                notebook.add("start", contender.name, "start", number, figures)


async def latency(bench: Bench, plan: Plan, notebook: Notebook) -> None:
    """Time added to the API's own, at half of what each contender manages, and against load."""
    for number in range(plan.rounds):
        for contender in plan.only(WORKER, "aio-pika", "FastStream"):
            loads = plan.loads if number == 0 and contender.name != "FastStream" else (0.5,)
            async with bench.running(contender, Setup(concurrency=_IN_FLIGHT_FOR_LATENCY)) as running:
                most_per_s = await _most_per_s(bench, running)
                for load in loads:
                    figures = await _added_ms(bench, running, most_per_s * load, plan.load_s)
                    figures["most_per_s"] = most_per_s
                    notebook.add("latency", contender.name, f"{load:.0%}", number, figures)
                if contender.name == WORKER:
                    figures = await _broker_ms(bench, running, most_per_s / 2, plan.load_s / 2)
                    notebook.add("latency", BROKER_ALONE, "50%", number, figures)


async def flat(bench: Bench, plan: Plan, notebook: Notebook) -> None:
    """Whether the worker's CPU per job depends on how many are in flight, or on how many wait."""
    for number in range(plan.rounds):
        for contender in plan.only(WORKER):
            for in_flight in (64, 400):
                figures = await _cpu_in_flight(bench, contender, in_flight, plan.flat_jobs)
                notebook.add("flat", contender.name, f"{in_flight} in flight", number, figures)
            figures = await _cpu_with_waiting(bench, contender, 10, plan.flat_jobs)
            notebook.add("flat", contender.name, "10 waiting", number, figures)
            if number == 0:
                figures = await _cpu_with_waiting(bench, contender, plan.deep_queue, plan.flat_jobs)
                notebook.add("flat", contender.name, f"{plan.deep_queue:,} waiting", number, figures)


SCENARIOS: Final[dict[str, Scenario]] = {
    it.__name__: it for it in (cpu, tls, standin, link, start, memory, latency, flat)
}


def shown_size(size: int) -> str:
    """A size as tables name it."""
    return f"{size // MB} MB" if size >= MB else f"{size // KB} KB"


async def _cpu_of(
    bench: Bench, running: Running, pictures: Sequence[Picture], count: int
) -> dict[str, float]:
    """CPU per job between the end of a warm-up and the last result."""
    await running.load.all_of(running.batch(pictures, max(_LEAST_WARM_UP, count // 4)))
    return await _measured(bench, running, running.batch(pictures, count), running.load.all_of)


async def _measured(
    bench: Bench, running: Running, batch: Batch, send: Callable[[Batch], Awaitable[float]]
) -> dict[str, float]:
    bench.standin.look()
    core_before_s, before_s = machine.busy_s(bench.cores.contender), running.cpu_s()
    took_s = await send(batch)
    cpu_s = running.cpu_s() - before_s
    others_s = machine.busy_s(bench.cores.contender) - core_before_s - cpu_s
    seen = bench.standin.look()
    return {
        "cpu_ms": cpu_s / batch.count * 1000,
        "jobs_per_s": batch.count / took_s,
        "busy": cpu_s / took_s,
        "others": max(0.0, others_s / took_s),
        "standin_ms": seen["cpu_s"] / batch.count * 1000,
        "concurrent": seen["max_concurrent"],
    }


def _fits(contender: Contender, case: str, pictures_mb: float, notebook: Notebook) -> bool:
    if pictures_mb * _DISK_COPIES > (disk_mb := machine.free_disk_mb()):
        notebook.remark(
            f"Memory at {case} was left out: its pictures do not fit into {disk_mb:.0f} MB of disk."
        )
        return False
    needed_gb, free_gb = pictures_mb * _PLAIN_COPIES / 1000, machine.free_memory_mb() / 1000
    if contender.name == WORKER or needed_gb < free_gb:
        return True
    notebook.remark(
        f"{contender.name} was left out of the memory at {case}: it would need about {needed_gb:.0f} GB, "
        f"and {free_gb:.0f} GB were free."
    )
    return False


async def _memory_of(
    bench: Bench, contender: Contender, size: int, in_flight: int, thinking_s: float
) -> dict[str, float]:
    pictures = _pictures(bench, size, in_flight)
    async with bench.running(contender, Setup(concurrency=in_flight)) as running:
        await _reach(bench, running, contender, in_flight)
        bench.standin.set_latency(thinking_s * max(1.0, in_flight * size / _BYTES_IN_TIME))
        bench.standin.look()
        before_mb = machine.peak_mb(running.pid)
        await running.load.all_of(running.batch(pictures, in_flight))
        return {
            "peak_mb": machine.peak_mb(running.pid),
            "before_mb": before_mb,
            "concurrent": bench.standin.look()["max_concurrent"],
        }


async def _reach(bench: Bench, running: Running, contender: Contender, in_flight: int) -> None:
    """Let a worker that feels its way learn by fast answers that so many calls at once are fine."""
    pictures = _pictures(bench, _WARM_UP_SIZE, in_flight)
    bench.standin.set_latency(_WARM_UP_LATENCY_S)
    if contender.name != WORKER:
        await running.load.all_of(running.batch(pictures, in_flight))
        return
    for _ in range(_MOST_WARM_UP_BATCHES):
        await running.load.all_of(running.batch(pictures, max(_WARM_UP_BATCH, 3 * in_flight)))
        if (running.concurrency_limit() or in_flight) >= in_flight:
            return


async def _most_per_s(bench: Bench, running: Running) -> float:
    """Jobs a second when there is always one more."""
    pictures = _pictures(bench, 100 * KB, _IN_FLIGHT_FOR_LATENCY)
    bench.standin.set_latency(_LATENCY_S)
    rates = [
        _JOBS_AT_MOST / await running.load.all_of(running.batch(pictures, _JOBS_AT_MOST)) for _ in range(3)
    ]
    # The first one is a warm-up.
    return max(rates[1:])


async def _added_ms(bench: Bench, running: Running, jobs_per_s: float, seconds: float) -> dict[str, float]:
    pictures = _pictures(bench, 100 * KB, _IN_FLIGHT_FOR_LATENCY)
    batch = running.batch(pictures, max(100, int(jobs_per_s * seconds)))
    rate = await running.load.at_rate(batch, jobs_per_s)
    # The first second is for connections to be opened in.
    added = [(took_s - _LATENCY_S) * 1000 for number, took_s in batch.took_s.items() if number >= jobs_per_s]
    return {"jobs_per_s": rate} | _percentiles(added)


async def _broker_ms(bench: Bench, running: Running, jobs_per_s: float, seconds: float) -> dict[str, float]:
    """What the way through one queue takes, without any contender."""
    batch = running.batch(_pictures(bench, 100 * KB), max(100, int(jobs_per_s * seconds)))
    rate = await running.load.at_rate(batch, jobs_per_s, past_contender=True)
    return {"jobs_per_s": rate} | _percentiles([took_s * 1000 for took_s in batch.took_s.values()])


def _percentiles(values: list[float]) -> dict[str, float]:
    hundredths = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": hundredths[49], "p95": hundredths[94], "p99": hundredths[98]}


async def _cpu_in_flight(bench: Bench, contender: Contender, in_flight: int, count: int) -> dict[str, float]:
    pictures = _pictures(bench, 100 * KB, in_flight)
    async with bench.running(contender, Setup(concurrency=in_flight)) as running:
        await _reach(bench, running, contender, in_flight)
        # The same jobs a second in both cases, were the worker not in the way.
        bench.standin.set_latency(in_flight / 640)
        return await _cpu_of(bench, running, pictures, count)


async def _cpu_with_waiting(bench: Bench, contender: Contender, waiting: int, count: int) -> dict[str, float]:
    setup = Setup()
    pictures = _pictures(bench, 100 * KB)
    async with bench.prepared(contender, setup) as running:
        if waiting < count:
            running.launch()
            await running.load.all_of(running.batch(pictures, count // 3))
            outstanding = setup.concurrency + waiting
            return await _measured(
                bench,
                running,
                running.batch(pictures, count),
                lambda it: running.load.keeping(it, outstanding),
            )
        # Those behind the measured ones are deleted with their queue.
        all_of_them = running.batch(pictures, waiting + count + count // 3)
        # The contender's core is idle as yet.
        with machine.pinned(bench.cores.contender):
            await running.load.publish(all_of_them, range(all_of_them.count))
        running.launch()
        await running.load.wait_for(all_of_them, count // 3)
        return await _measured_part(bench, running, all_of_them, count)


async def _measured_part(bench: Bench, running: Running, batch: Batch, count: int) -> dict[str, float]:
    async def next_ones(part: Batch) -> float:
        began = asyncio.get_running_loop().time()
        await running.load.wait_for(batch, batch.answered + part.count)
        return asyncio.get_running_loop().time() - began

    return await _measured(bench, running, Batch("part", batch.pictures, count), next_ones)


def _pictures(bench: Bench, size: int, in_flight: int = 64) -> Sequence[Picture]:
    return bench.gallery.of(size, in_flight + _SPARE_PICTURES)
