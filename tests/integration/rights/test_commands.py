"""Commands of repair as the users that the files of deploy/rabbitmq/ make: they need no more."""

from collections.abc import Iterator
from pathlib import Path

import aio_pika
import pytest

from deploy.local.stack import Stack
from deploy.rabbitmq.rights import OPERATOR, WORKER
from tests.integration.cli.running import Cli
from tests.integration.rights.realm import PLAIN_FOLDER, STRICT_FOLDER, Realm


@pytest.fixture(scope="module", params=[PLAIN_FOLDER, STRICT_FOLDER], ids=["plain", "strict"])
def realm(stack: Stack, request: pytest.FixtureRequest) -> Iterator[Realm]:
    with Realm.of(stack, request.param) as realm:
        yield realm


def cli_as(realm: Realm, stack: Stack, folder: Path, user: str) -> Cli:
    return Cli(folder, {**stack.environment(), **realm.settings, "VQA_RABBITMQ_URL": realm.url(user)})


async def test_the_worker_s_user_has_a_tick_for_each_right(
    realm: Realm, stack: Stack, tmp_path: Path
) -> None:
    told = await cli_as(realm, stack, tmp_path, WORKER).told("check")
    findings = {it["check"]: it["status"] for it in told}
    assert "failed" not in findings.values()
    for right in (
        "right to take jobs",
        "right to publish results",
        "right to publish jobs back",
        "cancellations",
    ):
        assert findings[right] == "ok", right
    assert findings.get("direct reply-to") == ("skipped" if realm.is_strict else None)


async def test_the_operator_looks_at_dead_letters_and_puts_them_back(
    realm: Realm, stack: Stack, tmp_path: Path
) -> None:
    cli = cli_as(realm, stack, tmp_path, OPERATOR)
    async with await aio_pika.connect(realm.url(OPERATOR)) as connection:
        channel = await connection.channel()
        message = aio_pika.Message(b"{}", headers={"vqa-error-code": "it_died"})
        await channel.default_exchange.publish(message, "vqa.jobs.dead")
        for _ in range(5):
            assert [it["code"] for it in await cli.told("dead", "list")] == ["it_died"]
        (replayed,) = await cli.told("dead", "replay", "--yes")
        assert replayed["done"]
        jobs = await channel.get_queue("vqa.jobs", ensure=False)
        back = await jobs.get(no_ack=True)
        assert back.body == b"{}"
    (told,) = await cli.told("top", "--once")
    assert told["queues"]["dead"] == 0
