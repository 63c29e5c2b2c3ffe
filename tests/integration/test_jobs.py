"""Jobs from a publisher through a real broker, worker and S3 and the model simulator."""

import base64
import hashlib
import json
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from deploy.local.model_simulator.behavior import Error
from deploy.local.model_simulator.calls import Call
from deploy.local.stack import Stack
from tests.conftest import PutImage, picture
from tests.running import Client, Reply, Worker, calls_with, until

SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "string"}, "count": {"type": "integer"}},
    "required": ["answer", "count"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "report",
        "description": "Reports what is seen.",
        "parameters": {"type": "object", "properties": {"what": {"type": "string"}}},
    },
}


async def test_a_job_in_the_short_form_is_answered(client: Client, put_image: PutImage) -> None:
    reply = await client.ask(question="What is in this image?", images=[put_image()], metadata={"order": 7})

    assert reply.body["status"] == "succeeded"
    assert "PNG" in reply.body["answer"]
    assert reply.body["metadata"] == {"order": 7}
    assert reply.body["error"] is None
    assert reply.body["usage"]["prompt_tokens"] > 0
    assert reply.message.content_type == "application/json"
    assert reply.message.type == "vqa.result.v1"


async def test_a_transient_error_is_retried(client: Client, stack: Stack, put_image: PutImage) -> None:
    marker = uuid.uuid4().hex
    stack.model.play(Error(status=500), marker=marker)
    reply = await client.ask(question=f"{marker}?", images=[put_image()])

    assert reply.body["status"] == "succeeded"
    assert reply.body["attempts"] == 2


async def test_the_short_form_becomes_a_system_message_and_images_before_the_question(
    client: Client, stack: Stack, put_image: PutImage
) -> None:
    pictures = [picture("JPEG"), picture("PNG"), picture("WEBP")]
    question = f"{uuid.uuid4().hex} Größe? 尺寸?\n\t😀 \x1f\u2028\u0000"
    reply, call = await _ask(
        client,
        stack,
        question=question,
        images=[
            put_image(pictures[0]),
            {"url": put_image(pictures[1])},
            f"data:image/webp;base64,{base64.b64encode(pictures[2]).decode()}",
        ],
        system="Answer in one word.",
    )

    assert call.messages == [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": [*map(_seen, pictures), {"type": "text", "text": question}]},
    ]
    assert call.authorized
    assert call.params == {}
    assert reply.body["status"] == "succeeded"


async def test_the_long_form_is_passed_on_unchanged_except_for_images(
    client: Client, stack: Stack, put_image: PutImage
) -> None:
    first, second, third = picture("PNG"), picture("JPEG"), picture("WEBP")
    marker = uuid.uuid4().hex
    cached = {"cache_control": {"type": "ephemeral"}}
    call_made = {"id": "c1", "type": "function", "function": {"name": "zoom", "arguments": "{}"}}

    def turns(*images: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {"role": "system", "content": "Be brief.", "name": "house-rules"},
            {
                "role": "user",
                "name": "ann",
                "content": [{"type": "text", "text": "Before", **cached}, images[0], images[1]],
            },
            {"role": "assistant", "content": None, "tool_calls": [call_made], "refusal": None},
            {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "zoomed"}]},
            {"role": "assistant", "content": "Two pictures.", "audio": {"id": "a1"}},
            {
                "role": "user",
                "content": [{"type": "text", "text": marker}, images[2], {"type": "text", "text": "after"}],
            },
        ]

    job_images = [
        {"type": "image_url", "image_url": {"url": put_image(first)}},
        {"type": "image_url", "image_url": {"url": put_image(second), "x": [1, None]}, **cached},
        {"type": "image_url", "image_url": {"url": _data_url(third)}},
    ]
    _, call = await _ask(client, stack, messages=turns(*job_images))

    assert call.messages == turns(_seen(first), {**_seen(second, x=[1, None]), **cached}, _seen(third))


async def test_the_long_form_may_have_no_images(client: Client, stack: Stack) -> None:
    marker = uuid.uuid4().hex
    messages = [{"role": "user", "content": f"{marker}: only words"}]
    reply, call = await _ask(client, stack, messages=messages)

    assert call.messages == messages
    assert reply.body["status"] == "succeeded"
    assert reply.body["timings"]["model_s"] > 0


