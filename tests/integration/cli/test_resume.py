"""Submissions that are broken off, by SIGKILL and otherwise: nothing is lost, nothing is submitted twice."""

import asyncio
import json
from collections import Counter

from deploy.local.stack import Stack
from tests.conftest import BUCKET, picture
from tests.integration.cli.running import Cli, depth, emptied, ended, killed
from tests.proxy import Proxy
from tests.running import until
from worker.cli.submit.submission import CHUNK_JOBS


def many(cli: Cli, count: int) -> list[str]:
    """A file of so many jobs, `jobs.jsonl`; returns their ids."""
    ids = [f"order-{number}" for number in range(count)]
    cli.write("jobs.jsonl", *({"id": job_id, "question": "What?", "images": ["s3://b/k"]} for job_id in ids))
    return ids


async def in_queue(cli: Cli, stack: Stack) -> Counter[str]:
    """How often each job is in the queue, by its id; the queue is empty then."""
    messages = await emptied(stack, cli.jobs_queue)
    for message in messages:
        assert message.message_id == json.loads(message.body)["id"]
    return Counter(str(message.message_id) for message in messages)


async def test_a_full_queue_is_waited_for_and_a_killed_submission_goes_on(
    lone_cli: Cli, stack: Stack
) -> None:
    ids = many(lone_cli, 1200)
    submitting = lone_cli.start("submit", "jobs.jsonl", "--max-queue", "700")

    async def waits() -> bool:
        counts = lone_cli.counts()
        return counts is not None and counts.confirmed == 700

    await until(waits, "the submission waits for the queue")
    assert await depth(stack, lone_cli.jobs_queue) == 700
    await killed(submitting)

    # It goes on where it was, as far as there is room.
    first = await in_queue(lone_cli, stack)
    submitting = lone_cli.start("submit", "jobs.jsonl", "--max-queue", "700", "--json")
    submitted = await ended(submitting)
    assert (submitted.code, submitted.err) == (0, "")
    assert submitted.summary["submitted"] == 500
    second = await in_queue(lone_cli, stack)
    assert first + second == Counter(ids)


async def test_a_submission_killed_on_the_way_doubts_only_what_was_on_its_way(
    lone_cli: Cli, stack: Stack
) -> None:
    ids = many(lone_cli, 6000)
    submitting = lone_cli.start("submit", "jobs.jsonl")

    async def is_half_way() -> bool:
        return (await depth(stack, lone_cli.jobs_queue) or 0) > 1000

    await until(is_half_way, "some jobs are in the queue")
    await killed(submitting)
    counts = lone_cli.counts()
    assert counts is not None
    assert counts.confirmed < 6000, "it was over before it was killed"

    again = await lone_cli.run("submit", "jobs.jsonl", "--json")
    assert again.code == 0, again.err
    assert again.summary["submitted"] == 6000 - counts.confirmed
    if counts.sent:
        assert f"and may have arrived: {counts.sent};" in again.err
        assert f"answered: 0, sent again under the same ids: {counts.sent}" in again.err
    sent = await in_queue(lone_cli, stack)
    assert set(sent) == set(ids)
    twice = [job_id for job_id, times in sent.items() if times > 1]
    assert len(twice) <= counts.sent <= CHUNK_JOBS
    assert max(sent.values()) <= 2


async def test_jobs_in_doubt_that_are_answered_are_not_sent_again(cli: Cli, stack: Stack) -> None:
    """The submitter dies after the broker has the jobs and before it has heard so."""
    question = "In doubt?"
    messages = [{"role": "user", "content": question}]
    cli.write("jobs.jsonl", *({"id": f"doubt-{n}", "messages": messages} for n in range(20)))
    async with Proxy.before(stack.rabbitmq.url) as proxy:
        cli.settings["VQA_RABBITMQ_URL"] = proxy.url(stack.rabbitmq.url)
        proxy.deafens_on = b"doubt-0"
        submitting = cli.start("submit", "jobs.jsonl")
        await until(lambda: len(_answered(stack, question)) == 20, "all jobs are answered")
        await killed(submitting)
        counts = cli.counts()
        assert counts is not None
        assert (counts.sent, counts.confirmed) == (20, 0)

        again = await cli.run("submit", "jobs.jsonl", "--wait", "--json")
    assert again.code == 0, again.err
    assert "may have arrived: 20; answered: 20, sent again under the same ids: 0" in again.err
    assert {result["id"] for result in again.objects} == {f"doubt-{n}" for n in range(20)}
    assert len(_answered(stack, question)) == 20


def _answered(stack: Stack, question: str) -> list[object]:
    return [call for call in stack.model.calls() if call.question == question and call.ended]


