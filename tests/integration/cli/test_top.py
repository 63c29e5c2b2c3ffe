"""`vqa-worker top` with real workers."""

import asyncio
import json
import shutil
import signal
import subprocess
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from deploy.local.stack import Stack
from tests.breaking import job, said
from tests.conftest import MakeClient, StartWorker
from tests.integration.cli.running import Cli, commands, ended
from tests.integration.cli.terminal import Terminal
from tests.proxy import Proxy
from tests.running import Client, Worker

Process = subprocess.Popen[str]


@pytest.fixture
async def busy(start_worker: StartWorker) -> Worker:
    return await start_worker()


@pytest.fixture
async def client(client_of: MakeClient, busy: Worker) -> Client:
    return await client_of(busy)


@pytest.fixture
async def cli(stack: Stack, tmp_path: Path, busy: Worker) -> AsyncIterator[Cli]:
    with commands(stack, tmp_path, busy) as cli:
        yield cli


async def reading(process: Process) -> AsyncIterator[dict[str, Any]]:
    """Yield the printed objects."""
    assert process.stdout is not None
    while line := await asyncio.to_thread(process.stdout.readline):
        yield json.loads(line)


async def first(process: Process, **wanted: Any) -> dict[str, Any]:
    """Return the first object with these values."""
    async for it in reading(process):
        if all(it[name] == value or (callable(value) and value(it[name])) for name, value in wanted.items()):
            return it
    raise AssertionError((await ended(process)).err)


async def test_the_figures_are_those_of_rabbitmq_and_of_all_workers(
    cli: Cli, busy: Worker, client: Client, start_worker: StartWorker
) -> None:
    other = await start_worker(like=busy)
    urls = [f"--worker=127.0.0.1:{it.port}" for it in (busy, other)]
    process = cli.start("top", "--interval", "0.3", "--json", *urls)
    begun = await first(process)
    assert begun["queues"] == {
        "jobs": 0,
        "retries": 0,
        "results": 0,
        "dead_letters": 0,
        "consumers": begun["queues"]["consumers"],
    }
    assert begun["queues"]["consumers"] >= 2
    assert begun["fleet"]["up"] == 2
    assert [it["error"] for it in begun["workers"]] == [None, None]
    assert begun["fleet"]["per_s"] == dict.fromkeys(
        ("jobs_succeeded", "jobs_failed", "prompt_tokens", "completion_tokens", "cost_usd"), 0.0
    )
    for _ in range(4):
        await client.ask(**job())
    await client.ask(**job(image="s3://nowhere/to-be-found"))
    shown = await first(process, fleet=lambda it: it["per_s"]["jobs_failed"] > 0)
    reported = shown["fleet"]
    assert min(reported["per_s"]["prompt_tokens"], reported["per_s"]["completion_tokens"]) > 0
    assert 0 < reported["latency_s"]["p50"] <= reported["latency_s"]["p99"]
    assert reported["limit"] == sum(it.metric("vqa_concurrency_limit") for it in (busy, other))
    assert reported["cost_usd"] == pytest.approx(sum(it.metric("vqa_cost_usd_total") for it in (busy, other)))
    by_address = {it["address"]: it for it in shown["workers"]}
    for it in (busy, other):
        assert by_address[f"127.0.0.1:{it.port}"]["cost_usd"] == it.metric("vqa_cost_usd_total")
    assert sum(it["cost_usd"] for it in shown["models"]) == pytest.approx(reported["cost_usd"])
    process.send_signal(signal.SIGINT)
    done = await ended(process)
    assert (done.code, done.err) == (130, "")


async def test_a_stopped_worker_is_unreachable_and_its_cost_is_kept(
    cli: Cli, busy: Worker, client: Client
) -> None:
    await client.ask(**job())
    cost = busy.metric("vqa_cost_usd_total")
    process = cli.start("top", "--interval", "0.3", "--json", f"--worker=127.0.0.1:{busy.port}")
    assert (await first(process))["fleet"]["cost_usd"] == pytest.approx(cost)
    busy.kill()
    stopped = await first(process, fleet=lambda it: not it["up"])
    assert stopped["workers"] == [{"address": f"127.0.0.1:{busy.port}", "error": "connection refused"}]
    assert stopped["fleet"]["cost_usd"] == pytest.approx(cost)


async def test_top_survives_a_lost_broker(stack: Stack, cli: Cli, busy: Worker) -> None:
    async with Proxy.before(stack.rabbitmq.url) as proxy:
        behind = cli.with_settings(VQA_RABBITMQ_URL=proxy.url(stack.rabbitmq.url))
        process = behind.start("top", "--interval", "0.3", "--json", f"--worker=127.0.0.1:{busy.port}")
        try:
            assert await first(process, queues=lambda it: it is not None)
            await proxy.refuse()
            proxy.reset()
            alone = await first(process, queues=None)
            assert alone["fleet"]["up"] == 1
            await proxy.accept()
            assert await first(process, queues=lambda it: it is not None)
        finally:
            behind.end_all()


