"""The model simulator's answers, and the requests that it rejects."""

import base64
import hashlib
import json
from typing import Any

import aiohttp
import pytest
from PIL import Image

from deploy.local.simulated_model import SimulatedModel
from tests.integration.local.fixture_types import Ask, Inline, Plain, encoded


def text_of(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


@pytest.mark.parametrize(
    "colour", ["red", "green", "blue", "white", "black", "yellow", "orange", "purple", "pink"]
)
async def test_the_answer_names_the_colour_of_the_image(
    ask: Ask, plain: Plain, inline: Inline, colour: str
) -> None:
    status, answer = await ask("What is this?", inline(plain(colour)))
    assert status == 200
    assert f"mostly {colour}" in text_of(answer)


@pytest.mark.parametrize(
    ("kind", "media_type"), [("JPEG", "image/jpeg"), ("PNG", "image/png"), ("WEBP", "image/webp")]
)
async def test_the_answer_proves_that_the_bytes_arrived_unchanged(
    ask: Ask, plain: Plain, inline: Inline, kind: str, media_type: str
) -> None:
    content = plain("cyan", kind=kind, size=(120, 80))
    _, answer = await ask("What is this?", inline(content, media_type))
    digest = hashlib.sha256(content).hexdigest()
    assert f"a {kind} picture of 120x80 pixels" in text_of(answer)
    assert digest[:12] in text_of(answer)
    [seen] = answer["simulator"]["images"]
    assert (seen["sha256"], seen["bytes"], seen["declared_type"]) == (digest, len(content), media_type)


async def test_answers_say_that_they_are_simulated(
    ask: Ask, model: SimulatedModel, http: aiohttp.ClientSession
) -> None:
    _, answer = await ask("Hello")
    assert text_of(answer).startswith("[simulated model]")
    async with http.get(f"{model.base_url}/models") as response:
        listed = await response.json()
    assert all(entry["id"].startswith("simulated/") for entry in listed["data"])


async def test_several_images_are_described_in_their_order(ask: Ask, plain: Plain, inline: Inline) -> None:
    _, answer = await ask("Compare", inline(plain("red")), inline(plain("blue")))
    text = text_of(answer)
    assert "2 pictures" in text
    assert text.index("red") < text.index("blue")


async def test_a_url_is_not_opened(ask: Ask, model: SimulatedModel) -> None:
    _, answer = await ask("What is this?", "https://pictures.example/cat.jpg")
    assert "a link to pictures.example, not opened" in text_of(answer)
    assert model.calls()[0].links == ["https://pictures.example/cat.jpg"]


async def test_images_in_every_message_count(ask: Ask, plain: Plain, inline: Inline) -> None:
    picture = {"type": "image_url", "image_url": {"url": inline(plain("green"))}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [picture, {"type": "text", "text": "What colour?"}]},
        {"role": "assistant", "content": "Green."},
        {"role": "user", "content": "Are you sure?"},
    ]
    _, answer = await ask("", messages=messages)
    assert "mostly green" in text_of(answer)


async def test_prompt_tokens_grow_with_the_image(ask: Ask, plain: Plain, inline: Inline) -> None:
    used = []
    for size in ((28, 28), (56, 56), (560, 560)):
        _, answer = await ask("abcd", inline(plain("red", size=size)))
        used.append(answer["usage"]["prompt_tokens"])
    assert used == [5 + 1, 5 + 4, 5 + 400]


async def test_usage_adds_up_and_has_a_price(ask: Ask) -> None:
    _, answer = await ask("Hello")
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["estimated_cost"] > 0


async def test_max_tokens_truncates_the_answer(ask: Ask) -> None:
    _, answer = await ask("Hello", max_tokens=3)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 3


async def test_json_mode_answers_with_an_object(ask: Ask, plain: Plain, inline: Inline) -> None:
    _, answer = await ask("?", inline(plain("red")), response_format={"type": "json_object"})
    assert json.loads(text_of(answer))["images"][0]["colours"] == ["red"]


async def test_the_answer_matches_a_json_schema(ask: Ask) -> None:
    schema = {"type": "object", "properties": {"what": {"type": "string"}, "sure": {"type": "boolean"}}}
    form = {"type": "json_schema", "json_schema": {"name": "seen", "schema": schema}}
    _, answer = await ask("?", response_format=form)
    assert set(json.loads(text_of(answer))) == {"what", "sure"}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "report"}}])
async def test_a_forced_tool_is_called(ask: Ask, choice: object) -> None:
    parameters = {"type": "object", "properties": {"label": {"type": "string"}, "count": {"type": "integer"}}}
    tools = [{"type": "function", "function": {"name": "report", "parameters": parameters}}]
    _, answer = await ask("?", tools=tools, tool_choice=choice)
    [made] = answer["choices"]
    assert made["finish_reason"] == "tool_calls"
    assert made["message"]["content"] is None
    [called] = made["message"]["tool_calls"]
    assert json.loads(called["function"]["arguments"])["count"] == 0