async def test_the_same_command_again_submits_nothing(lone_cli: Cli, stack: Stack) -> None:
    ids = many(lone_cli, 30)
    first = await lone_cli.run("submit", "jobs.jsonl", "--json")
    second = await lone_cli.run("submit", "jobs.jsonl", "--json")
    assert second.code == 0
    assert second.summary == {**first.summary, "submitted": 0}
    assert second.err == f"{first.summary['name']} was submitted before, all of its 30 jobs\n"
    assert await in_queue(lone_cli, stack) == Counter(ids)

    # A name of its own makes it another submission, and so does another option, or another broker's queue.
    named = await lone_cli.run("submit", "jobs.jsonl", "--name", "again", "--json")
    other = await lone_cli.run("submit", "jobs.jsonl", "--model", "m", "--json")
    assert (named.summary["submitted"], other.summary["submitted"]) == (30, 30)
    assert other.summary["name"] != first.summary["name"]
    taken = await lone_cli.run("submit", "s3://b/k", "What?", "--name", "again")
    assert taken.code == 2
    assert "belongs to another submission (jobs); choose another --name" in taken.err


async def test_a_manifest_of_one_s_own_choice_is_found_again(lone_cli: Cli) -> None:
    many(lone_cli, 3)
    where = ("--manifest", str(lone_cli.folder / "my.manifest"))
    first = await lone_cli.run("submit", "jobs.jsonl", *where)
    assert first.lines[-1] == f"their results: vqa-worker results {where[1]}"
    assert "was submitted before" in (await lone_cli.run("submit", "jobs.jsonl", *where)).err
    assert lone_cli.manifests == []
    lone_cli.write("my.manifest", "something else")
    spoilt = await lone_cli.run("submit", "jobs.jsonl", *where)
    assert (spoilt.code, len(spoilt.err.splitlines())) == (1, 1)
    assert "is not the manifest of a submission" in spoilt.err


async def test_two_processes_don_t_submit_the_same_at_a_time(lone_cli: Cli, stack: Stack) -> None:
    ids = many(lone_cli, 20)
    submitting = lone_cli.start("submit", "jobs.jsonl", "--max-queue", "10")

    async def waits() -> bool:
        return await depth(stack, lone_cli.jobs_queue) == 10

    await until(waits, "the submission waits for the queue")
    second = await lone_cli.run("submit", "jobs.jsonl")
    assert second.code == 1
    assert "another process is submitting by it" in second.err
    sent = await in_queue(lone_cli, stack)
    assert (await ended(submitting)).code == 0
    assert sent + await in_queue(lone_cli, stack) == Counter(ids)


async def test_a_submission_goes_on_over_a_lost_connection(lone_cli: Cli, stack: Stack) -> None:
    ids = many(lone_cli, 6000)
    async with Proxy.before(stack.rabbitmq.url) as proxy:
        lone_cli.settings["VQA_RABBITMQ_URL"] = proxy.url(stack.rabbitmq.url)
        submitting = lone_cli.start("submit", "jobs.jsonl")

        async def is_half_way() -> bool:
            return (await depth(stack, lone_cli.jobs_queue) or 0) > 500

        await until(is_half_way, "some jobs are in the queue")
        proxy.reset()
        assert (await ended(submitting)).code == 0
    sent = await in_queue(lone_cli, stack)
    assert set(sent) == set(ids)
    assert sum(sent.values()) - len(ids) <= CHUNK_JOBS


async def test_uploads_that_were_broken_off_go_on(lone_cli: Cli, stack: Stack) -> None:
    contents = [picture() for _ in range(6)]
    for number, content in enumerate(contents):
        (lone_cli.folder / f"{number}.png").write_bytes(content)
    lone_cli.write("jobs.jsonl", *({"question": "What?", "image": f"{number}.png"} for number in range(6)))
    submit = ("submit", "jobs.jsonl", "--bucket", BUCKET)
    failed = await lone_cli.run(*submit, AWS_SECRET_ACCESS_KEY="wrong")
    assert failed.code == 1
    assert await depth(stack, lone_cli.jobs_queue) == 0
    # What was planned is what is sent: a file that has changed since would be another picture.
    (lone_cli.folder / "3.png").write_bytes(picture())
    changed = await lone_cli.run(*submit)
    assert changed.code == 1
    assert "3.png: has changed since the jobs about it were planned" in changed.err
    (lone_cli.folder / "3.png").write_bytes(contents[3])
    assert (await lone_cli.run(*submit)).code == 0
    bodies = [json.loads(message.body) for message in await emptied(stack, lone_cli.jobs_queue)]
    s3 = stack.s3.client()
    urls = [body["images"][0] for body in bodies]
    fetched = await asyncio.gather(
        *(asyncio.to_thread(s3.get_object, Bucket=BUCKET, Key=url.split("/", 3)[3]) for url in urls)
    )
    assert [found["Body"].read() for found in fetched] == contents
