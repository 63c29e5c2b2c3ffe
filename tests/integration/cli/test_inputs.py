"""Files of jobs for `vqa-worker submit`: JSONL, CSV, and input files of the Batch API."""

import asyncio
import base64
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from deploy.local.stack import Stack
from tests.conftest import PutImage, picture
from tests.integration.cli.running import Cli, depth, drain
from tests.running import calls_with


def line(custom_id: str, content: Any, **fields: Any) -> dict[str, Any]:
    """Return a line of a Batch API input file."""
    body = {"model": "simulated/vision", "messages": [{"role": "user", "content": content}]}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body, **fields}


async def test_a_file_of_jobs_is_submitted_unchanged(cli: Cli, stack: Stack, put_image: PutImage) -> None:
    url = put_image()
    job = {
        "id": "one",
        "question": "Größe? \u2028",
        "images": [url],
        "metadata": {"n": 1},
        "model": "simulated/vision",
    }
    cli.write("jobs.jsonl", json.dumps(job, ensure_ascii=False), "", {"question": "No id?", "images": [url]})
    submitted = await cli.run("submit", "jobs.jsonl", "--json")
    assert submitted.code == 0, submitted.err
    name = submitted.summary["name"]
    assert submitted.summary == {
        "name": name,
        "jobs": 2,
        "submitted": 2,
        "queue": cli.jobs_queue,
        "reply_to": submitted.summary["reply_to"],
    }
    assert submitted.summary["reply_to"].startswith(f"vqa.results.{name}-")
    collected = await cli.run("submissions", "collect", name, "--json")
    assert sorted(result["id"] for result in collected.objects) == sorted([f"{name}-2", "one"])
    (call,) = calls_with(stack, "Größe? \u2028")
    assert call.ended


async def test_messages_have_the_properties_of_a_publisher(no_worker_cli: Cli, stack: Stack) -> None:
    long_id = "ü" * 256
    jobs = [{"id": id_, "question": "What?", "images": ["s3://b/k"]} for id_ in ("short", long_id)]
    no_worker_cli.write("jobs.jsonl", *jobs)
    before = datetime.now(UTC) - timedelta(seconds=1)
    submitted = await no_worker_cli.run("submit", "jobs.jsonl", "--json")
    short, long = await drain(stack, no_worker_cli.jobs_queue)
    assert [json.loads(message.body) for message in (short, long)] == jobs
    assert (short.message_id, short.correlation_id) == ("short", "short")
    assert short.reply_to == long.reply_to == submitted.summary["reply_to"]
    assert short.content_type == "application/json"
    assert short.delivery_mode == 2
    assert short.timestamp is not None
    assert short.timestamp >= before.replace(microsecond=0)
    assert isinstance(short.headers["timestamp_in_ms"], int)
    # Too long for a property: the id is in the body only.
    assert long.message_id not in (None, long_id)
    assert long.correlation_id is None


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
async def test_a_csv_file_with_any_delimiter_is_a_file_of_jobs(
    no_worker_cli: Cli, stack: Stack, delimiter: str
) -> None:
    rows = [
        ["id", "image1", "image2", "question", "max_tokens", "order", "deadline"],
        ["a", "s3://b/1", "s3://b/2", '"Two\nlines?"', "20", "17", "2030-01-31T12:00:00Z"],
        ["", "s3://b/3", "", "One?", "", "", ""],
        [""] * 7,
    ]
    text = "\ufeff" + "\r\n".join(delimiter.join(row) for row in rows)
    (no_worker_cli.folder / "jobs.csv").write_text(text, encoding="utf-8", newline="")
    submitted = await no_worker_cli.run("submit", "jobs.csv", "--name", "mine")
    assert submitted.code == 0, submitted.err
    assert [json.loads(message.body) for message in await drain(stack, no_worker_cli.jobs_queue)] == [
        {
            "id": "a",
            "images": ["s3://b/1", "s3://b/2"],
            "question": "Two\nlines?",
            "params": {"max_tokens": 20},
            "metadata": {"order": "17"},
            "deadline": "2030-01-31T12:00:00Z",
        },
        {"id": "mine-2", "images": ["s3://b/3"], "question": "One?"},
    ]


async def test_a_cell_may_hold_a_long_data_url(no_worker_cli: Cli, stack: Stack) -> None:
    long = f"data:image/png;base64,{'A' * 200_000}"
    no_worker_cli.write("jobs.csv", "image1,image2", f's3://b/1,"{long}"')
    await no_worker_cli.run("submit", "jobs.csv", "--question", "What?")
    (message,) = await drain(stack, no_worker_cli.jobs_queue)
    assert json.loads(message.body)["images"] == ["s3://b/1", long]


