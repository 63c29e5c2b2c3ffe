"""The scripted failures of the model simulator, as a client sees them."""

import asyncio
import json
import time
from typing import Any, get_args

import aiohttp
import pytest

from deploy.local.model_simulator.answers import PREFIX
from deploy.local.model_simulator.behavior import Answer, Error, Hang, Malformed, Reset, Rule, Wrapping
from deploy.local.model_simulator.calls import Call
from deploy.local.simulated_model import SimulatedModel
from tests.integration.local.fixture_types import Ask
from tests.running import until
from worker.model.answer import MalformedAnswerError, parse_answer


def message_of(answer: dict[str, Any]) -> dict[str, Any]:
    return dict(answer["choices"][0]["message"])


def ended_call(model: SimulatedModel) -> Call | None:
    """Wait for the end of the only call; return it."""
    [call] = model.calls()
    return call if call.ended is not None else None


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 408, 409, 413, 422, 429, 500, 503])
async def test_every_error_status_can_be_played(model: SimulatedModel, ask: Ask, status: int) -> None:
    model.play(Error(status=status, message="no luck", code="scripted"))
    got, answer = await ask("?")
    assert got == status
    assert (answer["error"]["message"], answer["error"]["code"]) == ("no luck", "scripted")
    assert (await ask("?"))[0] == 200
    assert [call.played for call in model.calls()] == ["error", None]


async def test_an_error_can_have_headers_and_any_body(
    model: SimulatedModel, http: aiohttp.ClientSession
) -> None:
    model.play(Error(status=429, headers={"Retry-After": "7"}, body="slow down"))
    body = {"model": model.models[0], "messages": [{"role": "user", "content": "?"}]}
    async with http.post(f"{model.base_url}/chat/completions", json=body) as response:
        assert response.headers["Retry-After"] == "7"
        assert await response.text() == "slow down"


async def _posted(model: SimulatedModel, http: aiohttp.ClientSession) -> tuple[aiohttp.ClientResponse, bytes]:
    body = {"model": model.models[0], "messages": [{"role": "user", "content": "?"}]}
    async with http.post(f"{model.base_url}/chat/completions", json=body) as response:
        return response, await response.read()


@pytest.mark.parametrize("wrapping", get_args(Wrapping))
async def test_an_answer_can_be_wrapped(
    model: SimulatedModel, http: aiohttp.ClientSession, wrapping: Wrapping
) -> None:
    model.configure(wrapping=wrapping)
    _, raw = await _posted(model, http)
    assert b'{"id"' in raw
    assert not raw.startswith(b'{"id"')
    answer = parse_answer(raw, None)
    assert answer.text is not None
    assert answer.text.startswith(PREFIX)
    assert answer.usage is not None
    assert answer.finish_reason == "stop"


async def test_an_answer_can_be_interrupted(model: SimulatedModel, http: aiohttp.ClientSession) -> None:
    model.play(Malformed(how="interrupted"))
    _, raw = await _posted(model, http)
    with pytest.raises(MalformedAnswerError, match="interrupted") as caught:
        parse_answer(raw, None)
    assert caught.value.usage is not None


async def test_a_call_can_be_answered_before_its_body_is_read(
    model: SimulatedModel, http: aiohttp.ClientSession
) -> None:
    model.configure(early_status=429)
    response, _ = await _posted(model, http)
    assert (response.status, response.headers["Connection"]) == (429, "close")
    [call] = model.calls()
    assert (call.status, call.body_bytes) == (429, 0)


async def test_an_outcome_is_played_the_given_number_of_times(model: SimulatedModel, ask: Ask) -> None:
    model.play(Error(status=500), times=2)
    assert [(await ask("?"))[0] for _ in range(3)] == [500, 500, 200]


async def test_outcomes_are_played_in_the_order_given(model: SimulatedModel, ask: Ask) -> None:
    model.configure(rules=[Rule(outcome=Error(status=500)), {"outcome": {"kind": "error", "status": 409}}])
    assert [(await ask("?"))[0] for _ in range(3)] == [500, 409, 200]


async def test_an_outcome_for_a_marker_does_not_affect_other_calls(model: SimulatedModel, ask: Ask) -> None:
    model.play(Error(status=422), marker="job-7", times=None)
    assert [(await ask(f"job-{number}"))[0] for number in (6, 7, 7)] == [200, 422, 422]


async def test_reset_clears_behaviour_and_calls(model: SimulatedModel, ask: Ask) -> None:
    model.play(Error(status=500), times=None)
    await ask("?")
    model.reset()
    assert (await ask("?"))[0] == 200
    assert model.state().calls == 1


