"""Interrupted submissions: no job is lost and no job is submitted twice."""

import asyncio
import contextlib
import json
import sqlite3
import uuid
from collections import Counter

from deploy.local.stack import Stack
from tests.conftest import BUCKET, picture
from tests.integration.cli.running import Cli, depth, drain, ended, kill
from tests.proxy import Proxy
from tests.running import until
from worker.cli.submit.sender import CHUNK_JOBS
from worker.cli.submit.state import Counts


def many(cli: Cli, count: int) -> list[str]:
    """Write `jobs.jsonl` with a number of jobs; return their ids."""
    ids = [f"order-{number}" for number in range(count)]
    cli.write("jobs.jsonl", *({"id": job_id, "question": "What?", "images": ["s3://b/k"]} for job_id in ids))
    return ids


async def in_queue(cli: Cli, stack: Stack) -> Counter[str]:
    """Consume the jobs queue; return the number of messages of each job id."""
    messages = await drain(stack, cli.jobs_queue)
    for message in messages:
        assert message.message_id == json.loads(message.body)["id"]
    return Counter(str(message.message_id) for message in messages)


async def test_a_submission_waits_for_a_full_queue_and_resumes_after_a_kill(
    no_worker_cli: Cli, stack: Stack
) -> None:
    ids = many(no_worker_cli, 1200)
    submitting = no_worker_cli.start("submit", "jobs.jsonl", "--max-queue", "700")

    async def waits() -> bool:
        counts = no_worker_cli.counts()
        return counts is not None and counts.confirmed == 700

    await until(waits, "the submission waits for the queue")
    assert await depth(stack, no_worker_cli.jobs_queue) == 700
    await kill(submitting)

    # The same command resumes as far as the queue has room.
    first = await in_queue(no_worker_cli, stack)
    submitting = no_worker_cli.start("submit", "jobs.jsonl", "--max-queue", "700", "--json")
    submitted = await ended(submitting)
    assert (submitted.code, submitted.err) == (0, "")
    assert submitted.summary["submitted"] == 500
    second = await in_queue(no_worker_cli, stack)
    assert first + second == Counter(ids)


async def test_a_submission_killed_while_sending_resends_only_unconfirmed_jobs(
    no_worker_cli: Cli, stack: Stack
) -> None:
    ids = many(no_worker_cli, 3000)
    submitting = no_worker_cli.start("submit", "jobs.jsonl")

    async def is_half_way() -> bool:
        return (await depth(stack, no_worker_cli.jobs_queue) or 0) > 500

    await until(is_half_way, "some jobs are in the queue")
    await kill(submitting)
    counts = no_worker_cli.counts()
    assert counts is not None
    assert counts.confirmed < 3000, "it was over before it was killed"

    again = await no_worker_cli.run("submit", "jobs.jsonl", "--json")
    assert again.code == 0, again.err
    assert again.summary["submitted"] == 3000 - counts.confirmed
    if counts.sent:
        assert "sent without a confirm before the interruption" in again.err
        assert f"0 answered, {counts.sent:,} sent again with the same ids" in again.err
    sent = await in_queue(no_worker_cli, stack)
    assert set(sent) == set(ids)
    twice = [job_id for job_id, times in sent.items() if times > 1]
    assert len(twice) <= counts.sent <= CHUNK_JOBS
    assert max(sent.values()) <= 2


async def test_unconfirmed_jobs_with_a_result_are_not_sent_again(cli: Cli, stack: Stack) -> None:
    """The submitter is killed after the broker has the jobs and before it receives the confirms."""
    question = "In doubt?"
    messages = [{"role": "user", "content": question}]
    cli.write("jobs.jsonl", *({"id": f"doubt-{n}", "messages": messages} for n in range(20)))
    async with Proxy.before(stack.rabbitmq.url) as proxy:
        cli.settings["VQA_RABBITMQ_URL"] = proxy.url(stack.rabbitmq.url)
        proxy.deafens_on = b"doubt-0"
        submitting = cli.start("submit", "jobs.jsonl")
        await until(lambda: len(_answered(stack, question)) == 20, "all jobs are answered")
        await kill(submitting)
        counts = cli.counts()
        assert counts is not None
        assert (counts.sent, counts.confirmed) == (20, 0)

        again = await cli.run("submit", "jobs.jsonl", "--wait", "--json")
    assert again.code == 0, again.err
    assert "before the interruption: 20 answered, 0 sent again with the same ids" in again.err
    assert {result["id"] for result in again.objects} == {f"doubt-{n}" for n in range(20)}
    assert len(_answered(stack, question)) == 20


def _answered(stack: Stack, question: str) -> list[object]:
    return [call for call in stack.model.calls(question) if call.question == question and call.ended]


async def test_resumptions_at_the_same_time_submit_no_job_twice(no_worker_cli: Cli, stack: Stack) -> None:
    """The submitter was killed in the middle of a chunk; three commands then resume at once."""
    ids = many(no_worker_cli, 400)
    submitting = no_worker_cli.start("submit", "jobs.jsonl", "--max-queue", "100")
    await until(lambda: (no_worker_cli.counts() or Counts()).confirmed == 100, "the submission waits")
    await kill(submitting)
    # As a kill between the publish and the record of the confirms leaves it.
    with contextlib.closing(sqlite3.connect(no_worker_cli.state_files[0])) as file, file:
        file.execute("UPDATE jobs SET state = 1 WHERE state = 0 AND ordinal <= 300")
    resuming = [no_worker_cli.start("submit", "jobs.jsonl") for _ in range(3)]
    done = await asyncio.gather(*map(ended, resuming))
    refused = [it for it in done if it.code]
    for it in refused:
        assert "another vqa-worker command is using the submission jobs-" in it.err
    assert len(refused) < 3
    assert await in_queue(no_worker_cli, stack) == Counter(ids)


