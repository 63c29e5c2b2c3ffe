"""Commands and the client work with the permissions of the users of deploy/rabbitmq/."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aio_pika
import pytest

from deploy.local.stack import Stack
from deploy.rabbitmq.rights import OPERATOR, PUBLISHER, WORKER
from tests.conftest import PutImage
from tests.integration.cli.running import Cli
from tests.integration.permissions.realm import PLAIN_FOLDER, STRICT_FOLDER, Realm
from tests.running import Worker
from vqa_worker import AsyncClient, Replies

INTAKE = "vqa.jobs.intake"


@pytest.fixture(scope="module", params=[PLAIN_FOLDER, STRICT_FOLDER], ids=["plain", "strict"])
def realm(stack: Stack, request: pytest.FixtureRequest) -> Iterator[Realm]:
    with Realm.of(stack, request.param) as realm:
        yield realm


def cli_as(realm: Realm, stack: Stack, folder: Path, user: str) -> Cli:
    return Cli(folder, {**stack.environment(), **realm.settings, "VQA_RABBITMQ_URL": realm.url(user)})


async def test_check_passes_every_permission_of_the_worker_s_user(
    realm: Realm, stack: Stack, tmp_path: Path
) -> None:
    printed = await cli_as(realm, stack, tmp_path, WORKER).run_json("check")
    findings = {it["check"]: it["status"] for it in printed}
    assert "failed" not in findings.values()
    for right in (
        "permission to consume jobs",
        "permission to publish results",
        "permission to requeue jobs",
        "permission to receive cancellations",
        *(["permission to publish to vqa.results.*"] if realm.is_strict else []),
    ):
        assert findings[right] == "ok", right
    # The worker's user does not create reply queues.
    assert findings["permission to submit jobs"] == "skipped"


async def test_the_operator_lists_and_replays_dead_letters(
    realm: Realm, stack: Stack, tmp_path: Path
) -> None:
    cli = cli_as(realm, stack, tmp_path, OPERATOR)
    async with await aio_pika.connect(realm.url(OPERATOR)) as connection:
        channel = await connection.channel()
        message = aio_pika.Message(b"{}", headers={"vqa-error-code": "it_died"})
        await channel.default_exchange.publish(message, "vqa.jobs.dead")
        for _ in range(5):
            assert [it["code"] for it in await cli.run_json("dlq", "list")] == ["it_died"]
        (replayed,) = await cli.run_json("dlq", "replay", "--yes")
        assert replayed["done"]
        jobs = await channel.get_queue("vqa.jobs", ensure=False)
        back = await jobs.get(no_ack=True)
        assert back.body == b"{}"
    (figures,) = await cli.run_json("top", "--once")
    assert figures["queues"]["dead_letters"] == 0


@pytest.fixture
async def worker_of_realm(realm: Realm, stack: Stack, tmp_path: Path) -> AsyncIterator[Worker]:
    async with Worker.running(stack, tmp_path, **realm.settings) as worker:
        yield worker
        assert "ACCESS_REFUSED" not in worker.output()


@pytest.mark.usefixtures("worker_of_realm")
async def test_the_publisher_submits_a_job_and_collects_its_result(
    realm: Realm, stack: Stack, tmp_path: Path, put_image: PutImage
) -> None:
    cli = cli_as(realm, stack, tmp_path, PUBLISHER)
    job = ("submit", put_image(), "What is it?", "--exchange", INTAKE)
    (waited_for,) = await cli.run_json(*job, "--wait")
    assert waited_for["status"] == "succeeded"
    await cli.run_json(*job, "--name", "collected-later")
    (collected,) = await cli.run_json("submissions", "collect", "collected-later")
    assert collected["status"] == "succeeded"


@pytest.mark.usefixtures("worker_of_realm")
@pytest.mark.parametrize("replies", ["queue", "exclusive"])
async def test_the_publisher_s_client_gets_answers(
    realm: Realm, put_image: PutImage, replies: Replies
) -> None:
    reply_exchange = "vqa.replies" if realm.is_strict else ""
    url = realm.url(PUBLISHER)
    async with AsyncClient(
        url, jobs_exchange=INTAKE, reply_exchange=reply_exchange, replies=replies
    ) as client:
        result = await client.ask(put_image(), "What is it?", timeout=30)
    assert result.succeeded
