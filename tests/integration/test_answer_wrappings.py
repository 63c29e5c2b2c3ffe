"""A model API whose answers come in every wrapping: each answer is used once and paid once."""

import asyncio
import base64
import gzip
import json
import re
import uuid
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from deploy.local.stack import Stack
from tests.breaking import events
from tests.conftest import PutImage, picture
from tests.running import Client, Worker, until

MARK = re.compile(rb"row-[0-9a-f]{32}")
# The scripted API answers to requests larger than this without reading them.
EARLY_BYTES = 1_000_000

USAGE = {"prompt_tokens": 30, "completion_tokens": 4, "total_tokens": 34}
COUNTED = {**USAGE, "cost_usd": None}
BLOCKED = {"prompt_tokens": 30, "completion_tokens": 0, "total_tokens": 30}


def completion(**fields: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": "A cat."}, "finish_reason": "stop"}
    return {"object": "chat.completion", "model": "m-1", "choices": [choice], "usage": USAGE, **fields}


def answer(body: Any, *headers: str, status: int = 200, kind: str = "application/json") -> bytes:
    """Return the bytes of a response; `headers` are lines."""
    raw = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
    lines = [f"HTTP/1.1 {status} Reason", f"Content-Type: {kind}", f"Content-Length: {len(raw)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + raw


def stream(*chunks: Any) -> bytes:
    lines = [
        ": OPENROUTER PROCESSING",
        *(f"data: {json.dumps(chunk)}" for chunk in chunks),
        "data: [DONE]",
        "",
    ]
    return answer("\n\n".join(lines), kind="text/event-stream")


def delta(content: str = "", finish_reason: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"content": content}, "finish_reason": finish_reason}
    return {"object": "chat.completion.chunk", "model": "m-1", "choices": [choice]}


GOOD = answer(completion())
TEXT = json.dumps(completion())
HALF = {"index": 0, "message": {"content": "A c"}, "finish_reason": "error"}


@dataclass
class ScriptedApi:
    """A model API that answers to the requests with one mark with the next bytes of its script."""

    port: int = 0
    scripts: dict[str, Sequence[bytes]] = field(default_factory=dict)
    requests: Counter[str] = field(default_factory=Counter)
    bodies: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    early: bytes = b""
    early_requests: int = 0

    @asynccontextmanager
    async def serving(self) -> AsyncIterator["ScriptedApi"]:
        async with await asyncio.start_server(self._serve, "127.0.0.1", 0) as server:
            self.port = server.sockets[0].getsockname()[1]
            yield self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
                length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
                if length > EARLY_BYTES:
                    self.early_requests += 1
                    writer.write(self.early)
                    await writer.drain()
                    return
                response = self._next(await reader.readexactly(length))
                writer.write(response)
                await writer.drain()
                if response.startswith(b"HTTP/1.0"):
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()

    def _next(self, body: bytes) -> bytes:
        found = MARK.search(body)
        assert found is not None
        mark = found[0].decode()
        script = self.scripts[mark]
        self.requests[mark] += 1
        self.bodies[mark].append(json.loads(body))
        return script[min(self.requests[mark], len(script)) - 1]

    async def ask(self, client: Client, *script: bytes, **fields: Any) -> tuple[dict[str, Any], int]:
        """Publish a job; return its result and the number of its requests."""
        mark = f"row-{uuid.uuid4().hex}"
        self.scripts[mark] = script
        reply = await client.ask(question=f"What is it? {mark}", **fields)
        body: dict[str, Any] = reply.body
        return body, self.requests[mark]


@dataclass(frozen=True)
class Scene:
    """A worker with a scripted model API."""

    api: ScriptedApi
    worker: Worker
    client: Client
    image: str

    async def ask(self, *script: bytes, **fields: Any) -> tuple[dict[str, Any], int]:
        return await self.api.ask(self.client, *script, **{"images": [self.image], **fields})


@pytest.fixture(scope="module")
async def scene(
    stack: Stack, put_image: PutImage, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Scene]:
    async with ScriptedApi().serving() as api:
        worker = Worker.of(
            stack,
            tmp_path_factory.mktemp("wrappings"),
            VQA_MODEL_BASE_URL=f"http://localhost:{api.port}/v1",
            VQA_MAX_ATTEMPTS="2",
            VQA_RETRY_DELAYS="1",
            VQA_FLEX_FALLBACK="true",
            VQA_PROMPT_ORDER="question_first",
        )
        try:
            await worker.start()
            async with Client.of(stack, worker) as client:
                yield Scene(api, worker, client, put_image(picture()))
            assert await worker.stop() == 0, worker.output()
        finally:
            worker.kill()


WRAPPINGS = {
    "plain": GOOD,
    "stream": stream(
        delta("A "), delta("cat."), delta(finish_reason="stop"), {"choices": [], "usage": USAGE}
    ),
    "comments": answer(f": OPENROUTER PROCESSING\n\n{TEXT}"),
    "byte order mark": answer(f"\ufeff{TEXT}"),
    "text around it": answer(f"\n\n{TEXT}\n<!-- cached -->\n"),
    "JSON in JSON": answer(json.dumps(TEXT)),
    "content type": answer(TEXT, kind="text/html"),
    "gzip": answer(gzip.compress(TEXT.encode()), "Content-Encoding: gzip"),
    "wrong label": answer(TEXT, "Content-Encoding: br"),
    "long header": answer(TEXT, f"X-Long: {'v' * 30_000}"),
    "many headers": answer(TEXT, *(f"X-{n}: v" for n in range(300))),
    "error field": answer(completion(error={"code": 400, "message": "a warning"})),
    "text usage": answer(completion(usage={name: str(n) for name, n in USAGE.items()})),
    "floats": answer(completion(usage={name: float(n) for name, n in USAGE.items()})),
    "until the end of the connection": f"HTTP/1.0 200 OK\r\n\r\n{TEXT}".encode(),
}


@pytest.mark.parametrize("response", WRAPPINGS.values(), ids=WRAPPINGS)
async def test_a_good_answer_is_used_and_paid_once(scene: Scene, response: bytes) -> None:
    result, requests = await scene.ask(response)
    assert (result["status"], result["answer"], requests) == ("succeeded", "A cat.", 1), result
    assert (result["usage"], result["attempts"]) == (COUNTED, 1)
    assert (result["provider"], result["answered_model"]) == ("localhost", "m-1")


async def test_a_queue_of_wrapped_answers_is_paid_once_each(scene: Scene) -> None:
    found = await asyncio.gather(*(scene.ask(response) for response in [*WRAPPINGS.values()] * 7))
    assert len(found) > 100
    assert {(result["answer"], result["attempts"], requests) for result, requests in found} == {
        ("A cat.", 1, 1)
    }


async def test_a_queue_of_half_answers_is_requested_again_once_each(scene: Scene) -> None:
    half = answer({"choices": [HALF], "usage": USAGE})
    found = await asyncio.gather(*(scene.ask(half, GOOD) for _ in range(6)))
    assert {(result["answer"], requests) for result, requests in found} == {("A cat.", 2)}
    await until(lambda: scene.worker.ready()[1]["status"] == "ready", "the worker consumes")


@pytest.mark.parametrize(
    ("fields", "usage"),
    [
        ({"choices": None, "usage": BLOCKED}, BLOCKED),
        ({"choices": [{"message": None, "finish_reason": "content_filter"}], "usage": BLOCKED}, BLOCKED),
        ({"choices": [], "usage": USAGE}, USAGE),
        (
            {"choices": [{"message": {"content": [{"type": "thinking", "text": "hm"}]}}], "usage": USAGE},
            USAGE,
        ),
    ],
)
async def test_an_empty_answer_is_paid_once_and_its_usage_reported(
    scene: Scene, fields: dict[str, Any], usage: Mapping[str, int]
) -> None:
    result, requests = await scene.ask(answer(fields))
    assert (result["error"]["code"], requests) == ("empty_answer", 1)
    assert result["usage"] == {**usage, "cost_usd": None}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ({"error": {"code": 400, "message": "the image is broken"}}, "model_rejected"),
        (
            {"choices": [{"message": None, "error": {"code": 400, "message": "the image is broken"}}]},
            "model_rejected",
        ),
    ],
)
async def test_an_error_in_a_200_ends_the_job_by_its_code(scene: Scene, error: Any, code: str) -> None:
    result, requests = await scene.ask(answer(error))
    assert (result["error"]["code"], requests) == (code, 1)
    assert "the image is broken" in result["error"]["message"]


