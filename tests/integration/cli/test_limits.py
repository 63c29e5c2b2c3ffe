"""`submit --stop-after-failures` and `--max-cost`."""

import asyncio
import contextlib
import json
import re
import signal
import sqlite3
import uuid
from collections.abc import Iterator
from typing import Any

import aio_pika
import pytest

from deploy.local.model_simulator.behavior import Answer, Hang
from deploy.local.stack import Stack
from tests.breaking import BrokerUser
from tests.conftest import BUCKET, PutImage, StartWorker
from tests.integration.cli.running import Cli, channel_of, depth, drain, ended, kill
from tests.running import Worker, calls_with, until
from worker.cli.submit.limits import FIRST_JOBS, Limits, check_failure_limit, check_max_cost
from worker.cli.submit.state import Counts, JobResult, read_state

MISSING = f"s3://{BUCKET}/missing"


def use(cli: Cli, worker: Worker) -> None:
    cli.settings.update(VQA_JOBS_QUEUE=worker.jobs_queue, VQA_RESULTS_QUEUE=worker.results_queue)


def fails(job_id: str) -> dict[str, Any]:
    return {"id": job_id, "question": "What?", "images": [MISSING]}


def asks(job_id: str, marker: str) -> dict[str, Any]:
    return {"id": job_id, "messages": [{"role": "user", "content": f"{marker} {job_id:>4}"}]}


def questions(stack: Stack, marker: str) -> list[str]:
    """Return the questions that the model got, with duplicates."""
    return [call.question for call in calls_with(stack, marker)]


def far(cli: Cli) -> Counts:
    return cli.counts() or Counts()


def head(cli: Cli) -> dict[str, str]:
    return read_state(cli.state_files[0])[0]


async def publish_failures(stack: Stack, queue: str, *ids: str) -> None:
    """Publish failed results, as a worker does."""
    error = {"code": "model_rejected", "message": "no", "retryable": False}
    async with channel_of(stack) as channel:
        for job_id in ids:
            body = json.dumps({"id": job_id, "status": "failed", "error": error}).encode()
            await channel.default_exchange.publish(aio_pika.Message(body), queue)


# The values of the options


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("5%", "5%"), ("5 %", "5%"), (" 5.0%", "5%"), ("0%", "0%"), ("0.5%", "0.5%"), ("100%", "100%"),
        ("1", "1"), ("100", "100"),
    ],
)  # fmt: skip
def test_a_limit_of_failures_is_a_share_or_a_number(text: str, limit: str) -> None:
    assert check_failure_limit(text) == limit


@pytest.mark.parametrize(
    "text",
    [
        "", "%", "0", "-1", "-1%", "101%", "100.1%", "1.5", "nan", "nan%", "inf", "1e3", "1e1%", "5%%",
        "5 percent", "1,000", "\u0665%", "9" * 5000,
    ],
)  # fmt: skip
def test_other_limits_of_failures_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a share such as 5% or a number of failures such as 100"):
        check_failure_limit(text)


@pytest.mark.parametrize(
    ("text", "limit"), [("20", "20"), ("$20", "20"), ("0.50", "0.50"), (" $0.000001 ", "0.000001")]
)
def test_a_cost_is_an_amount_in_usd(text: str, limit: str) -> None:
    assert check_max_cost(text) == limit


@pytest.mark.parametrize(
    "text", ["", "$", "0", "$0.00", "-1", "nan", "inf", "1e3", "20USD", "20 $", "€20", "1,000", "9" * 400]
)
def test_other_costs_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not an amount in USD above 0, such as 20 or"):
        check_max_cost(text)


async def test_limits_require_results(no_worker_cli: Cli, stack: Stack) -> None:
    no_worker_cli.write("jobs.jsonl", fails("a"))
    for option in ("--stop-after-failures", "--max-cost"):
        refused = await no_worker_cli.run("submit", "jobs.jsonl", option, "5")
        assert (refused.code, refused.err) == (2, f"Error: {option} requires --wait. Add it.\n")
        wrong = await no_worker_cli.run("submit", "jobs.jsonl", "--wait", option, "-5%")
        assert (wrong.code, wrong.out) == (2, "")
        assert f"Invalid value for '{option}': '-5%' is not a" in wrong.err
    assert await depth(stack, no_worker_cli.jobs_queue) == 0


