"""Run the chaos test: publish jobs at a steady rate, inject faults, drain the queues, evaluate."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deploy.local.stack import Stack
from tests.chaos import jobs, plan, report
from tests.chaos.backend import Backend
from tests.chaos.environment import Environment
from tests.chaos.evaluation import Evaluation, Records, evaluate
from tests.chaos.faults import Injector
from tests.chaos.jobs import ExpectedJob, JobInputs, Jobs, Stored
from tests.chaos.plan import Fault
from tests.chaos.traffic import Traffic
from tests.running import until

IMAGES: Final = "chaos-images"
ANSWERS: Final = "chaos-answers"
# Limit after the last fault: retry delays, and up to 30 s until a paused worker makes a probe request.
DRAIN_S: Final = 90.0
DRAIN_RATE: Final = 5.0
HARMLESS: Final = ("one image in S3", "a private reply queue")
_SMALL: Final = ((24, 16), (40, 30), (100, 80), (180, 120))
_LARGE: Final = ((400, 300), (800, 600))
_SIZES: Final = (*(_SMALL * 5), *(_LARGE * 2))
_LOGGED: Final = (
    "consumption_paused",
    "consumption_resumed",
    "rabbitmq_connected",
    "rabbitmq_connection_lost",
    "publish_failed",
    "job_retried",
)


@dataclass(frozen=True)
class Options:
    """Options of a run.

    Attributes:
        every_s: seconds between faults, on average.
        faults: kinds of faults.
        kinds: kinds of jobs; None for all.
        with_store: use a result store in S3.
    """

    seed: int
    seconds: float
    workers: int = 3
    rate: float = 15.0
    every_s: float = 6.0
    faults: Sequence[str] = tuple(plan.KINDS)
    kinds: Sequence[str] | None = None
    with_store: bool = False

    def plan(self) -> list[Fault]:
        """Return the faults, a pure function of these options."""
        return plan.schedule(self.seed, self.seconds, self.workers, self.every_s, self.faults)

    def settings(self) -> dict[str, str]:
        """Return the workers' settings.

        So many attempts that the injected faults alone do not exhaust them.
        """
        store = {"VQA_RESULT_STORE": f"s3://{ANSWERS}/{uuid.uuid4().hex}"} if self.with_store else {}
        return {
            "VQA_MODEL_TIMEOUT": "6",
            "VQA_JOB_TIMEOUT": "60",
            "VQA_MAX_ATTEMPTS": "10",
            "VQA_RETRY_DELAYS": "1,1,2,3",
            "VQA_MAX_CONCURRENCY": "16",
            "VQA_SHUTDOWN_GRACE": "12",
            **store,
        }


@dataclass(frozen=True)
class RunResult:
    """The result of a run."""

    records: Records
    evaluation: Evaluation
    noticed: dict[str, int]

    def __str__(self) -> str:
        return report.tables(self.records, self.evaluation, self.noticed)


class Observer:
    """Measures during a run; this base class measures nothing."""

    def observing(self, environment: Environment) -> AbstractAsyncContextManager[None]:  # noqa: ARG002 - for subclasses
        """Return a context that lasts from before the first job until all jobs have completed."""
        return contextlib.nullcontext()


async def run(
    stack: Stack,
    folder: Path,
    options: Options,
    log: Callable[[str], None],
    observer: Observer | None = None,
) -> RunResult:
    """Run the test on a stack whose services are killed; write logs to the folder."""
    settings = options.settings()
    async with Environment.set_up(stack, folder, options.workers, **settings) as environment:
        slots = await asyncio.to_thread(put_images, stack, environment.private_queue, options.seed)
        async with connected(environment) as backend:
            injector, traffic = Injector(environment, backend), Traffic(backend)
            async with (observer or Observer()).observing(environment):
                await _publish_and_inject(options, injector, traffic, slots, log)
                await _drain(environment, traffic, Jobs(options.seed + 1, slots, HARMLESS), log)
                log(f"  {time.time() - injector.started:6.1f} s: all jobs have completed")
            environment.record_crashes()
            await asyncio.gather(
                *(environment.stop_worker(slot) for slot in environment.slots if not slot.process.ended)
            )
            await _check_queues_are_empty(environment, backend, log)
        return _run_result(environment, backend, injector, traffic.jobs, with_store=options.with_store)


async def _publish_and_inject(
    options: Options, injector: Injector, traffic: Traffic, slots: JobInputs, log: Callable[[str], None]
) -> None:
    """Publish jobs and inject faults until both have ended."""
    async with traffic.publishing(Jobs(options.seed, slots, options.kinds), options.rate):
        await asyncio.gather(injector.inject_all(options.plan(), log), asyncio.sleep(options.seconds))
    log(f"  {options.seconds:6.1f} s: {len(traffic.jobs)} jobs published, all faults ended")


def connected(environment: Environment) -> AbstractAsyncContextManager[Backend]:
    """Return a backend for the queues of this environment."""
    worker = environment.slots[0].process.worker
    return Backend.connected(
        environment.stack.rabbitmq.url,
        jobs=worker.jobs_queue,
        results=worker.results_queue,
        dead_letters=worker.dead_letter_queue,
        private=environment.private_queue,
    )


def put_images(stack: Stack, private_queue: str, seed: int) -> JobInputs:
    """Upload the images."""
    s3 = stack.s3.client()
    there = {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]}
    for bucket in {IMAGES, ANSWERS} - there:
        s3.create_bucket(Bucket=bucket)
    stored = []
    for nth, content in enumerate(jobs.images(seed, _SIZES)):
        s3.put_object(Bucket=IMAGES, Key=jobs.key(nth), Body=content)
        stored.append(Stored(f"s3://{IMAGES}/{jobs.key(nth)}", content))
    small = len(_SIZES) - 2 * len(_LARGE)
    return JobInputs(stored[:small], stored[small:], IMAGES, private_queue)


async def _drain(
    environment: Environment, traffic: Traffic, harmless: Jobs, log: Callable[[str], None]
) -> None:
    """Wait until all jobs have completed, at most `DRAIN_S` for each step.

    Jobs that succeed are published meanwhile: with only failing jobs left, a worker assumes an outage.
    """
    before = {job.id for job in traffic.jobs}
    try:
        async with traffic.publishing(harmless, DRAIN_RATE):
            await until(lambda: not before & {job.id for job in traffic.waiting()}, "results", DRAIN_S)
        await until(lambda: not traffic.waiting(), "the last results", DRAIN_S)
        await until(environment.is_idle, "the workers have no job in flight", DRAIN_S)
    except AssertionError as error:
        log(f"  incomplete: {error}; {len(traffic.waiting())} jobs without a result")


async def _check_queues_are_empty(
    environment: Environment, backend: Backend, log: Callable[[str], None]
) -> None:
    """Log queues with messages: after the workers' exit all unacked messages are ready again."""
    jobs_queue = environment.slots[0].process.worker.jobs_queue
    for queue in (jobs_queue, *(f"{jobs_queue}.retry.{delay}s" for delay in (1, 2, 3))):
        if depth := await backend.depth(queue):
            log(f"  {depth} messages are left in {queue}")
    # Let the broker deliver the last messages to the backend.
    await asyncio.sleep(1)


def _run_result(
    environment: Environment,
    backend: Backend,
    injector: Injector,
    submitted: Sequence[ExpectedJob],
    *,
    with_store: bool,
) -> RunResult:
    records = Records(
        jobs=submitted,
        results=backend.results,
        dead_letters=backend.dead_letters,
        calls=environment.calls(),
        injected=injector.injected,
        processes=environment.processes,
        private_queue=environment.private_queue,
        with_store=with_store,
        started=injector.started,
    )
    logs = {event: list(environment.logged(event)) for event in _LOGGED}
    return RunResult(records, evaluate(records), report.noticed(logs, environment.processes))