@pytest.mark.parametrize(
    ("first", "attempts"),
    [
        (answer({"error": {"code": 429, "message": "slow down"}}), 1),
        (answer({"error": {"code": 502, "message": "bad gateway"}}), 2),
        (answer({"choices": [], "usage": BLOCKED}), 2),
        (answer({"choices": [HALF], "usage": USAGE}), 2),
        (answer("A cat."), 2),
        (answer(b"\x0b\x02\x80{}\x03", "Content-Encoding: br"), 2),
    ],
    ids=["429", "502", "no choice", "half an answer", "no JSON", "br"],
)
async def test_an_unusable_answer_is_requested_again(scene: Scene, first: bytes, attempts: int) -> None:
    result, requests = await scene.ask(first, GOOD)
    assert (result["status"], result["answer"]) == ("succeeded", "A cat."), result
    assert (result["attempts"], requests) == (attempts, 2)


async def test_half_an_answer_is_not_an_answer_and_its_usage_is_reported(scene: Scene) -> None:
    before = scene.worker.metric("vqa_ambiguous_calls_total")
    result, requests = await scene.ask(answer({"choices": [HALF], "usage": USAGE}))
    assert (result["error"]["code"], requests) == ("attempts_exhausted", 2)
    assert "interrupted" in result["error"]["message"]
    # Of both requests.
    assert result["usage"] == {**{name: 2 * count for name, count in USAGE.items()}, "cost_usd": None}
    assert scene.worker.metric("vqa_ambiguous_calls_total") == before + 2