async def test_params_reach_the_api_unchanged(client: Client, stack: Stack, put_image: PutImage) -> None:
    params = {
        "max_tokens": 300,
        "temperature": 0.1,
        "top_p": 0.95,
        "seed": 2**53 + 1,
        "stop": ["\n\n", "END"],
        "response_format": {"type": "json_schema", "json_schema": {"name": "seen", "schema": SCHEMA}},
        "tools": [TOOL],
        "tool_choice": "auto",
        "logprobs": True,
        "top_logprobs": 2,
        "frequency_penalty": -1e-7,
        "user": None,
        "x_of_this_provider": {"nested": [1, 2.5, None, "ü", {"deep": False}]},
        "timeout": 1,
        "extra_headers": {"X-Not": "a header"},
        "extra_body": {"not": "merged"},
    }
    reply, call = await _ask(client, stack, question=_question(), images=[put_image()], params=params)

    assert call.params == params
    # JSON distinguishes numbers that Python does not.
    assert json.dumps(call.params, sort_keys=True) == json.dumps(params, sort_keys=True)
    assert reply.body["status"] == "succeeded"
    assert set(json.loads(reply.body["answer"])) == {"answer", "count"}


async def test_json_mode_and_a_forced_tool_call_work(client: Client, put_image: PutImage) -> None:
    in_json = await client.ask(
        question="?", images=[put_image()], params={"response_format": {"type": "json_object"}}
    )
    calling = await client.ask(
        question="?",
        images=[put_image()],
        params={
            "tools": [TOOL],
            "tool_choice": {"type": "function", "function": {"name": "report"}},
        },
    )

    assert "answer" in json.loads(in_json.body["answer"])
    assert calling.body["status"] == "succeeded"
    assert calling.body["answer"] is None
    assert calling.body["finish_reason"] == "tool_calls"
    choice = calling.body["response"]["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "report"


async def test_a_job_may_use_any_allowed_model(client: Client, stack: Stack, put_image: PutImage) -> None:
    default, other = stack.model.models[:2]
    for model, asked in ((None, default), (default, default), (other, other)):
        reply, call = await _ask(client, stack, question=_question(), images=[put_image()], model=model)
        assert call.model == asked
        assert reply.body["model"] == asked


async def test_detail_is_dropped_unless_configured(
    client: Client, stack: Stack, put_image: PutImage, tmp_path: Path
) -> None:
    async def details(client: Client) -> list[list[str | None]]:
        """Return the `detail` that arrived for the short and the long form; `-` if it is missing."""
        image = {"url": put_image(), "detail": "low"}
        undecided = {"url": put_image(), "detail": None}
        _, short = await _ask(client, stack, question=_question(), images=[image, undecided, put_image()])
        marker = uuid.uuid4().hex
        parts = [{"type": "image_url", "image_url": url} for url in (image, undecided)]
        text = {"type": "text", "text": marker}
        messages = [{"role": "user", "content": [*parts, text]}]
        _, long = await _ask(client, stack, messages=messages)
        return [
            [
                part["image_url"].get("detail", "-")
                for part in call.messages[-1]["content"]
                if part["type"] == "image_url"
            ]
            for call in (short, long)
        ]

    assert await details(client) == [["-", "-", "-"], ["-", "-"]]
    async with (
        Worker.running(stack, tmp_path, VQA_SEND_IMAGE_DETAIL="true") as sending,
        Client.of(stack, sending) as its_client,
    ):
        assert await details(its_client) == [["low", "-", "-"], ["low", "-"]]


async def test_the_id_falls_back_to_the_message_id(client: Client, put_image: PutImage) -> None:
    for fields in ({}, {"id": None}):
        message_id = f"from the property {uuid.uuid4().hex}"
        job = {"question": "What?", "images": [put_image()], **fields}
        await client.publish(job, message_id=message_id)
        reply = await client.result(message_id)
        assert reply.body["status"] == "succeeded"
        assert reply.message.correlation_id == message_id


async def test_the_id_in_the_body_takes_precedence_over_the_message_id(
    client: Client, put_image: PutImage
) -> None:
    job_id = uuid.uuid4().hex
    job = {"id": job_id, "question": "What?", "images": [put_image()]}
    await client.publish(job, message_id=f"other-{job_id}")
    assert (await client.result(job_id)).body["status"] == "succeeded"
    assert f"other-{job_id}" not in client.replies


@pytest.mark.parametrize("tail", ["x" * 224, " /?#%\u00e9\u4e2d😀'\"\\"])
async def test_an_id_may_hold_any_printable_characters(
    client: Client, put_image: PutImage, tail: str
) -> None:
    job_id = uuid.uuid4().hex + tail
    reply = await client.ask(id=job_id, question="What?", images=[put_image()])
    assert reply.body["id"] == job_id
    assert reply.body["status"] == "succeeded"


async def test_null_is_the_same_as_a_missing_field(client: Client, stack: Stack, put_image: PutImage) -> None:
    nothing: dict[str, Any] = dict.fromkeys(("model", "params", "deadline", "metadata"))
    short, _ = await _ask(
        client, stack, question=_question(), images=[put_image()], messages=None, system=None, **nothing
    )
    marker = uuid.uuid4().hex
    long, call = await _ask(
        client,
        stack,
        messages=[{"role": "user", "content": marker}],
        **dict.fromkeys(("question", "images", "system")),
        **nothing,
    )

    for reply in (short, long):
        assert reply.body["status"] == "succeeded", reply.body
        assert reply.body["metadata"] == {}
    assert call.params == {}


@pytest.mark.parametrize(
    "form",
    [
        "%Y-%m-%dT%H:%M:%SZ",
        "%Y-%m-%dt%H:%M:%S.123456789z",
        "%Y-%m-%d %H:%M:%S.5+00:00",
        "%Y-%m-%dT%H:%M:%S-00:00",
    ],
)
async def test_a_future_deadline_has_no_effect(client: Client, put_image: PutImage, form: str) -> None:
    deadline = (datetime.now(UTC) + timedelta(minutes=5)).strftime(form)
    reply = await client.ask(question="What?", images=[put_image()], deadline=deadline)
    assert reply.body["status"] == "succeeded", reply.body


async def test_the_utc_offset_of_a_deadline_is_respected(client: Client, put_image: PutImage) -> None:
    """The same local time, with one offset in the future and with the other in the past."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S")
    ahead = await client.ask(question="What?", images=[put_image()], deadline=f"{now}-05:00")
    past = await client.ask(question="What?", images=[put_image()], deadline=f"{now}+05:00")

    assert ahead.body["status"] == "succeeded"
    assert past.body["error"]["code"] == "deadline_exceeded"


async def test_the_same_job_sent_twice_is_answered_twice(
    client: Client, stack: Stack, put_image: PutImage
) -> None:
    """Two messages are two jobs, even if their ids are equal."""
    job_id, question = uuid.uuid4().hex, _question()
    job = {"id": job_id, "question": question, "images": [put_image()]}
    await client.publish(job, message_id=uuid.uuid4().hex)
    await client.result(job_id)
    await client.publish(job, message_id=uuid.uuid4().hex)
    await until(lambda: len(client.replies[job_id]) == 2, "a second result")
    assert len(calls_with(stack, question)) == 2


async def _ask(client: Client, stack: Stack, **job: Any) -> tuple[Reply, Call]:
    """Return a job's result and its only model request, which is found by its text."""
    reply = await client.ask(**job)
    assert reply.body["status"] == "succeeded", reply.body
    (call,) = calls_with(stack, job.get("question") or _text(job["messages"][-1]["content"]))
    return reply, call


def _text(content: str | list[dict[str, Any]]) -> str:
    """Return the first text of a message."""
    if isinstance(content, str):
        return content
    return next(str(part["text"]) for part in content if part["type"] == "text")


def _question() -> str:
    return f"What is {uuid.uuid4().hex}?"


def _data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _seen(content: bytes, **fields: Any) -> dict[str, Any]:
    """Return an image part in the form that the simulator records."""
    url = f"sha256:{hashlib.sha256(content).hexdigest()}"
    return {"type": "image_url", "image_url": {"url": url, **fields}}
