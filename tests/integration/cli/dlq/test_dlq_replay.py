"""`vqa-worker dlq replay`: jobs are moved unchanged, and none is lost."""

import asyncio
import json
import signal
import uuid
from collections import Counter
from pathlib import Path

import pytest

from deploy.local.stack import Stack
from tests.breaking import BrokerUser, job
from tests.integration.cli.dlq.dead_letters import (
    Queues,
    add_dead_letters,
    broker_of,
    ids_of,
    read_dead_letters,
    state,
)
from tests.integration.cli.running import Cli, ended, kill
from tests.integration.cli.terminal import Terminal
from tests.proxy import Proxy
from tests.running import until
from worker.rabbitmq import bulk, dead_letters
from worker.rabbitmq.dead_letters import FetchedDeadLetter

BASIC_ACK = b"\x00\x3c\x00\x50"


async def test_replay_and_purge_change_nothing_before_confirmation(cli: Cli, queues: Queues) -> None:
    ids = await add_dead_letters(queues, 2)
    for action in ("replay", "purge"):
        dry = await cli.run_json("dlq", action, "--code", "*", "--dry-run")
        assert [(it["action"], it["done"], it["job_id"]) for it in dry] == [(action, False, it) for it in ids]
        result = await cli.run("dlq", action, "--code", "*")
        assert result.code == 2
        assert result.err_lines[-1].endswith("there is no terminal to ask at. Add --yes.")
        assert all(it in result.out for it in ids)
        asked = Terminal(cli, "dlq", action, "--code", "*")
        await asked.shows(r"Continue\? \[y/N\]")
        asked.type("\n")
        assert await asked.ended() == 1
    assert await queues.depth(queues.dead) == 2
    assert not state(cli).exists()
    asked = Terminal(cli, "dlq", "replay")
    await asked.shows(r"2 dead letters will be moved to")
    asked.type("y\n")
    assert await asked.ended() == 0
    assert f"replay: 2 of 2 done; log: {state(cli)}/replayed.jsonl" in asked.shown
    assert sorted(ids_of(await queues.drain(queues.jobs))) == sorted(ids)


async def test_replay_moves_matching_jobs_and_warns_about_those_that_will_fail_again(
    cli: Cli, queues: Queues
) -> None:
    late = job(deadline="2020-01-01T00:00:00Z")
    await queues.dead_letter(late)
    kept = await add_dead_letters(queues, 2, code="model_missing")
    await queues.dead_letter(b"{", "invalid_job", message_id="broken")
    result = await cli.run("dlq", "replay", "--code", "a*", "--code", "inv*", "--yes")
    assert result.code == 0
    assert result.err_lines == [
        f"{queues.dead}: 4 dead letters, 2 matching",
        "Warning: 1 job past the deadline will fail again (deadline_exceeded)",
        f"replay: 2 of 2 done; log: {state(cli)}/replayed.jsonl",
    ]
    assert sorted(ids_of(await queues.drain(queues.dead))) == sorted(kept)
    assert {message.message_id for message in await queues.drain(queues.jobs)} >= {"broken"}


async def test_a_replay_that_is_killed_loses_no_job(stack: Stack, cli: Cli, queues: Queues) -> None:
    ids = await add_dead_letters(queues, 6)
    async with Proxy.before(stack.rabbitmq.url) as proxy:
        proxy.freezes_on, proxy.passes = BASIC_ACK, 2
        behind = cli.with_settings(VQA_RABBITMQ_URL=proxy.url(stack.rabbitmq.url))
        process = behind.start("dlq", "replay", "--yes")
        # The job is confirmed; the command is about to ack its dead letter.
        await until(lambda: proxy.held, "the command is about to ack a message")
        await kill(process)
        proxy.reset()
        back = await queues.depth(queues.jobs)
        await queues.until_depth(queues.dead, len(ids) - back + 1)
    recorded = [json.loads(line) for line in (state(cli) / "replayed.jsonl").read_text().splitlines()]
    assert len(recorded) == back
    found = Counter(ids_of(await queues.drain(queues.jobs) + await queues.drain(queues.dead)))
    assert set(found) == set(ids)
    assert sorted(found.values()) == [1] * (len(ids) - 1) + [2]


