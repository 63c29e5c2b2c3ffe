"""Answers that do not satisfy their job's JSON schema: repairs, failures, usage and the result store."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from tests.unit.fake_clock import FakeClock
from tests.unit.fakes import ANSWER, JOB
from tests.unit.test_processor import FLEX, FakeResultStore, Scene, busy_tier, for_ever, refusal, transient
from vqa_worker.messages.error_codes import ErrorCode
from vqa_worker.messages.result import Usage
from worker.errors import Dependency, DependencyDownError, JobError, RateLimitedError
from worker.jobs.outcome import Failed, Outcome, Requeued, Retried, Succeeded
from worker.model.answer import Answer
from worker.observability import metrics

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "count", "schema": SCHEMA}}
PARAMS = {"params": {"response_format": FORMAT}}
USAGE = Usage(prompt_tokens=3, completion_tokens=4, total_tokens=7, cost_usd=0.5)
CANARY = "the words of the answer"


def said(text: str, **fields: Any) -> Answer:
    return replace(ANSWER, text=text, usage=USAGE, response={"said": text}, **fields)


WRONG = said(f'{{"n": "{CANARY}"}}')
RIGHT = said('```json\n{"n": 3}\n```')


def times(count: int) -> Usage:
    """Return the usage of so many calls."""
    return Usage(
        prompt_tokens=3 * count, completion_tokens=4 * count, total_tokens=7 * count, cost_usd=0.5 * count
    )


def a_scene(*deeds: Any, repairs: int | None = 1, **options: Any) -> Scene:
    scene = Scene(max_schema_repairs=repairs, **options)
    scene.model.deeds = [*deeds]
    return scene


def repaired(result: str) -> float:
    return (
        metrics.REGISTRY.get_sample_value("vqa_schema_repairs_total", {"model": "usual", "result": result})
        or 0.0
    )


def mismatch(outcome: Outcome, calls: int) -> str:
    """Return the message of a failure with `schema_mismatch` after so many billed calls."""
    code, message = refusal(outcome)
    assert code is ErrorCode.SCHEMA_MISMATCH
    assert isinstance(outcome, Failed)
    assert CANARY not in outcome.reason
    assert outcome.result.usage == times(calls)
    assert outcome.result.response is not None
    assert outcome.result.parsed is None
    return message


async def test_an_answer_that_satisfies_the_schema_is_parsed() -> None:
    scene = a_scene(RIGHT)
    outcome = await scene.process(**PARAMS)
    assert isinstance(outcome, Succeeded)
    result = json.loads(outcome.result.to_body())
    assert (result["parsed"], result["answer"]) == ({"n": 3}, RIGHT.text)
    assert (result["response"], outcome.result.usage) == (None, times(1))
    assert scene.model.asked[0][2]["response_format"] == FORMAT
    assert len(scene.model.asked) == 1


async def test_a_wrong_answer_is_shown_to_the_model_with_its_errors_and_the_images() -> None:
    scene, before = a_scene(WRONG, RIGHT), repaired("repaired")
    outcome = await scene.process(**PARAMS)
    assert isinstance(outcome, Succeeded)
    assert (outcome.result.parsed, outcome.result.usage) == ({"n": 3}, times(2))
    assert outcome.result.attempts == 1
    (_, first, params, _), (_, second, same_params, _) = scene.model.asked
    assert params == same_params
    assert second[:-2] == first
    assert second[0]["content"][0]["image_url"] == {"url": "loaded s3://photos/cat.png"}
    assert second[-2] == {"role": "assistant", "content": WRONG.text}
    assert second[-1]["role"] == "user"
    assert 'n: the value is not of type "integer"' in second[-1]["content"]
    assert repaired("repaired") == before + 1
    assert await scene.is_free()


@pytest.mark.parametrize(("repairs", "calls"), [(0, 1), (1, 2), (3, 4)])
async def test_after_the_last_repair_the_job_fails_with_the_usage_of_all_calls(
    repairs: int, calls: int
) -> None:
    scene, before = a_scene(WRONG, repairs=repairs), repaired("failed")
    outcome = await scene.process(**PARAMS)
    message = mismatch(outcome, calls)
    assert 'n: the value is not of type "integer"' in message
    assert (f"after {repairs} repair" in message) == bool(repairs)
    assert isinstance(outcome, Failed)
    assert outcome.result.response == WRONG.response
    assert len(scene.model.asked) == calls
    assert repaired("failed") == before + repairs
    assert await scene.is_free()


async def test_an_answer_that_is_wrong_twice_can_be_right_the_third_time() -> None:
    scene = a_scene(WRONG, said("no JSON"), RIGHT, repairs=2)
    outcome = await scene.process(**PARAMS)
    assert isinstance(outcome, Succeeded)
    assert outcome.result.usage == times(3)
    contents = [message["content"] for message in scene.model.asked[2][1]]
    assert (contents[1], contents[3]) == (WRONG.text, "no JSON")


async def test_usage_that_only_one_call_reports_is_that_of_the_result() -> None:
    scene = a_scene(replace(WRONG, usage=None), RIGHT)
    outcome = await scene.process(**PARAMS)
    assert isinstance(outcome, Succeeded)
    assert outcome.result.usage == USAGE


async def test_an_answer_that_the_token_limit_cut_off_is_not_repaired() -> None:
    scene = a_scene(said('{"n": 1', finish_reason="length"))
    message = mismatch(await scene.process(**PARAMS), 1)
    assert "cut the answer off" in message
    assert "params.max_tokens" in message
    assert len(scene.model.asked) == 1


@pytest.mark.parametrize(
    ("params", "repairs"),
    [
        ({}, 1),
        ({"response_format": {"type": "json_object"}}, 1),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "any"}}}, 1),
        ({"response_format": FORMAT}, None),
        # Not even checked: the API decides.
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": []}}}, None),
    ],
)
async def test_without_a_schema_or_with_off_any_answer_will_do(
    params: dict[str, Any], repairs: int | None
) -> None:
    outcome = await a_scene(WRONG, repairs=repairs).process(params=params)
    assert isinstance(outcome, Succeeded)
    assert (outcome.result.parsed, outcome.result.answer) == (None, WRONG.text)


async def test_a_tool_call_and_an_empty_answer_are_not_validated() -> None:
    tool = replace(ANSWER, text=None, calls_tools=True, is_plain=False)
    assert isinstance(await a_scene(tool).process(**PARAMS), Succeeded)
    empty = await a_scene(replace(ANSWER, text=None)).process(**PARAMS)
    assert refusal(empty)[0] is ErrorCode.EMPTY_ANSWER


@pytest.mark.parametrize("schema", [[], {"type": "text"}, {"$ref": "https://example.com/"}])
async def test_a_wrong_schema_is_an_invalid_job(schema: object) -> None:
    scene = a_scene(RIGHT)
    outcome = await scene.process(
        params={"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
    )
    code, message = refusal(outcome)
    assert code is ErrorCode.INVALID_JOB
    assert message.startswith("params.response_format.json_schema.schema: ")
    assert scene.model.asked == []


@pytest.mark.parametrize("json_mode", [True, False])
async def test_without_json_schema_the_schema_is_in_the_prompt(json_mode: bool) -> None:
    scene = a_scene(RIGHT, schema_in_prompt=True, json_mode=json_mode)
    outcome = await scene.process(params={"seed": 7, "response_format": FORMAT})
    assert isinstance(outcome, Succeeded)
    assert outcome.result.parsed == {"n": 3}
    ((_, messages, params, _),) = scene.model.asked
    assert params.get("response_format") == ({"type": "json_object"} if json_mode else None)
    assert params["seed"] == 7
    *_, question, text = messages[-1]["content"]
    assert question == {"type": "text", "text": JOB["question"]}
    assert "JSON schema" in text["text"]
    assert json.dumps(SCHEMA, separators=(",", ":")) in text["text"]


@pytest.mark.parametrize(
    ("messages", "last"),
    [
        ([{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "3"}], 0),
        ([{"role": "system", "content": "Count."}], 1),
    ],
)
async def test_the_schema_is_added_to_the_last_message_of_the_user(
    messages: Sequence[dict[str, Any]], last: int
) -> None:
    scene = a_scene(RIGHT, schema_in_prompt=True)
    job = {"id": "job-1", "messages": messages, **PARAMS}
    assert isinstance(await scene.process(json.dumps(job).encode()), Succeeded)
    sent = scene.model.asked[0][1]
    assert sent[last]["role"] == "user"
    assert "JSON schema" in sent[last]["content"]


async def test_other_jobs_are_sent_unchanged_to_an_api_without_json_schema() -> None:
    scene = a_scene(ANSWER, schema_in_prompt=True, json_mode=True)
    await scene.process(params={"seed": 7})
    assert scene.model.asked[0][2] == {"seed": 7, "stream": False}
    assert len(scene.model.asked[0][1][0]["content"]) == 2


# A repair that fails


FAILURES: list[Exception] = [
    transient(),
    transient("timeout", dependency=Dependency.S3),
    DependencyDownError(Dependency.MODEL, "unreachable"),
    JobError(ErrorCode.MODEL_REJECTED, f"the API answered 400: {CANARY}", log_message="the API answered 400"),
    ValueError(CANARY),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda it: type(it).__name__)
async def test_without_a_store_the_failure_of_a_repair_fails_the_job(
    failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.processor.log.error", lambda *_, **__: None)
    scene, before = a_scene(WRONG, failure), repaired("failed")
    message = mismatch(await scene.process(**PARAMS), 1)
    assert "; it could not be repaired: " in message
    assert CANARY not in message
    assert len(scene.model.asked) == 2
    assert repaired("failed") == before + 1
    assert await scene.is_free()


async def test_the_usage_of_a_repair_that_cannot_be_read_counts_too() -> None:
    malformed = transient("malformed_response")
    malformed.usage = USAGE
    mismatch(await a_scene(WRONG, malformed).process(**PARAMS), 2)


async def test_an_outage_during_repairs_is_detected() -> None:
    scene = a_scene(WRONG, DependencyDownError(Dependency.MODEL, "unreachable"))
    mismatch(await scene.process(**PARAMS), 1)
    assert set(scene.detector.outages) == {Dependency.MODEL}


async def test_a_worker_that_shuts_down_still_repairs_its_answers() -> None:
    """Without a store, the job would fail although it is billed."""
    scene, asked = a_scene(), 0

    async def answer(*_: Any, **__: Any) -> Answer:
        nonlocal asked
        asked += 1
        scene.limiter.close("the worker is shutting down")
        return RIGHT if asked > 1 else WRONG

    scene.model.complete = answer  # type: ignore[method-assign]  # simpler than another fake
    outcome = await scene.process(**PARAMS)
    assert isinstance(outcome, Succeeded)
    assert (outcome.result.parsed, scene.images.rooms) == ({"n": 3}, 0)
    scene.limiter.open()
    assert await scene.is_free()


async def test_a_repair_that_gets_no_memory_fails_the_job_without_a_store() -> None:
    clock = FakeClock()
    scene = a_scene(WRONG, clock=clock)

    async def wait() -> None:
        if scene.model.asked:
            await for_ever()

    scene.images.room_deeds = [wait]
    job = asyncio.create_task(scene.process(**PARAMS))
    while not job.done():
        await clock.advance(1.0)
        await asyncio.sleep(0.001)
    assert "no memory for the images" in mismatch(await job, 1)
    assert await scene.is_free()


async def test_past_its_deadline_no_repair_is_bought() -> None:
    clock = FakeClock()

    async def take_long() -> None:
        await clock.sleep(20)

    scene = a_scene(clock=clock)
    asked: list[Answer] = []

    async def answer(*_: Any, **__: Any) -> Answer:
        await take_long()
        asked.append(WRONG)
        return WRONG

    scene.model.complete = answer  # type: ignore[method-assign]  # simpler than another fake
    deadline = (clock.now() + timedelta(seconds=10)).isoformat()
    job = asyncio.create_task(scene.process(**PARAMS, deadline=deadline))
    while not job.done():
        await clock.advance(1.0)
        await asyncio.sleep(0.001)
    assert "deadline" in mismatch(await job, 1)
    assert len(asked) == 1


async def test_a_rate_limited_repair_is_sent_again() -> None:
    scene = a_scene(WRONG, RateLimitedError(0.01), RIGHT)
    outcome = await scene.process(**PARAMS)
    assert isinstance(outcome, Succeeded)
    assert outcome.result.usage == times(2)
    assert [len(messages) for _, messages, *_ in scene.model.asked] == [1, 3, 3]


async def test_a_repair_can_fall_back_to_the_default_tier() -> None:
    scene = a_scene(WRONG, busy_tier(0.01), RIGHT, flex_fallback=True)
    params = {"params": {**FLEX["params"], **PARAMS["params"]}}
    outcome = await scene.process(**params)
    assert isinstance(outcome, Succeeded)
    assert (outcome.result.parsed, outcome.result.usage) == ({"n": 3}, times(2))
    tiers = [params.get("service_tier") for *_, params, _ in scene.model.asked]
    assert tiers == ["flex", "flex", None]
    assert [len(messages) for _, messages, *_ in scene.model.asked] == [1, 3, 3]


async def test_a_job_that_is_stopped_during_its_repair_publishes_what_it_has() -> None:
    scene, reached = a_scene(), asyncio.Event()

    async def hang() -> None:
        reached.set()
        await for_ever()

    scene.model.deeds = [WRONG, hang]
    job = asyncio.create_task(scene.process(**PARAMS))
    await reached.wait()
    job.cancel()
    mismatch(await job, 1)
    assert await scene.is_free()


@pytest.mark.parametrize("answer", [RIGHT, WRONG])
async def test_a_job_that_is_stopped_while_its_answer_is_checked_publishes_it(
    answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = asyncio.Event()

    async def slow(function: Callable[..., Any], *arguments: Any) -> Any:
        if function.__name__ != "checked":
            return function(*arguments)
        reached.set()
        await for_ever()
        return None

    monkeypatch.setattr("asyncio.to_thread", slow)
    job = asyncio.create_task(a_scene(answer).process(**PARAMS))
    await reached.wait()
    job.cancel()
    outcome = await job
    if answer is WRONG:
        mismatch(outcome, 1)
    else:
        assert isinstance(outcome, Succeeded)
        assert outcome.result.parsed == {"n": 3}


async def test_a_job_that_is_stopped_while_its_images_are_closed_publishes_its_answer() -> None:
    scene, reached = a_scene(RIGHT), asyncio.Event()
    usual = scene.images.open

    @asynccontextmanager
    async def slow(*arguments: Any, **options: Any) -> AsyncIterator[Any]:
        async with usual(*arguments, **options) as opened:
            yield opened
        reached.set()
        await for_ever()

    scene.images.open = slow  # type: ignore[method-assign]  # simpler than another fake
    job = asyncio.create_task(scene.process(**PARAMS))
    await reached.wait()
    job.cancel()
    outcome = await job
    assert isinstance(outcome, Succeeded)
    assert outcome.result.parsed == {"n": 3}


# With a result store


async def test_the_parsed_value_is_stored_with_the_answer() -> None:
    scene = a_scene(WRONG, RIGHT, store=FakeResultStore())
    first, second = await scene.process(**PARAMS), await scene.process(**PARAMS)
    assert isinstance(first, Succeeded)
    assert isinstance(second, Succeeded)
    assert len(scene.model.asked) == 2
    for outcome in (first, second):
        assert (outcome.result.parsed, outcome.result.usage) == ({"n": 3}, times(2))


async def test_a_mismatch_is_stored_and_not_bought_again() -> None:
    scene = a_scene(WRONG, store=FakeResultStore())
    first, second = await scene.process(**PARAMS), await scene.process(**PARAMS)
    assert mismatch(first, 2) == mismatch(second, 2)
    assert len(scene.model.asked) == 2


@pytest.mark.parametrize("failure", [transient(), DependencyDownError(Dependency.MODEL, "unreachable")])
async def test_with_a_store_a_failed_repair_is_retried_without_buying_the_answer_again(
    failure: Exception,
) -> None:
    scene = a_scene(WRONG, failure, store=FakeResultStore())
    outcome = await scene.process(**PARAMS)
    assert isinstance(outcome, Retried | Requeued)
    scene.limiter.allow_probe()
    scene.model.deeds = [RIGHT]
    outcome = await scene.process(**PARAMS)
    assert isinstance(outcome, Succeeded)
    assert (outcome.result.parsed, outcome.result.usage) == ({"n": 3}, times(2))
    assert [len(messages) for _, messages, *_ in scene.model.asked] == [1, 3, 3]


async def test_the_last_attempt_at_a_repair_fails_the_job_with_the_stored_answer() -> None:
    scene = a_scene(WRONG, transient(), store=FakeResultStore())
    assert isinstance(await scene.process(**PARAMS), Retried)
    scene.model.deeds = [transient()]
    message = mismatch(await scene.process(**PARAMS, delivery={"counted_attempts": 2}), 1)
    assert "http_5xx" in message
    assert len(scene.model.asked) == 3


async def during_a_repair() -> tuple[Scene, asyncio.Task[Outcome]]:
    """Return a job with a result store whose repair does not end."""
    scene, reached = a_scene(store=FakeResultStore()), asyncio.Event()

    async def hang() -> None:
        reached.set()
        await for_ever()

    scene.model.deeds = [WRONG, hang]
    job = asyncio.create_task(scene.process(**PARAMS))
    await reached.wait()
    return scene, job


async def test_with_a_store_a_job_that_is_stopped_during_its_repair_is_requeued() -> None:
    scene, job = await during_a_repair()
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    scene.model.deeds = [RIGHT]
    assert isinstance(await scene.process(**PARAMS), Succeeded)
    assert len(scene.model.asked) == 3


async def test_a_job_that_is_cancelled_during_its_repair_reports_what_it_has_cost() -> None:
    scene, job = await during_a_repair()
    scene.cancelled_jobs.cancel("job-1")
    assert "the job was cancelled" in mismatch(await job, 1)


async def test_a_draft_that_may_not_be_repaired_any_more_is_the_answer() -> None:
    store = FakeResultStore()
    scene = a_scene(WRONG, transient(), store=store)
    assert isinstance(await scene.process(**PARAMS), Retried)
    after = a_scene(RIGHT, store=store, repairs=0)
    mismatch(await after.process(**PARAMS), 1)
    assert after.model.asked == []
