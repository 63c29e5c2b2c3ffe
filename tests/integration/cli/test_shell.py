"""Behaviour of all commands: help, completion, exit codes, error messages, pipes, Ctrl-C."""

import asyncio
import signal
import sys
from pathlib import Path

import pytest

from deploy.local.stack import Stack
from tests.breaking import url_as
from tests.integration.cli.running import Cli, Completed, ended
from tests.running import until

NOBODY = "amqp://guest:guest@127.0.0.1:1/"
# Arguments with which each command connects to the broker.
REACHING_OUT = (
    ("submit", "s3://bucket/key", "What?"),
    ("results", "known"),
)


async def test_the_help_lists_every_command(cli: Cli) -> None:
    shown = await cli.run("--help")
    assert shown.code == 0
    for command in ("run", "topology", "submit", "results"):
        assert f"\n  {command} " in shown.out
    for helped in await _side_by_side(cli, ("submit", "--help"), ("results", "--help")):
        assert helped.code == 0
        assert "--json" in helped.out
        assert "\n    vqa-worker " in helped.out.split("Arguments")[0]


async def test_a_worker_starts_without_importing_the_command_line_s_libraries(cli: Cli) -> None:
    cli.command = [sys.executable, "-X", "importtime", "-m", "worker"]
    started = await cli.run("run", VQA_MODEL_BASE_URL="https://api.example/v1")
    assert started.code == 78
    assert "pydantic" in started.err
    for name in ("typer", "rich", "sqlite3"):
        assert f" {name}\n" not in started.err


async def test_the_version_is_printed(cli: Cli) -> None:
    reported = await cli.run("--version")
    assert reported.code == 0
    assert reported.out.startswith("vqa-worker ")


async def test_completion_offers_commands_and_submissions(cli: Cli, put_image_url: str) -> None:
    async def complete(*words: str) -> list[str]:
        asked = await cli.run_process(
            _VQA_WORKER_COMPLETE="complete_bash",
            COMP_WORDS=" ".join(("vqa-worker", *words)),
            COMP_CWORD=str(len(words)),
        )
        return asked.lines

    assert await complete("sub") == ["submit"]
    assert "--dry-run" in await complete("submit", "--d")
    assert await complete("topology", "a") == ["apply"]
    await cli.run("submit", put_image_url, "What?", "--name", "mine")
    assert await complete("results", "") == ["mine"]


async def test_an_unreachable_broker_is_one_message(cli: Cli) -> None:
    await _submit_known(cli)
    cli.settings["VQA_RABBITMQ_URL"] = NOBODY
    for end in await _side_by_side(cli, *((*command, "--timeout", "0.5") for command in REACHING_OUT)):
        assert (end.code, end.out) == (1, "")
        # `results` first warns that the jobs were submitted to another broker.
        *noted, line = end.err.splitlines()
        assert len(noted) <= 1
        assert line.startswith("Error: VQA_RABBITMQ_URL: the broker was unreachable for 0.5 s")


async def test_rejected_credentials_are_one_message(cli: Cli, stack: Stack) -> None:
    await _submit_known(cli)
    cli.settings["VQA_RABBITMQ_URL"] = url_as(stack, "guest", "wr0ng")
    for end in await _side_by_side(cli, *REACHING_OUT):
        assert (end.code, end.out) == (78, "")
        assert end.err == "Error: VQA_RABBITMQ_URL: the broker refuses this user name and password\n"


async def test_each_invalid_setting_is_one_message(cli: Cli) -> None:
    cli.settings.update(VQA_RABBITMQ_URL="rabbit", VQA_S3_ENDPOINT_URL="s3")
    for end in await _side_by_side(cli, *REACHING_OUT):
        assert (end.code, end.out) == (78, "")
        assert [line.split(":")[:2] for line in end.err.splitlines()] == [
            ["Error", " VQA_RABBITMQ_URL"],
            ["Error", " VQA_S3_ENDPOINT_URL"],
        ]


