"""Measure one worker with a mix of phone photos: real RabbitMQ and S3, a simulated model API."""

import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from isal import isal_zlib
from prometheus_client.parser import text_string_to_metric_families

from tests.bench import contenders, machine
from tests.bench.contenders import ROOT, Contender, Environment, RunConfig
from tests.bench.conversion.processes import WorkerConversion, cpu_s
from tests.bench.conversion.report import IDLE
from tests.bench.conversion.sources import EDGE, MP_12, MP_50, Recipe, Source, heic, jpeg
from tests.bench.images import Image
from tests.bench.load import Batch
from tests.bench.results import Results
from tests.bench.servers import Bench, ContenderProcess, Setup
from tests.bench.simulator import describe_image
from worker.images.encoding import encode

PROCESSES = 2
OUTSTANDING = 16
PHOTOS = "phone photos"
SCALED = f"phone photos, edge {EDGE}"
UNCHANGED = "JPEGs sent unchanged"
# Of ten jobs.
MIX: tuple[tuple[int, str], ...] = ((3, "HEIC"), (3, "JPEG on its side"), (1, "50 MP"), (3, "unchanged"))

_LYING = partial(jpeg, on_its_side=True)
_RECIPES: Mapping[str, Recipe] = {
    "HEIC": Recipe("HEIC", "image/heic", heic, MP_12),
    "JPEG on its side": Recipe("JPEG on its side", "image/jpeg", _LYING, MP_12),
    "50 MP": Recipe("50 MP", "image/jpeg", _LYING, MP_50),
    "unchanged": Recipe("unchanged", "image/jpeg", jpeg, MP_12),
}
_IDLE_S = 5.0
# They take less time.
_UNCHANGED_PER_PHOTO = 10
_MB = 1e6


@dataclass(frozen=True)
class Case:
    """A kind of load: how many of ten images are of which kind, and the worker's settings."""

    name: str
    mix: tuple[tuple[int, str], ...]
    settings: Mapping[str, str]


CASES = (
    Case(UNCHANGED, ((1, "unchanged"),), {}),
    Case(PHOTOS, MIX, {}),
    Case(SCALED, MIX, {"VQA_IMAGE_MAX_EDGE": str(EDGE)}),
)


