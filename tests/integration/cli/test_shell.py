"""Behaviour of all commands: help, completion, exit codes, error messages, pipes, Ctrl-C."""

import asyncio
import json
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aio_pika
import pytest
import typer
import typer.main

from deploy.local.stack import Stack
from tests.breaking import url_as
from tests.integration.cli.running import Cli, Completed, channel_of, ended
from tests.integration.cli.terminal import Terminal
from tests.running import until
from worker.cli.commands import build

NOBODY = "amqp://guest:guest@127.0.0.1:1/"
# Arguments with which each command connects to the broker.
REACHING_OUT = (
    ("submit", "s3://bucket/key", "What?"),
    ("submissions", "collect", "known"),
)


def _commands() -> Iterator[tuple[str, ...]]:
    """Yield the arguments of each command and each group."""

    def walk(command: Any, *names: str) -> Iterator[tuple[str, ...]]:
        yield names
        for name, inner in getattr(command, "commands", {}).items():
            yield from walk(inner, *names, name)

    return walk(typer.main.get_command(build(lambda _: 0)))


COMMANDS = sorted(_commands())
# `submit` has too many options for one screen.
LONG_HELP = {("submit",)}


@pytest.mark.parametrize("names", COMMANDS, ids=" ".join)
async def test_help_fits_a_screen_and_begins_with_examples(cli: Cli, names: tuple[str, ...]) -> None:
    helped = await cli.run(*names, "--help", COLUMNS="80")
    assert (helped.code, helped.err) == (0, "")
    assert max(map(len, helped.lines)) <= 80
    assert len(helped.lines) <= 36 or names in LONG_HELP
    assert not re.search(r"<\w|[x>]=?\d|`{2}|\.\.\.$", helped.out.partition("\n")[2])
    if not any(inner[:-1] == names for inner in COMMANDS if inner):
        example = f"    vqa-worker {' '.join(names)}"
        assert next(line for line in helped.lines[4:] if line).lstrip().startswith(("vqa-worker", "eval"))
        assert example in helped.out or "completion" in names
        assert "--json" in helped.out


async def test_the_common_options_may_come_before_and_after_the_command(cli: Cli) -> None:
    (cli.folder / "other.env").write_text("VQA_JOBS_QUEUE=from-the-file\n")
    del cli.settings["VQA_JOBS_QUEUE"]
    for arguments in (
        ("--env-file", "other.env", "topology", "show", "--json"),
        ("--json", "topology", "show", "--env-file", "other.env"),
        ("--json", "--env-file", "nothing.env", "topology", "show"),
    ):
        ended = await cli.run(*arguments)
        if "nothing.env" in arguments:
            assert (ended.code, ended.out) == (2, "")
            assert "'nothing.env' does not exist" in ended.err
        else:
            assert (ended.code, ended.err) == (0, "")
            assert "from-the-file" in {queue["name"] for queue in json.loads(ended.out)["queues"]}


async def test_the_url_option_overrides_the_setting(cli: Cli) -> None:
    for arguments in (("dlq", "list", "--url", NOBODY), ("--url", NOBODY, "dlq", "list")):
        ended = await cli.run(*arguments, "--timeout", "0.5")
        assert (ended.code, len(ended.err_lines)) == (1, 1)
        assert "the broker was unreachable for 0.5 s" in ended.err


@pytest.mark.parametrize(
    ("arguments", "code", "reported"),
    [
        (
            ("dlq", "list", "--url", NOBODY, "--timeout", "0.5"),
            1,
            "VQA_RABBITMQ_URL: the broker was unreachable",
        ),
        (("dlq", "list", "--nothing"), 2, "No such option"),
        (("dlq", "purge"), 2, "no filter"),
        (("dlq", "list", "--url", "rabbit"), 78, "VQA_RABBITMQ_URL: must begin with amqp://"),
    ],
)
async def test_with_json_an_error_is_one_object(
    cli: Cli, arguments: tuple[str, ...], code: int, reported: str
) -> None:
    ended = await cli.run(*arguments, "--json")
    assert (ended.code, ended.out) == (code, "")
    error = json.loads(ended.err)
    assert error["exit_code"] == code
    assert error["error"].startswith(reported)


async def test_quiet_prints_no_notes_and_verbose_prints_the_libraries_log_lines(no_worker_cli: Cli) -> None:
    noted = await no_worker_cli.run("dlq", "list")
    assert (noted.code, len(noted.err_lines)) == (0, 1)
    for option in ("-q", "--quiet"):
        quiet = await no_worker_cli.run("dlq", "list", option)
        assert (quiet.code, quiet.err) == (0, "")
    # In its own process, because the tests replace the logging of commands.
    verbose = await no_worker_cli.run_process("dlq", "list", "-v", "--url", NOBODY, "--timeout", "0.5")
    assert verbose.code == 1
    assert "aiormq.connection" in verbose.err
    assert not verbose.err.startswith("{")


async def test_errors_have_color_only_on_a_terminal_that_wants_it(cli: Cli) -> None:
    for options, environment, is_red in (
        ((), {"NO_COLOR": ""}, True),
        ((), {"NO_COLOR": "1"}, False),
        (("--no-color",), {"NO_COLOR": ""}, False),
    ):
        shown = Terminal(cli, "dlq", "purge", *options, environment=environment)
        assert await shown.ended() == 2
        assert ("\x1b[1;31mError:" in shown.raw) is is_red
        assert "Error: no filter." in shown.shown


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
async def test_the_completion_script_calls_the_command(cli: Cli, shell: str) -> None:
    printed = await cli.run("completion", shell)
    assert (printed.code, printed.err) == (0, "")
    assert f"_VQA_WORKER_COMPLETE=complete_{shell}" in printed.out


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

    assert sorted(await complete("sub")) == ["submissions", "submit"]
    assert "--dry-run" in await complete("submit", "--d")
    assert await complete("topology", "a") == ["apply"]
    await cli.run("submit", put_image_url, "What?", "--name", "mine")
    assert await complete("submissions", "collect", "") == ["mine"]