# What the limits allow


def succeeded(cost: float | None = None, tokens: int = 5) -> JobResult:
    return JobResult("", b"", 0, failed=False, tokens=tokens, cost=cost)


def failed(code: str = "model_rejected", cost: float | None = None) -> JobResult:
    return JobResult("", b"", 0, failed=True, cost=cost, code=code)


def after(limits: dict[str, str], total: int, *results: JobResult, sent: int = 0) -> Limits:
    """Return the limits of a submission of which `sent` jobs are sent, after results."""
    counts = Counts(total=total)
    tested = Limits({"name": "it", **limits}, counts)
    tested.add_sent(sent or len(results))
    for it in results:
        counts.add(it)
        tested.add(1)
    return tested


@pytest.mark.parametrize(
    ("limit", "failures", "successes", "is_stopped"),
    [
        ("5%", 1, 19, False),
        ("5%", 2, 18, True),
        ("5%", 19, 0, False),
        ("0%", 0, 50, False),
        ("0%", 1, 50, True),
        ("100%", 50, 0, False),
        ("2.5%", 1, 39, False),
        ("2.5%", 2, 38, True),
        ("3", 2, 0, False),
        ("3", 3, 0, True),
    ],
)
def test_a_share_of_failures_needs_20_results_and_a_number_does_not(
    limit: str, failures: int, successes: int, is_stopped: bool
) -> None:
    results = [*[succeeded()] * successes, *[failed()] * failures]
    limits = after({"stop_after_failures": limit}, 1000, *results)
    assert bool(limits.stopped) == is_stopped == bool(limits.reason)
    # As a resumed command or `submissions show` reads them from the state file.
    assert bool(Limits({"name": "it", "stop_after_failures": limit}, limits._counts).stopped) == is_stopped  # noqa: SLF001


def test_cancelled_jobs_are_no_failures_and_a_stopped_submission_stays_stopped() -> None:
    limit = {"stop_after_failures": "50%"}
    assert not after(limit, 1000, *[failed("cancelled")] * 100, *[succeeded()] * 20).stopped
    some = [succeeded()] * 9
    stopped = after(limit, 1000, *some, *[failed()] * 11, *some, *some)
    assert stopped.stopped == "11 of 20 results failed (55.0 %, --stop-after-failures 50%)"


def test_of_a_small_submission_the_share_counts_at_the_end() -> None:
    assert not after({"stop_after_failures": "5%"}, 3, failed(), failed()).stopped
    assert after({"stop_after_failures": "5%"}, 3, failed(), failed(), succeeded()).stopped


def test_before_the_first_cost_ten_jobs_may_be_sent() -> None:
    limit = {"max_cost": "1"}
    assert after(limit, 1000).room == FIRST_JOBS == 10
    assert after(limit, 1000, sent=4).room == 6
    # A job that was not billed says nothing about the cost.
    assert after(limit, 1000, failed(), sent=10).room == 1
    unknown = after(limit, 1000, succeeded(), sent=10)
    assert (unknown.room, unknown.reason) == (0, "")
    unknown = after(limit, 1000, *[succeeded()] * 10)
    assert unknown.reason == "--max-cost $1.00 needs results with a cost, and they have none"


def test_the_budget_is_for_the_results_and_the_jobs_on_the_queue() -> None:
    assert after({"max_cost": "0.5"}, 1000, *[succeeded(0.1)] * 2).room == 3
    assert after({"max_cost": "0.5"}, 1000, *[succeeded(0.1)] * 2, sent=4).room == 1
    full = after({"max_cost": "0.5"}, 1000, *[succeeded(0.1)] * 2, sent=5)
    assert (full.room, full.reason) == (0, "")
    # Cheaper results make room for more jobs.
    full._counts.add(succeeded(0.01))  # noqa: SLF001
    full.add(1)
    assert full.room == 2
    # Failed results cost too, and results without a cost count as average ones.
    assert after({"max_cost": "0.5"}, 1000, failed(cost=0.1), succeeded(0.3)).room == 0
    assert after({"max_cost": "0.5"}, 1000, succeeded(0.1), succeeded()).room == 3
    # Free results use nothing of it, nor do those that cost next to nothing.
    assert after({"max_cost": "0.5"}, 1000, *[succeeded(1e-320)] * 5).room == 15
    assert after({"max_cost": "0.5"}, 1000, *[succeeded(0.0)] * 5).room == 15
    # A limit that all jobs fit in stops nothing.
    assert after({"max_cost": "0.5"}, 5, *[succeeded(0.1)] * 5).reason == ""


