"""The worker on other releases of RabbitMQ; `make test-rabbitmq` runs many more tests on them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local.model_simulator.behavior import Error
from deploy.local.stack import Stack
from tests.breaking import job, publish, results, statuses
from tests.integration.cli.running import Cli
from tests.rabbitmq_releases import SUITES, installation
from tests.running import Client, Worker, until


@pytest.fixture(scope="module", params=SUITES)
def release(request: pytest.FixtureRequest) -> Iterator[Stack]:
    with Stack.start(installation=installation(request.param)) as stack:
        yield stack


async def test_jobs_are_answered_retried_and_dead_lettered_and_outlive_a_killed_broker(
    release: Stack, tmp_path: Path
) -> None:
    async with Worker.running(release, tmp_path) as worker:
        async with Client.of(release, worker) as client:
            release.model.play(Error(status=500), marker="again")
            replies = await results(client, await publish(client, 5, "again"))
            assert statuses(replies) == {"succeeded": 5}
            assert sum(reply.body["attempts"] for reply in replies) == 6
            await client.publish(b"no job")
            await until(lambda: client.depth(worker.dead_letter_queue), "the dead letter")
        listed = await Cli.of(release, tmp_path, worker).run("dlq", "list", "--json")
        assert [it["code"] for it in listed.objects] == ["invalid_job"]
        release.rabbitmq.kill()
        release.rabbitmq.start()
        async with Client.of(release, worker) as client:
            assert (await client.ask(**job())).body["status"] == "succeeded"