def test_a_misspelt_behaviour_is_an_error(model: SimulatedModel) -> None:
    with pytest.raises(ValueError, match="latencey"):
        model.configure(latencey=1)


@pytest.mark.parametrize(("how", "fault"), [("not_json", "html"), ("cut_json", "")])
async def test_a_200_that_is_not_json(
    model: SimulatedModel, http: aiohttp.ClientSession, how: str, fault: str
) -> None:
    model.play(Malformed.model_validate({"how": how}))
    body = {"model": model.models[0], "messages": [{"role": "user", "content": "?"}]}
    async with http.post(f"{model.base_url}/chat/completions", json=body) as response:
        assert response.status == 200
        text = await response.text()
    assert fault in text
    with pytest.raises(ValueError, match=r"Expecting|Unterminated"):
        json.loads(text)


async def test_a_200_with_other_json(model: SimulatedModel, ask: Ask) -> None:
    model.play(Malformed(how="no_choices_key"))
    status, answer = await ask("?")
    assert status == 200
    assert "choices" not in answer


async def test_a_200_that_is_truncated(model: SimulatedModel, ask: Ask) -> None:
    model.play(Malformed(how="truncated"))
    with pytest.raises((aiohttp.ClientPayloadError, aiohttp.ClientOSError)):
        await ask("?")


async def test_a_connection_that_is_reset_before_the_answer(model: SimulatedModel, ask: Ask) -> None:
    model.play(Reset())
    with pytest.raises((aiohttp.ClientOSError, aiohttp.ServerDisconnectedError)):
        await ask("?")
    call = await until(lambda: ended_call(model), "the call ends")
    assert (call.played, call.status) == ("reset", None)


async def test_a_call_whose_caller_disconnects_is_recorded(model: SimulatedModel, ask: Ask) -> None:
    model.play(Hang())
    asking = asyncio.create_task(ask("?"))
    call = await until(lambda: next(iter(model.calls()), None), "the call begins")
    assert call.ended is None
    asking.cancel()
    call = await until(lambda: ended_call(model), "the call ends")
    assert call.disconnected


async def test_latency_holds_for_every_answer(model: SimulatedModel, ask: Ask) -> None:
    model.configure(latency=0.3)
    started = time.monotonic()
    await ask("?")
    assert time.monotonic() - started >= 0.3


@pytest.mark.parametrize(
    ("outcome", "content", "finish_reason"),
    [
        (Answer(text=""), "", "stop"),
        (Answer(text="", finish_reason="length", reasoning_content="Let me think"), "", "length"),
        (Answer(text="", finish_reason="content_filter"), "", "content_filter"),
        (Answer(null_content=True), None, "stop"),
        (Answer(refusal="I cannot do that."), None, "stop"),
        (Answer(text="two", parts=True), [{"type": "text", "text": "two"}], "stop"),
    ],
)
async def test_unusual_but_well_formed_answers(
    model: SimulatedModel, ask: Ask, outcome: Answer, content: object, finish_reason: str
) -> None:
    model.play(outcome)
    status, answer = await ask("?")
    assert (status, answer["choices"][0]["finish_reason"]) == (200, finish_reason)
    assert message_of(answer)["content"] == content
    assert message_of(answer).get("reasoning_content") == outcome.reasoning_content
    assert message_of(answer).get("refusal") == outcome.refusal


async def test_an_answer_without_choices(model: SimulatedModel, ask: Ask) -> None:
    model.play(Answer(no_choices=True))
    assert (await ask("?"))[1]["choices"] == []


async def test_usage_can_be_missing_or_without_a_price(model: SimulatedModel, ask: Ask) -> None:
    model.play(Answer(usage="none"))
    model.play(Answer(usage="no_cost"))
    assert "usage" not in (await ask("?"))[1]
    assert "estimated_cost" not in (await ask("?"))[1]["usage"]


async def test_more_concurrent_calls_than_allowed_get_429(model: SimulatedModel, ask: Ask) -> None:
    model.configure(max_concurrent=2, latency=0.5)
    got = await asyncio.gather(*(ask("?") for _ in range(5)))
    assert sorted(status for status, _ in got) == [200, 200, 429, 429, 429]
    busy = next(answer for status, answer in got if status == 429)
    assert busy == {"error": {"message": "Model busy, retry later"}}


async def test_a_restart_keeps_address_and_key(model: SimulatedModel, ask: Ask) -> None:
    model.restart()
    assert (await ask("?"))[0] == 200
