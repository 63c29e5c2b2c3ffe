"""Commands on a terminal: confirmation and progress bars."""

import asyncio
import json
import re
import signal

from deploy.local.stack import Stack
from tests.conftest import BUCKET, picture
from tests.integration.cli.running import Cli, depth
from tests.integration.cli.terminal import Terminal, rows


async def test_a_large_submission_asks_for_confirmation(no_worker_cli: Cli, stack: Stack) -> None:
    job = {"question": "What?", "images": ["s3://b/k"], "model": "m"}
    no_worker_cli.write("jobs.jsonl", *[job] * 1001)
    no_worker_cli.settings["VQA_PRICES"] = json.dumps({"m": [10, 10]})
    refused = Terminal(no_worker_cli, "submit", "jobs.jsonl")
    await refused.shows(r"1,001 jobs with 1,001 images for m")
    await refused.shows(r"Submit 1,001 jobs, about \$12\.01\? \[y/N\]")
    refused.type("\n")
    assert await refused.ended() == 1
    assert refused.shown.endswith("Nothing submitted.\r\n")
    assert (await depth(stack, no_worker_cli.jobs_queue), no_worker_cli.state_files) == (0, [])

    # Few jobs, but expensive.
    no_worker_cli.write("jobs.jsonl", *[job] * 2)
    no_worker_cli.settings["VQA_PRICES"] = json.dumps({"m": [10_000, 10_000]})
    agreed = Terminal(no_worker_cli, "submit", "jobs.jsonl")
    await agreed.shows(r"Submit 2 jobs, about \$24\.00\? \[y/N\]")
    agreed.type("y\n")
    assert await agreed.ended() == 0
    assert re.search(r"submitted .*2/2", agreed.shown)

    unasked = Terminal(no_worker_cli, "submit", "jobs.jsonl", "--name", "other", "--yes")
    assert await unasked.ended() == 0
    assert "[y/N]" not in unasked.shown
    assert await depth(stack, no_worker_cli.jobs_queue) == 4


async def test_progress_bars_show_results_failures_and_cost(cli: Cli) -> None:
    fine = {"messages": [{"role": "user", "content": "Bars?"}]}
    cli.write("jobs.jsonl", *[fine] * 4, {"question": "What?", "images": ["s3://no-bucket/key"]})
    shown = Terminal(cli, "submit", "jobs.jsonl", "--wait", "-o", "out.jsonl")
    assert await shown.ended() == 1
    assert re.search(r"submitted .*5/5", shown.shown)
    assert re.search(r"results .*5/5 .*1 failed, \d+ tokens, \$0\.0\d+", shown.shown)
    assert re.search(r"4 succeeded, 1 failed, \d+ tokens, \$0\.0\d+\r\nWrote out.jsonl\r\n$", shown.shown)


async def test_a_progress_bar_shows_uploads(cli: Cli) -> None:
    for name in ("a.png", "b.png"):
        (cli.folder / name).write_bytes(picture())
    first = Terminal(cli, "submit", "a.png", "b.png", "What?", "--bucket", BUCKET)
    assert await first.ended() == 0
    assert re.search(r"uploaded .*2/2", first.shown)


async def test_progress_bars_and_answers_share_a_terminal(cli: Cli) -> None:
    cli.write(
        "jobs.jsonl", *({"id": f"it-{n}", "messages": [{"role": "user", "content": "?"}]} for n in range(3))
    )
    shown = Terminal(cli, "submit", "jobs.jsonl", "--wait")
    assert await shown.ended() == 0
    for number in range(3):
        assert f"it-{number}: [simulated model]" in shown.shown


async def test_answers_in_a_pipe_have_no_progress_bars(cli: Cli) -> None:
    cli.write("jobs.jsonl", *({"messages": [{"role": "user", "content": "?"}]} for _ in range(3)))
    shown = Terminal(cli, "submit", "jobs.jsonl", "--wait", "--json", pipes=True)
    reading = asyncio.create_task(asyncio.to_thread(shown.process.communicate))
    assert await shown.ended() == 0
    out, _ = await reading
    assert [json.loads(line)["status"] for line in out.decode().splitlines()] == ["succeeded"] * 3
    assert "results" in shown.shown


async def test_a_waiting_submission_prints_the_reason_and_its_bars_once(no_worker_cli: Cli) -> None:
    no_worker_cli.write("jobs.jsonl", *[{"question": "What?", "images": ["s3://b/k"]}] * 5)
    asked = ("submit", "jobs.jsonl", "--max-queue", "2", "--wait")
    shown = Terminal(no_worker_cli, *asked, columns=80)
    await shown.shows(r"paused: 2 jobs on the queue \(--max-queue\)")
    await shown.shows("waiting: no worker is consuming")
    # The terminal shows the key, and the kernel sends the signal.
    shown.type("^C")
    await shown.shows(r"\^C")
    shown.process.send_signal(signal.SIGINT)
    assert await shown.ended() == 130
    lines = [line for line in rows(shown.raw, 80) if line]
    assert [line.split()[0] for line in lines if "/5" in line] == ["submitted", "results"], lines
    assert " ".join(lines[-2:]).startswith("Interrupted. Run the same command again to resume jobs-"), lines
    assert max(map(len, lines)) <= 80
