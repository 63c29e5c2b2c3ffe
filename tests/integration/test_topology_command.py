"""`vqa-worker topology`: `show` works without a broker; `apply` creates missing queues and exchanges."""

import asyncio
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aio_pika import Message, connect

from deploy.local.model_simulator.behavior import Error
from deploy.local.stack import Stack
from tests.breaking import BrokerUser, administer, events, job, own_vhost, url_as
from tests.conftest import MakeClient, StartWorker
from tests.integration.cli.running import Cli
from tests.proxy import Proxy
from tests.running import Ended, until

EXIT_CONFIG = 78
QUEUES = ["vqa.jobs.dead", "vqa.results", "vqa.jobs", *(f"vqa.jobs.retry.{n}s" for n in (1, 5, 30, 120))]
# A worker that leaves a copy of a job to the broker after two tries.
FEW_COPY_TRIES = """
from worker.rabbitmq import messages
messages.COPY_TRIES = 2
"""
EXCHANGES = {"VQA_REPLY_EXCHANGE": "vqa.replies", "VQA_JOBS_EXCHANGE": "vqa.back"}


@pytest.fixture
def vhost(stack: Stack) -> Iterator[str]:
    with own_vhost(stack) as name:
        yield name


@pytest.fixture
def url(stack: Stack, vhost: str) -> str:
    return url_as(stack, "guest", "guest", vhost)


async def run(folder: Path, *arguments: str, **settings: str) -> Ended:
    """Run `vqa-worker topology …` with these settings and no others."""
    return (await Cli(folder, settings).run("topology", *arguments)).as_ended()


async def shown(folder: Path, *arguments: str, **settings: str) -> dict[str, list[dict[str, Any]]]:
    """Return the JSON output of a successful command."""
    ended = await run(folder, *arguments, "--json", **settings)
    assert (ended.code, ended.errors) == (0, [])
    reported: dict[str, list[dict[str, Any]]] = json.loads(ended.output)
    return reported


FIELDS = {
    "queues": ("name", "durable", "auto_delete", "arguments"),
    "exchanges": ("name", "type", "durable", "auto_delete", "internal", "arguments"),
    "bindings": ("source", "destination", "destination_type", "routing_key", "arguments"),
}


def there(stack: Stack, vhost: str) -> dict[str, list[dict[str, Any]]]:
    """Return what a virtual host contains, sorted, with the fields that `show` prints."""
    found = administer(stack, "GET", f"/api/definitions/{vhost}")
    return {
        kind: in_order([{field: entry.get(field, False) for field in fields} for entry in found[kind]])
        for kind, fields in FIELDS.items()
    }