def test_not_many_more_jobs_are_sent_than_results_with_a_cost_are_known() -> None:
    """The first result can be much cheaper than the others."""
    assert after({"max_cost": "1000"}, 10_000, succeeded(0.001)).room == 11
    assert after({"max_cost": "1000"}, 10_000, *[succeeded(0.001)] * 100, sent=150).room == 60


# Failures


async def test_too_many_failures_cancel_what_is_on_the_queue(
    start_worker: StartWorker, cli: Cli, stack: Stack
) -> None:
    worker, marker = await start_worker(VQA_MAX_CONCURRENCY="4"), uuid.uuid4().hex
    use(cli, worker)
    # The jobs behind the first 20 are never answered: only cancelling them ends the command.
    stack.model.play(Answer(), times=18, marker=marker)
    stack.model.play(Hang(), times=None, marker=marker)
    ids = [f"{number}" for number in range(300)]
    jobs = (fails(job_id) if job_id in {"3", "12"} else asks(job_id, marker) for job_id in ids)
    cli.write("jobs.jsonl", *jobs)
    asked = ("submit", "jobs.jsonl", "--wait", "-o", "out.jsonl", "--json", "--max-queue", "50")
    done = await cli.run(*asked, "--stop-after-failures", "5%")
    assert done.code == 1, done.err
    counts = far(cli)
    assert (counts.succeeded, counts.failed - counts.cancelled) == (18, 2)
    assert counts.pending == 300 - 20 - counts.cancelled == 300 - counts.confirmed > 0
    *_, stopped, errors, hint = done.err_lines
    assert stopped == (
        "Stopped: 2 of 20 results failed (10.0 %, --stop-after-failures 5%)."
        f" {counts.cancelled} of 300 jobs were cancelled. {counts.pending} of 300 jobs were not submitted."
    )
    assert errors == "Most frequent errors: image_not_found (2)."
    name = done.summary["name"]
    assert hint == (
        f"To submit the rest, run the same command with --name {name} and a higher"
        " --stop-after-failures (100%: no limit)."
    )
    assert len(questions(stack, marker)) <= 18 + 4
    assert len(cli.read("out.jsonl")) == counts.received
    assert await depth(stack, cli.jobs_queue) == 0

    shown = await cli.run("submissions", "show", name)
    assert "stop after failures 5%" in shown.lines
    assert "stopped             2 of 20 results failed (10.0 %, --stop-after-failures 5%)" in shown.lines
    assert (await cli.run("submissions", "list")).lines[-1].endswith(f"{name} (stopped)")


async def test_at_a_number_of_failures_all_else_is_cancelled(
    start_worker: StartWorker, cli: Cli, stack: Stack
) -> None:
    worker, marker = await start_worker(VQA_MAX_CONCURRENCY="4"), uuid.uuid4().hex
    use(cli, worker)
    stack.model.play(Hang(), times=None, marker=marker)
    cli.write("jobs.jsonl", *map(fails, "abc"), *(asks(f"{n}", marker) for n in range(50)))
    done = await cli.run("submit", "jobs.jsonl", "--wait", "--json", "--stop-after-failures", "3")
    assert done.code == 1
    assert (
        "Stopped: 3 of 3 results failed (--stop-after-failures 3). 50 of 53 jobs were cancelled." in done.err
    )
    assert "To submit the rest" not in done.err
    assert (far(cli).cancelled, far(cli).pending) == (50, 0)


async def test_failures_below_the_limit_stop_nothing(cli: Cli) -> None:
    cli.write("jobs.jsonl", fails("a"), *(asks(f"{n}", "Fine?") for n in range(19)))
    done = await cli.run("submit", "jobs.jsonl", "--wait", "--json", "--stop-after-failures", "5%")
    assert (done.code, done.err) == (1, "")
    assert (far(cli).succeeded, far(cli).failed) == (19, 1)