async def measure(bench: Bench, results: Results, *, rounds: int, jobs: int) -> None:
    """Measure all cases in turn; compare every answer with the checksum of what must be sent."""
    sources = {name: recipe.source() for name, recipe in _RECIPES.items()}
    images = {case.name: await _images(bench, case, sources) for case in CASES}
    for name, source in sources.items():
        results.about[f"size of {name}"] = f"{len(source.content) / _MB:.1f}"
    for number in range(rounds):
        for case in CASES:
            contender, ports = _worker(case.settings)
            async with bench.launched(contender, Setup(concurrency=OUTSTANDING)) as process:
                # Starts the processes, which load their libraries.
                warm_up = process.batch(images[case.name], 2 * len(images[case.name]) // 3)
                await process.load.with_outstanding(warm_up, OUTSTANDING)
                if case.name == UNCHANGED:
                    results.add("mix", IDLE, "", number, await _idle(process, ports[-1]))
                count = jobs if case.mix == MIX else jobs * _UNCHANGED_PER_PHOTO
                batches = [process.batch(images[case.name], count) for _ in range(2)]
                figures = await _work(process, batches[0]) | await _lag_during(process, batches[1], ports[-1])
                results.add("mix", case.name, "", number, figures)


def _worker(settings: Mapping[str, str]) -> tuple[Contender, list[int]]:
    """Return this project's worker, and the list to which the port of its endpoints is added."""
    worker, ports = contenders.worker(), list[int]()

    def environment(run: RunConfig) -> Environment:
        ports.append(run.http_port)
        # The processes that convert images start in any folder.
        own = {"PYTHONPATH": str(ROOT), "VQA_IMAGE_PROCESSES": str(PROCESSES)}
        return {**worker.environment(run), **own, **settings}

    return replace(worker, environment=environment), ports


async def _work(process: ContenderProcess, batch: Batch) -> dict[str, float]:
    """Measure CPU, memory and throughput."""
    children = machine.descendants(process.pid)
    before = {pid: cpu_s(pid) for pid in (process.pid, *children)}
    with _others() as others:
        took_s = await process.load.with_outstanding(batch, OUTSTANDING)
    spent = {pid: cpu_s(pid) - was for pid, was in before.items()}
    own = spent.pop(process.pid)
    if machine.descendants(process.pid) != children:
        raise AssertionError("a process that converts images was replaced during the measurement")
    return {
        "jobs_per_s": batch.count / took_s,
        "worker_ms": own / batch.count * 1000,
        "children_ms": sum(spent.values()) / batch.count * 1000,
        "worker_mb": machine.own_peak_mb(process.pid),
        "children_mb": sum(map(machine.own_peak_mb, children)),
        "children": float(len(children)),
        "others_working": others[0],
    }


async def _lag_during(process: ContenderProcess, batch: Batch, port: int) -> dict[str, float]:
    """Measure the lag in a separate run: the polls use CPU time too."""
    slow_before = _slow_timers(port)
    with _others() as others, _probe(port) as latencies:
        await process.load.with_outstanding(batch, OUTSTANDING)
    return {
        **_lag(latencies),
        "polls": float(len(latencies)),
        "slow_timers": _slow_timers(port) - slow_before,
        "others": others[0],
    }


async def _idle(process: ContenderProcess, port: int) -> dict[str, float]:
    with _others() as others, _probe(port) as latencies:
        await asyncio.sleep(_IDLE_S)
    return {
        **_lag(latencies),
        "polls": float(len(latencies)),
        "idle_mb": machine.resident_mb(process.pid),
        "others": others[0],
    }


def _lag(latencies: Sequence[float]) -> dict[str, float]:
    hundredths = statistics.quantiles(latencies, n=100, method="inclusive")
    return {
        "lag_p50_ms": hundredths[49],
        "lag_p99_ms": hundredths[98],
        "lag_max_ms": max(latencies),
        "over_50_ms": sum(it > 50 for it in latencies) / len(latencies),
    }


@contextlib.contextmanager
def _probe(port: int) -> Iterator[list[float]]:
    """Poll `/livez` in the context, from another process; the list has the latencies in ms afterwards."""
    latencies: list[float] = []
    command = [sys.executable, "-m", "tests.bench.conversion.probe", str(port)]
    with subprocess.Popen(  # noqa: S603 - the command above
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as probe:
        yield latencies
        latencies += json.loads(probe.communicate()[0])


@contextlib.contextmanager
def _others() -> Iterator[list[float]]:
    """Measure which part of all CPUs other programs use in the context; the list has it afterwards."""
    cores, part = frozenset(os.sched_getaffinity(0)), list[float]()

    def now() -> tuple[float, float]:
        return time.perf_counter(), machine.busy_s(cores) - machine.cpu_s(os.getpid())

    started, before_s = now()
    yield part
    ended, after_s = now()
    part.append(max(0.0, (after_s - before_s) / (ended - started) / len(cores)))


def _slow_timers(port: int) -> float:
    """Return how many timers of the event loop the worker itself has reported as over 50 ms late."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        text = response.read().decode()
    counts = {
        sample.labels["le"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "vqa_event_loop_lag_seconds_bucket"
    }
    return counts["+Inf"] - counts["0.05"]


async def _images(bench: Bench, case: Case, sources: Mapping[str, Source]) -> list[Image]:
    """Upload the images of a case, each under several keys, in a mixed order."""
    edge = EDGE if case.settings else None
    kinds = [kind for count, kind in case.mix for _ in range(count)]
    answers = {kind: await _answer(replace(sources[kind], max_edge=edge)) for kind in set(kinds)}
    client, bucket = bench.stack.s3.client(), bench.stack.s3.bucket
    images: list[Image] = []
    # More images than jobs in flight: the worker shares a read between jobs with the same image.
    while len(images) < OUTSTANDING + len(kinds):
        for kind in _spread(kinds):
            key = f"photos/{CASES.index(case)}/{len(images)}.jpg"
            await asyncio.to_thread(client.put_object, Bucket=bucket, Key=key, Body=sources[kind].content)
            images.append(Image(f"s3://{bucket}/{key}", answers[kind], ""))
    return images


def _spread(kinds: Sequence[str]) -> list[str]:
    """Return the kinds in an order in which equal ones are far apart."""
    step = next(it for it in (7, 3, 1) if len(kinds) % it)
    return [kinds[number * step % len(kinds)] for number in range(len(kinds))]


async def _answer(source: Source) -> str:
    """Return the simulated API's answer for what must be sent of a source."""
    async with WorkerConversion.started() as conversion:
        (image,) = await conversion.convert(source)
    base64 = encode(image.content)
    return describe_image(len(base64), isal_zlib.crc32(base64))
