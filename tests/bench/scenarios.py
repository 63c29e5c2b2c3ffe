"""The scenarios; each adds its measurements to the results."""

import asyncio
import statistics
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tests.bench import machine
from tests.bench.contenders import WORKER, Contender
from tests.bench.images import Image
from tests.bench.load import Batch
from tests.bench.results import Results
from tests.bench.servers import Bench, ContenderProcess, Setup, elapsed_since_start_s

KB: Final = 1000
MB: Final = 1000 * KB
BROKER_ALONE: Final = "RabbitMQ alone"

# More images than jobs in flight, so that no image is in flight twice.
_SPARE_IMAGES: Final = 16
# A peer holds the base64 text and the request's JSON: up to 41 MB for an image of 10 MB.
_PEER_COPIES: Final = 4.5
# Images of other cases, RabbitMQ and the system use disk space as well.
_DISK_COPIES: Final = 2
_MIN_WARM_UP: Final = 16
_WARM_UP_SIZE: Final = 10 * KB
_WARM_UP_BATCH: Final = 600
# If the concurrency limit grows too slowly, measure at the limit reached; the report shows it.
_MAX_WARM_UP_BATCHES: Final = 12
_WARM_UP_LATENCY_S: Final = 0.02
# With more image bytes in flight, the latency is increased proportionally.
_LATENCY_BYTES: Final = 1000 * MB
_SETTLED_S: Final = 1.5
_LATENCY_S: Final = 0.1
_IN_FLIGHT_FOR_LATENCY: Final = 256
_THROUGHPUT_JOBS: Final = 1500


@dataclass(frozen=True)
class Plan:
    """The extent of the measurements."""

    contenders: Sequence[Contender]
    rounds: int
    cpu_jobs: dict[int, int]
    """Jobs per measurement, by image size."""
    memory: Sequence[tuple[int, int]]
    """Pairs of image size and jobs in flight."""
    memory_for_worker_only: Sequence[tuple[int, int]] = ()
    latency_s: float = 15.0
    starts: int = 3
    load_s: float = 15.0
    loads: Sequence[float] = (0.1, 0.25, 0.5, 0.75, 0.9)
    flat_jobs: int = 2000
    deep_queue: int = 1_000_000

    def only(self, *names: str) -> list[Contender]:
        """Return the contenders with these names."""
        return [it for it in self.contenders if it.name in names]


Scenario = Callable[[Bench, Plan, Results], Coroutine[Any, Any, None]]


async def cpu(bench: Bench, plan: Plan, results: Results) -> None:
    """Measure CPU per job by image size, plain HTTP."""
    for number in range(plan.rounds):
        for contender in plan.contenders:
            async with bench.launched(contender, Setup()) as process:
                for size, count in plan.cpu_jobs.items():
                    figures = await _cpu_of(bench, process, _images(bench, size), count)
                    results.add("cpu", contender.name, shown_size(size), number, figures)


async def tls(bench: Bench, plan: Plan, results: Results) -> None:
    """Measure CPU per job with TLS to S3 and the model API."""
    for number in range(plan.rounds):
        for contender in plan.contenders:
            async with bench.launched(contender, Setup(tls=True)) as process:
                for size in (100 * KB, 10 * MB):
                    count = plan.cpu_jobs[size] * 2 // 3
                    figures = await _cpu_of(bench, process, _images(bench, size), count)
                    results.add("tls", contender.name, shown_size(size), number, figures)


async def simulator(bench: Bench, plan: Plan, results: Results) -> None:
    """Measure CPU per job with a slower model API: the simulator must not be a bottleneck."""
    for number in range(plan.rounds):
        for contender in plan.only(WORKER, "aio-pika"):
            async with bench.launched(contender, Setup()) as process:
                for size in (100 * KB, 10 * MB):
                    bench.simulator.set_latency(0.05)
                    count = plan.cpu_jobs[size] * 2 // 3
                    figures = await _cpu_of(bench, process, _images(bench, size), count)
                    results.add("simulator", contender.name, shown_size(size), number, figures)


async def memory(bench: Bench, plan: Plan, results: Results) -> None:
    """Measure peak memory with concurrent model requests."""
    cases = [(it, plan.contenders) for it in plan.memory]
    cases += [(it, plan.only(WORKER)) for it in plan.memory_for_worker_only]
    for (size, in_flight), contenders in cases:
        for contender in contenders:
            if in_flight <= contender.max_in_flight:
                case = f"{in_flight} × {shown_size(size)}"
                if _fits(contender, case, in_flight * size / MB, results):
                    figures = await _memory_of(bench, contender, size, in_flight, plan.latency_s)
                    results.add("memory", contender.name, case, 0, figures)


async def link(bench: Bench, plan: Plan, results: Results) -> None:
    """Measure CPU per job with presigned links."""
    for number in range(plan.rounds):
        for contender in plan.contenders:
            if contender.takes_links:
                async with bench.launched(contender, Setup(as_link=True)) as process:
                    count = plan.cpu_jobs[100 * KB] * 2
                    figures = await _cpu_of(bench, process, _images(bench, 100 * KB), count)
                    results.add("link", contender.name, "link", number, figures)