def in_order(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(entries, key=lambda entry: json.dumps(entry, sort_keys=True))


# topology show


async def test_show_needs_neither_a_broker_nor_other_settings(tmp_path: Path) -> None:
    nowhere = "amqp://user:s3cr3t@127.0.0.1:1/"
    reported = await shown(tmp_path, "show", VQA_RABBITMQ_URL=nowhere, VQA_HTTP_PORT="none of its business")
    assert [queue["name"] for queue in reported["queues"]] == QUEUES
    assert reported["queues"][2]["arguments"]["x-dead-letter-routing-key"] == "vqa.jobs.dead"
    assert reported["queues"][3]["arguments"]["x-message-ttl"] == 1000
    assert [(it["name"], it["type"]) for it in reported["exchanges"]] == [("vqa.jobs.control", "fanout")]
    assert reported["bindings"] == []


async def test_show_prints_exchanges_with_their_bindings(tmp_path: Path) -> None:
    settings = {**EXCHANGES, "VQA_JOBS_QUEUE": "j", "VQA_RESULTS_QUEUE": "r", "VQA_RETRY_DELAYS": "7"}
    reported = await shown(tmp_path, "show", **settings)
    assert [(it["name"], it["type"]) for it in reported["exchanges"]] == [
        ("j.control", "fanout"),
        ("vqa.back", "direct"),
        ("vqa.replies", "direct"),
    ]
    assert [(it["source"], it["destination"], it["routing_key"]) for it in reported["bindings"]] == [
        ("vqa.back", "j.dead", "j.dead"),
        ("vqa.back", "j", "j"),
        ("vqa.back", "j.retry.7s", "j.retry.7s"),
        ("vqa.replies", "r", "r"),
    ]
    for_people = await run(tmp_path, "show", **settings)
    assert for_people.code == 0
    for entry in (*reported["queues"], *reported["exchanges"]):
        assert entry["name"] in for_people.output
        assert all(json.dumps(value) in for_people.output for value in entry["arguments"].values())
    assert "binding of queue r to exchange vqa.replies\n" in for_people.output


async def test_the_output_of_show_can_be_imported_as_definitions(
    stack: Stack, vhost: str, url: str, tmp_path: Path
) -> None:
    reported = await shown(tmp_path, "show", **EXCHANGES)
    await asyncio.to_thread(administer, stack, "POST", f"/api/definitions/{vhost}", reported)
    given = there(stack, vhost)
    assert {it["name"] for it in given["queues"]} == set(QUEUES)
    parts = await shown(tmp_path, "apply", VQA_RABBITMQ_URL=url, **EXCHANGES)
    assert not any(part["created"] for part in (*parts["queues"], *parts["exchanges"]))
    assert there(stack, vhost) == given


async def test_a_name_similar_to_a_setting_is_reported(tmp_path: Path) -> None:
    ended = await run(tmp_path, "show", VQA_JOBS_QUEU="mine")
    assert ended.code == 0
    (line,) = ended.errors
    assert "did you mean VQA_JOBS_QUEUE?" in line


# topology apply


async def test_apply_creates_everything_missing_and_is_idempotent(
    stack: Stack, vhost: str, url: str, tmp_path: Path
) -> None:
    settings = {"VQA_RABBITMQ_URL": url, **EXCHANGES}
    first = await run(tmp_path, "apply", **settings)
    assert (first.code, first.errors) == (0, [])
    lines = first.output.splitlines()
    assert lines[:8] == [*(f"queue {name}: created" for name in QUEUES), "exchange vqa.jobs.control: created"]
    assert lines[8:10] == [
        "exchange vqa.back (VQA_JOBS_EXCHANGE): created",
        "exchange vqa.replies (VQA_REPLY_EXCHANGE): created",
    ]
    assert all(line.endswith(": exists") for line in lines[10:])
    made = there(stack, vhost)

    second = await run(tmp_path, "apply", **settings)
    assert (second.code, second.errors) == (0, [])
    assert second.output == first.output.replace(": created", ": exists")
    assert there(stack, vhost) == made
    reported = await shown(tmp_path, "show", **EXCHANGES)
    assert made == {kind: in_order(entries) for kind, entries in reported.items()}


async def test_apply_creates_the_same_as_a_starting_worker(
    stack: Stack, vhost: str, url: str, start_worker: StartWorker, tmp_path: Path
) -> None:
    with own_vhost(stack) as other:
        jobs_exchange = {"VQA_JOBS_EXCHANGE": "vqa.back"}
        worker = await start_worker(VQA_RABBITMQ_URL=url_as(stack, "guest", "guest", other), **jobs_exchange)
        assert await worker.stop() == 0
        worker_s = {"VQA_JOBS_QUEUE": worker.jobs_queue, "VQA_RESULTS_QUEUE": worker.results_queue}
        await shown(
            tmp_path, "apply", VQA_RABBITMQ_URL=url, VQA_RETRY_DELAYS="1", **worker_s, **jobs_exchange
        )
        assert there(stack, vhost) == there(stack, other)


async def test_workers_that_only_check_run_with_the_topology_that_it_created(
    stack: Stack, url: str, start_worker: StartWorker, tmp_path: Path
) -> None:
    settings = {"VQA_RABBITMQ_URL": url, "VQA_DECLARE_TOPOLOGY": "false", **EXCHANGES}
    names = {"VQA_JOBS_QUEUE": "j", "VQA_RESULTS_QUEUE": "r", "VQA_RETRY_DELAYS": "1"}
    early = await start_worker(wait=False, **names, **settings)
    ended = await early.run_to_end()
    assert ended.code == EXIT_CONFIG
    assert all("`vqa-worker topology apply`" in line for line in ended.errors), ended.errors
    assert ["VQA_DECLARE_TOPOLOGY=true" in line for line in ended.errors] == [True] * 5 + [False]

    await shown(tmp_path, "apply", **names, **settings)
    worker = await start_worker(**names, **settings)
    marker = uuid.uuid4().hex
    stack.model.play(Error(status=500), marker=marker)
    async with await connect(url) as connection:
        channel = await connection.channel()
        results = await channel.get_queue("r", ensure=False)
        body = json.dumps(job(marker)).encode()
        await channel.default_exchange.publish(Message(body), "j")
        reply: Any = await until(lambda: results.get(fail=False, no_ack=True), "the result")
    assert (json.loads(reply.body)["status"], json.loads(reply.body)["attempts"]) == ("succeeded", 2)
    assert reply.exchange == "vqa.replies"
    assert not events(worker, "cancellation_forbidden")
    assert await worker.stop() == 0


async def test_an_existing_reply_exchange_is_not_changed(
    stack: Stack, vhost: str, url: str, tmp_path: Path
) -> None:
    topic = {"type": "topic", "durable": True}
    await asyncio.to_thread(administer, stack, "PUT", f"/api/exchanges/{vhost}/vqa.replies", topic)
    parts = await shown(tmp_path, "apply", VQA_RABBITMQ_URL=url, VQA_REPLY_EXCHANGE="vqa.replies")
    assert [part["created"] for part in parts["exchanges"]] == [True, False]
    found = there(stack, vhost)
    assert {it["name"]: it["type"] for it in found["exchanges"]} == {
        "vqa.jobs.control": "fanout",
        "vqa.replies": "topic",
    }
    assert [(it["source"], it["destination"]) for it in found["bindings"]] == [("vqa.replies", "vqa.results")]


# Errors


async def test_an_unreachable_broker_is_one_message(tmp_path: Path) -> None:
    ended = await run(tmp_path, "apply", "--timeout", "0.5", VQA_RABBITMQ_URL="amqp://u:s3cr3t@127.0.0.1:1/")
    assert (ended.code, ended.output) == (1, "")
    (line,) = ended.errors
    assert line.startswith("VQA_RABBITMQ_URL: the broker was unreachable for 0.5 s (")
    assert "Connection refused" in line
    assert "s3cr3t" not in line


async def test_an_unresponsive_broker_is_one_message(stack: Stack, tmp_path: Path) -> None:
    async with Proxy.before(stack.rabbitmq.url) as proxy:
        proxy.freeze()
        silent = proxy.url(stack.rabbitmq.url)
        ended = await run(tmp_path, "apply", "--timeout", "0.5", VQA_RABBITMQ_URL=silent)
    assert (ended.code, ended.output) == (1, "")
    (line,) = ended.errors
    assert "it does not answer" in line


async def test_apply_waits_for_a_late_broker_and_repeats_after_a_lost_connection(
    url: str, tmp_path: Path
) -> None:
    async with Proxy.before(url, listens=False) as proxy:
        running = asyncio.create_task(run(tmp_path, "apply", VQA_RABBITMQ_URL=proxy.url(url)))
        proxy.freezes_on = b"x-message-ttl"
        await proxy.accept()
        await until(lambda: proxy.held, "the command is connected")
        proxy.reset()
        proxy.thaw()
        ended = await running
    assert (ended.code, ended.errors) == (0, [])
    made = [line for line in ended.output.splitlines() if line.endswith(": created")]
    assert made == [*(f"queue {name}: created" for name in QUEUES[3:]), "exchange vqa.jobs.control: created"]
    assert len(ended.output.splitlines()) == len(QUEUES) + 1


async def test_rejected_credentials_are_reported_but_not_printed(stack: Stack, tmp_path: Path) -> None:
    ended = await run(tmp_path, "apply", VQA_RABBITMQ_URL=url_as(stack, "guest", "s3cr3t-but-wrong"))
    assert (ended.code, ended.output) == (EXIT_CONFIG, "")
    (line,) = ended.errors
    assert line.startswith("VQA_RABBITMQ_URL: the broker refuses this user name and password")
    assert "s3cr3t" not in line


async def test_all_queues_and_exchanges_with_other_arguments_are_reported_with_the_difference(
    stack: Stack, vhost: str, url: str, tmp_path: Path
) -> None:
    limited = {"durable": True, "arguments": {"x-queue-type": "quorum", "x-delivery-limit": 3}}
    for kind, name, body in (
        ("queues", "vqa.results", {"durable": True}),
        ("queues", "vqa.jobs.dead", limited),
        ("exchanges", "vqa.jobs.control", {"type": "direct", "durable": True}),
    ):
        await asyncio.to_thread(administer, stack, "PUT", f"/api/{kind}/{vhost}/{name}", body)
    ended = await run(tmp_path, "apply", VQA_RABBITMQ_URL=url)
    assert (ended.code, ended.output) == (EXIT_CONFIG, "")
    dead, results, control = ended.errors
    assert dead.startswith("queue vqa.jobs.dead exists with other arguments: ")
    assert "x-delivery-limit" in dead
    assert results.startswith("queue vqa.results exists with other arguments: ")
    assert "x-queue-type" in results
    assert control.startswith("exchange vqa.jobs.control exists with other arguments: ")
    assert "'fanout'" in control
    assert "'direct'" in control


async def test_missing_permissions_are_reported_with_the_queue(
    stack: Stack, vhost: str, tmp_path: Path
) -> None:
    with BrokerUser.of(stack, vhost=vhost) as user:
        user.permit(configure=r"^vqa\.(results|jobs|jobs\.retry.*)$", write="^$")
        ended = await run(tmp_path, "apply", VQA_RABBITMQ_URL=user.url, VQA_RETRY_DELAYS="1")
    assert (ended.code, ended.output) == (EXIT_CONFIG, "")
    assert [line.partition(":")[0] for line in ended.errors] == [
        "queue vqa.jobs.dead",
        "queue vqa.jobs",
        "queue vqa.jobs.retry.1s",
        "exchange vqa.jobs.control",
    ]
    assert all("lacks a permission" in line for line in ended.errors)
    # To declare a queue that dead-letters to the default exchange, a user needs write permission on it.
    assert ["amq.default" in line for line in ended.errors] == [False, True, True, False]
    assert not any("VQA_DECLARE_TOPOLOGY" in line for line in ended.errors)


async def test_an_invalid_value_of_a_required_setting_is_reported_before_any_connection(
    stack: Stack, tmp_path: Path
) -> None:
    async with Proxy.before(stack.rabbitmq.url) as proxy:
        ended = await run(
            tmp_path,
            "apply",
            VQA_RABBITMQ_URL=proxy.url(stack.rabbitmq.url),
            VQA_RETRY_DELAYS="1.5",
            VQA_RESULTS_QUEUE="vqa.jobs",
            VQA_MAX_ATTEMPTS="none of its business",
        )
        assert proxy.accepted == 0
    assert ended.code == EXIT_CONFIG
    assert sorted(line.partition(":")[0] for line in ended.errors) == [
        "VQA_RESULTS_QUEUE",
        "VQA_RETRY_DELAYS",
    ]


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon"])
async def test_a_timeout_must_be_a_number_of_seconds(tmp_path: Path, seconds: str) -> None:
    ended = await run(tmp_path, "apply", f"--timeout={seconds}")
    assert ended.code == 2
    assert f"{seconds} is not a number of seconds above 0" in ended.errors[0]


# A worker's own jobs exchange


async def test_a_deleted_jobs_exchange_is_created_again_and_no_job_is_lost(
    stack: Stack, start_worker: StartWorker, client_of: MakeClient
) -> None:
    marker, exchange = uuid.uuid4().hex, f"back-{uuid.uuid4().hex}"
    stack.model.play(Error(status=500), marker=marker, times=2)
    worker = await start_worker(wait=False, VQA_JOBS_EXCHANGE=exchange)
    worker.patch = FEW_COPY_TRIES
    await worker.start()
    client = await client_of(worker)
    async with await connect(stack.rabbitmq.url) as connection:
        channel = await connection.channel()
        await channel.exchange_delete(exchange)
        reply = await client.ask(**job(marker))
        assert (reply.body["status"], reply.body["attempts"]) == ("succeeded", 3)
        await channel.exchange_delete(exchange)
    assert await client.depth(worker.jobs_queue) == 0
    assert await worker.stop() == 0