@pytest.mark.parametrize("code", [429, 503, 529, 402])
async def test_half_an_answer_is_bought_twice_at_most_whatever_its_error(scene: Scene, code: int) -> None:
    # A success: several jobs in a row without one would be an outage.
    await scene.ask(GOOD)
    error = {"code": code, "message": "Overloaded"}
    result, requests = await scene.ask(answer({"choices": [HALF], "usage": USAGE, "error": error}))
    assert (result["error"]["code"], requests) == ("attempts_exhausted", 2)
    assert result["usage"] == {**{name: 2 * count for name, count in USAGE.items()}, "cost_usd": None}


async def test_the_usage_of_half_an_answer_is_added_to_that_of_the_next_one(scene: Scene) -> None:
    await scene.ask(GOOD)
    good = answer({**completion(), "usage": USAGE})
    result, requests = await scene.ask(answer({"choices": [HALF], "usage": USAGE}), good)
    assert (result["status"], requests) == ("succeeded", 2)
    assert result["usage"] == {**{name: 2 * count for name, count in USAGE.items()}, "cost_usd": None}


async def test_an_answer_that_comes_before_the_end_of_the_request_is_used(scene: Scene) -> None:
    scene.api.early = answer(
        {"error": {"message": "the request is too large"}}, "Connection: close", status=413
    )
    image = picture() + b"\0" * 3 * EARLY_BYTES
    url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    reply = await scene.client.ask(question="What is it?", images=[url])
    assert reply.body["error"]["code"] == "model_rejected", reply.body
    assert "the request is too large" in reply.body["error"]["message"]
    assert scene.api.early_requests == 1


def kinds(body: Mapping[str, Any]) -> list[str]:
    """Return the kinds of the parts of a request's message."""
    (message,) = body["messages"]
    return [part["type"] for part in message["content"]]


async def test_the_order_of_the_prompt_is_the_job_s_or_the_configured_one(scene: Scene) -> None:
    await scene.ask(GOOD)
    await scene.ask(GOOD, prompt_order="images_first")
    usual, own = [bodies[-1] for bodies in scene.api.bodies.values()][-2:]
    assert (kinds(usual), kinds(own)) == (["text", "image_url"], ["image_url", "text"])
    assert (usual["stream"], own["stream"]) == (False, False)


async def test_a_tier_without_capacity_is_left_at_once(scene: Scene) -> None:
    busy = answer(
        {"error": {"message": "no capacity", "code": "capacity_exceeded"}}, "Retry-After: 300", status=429
    )
    flex = answer(completion(service_tier="default"))
    result, requests = await scene.ask(busy, flex, params={"service_tier": "flex"})
    assert (result["status"], result["attempts"], requests) == ("succeeded", 1, 2)
    assert result["service_tier"] == "default"
    first, second = [*scene.api.bodies.values()][-1]
    assert (first["service_tier"], "service_tier" in second) == ("flex", False)


async def test_the_limit_of_the_account_does_not_move_a_job_to_another_tier(scene: Scene) -> None:
    limited = answer(
        {"error": {"message": "Rate limit reached on tokens per min", "code": "rate_limit_exceeded"}},
        "Retry-After: 0",
        status=429,
    )
    result, requests = await scene.ask(limited, GOOD, params={"service_tier": "flex"})
    assert (result["status"], result["attempts"], requests) == ("succeeded", 1, 2)
    assert [body["service_tier"] for body in [*scene.api.bodies.values()][-1]] == ["flex", "flex"]


async def test_a_substituted_model_is_logged_once(scene: Scene) -> None:
    for _ in range(2):
        result, _ = await scene.ask(answer(completion(model="m-substitute")))
        assert result["answered_model"] == "m-substitute"
    (logged,) = [
        line for line in events(scene.worker, "model_substituted") if line["answered_model"] == "m-substitute"
    ]
    assert logged["level"] == "warning"