async def test_ctrl_c_stops_a_replay_between_two_jobs(stack: Stack, cli: Cli, queues: Queues) -> None:
    ids = await add_dead_letters(queues, 5)
    async with Proxy.before(stack.rabbitmq.url) as proxy:
        # The second job is replayed, and its dead letter not acked: the command finishes it.
        proxy.freezes_on, proxy.passes = BASIC_ACK, 1
        behind = cli.with_settings(VQA_RABBITMQ_URL=proxy.url(stack.rabbitmq.url))
        process = behind.start("dlq", "replay", "--yes", "--json")
        await until(lambda: proxy.held, "the command is about to ack a message")
        process.send_signal(signal.SIGINT)
        await asyncio.sleep(0.2)
        proxy.thaw()
        done = await ended(process)
    assert done.code == 130
    assert done.err_lines[-1] == f"replay: 2 of 5 done; log: {state(cli)}/replayed.jsonl"
    assert "Traceback" not in done.err
    await queues.until_depth(queues.dead, 3)
    found = ids_of(await queues.drain(queues.jobs) + await queues.drain(queues.dead))
    assert sorted(found) == sorted(ids)


async def _at_least(queues: Queues, count: int) -> bool:
    return await queues.depth(queues.dead) + await queues.depth(queues.jobs) >= count


async def test_after_a_lost_connection_the_same_command_replays_the_rest(
    stack: Stack, cli: Cli, queues: Queues
) -> None:
    ids = await add_dead_letters(queues, 6)
    async with Proxy.before(stack.rabbitmq.url) as proxy:
        proxy.freezes_on, proxy.passes = BASIC_ACK, 2
        behind = cli.with_settings(VQA_RABBITMQ_URL=proxy.url(stack.rabbitmq.url))
        process = behind.start("dlq", "replay", "--yes", "--json")
        await until(lambda: proxy.held, "the command is about to ack a message")
        proxy.thaw()
        proxy.reset()
        lost = await ended(process)
    assert lost.code == 1
    assert "Run the command again for the rest" in json.loads(lost.err_lines[-1])["error"]
    # Also the last one that was moved, if its ack was lost.
    await until(lambda: _at_least(queues, 6), "the others are on their queue again")
    assert (await cli.run("dlq", "replay", "--yes")).code == 0
    assert await queues.depth(queues.dead) == 0
    found = Counter(ids_of(await queues.drain(queues.jobs)))
    assert set(found) == set(ids)
    assert found.total() <= len(ids) + 1


async def test_dead_letters_that_do_not_match_are_requeued_after_each_round(
    stack: Stack, queues: Queues, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "HOLD_S", 0.0)
    others = await add_dead_letters(queues, 3, code="other")
    await add_dead_letters(queues, 4)
    wanted = Counter(
        held.record.name for held in await read_dead_letters(stack, queues) if held.record.code != "other"
    )
    begun = []

    async def step(dead: dead_letters.DeadLetters, held: FetchedDeadLetter) -> None:
        begun.append(held.record.returns)
        await dead.replay(held)

    await bulk.process(broker_of(stack), queues.topology, wanted, step, timeout_s=15.0)
    assert (wanted.total(), len(begun)) == (0, 4)
    assert sorted(ids_of(await queues.drain(queues.dead))) == sorted(others)


async def test_dead_letters_removed_meanwhile_are_reported(cli: Cli, queues: Queues) -> None:
    await add_dead_letters(queues, 2)
    asked = Terminal(cli, "dlq", "purge", "--all")
    await asked.shows(r"Continue\? \[y/N\]")
    await queues.drain(queues.dead)
    asked.type("y\n")
    assert await asked.ended() == 1
    assert "purge: 0 of 2 done" in asked.shown
    assert "2 dead letters not found" in asked.shown


async def test_without_a_jobs_queue_dead_letters_stay_on_their_queue(cli: Cli, queues: Queues) -> None:
    ids = await add_dead_letters(queues, 2)
    await queues.delete(queues.jobs)
    result = await cli.run("dlq", "replay", "--yes")
    assert result.code == 1
    assert result.err_lines[-2:] == [
        f"replay: 0 of 2 done; log: {state(cli)}/replayed.jsonl",
        (
            f"Error: the default exchange does not route to the queue {queues.jobs}:"
            " `vqa-worker topology apply` creates what is missing"
        ),
    ]
    assert sorted(ids_of(await queues.drain(queues.dead))) == sorted(ids)


async def test_replay_publishes_to_the_jobs_exchange(stack: Stack, tmp_path: Path) -> None:
    exchange = f"back-{uuid.uuid4().hex}"
    cli = Cli.of(stack, tmp_path, VQA_JOBS_EXCHANGE=exchange)
    async with Queues.of(stack, cli) as queues:
        ids = await add_dead_letters(queues, 1)
        with BrokerUser.of(stack) as user:
            user.permit(write=f"^{exchange}$")
            by_user = cli.with_settings(VQA_RABBITMQ_URL=user.url)
            for _ in range(dead_letters.MAX_RETURNS + 2):
                assert len(await by_user.run_json("dlq", "list")) == 1
            assert (await by_user.run("dlq", "replay", "--yes")).code == 0
        (message,) = await queues.drain(queues.jobs)
        assert (ids_of([message]), message.exchange) == (ids, exchange)