async def test_a_submission_cannot_be_deleted_while_it_is_submitted(no_worker_cli: Cli, stack: Stack) -> None:
    ids = many(no_worker_cli, 20)
    submitting = no_worker_cli.start("submit", "jobs.jsonl", "--name", "busy", "--max-queue", "10")
    await until(lambda: (no_worker_cli.counts() or Counts()).confirmed == 10, "the submission waits")
    for command in (("delete", "busy", "--yes"), ("collect", "busy", "--no-wait")):
        refused = await no_worker_cli.run("submissions", *command)
        assert refused.code == 1
        assert "another vqa-worker command is using the submission busy" in refused.err
    sent = await in_queue(no_worker_cli, stack)
    assert (await ended(submitting)).code == 0
    assert sent + await in_queue(no_worker_cli, stack) == Counter(ids)
    counts = no_worker_cli.counts()
    assert counts is not None
    assert counts.confirmed == 20


async def test_the_same_command_again_submits_no_job_twice(no_worker_cli: Cli, stack: Stack) -> None:
    ids = many(no_worker_cli, 30)
    first = await no_worker_cli.run("submit", "jobs.jsonl", "--json")
    second = await no_worker_cli.run("submit", "jobs.jsonl", "--json")
    assert second.code == 0
    assert second.summary == {**first.summary, "submitted": 0}
    assert second.err == f"Already submitted: 30 jobs (submission {first.summary['name']}).\n"
    assert await in_queue(no_worker_cli, stack) == Counter(ids)

    # Another name or option makes it another submission.
    named = await no_worker_cli.run("submit", "jobs.jsonl", "--name", "again", "--json")
    other = await no_worker_cli.run("submit", "jobs.jsonl", "--model", "m", "--json")
    assert (named.summary["submitted"], other.summary["submitted"]) == (30, 30)
    assert other.summary["name"] != first.summary["name"]
    taken = await no_worker_cli.run("submit", "s3://b/k", "What?", "--name", "again")
    assert taken.code == 2
    assert "the name again belongs to another submission (jobs). Choose another --name" in taken.err


async def test_two_processes_cannot_submit_the_same_submission(no_worker_cli: Cli, stack: Stack) -> None:
    ids = many(no_worker_cli, 20)
    submitting = no_worker_cli.start("submit", "jobs.jsonl", "--max-queue", "10")

    async def waits() -> bool:
        return await depth(stack, no_worker_cli.jobs_queue) == 10

    await until(waits, "the submission waits for the queue")
    second = await no_worker_cli.run("submit", "jobs.jsonl")
    assert second.code == 1
    assert "another vqa-worker command is using the submission jobs-" in second.err
    sent = await in_queue(no_worker_cli, stack)
    assert (await ended(submitting)).code == 0
    assert sent + await in_queue(no_worker_cli, stack) == Counter(ids)


async def test_a_submission_continues_after_a_lost_connection(no_worker_cli: Cli, stack: Stack) -> None:
    ids = many(no_worker_cli, 2000)
    async with Proxy.before(stack.rabbitmq.url) as proxy:
        no_worker_cli.settings["VQA_RABBITMQ_URL"] = proxy.url(stack.rabbitmq.url)
        submitting = no_worker_cli.start("submit", "jobs.jsonl")

        async def is_half_way() -> bool:
            return (await depth(stack, no_worker_cli.jobs_queue) or 0) > 500

        await until(is_half_way, "some jobs are in the queue")
        proxy.reset()
        assert (await ended(submitting)).code == 0
    sent = await in_queue(no_worker_cli, stack)
    assert set(sent) == set(ids)
    assert sum(sent.values()) - len(ids) <= CHUNK_JOBS


async def test_a_submission_that_fails_before_it_publishes_leaves_no_state(
    no_worker_cli: Cli, stack: Stack
) -> None:
    contents = [picture() for _ in range(6)]
    for number, content in enumerate(contents):
        (no_worker_cli.folder / f"{number}.png").write_bytes(content)
    no_worker_cli.write(
        "jobs.jsonl", *({"question": "What?", "image": f"{number}.png"} for number in range(6))
    )
    name = f"failing-{uuid.uuid4().hex}"
    submit = ("submit", "jobs.jsonl", "--name", name, "--bucket", BUCKET)
    for settings, options in (
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, ()),
        ({"VQA_JOBS_QUEUE": "no-such-queue"}, ()),
        ({}, ("--exchange", "no-such-exchange")),
        ({}, ("--exchange", "amq.topic")),
    ):
        failed = await no_worker_cli.run(*submit, *options, **settings)
        assert failed.code != 0
        assert list((no_worker_cli.folder / "state" / "vqa-worker").iterdir()) == [], failed
    assert await depth(stack, no_worker_cli.jobs_queue) == 0
    assert f"vqa.results.{name}-" not in stack.rabbitmq.ctl("list_queues", "name")
    assert (await no_worker_cli.run(*submit)).code == 0
    bodies = [json.loads(message.body) for message in await drain(stack, no_worker_cli.jobs_queue)]
    s3 = stack.s3.client()
    urls = [body["images"][0] for body in bodies]
    fetched = await asyncio.gather(
        *(asyncio.to_thread(s3.get_object, Bucket=BUCKET, Key=url.split("/", 3)[3]) for url in urls)
    )
    assert [found["Body"].read() for found in fetched] == contents
