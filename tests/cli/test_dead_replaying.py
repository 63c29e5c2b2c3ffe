"""`vqa-worker dead replay`: letters are put back as they were, and are never lost on the way."""

import asyncio
import json
import signal
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from deploy.local.stack import Stack
from tests.breaking import BrokerUser, job
from tests.cli.dead_letters import Queues, broker_of, buried, ids_of, looked
from tests.cli.typing_in import Terminal
from tests.proxy import Proxy
from tests.running import until
from worker.rabbit import letters, rounds
from worker.rabbit.letters import Held

BASIC_ACK = b"\x00\x3c\x00\x50"


@pytest.fixture
def terminal(stack: Stack, tmp_path: Path) -> Terminal:
    return Terminal.beside(stack, tmp_path)


@pytest.fixture
async def queues(stack: Stack, terminal: Terminal) -> AsyncIterator[Queues]:
    async with Queues.of(stack, terminal) as queues:
        yield queues


async def test_nothing_is_done_before_it_is_agreed_to(terminal: Terminal, queues: Queues) -> None:
    ids = await buried(queues, 2)
    for action in ("replay", "purge"):
        dry = await terminal.told("dead", action, "--code", "*", "--dry-run")
        assert [(it["action"], it["done"], it["job_id"]) for it in dry] == [(action, False, it) for it in ids]
        ended = await terminal.run("dead", action, "--code", "*")
        assert ended.code == 2
        assert ended.errors[-1].endswith("nothing was done: add --yes to do it")
        assert all(it in ended.output for it in ids)
        with terminal.watched("dead", action, "--code", "*") as watched:
            await watched.sees("Go on? [y/N]")
            watched.type("\n")
            assert await watched.ended() == 0
    assert await queues.depth(queues.dead) == 2
    assert list(terminal.folder.iterdir()) == []
    with terminal.watched("dead", "replay") as watched:
        await watched.sees("2 (2 attempts_exhausted) will be put back on")
        watched.type("y\n")
        assert await watched.ended() == 0
    assert "replay: 2 of 2 done, recorded in vqa-replayed.jsonl" in watched.screen
    assert sorted(ids_of(await queues.emptied(queues.jobs))) == sorted(ids)


async def test_only_what_was_chosen_is_put_back_and_what_will_fail_again_is_told(
    terminal: Terminal, queues: Queues
) -> None:
    late = job(deadline="2020-01-01T00:00:00Z")
    await queues.bury(late)
    kept = await buried(queues, 2, code="model_gone")
    await queues.bury(b"{", "invalid_job", message_id="broken")
    ended = await terminal.run("dead", "replay", "--code", "a*", "--code", "inv*", "--yes")
    assert ended.code == 0
    assert ended.errors == [
        f"{queues.dead}: 4 letters, 2 of them chosen",
        "1 with a deadline that has passed: the worker will refuse them (deadline_exceeded)",
        "1 that are no jobs (invalid_job): they will be back, unless the worker has changed",
        "replay: 2 of 2 done, recorded in vqa-replayed.jsonl",
    ]
    assert sorted(ids_of(await queues.emptied(queues.dead))) == sorted(kept)
    assert {message.message_id for message in await queues.emptied(queues.jobs)} >= {"broken"}


async def test_a_replay_that_is_killed_has_lost_nothing(
    stack: Stack, terminal: Terminal, queues: Queues
) -> None:
    ids = await buried(queues, 6)
    async with Proxy.before(stack.rabbitmq.url) as proxy:
        behind = terminal.having(VQA_RABBITMQ_URL=proxy.url(stack.rabbitmq.url))
        with behind.started("dead", "replay", "--yes", "--rate", "50", "--json") as process:
            assert process.stdout is not None
            for _ in range(2):
                await asyncio.to_thread(process.stdout.readline)
            # A job is confirmed, and its letter is about to be acked.
            proxy.freezes_on = BASIC_ACK
            await until(lambda: proxy.held, "it is about to ack a letter")
            process.send_signal(signal.SIGKILL)
            process.wait()
        proxy.reset()
        back = await queues.depth(queues.jobs)
        await queues.filled(queues.dead, len(ids) - back + 1)
    recorded = [
        json.loads(line) for line in (terminal.folder / "vqa-replayed.jsonl").read_text().splitlines()
    ]
    assert len(recorded) == back
    found = Counter(ids_of(await queues.emptied(queues.jobs) + await queues.emptied(queues.dead)))
    assert set(found) == set(ids)
    assert sorted(found.values()) == [1] * (len(ids) - 1) + [2]


