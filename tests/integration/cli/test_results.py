"""`vqa-worker submissions`, `cancel` and `submit --wait`: collecting results, output formats."""

import asyncio
import csv
import json
import re
import uuid
from collections import Counter
from typing import Any

import aio_pika
from openai.types.chat import ChatCompletion

from deploy.local.model_simulator.behavior import Error
from deploy.local.stack import Stack
from tests.conftest import PutImage, StartWorker
from tests.integration.cli.running import Cli, channel_of, depth, ended, kill
from tests.running import Client, until
from worker.cli.submit.state import Counts


def question(marker: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": marker}]}


def request(custom_id: str, content: str, **body: Any) -> dict[str, Any]:
    """Return a line of a Batch API input file."""
    messages = [{"role": "user", "content": content}]
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "simulated/vision", "messages": messages, **body},
    }


def far(cli: Cli) -> Counts:
    """Return the progress of the only submission."""
    return cli.counts() or Counts()


# Output formats


async def test_a_batch_gets_an_output_and_an_error_file(cli: Cli) -> None:
    cli.write(
        "batch.jsonl",
        request("request-1", "Hello?"),
        request("request-2", "Which model?", model="gpt-4o"),
        request("request-3", "Goodbye?", max_tokens=3),
    )
    done = await cli.run(
        "submit", "batch.jsonl", "--wait", "-o", "out.jsonl", "--errors", "errors.jsonl", "--json"
    )
    assert done.code == 1
    assert done.summary["files"] == ["out.jsonl", "errors.jsonl"]
    first, third = cli.read("out.jsonl")
    assert [first["custom_id"], third["custom_id"]] == ["request-1", "request-3"]
    assert first.keys() == {"id", "custom_id", "response", "error"}
    assert first["id"].startswith("batch_req_")
    assert first["error"] is None
    assert first["response"].keys() == {"status_code", "request_id", "body"}
    assert first["response"]["status_code"] == 200
    assert first["response"]["request_id"].startswith("req_")
    # OpenAI's SDK parses the body as a chat completion.
    body = ChatCompletion.model_validate(first["response"]["body"], strict=True)
    assert body.object == "chat.completion"
    assert body.model == "simulated/vision"
    assert "Hello?" in str(body.choices[0].message.content)
    assert body.choices[0].message.role == "assistant"
    assert body.choices[0].finish_reason == "stop"
    assert body.usage is not None
    assert body.usage.total_tokens == body.usage.prompt_tokens + body.usage.completion_tokens > 0
    assert third["response"]["body"]["choices"][0]["finish_reason"] == "length"
    (second,) = cli.read("errors.jsonl")
    assert second == {
        "id": second["id"],
        "custom_id": "request-2",
        "response": None,
        "error": {"code": "invalid_job", "message": "model: is not among VQA_ALLOWED_MODELS"},
    }
    assert second["id"].startswith("batch_req_")


async def test_the_error_file_has_the_status_and_error_of_the_api(cli: Cli, stack: Stack) -> None:
    stack.model.play(Error(status=400, message="too long"), marker="Rejected?")
    cli.write("batch.jsonl", request("request-1", "Rejected?"), request("request-2", "Fine?"))
    done = await cli.run("submit", "batch.jsonl", "--wait", "-o", "out.jsonl")
    assert done.code == 1
    (rejected,) = cli.read("out.errors.jsonl")
    assert rejected["error"] is None
    assert rejected["response"]["status_code"] == 400
    assert rejected["response"]["body"]["error"]["code"] == "model_rejected"
    assert "too long" in rejected["response"]["body"]["error"]["message"]


async def test_malformed_results_do_not_stop_the_collection(no_worker_cli: Cli, stack: Stack) -> None:
    wrong = ["text", ["x"], {"total_tokens": "7"}, {"total_tokens": 10**400, "cost_usd": "free"}, 10**30]
    ids = [f"{number}" for number in range(len(wrong) + 1)]
    no_worker_cli.write("jobs.jsonl", *({"id": job_id, **question("?")} for job_id in ids))
    submitted = (await no_worker_cli.run("submit", "jobs.jsonl", "--json")).summary
    async with channel_of(stack) as channel:
        for job_id, usage in zip(ids, [*wrong, None], strict=True):
            body = json.dumps({**json.loads(_result(job_id)), "usage": usage}).encode()
            await _publish(channel, submitted["reply_to"], body)
    done = await no_worker_cli.run("submissions", "collect", submitted["name"], "-o", "out.csv", "--json")
    assert done.code == 0, done.err
    assert done.summary["succeeded"] == len(ids)


