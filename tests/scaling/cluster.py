"""What a release of the chart finds or makes: queues, KEDA's user, a Deployment without pods, a publisher."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from deploy.local.stack import Stack
from tests.running import Client, Worker
from tests.scaling import broker
from tests.scaling.broker import Look
from tests.scaling.deployment import Deployment
from tests.scaling.release import Release


@dataclass(frozen=True)
class Cluster:
    """A release that is installed.

    Attributes:
        look: how KEDA sees the length of the jobs queue.
        client: who publishes jobs and reads results.
        queues: the jobs queue and that of dead letters.
    """

    look: Look
    client: Client
    deployment: Deployment
    queues: tuple[str, str]


@contextlib.asynccontextmanager
async def installed(stack: Stack, folder: Path, release: Release) -> AsyncIterator[Cluster]:
    """Installed for as long as the context lasts; the workers' logs go to the folder."""
    await broker.hasten(stack)
    settings = {**release.settings, "VQA_HTTP_HOST": "127.0.0.1", "VQA_HTTP_PORT": "0"}
    hook = Worker.of(stack, folder, **settings)
    hook.command[-1:] = release.hook
    ended = await hook.run_to_end()
    assert ended.code == 0, ended.errors
    async with (
        broker.looking(stack, release) as look,
        Client.of(stack, hook) as client,
        Deployment.empty(stack, folder, settings) as deployment,
    ):
        yield Cluster(look, client, deployment, (hook.jobs_queue, hook.dead_letter_queue))
