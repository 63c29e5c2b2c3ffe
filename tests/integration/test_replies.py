"""Results: their destination, properties and content."""

import asyncio
import base64
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage
from aio_pika.exceptions import QueueEmpty

from deploy.local.model_simulator.behavior import Answer, Error, Outcome
from deploy.local.stack import Stack
from tests.conftest import BUCKET, picture
from tests.running import Client, Reply, Worker, calls_with, until

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
TRACESTATE = "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"
PRICES = {"prompt": 2.5, "completion": 10.0}


@dataclass(frozen=True)
class Equipped:
    """A worker with a reply exchange, price lists, and the whole response in each result."""

    worker: Worker
    client: Client
    exchange: str
    channel: AbstractChannel


@pytest.fixture(scope="module")
async def channel(stack: Stack) -> AsyncIterator[AbstractChannel]:
    """Yield a channel of a new connection."""
    async with await aio_pika.connect(stack.rabbitmq.url) as connection:
        yield await connection.channel(on_return_raises=True)


@pytest.fixture(scope="module")
async def equipped(
    stack: Stack, channel: AbstractChannel, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Equipped]:
    exchange = await channel.declare_exchange(
        f"replies-{uuid.uuid4().hex}", aio_pika.ExchangeType.TOPIC, auto_delete=False
    )
    async with (
        Worker.running(
            stack,
            tmp_path_factory.mktemp("equipped"),
            VQA_REPLY_EXCHANGE=exchange.name,
            VQA_ALLOWED_REPLY_TO="vqa.results.*,amq.rabbitmq.reply-to.*,amq.gen-*",
            VQA_INCLUDE_RESPONSE="true",
            VQA_PRICES=json.dumps({stack.model.models[0]: PRICES}),
        ) as worker,
        Client.of(stack, worker) as client,
    ):
        yield Equipped(worker, client, exchange.name, channel)
    await exchange.delete()


# Properties


async def test_a_result_has_its_own_properties_and_none_of_the_job_s(client: Client) -> None:
    reply = await _send(
        client,
        correlation_id="what it belongs to",
        message_id=uuid.uuid4().hex,
        content_encoding="identity",
        expiration=60,
        priority=5,
        user_id="guest",
        type="question",
        app_id="backend",
        headers={"x-tenant": "a", "vqa-attempts": 1, "vqa-error-code": "x", "vqa-undeliverable-to": "x"},
    )
    message = reply.message
    assert message.correlation_id == "what it belongs to"
    assert message.timestamp is not None
    assert abs(datetime.now(UTC) - message.timestamp) < timedelta(seconds=60)
    assert (message.app_id, message.type) == ("vqa-worker", "vqa.result.v1")
    assert message.content_type == "application/json"
    assert message.delivery_mode is aio_pika.DeliveryMode.PERSISTENT
    assert message.headers == {}
    assert message.reply_to is None
    assert message.expiration is None
    assert message.user_id is None
    assert message.content_encoding is None
    assert not message.priority


async def test_every_publish_has_a_new_message_id(client: Client) -> None:
    job_id = uuid.uuid4().hex
    for _ in range(2):
        await client.publish(_job(id=job_id), message_id=job_id)
    first, second = await until(
        lambda: len(client.replies.get(job_id, [])) == 2 and client.replies[job_id], "both results"
    )
    ids = {first.message.message_id, second.message.message_id}
    assert len(ids) == 2
    assert ids.isdisjoint({job_id, None, ""})


@pytest.mark.parametrize("given", [None, ""])
async def test_the_correlation_id_falls_back_to_the_job_s_id(client: Client, given: str | None) -> None:
    for message_id in (None, "another"):
        reply = await _send(client, message_id=message_id, correlation_id=given)
        assert reply.message.correlation_id == reply.body["id"]


async def test_an_id_too_long_for_a_property_is_in_the_body_only(client: Client) -> None:
    job_id = "\u20ac" * 200
    reply = await client.ask(**_job(id=job_id))
    assert reply.body["id"] == job_id
    assert reply.message.correlation_id is None


# Traces