async def test_of_few_jobs_all_run_and_the_failures_are_reported_at_the_end(cli: Cli) -> None:
    cli.write("jobs.jsonl", fails("a"), *(asks(f"{n}", "Fine?") for n in range(9)))
    done = await cli.run("submit", "jobs.jsonl", "--wait", "--json", "--stop-after-failures", "5%")
    assert done.code == 1
    assert done.err.startswith("Stopped: 1 of 10 results failed (10.0 %, --stop-after-failures 5%).\n")
    assert (far(cli).succeeded, far(cli).failed) == (9, 1)


@pytest.mark.parametrize("interruption", [signal.SIGKILL, signal.SIGINT])
async def test_failures_before_an_interruption_count_and_a_stopped_submission_stays_stopped(
    no_worker_cli: Cli, stack: Stack, start_worker: StartWorker, interruption: signal.Signals
) -> None:
    cli = no_worker_cli
    cli.write("jobs.jsonl", *(fails(f"{n}") for n in range(60)))
    asked = ("submit", "jobs.jsonl", "--wait", "-o", "out.jsonl", "--max-queue", "20")
    submitting = cli.start(*asked, "--stop-after-failures", "15")
    await until(lambda: far(cli).confirmed == 20, "the submission waits for the queue")
    queue, name = head(cli)["reply_to"], head(cli)["name"]
    await publish_failures(stack, queue, *(f"{n}" for n in range(10)))
    await until(lambda: far(cli).failed == 10, "results are collected")
    submitting.send_signal(interruption)
    interrupted = await ended(submitting)
    assert interrupted.code == (130 if interruption is signal.SIGINT else -signal.SIGKILL)
    await publish_failures(stack, queue, *(f"{n}" for n in range(10, 15)))

    if interruption is signal.SIGINT:
        # Without a limit on this command line, the stored one holds; also for `collect`.
        asked = ("submit", "jobs.jsonl", "--wait", "--max-queue", "20", "-o", "out.jsonl")
        unwaited = await cli.run("submit", "jobs.jsonl")
        assert unwaited.code == 2
        assert "has --stop-after-failures or --max-cost, which require --wait. Add it." in unwaited.err
        collected = await cli.run("submissions", "collect", name, "--no-wait", "-o", "out.jsonl")
        assert collected.code == 1
        assert "Warning: the jobs on the queue are not cancelled: no worker listens" in collected.err
        assert "Stopped: 15 of 15 results failed (--stop-after-failures 15)." in collected.err
    resumed = cli.start(*asked)
    await until(lambda: head(cli).get("stopped"), "the submission is stopped")
    # Its jobs are cancelled as soon as a worker runs.
    await start_worker(VQA_JOBS_QUEUE=cli.jobs_queue, VQA_RESULTS_QUEUE=cli.settings["VQA_RESULTS_QUEUE"])
    done = await ended(resumed)
    assert done.code == 1
    assert "Stopped: 15 of 15 results failed (--stop-after-failures 15)." in done.err
    assert "40 of 60 jobs were not submitted." in done.err
    assert (far(cli).received, far(cli).pending) == (20, 40)

    # Neither command waits for jobs that were never submitted.
    for again in (asked, ("submissions", "collect", name, "-o", "out.jsonl")):
        stopped = await cli.run(*again)
        assert stopped.code == 1
        assert "Stopped: 15 of 15 results failed" in stopped.err
    assert (far(cli).confirmed, len(cli.read("out.jsonl"))) == (20, 20)

    lifted = await cli.run(*asked, "--stop-after-failures", "100%", "--json")
    assert lifted.code == 1
    assert "Stopped" not in lifted.err
    assert (lifted.summary["failed"], lifted.summary["pending"]) == (60, 0)
    assert (await cli.run_json("submissions", "show", name))[0]["stopped"] is None


@pytest.fixture
def user(stack: Stack) -> Iterator[BrokerUser]:
    with BrokerUser.of(stack) as user:
        yield user


