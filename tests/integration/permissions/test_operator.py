"""The definitions are imported on a real broker, and the operator's user declares the topology."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aio_pika import connect
from aio_pika.exceptions import ChannelClosed

from deploy.local.rabbitmq import RabbitMQ
from deploy.local.stack import Stack
from deploy.rabbitmq.rights import KEDA, OPERATOR, PUBLISHER, WORKER
from tests.breaking import BrokerUser, administer, job
from tests.integration.cli.running import Cli
from tests.integration.permissions.realm import PLAIN_FOLDER, STRICT_FOLDER, USERS, VHOST, Realm
from tests.running import Client, Ended, Worker
from vqa_worker.rabbitmq.connection import Broker, BrokerRefusedError

EXIT_CONFIG = 78
VARIANTS = {"plain": PLAIN_FOLDER, "strict": STRICT_FOLDER}


async def apply_as(user: str, realm: Realm, folder: Path) -> Ended:
    """Run `vqa-worker topology apply` as one of the users."""
    cli = Cli(folder, {**realm.settings, "VQA_RABBITMQ_URL": realm.url(user)})
    return (await cli.run("topology", "apply")).as_ended()


async def refused_a_connection(realm: Realm, user: str) -> bool:
    broker = Broker(url=realm.url(user), ssl_context=None, name="a test")
    try:
        await (await broker.connect()).close()
    except BrokerRefusedError:
        return True
    return False


@pytest.fixture(params=VARIANTS)
def bare(stack: Stack, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Realm]:
    """Import the users and their permissions, without queues and exchanges."""
    folder = VARIANTS[request.param]
    definitions: dict[str, Any] = json.loads((folder / "definitions.json").read_text())
    # Topic permissions belong to an exchange, which must exist on newer brokers.
    later = ("topic_permissions", "queues", "exchanges", "bindings")
    permissions = {kind: entries for kind, entries in definitions.items() if kind not in later}
    (tmp_path / "permissions.json").write_text(json.dumps(permissions))
    with Realm.of(stack, folder, definitions=tmp_path / "permissions.json") as realm:
        yield realm


async def test_only_the_operator_declares_the_topology_and_a_worker_runs_with_it(
    bare: Realm, tmp_path: Path
) -> None:
    others = (WORKER, PUBLISHER, KEDA)
    refused = await asyncio.gather(*(apply_as(user, bare, tmp_path) for user in others))
    for ended in refused:
        assert (ended.code, ended.output) == (EXIT_CONFIG, "")
        assert all("lacks a permission" in line for line in ended.errors), ended.errors
        assert {"queue vqa.jobs", "exchange vqa.jobs.control"} <= {it.split(":")[0] for it in ended.errors}

    applied = await apply_as(OPERATOR, bare, tmp_path)
    assert (applied.code, applied.errors) == (0, [])
    assert all(line.endswith((": created", ": exists")) for line in applied.output.splitlines())
    async with Worker.running(bare.stack, tmp_path, **bare.settings) as worker:
        # The publishers' exchange is not in the worker's settings: only the files declare it.
        async with Client.of(bare.stack, worker, url=bare.url(OPERATOR)) as client:
            assert (await client.ask(**job())).body["status"] == "succeeded"
        assert "ACCESS_REFUSED" not in worker.output()


@pytest.mark.parametrize("folder", VARIANTS.values(), ids=VARIANTS)
async def test_the_import_declares_the_same_topology_as_the_operator(
    stack: Stack, folder: Path, tmp_path: Path
) -> None:
    with Realm.of(stack, folder) as realm:
        imported = administer(stack, "GET", f"/api/definitions/{VHOST}")
        applied = await apply_as(OPERATOR, realm, tmp_path)
        assert (applied.code, applied.errors) == (0, [])
        assert not [line for line in applied.output.splitlines() if line.endswith(": created")]
        assert administer(stack, "GET", f"/api/definitions/{VHOST}") == imported
        assert [it["name"] for it in imported["policies"]] == ["vqa"]


async def test_the_policy_applies_to_every_queue(stack: Stack) -> None:
    with Realm.of(stack, PLAIN_FOLDER):
        policies = await asyncio.to_thread(stack.rabbitmq.ctl, "list_queues", "-p", VHOST, "policy")
        assert policies.split() == ["vqa"] * 7


async def test_the_documented_commands_work(stack: Stack) -> None:
    if not isinstance(stack.rabbitmq, RabbitMQ):
        pytest.skip("the broker runs in a container, where the files are not")
    ctl = stack.rabbitmq.ctl
    with Realm.of(stack, STRICT_FOLDER) as realm:
        for file in ("users.json", "definitions.json"):
            ctl("import_definitions", str(STRICT_FOLDER / file))
        assert await refused_a_connection(realm, WORKER)
        ctl("change_password", WORKER, realm.passwords[WORKER])
        assert not await refused_a_connection(realm, WORKER)


async def test_each_of_several_publishers_binds_only_keys_with_its_own_name(stack: Stack) -> None:
    with Realm.of(stack, STRICT_FOLDER), BrokerUser.of(stack, vhost=VHOST) as user:
        user.permit(configure=r"^amq\.gen-.*$", write=r"^amq\.gen-.*$", read=r"^(amq\.gen-.*|vqa\.replies)$")
        topic = {"exchange": "vqa.replies", "write": "^$", "read": r"^vqa\.results\.{username}(\..*)?$"}
        path = f"/api/topic-permissions/{VHOST}/{user.name}"
        await asyncio.to_thread(administer, stack, "PUT", path, topic)
        own = f"vqa.results.{user.name}"

        async def may_bind(key: str) -> bool:
            channel = await connection.channel()
            try:
                await (await channel.declare_queue(exclusive=True)).bind("vqa.replies", key)
            except ChannelClosed as error:
                assert f"access to topic '{key}'" in str(error)  # noqa: PT017 - other reasons are errors
                return False
            return True

        async with await connect(user.url) as connection:
            mine = (own, f"{own}.urgent", f"{own}.#")
            assert [await may_bind(key) for key in mine] == [True] * len(mine)
            others = (
                "vqa.results",
                "vqa.results.ann",
                f"{own}x",
                "vqa.results.*",
                "vqa.results.#",
                "#",
                "*.*.*",
            )
            assert [await may_bind(key) for key in others] == [False] * len(others)


async def test_nobody_can_log_in_before_a_password_is_set(stack: Stack) -> None:
    with Realm.of(stack, PLAIN_FOLDER) as realm:
        realm.give(PLAIN_FOLDER / "users.json")
        passwordless = Realm(stack, PLAIN_FOLDER, passwords=dict.fromkeys(USERS, ""))
        for user in USERS:
            assert await refused_a_connection(passwordless, user)
            # The import of the users has removed the password.
            assert await refused_a_connection(realm, user)


async def test_importing_the_other_definitions_again_keeps_the_passwords(stack: Stack) -> None:
    with Realm.of(stack, STRICT_FOLDER) as realm:
        realm.give(STRICT_FOLDER / "definitions.json")
        for user in USERS:
            assert not await refused_a_connection(realm, user)


async def test_the_strict_files_can_be_imported_over_the_others_and_back(
    stack: Stack, tmp_path: Path
) -> None:
    with Realm.of(stack, PLAIN_FOLDER) as realm:
        strict = Realm(stack, STRICT_FOLDER, passwords=realm.passwords)
        strict.give(STRICT_FOLDER / "definitions.json")
        async with Worker.running(stack, tmp_path, **strict.settings) as worker:
            async with Client.of(
                stack, worker, url=realm.url(PUBLISHER), exchange="vqa.jobs.intake"
            ) as client:
                assert (await client.ask(**job())).body["status"] == "succeeded"
            assert "ACCESS_REFUSED" not in worker.output()
        realm.give(PLAIN_FOLDER / "definitions.json")
        assert realm.permissions(WORKER)["write"] == r"^(amq\.default|amq\.gen-.*|vqa\.jobs\.control)$"
