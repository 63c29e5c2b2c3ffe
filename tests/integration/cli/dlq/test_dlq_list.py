"""`vqa-worker dlq list` and `show`: filters, output, and that reading loses no message."""

from datetime import UTC, datetime, timedelta

import aio_pika
import pytest

from deploy.local.stack import Stack
from tests.breaking import BrokerUser, administer, broker_version, job
from tests.integration.cli.dlq.dead_letters import Queues, add_dead_letters, read_dead_letters
from tests.integration.cli.running import Cli, kill
from tests.integration.cli.terminal import Terminal
from tests.proxy import Proxy
from tests.running import until
from worker.rabbitmq import dead_letters


async def test_list_filters_by_error_time_and_id(cli: Cli, queues: Queues) -> None:
    await queues.dead_letter(job(id="a", model="m/small"), ago_s=7200)
    await queues.dead_letter(job(id="b"), ago_s=60)
    await queues.dead_letter(b"{broken", "invalid_job", ago_s=3 * 86400, message_id="c")
    await queues.dead_letter({"no": "job", "model": "m/small"}, "invalid_job", ago_s=7200, message_id="d")
    assert [dead_letter["job_id"] for dead_letter in await cli.run_json("dlq", "list")] == [
        "c",
        "a",
        "d",
        "b",
    ]
    chosen = ("--code", "attempts_*", "--code", "missing", "--since", "1d", "--until", "1h")
    assert [
        dead_letter["job_id"] for dead_letter in await cli.run_json("dlq", "list", *chosen, "a", "b")
    ] == ["a"]
    ended = await cli.run("dlq", "list", "--code", "nothing")
    assert (ended.code, ended.out) == (0, "")
    assert ended.err_lines == [f"{queues.dead}: 4 dead letters, 0 matching"]
    ended = await cli.run("dlq", "list", "--limit", "3", "--code", "*")
    assert ended.err_lines == [f"{queues.dead}: 4 dead letters, 3 read (--limit), 3 matching"]
    assert len(ended.lines) == 1 + 3


async def test_an_unknown_id_and_a_malformed_time_are_errors(cli: Cli, queues: Queues) -> None:
    await add_dead_letters(queues, 2)
    ended = await cli.run("dlq", "show", "nobody")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err_lines == ["Error: no such dead letter: nobody (2 read). Run `vqa-worker dlq list`."]
    for time in ("yesterday", "99999999999d", "9999-12-31T23:59:59-01:00"):
        ended = await cli.run("dlq", "list", "--since", time)
        assert ended.code == 2
        assert ended.err_lines[0].startswith(f"Error: Invalid value for '--since': '{time}' is ")


async def test_control_characters_in_messages_are_escaped(cli: Cli, queues: Queues) -> None:
    evil = "\x1b]0;title\x07\u202e\x9b31m"
    await queues.dead_letter(
        {"id": "evil", "question": evil, "images": ["s3://b/k"], "model": evil},
        headers={"vqa-error-message": evil, "vqa-error-code": evil, "also": [evil]},
        reply_to="\x1b[2J",
    )
    await queues.dead_letter(evil.encode(), message_id="evil")
    for arguments in (["list"], ["show", "evil"], ["replay", "--dry-run"]):
        ended = await cli.run("dlq", *arguments)
        assert ended.code == 0
        for line in [*ended.out.splitlines(), *ended.err_lines]:
            assert line.isprintable(), line


async def test_show_prints_several_and_names_those_that_are_missing(cli: Cli, queues: Queues) -> None:
    first, second = await add_dead_letters(queues, 2)
    ended = await cli.run("dlq", "show", first, "nobody", second)
    assert ended.code == 1
    assert all(f'  "job_id": "{it}",' in ended.lines for it in (first, second))
    assert ended.err_lines == ["Error: no such dead letter: nobody (2 read). Run `vqa-worker dlq list`."]


