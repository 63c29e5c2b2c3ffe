"""`vqa-worker results` and `submit --wait`: gathering on a queue of one's own, into several forms."""

import csv
import json
import re
import uuid
from typing import Any

import aio_pika
from openai.types.chat import ChatCompletion

from deploy.local.model_simulator.behavior import Error
from deploy.local.stack import Stack
from tests.conftest import PutImage, StartWorker
from tests.integration.cli.running import Cli, channel_of, depth, ended, killed
from tests.running import Client, until
from worker.cli.submit.manifest import Counts


def question(marker: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": marker}]}


def request(custom_id: str, content: str, **body: Any) -> dict[str, Any]:
    """A line of an input file of the Batch API."""
    messages = [{"role": "user", "content": content}]
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "simulated/vision", "messages": messages, **body},
    }


def far(cli: Cli) -> Counts:
    """How far the only submission has come."""
    return cli.counts() or Counts()


# Forms


async def test_a_batch_is_answered_with_an_output_and_an_error_file(cli: Cli) -> None:
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
    # OpenAI's own SDK takes the body for what it is.
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


async def test_where_workers_keep_the_api_s_answer_the_output_file_has_that(
    start_worker: StartWorker, cli: Cli
) -> None:
    worker = await start_worker(VQA_INCLUDE_RESPONSE="true")
    cli.settings.update(VQA_JOBS_QUEUE=worker.jobs_queue, VQA_RESULTS_QUEUE=worker.results_queue)
    cli.write("batch.jsonl", request("one", "Hello?"))
    assert (await cli.run("submit", "batch.jsonl", "--wait", "-o", "out.jsonl")).code == 0
    (line,) = cli.read("out.jsonl")
    assert line["response"]["body"]["id"].startswith("chatcmpl-")
    assert ChatCompletion.model_validate(line["response"]["body"]).choices[0].message.content
    # Without errors there is no error file, and one from another time does not stay.
    assert sorted(path.name for path in cli.folder.glob("*.jsonl")) == ["batch.jsonl", "out.jsonl"]


async def test_lines_that_are_no_requests_end_in_the_error_file(cli: Cli) -> None:
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


async def test_results_become_a_table(cli: Cli, put_image: PutImage) -> None:
    cli.write(
        "jobs.csv",
        "id,image,question,order",
        f'a,{put_image()},"What, then?",17',
        "b,s3://no-bucket/key,What?,18",
    )
    done = await cli.run("submit", "jobs.csv", "--wait", "-o", "out.csv")
    assert done.code == 1
    assert "1 answered, 1 failed, " in done.err
    assert done.err.endswith("written: out.csv\n")
    with (cli.folder / "out.csv").open(encoding="utf-8", newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["id"], first["status"], first["order"]) == ("a", "succeeded", "17")
    assert "PNG" in first["answer"]
    assert int(first["prompt_tokens"]) > 0
    assert float(first["cost_usd"]) > 0
    assert (second["id"], second["status"], second["error_code"]) == ("b", "failed", "image_not_found")
    assert second["answer"] == second["cost_usd"] == ""
    # The same results in another form, as often as they are wanted.
    again = await cli.run("submit", "jobs.csv", "--wait", "--json")
    assert [result["id"] for result in again.objects] == ["a", "b"]
    table = await cli.run("submit", "jobs.csv", "--wait", "--output-format", "csv")
    assert table.out == (cli.folder / "out.csv").read_text(encoding="utf-8")


async def test_results_in_files_are_in_the_order_of_the_jobs(cli: Cli) -> None:
    cli.write("jobs.jsonl", *({"id": f"{n}", **question("In order?")} for n in range(60)))
    done = await cli.run("submit", "jobs.jsonl", "--wait", "-o", "out.jsonl")
    assert done.code == 0
    assert [result["id"] for result in cli.read("out.jsonl")] == [str(n) for n in range(60)]


# Whose results


async def test_nobody_else_s_results_are_taken_and_the_queue_is_gone_in_the_end(
    cli: Cli, stack: Stack, client: Client
) -> None:
    cli.write("jobs.jsonl", *(question("Mine?") for _ in range(5)))
    submitted = await cli.run("submit", "jobs.jsonl", "--json")
    other = uuid.uuid4().hex
    await client.publish({"id": other, **question("Theirs?")})
    name, queue = submitted.summary["name"], submitted.summary["reply_to"]
    gathered = await cli.run("results", name, "--json")
    assert gathered.code == 0
    assert len(gathered.objects) == 5
    assert await depth(stack, queue) is None
    assert (await client.result(other)).body["status"] == "succeeded"
    # They are kept, and told again without the broker.
    again = await cli.run("results", name, "--json", VQA_RABBITMQ_URL="amqp://127.0.0.1:1/")
    assert again.code == 0
    assert re.fullmatch(
        r"it was submitted to amqp://\S+, and VQA_RABBITMQ_URL names amqp://127.0.0.1:1/\n", again.err
    )
    assert sorted(again.lines) == sorted(gathered.lines)


async def test_a_result_that_comes_twice_is_told_once_and_others_are_left_out(
    lone_cli: Cli, stack: Stack
) -> None:
    lone_cli.write("jobs.jsonl", {"id": "a", **question("?")}, {"id": "b", **question("?")})
    submitted = (await lone_cli.run("submit", "jobs.jsonl", "--json")).summary
    async with channel_of(stack) as channel:
        for body in (_result("a"), _result("a"), b"no JSON", b"[]", _result("c"), _result("b")):
            await _publish(channel, submitted["reply_to"], body)
    gathered = await lone_cli.run("results", submitted["name"], "--json")
    assert gathered.code == 0
    assert [result["id"] for result in gathered.objects] == ["a", "b"]
    assert gathered.err == "results in the queue that are of no job of this submission: 3\n"


