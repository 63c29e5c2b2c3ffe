"""Answers to a JSON schema, through a real broker and S3: a model answers wrongly once, twice, always."""

import json
import uuid
from typing import Any

import pytest

from deploy.local.model_simulator.behavior import Answer, Error, Outcome
from deploy.local.model_simulator.calls import Call
from deploy.local.stack import Stack
from tests.breaking import job
from tests.conftest import BUCKET, MakeClient, PutImage, StartWorker
from tests.running import Client, Reply, Worker, calls_with, until

SCHEMA = {
    "type": "object",
    "properties": {"total": {"type": "number"}, "currency": {"enum": ["EUR", "USD"]}},
    "required": ["total", "currency"],
    "additionalProperties": False,
}
PARAMS = {"response_format": {"type": "json_schema", "json_schema": {"name": "invoice", "schema": SCHEMA}}}
VALUE = {"total": 12.5, "currency": "EUR"}
CANARY = "Guilders-and-Thalers"

RIGHT = Answer(text=f"```json\n{json.dumps(VALUE)}\n```")
WRONG = Answer(text=json.dumps({"total": "12.5", "currency": CANARY}))


async def _ask(
    client: Client, stack: Stack, image: str, *outcomes: Outcome, **params: Any
) -> tuple[Reply, int]:
    """Return the result of a job whose calls have these outcomes, and the number of calls."""
    marker = uuid.uuid4().hex
    for outcome in outcomes:
        stack.model.play(outcome, marker=marker)
    reply = await client.ask(question=f"{marker}?", images=[image], params={**PARAMS, **params})
    return reply, stack_calls(stack, marker)


def stack_calls(stack: Stack, marker: str) -> int:
    """Return the number of calls for a job; the last message of a repair is not its question."""
    return sum(marker in json.dumps(call.messages) for call in stack.model.calls(""))


@pytest.fixture
async def patient(start_worker: StartWorker, client_of: MakeClient) -> tuple[Worker, Client]:
    """Return a worker that repairs twice, and a client."""
    worker = await start_worker(VQA_SCHEMA_REPAIRS="2")
    return worker, await client_of(worker)


async def test_a_wrong_answer_is_repaired(client: Client, stack: Stack, put_image: PutImage) -> None:
    reply, calls = await _ask(client, stack, put_image(), WRONG, RIGHT)
    assert (reply.body["status"], reply.body["parsed"], calls) == ("succeeded", VALUE, 2)
    assert reply.body["answer"] == RIGHT.text
    assert reply.body["response"] is None
    once, _ = await _ask(client, stack, put_image(), RIGHT)
    assert reply.body["usage"]["cost_usd"] > 2 * once.body["usage"]["cost_usd"]
    assert reply.body["usage"]["prompt_tokens"] > 2 * once.body["usage"]["prompt_tokens"]


async def test_every_call_has_the_images(client: Client, stack: Stack, put_image: PutImage) -> None:
    marker = uuid.uuid4().hex
    for outcome in (WRONG, RIGHT):
        stack.model.play(outcome, marker=marker)
    await client.ask(question=marker, images=[put_image(), put_image()], params=PARAMS)
    first, second = (call for call in stack.model.calls("") if marker in json.dumps(call.messages))
    assert [len(call.images) for call in (first, second)] == [2, 2]
    assert second.messages[0] == first.messages[0]
    assert second.messages[1] == {"role": "assistant", "content": WRONG.text}
    assert "currency: " in second.messages[2]["content"]
    assert first.params == second.params == PARAMS


async def test_an_answer_can_be_wrong_as_often_as_there_are_repairs(
    patient: tuple[Worker, Client], stack: Stack, put_image: PutImage
) -> None:
    worker, client = patient
    twice, calls = await _ask(client, stack, put_image(), WRONG, Answer(text="It costs 12.50."), RIGHT)
    assert (twice.body["status"], twice.body["parsed"], calls) == ("succeeded", VALUE, 3)
    always, calls = await _ask(client, stack, put_image(), WRONG, WRONG, WRONG)
    assert calls == 3
    body = always.body
    assert (body["status"], body["answer"], body["parsed"]) == ("failed", None, None)
    assert body["error"]["code"] == "schema_mismatch"
    assert not body["error"]["retryable"]
    assert 'total: the value is not of type "number"' in body["error"]["message"]
    assert body["response"]["choices"][0]["message"]["content"] == WRONG.text
    assert body["usage"]["total_tokens"] > 0
    await until(
        lambda: worker.metric("vqa_jobs_total", error="schema_mismatch") == 1, "the failure is counted"
    )
    assert worker.metric("vqa_schema_repairs_total", result="repaired") == 1
    assert worker.metric("vqa_schema_repairs_total", result="failed") == 3
    assert worker.metric("vqa_dead_letters_total") == 0
    assert CANARY not in worker.output()


async def test_an_answer_that_is_cut_off_is_not_repaired(
    client: Client, stack: Stack, put_image: PutImage
) -> None:
    reply, calls = await _ask(client, stack, put_image(), Answer(text='{"total": 1', finish_reason="length"))
    assert calls == 1
    assert reply.body["error"]["code"] == "schema_mismatch"
    assert "raise params.max_tokens" in reply.body["error"]["message"]
    assert reply.body["finish_reason"] == "length"


