"""One run: jobs at a steady rate, faults at their times, then peace, and the reckoning."""

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
from tests.chaos.faults import Injector
from tests.chaos.jobs import Asked, Jobs, Places, Stored
from tests.chaos.plan import Fault
from tests.chaos.scene import Scene
from tests.chaos.traffic import Traffic
from tests.chaos.verdict import Records, Verdict, judge
from tests.running import until

IMAGES: Final = "chaos-images"
ANSWERS: Final = "chaos-answers"
# After the last fault: jobs wait for delays of the retry queues, pauses end with a trial after 30 s at most.
DRAIN_S: Final = 90.0
TRICKLE: Final = 5.0
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
    """What kind of run.

    Attributes:
        every_s: a fault comes every so many seconds on average.
        faults: the kinds of faults, and `kinds` those of jobs (None: all).
        with_store: whether the workers keep their answers in S3.
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
        """The faults, a pure function of these options."""
        return plan.schedule(self.seed, self.seconds, self.workers, self.every_s, self.faults)

    def settings(self) -> dict[str, str]:
        """What the workers run with.

        Attempts are many, so that no job but the poisonous uses them up by the suite's faults alone.
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
class Ended:
    """A run that is over."""

    records: Records
    verdict: Verdict
    noticed: dict[str, int]

    def __str__(self) -> str:
        return report.tables(self.records, self.verdict, self.noticed)


class Watch:
    """Looks on; this one sees nothing."""

    def around(self, scene: Scene) -> AbstractAsyncContextManager[None]:  # noqa: ARG002 - for those who look
        """From before the first job until everything has completed."""
        return contextlib.nullcontext()


async def run(
    stack: Stack,
    folder: Path,
    options: Options,
    tell: Callable[[str], None],
    watch: Watch | None = None,
) -> Ended:
    """Run it on a stack that may be broken; logs go to the folder."""
    settings = options.settings()
    async with Scene.set_up(stack, folder, options.workers, **settings) as scene:
        places = await asyncio.to_thread(put_images, stack, scene.private_queue, options.seed)
        async with connected(scene) as backend:
            injector, traffic = Injector(scene, backend), Traffic(backend)
            async with (watch or Watch()).around(scene):
                await _go_through(options, injector, traffic, places, tell)
                await _drain(scene, traffic, Jobs(options.seed + 1, places, HARMLESS), tell)
                tell(f"  {time.time() - injector.began:6.1f} s: everything has completed")
            scene.note_the_dead()
            await asyncio.gather(
                *(scene.stop_worker(place) for place in scene.places if not place.life.ended)
            )
            await _nothing_is_left(scene, backend, tell)
        return _reckoned(scene, backend, injector, traffic.asked, with_store=options.with_store)


async def _go_through(
    options: Options, injector: Injector, traffic: Traffic, places: Places, tell: Callable[[str], None]
) -> None:
    """Jobs and faults at the same time, until both have ended."""
    async with traffic.flowing(Jobs(options.seed, places, options.kinds), options.rate):
        await asyncio.gather(injector.carry_out(options.plan(), tell), asyncio.sleep(options.seconds))
    tell(f"  {options.seconds:6.1f} s: {len(traffic.asked)} jobs are published, the faults have ended")


def connected(scene: Scene) -> AbstractAsyncContextManager[Backend]:
    """The backend that publishes this scene's jobs and reads its results."""
    worker = scene.places[0].life.worker
    return Backend.connected(
        scene.stack.rabbitmq.url,
        jobs=worker.jobs_queue,
        results=worker.results_queue,
        dead_letters=worker.dead_letter_queue,
        private=scene.private_queue,
    )


def put_images(stack: Stack, private_queue: str, seed: int) -> Places:
    """Upload the pictures."""
    s3 = stack.s3.client()
    there = {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]}
    for bucket in {IMAGES, ANSWERS} - there:
        s3.create_bucket(Bucket=bucket)
    stored = []
    for nth, content in enumerate(jobs.pictures(seed, _SIZES)):
        s3.put_object(Bucket=IMAGES, Key=jobs.key(nth), Body=content)
        stored.append(Stored(f"s3://{IMAGES}/{jobs.key(nth)}", content))
    small = len(_SIZES) - 2 * len(_LARGE)
    return Places(stored[:small], stored[small:], IMAGES, private_queue)


async def _drain(scene: Scene, traffic: Traffic, harmless: Jobs, tell: Callable[[str], None]) -> None:
    """Wait until everything has completed, or has had time enough.

    A trickle of jobs that succeed goes on meanwhile: where nothing but poison is left, nobody could tell it
    from a model that is down.
    """
    before = {job.id for job in traffic.asked}
    try:
        async with traffic.flowing(harmless, TRICKLE):
            await until(lambda: not before & {job.id for job in traffic.waiting()}, "results", DRAIN_S)
        await until(lambda: not traffic.waiting(), "the last results", DRAIN_S)
        await until(scene.at_rest, "the workers have nothing in hand", DRAIN_S)
    except AssertionError as error:
        tell(f"  not everything completed: {error}; {len(traffic.waiting())} jobs wait for a result")


async def _nothing_is_left(scene: Scene, backend: Backend, tell: Callable[[str], None]) -> None:
    """The workers have ended: what they had not acked would be ready again."""
    jobs_queue = scene.places[0].life.worker.jobs_queue
    for queue in (jobs_queue, *(f"{jobs_queue}.retry.{delay}s" for delay in (1, 2, 3))):
        if depth := await backend.depth(queue):
            tell(f"  {depth} messages are left in {queue}")
    # What is in the queues that the backend reads is there by now; it has only to be delivered.
    await asyncio.sleep(1)


def _reckoned(
    scene: Scene, backend: Backend, injector: Injector, asked: Sequence[Asked], *, with_store: bool
) -> Ended:
    records = Records(
        asked=asked,
        results=backend.results,
        dead_letters=backend.dead_letters,
        calls=scene.calls(),
        happened=injector.happened,
        lives=scene.lives,
        private_queue=scene.private_queue,
        with_store=with_store,
        began=injector.began,
    )
    logs = {event: list(scene.logged(event)) for event in _LOGGED}
    return Ended(records, judge(records), report.noticed(logs, scene.lives))