async def test_stdin_is_detected_as_jsonl_csv_or_batch(no_worker_cli: Cli, stack: Stack) -> None:
    jsonl = json.dumps({"question": "What?", "images": ["s3://b/k"]})
    for text in (jsonl, "image,question\ns3://b/k,What?\n", json.dumps(line("x", "What?"))):
        submitted = await no_worker_cli.run("submit", "-", "--json", stdin=text)
        assert submitted.code == 0, submitted.err
        assert submitted.summary["name"].startswith("stdin-")
    assert await depth(stack, no_worker_cli.jobs_queue) == 3
    again = await no_worker_cli.run("submit", "-", "--json", stdin=jsonl)
    assert again.summary["submitted"] == 0


async def test_batch_requests_become_jobs_with_all_params(no_worker_cli: Cli, stack: Stack) -> None:
    picture_url = f"data:image/png;base64,{base64.b64encode(picture()).decode()}"
    content = [
        {"type": "text", "text": "What?"},
        {"type": "image_url", "image_url": {"url": picture_url, "detail": "low"}},
    ]
    request = line("request 1/ü", content)
    request["body"].update({"max_completion_tokens": 50, "temperature": 0, "stream": False, "n": 1})
    # The format is detected from the content, not from the name.
    no_worker_cli.write("input.ndjson", request, line("\n", "Only words"))
    submitted = await no_worker_cli.run("submit", "input.ndjson", "--name", "batch")
    assert submitted.code == 0, submitted.err
    first, second = [json.loads(message.body) for message in await drain(stack, no_worker_cli.jobs_queue)]
    assert first == {
        "id": "batch-request 1/ü",
        "model": "simulated/vision",
        "messages": [{"role": "user", "content": content}],
        "params": {"max_completion_tokens": 50, "temperature": 0},
    }
    # An unprintable id is replaced by its hash.
    assert second["id"].startswith("batch-")
    assert len(second["id"]) == len("batch-") + 32


async def test_invalid_jobs_are_listed_and_nothing_is_submitted(no_worker_cli: Cli, stack: Stack) -> None:
    fine = {"id": "fine", "question": "What?", "images": ["s3://b/k"]}
    no_worker_cli.write(
        "jobs.jsonl", fine, "{", "[]", {**fine, "id": "b", "imags": []}, fine, {**fine, "id": 7}
    )
    refused = await no_worker_cli.run("submit", "jobs.jsonl")
    assert (refused.code, refused.out) == (2, "")
    first, *named, last = refused.err.splitlines()
    assert first == "Error: 5 invalid jobs; nothing submitted."
    assert [error.split(": ", 1)[0] for error in named] == [
        f"jobs line {number}" for number in (2, 3, 4, 5, 6)
    ]
    assert "imags: unknown field" in refused.err
    assert "duplicate id" in refused.err
    assert last.startswith("Use --skip-invalid")
    no_worker_cli.write("many.jsonl", *["{"] * 30)
    assert "and 20 more" in (await no_worker_cli.run("submit", "many.jsonl")).err
    assert await depth(stack, no_worker_cli.jobs_queue) == 0
    assert no_worker_cli.state_files == []


async def test_unsupported_batch_requests_are_listed(no_worker_cli: Cli) -> None:
    embeddings = line("b", "x", url="/v1/embeddings")
    several, streamed = line("c", "x"), line("d", "x")
    several["body"]["n"], streamed["body"]["stream"] = 2, True
    no_worker_cli.write(
        "batch.jsonl",
        line("a", "x"),
        embeddings,
        several,
        streamed,
        {**line("e", "x"), "body": 1},
        line("a", "y"),
    )
    refused = await no_worker_cli.run("submit", "batch.jsonl")
    assert refused.code == 2
    assert [error.partition(": ")[2] for error in refused.err.splitlines()[1:-1]] == [
        "only POST /v1/chat/completions is supported, not POST /v1/embeddings",
        "body.n: streaming and several answers per request are not supported",
        "body.stream: streaming and several answers per request are not supported",
        "body: must be an object",
        "duplicate custom_id",
    ]


async def test_malformed_csv_files_are_errors(no_worker_cli: Cli) -> None:
    tables = (
        ("question\nWhat?", "the first line must contain the column names, including `image`"),
        ("image,image\na,b", "two columns have the same name"),
        ("image,seed\ns3://b/k,x", "line 2: seed: must be a number"),
        ("image\ns3://b/k,x,y", "line 2: has 3 cells but the first line has 1 columns"),
    )
    for number, (text, _) in enumerate(tables):
        no_worker_cli.write(f"jobs{number}.csv", text)
    runs = (
        no_worker_cli.run("submit", f"jobs{number}.csv", "--question", "What?")
        for number in range(len(tables))
    )
    for (_, reported), refused in zip(tables, await asyncio.gather(*runs), strict=True):
        assert refused.code == 2, refused
        assert reported in refused.err
    (no_worker_cli.folder / "latin.csv").write_bytes("image\nü".encode("latin-1"))
    assert "is not UTF-8 text" in (await no_worker_cli.run("submit", "latin.csv", "--question", "What?")).err
    missing = await no_worker_cli.run("submit", "missing.csv")
    assert (missing.code, missing.err) == (1, "Error: missing.csv: No such file or directory\n")