async def test_a_repair_that_fails_is_not_retried_without_a_store(
    client: Client, stack: Stack, put_image: PutImage
) -> None:
    reply, calls = await _ask(client, stack, put_image(), WRONG, Error(status=500))
    assert calls == 2
    assert reply.body["error"]["code"] == "schema_mismatch"
    assert "could not be repaired: http_500" in reply.body["error"]["message"]
    assert reply.body["usage"]["prompt_tokens"] > 0


async def test_a_wrong_schema_is_refused_before_any_call(client: Client, stack: Stack) -> None:
    schema = {"type": "object", "properties": {"a": {"$ref": "https://example.com/a.json"}}}
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    before = len(stack.model.calls(""))
    reply = await client.ask(question="?", images=["https://a.example/"], params={"response_format": form})
    assert reply.body["error"]["code"] == "invalid_job"
    assert reply.body["error"]["message"].startswith("params.response_format.json_schema.schema: ")
    assert len(stack.model.calls("")) == before


# By `VQA_SCHEMA_REPAIRS`: the calls for answers that are wrong once, twice and always, and the success.
REPAIRS: dict[str, list[tuple[int, bool]]] = {
    "off": [(1, True), (1, True), (1, True)],
    "0": [(1, False), (1, False), (1, False)],
    "1": [(2, True), (2, False), (2, False)],
    "2": [(2, True), (3, True), (3, False)],
}


@pytest.mark.parametrize("repairs", REPAIRS)
async def test_a_model_that_answers_wrongly_once_twice_or_always(
    repairs: str, stack: Stack, start_worker: StartWorker, client_of: MakeClient, put_image: PutImage
) -> None:
    client = await client_of(await start_worker(VQA_SCHEMA_REPAIRS=repairs))
    image = put_image()
    for wrong, (calls, succeeds) in zip((1, 2, 4), REPAIRS[repairs], strict=True):
        reply, made = await _ask(client, stack, image, *[WRONG] * wrong, *[RIGHT] * (4 - wrong))
        body = reply.body
        assert (made, body["status"]) == (calls, "succeeded" if succeeds else "failed"), wrong
        assert body["answer"] == ((WRONG if repairs == "off" else RIGHT).text if succeeds else None)
        assert body["parsed"] == (VALUE if succeeds and repairs != "off" else None)
        assert (body["error"] or {}).get("code") == (None if succeeds else "schema_mismatch")
        assert body["attempts"] == 1


async def test_a_provider_without_json_schema_gets_it_in_the_prompt(
    stack: Stack, start_worker: StartWorker, client_of: MakeClient, put_image: PutImage
) -> None:
    worker = await start_worker(VQA_PROVIDER="dashscope")
    client, marker = await client_of(worker), uuid.uuid4().hex
    stack.model.play(RIGHT, marker=marker)
    reply = await client.ask(question=marker, images=[put_image()], params=PARAMS)
    (call,) = calls_with(stack, marker)
    assert reply.body["parsed"] == VALUE
    assert call.params == {"response_format": {"type": "json_object"}}
    assert json.dumps(SCHEMA, separators=(",", ":")) in call.question


async def test_a_worker_that_is_killed_during_a_repair_leaves_the_first_answer(
    own_stack: Stack, start_own_worker: StartWorker, own_client_of: MakeClient
) -> None:
    kept_at = f"s3://{BUCKET}/answers/{uuid.uuid4().hex}"
    doomed = await start_own_worker(VQA_RESULT_STORE=kept_at)
    client, marker = await own_client_of(doomed), uuid.uuid4().hex
    own_stack.model.play(WRONG, marker=marker)
    own_stack.model.play(RIGHT.model_copy(update={"after": 30.0}), marker=marker)
    own_stack.model.play(RIGHT, marker=marker)
    it = job(marker, params=PARAMS)
    await client.publish(it)

    def calls() -> list[Call]:
        # The last message of a repair is not the job's question.
        return [call for call in own_stack.model.calls("") if marker in str(call.messages)]

    await until(lambda: len(calls()) == 2, "the repair has begun")
    doomed.kill()
    await start_own_worker(like=doomed, VQA_RESULT_STORE=kept_at)
    reply = await client.result(it["id"])
    assert reply.body["parsed"] == VALUE
    # The first answer, the repair that was interrupted, and the repair again.
    assert [len(call.messages) for call in calls()] == [1, 3, 3]


async def test_a_redelivered_job_gets_the_parsed_value_from_the_store(
    stack: Stack, start_worker: StartWorker, client_of: MakeClient, put_image: PutImage
) -> None:
    worker = await start_worker(VQA_RESULT_STORE=f"s3://{BUCKET}/answers/{uuid.uuid4().hex}")
    client, marker = await client_of(worker), uuid.uuid4().hex
    for outcome in (WRONG, RIGHT):
        stack.model.play(outcome, marker=marker)
    it = job(marker, put_image(), params=PARAMS)
    await client.publish(it)
    await client.result(it["id"])
    await client.publish(it)
    await until(lambda: len(client.replies[it["id"]]) == 2, "two results")
    first, second = (
        {name: value for name, value in reply.body.items() if name != "timings"}
        for reply in client.replies[it["id"]]
    )
    assert first == second
    assert first["parsed"] == VALUE
    assert stack_calls(stack, marker) == 2