async def test_ctrl_c_ends_a_replay_between_two_letters(terminal: Terminal, queues: Queues) -> None:
    ids = await buried(queues, 5)
    with terminal.started("dead", "replay", "--yes", "--rate", "0.5", "--json") as process:
        assert process.stdout is not None
        await asyncio.to_thread(process.stdout.readline)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "replay: 1 of 5 done, recorded in vqa-replayed.jsonl"
    assert "Traceback" not in errors
    await queues.filled(queues.dead, 4)
    found = ids_of(await queues.emptied(queues.jobs) + await queues.emptied(queues.dead))
    assert sorted(found) == sorted(ids)


async def test_a_replay_goes_on_after_the_connection_was_lost(
    stack: Stack, terminal: Terminal, queues: Queues
) -> None:
    ids = await buried(queues, 6)
    async with Proxy.before(stack.rabbitmq.url) as proxy:
        behind = terminal.having(VQA_RABBITMQ_URL=proxy.url(stack.rabbitmq.url))
        with behind.started("dead", "replay", "--yes", "--rate", "10", "--json") as process:
            assert process.stdout is not None
            for _ in range(2):
                await asyncio.to_thread(process.stdout.readline)
            proxy.reset()
            assert await asyncio.to_thread(process.wait, 30) == 0
    assert await queues.depth(queues.dead) == 0
    found = Counter(ids_of(await queues.emptied(queues.jobs)))
    assert set(found) == set(ids)
    assert found.total() <= len(ids) + 1


async def test_letters_that_are_passed_over_are_not_held_for_longer_than_a_round(
    stack: Stack, queues: Queues, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "HOLD_S", 0.0)
    others = await buried(queues, 3, code="other")
    await buried(queues, 4)
    wanted = Counter(held.letter.name for held in await looked(stack, queues) if held.letter.code != "other")
    begun = []

    async def step(dead: letters.DeadLetters, held: Held) -> None:
        begun.append(held.letter.returns)
        await dead.put_back(held)

    await rounds.work_off(broker_of(stack), queues.topology, wanted, step, rate=None, patience_s=15.0)
    assert (wanted.total(), len(begun)) == (0, 4)
    assert sorted(ids_of(await queues.emptied(queues.dead))) == sorted(others)


async def test_letters_that_somebody_else_took_meanwhile_are_told(terminal: Terminal, queues: Queues) -> None:
    await buried(queues, 2)
    with terminal.watched("dead", "purge", "--all") as watched:
        await watched.sees("Go on? [y/N]")
        await queues.emptied(queues.dead)
        watched.type("y\n")
        assert await watched.ended() == 1
    assert "purge: 0 of 2 done" in watched.screen
    assert "2 were not there any more" in watched.screen


async def test_without_a_jobs_queue_letters_stay_where_they_are(terminal: Terminal, queues: Queues) -> None:
    ids = await buried(queues, 2)
    await queues.delete(queues.jobs)
    ended = await terminal.run("dead", "replay", "--yes")
    assert ended.code == 1
    assert ended.errors[-2:] == [
        "replay: 0 of 2 done, recorded in vqa-replayed.jsonl",
        (
            f"nothing gets to the queue {queues.jobs} by the default exchange:"
            " `vqa-worker topology apply` makes what is missing"
        ),
    ]
    assert sorted(ids_of(await queues.emptied(queues.dead))) == sorted(ids)


async def test_letters_go_back_by_the_exchange_for_jobs(stack: Stack, tmp_path: Path) -> None:
    exchange = f"back-{uuid.uuid4().hex}"
    terminal = Terminal.beside(stack, tmp_path, VQA_JOBS_EXCHANGE=exchange)
    async with Queues.of(stack, terminal) as queues:
        ids = await buried(queues, 1)
        with BrokerUser.of(stack) as user:
            user.permit(write=f"^{exchange}$")
            by_user = terminal.having(VQA_RABBITMQ_URL=user.url)
            for _ in range(letters.MOST_RETURNS + 2):
                assert len(await by_user.told("dead", "list")) == 1
            assert (await by_user.run("dead", "replay", "--yes")).code == 0
        (message,) = await queues.emptied(queues.jobs)
        assert (ids_of([message]), message.exchange) == (ids, exchange)