async def test_without_the_permission_to_cancel_the_submitted_jobs_are_waited_for(
    no_worker_cli: Cli, stack: Stack, user: BrokerUser
) -> None:
    cli, replies = no_worker_cli, r"vqa\.results\..*"
    queues = f"^({replies}|{re.escape(cli.jobs_queue)})$"
    user.permit(configure=f"^{replies}$", read=queues, write=r"^amq\.default$")
    cli.settings["VQA_RABBITMQ_URL"] = user.url
    cli.write("jobs.jsonl", fails("a"), fails("b"))
    submitting = cli.start("submit", "jobs.jsonl", "--wait", "-o", "out.jsonl", "--stop-after-failures", "1")
    await until(lambda: far(cli).confirmed == 2, "the jobs are submitted")
    await publish_failures(stack, head(cli)["reply_to"], "a")
    assert submitting.stderr is not None
    while "are not cancelled" not in (line := await asyncio.to_thread(submitting.stderr.readline)):
        assert line, "the command has ended"
    assert line.startswith("Warning: the jobs on the queue are not cancelled: ")
    assert "ACCESS_REFUSED" in line
    await publish_failures(stack, head(cli)["reply_to"], "b")
    assert (await ended(submitting)).code == 1
    assert (far(cli).failed, far(cli).cancelled) == (2, 0)


# Costs


async def job_cost(cli: Cli, marker: str) -> float:
    """Return the cost of one job of `asks`."""
    cli.write("one.jsonl", asks("one", marker))
    (result,) = await cli.run_json("submit", "one.jsonl", "--wait")
    return float(result["usage"]["cost_usd"])


async def test_no_job_is_submitted_beyond_the_maximum_cost(cli: Cli, stack: Stack) -> None:
    marker = uuid.uuid4().hex
    cost = await job_cost(cli, uuid.uuid4().hex)
    cli.write("jobs.jsonl", *(asks(f"{n}", marker) for n in range(100)))
    asked = ("submit", "jobs.jsonl", "--wait", "-o", "out.jsonl", "--json", "--name", "costly")
    limit = f"{40.5 * cost:.9f}"
    done = await cli.run(*asked, "--max-cost", f"${limit}")
    assert done.code == 1
    assert (done.summary["succeeded"], done.summary["pending"]) == (40, 60)
    assert done.summary["cost_usd"] == pytest.approx(40 * cost)
    assert len(questions(stack, marker)) == 40
    *_, stopped, hint = done.err_lines
    assert re.fullmatch(
        r"Stopped: spent \$0\.\d+ of --max-cost \$0\.\d+\. 60 of 100 jobs were not submitted\.", stopped
    )
    assert hint == "To submit the rest, run the same command with --name costly and a higher --max-cost."
    (shown,) = await cli.run_json("submissions", "show", "costly")
    assert (shown["max_cost"], shown["submitted"]) == (limit, 40)
    assert shown["stopped"].startswith("spent $0.")

    # The stored limit holds, and `collect` does not wait for jobs that were never submitted.
    for again in (asked, ("submissions", "collect", "costly", "-o", "out.jsonl")):
        stays = await cli.run(*again)
        assert stays.code == 1
        assert "Stopped: spent $0." in stays.err
    assert len(questions(stack, marker)) == 40

    more = await cli.run(*asked, "--max-cost", f"{60.5 * cost:.9f}")
    assert (more.code, more.summary["succeeded"]) == (1, 60)
    rest = await cli.run(*asked, "--max-cost", "1000")
    assert rest.code == 0, rest.err
    assert (rest.summary["succeeded"], rest.summary["pending"]) == (100, 0)
    assert sorted(questions(stack, marker)) == sorted(f"{marker} {n:>4}" for n in range(100))


async def test_results_without_a_cost_stop_a_submission_with_a_maximum(
    cli: Cli, stack: Stack, put_image: PutImage
) -> None:
    marker = uuid.uuid4().hex
    stack.model.play(Answer(usage="no_cost"), times=10, marker=marker)
    images = [put_image() for _ in range(15)]
    asked = ("submit", *images, marker, "--each", "--wait", "--json", "--max-cost", "20")
    done = await cli.run(*asked)
    assert (done.code, far(cli).received) == (1, 10)
    name = head(cli)["name"]
    stopped = "Stopped: --max-cost $20.00 needs results with a cost, and they have none."
    assert done.err_lines == [
        f"{stopped} 5 of 15 jobs were not submitted.",
        f"Set VQA_PRICES on the workers, then run the same command with --name {name}.",
    ]
    assert len(questions(stack, marker)) == len(done.objects) == 10
    # The workers have prices now.
    again = await cli.run(*asked, "--name", name)
    assert (again.code, len(again.objects), again.err) == (0, 15, "")