async def test_paused_dependencies_are_shown(
    cli: Cli, start_worker: StartWorker, client: Client, busy: Worker
) -> None:
    assert await busy.stop() == 0
    paused = await start_worker(like=busy, VQA_MODEL_BASE_URL="http://127.0.0.1:1/v1")
    await client.publish(job())
    await said(paused, "paused")
    (reported,) = await cli.run_json(
        "top", "--once", "--interval", "0.2", f"--worker=127.0.0.1:{paused.port}"
    )
    assert reported["fleet"]["paused"] == {"model": 1}
    assert [it["paused"] for it in reported["workers"]] == [["model"]]


async def test_without_workers_only_queues_are_shown(cli: Cli, client: Client, busy: Worker) -> None:
    assert await busy.stop() == 0
    await client.publish(job())
    (reported,) = await cli.run_json("top", "--once", "--interval", "9999")
    assert reported["workers"] is None
    assert reported["queues"]["jobs"] == 1
    assert reported["fleet"] is None
    shown = await cli.run("top", "--once")
    assert "queues  1 ready, 0 in retry, 0 dead-lettered, 0 results, 0 consumers" in shown.lines


async def test_the_live_view_refreshes_until_ctrl_c(cli: Cli, busy: Worker, client: Client) -> None:
    seen = Terminal(
        cli, "top", "--interval", "0.3", f"--worker=127.0.0.1:{busy.port}", "--worker=127.0.0.1:1", columns=80
    )
    await seen.shows(r"1 up, 1 unreachable")
    await seen.shows(r"127\.0\.0\.1:1 .* unreachable:\s+connection\s+refused")
    await client.ask(**job())
    await seen.shows(r"0\.[1-9]/s, 0\.0/s failed")
    await seen.shows(rf"127\.0\.0\.1:{busy.port} +0\.[1-9] +0\.0 .* up")
    seen.process.send_signal(signal.SIGINT)
    assert await seen.ended() == 130
    assert "Traceback" not in seen.shown


async def test_a_missing_queue_or_broker_at_the_start_is_an_error(cli: Cli) -> None:
    missing = cli.with_settings(VQA_JOBS_QUEUE=f"no-{uuid.uuid4().hex}")
    result = await missing.run("top", "--once")
    assert result.code == 1
    (line,) = result.err_lines
    assert line.startswith(f"Error: the queue {missing.jobs_queue} does not exist, or")
    away = await cli.with_settings(VQA_RABBITMQ_URL="amqp://127.0.0.1:1/").run(
        "top", "--once", "--timeout", "0.3"
    )
    assert (away.code, len(away.err_lines)) == (1, 1)
    assert "unreachable for 0.3 s" in away.err


async def test_a_server_that_is_not_a_worker_is_unreachable(cli: Cli, stack: Stack) -> None:
    other = stack.rabbitmq.management_url
    (reported,) = await cli.run_json("top", "--once", "--worker", other, "--worker", "no.such.host.invalid")
    assert reported["fleet"]["up"] == 0
    no_metrics, no_host = reported["workers"]
    assert no_metrics == {"address": other.removeprefix("http://"), "error": no_metrics["error"]}
    assert no_metrics["error"] in {"no metrics of a vqa-worker", "HTTP 404"}
    assert no_host["address"] == "no.such.host.invalid:8080"
    assert no_host["error"]


# Gives several local addresses one name, for one command.
NAMED = """
hosts=$1; shift
exec unshare --mount sh -c 'mount --bind "$0" /etc/hosts && exec "$@"' "$hosts" "$@"
"""


def may_name_addresses() -> bool:
    """Return whether a command can have its own /etc/hosts."""
    tried = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)  # noqa: S607
    return tried.returncode == 0


@pytest.mark.skipif(
    shutil.which("unshare") is None or not may_name_addresses(),
    reason="a name for several addresses of this machine takes root and `unshare`",
)
async def test_each_address_of_a_name_is_a_worker(cli: Cli, busy: Worker, start_worker: StartWorker) -> None:
    await start_worker(like=busy, VQA_HTTP_HOST="127.0.0.2", VQA_HTTP_PORT=str(busy.port))
    hosts = cli.folder / "hosts"
    hosts.write_text("127.0.0.1 localhost fleet\n127.0.0.2 fleet\n127.0.0.3 fleet\n")
    cli.command = ["sh", "-c", NAMED, "sh", str(hosts), *cli.command]
    (reported,) = await cli.run_json("top", "--once", "--interval", "0.2", f"--worker=fleet:{busy.port}")
    assert reported["fleet"]["up"] == 2
    assert [it["address"] for it in reported["workers"] if it["error"]] == [f"127.0.0.3:{busy.port}"]