async def test_a_list_fits_a_narrow_terminal_and_breaks_no_word(cli: Cli, queues: Queues) -> None:
    error = "5 attempts failed, the last one because the API answered 500: overloaded, try again later"
    await queues.dead_letter(job(id="order-4711"), headers={"vqa-error-message": error}, ago_s=7300)
    shown = Terminal(cli, "dlq", "list", columns=80)
    assert await shown.ended() == 0
    header, row, *rest = shown.shown.splitlines()[1:]
    assert header.split() == ["NAME", "AGE", "CODE", "JOB"]
    assert row.split()[1:] == ["2h", "attempts_exhausted", "order-4711"]
    assert " ".join(" ".join(rest).split()) == f"default: {error}"
    assert all(len(line) <= 80 for line in (header, row, *rest))


async def test_show_prints_the_complete_body_as_json(cli: Cli, queues: Queues) -> None:
    body = b'{"id": "x",   "question": "\xc3\xa4"}'
    await queues.dead_letter(body, reply_to="r")
    await queues.dead_letter(b"\xff\x00", message_id="x")
    text, binary = await cli.run_json("dlq", "show", "x")
    assert text["body"].encode() == body
    assert (text["reply_to"], text["headers"]["vqa-attempts"]) == ("r", 5)
    assert binary["body_base64"] == "/wA="


@pytest.fixture
def delivery_limit_of_20(stack: Stack, queues: Queues) -> None:
    """Apply RabbitMQ 4's default delivery limit: a message requeued more than 20 times is dropped."""
    policy = {"pattern": f"^{queues.dead}$", "definition": {"delivery-limit": 20}, "apply-to": "queues"}
    administer(stack, "PUT", f"/api/policies/%2F/{queues.dead}", policy)


@pytest.mark.usefixtures("delivery_limit_of_20")
async def test_reading_any_number_of_times_loses_no_dead_letter(stack: Stack, queues: Queues) -> None:
    ids = await add_dead_letters(
        queues, 3, headers={"CC": ["nowhere"], "kept": {"a": [1, "b"]}}, reply_to="r"
    )
    await queues.dead_letter(b"no json", message_id="without-a-copy")
    await queues.dead_letter(b"no id", message_id="made-up", headers={"vqa-copy": "made-up"})
    first = await read_dead_letters(stack, queues)
    again = first
    for _ in range(50):
        await queues.until_depth(queues.dead, len(first))
        again = await read_dead_letters(stack, queues)
        assert sorted(held.record.name for held in again) == sorted(held.record.name for held in first)
    by_name = {held.record.name: held for held in again}
    for before in first:
        after = by_name[before.record.name]
        assert after.body == before.body
        assert after.record.message_id == before.record.message_id
        counts = ("x-delivery-count", "x-acquired-count", "CC", "vqa-copy")
        assert {k: v for k, v in after.headers.items() if k not in counts} == {
            k: v for k, v in before.headers.items() if k not in counts
        }
    assert [held.record.job_id for held in first][:3] == ids


@pytest.mark.usefixtures("delivery_limit_of_20")
async def test_reading_only_some_any_number_of_times_loses_none(stack: Stack, queues: Queues) -> None:
    await add_dead_letters(queues, 2)
    for _ in range(50):
        await queues.until_depth(queues.dead, 2)
        assert len(await read_dead_letters(stack, queues, most=1)) == 1
    await queues.until_depth(queues.dead, 2)