async def test_a_trace_is_continued(client: Client, worker: Worker) -> None:
    trace: dict[str, Any] = {"traceparent": TRACEPARENT, "tracestate": TRACESTATE}
    answered = await _send(client, headers={**trace, "baggage": "user=ann", "x-b3-traceid": "1"})
    refused = await _send(client, headers=trace, model="unknown")
    unreadable = uuid.uuid4().hex
    await client.publish(b"no job", headers=trace, message_id=unreadable)

    for reply in (answered, refused, await client.result(unreadable)):
        assert reply.message.headers == trace
    dead_letter = await client.take(worker.dead_letter_queue)
    assert trace.items() <= dead_letter.headers.items()


async def test_a_trace_is_continued_after_a_retry(client: Client, stack: Stack) -> None:
    marker = uuid.uuid4().hex
    stack.model.play(Error(status=500), marker=marker)
    trace = {"traceparent": TRACEPARENT, "tracestate": TRACESTATE}
    reply = await _send(client, question=marker, headers=trace)
    assert reply.body["attempts"] == 2
    assert reply.message.headers == trace


@pytest.mark.parametrize(
    ("traceparent", "tracestate", "kept"),
    [
        (TRACEPARENT, None, {"traceparent"}),
        (
            TRACEPARENT.replace("00-", "cc-", 1) + "-what-a-later-version-adds",
            TRACESTATE,
            {"traceparent", "tracestate"},
        ),
        (TRACEPARENT, "x" * 513, {"traceparent"}),
        (TRACEPARENT, "a=1\nb=2", {"traceparent"}),
        (TRACEPARENT, ["a=1"], {"traceparent"}),
        (None, TRACESTATE, set()),
        ("", TRACESTATE, set()),
        (TRACEPARENT.upper(), TRACESTATE, set()),
        (TRACEPARENT[:-1], TRACESTATE, set()),
        (TRACEPARENT.replace("00-", "ff-", 1), TRACESTATE, set()),
        ("00-" + "0" * 32 + "-00f067aa0ba902b7-01", TRACESTATE, set()),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-" + "0" * 16 + "-01", TRACESTATE, set()),
        (f"{TRACEPARENT}-more", TRACESTATE, set()),
        (f"{TRACEPARENT}\n", TRACESTATE, set()),
        (f" {TRACEPARENT}", TRACESTATE, set()),
        ([TRACEPARENT], TRACESTATE, set()),
        (7, TRACESTATE, set()),
        (bytearray(TRACEPARENT.encode()), TRACESTATE, set()),
    ],
    ids=range(18),
)
async def test_an_invalid_trace_is_dropped(
    client: Client, traceparent: Any, tracestate: Any, kept: set[str]
) -> None:
    given = {"traceparent": traceparent, "tracestate": tracestate}
    headers = {name: value for name, value in given.items() if value is not None}
    reply = await _send(client, headers=headers)
    assert reply.message.headers == {name: given[name] for name in kept}


async def test_headers_of_the_job_do_not_route_a_result_or_a_copy(
    client: Client, stack: Stack, channel: AbstractChannel
) -> None:
    """RabbitMQ routes the job to the queues in CC and BCC, but not the worker's messages."""
    marker = uuid.uuid4().hex
    stack.model.play(Error(status=500), marker=marker)
    aside = await channel.declare_queue(exclusive=True)
    reply = await _send(client, question=marker, headers={"CC": [aside.name], "BCC": [aside.name]})

    assert reply.body["attempts"] == 2
    assert reply.message.headers == {}
    assert (await channel.declare_queue(aside.name, passive=True)).declaration_result.message_count == 1


# Destinations


@pytest.mark.parametrize(
    "name", ["", "vqa.results.backend-1", "vqa.results.a.b.c", "vqa.results.a b:c@d,e/f"]
)
async def test_a_result_goes_to_an_allowed_reply_to(
    client: Client, channel: AbstractChannel, name: str
) -> None:
    queue = await channel.declare_queue(name or None, exclusive=True)
    for job, status in ((_job(), "succeeded"), (_job(model="unknown"), "failed")):
        await client.publish(job, reply_to=queue.name)
        message = await _take(channel, queue.name)
        body = json.loads(message.body)
        assert (body["id"], body["status"]) == (job["id"], status)
        assert message.correlation_id == job["id"]
        assert message.headers == {}
        assert job["id"] not in client.replies