async def test_an_unknown_variable_is_a_warning(cli: Cli) -> None:
    ended = await cli.run("submit", "s3://b/k", "What?", "--dry-run", VQA_PRICE="1")
    assert ended.code == 0
    assert ended.err.startswith("Warning: VQA_PRICE: in the environment, is not a setting")


async def test_a_missing_jobs_queue_is_one_message(stack: Stack, tmp_path: Path) -> None:
    cli = Cli.of(stack, tmp_path)
    ended = await cli.run("submit", "s3://bucket/key", "What?")
    assert ended.code == 1
    (line,) = ended.err.splitlines()
    assert line.startswith(
        f"Error: the queue {cli.jobs_queue} does not exist. Start a worker, run `vqa-worker topology apply`"
    )


async def test_wrong_usage_exits_with_2(cli: Cli) -> None:
    wrong: tuple[tuple[tuple[str, ...], str], ...] = (
        (("submit",), "nothing to submit"),
        (("submit", "s3://b/k", "What?", "--reply-to", "q", "--wait"), "--reply-to"),
        (("submit", "s3://b/k", "What?", "-o", "out.jsonl"), "--output"),
        (
            ("submit", "--prefix", "photos/", "What?"),
            "--prefix: photos/ is not of the form s3://bucket/prefix",
        ),
        (
            ("submit", "s3://b/k", "What?", "--param", "top_p=high"),
            "--param: the value of top_p is not JSON",
        ),
        (("submit", "s3://b/k", "What?", "--price", "much"), "--price: much is not two numbers"),
        (("submit", "s3://b/k", "What?", "--deadline", "soon"), "--deadline: soon is not a time"),
        (("submit", "s3://b/k", "What?", "--name", "a/b"), "must consist of"),
        (("submit", "--nothing"), "No such option"),
        (
            ("results", "x", "--no-wait", "--wait-timeout", "3"),
            "--no-wait and --wait-timeout cannot be combined",
        ),
        (("nothing",), "No such command"),
    )
    for (_, reported), end in zip(wrong, await _side_by_side(cli, *(it for it, _ in wrong)), strict=True):
        assert (end.code, end.out) == (2, ""), end
        assert reported in end.err
        assert "Traceback" not in end.err


async def test_a_closed_pipe_is_not_an_error(cli: Cli, put_image_url: str) -> None:
    lines = [{"id": f"{n}", "question": "What?", "images": [put_image_url]} for n in range(50)]
    cli.write("jobs.jsonl", *lines)
    await cli.run("submit", "jobs.jsonl", "--name", "many", "--wait", "-o", "out.jsonl")
    process = cli.start("results", "many", "--json")
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    closed = await ended(process)
    assert (closed.code, closed.err) == (141, "")


@pytest.mark.parametrize("arguments", [("topology", "show"), ("schema",), ("--help",)])
async def test_a_closed_pipe_is_not_an_error_of_other_commands(cli: Cli, arguments: tuple[str, ...]) -> None:
    process = cli.start(*arguments)
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    closed = await ended(process)
    assert (closed.code, closed.err) == (141, "")


async def test_ctrl_c_exits_at_once_and_prints_how_to_resume(no_worker_cli: Cli) -> None:
    process = no_worker_cli.start("submit", "s3://bucket/key", "What?", "--name", "mine", "--wait")

    def is_sent() -> bool:
        counts = no_worker_cli.counts()
        return counts is not None and counts.confirmed == 1

    await until(is_sent, "the job is submitted")
    process.send_signal(signal.SIGINT)
    interrupted = await ended(process)
    assert (interrupted.code, interrupted.out) == (130, "")
    assert interrupted.err == (
        "Interrupted. Run the same command again to resume mine; no job is submitted twice.\n"
    )


async def _side_by_side(cli: Cli, *commands: tuple[str, ...]) -> list[Completed]:
    return await asyncio.gather(*(cli.run(*command) for command in commands))


async def _submit_known(cli: Cli) -> None:
    """Create a submission."""
    known = await cli.run("submit", "s3://bucket/key", "What?", "--name", "known")
    assert known.code == 0, known.err