async def test_the_output_file_has_the_api_s_response_if_workers_include_it(
    start_worker: StartWorker, cli: Cli
) -> None:
    worker = await start_worker(VQA_INCLUDE_RESPONSE="true")
    cli.settings.update(VQA_JOBS_QUEUE=worker.jobs_queue, VQA_RESULTS_QUEUE=worker.results_queue)
    cli.write("batch.jsonl", request("one", "Hello?"))
    assert (await cli.run("submit", "batch.jsonl", "--wait", "-o", "out.jsonl")).code == 0
    (line,) = cli.read("out.jsonl")
    assert line["response"]["body"]["id"].startswith("chatcmpl-")
    assert ChatCompletion.model_validate(line["response"]["body"]).choices[0].message.content
    # Without errors there is no error file, and an earlier one is deleted.
    assert sorted(path.name for path in cli.folder.glob("*.jsonl")) == ["batch.jsonl", "out.jsonl"]


async def test_invalid_requests_are_in_the_error_file(cli: Cli) -> None:
    cli.write(
        "batch.jsonl", request("a", "Hello?"), {"custom_id": "b", "body": 1}, request("a", "Twice?"), "{"
    )
    done = await cli.run("submit", "batch.jsonl", "--skip-invalid", "--wait", "-o", "out.jsonl")
    assert done.code == 1
    assert [line["custom_id"] for line in cli.read("out.jsonl")] == ["a"]
    errors = cli.read("out.errors.jsonl")
    assert [line["error"]["code"] for line in errors] == ["invalid_job"] * 3
    assert [line["custom_id"] for line in errors[:2]] == ["b", "a"]
    assert errors[0]["error"]["message"] == "body: must be an object"