@pytest.mark.usefixtures("delivery_limit_of_20")
async def test_without_renewal_the_broker_drops_dead_letters(
    stack: Stack, queues: Queues, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The test above fails without renewal.
    monkeypatch.setattr(dead_letters, "MAX_RETURNS", 1000)
    await add_dead_letters(queues, 3)
    for _ in range(22):
        await read_dead_letters(stack, queues)
    counts_returns = broker_version(stack) < (4, 3)
    assert await queues.depth(queues.dead) == (0 if counts_returns else 3)


async def test_a_list_that_is_killed_loses_no_dead_letter(stack: Stack, cli: Cli, queues: Queues) -> None:
    await add_dead_letters(queues, 4)
    async with Proxy.before(stack.rabbitmq.url) as proxy:
        # Basic.Nack: the command has read the messages and is about to requeue them.
        proxy.freezes_on = b"\x00\x3c\x00\x78"
        behind = cli.with_settings(VQA_RABBITMQ_URL=proxy.url(stack.rabbitmq.url))
        process = behind.start("dlq", "list")
        await until(lambda: proxy.held, "it holds the messages")
        await queues.until_depth(queues.dead, 0)
        await kill(process)
        proxy.reset()
        await queues.until_depth(queues.dead, 4)


async def test_a_dead_letter_that_cannot_be_renewed_is_reported_and_kept(
    stack: Stack, queues: Queues
) -> None:
    if broker_version(stack) >= (4, 3):
        pytest.skip("RabbitMQ 4.3 does not count returned messages, so that none is renewed")
    await add_dead_letters(queues, 2)
    for _ in range(dead_letters.MAX_RETURNS):
        await read_dead_letters(stack, queues)
    full = {"max-length": 1, "overflow": "reject-publish"}
    policy = {"pattern": f"^{queues.dead}$", "definition": full, "apply-to": "queues"}
    administer(stack, "PUT", f"/api/policies/%2F/{queues.dead}", policy)
    with pytest.raises(
        dead_letters.DeadLettersError, match=r"was returned 3 times and cannot be renewed, .* is full"
    ):
        await read_dead_letters(stack, queues)

    async def are_returned() -> bool:
        return await queues.depth(queues.dead) == 2

    # RabbitMQ returns them when it notices that the connection is closed.
    await until(are_returned, "both are in the queue")


async def test_without_write_permission_reading_is_rejected_before_it_adds_to_delivery_counts(
    stack: Stack, cli: Cli, queues: Queues
) -> None:
    await add_dead_letters(queues, 1)
    with BrokerUser.of(stack) as user:
        user.permit(write="^$")
        for arguments in (["list"], ["show", "x"], ["replay", "--yes"], ["purge", "--all", "--yes"]):
            ended = await cli.with_settings(VQA_RABBITMQ_URL=user.url).run("dlq", *arguments)
            assert ended.code == 1
            (line,) = ended.err_lines
            assert line.startswith(
                "Error: reading dead letters needs the permission to publish them by the default"
            )
            assert "lacks a permission" in line
        user.permit(read="^$")
        ended = await cli.with_settings(VQA_RABBITMQ_URL=user.url).run("dlq", "list")
        assert (ended.code, len(ended.err_lines)) == (1, 1)
        assert f"queue {queues.dead}" in ended.err_lines[0]
    (held,) = await read_dead_letters(stack, queues)
    assert held.record.returns == 0


async def test_a_message_dead_lettered_by_rabbitmq_keeps_its_reason(
    stack: Stack, cli: Cli, queues: Queues
) -> None:
    await queues.put(queues.jobs, job(id="rejected"), message_id="rejected")
    async with await aio_pika.connect(stack.rabbitmq.url) as connection:
        jobs = await (await connection.channel()).get_queue(queues.jobs, ensure=False)
        message = await jobs.get()
        await message.reject(requeue=False)
        await queues.until_depth(queues.dead, 1)
    (held,) = await read_dead_letters(stack, queues)
    for _ in range(dead_letters.MAX_RETURNS * 2):
        (held,) = await read_dead_letters(stack, queues)
    assert (held.record.code, held.record.job_id) == ("rejected", "rejected")
    assert held.record.died_at is not None
    assert datetime.now(UTC) - held.record.died_at < timedelta(minutes=5)
    ended = await cli.run("dlq", "list", "--since", "5m")
    assert "dead-lettered by RabbitMQ (rejected)" in ended.out


async def test_a_missing_dead_letter_queue_is_reported(cli: Cli) -> None:
    ended = await cli.run("dlq", "list")
    assert (ended.code, ended.out) == (1, "")
    (line,) = ended.err_lines
    assert line.startswith(f"Error: the queue {cli.settings['VQA_JOBS_QUEUE']}.dead does not exist")
