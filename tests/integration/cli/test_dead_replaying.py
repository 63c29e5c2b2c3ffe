"""`vqa-worker dlq replay`: letters are put back as they were, and are never lost on the way."""

import asyncio
import json
import signal
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from deploy.local.stack import Stack
from tests.breaking import BrokerUser, job
from tests.integration.cli.dead_letters import Queues, broker_of, buried, ids_of, looked, state
from tests.integration.cli.running import Cli, commands, ended, killed
from tests.integration.cli.terminal import Terminal
from tests.proxy import Proxy
from tests.running import until
from worker.cli.dlq import bulk
from worker.rabbitmq import dead_letters
from worker.rabbitmq.connection import BrokerUnreachableError
from worker.rabbitmq.dead_letters import FetchedDeadLetter

BASIC_ACK = b"\x00\x3c\x00\x50"


@pytest.fixture
def cli(stack: Stack, tmp_path: Path) -> Iterator[Cli]:
    with commands(stack, tmp_path) as cli:
        yield cli


@pytest.fixture
async def queues(stack: Stack, cli: Cli) -> AsyncIterator[Queues]:
    async with Queues.of(stack, cli) as queues:
        yield queues


async def test_nothing_is_done_before_it_is_agreed_to(cli: Cli, queues: Queues) -> None:
    ids = await buried(queues, 2)
    for action in ("replay", "purge"):
        dry = await cli.told("dlq", action, "--code", "*", "--dry-run")
        assert [(it["action"], it["done"], it["job_id"]) for it in dry] == [(action, False, it) for it in ids]
        result = await cli.run("dlq", action, "--code", "*")
        assert result.code == 2
        assert result.warnings_[-1].endswith("nothing was done: add --yes to do it")
        assert all(it in result.out for it in ids)
        asked = Terminal(cli, "dlq", action, "--code", "*")
        await asked.shows(r"Go on\? \[y/N\]")
        asked.type("\n")
        assert await asked.ended() == 0
    assert await queues.depth(queues.dead) == 2
    assert not state(cli).exists()
    asked = Terminal(cli, "dlq", "replay")
    await asked.shows(r"2 \(2 attempts_exhausted\) will be put back on")
    asked.type("y\n")
    assert await asked.ended() == 0
    assert f"replay: 2 of 2 done, recorded in {state(cli)}/replayed.jsonl" in asked.shown
    assert sorted(ids_of(await queues.emptied(queues.jobs))) == sorted(ids)


async def test_only_what_was_chosen_is_put_back_and_what_will_fail_again_is_told(
    cli: Cli, queues: Queues
) -> None:
    late = job(deadline="2020-01-01T00:00:00Z")
    await queues.bury(late)
    kept = await buried(queues, 2, code="model_gone")
    await queues.bury(b"{", "invalid_job", message_id="broken")
    result = await cli.run("dlq", "replay", "--code", "a*", "--code", "inv*", "--yes")
    assert result.code == 0
    assert result.warnings_ == [
        f"{queues.dead}: 4 letters, 2 of them chosen",
        "1 with a deadline that has passed: the worker will refuse them (deadline_exceeded)",
        "1 that are no jobs (invalid_job): they will be back, unless the worker has changed",
        f"replay: 2 of 2 done, recorded in {state(cli)}/replayed.jsonl",
    ]
    assert sorted(ids_of(await queues.emptied(queues.dead))) == sorted(kept)
    assert {message.message_id for message in await queues.emptied(queues.jobs)} >= {"broken"}


async def test_a_replay_that_is_killed_has_lost_nothing(stack: Stack, cli: Cli, queues: Queues) -> None:
    ids = await buried(queues, 6)
    async with Proxy.before(stack.rabbitmq.url) as proxy:
        behind = cli.having(VQA_RABBITMQ_URL=proxy.url(stack.rabbitmq.url))
        process = behind.start("dlq", "replay", "--yes", "--rate", "50", "--json")
        assert process.stdout is not None
        for _ in range(2):
            await asyncio.to_thread(process.stdout.readline)
        # A job is confirmed, and its letter is about to be acked.
        proxy.freezes_on = BASIC_ACK
        await until(lambda: proxy.held, "it is about to ack a letter")
        await killed(process)
        proxy.reset()
        back = await queues.depth(queues.jobs)
        await queues.filled(queues.dead, len(ids) - back + 1)
    recorded = [json.loads(line) for line in (state(cli) / "replayed.jsonl").read_text().splitlines()]
    assert len(recorded) == back
    found = Counter(ids_of(await queues.emptied(queues.jobs) + await queues.emptied(queues.dead)))
    assert set(found) == set(ids)
    assert sorted(found.values()) == [1] * (len(ids) - 1) + [2]


async def test_ctrl_c_ends_a_replay_between_two_letters(cli: Cli, queues: Queues) -> None:
    ids = await buried(queues, 5)
    process = cli.start("dlq", "replay", "--yes", "--rate", "0.5", "--json")
    assert process.stdout is not None
    await asyncio.to_thread(process.stdout.readline)
    process.send_signal(signal.SIGINT)
    done = await ended(process)
    assert done.code == 130
    assert done.warnings_[-1] == f"replay: 1 of 5 done, recorded in {state(cli)}/replayed.jsonl"
    assert "Traceback" not in done.err
    await queues.filled(queues.dead, 4)
    found = ids_of(await queues.emptied(queues.jobs) + await queues.emptied(queues.dead))
    assert sorted(found) == sorted(ids)