async def start(bench: Bench, plan: Plan, results: Results) -> None:
    """Measure the time from the process start to the first answer."""
    images = _images(bench, 100 * KB)
    for number in range(plan.starts):
        for contender in plan.contenders:
            async with bench.prepared(contender, Setup()) as process:
                waiting = process.batch(images, 1)
                await process.load.publish(waiting, range(1))
                process.launch()
                await process.load.wait_for(waiting, 1)
                took_s, cpu_s = elapsed_since_start_s(process.pid), process.cpu_s()
                await asyncio.sleep(_SETTLED_S)
                figures = {"seconds": took_s, "cpu_s": cpu_s, "idle_mb": machine.resident_mb(process.pid)}
                results.add("start", contender.name, "start", number, figures)


async def latency(bench: Bench, plan: Plan, results: Results) -> None:
    """Measure the latency added to the model API's, by load."""
    for number in range(plan.rounds):
        for contender in plan.only(WORKER, "aio-pika", "FastStream"):
            loads = plan.loads if number == 0 and contender.name != "FastStream" else (0.5,)
            async with bench.launched(contender, Setup(concurrency=_IN_FLIGHT_FOR_LATENCY)) as process:
                max_jobs_per_s = await _max_jobs_per_s(bench, process)
                for load in loads:
                    figures = await _added_ms(bench, process, max_jobs_per_s * load, plan.load_s)
                    figures["max_jobs_per_s"] = max_jobs_per_s
                    results.add("latency", contender.name, f"{load:.0%}", number, figures)
                if contender.name == WORKER:
                    figures = await _broker_ms(bench, process, max_jobs_per_s / 2, plan.load_s / 2)
                    results.add("latency", BROKER_ALONE, "50%", number, figures)


async def flat(bench: Bench, plan: Plan, results: Results) -> None:
    """Measure the worker's CPU per job by jobs in flight and queue depth."""
    for number in range(plan.rounds):
        for contender in plan.only(WORKER):
            for in_flight in (64, 400):
                figures = await _cpu_in_flight(bench, contender, in_flight, plan.flat_jobs)
                results.add("flat", contender.name, f"{in_flight} in flight", number, figures)
            figures = await _cpu_with_backlog(bench, contender, 10, plan.flat_jobs)
            results.add("flat", contender.name, "10 waiting", number, figures)
            if number == 0:
                figures = await _cpu_with_backlog(bench, contender, plan.deep_queue, plan.flat_jobs)
                results.add("flat", contender.name, f"{plan.deep_queue:,} waiting", number, figures)


SCENARIOS: Final[dict[str, Scenario]] = {
    it.__name__: it for it in (cpu, tls, simulator, link, start, memory, latency, flat)
}


def shown_size(size: int) -> str:
    """Format a size."""
    return f"{size // MB} MB" if size >= MB else f"{size // KB} KB"