async def test_reply_to_may_be_the_results_queue(client: Client, worker: Worker) -> None:
    reply = await _send(client, reply_to=worker.results_queue)
    assert reply.message.routing_key == worker.results_queue
    assert reply.message.headers == {}


async def test_a_reply_to_that_is_not_allowed_is_ignored(
    client: Client, worker: Worker, channel: AbstractChannel
) -> None:
    forbidden = await channel.declare_queue(f"somebody-elses-{uuid.uuid4().hex}", exclusive=True)
    names = [
        forbidden.name,
        worker.jobs_queue,
        worker.dead_letter_queue,
        f"x{worker.results_queue}",
        "vqa.results",
        "VQA.RESULTS.x",
        " vqa.results.x",
        "amq.gen",
        "x.amq.gen-1",
        "amq.rabbitmq.reply-to",
    ]
    for name in names[:-1]:
        reply = await _send(client, reply_to=name)
        assert reply.message.routing_key == worker.results_queue
        assert reply.message.headers == {}
    assert await client.depth(worker.dead_letter_queue) == 0
    assert (await channel.declare_queue(forbidden.name, passive=True)).declaration_result.message_count == 0


async def test_a_result_that_cannot_be_routed_goes_to_the_results_queue(
    client: Client, worker: Worker
) -> None:
    missing = f"amq.gen-{uuid.uuid4().hex}"
    reply = await _send(
        client, reply_to=missing, correlation_id="still this", headers={"traceparent": TRACEPARENT}
    )
    assert reply.body["status"] == "succeeded"
    assert reply.message.routing_key == worker.results_queue
    assert reply.message.headers == {"vqa-undeliverable-to": missing, "traceparent": TRACEPARENT}
    assert reply.message.correlation_id == "still this"


async def test_results_for_a_full_reply_queue_go_to_the_results_queue(
    client: Client, worker: Worker, channel: AbstractChannel
) -> None:
    full = f"vqa.results.{uuid.uuid4().hex}"
    await channel.declare_queue(
        full, auto_delete=True, arguments={"x-max-length": 1, "x-overflow": "reject-publish"}
    )
    await channel.default_exchange.publish(aio_pika.Message(b"nobody reads this"), full)
    reply = await _send(client, reply_to=full)
    assert reply.body["status"] == "succeeded"
    assert reply.message.routing_key == worker.results_queue
    assert reply.message.headers["vqa-undeliverable-to"] == full


async def test_direct_reply_to_works(stack: Stack, worker: Worker) -> None:
    async with await aio_pika.connect(stack.rabbitmq.url) as connection:
        caller = await connection.channel()
        waiting: asyncio.Queue[AbstractIncomingMessage] = asyncio.Queue()
        replies = await caller.get_queue("amq.rabbitmq.reply-to", ensure=False)
        await replies.consume(waiting.put, no_ack=True)
        for job, status in ((_job(), "succeeded"), (_job(model="unknown"), "failed")):
            message = aio_pika.Message(
                json.dumps(job).encode(), reply_to="amq.rabbitmq.reply-to", correlation_id="call 1"
            )
            await caller.default_exchange.publish(message, worker.jobs_queue)
            async with asyncio.timeout(30):
                answer = await waiting.get()
            assert answer.correlation_id == "call 1"
            assert json.loads(answer.body)["id"] == job["id"]
            assert json.loads(answer.body)["status"] == status
            assert answer.type == "vqa.result.v1"


async def test_a_direct_reply_to_a_closed_connection_delays_nothing(
    client: Client, worker: Worker, stack: Stack
) -> None:
    marker = uuid.uuid4().hex
    stack.model.play(Answer(after=0.5), marker=marker)
    job = _job(question=marker)
    async with await aio_pika.connect(stack.rabbitmq.url) as connection:
        caller = await connection.channel()
        replies = await caller.get_queue("amq.rabbitmq.reply-to", ensure=False)
        await replies.consume(asyncio.Queue[AbstractIncomingMessage]().put, no_ack=True)
        message = aio_pika.Message(json.dumps(job).encode(), reply_to="amq.rabbitmq.reply-to")
        await caller.default_exchange.publish(message, worker.jobs_queue)
        await until(lambda: calls_with(stack, marker), "the call")
    # A name that RabbitMQ did not generate.
    await client.publish(_job(), reply_to="amq.rabbitmq.reply-to.g1h2AA==.made.up")
    await until(lambda: worker.metric("vqa_jobs_in_flight") == 0, "both jobs have ended")

    assert (await _send(client)).body["status"] == "succeeded"
    assert job["id"] not in client.replies
    assert len(calls_with(stack, marker)) == 1
    assert await client.depth(worker.jobs_queue) == 0


