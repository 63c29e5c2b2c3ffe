"""Commands on a terminal: questions to a person, and bars that show how far things are."""

import asyncio
import json
import re
import signal

from deploy.local.stack import Stack
from tests.conftest import BUCKET, picture
from tests.integration.cli.running import Cli, depth
from tests.integration.cli.terminal import Terminal


async def test_a_person_is_asked_before_much_is_submitted(lone_cli: Cli, stack: Stack) -> None:
    job = {"question": "What?", "images": ["s3://b/k"], "model": "m"}
    lone_cli.write("jobs.jsonl", *[job] * 1001)
    lone_cli.settings["VQA_PRICES"] = json.dumps({"m": [10, 10]})
    refused = Terminal(lone_cli, "submit", "jobs.jsonl")
    await refused.shows(r"1,001 jobs about 1,001 images, for m")
    await refused.shows(r"Submit 1,001 jobs, about \$12\.03\? \[y/N\]")
    refused.type("\n")
    assert await refused.ended() == 1
    assert refused.shown.endswith("nothing was submitted\r\n")
    assert (await depth(stack, lone_cli.jobs_queue), lone_cli.manifests) == (0, [])

    agreed = Terminal(lone_cli, "submit", "jobs.jsonl")
    await agreed.shows(r"\[y/N\]")
    agreed.type("y\n")
    assert await agreed.ended() == 0
    assert re.search(r"submitted .*1001/1001", agreed.shown)
    assert await depth(stack, lone_cli.jobs_queue) == 1001

    unasked = Terminal(lone_cli, "submit", "jobs.jsonl", "--name", "other", "--yes")
    assert await unasked.ended() == 0
    assert "[y/N]" not in unasked.shown


async def test_bars_show_what_is_done_failed_and_paid(cli: Cli) -> None:
    fine = {"messages": [{"role": "user", "content": "Bars?"}]}
    cli.write("jobs.jsonl", *[fine] * 4, {"question": "What?", "images": ["s3://no-bucket/key"]})
    shown = Terminal(cli, "submit", "jobs.jsonl", "--wait", "-o", "out.jsonl")
    assert await shown.ended() == 1
    assert re.search(r"submitted .*5/5", shown.shown)
    assert re.search(r"results .*5/5 .*1 failed, \d+ tokens, \$0\.0\d+", shown.shown)
    assert re.search(r"4 answered, 1 failed, \d+ tokens, \$0\.0\d+\r\nwritten: out.jsonl\r\n$", shown.shown)


async def test_a_bar_shows_which_files_were_not_there(cli: Cli) -> None:
    for name in ("a.png", "b.png", "c.png"):
        (cli.folder / name).write_bytes(picture())
    first = Terminal(cli, "submit", "a.png", "b.png", "What?", "--bucket", BUCKET)
    assert await first.ended() == 0
    assert re.search(r"uploaded .*2/2 .*2 new", first.shown)
    second = Terminal(cli, "submit", "a.png", "c.png", "What?", "--bucket", BUCKET)
    assert await second.ended() == 0
    assert re.search(r"uploaded .*2/2 .*1 new", second.shown)


async def test_bars_and_answers_share_a_terminal(cli: Cli) -> None:
    cli.write(
        "jobs.jsonl", *({"id": f"it-{n}", "messages": [{"role": "user", "content": "?"}]} for n in range(3))
    )
    shown = Terminal(cli, "submit", "jobs.jsonl", "--wait")
    assert await shown.ended() == 0
    for number in range(3):
        assert f"it-{number}: [simulated model]" in shown.shown


async def test_answers_in_a_pipe_are_free_of_bars(cli: Cli) -> None:
    cli.write("jobs.jsonl", *({"messages": [{"role": "user", "content": "?"}]} for _ in range(3)))
    shown = Terminal(cli, "submit", "jobs.jsonl", "--wait", "--json", pipes=True)
    reading = asyncio.create_task(asyncio.to_thread(shown.process.communicate))
    assert await shown.ended() == 0
    out, _ = await reading
    assert [json.loads(line)["status"] for line in out.decode().splitlines()] == ["succeeded"] * 3
    assert "results" in shown.shown


async def test_a_submission_that_waits_says_what_for(lone_cli: Cli) -> None:
    lone_cli.write("jobs.jsonl", *[{"question": "What?", "images": ["s3://b/k"]}] * 5)
    shown = Terminal(lone_cli, "submit", "jobs.jsonl", "--max-queue", "2")
    await shown.shows(r"waiting: the queue holds 2 \(--max-queue 2\)")
    shown.process.send_signal(signal.SIGINT)
    assert await shown.ended() == 130
    assert "broken off; the same command goes on" in shown.shown