async def test_a_replay_goes_on_after_the_connection_was_lost(stack: Stack, cli: Cli, queues: Queues) -> None:
    ids = await buried(queues, 6)
    async with Proxy.before(stack.rabbitmq.url) as proxy:
        behind = cli.having(VQA_RABBITMQ_URL=proxy.url(stack.rabbitmq.url))
        process = behind.start("dlq", "replay", "--yes", "--rate", "10", "--json")
        assert process.stdout is not None
        for _ in range(2):
            await asyncio.to_thread(process.stdout.readline)
        proxy.reset()
        assert (await ended(process)).code == 0
    assert await queues.depth(queues.dead) == 0
    found = Counter(ids_of(await queues.emptied(queues.jobs)))
    assert set(found) == set(ids)
    assert found.total() <= len(ids) + 1


async def test_letters_that_are_passed_over_are_not_held_for_longer_than_a_round(
    stack: Stack, queues: Queues, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "HOLD_S", 0.0)
    others = await buried(queues, 3, code="other")
    await buried(queues, 4)
    wanted = Counter(held.record.name for held in await looked(stack, queues) if held.record.code != "other")
    begun = []

    async def step(dead: dead_letters.DeadLetters, held: FetchedDeadLetter) -> None:
        begun.append(held.record.returns)
        await dead.replay(held)

    await bulk.process(broker_of(stack), queues.topology, wanted, step, rate=None, timeout_s=15.0)
    assert (wanted.total(), len(begun)) == (0, 4)
    assert sorted(ids_of(await queues.emptied(queues.dead))) == sorted(others)


async def test_a_broker_that_goes_away_again_and_again_is_given_up(
    stack: Stack, queues: Queues, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "PAUSE_S", 0.0)
    await buried(queues, 3)
    wanted = Counter(held.record.name for held in await looked(stack, queues))
    tried = []

    async def step(_: dead_letters.DeadLetters, held: FetchedDeadLetter) -> None:
        tried.append(held.record.name)
        if len(tried) > 1:
            raise ConnectionResetError

    with pytest.raises(BrokerUnreachableError, match="the connection was lost 3 times in a row"):
        await bulk.process(broker_of(stack), queues.topology, wanted, step, rate=None, timeout_s=15.0)
    # The first was worked off, before the broker went away for the first time.
    assert (len(tried), wanted.total()) == (5, 2)
    await queues.filled(queues.dead, 2)


async def test_an_ack_that_was_lost_with_the_connection_counts_if_the_broker_got_it(
    stack: Stack, queues: Queues, monkeypatch: pytest.MonkeyPatch
) -> None:
    await buried(queues, 3)
    wanted = Counter(held.record.name for held in await looked(stack, queues))
    ack, acked = FetchedDeadLetter.ack, []

    async def ack_and_lose_the_connection(fetched: FetchedDeadLetter) -> None:
        await ack(fetched)
        acked.append(fetched.record.name)
        if len(acked) == 1:
            await queues.filled(queues.dead, 2)
            raise ConnectionResetError

    async def step(dead: dead_letters.DeadLetters, held: FetchedDeadLetter) -> None:
        await dead.replay(held)

    monkeypatch.setattr(FetchedDeadLetter, "ack", ack_and_lose_the_connection)
    await bulk.process(broker_of(stack), queues.topology, wanted, step, rate=None, timeout_s=15.0)
    assert (len(acked), wanted.total()) == (3, 0)
    assert await queues.depth(queues.jobs) == 3


async def test_letters_that_somebody_else_took_meanwhile_are_told(cli: Cli, queues: Queues) -> None:
    await buried(queues, 2)
    asked = Terminal(cli, "dlq", "purge", "--all")
    await asked.shows(r"Go on\? \[y/N\]")
    await queues.emptied(queues.dead)
    asked.type("y\n")
    assert await asked.ended() == 1
    assert "purge: 0 of 2 done" in asked.shown
    assert "2 were not there any more" in asked.shown


async def test_without_a_jobs_queue_letters_stay_where_they_are(cli: Cli, queues: Queues) -> None:
    ids = await buried(queues, 2)
    await queues.delete(queues.jobs)
    result = await cli.run("dlq", "replay", "--yes")
    assert result.code == 1
    assert result.warnings_[-2:] == [
        f"replay: 0 of 2 done, recorded in {state(cli)}/replayed.jsonl",
        (
            f"the default exchange does not route to the queue {queues.jobs}:"
            " `vqa-worker topology apply` creates what is missing"
        ),
    ]
    assert sorted(ids_of(await queues.emptied(queues.dead))) == sorted(ids)


async def test_letters_go_back_by_the_exchange_for_jobs(stack: Stack, tmp_path: Path) -> None:
    exchange = f"back-{uuid.uuid4().hex}"
    cli = Cli.of(stack, tmp_path, VQA_JOBS_EXCHANGE=exchange)
    async with Queues.of(stack, cli) as queues:
        ids = await buried(queues, 1)
        with BrokerUser.of(stack) as user:
            user.permit(write=f"^{exchange}$")
            by_user = cli.having(VQA_RABBITMQ_URL=user.url)
            for _ in range(dead_letters.MAX_RETURNS + 2):
                assert len(await by_user.told("dlq", "list")) == 1
            assert (await by_user.run("dlq", "replay", "--yes")).code == 0
        (message,) = await queues.emptied(queues.jobs)
        assert (ids_of([message]), message.exchange) == (ids, exchange)