@pytest.mark.parametrize("interruption", [signal.SIGKILL, signal.SIGINT])
async def test_costs_before_an_interruption_count(
    start_worker: StartWorker, cli: Cli, stack: Stack, interruption: signal.Signals
) -> None:
    cost, marker = await job_cost(cli, uuid.uuid4().hex), uuid.uuid4().hex
    worker = await start_worker(VQA_MAX_CONCURRENCY="1")
    use(cli, worker)
    stack.model.play(Answer(), times=12, marker=marker)
    stack.model.play(Hang(), times=1, marker=marker)
    cli.write("jobs.jsonl", *(asks(f"{n}", marker) for n in range(60)))
    asked = ("submit", "jobs.jsonl", "--wait", "-o", "out.jsonl", "--json", "--name", "costly")
    submitting = cli.start(*asked, "--max-cost", f"{30.5 * cost:.9f}")
    await until(lambda: far(cli).received == 12, "some results are collected")
    submitting.send_signal(interruption)
    interrupted = await ended(submitting)
    assert interrupted.code == (130 if interruption is signal.SIGINT else -signal.SIGKILL)
    assert (interruption is signal.SIGINT) == ("Interrupted. Run the same command again" in interrupted.err)
    before = far(cli)
    assert before.confirmed + before.sent <= 30
    # The job that hangs is delivered again.
    await asyncio.to_thread(worker.kill)
    await worker.start()

    done = await cli.run(*asked)
    assert done.code == 1, done.err
    assert "Stopped: spent $0." in done.err
    assert (done.summary["succeeded"], done.summary["pending"]) == (30, 30)
    called = questions(stack, marker)
    assert len(set(called)) == 30
    # Without a result store, a job that is sent again after a kill can be billed again.
    assert len(called) <= 30 + 1 + before.sent


async def test_unconfirmed_jobs_are_sent_again_within_the_maximum(no_worker_cli: Cli, stack: Stack) -> None:
    """The submitter was killed in the middle of a chunk, before RabbitMQ had its jobs."""
    cli = no_worker_cli
    cli.write("jobs.jsonl", *(fails(f"{n}") for n in range(30)))
    asked = ("submit", "jobs.jsonl", "--wait", "--name", "killed", "--max-cost", "20")
    submitting = cli.start(*asked)
    await until(lambda: far(cli).confirmed == FIRST_JOBS, "it waits for the first results")
    await kill(submitting)
    assert len(await drain(stack, cli.jobs_queue)) == FIRST_JOBS
    with contextlib.closing(sqlite3.connect(cli.state_files[0])) as file, file:
        file.execute("UPDATE jobs SET state = 1, body = ? WHERE state = 2", (b"{}",))

    # Nobody knows whether they have results: `collect` does not wait for them.
    collected = await cli.run("submissions", "collect", "killed")
    assert (collected.code, far(cli).pending) == (1, 30)
    resumed = cli.start(*asked)
    await until(lambda: far(cli).confirmed == FIRST_JOBS, "they are sent again")
    assert {it.message_id for it in await drain(stack, cli.jobs_queue)} == {f"{n}" for n in range(FIRST_JOBS)}
    # Jobs that were not billed make room for others.
    await publish_failures(stack, head(cli)["reply_to"], *(f"{n}" for n in range(FIRST_JOBS)))
    await until(lambda: far(cli).confirmed == 2 * FIRST_JOBS, "more jobs are sent")
    await kill(resumed)


async def test_failures_that_cost_nothing_use_nothing_of_the_maximum(cli: Cli) -> None:
    """There are more of them than jobs may be sent before the first cost is known."""
    jobs = [*(fails(f"f{n}") for n in range(15)), *(asks(f"{n}", "Both?") for n in range(15))]
    cli.write("jobs.jsonl", *jobs)
    limits = ("--max-cost", "20", "--stop-after-failures", "100%")
    done = await cli.run("submit", "jobs.jsonl", "--wait", "--json", "-o", "out.jsonl", *limits)
    assert (done.summary["succeeded"], done.summary["failed"], done.summary["pending"]) == (15, 15, 0)
    assert "Stopped" not in done.err