async def test_the_fields_of_answers_to_a_schema_are_columns(cli: Cli, put_image: PutImage) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"type": "string"}, "model": {"type": "integer"}},
        "required": ["colour", "model"],
    }
    cli.write("seen.json", schema)
    asked = ("submit", put_image(), put_image(), "Which?", "--each", "--schema", "seen.json", "--wait")
    done = await cli.run(*asked, "-o", "out.csv")
    assert done.code == 0, done.err
    with (cli.folder / "out.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    for row in rows:
        answer = json.loads(row["answer"])
        assert (row["colour"], row["parsed.model"]) == (answer["colour"], str(answer["model"]))
        assert row["model"] == "simulated/vision"
    (cli.folder / "no.json").write_text("[1]")
    for name, text in (("no.json", "is not a JSON object"), ("out.csv", "is not JSON")):
        wrong = await cli.run("submit", put_image(), "Which?", "--schema", name)
        assert wrong.code == 2
        assert f"--schema: {name} {text}" in wrong.err


async def test_results_are_written_as_csv(cli: Cli, put_image: PutImage) -> None:
    cli.write(
        "jobs.csv",
        "id,image,question,order",
        f'a,{put_image()},"What, then?",17',
        "b,s3://no-bucket/key,What?,18",
    )
    done = await cli.run("submit", "jobs.csv", "--wait", "-o", "out.csv")
    assert done.code == 1
    assert "1 succeeded, 1 failed, " in done.err
    assert done.err.endswith("Wrote out.csv\n")
    with (cli.folder / "out.csv").open(encoding="utf-8", newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["id"], first["status"], first["order"]) == ("a", "succeeded", "17")
    assert "PNG" in first["answer"]
    assert int(first["prompt_tokens"]) > 0
    assert float(first["cost_usd"]) > 0
    assert (second["id"], second["status"], second["error_code"]) == ("b", "failed", "image_not_found")
    assert second["answer"] == second["cost_usd"] == ""
    # The same results can be written again in other formats.
    again = await cli.run("submit", "jobs.csv", "--wait", "--json")
    assert [result["id"] for result in again.objects] == ["a", "b"]
    table = await cli.run("submit", "jobs.csv", "--wait", "--output-format", "csv")
    assert table.out == (cli.folder / "out.csv").read_text(encoding="utf-8")


async def test_files_of_results_have_the_order_of_the_jobs(cli: Cli) -> None:
    cli.write("jobs.jsonl", *({"id": f"{n}", **question("In order?")} for n in range(60)))
    done = await cli.run("submit", "jobs.jsonl", "--wait", "-o", "out.jsonl")
    assert done.code == 0
    assert [result["id"] for result in cli.read("out.jsonl")] == [str(n) for n in range(60)]


# Own results


async def test_only_own_results_are_collected_and_the_queue_is_deleted_at_the_end(
    cli: Cli, stack: Stack, client: Client
) -> None:
    cli.write("jobs.jsonl", *(question("Mine?") for _ in range(5)))
    submitted = await cli.run("submit", "jobs.jsonl", "--json")
    other = uuid.uuid4().hex
    await client.publish({"id": other, **question("Theirs?")})
    name, queue = submitted.summary["name"], submitted.summary["reply_to"]
    collected = await cli.run("submissions", "collect", name, "--json")
    assert collected.code == 0
    assert len(collected.objects) == 5
    assert await depth(stack, queue) is None
    assert (await client.result(other)).body["status"] == "succeeded"
    # The results are in the state file and can be printed again without the broker.
    again = await cli.run("submissions", "collect", name, "--json", VQA_RABBITMQ_URL="amqp://127.0.0.1:1/")
    assert again.code == 0
    assert re.fullmatch(
        r"Warning: submitted to amqp://\S+, but VQA_RABBITMQ_URL is amqp://127.0.0.1:1/.\n", again.err
    )
    assert sorted(again.lines) == sorted(collected.lines)
    # The same cluster, with the address of another node.
    urls = f"amqp://127.0.0.1:1/,{stack.rabbitmq.url}"
    assert not (await cli.run("submissions", "collect", name, "--json", VQA_RABBITMQ_URL=urls)).err


async def test_duplicate_and_unknown_results_are_ignored(no_worker_cli: Cli, stack: Stack) -> None:
    no_worker_cli.write("jobs.jsonl", {"id": "a", **question("?")}, {"id": "b", **question("?")})
    submitted = (await no_worker_cli.run("submit", "jobs.jsonl", "--json")).summary
    async with channel_of(stack) as channel:
        for body in (_result("a"), _result("a"), b"no JSON", b"[]", _result("c"), _result("b")):
            await _publish(channel, submitted["reply_to"], body)
    collected = await no_worker_cli.run("submissions", "collect", submitted["name"], "--json")
    assert collected.code == 0
    assert [result["id"] for result in collected.objects] == ["a", "b"]
    assert collected.err == "Ignored 3 unexpected results (unknown job id).\n"


async def test_a_deleted_reply_queue_is_reported(no_worker_cli: Cli, stack: Stack) -> None:
    submitted = (await no_worker_cli.run("submit", "s3://b/k", "What?", "--json")).summary
    waiting = no_worker_cli.start("submissions", "collect", submitted["name"])
    async with channel_of(stack) as channel:

        async def is_read() -> bool:
            declared = await channel.declare_queue(submitted["reply_to"], passive=True)
            return bool(declared.declaration_result.consumer_count)

        await until(is_read, "the queue is read")
        await channel.queue_delete(submitted["reply_to"])
    deleted = await ended(waiting)
    for end in (deleted, await no_worker_cli.run("submissions", "collect", submitted["name"])):
        assert (end.code, end.out) == (1, "")
        assert end.err_lines[-1].startswith(
            f"Error: the queue {submitted['reply_to']} does not exist any more"
        )


# Waiting


async def test_a_collector_that_is_killed_loses_and_repeats_no_result(
    start_worker: StartWorker, cli: Cli
) -> None:
    worker = await start_worker(VQA_MAX_CONCURRENCY="4")
    cli.settings.update(VQA_JOBS_QUEUE=worker.jobs_queue, VQA_RESULTS_QUEUE=worker.results_queue)
    ids = [f"job-{n}" for n in range(200)]
    cli.write("jobs.jsonl", *({"id": job_id, **question("Killed?")} for job_id in ids))
    collecting = cli.start("submit", "jobs.jsonl", "--wait", "-o", "out.jsonl")
    await until(lambda: far(cli).received >= 20, "some results are collected")
    await kill(collecting)
    before = far(cli)
    assert before.pending, "it was over before it was killed"
    assert not (cli.folder / "out.jsonl").exists()

    name = cli.state_files[0].name.removesuffix(".submission")
    assert (await cli.run("submit", "jobs.jsonl")).code == 0  # jobs that are not submitted yet
    collecting = cli.start("submissions", "collect", name, "-o", "out.jsonl")
    await until(lambda: far(cli).received >= before.received + 20, "more results are collected")
    await kill(collecting)
    done = await cli.run("submissions", "collect", name, "-o", "out.jsonl", "--json")
    assert done.code == 0, done.err
    assert [result["id"] for result in cli.read("out.jsonl")] == ids
    assert done.summary["succeeded"] == 200
    tokens = sum(result["usage"]["total_tokens"] for result in cli.read("out.jsonl"))
    assert done.summary["total_tokens"] == tokens


async def test_available_results_are_collected_without_waiting(no_worker_cli: Cli, stack: Stack) -> None:
    no_worker_cli.write("jobs.jsonl", *({"id": job_id, **question("?")} for job_id in "abc"))
    submitted = (await no_worker_cli.run("submit", "jobs.jsonl", "--json")).summary
    async with channel_of(stack) as channel:
        await _publish(channel, submitted["reply_to"], _result("b"))
    now = await no_worker_cli.run(
        "submissions", "collect", submitted["name"], "--no-wait", "-o", "out.jsonl", "--json"
    )
    assert now.code == 1
    assert now.summary["pending"] == 2
    assert [result["id"] for result in no_worker_cli.read("out.jsonl")] == ["b"]
    late = await no_worker_cli.run("submissions", "collect", submitted["name"], "--wait-timeout", "0.5")
    assert late.code == 1
    assert late.lines == ["b: an answer"]
    assert "2 results pending after 0.5 s." in late.err
    assert await depth(stack, submitted["reply_to"]) == 0


async def test_submissions_are_listed_shown_and_deleted(no_worker_cli: Cli, stack: Stack) -> None:
    assert (await no_worker_cli.run("submissions", "list")).err.startswith("No submissions in ")
    first = (await no_worker_cli.run("submit", "s3://b/k", "What?", "--name", "first", "--json")).summary
    await no_worker_cli.run("submit", "s3://b/k", "What?", "--name", "second")
    listed = await no_worker_cli.run_json("submissions", "list")
    assert {it["name"]: (it["jobs"], it["submitted"], it["pending"]) for it in listed} == {
        "first": (1, 1, 1),
        "second": (1, 1, 1),
    }
    table = await no_worker_cli.run("submissions", "list", "--limit", "1")
    heading, row = table.lines
    assert heading.split() == ["CREATED", "JOBS", "PENDING", "SUCCEEDED", "FAILED", "NAME"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d  1 +1 +0 +0 +(first|second)", row)
    assert table.err == "1 more (--limit)\n"
    (shown,) = await no_worker_cli.run_json("submissions", "show", "first")
    assert (shown["reply_to"], shown["pending"]) == (first["reply_to"], 1)
    assert "succeeded           0" in (await no_worker_cli.run("submissions", "show", "first")).lines
    for command in ("show", "collect", "cancel"):
        unknown = await no_worker_cli.run("submissions", command, "third")
        assert (unknown.code, unknown.out) == (1, "")
        assert unknown.err.startswith("Error: no such submission: third. ")

    unasked = await no_worker_cli.run("submissions", "delete", "first")
    assert unasked.code == 2
    assert "1 submission with 1 pending result would be deleted" in unasked.err
    deleted = await no_worker_cli.run("submissions", "delete", "first", "--yes")
    assert deleted.lines == ["Deleted first."]
    assert await depth(stack, first["reply_to"]) is None
    recent = await no_worker_cli.run("submissions", "delete", "--older-than", "1d", "--yes")
    assert (recent.code, recent.err) == (0, "No matching submissions.\n")
    assert [it["name"] for it in await no_worker_cli.run_json("submissions", "list")] == ["second"]
    await no_worker_cli.run("submissions", "delete", "--older-than", "0s", "--yes")
    assert no_worker_cli.state_files == []
    for wrong in ((), ("second", "--older-than", "1d"), ("--older-than", "soon")):
        assert (await no_worker_cli.run("submissions", "delete", *wrong)).code == 2


# Cancelling


async def test_a_cancelled_submission_gets_failed_results(start_worker: StartWorker, cli: Cli) -> None:
    worker = await start_worker(VQA_MAX_CONCURRENCY="1")
    cli.settings.update(VQA_JOBS_QUEUE=worker.jobs_queue, VQA_RESULTS_QUEUE=worker.results_queue)
    cli.write("jobs.jsonl", *({"id": f"cancel-{n}", **question("Cancelled?")} for n in range(300)))
    assert (await cli.run("submit", "jobs.jsonl", "--name", "mine")).code == 0
    assert (await cli.run("submissions", "cancel", "mine")).code == 0
    done = await cli.run("submissions", "collect", "mine", "--json")
    codes = Counter((it["error"] or {}).get("code") for it in done.objects)
    assert codes["cancelled"] > 0
    assert codes["cancelled"] + codes[None] == 300
    again = await cli.run("cancel", "--submission", "mine")
    assert again.out == "Cancelled 0 jobs.\n"


async def test_jobs_that_were_not_sent_are_cancelled_without_a_worker(no_worker_cli: Cli) -> None:
    no_worker_cli.write("jobs.jsonl", *({"id": f"{n}", **question("?")} for n in range(20)))
    submitting = no_worker_cli.start("submit", "jobs.jsonl", "--name", "mine", "--max-queue", "5")
    await until(lambda: far(no_worker_cli).confirmed == 5, "the submission waits")
    await kill(submitting)
    cancelled = await no_worker_cli.run("submissions", "cancel", "mine")
    assert cancelled.code == 1
    assert "no worker listens on the exchange" in cancelled.err
    assert (far(no_worker_cli).failed, far(no_worker_cli).pending) == (15, 5)
    assert (await no_worker_cli.run("submit", "jobs.jsonl", "--name", "mine", "--json")).code == 0
    assert far(no_worker_cli).failed == 15


async def test_jobs_are_cancelled_by_id(cli: Cli, no_worker_cli: Cli) -> None:
    cancelled = await cli.run("cancel", "a", "b", "--json")
    assert (cancelled.code, cancelled.summary) == (0, {"cancelled": 2})
    nobody = await no_worker_cli.run("cancel", "a")
    assert nobody.code == 1
    assert "no worker listens on the exchange" in nobody.err
    for wrong in ((), ("a", "--submission", "b")):
        assert (await cli.run("cancel", *wrong)).code == 2


# Without a worker


async def test_a_missing_consumer_is_reported_while_waiting(no_worker_cli: Cli) -> None:
    waiting = no_worker_cli.start("submit", "s3://b/k", "What?", "--wait", "--name", "mine")
    assert waiting.stderr is not None
    line = await asyncio.to_thread(waiting.stderr.readline)
    assert line.startswith(f"No worker is consuming from the queue {no_worker_cli.jobs_queue}. Start one")
    await kill(waiting)
    limited = await no_worker_cli.run("submissions", "collect", "mine", "--wait-timeout", "2")
    assert limited.code == 1
    assert "No worker is consuming from the queue" in limited.err
    assert "1 result pending after 2 s." in limited.err


async def test_results_are_collected_while_jobs_are_submitted(cli: Cli, stack: Stack) -> None:
    """All jobs are submitted to a queue with room for one job at a time."""
    stack.model.play(Error(status=500), marker="At once?")
    cli.write("jobs.jsonl", *(question(f"At once? {n}") for n in range(30)))
    done = await cli.run("submit", "jobs.jsonl", "--max-queue", "1", "--wait", "--json")
    assert done.code == 0, done.err
    assert len(done.objects) == 30


def _result(job_id: str) -> bytes:
    return json.dumps({"id": job_id, "status": "succeeded", "answer": "an answer"}).encode()


async def _publish(channel: Any, queue: str, body: bytes) -> None:
    await channel.default_exchange.publish(aio_pika.Message(body), queue)