# The reply exchange


async def test_results_use_the_reply_exchange_with_the_queue_s_name_as_routing_key(
    equipped: Equipped,
) -> None:
    queue = await equipped.channel.declare_queue(exclusive=True)
    await queue.bind(equipped.exchange, routing_key="vqa.results.tenant-a")
    job = _job()
    await equipped.client.publish(job, reply_to="vqa.results.tenant-a")
    message = await _take(equipped.channel, queue.name)

    assert json.loads(message.body)["id"] == job["id"]
    assert message.exchange == equipped.exchange
    assert message.routing_key == "vqa.results.tenant-a"


async def test_results_without_a_reply_to_use_the_reply_exchange_too(equipped: Equipped) -> None:
    reply = await _send(equipped.client)
    assert reply.message.exchange == equipped.exchange
    assert reply.message.routing_key == equipped.worker.results_queue


async def test_unroutable_results_go_to_the_results_queue(equipped: Equipped) -> None:
    """Also if a queue with that name exists: only queues bound to the exchange get results."""
    queue = await equipped.channel.declare_queue(exclusive=True)
    reply = await _send(equipped.client, reply_to=queue.name)

    assert reply.message.headers == {"vqa-undeliverable-to": queue.name}
    assert reply.message.routing_key == equipped.worker.results_queue
    with pytest.raises(QueueEmpty):
        await queue.get(timeout=5)


async def test_direct_replies_use_the_default_exchange(stack: Stack, equipped: Equipped) -> None:
    await test_direct_reply_to_works(stack, equipped.worker)


async def test_dead_letters_and_retries_do_not_use_the_reply_exchange(equipped: Equipped) -> None:
    body = uuid.uuid4().hex.encode()
    await equipped.client.publish(body)
    dead_letter = await equipped.client.take(equipped.worker.dead_letter_queue)
    assert dead_letter.body == body
    assert dead_letter.exchange == ""


# Content


METADATA = r"""{
    "": null, "nested": {"a": [1, [2, {"b": []}], {}]}, "text": "\u0000\u001f\"\\\/\ud83d\ude00 ünï 漢",
    "ints": [0, -0, 9007199254740993, 123456789012345678901234567890, -18446744073709551616],
    "floats": [0.1, 1.0, -0.0, 1e-300, 1.7976931348623157e308, 5e-324, 3.141592653589793, 1E5, 1e20],
    "bools": [true, false], "ключ \ud83d\udd11": "__proto__", "answer": "mine", "deep": DEEP
}"""


async def test_metadata_is_returned_exactly(client: Client, stack: Stack) -> None:
    text = METADATA.replace("DEEP", "[" * 150 + "]" * 150)
    expected = json.loads(text)
    marker = uuid.uuid4().hex
    stack.model.play(Error(status=500), marker=marker)
    image = _data_url()
    for question, images in ((marker, [image]), ("?", [f"s3://{BUCKET}/missing"]), ("?", [image])):
        job = _job(question=question, images=images)
        await client.publish(f'{json.dumps(job)[:-1]}, "metadata": {text}}}'.encode())
        reply = await client.result(job["id"])
        # The text is compared too: Python treats 1, 1.0 and True as equal.
        assert reply.body["metadata"] == expected
        assert json.dumps(reply.body["metadata"]) == json.dumps(expected)


@pytest.mark.parametrize("metadata", [{}, {"x": "y" * (16 * 1024 - 8)}])
async def test_metadata_may_be_empty_or_as_large_as_allowed(client: Client, metadata: dict[str, str]) -> None:
    reply = await _send(client, metadata=metadata)
    assert reply.body["metadata"] == metadata