async def test_an_unreachable_broker_is_one_message(cli: Cli) -> None:
    await _submit_known(cli)
    cli.settings["VQA_RABBITMQ_URL"] = NOBODY
    for end in await _side_by_side(cli, *((*command, "--timeout", "0.5") for command in REACHING_OUT)):
        assert (end.code, end.out) == (1, "")
        # `submissions collect` first warns that the jobs were submitted to another broker.
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
        (("submit", "s3://b/k", "What?", "-o", "out.jsonl"), "--output"),
        (
            ("submit", "--prefix", "photos/", "What?"),
            "--prefix: photos/ is not of the form s3://bucket/prefix",
        ),
        (("submit", "s3://b/k", "What?", "--param", "top_p"), "--param: top_p is not of the form NAME=VALUE"),
        (("submit", "s3://b/k", "What?", "--wait-timeout", "5"), "--wait-timeout requires --wait"),
        (("submit", "s3://b/k", "What?", "--name", "a/b"), "must consist of"),
        (("submit", "--nothing"), "No such option"),
        (("submit", "s3://b/k", "What?", "--max-queue", "-1"), "must be greater than or equal to 0."),
        (("dlq", "list", "--limit", "0"), "'--limit': must be greater than or equal to 1."),
        (("dlq", "list", "--limit", "few"), "'--limit': must be a valid integer."),
        (("top", "--interval", "0"), "'--interval': 0 is not a number of seconds above 0."),
        (("top", "--worker", "https://host"), "--worker: 'https://host' is not a URL of a worker"),
        (
            ("submissions", "collect", "x", "--no-wait", "--wait-timeout", "3"),
            "--no-wait and --wait-timeout cannot be combined",
        ),
        (("nothing",), "No such command"),
    )
    for (_, reported), end in zip(wrong, await _side_by_side(cli, *(it for it, _ in wrong)), strict=True):
        assert (end.code, end.out) == (2, ""), end
        assert reported in end.err
        assert not re.search("Traceback|Value error|Input should", end.err)


async def test_a_closed_pipe_is_not_an_error(cli: Cli, put_image_url: str) -> None:
    lines = [{"id": f"{n}", "question": "What?", "images": [put_image_url]} for n in range(50)]
    cli.write("jobs.jsonl", *lines)
    await cli.run("submit", "jobs.jsonl", "--name", "many", "--wait", "-o", "out.jsonl")
    process = cli.start("submissions", "collect", "many", "--json")
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    closed = await ended(process)
    assert (closed.code, closed.err) == (141, "")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("topology", "show"),
        ("topology", "apply", "--json"),
        ("schema",),
        ("config", "show"),
        ("completion", "bash"),
        ("check",),
        ("top", "--json"),
        ("dlq", "list"),
        ("dlq", "show", "it"),
        ("dlq", "replay", "--dry-run"),
    ],
    ids=" ".join,
)
async def test_a_closed_pipe_is_not_an_error_of_other_commands(
    no_worker_cli: Cli, stack: Stack, arguments: tuple[str, ...]
) -> None:
    async with channel_of(stack) as channel:
        dead = aio_pika.Message(b"{}", message_id="it")
        await channel.default_exchange.publish(dead, f"{no_worker_cli.jobs_queue}.dead")
    process = no_worker_cli.with_settings(VQA_ALLOWED_BUCKETS="b", VQA_MODEL_API_KEY="k").start(*arguments)
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    closed = await ended(process)
    assert closed.code == 141
    assert not re.search("Error|Traceback|Exception", closed.err)


async def test_run_takes_settings_from_a_file_and_options(cli: Cli) -> None:
    (cli.folder / "worker.env").write_text(
        "VQA_MAX_ATTEMPTS=many\nVQA_ALLOWED_BUCKETS=b\nVQA_MODEL_API_KEY=k\n"
    )
    ended = await cli.run_process("run", "--env-file", "worker.env", "--url", "rabbit")
    assert ended.code == 78
    assert [line.split(":")[:2] for line in ended.err_lines] == [
        ["Error", " VQA_RABBITMQ_URL"],
        ["Error", " VQA_MAX_ATTEMPTS"],
    ]


async def test_ctrl_c_exits_at_once_and_prints_how_to_resume(no_worker_cli: Cli) -> None:
    process = no_worker_cli.start("submit", "s3://bucket/key", "What?", "--name", "mine", "--wait")

    def is_sent() -> bool:
        counts = no_worker_cli.counts()
        return counts is not None and counts.confirmed == 1

    await until(is_sent, "the job is submitted")
    process.send_signal(signal.SIGINT)
    interrupted = await ended(process)
    assert (interrupted.code, interrupted.out) == (130, "")
    # On a busy machine the note that no worker consumes comes before.
    assert interrupted.err_lines[-1] == (
        "Interrupted. Run the same command again to resume mine; no job is submitted twice."
    )


async def _side_by_side(cli: Cli, *commands: tuple[str, ...]) -> list[Completed]:
    return await asyncio.gather(*(cli.run(*command) for command in commands))


async def _submit_known(cli: Cli) -> None:
    """Create a submission."""
    known = await cli.run("submit", "s3://bucket/key", "What?", "--name", "known")
    assert known.code == 0, known.err