async def test_a_wrong_key_is_rejected(model: SimulatedModel) -> None:
    async with (
        aiohttp.ClientSession(headers={"Authorization": "Bearer wrong"}) as session,
        session.post(f"{model.base_url}/chat/completions", json={}) as response,
    ):
        assert response.status == 401
        assert (await response.json())["error"]["code"] == "invalid_api_key"


async def test_an_unknown_model_is_not_found(ask: Ask) -> None:
    status, answer = await ask("?", model="gpt-nothing")
    assert (status, answer["error"]["code"]) == (404, "model_not_found")


async def test_a_truncated_image_is_rejected(ask: Ask, inline: Inline, plain: Plain) -> None:
    for kind in ("JPEG", "PNG", "WEBP"):
        content = plain("red", kind=kind, size=(400, 400))
        status, answer = await ask("?", inline(content[: len(content) * 2 // 3]))
        assert (kind, status, answer["error"]["code"]) == (kind, 400, "invalid_image")


async def test_content_other_than_an_image_is_rejected(ask: Ask, inline: Inline) -> None:
    status, answer = await ask("?", inline(b"<Error><Code>NoSuchKey</Code></Error>"))
    assert (status, answer["error"]["code"]) == (400, "invalid_image")


@pytest.mark.parametrize("spoiled", ["AAA", "AA=A", "A A=", "!!!!", "AAAA\n"])
async def test_invalid_base64_is_rejected(ask: Ask, spoiled: str) -> None:
    status, answer = await ask("?", f"data:image/png;base64,{spoiled}")
    assert (status, answer["error"]["code"]) == (400, "invalid_base64")


async def test_other_media_types_are_rejected(ask: Ask, inline: Inline, plain: Plain) -> None:
    status, answer = await ask("?", inline(plain("red", kind="GIF"), "image/gif"))
    assert (status, answer["error"]["code"]) == (400, "unsupported_image_media_type")


async def test_an_image_in_a_format_that_is_not_allowed_is_rejected_for_every_declared_type(
    ask: Ask, inline: Inline, plain: Plain
) -> None:
    status, answer = await ask("?", inline(plain("red", kind="GIF"), "image/png"))
    assert (status, answer["error"]["code"]) == (400, "invalid_image")


async def test_an_image_over_the_limit_is_rejected(ask: Ask) -> None:
    encoded = base64.b64encode(bytes(20_000_001)).decode()
    status, answer = await ask("?", f"data:image/png;base64,{encoded}")
    assert (status, answer["error"]["code"]) == (400, "image_too_large")


async def test_an_image_with_too_many_pixels_is_rejected_before_it_is_decoded(
    ask: Ask, inline: Inline
) -> None:
    bomb = encoded(Image.new("1", (20_000, 15_000)), "PNG")
    assert len(bomb) < 100_000
    status, answer = await ask("?", inline(bomb))
    assert (status, answer["error"]["code"]) == (400, "image_too_large")
    assert "image 1: 20000x15000 pixels" in answer["error"]["message"]


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hello",
        [{"role": "robot", "content": "hello"}],
        [{"role": "user", "content": 7}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a.example/b"}}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": "no object"}]}],
    ],
)
async def test_malformed_messages_are_rejected(ask: Ask, messages: object) -> None:
    status, answer = await ask("?", messages=messages)
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"


async def test_a_call_is_recorded_without_its_key(
    model: SimulatedModel, ask: Ask, http: aiohttp.ClientSession, plain: Plain, inline: Inline
) -> None:
    http.headers["Traceparent"] = "00-1-2-01"
    content = plain("red")
    await ask("What colour?", inline(content), temperature=0.5, seed=3)
    [call] = model.calls()
    assert (call.status, call.question, call.model) == (200, "What colour?", model.models[0])
    assert call.params == {"temperature": 0.5, "seed": 3}
    assert call.authorized
    assert call.headers["traceparent"] == "00-1-2-01"
    assert model.api_key not in call.model_dump_json()
    assert call.images[0].sha256 == hashlib.sha256(content).hexdigest()
    assert call.messages[0]["content"][1]["image_url"]["url"] == f"sha256:{call.images[0].sha256}"
    assert call.ended is not None
    assert call.ended >= call.started


async def test_decoding_can_be_disabled_for_measurements(
    model: SimulatedModel, ask: Ask, plain: Plain, inline: Inline
) -> None:
    model.configure(decode=False)
    content = plain("red", size=(333, 222))
    status, answer = await ask("?", inline(content[:-20]))
    assert status == 200
    assert (answer["simulator"]["images"][0]["width"], answer["simulator"]["images"][0]["colours"]) == (
        333,
        [],
    )
