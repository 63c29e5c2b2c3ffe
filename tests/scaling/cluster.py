"""An installed release of the chart: queues, KEDA's user, a Deployment, a publisher."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from deploy.local.stack import Stack
from tests.running import Client, Worker
from tests.scaling import broker
from tests.scaling.broker import QueueDepth
from tests.scaling.deployment import Deployment
from tests.scaling.release import Release


@dataclass(frozen=True)
class Cluster:
    """An installed release.

    Attributes:
        queue_depth: returns the depth of the jobs queue as KEDA reads it.
        client: publishes jobs and consumes results.
        queues: the jobs queue and the dead-letter queue.
    """

    queue_depth: QueueDepth
    client: Client
    deployment: Deployment
    queues: tuple[str, str]


@contextlib.asynccontextmanager
async def installed(stack: Stack, folder: Path, release: Release) -> AsyncIterator[Cluster]:
    """Install the release for this context; write the workers' logs to the folder."""
    await broker.shorten_statistics_intervals(stack)
    settings = {**release.settings, "VQA_HTTP_HOST": "127.0.0.1", "VQA_HTTP_PORT": "0"}
    hook = Worker.of(stack, folder, **settings)
    hook.command = [*hook.command[:-1], *release.hook]
    ended = await hook.run_to_end()
    assert ended.code == 0, ended.errors
    async with (
        broker.queue_depth_reader(stack, release) as queue_depth,
        Client.of(stack, hook) as client,
        Deployment.empty(stack, folder, settings) as deployment,
    ):
        yield Cluster(queue_depth, client, deployment, (hook.jobs_queue, hook.dead_letter_queue))
