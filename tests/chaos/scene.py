"""Where it happens: the services, the workers, and between each two of them a network of its own."""

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

from prometheus_client.parser import text_string_to_metric_families

from deploy.local.model_simulator.behavior import Rule
from deploy.local.model_simulator.calls import Call
from deploy.local.stack import Stack
from tests.chaos import jobs
from tests.proxy import Proxy
from tests.running import Worker

# Not by long: enough to be distinguished from a slow answer, and short of what hangs in the plan.
MODEL_TIMEOUT_S: Final = 6.0
# Seconds; both ends give a connection up after two or three times as long a silence.
HEARTBEAT_S: Final = 3
LATENCY_S: Final = 0.15
# The header by which the simulator's calls tell who made them.
WORKER_HEADER: Final = "x-chaos-worker"
_SCRAPE_S: Final = 1.0

Ending = Literal["killed", "asked to stop", "by itself"]


@dataclass
class Life:
    """One worker process, from its start to its end (Unix time)."""

    name: str
    worker: Worker
    began: float = field(default_factory=time.time)
    ended: float | None = None
    ending: Ending | None = None
    code: int | None = None
    was_cut_off: bool = False
    """Whether it had to leave jobs unfinished when it was asked to stop."""
    metrics: str = ""
    """What it last showed; what it counted after that, until it was killed, is not known."""

    def total(self, metric: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels."""
        return sum(
            sample.value
            for family in text_string_to_metric_families(self.metrics)
            for sample in family.samples
            if sample.name == metric and labels.items() <= sample.labels.items()
        )


@dataclass
class Place:
    """Where one worker runs after the other: its networks, and who has lived there."""

    number: int
    broker: Proxy
    s3: Proxy
    model: Proxy
    lives: list[Life] = field(default_factory=list)

    @property
    def life(self) -> Life:
        return self.lives[-1]


class Scene:
    """Everything that can be broken."""

    def __init__(self, stack: Stack, folder: Path, settings: dict[str, str]) -> None:
        self.stack = stack
        self.places: list[Place] = []
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
        """With so many workers up; none is left afterwards."""
        scene = cls(stack, folder, settings)
        async with AsyncExitStack() as resources:
            resources.callback(scene.kill_all)
            for number in range(workers):
                broker, s3, model = [
                    await resources.enter_async_context(Proxy.before(url))
                    for url in (stack.rabbitmq.url, stack.s3.endpoint_url, stack.model.base_url)
                ]
                scene.places.append(Place(number, broker, s3, model))
            await asyncio.to_thread(scene.calm_the_model)
            await asyncio.gather(*(scene.start_worker(place) for place in scene.places))
            scraping = asyncio.create_task(scene._scrape_for_ever())
            resources.callback(scraping.cancel)
            yield scene

    @property
    def lives(self) -> list[Life]:
        """All workers that there are and were."""
        return [life for place in self.places for life in place.lives]

    def hit_by(self, who: int | None) -> list[Place]:
        """The places that a fault hits."""
        return self.places if who is None else [self.places[who]]

    def calm_the_model(self, *first: Rule, **behaviour: object) -> None:
        """The simulator's usual behaviour, but for the rules and the settings given."""
        usual: dict[str, object] = {"latency": LATENCY_S, "max_concurrent": None, "retry_after": None}
        rules = [*first, *jobs.STANDING_RULES]
        self.stack.model.configure(**{**usual, **behaviour, "rules": rules})

    def remember_calls(self) -> None:
        """Ask the simulator for its calls and have it forget them; it must be out of everybody's reach."""
        self._calls += self.stack.model.calls()

    def calls(self) -> list[Call]:
        """All calls that there were, over the simulator's restarts."""
        return [*self._calls, *self.stack.model.calls()]

    async def start_worker(self, place: Place) -> None:
        """Start a new worker there; it need not reach anything yet."""
        stack, name = self.stack, f"{place.number}.{len(place.lives)}"
        worker = Worker.of(
            stack,
            self._folder,
            VQA_RABBITMQ_URL=f"{place.broker.url(stack.rabbitmq.url)}?heartbeat={HEARTBEAT_S}",
            VQA_S3_ENDPOINT_URL=place.s3.url(stack.s3.endpoint_url),
            VQA_MODEL_BASE_URL=place.model.url(stack.model.base_url),
            VQA_MODEL_HEADERS=json.dumps({WORKER_HEADER: name}),
            **self._settings,
        )
        place.lives.append(Life(name, worker))
        await worker.serve()

    async def kill_worker(self, place: Place) -> None:
        """SIGKILL."""
        life = place.life
        await asyncio.to_thread(self._scrape, life)
        life.ending = "killed"
        life.worker.kill()
        self._note_end(life)

    async def stop_worker(self, place: Place, patience_s: float = 60.0) -> None:
        """SIGTERM, and wait for the end."""
        life = place.life
        await asyncio.to_thread(self._scrape, life)
        life.ending = "asked to stop"
        await life.worker.stop(signal.SIGTERM, patience_s)
        self._note_end(life)

    def kill_all(self) -> None:
        """Whoever still lives."""
        for life in self.lives:
            life.worker.kill()

    def note_the_dead(self) -> None:
        """Note who has ended without being asked to."""
        for life in self.lives:
            process = life.worker.process
            if life.ending is None and process is not None and process.poll() is not None:
                life.ending = "by itself"
                self._note_end(life)

    def logged(self, event: str) -> Iterator[dict[str, Any]]:
        """The log lines of one kind, of all workers that there were."""
        for life in self.lives:
            yield from (line for line in life.worker.log() if line.get("event") == event)

    async def at_rest(self) -> bool:
        """Whether every worker is there and has nothing in hand."""
        return all(await asyncio.gather(*(asyncio.to_thread(_is_at_rest, it.life) for it in self.places)))

    def _note_end(self, life: Life) -> None:
        life.ended = time.time()
        assert life.worker.process is not None
        life.code = life.worker.process.returncode
        life.was_cut_off = any(line.get("event") == "grace_period_expired" for line in life.worker.log())

    async def _scrape_for_ever(self) -> None:
        while True:
            alive = [place.life for place in self.places if place.life.ended is None]
            await asyncio.gather(*(asyncio.to_thread(self._scrape, life) for life in alive))
            await asyncio.sleep(_SCRAPE_S)

    def _scrape(self, life: Life) -> None:
        status, text = life.worker.get("/metrics")
        if status == 200:
            life.metrics = text


def _is_at_rest(life: Life) -> bool:
    # Without a job to try with, a worker that pauses goes on pausing.
    if life.worker.ready()[1].get("status") not in ("ready", "paused"):
        return False
    return life.worker.metric("vqa_jobs_in_flight") == 0