@pytest.mark.parametrize(
    ("outcome", "params", "answer"),
    [
        (Answer(text="42", reasoning_content="Let me think."), {}, "42"),
        (Answer(text="in parts", parts=True), {}, "in parts"),
        (Answer(text="but", refusal="not really"), {}, "but"),
        (Answer(text="sure"), {"logprobs": True, "top_logprobs": 1}, "sure"),
        (
            Answer(extra={"choices": [{"message": {"content": [{"text": "a"}, {"text": "b"}]}}] * 2}),
            {},
            "ab",
        ),
    ],
    ids=["reasoning", "parts", "refusal", "logprobs", "choices"],
)
async def test_an_answer_with_more_than_text_includes_the_response(
    client: Client, stack: Stack, outcome: Answer, params: dict[str, Any], answer: str
) -> None:
    reply = await _meet(client, stack, outcome, params=params)
    assert reply.body["status"] == "succeeded"
    assert reply.body["answer"] == answer
    assert reply.body["response"]["object"] == "chat.completion"
    assert reply.body["response"]["choices"]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": "42"},
        {"content": "42", "refusal": None, "annotations": [], "tool_calls": [], "reasoning_content": ""},
    ],
)
async def test_a_plain_text_answer_does_not_include_the_response(
    client: Client, stack: Stack, message: dict[str, Any]
) -> None:
    choice = {"message": message, "finish_reason": "stop", "logprobs": None}
    reply = await _meet(client, stack, Answer(extra={"choices": [choice]}))
    assert reply.body["answer"] == "42"
    assert reply.body["response"] is None


async def test_every_result_includes_the_response_if_configured(equipped: Equipped, stack: Stack) -> None:
    plain = await _meet(equipped.client, stack, Answer(text="42"))
    empty = await _meet(equipped.client, stack, Answer(text=""))
    rejected = await _meet(equipped.client, stack, Error(status=400))

    assert plain.body["response"]["choices"][0]["message"]["content"] == "42"
    assert empty.body["error"]["code"] == "empty_answer"
    assert empty.body["response"]["choices"][0]["message"]["content"] == ""
    assert rejected.body["response"] is None


async def test_the_provider_s_cost_takes_precedence(equipped: Equipped, client: Client) -> None:
    for its_client in (equipped.client, client):
        usage = (await _send(its_client)).body["usage"]
        assert usage["cost_usd"] == round(
            usage["prompt_tokens"] * 0.35e-6 + usage["completion_tokens"] * 0.40e-6, 10
        )
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


async def test_without_the_provider_s_cost_the_price_list_is_used(
    equipped: Equipped, client: Client, stack: Stack
) -> None:
    priced = (await _meet(equipped.client, stack, Answer(text="12345678", usage="no_cost"))).body["usage"]
    other_model = stack.model.models[1]
    unlisted = await _meet(equipped.client, stack, Answer(usage="no_cost"), model=other_model)
    listless = await _meet(client, stack, Answer(usage="no_cost"))

    assert priced["completion_tokens"] == 2
    assert priced["cost_usd"] == pytest.approx((priced["prompt_tokens"] * 2.5 + 2 * 10.0) / 1e6, rel=1e-12)
    assert unlisted.body["usage"]["cost_usd"] is None
    assert unlisted.body["usage"]["prompt_tokens"] > 0
    assert listless.body["usage"]["cost_usd"] is None


@pytest.mark.parametrize("usage", [None, {}, [], "many", {"prompt_tokens": "many"}, {"prompt_tokens": -1}])
async def test_missing_usage_is_null(client: Client, stack: Stack, usage: Any) -> None:
    reply = await _meet(client, stack, Answer(text="42", usage="none", extra={"usage": usage}))
    assert reply.body["status"] == "succeeded"
    assert reply.body["answer"] == "42"
    assert reply.body["usage"] is None


