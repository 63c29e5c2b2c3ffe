"""Generate a load on real services: failures of every kind, rate limits, an outage, a growing queue."""

import asyncio
import random
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from aio_pika import ExchangeType, Message, connect

from deploy.local.model_simulator.behavior import Answer, Error, Outcome, Reset
from deploy.local.stack import Stack
from tests.conftest import BUCKET, picture
from tests.observability.prometheus import RULES, Prometheus, Release
from tests.running import Client, Worker, until

TENANTS: Final = ("search", "support")
NAMESPACE: Final = "observed"
QUEUE_FAMILIES: Final = ["queue_coarse_metrics", "queue_consumer_count"]

# Changed fields of a failing job, and the outcome of its first model request.
_FAILURES: Final[tuple[tuple[dict[str, Any], Outcome | None], ...]] = (
    ({"images": [f"s3://{BUCKET}/nothing-there"]}, None),
    ({"images": ["ftp://example.com/x.png"]}, None),
    ({"model": "not allowed"}, None),
    ({}, Error(status=422)),
    ({}, Error(status=503)),
    ({}, Answer(text="", finish_reason="length")),
    ({}, Reset()),
)
_FAILURE_INTERVAL: Final = 6


@dataclass(frozen=True)
class Durations:
    """The durations of the phases in seconds, and the rate."""

    normal: float = 1.0
    failures: float = 3.0
    rate_limited: float = 2.0
    outage: float = 2.0
    burst: float = 1.0
    after: float = 2.0
    jobs_per_s: float = 25.0


@dataclass
class ObservedWorker:
    """A worker, its services, a publisher, and a Prometheus that scrapes them."""

    stack: Stack
    worker: Worker
    client: Client
    prometheus: Prometheus
    started: float = field(default_factory=time.time)
    ids: list[str] = field(default_factory=list)
    rng: random.Random = field(default_factory=lambda: random.Random(6))  # noqa: S311 - no secret

    @classmethod
    @asynccontextmanager
    async def set_up(cls, stack: Stack, folder: Path, release: Release) -> AsyncIterator["ObservedWorker"]:
        """Start a worker with all optional metrics, and scrape it from its start with a Prometheus."""
        settings = {
            "VQA_MAX_ATTEMPTS": "2",
            "VQA_MAX_CONCURRENCY": "16",
            "VQA_RESULT_STORE": f"s3://{BUCKET}/{uuid.uuid4().hex}",
            "VQA_TENANT_FROM": "metadata.team",
            "VQA_TENANTS": ",".join(TENANTS),
        }
        async with (
            Worker.running(stack, folder, **settings) as worker,
            Client.of(stack, worker) as client,
        ):
            rules = RULES.read_text().replace("vqa.jobs", worker.jobs_queue)
            with Prometheus.scraping(release, _scraped(stack, worker), rules=rules) as prometheus:
                stack.model.configure(latency=0.1)
                # Prometheus starts slowly, and `increase` ignores counts before the first scrape.
                await until(lambda: prometheus.query("vqa_build_info"), "the first scrape")
                try:
                    yield cls(stack, worker, client, prometheus)
                finally:
                    stack.model.reset()

    async def run(self, durations: Durations) -> None:
        """Run all phases and wait for the last answer."""
        images = self._upload()
        await self._submit(images, durations.normal, durations.jobs_per_s)
        await self._publish_dead_letters()
        await self._submit(images, durations.failures, durations.jobs_per_s, failures=True)
        self.stack.model.configure(max_concurrent=2)
        await self._submit(images, durations.rate_limited, durations.jobs_per_s)
        self.stack.model.configure(max_concurrent=None)
        self.stack.model.play(Error(status=401, message="no such key"), times=None)
        await self._submit(images, durations.outage, durations.jobs_per_s / 2)
        await until(lambda: self.worker.ready()[1].get("status") == "paused", "the worker pauses")
        self.stack.model.configure(rules=[])
        await self._submit(images, durations.burst, durations.jobs_per_s * 4)
        await self._cancel(self.ids[-1])
        await self._submit(images, durations.after, durations.jobs_per_s, failures=True)
        await until(lambda: set(self.ids) <= self.client.replies.keys(), "every job has a result", 60)

    def _upload(self) -> list[str]:
        s3, urls = self.stack.s3.client(), []
        for size in ((64, 48), (640, 480), (1280, 960)):
            key = f"{uuid.uuid4().hex}.jpg"
            s3.put_object(Bucket=BUCKET, Key=key, Body=picture("JPEG", size))
            urls.append(f"s3://{BUCKET}/{key}")
        return urls

    async def _submit(
        self, images: list[str], seconds: float, jobs_per_s: float, *, failures: bool = False
    ) -> None:
        """Publish at a steady rate."""
        started = time.monotonic()
        for nth in range(int(seconds * jobs_per_s)):
            fields: dict[str, Any] = {"images": [self.rng.choice(images)]}
            outcome = None
            if failures and nth % _FAILURE_INTERVAL == _FAILURE_INTERVAL - 1:
                changed, outcome = _FAILURES[nth // _FAILURE_INTERVAL % len(_FAILURES)]
                fields |= changed
            await self._publish(fields, outcome)
            await asyncio.sleep(max(0.0, started + (nth + 1) / jobs_per_s - time.monotonic()))

    async def _publish_dead_letters(self) -> None:
        """Publish a job that fails at every attempt, one after its deadline, and an invalid message."""
        await self._publish({"images": ["https://example.com/x.png"]}, Error(status=500), times=None)
        await self._publish({"deadline": "2020-01-01T00:00:00Z", "images": ["https://example.com/x.png"]})
        await self.client.publish(b"no job", message_id="unreadable")

    async def _publish(
        self, fields: dict[str, Any], outcome: Outcome | None = None, times: int | None = 1
    ) -> None:
        job_id = uuid.uuid4().hex
        if outcome is not None:
            self.stack.model.play(outcome, marker=job_id, times=times)
        job = {
            "id": job_id,
            "question": f"What is this? {job_id}",
            "model": self.rng.choices(self.stack.model.models, weights=(3, 1))[0],
            "metadata": {"team": self.rng.choice((*TENANTS, "unknown"))},
        }
        self.ids.append(job_id)
        await self.client.publish({**job, **fields}, headers={"timestamp_in_ms": int(time.time() * 1000)})

    async def _cancel(self, job_id: str) -> None:
        connection = await connect(self.stack.rabbitmq.url)
        async with connection:
            channel = await connection.channel()
            name = f"{self.worker.jobs_queue}.control"
            exchange = await channel.declare_exchange(name, ExchangeType.FANOUT, durable=True, passive=True)
            await exchange.publish(Message(f'{{"cancel": "{job_id}"}}'.encode()), "")


def _scraped(stack: Stack, worker: Worker) -> list[dict[str, Any]]:
    """Return scrape jobs; no query may depend on their names."""
    return [
        {
            "job_name": "any name",
            "static_configs": [{"targets": [f"127.0.0.1:{worker.port}"], "labels": {"namespace": NAMESPACE}}],
        },
        {
            "job_name": "queues",
            "metrics_path": "/metrics/detailed",
            "params": {"family": QUEUE_FAMILIES},
            "static_configs": [{"targets": [stack.rabbitmq.prometheus_url.removeprefix("http://")]}],
        },
    ]