async def _cpu_of(
    bench: Bench, process: ContenderProcess, images: Sequence[Image], count: int
) -> dict[str, float]:
    """Measure CPU per job from the end of a warm-up to the last result."""
    await process.load.publish_all(process.batch(images, max(_MIN_WARM_UP, count // 4)))
    return await _measured(bench, process, process.batch(images, count), process.load.publish_all)


async def _measured(
    bench: Bench, process: ContenderProcess, batch: Batch, send: Callable[[Batch], Awaitable[float]]
) -> dict[str, float]:
    bench.simulator.counters()
    core_before_s, before_s = machine.busy_s(bench.cores.contender), process.cpu_s()
    took_s = await send(batch)
    cpu_s = process.cpu_s() - before_s
    others_s = machine.busy_s(bench.cores.contender) - core_before_s - cpu_s
    counters = bench.simulator.counters()
    return {
        "cpu_ms": cpu_s / batch.count * 1000,
        "jobs_per_s": batch.count / took_s,
        "busy": cpu_s / took_s,
        "others": max(0.0, others_s / took_s),
        "simulator_ms": counters["cpu_s"] / batch.count * 1000,
        "concurrent": counters["max_concurrent"],
    }


def _fits(contender: Contender, case: str, images_mb: float, results: Results) -> bool:
    if images_mb * _DISK_COPIES > (disk_mb := machine.free_disk_mb()):
        results.remark(f"Memory at {case} was omitted: the images do not fit into {disk_mb:.0f} MB of disk.")
        return False
    needed_gb, free_gb = images_mb * _PEER_COPIES / 1000, machine.free_memory_mb() / 1000
    if contender.name == WORKER or needed_gb < free_gb:
        return True
    results.remark(
        f"Memory of {contender.name} at {case} was omitted: it requires about {needed_gb:.0f} GB, "
        f"and {free_gb:.0f} GB were free."
    )
    return False


async def _memory_of(
    bench: Bench, contender: Contender, size: int, in_flight: int, latency_s: float
) -> dict[str, float]:
    images = _images(bench, size, in_flight)
    async with bench.launched(contender, Setup(concurrency=in_flight)) as process:
        await _warm_up(bench, process, contender, in_flight)
        bench.simulator.set_latency(latency_s * max(1.0, in_flight * size / _LATENCY_BYTES))
        bench.simulator.counters()
        before_mb = machine.peak_mb(process.pid)
        await process.load.publish_all(process.batch(images, in_flight))
        return {
            "peak_mb": machine.peak_mb(process.pid),
            "before_mb": before_mb,
            "concurrent": bench.simulator.counters()["max_concurrent"],
        }


async def _warm_up(bench: Bench, process: ContenderProcess, contender: Contender, in_flight: int) -> None:
    """Raise the worker's adaptive concurrency limit by fast answers."""
    images = _images(bench, _WARM_UP_SIZE, in_flight)
    bench.simulator.set_latency(_WARM_UP_LATENCY_S)
    if contender.name != WORKER:
        await process.load.publish_all(process.batch(images, in_flight))
        return
    for _ in range(_MAX_WARM_UP_BATCHES):
        await process.load.publish_all(process.batch(images, max(_WARM_UP_BATCH, 3 * in_flight)))
        if (process.concurrency_limit() or in_flight) >= in_flight:
            return


async def _max_jobs_per_s(bench: Bench, process: ContenderProcess) -> float:
    """Return the maximum throughput in jobs per second."""
    images = _images(bench, 100 * KB, _IN_FLIGHT_FOR_LATENCY)
    bench.simulator.set_latency(_LATENCY_S)
    rates = [
        _THROUGHPUT_JOBS / await process.load.publish_all(process.batch(images, _THROUGHPUT_JOBS))
        for _ in range(3)
    ]
    # The first run is a warm-up.
    return max(rates[1:])


async def _added_ms(
    bench: Bench, process: ContenderProcess, jobs_per_s: float, seconds: float
) -> dict[str, float]:
    images = _images(bench, 100 * KB, _IN_FLIGHT_FOR_LATENCY)
    batch = process.batch(images, max(100, int(jobs_per_s * seconds)))
    rate = await process.load.publish_at_rate(batch, jobs_per_s)
    # Skip the first second, in which connections are opened.
    added = [(took_s - _LATENCY_S) * 1000 for number, took_s in batch.took_s.items() if number >= jobs_per_s]
    return {"jobs_per_s": rate} | _percentiles(added)


async def _broker_ms(
    bench: Bench, process: ContenderProcess, jobs_per_s: float, seconds: float
) -> dict[str, float]:
    """Measure the latency of one queue, without a contender."""
    batch = process.batch(_images(bench, 100 * KB), max(100, int(jobs_per_s * seconds)))
    rate = await process.load.publish_at_rate(batch, jobs_per_s, broker_only=True)
    return {"jobs_per_s": rate} | _percentiles([took_s * 1000 for took_s in batch.took_s.values()])


def _percentiles(values: list[float]) -> dict[str, float]:
    hundredths = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": hundredths[49], "p95": hundredths[94], "p99": hundredths[98]}


async def _cpu_in_flight(bench: Bench, contender: Contender, in_flight: int, count: int) -> dict[str, float]:
    images = _images(bench, 100 * KB, in_flight)
    async with bench.launched(contender, Setup(concurrency=in_flight)) as process:
        await _warm_up(bench, process, contender, in_flight)
        # The same throughput in both cases if the worker is not the bottleneck.
        bench.simulator.set_latency(in_flight / 640)
        return await _cpu_of(bench, process, images, count)


async def _cpu_with_backlog(bench: Bench, contender: Contender, waiting: int, count: int) -> dict[str, float]:
    setup = Setup()
    images = _images(bench, 100 * KB)
    async with bench.prepared(contender, setup) as process:
        if waiting < count:
            process.launch()
            await process.load.publish_all(process.batch(images, count // 3))
            outstanding = setup.concurrency + waiting
            return await _measured(
                bench,
                process,
                process.batch(images, count),
                lambda it: process.load.with_outstanding(it, outstanding),
            )
        # The jobs after the measured ones are deleted with the queue.
        all_of_them = process.batch(images, waiting + count + count // 3)
        # The contender's core is still idle.
        with machine.pinned(bench.cores.contender):
            await process.load.publish(all_of_them, range(all_of_them.count))
        process.launch()
        await process.load.wait_for(all_of_them, count // 3)
        return await _measured_part(bench, process, all_of_them, count)


async def _measured_part(
    bench: Bench, process: ContenderProcess, batch: Batch, count: int
) -> dict[str, float]:
    async def next_ones(part: Batch) -> float:
        started = asyncio.get_running_loop().time()
        await process.load.wait_for(batch, batch.answered + part.count)
        return asyncio.get_running_loop().time() - started

    return await _measured(bench, process, Batch("part", batch.images, count), next_ones)


def _images(bench: Bench, size: int, in_flight: int = 64) -> Sequence[Image]:
    return bench.images.of(size, in_flight + _SPARE_IMAGES)