async def test_usage_that_is_clear_is_reported_and_the_rest_is_null(client: Client, stack: Stack) -> None:
    usage = {
        "prompt_tokens": "7",
        "completion_tokens": None,
        "total_tokens": 9.0,
        "cost": "0.25",
        "prompt_tokens_details": {"cached_tokens": 5},
    }
    extra = {"usage": usage, "model": "renamed", "service_tier": "flex"}
    body = (await _meet(client, stack, Answer(text="42", usage="none", extra=extra))).body
    assert body["usage"] == {
        "prompt_tokens": 7, "completion_tokens": None, "total_tokens": 9, "cost_usd": 0.25, "cached_tokens": 5
    }  # fmt: skip
    assert (body["answered_model"], body["service_tier"]) == ("renamed", "flex")
    assert body["provider"]


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        (r'"a\ud800b"', "a?b"),
        (r'"\udc00\ud800"', "??"),
        (r'"\u0000\u0007\u2028 \ud83d\ude00"', "\0\7\u2028 😀"),
        ('"' + "ä" * 100_000 + '"', "ä" * 100_000),
        (r'" 42\n"', " 42\n"),
    ],
    ids=range(5),
)
async def test_the_text_of_an_answer_arrives_unchanged(
    client: Client, stack: Stack, content: str, answer: str
) -> None:
    """Characters that UTF-8 cannot encode are replaced, because the answer is billed."""
    body = f'{{"choices":[{{"message":{{"content":{content}}},"finish_reason":"stop"}}]}}'
    reply = await _meet(client, stack, Error(status=200, body=body))
    assert reply.body["status"] == "succeeded", reply.body
    assert reply.body["answer"] == answer


async def test_a_response_that_is_not_strict_json_is_strict_json_in_the_result(
    equipped: Equipped, stack: Stack
) -> None:
    body = (
        '{"choices":[{"message":{"content":"42","x":NaN},"finish_reason":7}],"a":[-Infinity,1e999],'
        r'"\ud800":"\udfff","usage":{"prompt_tokens":1e400,"completion_tokens":3,"estimated_cost":NaN}}'
    )
    reply = await _meet(equipped.client, stack, Error(status=200, body=body))
    strict = json.loads(reply.message.body, parse_constant=pytest.fail)
    assert strict["answer"] == "42"
    assert strict["response"]["a"] == [None, None]
    assert strict["usage"]["completion_tokens"] == 3
    assert strict["finish_reason"] is None


async def test_the_queue_time_comes_from_the_most_precise_source(client: Client) -> None:
    now = time.time()
    by_both = await _send(
        client, timestamp=int(now) - 5000, headers={"timestamp_in_ms": int((now - 100) * 1000)}
    )
    by_seconds = await _send(client, timestamp=int(now) - 5000)
    by_neither = await _send(client)
    from_tomorrow = await _send(client, timestamp=int(now) + 86_400)

    assert 100 <= by_both.body["timings"]["queued_s"] < 200
    assert 5000 <= by_seconds.body["timings"]["queued_s"] < 5100
    assert by_neither.body["timings"]["queued_s"] is None
    assert from_tomorrow.body["timings"]["queued_s"] == 0


async def test_timings_add_up(client: Client, stack: Stack) -> None:
    timings = (await _meet(client, stack, Answer(after=0.3))).body["timings"]
    assert timings["model_s"] >= 0.3
    assert timings["fetch_s"] >= 0
    assert timings["total_s"] >= timings["model_s"] + timings["fetch_s"]


def _job(**fields: Any) -> dict[str, Any]:
    return {"id": uuid.uuid4().hex, "question": "What is this?", "images": [_data_url()], **fields}


async def _send(client: Client, *, headers: dict[str, Any] | None = None, **fields: Any) -> Reply:
    """Publish a job and return its result; unknown `fields` are message properties."""
    of_job = {name: fields.pop(name) for name in ("question", "model", "metadata") if name in fields}
    job = _job(**of_job)
    await client.publish(job, headers=headers, **fields)
    return await client.result(job["id"])


async def _meet(client: Client, stack: Stack, outcome: Outcome, **fields: Any) -> Reply:
    """Return the result of a job with this outcome."""
    marker = uuid.uuid4().hex
    stack.model.play(outcome, marker=marker)
    return await client.ask(**_job(question=marker, **fields))


async def _take(channel: AbstractChannel, queue_name: str) -> AbstractIncomingMessage:
    queue = await channel.get_queue(queue_name, ensure=False)
    message: AbstractIncomingMessage = await until(
        lambda: queue.get(fail=False, no_ack=True), f"a message in {queue_name}"
    )
    return message


def _data_url() -> str:
    return f"data:image/png;base64,{base64.b64encode(picture()).decode()}"