async def test_a_queue_that_is_gone_is_one_sentence(lone_cli: Cli, stack: Stack) -> None:
    submitted = (await lone_cli.run("submit", "s3://b/k", "What?", "--json")).summary
    waiting = lone_cli.start("results", submitted["name"])
    async with channel_of(stack) as channel:

        async def is_read() -> bool:
            declared = await channel.declare_queue(submitted["reply_to"], passive=True)
            return bool(declared.declaration_result.consumer_count)

        await until(is_read, "the queue is read")
        await channel.queue_delete(submitted["reply_to"])
    gone = await ended(waiting)
    for end in (gone, await lone_cli.run("results", submitted["name"])):
        assert (end.code, end.out) == (1, "")
        (sentence,) = end.err.splitlines()
        assert sentence.startswith(f"the queue {submitted['reply_to']} does not exist any more")


# How long


async def test_a_gatherer_that_is_killed_loses_nothing_and_tells_nothing_twice(
    start_worker: StartWorker, cli: Cli
) -> None:
    worker = await start_worker(VQA_MAX_CONCURRENCY="4")
    cli.settings.update(VQA_JOBS_QUEUE=worker.jobs_queue, VQA_RESULTS_QUEUE=worker.results_queue)
    ids = [f"job-{n}" for n in range(400)]
    cli.write("jobs.jsonl", *({"id": job_id, **question("Killed?")} for job_id in ids))
    gathering = cli.start("submit", "jobs.jsonl", "--wait", "-o", "out.jsonl")
    await until(lambda: far(cli).in_hand >= 40, "some results are there")
    await killed(gathering)
    before = far(cli)
    assert before.missing, "it was over before it was killed"
    assert not (cli.folder / "out.jsonl").exists()

    name = cli.manifests[0].name.removesuffix(".submission")
    assert (await cli.run("submit", "jobs.jsonl")).code == 0  # what was not submitted yet
    gathering = cli.start("results", name, "-o", "out.jsonl")
    await until(lambda: far(cli).in_hand >= before.in_hand + 40, "more results are there")
    await killed(gathering)
    done = await cli.run("results", name, "-o", "out.jsonl", "--json")
    assert done.code == 0, done.err
    assert [result["id"] for result in cli.read("out.jsonl")] == ids
    assert done.summary["succeeded"] == 400
    tokens = sum(result["usage"]["total_tokens"] for result in cli.read("out.jsonl"))
    assert done.summary["total_tokens"] == tokens


async def test_what_is_there_now_can_be_had_without_waiting(lone_cli: Cli, stack: Stack) -> None:
    lone_cli.write("jobs.jsonl", *({"id": job_id, **question("?")} for job_id in "abc"))
    submitted = (await lone_cli.run("submit", "jobs.jsonl", "--json")).summary
    async with channel_of(stack) as channel:
        await _publish(channel, submitted["reply_to"], _result("b"))
    now = await lone_cli.run("results", submitted["name"], "--no-wait", "-o", "out.jsonl", "--json")
    assert now.code == 1
    assert now.summary["missing"] == 2
    assert [result["id"] for result in lone_cli.read("out.jsonl")] == ["b"]
    late = await lone_cli.run("results", submitted["name"], "--wait-timeout", "0.5")
    assert late.code == 1
    assert late.lines == ["b: an answer"]
    assert "results that have not come within 0.5 s: 2" in late.err
    assert await depth(stack, submitted["reply_to"]) == 0


async def test_submissions_are_listed_and_forgotten(lone_cli: Cli, stack: Stack) -> None:
    assert (await lone_cli.run("results")).err.startswith("no submissions in ")
    first = (await lone_cli.run("submit", "s3://b/k", "What?", "--name", "first", "--json")).summary
    await lone_cli.run("submit", "s3://b/k", "What?", "--name", "second")
    listed = await lone_cli.run("results", "--json")
    assert {it["name"]: (it["jobs"], it["submitted"], it["missing"]) for it in listed.objects} == {
        "first": (1, 1, 1),
        "second": (1, 1, 1),
    }
    unknown = await lone_cli.run("results", "third")
    assert (unknown.code, unknown.out) == (1, "")
    assert unknown.err.startswith("there is no submission of the name third here (there are: ")
    forgotten = await lone_cli.run("results", "first", "--delete")
    assert forgotten.lines == ["first is forgotten; 1 of its results had not come"]
    assert await depth(stack, first["reply_to"]) is None
    assert [it["name"] for it in (await lone_cli.run("results", "--json")).objects] == ["second"]


async def test_results_come_while_jobs_are_still_being_submitted(cli: Cli, stack: Stack) -> None:
    """With room for one job at a time in the queue, all get through."""
    stack.model.play(Error(status=500), marker="At once?")
    cli.write("jobs.jsonl", *(question(f"At once? {n}") for n in range(30)))
    done = await cli.run("submit", "jobs.jsonl", "--max-queue", "1", "--wait", "--json")
    assert done.code == 0, done.err
    assert len(done.objects) == 30


def _result(job_id: str) -> bytes:
    return json.dumps({"id": job_id, "status": "succeeded", "answer": "an answer"}).encode()


async def _publish(channel: Any, queue: str, body: bytes) -> None:
    await channel.default_exchange.publish(aio_pika.Message(body), queue)
