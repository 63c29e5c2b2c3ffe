"""A worker with llama.cpp's server, which decodes images and constrains answers by a grammar.

`make test-llamacpp` installs what it needs.
"""

import asyncio
import importlib.util
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from deploy.local.stack import Stack
from tests.breaking import events
from tests.conftest import MakeClient, PutImage, StartWorker, picture
from tests.running import ROOT, Client, Worker, until

MISSING = [name for name in ("gguf", "xllamacpp") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"{' and '.join(MISSING)} not installed: run `make test-llamacpp`"
)

KEY = "the-server's-key"
SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "blue"]},
        "is_photo": {"type": "boolean"},
        "note": {"type": ["string", "null"], "maxLength": 12},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["colour", "is_photo", "note", "tags"],
    "additionalProperties": False,
    "$defs": {"tag": {"type": "string", "minLength": 1, "maxLength": 5}},
}
# The token of the byte 0xFF, which no text has: bytes follow three other tokens.
INVALID_TOKEN = 3 + 0xFF


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start the server and return its URL."""
    folder = tmp_path_factory.mktemp("llamacpp")
    command = [sys.executable, "-m", "tests.slow.llamacpp.server", str(folder), KEY]
    log = folder / "server.log"
    with (
        log.open("wb") as errors,
        subprocess.Popen(  # noqa: S603 - a test's own
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url, log.read_text()
        yield url


def settings(url: str, **others: str) -> dict[str, str]:
    return {
        "VQA_PROVIDER": "llamacpp",
        "VQA_MODEL_BASE_URL": f"{url}/v1",
        "VQA_MODEL_API_KEY": KEY,
        "VQA_MODEL": "small",
        "VQA_ALLOWED_MODELS": "small",
        # The grammar alone must do.
        "VQA_SCHEMA_REPAIRS": "0",
        "VQA_MAX_ATTEMPTS": "2",
        **others,
    }


@pytest.fixture(scope="module")
async def worker(
    stack: Stack, server: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Worker]:
    async with Worker.running(stack, tmp_path_factory.mktemp("worker"), **settings(server)) as worker:
        yield worker


def params(schema: Any, **others: Any) -> dict[str, Any]:
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    return {"max_tokens": 500, "response_format": form, **others}


async def test_answers_that_a_grammar_constrains_satisfy_the_schema(
    client: Client, worker: Worker, put_image: PutImage
) -> None:
    asked = (
        client.ask(question="What is it?", images=[put_image()], params=params(SCHEMA, seed=seed))
        for seed in range(12)
    )
    bodies = [reply.body for reply in await asyncio.gather(*asked)]
    for body in bodies:
        assert body["status"] == "succeeded", body
        assert json.loads(body["answer"]) == body["parsed"]
        Draft202012Validator(SCHEMA).validate(body["parsed"])
        assert (body["provider"], body["answered_model"], body["finish_reason"]) == (
            "llamacpp",
            "small",
            "stop",
        )
        assert body["attempts"] == 1
    assert len({body["answer"] for body in bodies}) > 1
    assert worker.metric("vqa_schema_repairs_total") == 0


async def test_what_the_grammar_does_not_constrain_is_validated_by_the_worker(client: Client) -> None:
    """llama.cpp ignores patterns that do not begin with ^ and end with $, and look-ahead."""
    schema = {
        "type": "object",
        "properties": {"code": {"type": "string", "pattern": "[0-9]{9}", "maxLength": 12}},
        "required": ["code"],
        "additionalProperties": False,
    }
    reply = await client.ask(messages=[{"role": "user", "content": "?"}], params=params(schema))
    assert reply.body["error"]["code"] == "schema_mismatch", reply.body
    assert "params.max_tokens" in reply.body["error"]["message"] or "code: " in reply.body["error"]["message"]


async def test_an_answer_that_the_token_limit_truncates_is_a_mismatch(client: Client) -> None:
    reply = await client.ask(messages=[{"role": "user", "content": "?"}], params=params(SCHEMA, max_tokens=5))
    assert reply.body["error"]["code"] == "schema_mismatch", reply.body
    assert "raise params.max_tokens" in reply.body["error"]["message"]
    assert reply.body["usage"]["completion_tokens"] == 5


async def test_plain_answers_depend_on_the_image(client: Client, put_image: PutImage) -> None:
    tokens = []
    for size in ((64, 64), (640, 480)):
        reply = await client.ask(
            question="What is it?", images=[put_image(picture(size=size))], params={"max_tokens": 7}
        )
        body = reply.body
        assert (body["status"], body["finish_reason"], body["parsed"]) == ("succeeded", "length", None), body
        assert len(body["answer"]) == 7
        assert body["usage"]["completion_tokens"] == 7
        tokens.append(body["usage"]["prompt_tokens"])
    # About a token for 32 by 32 pixels.
    assert tokens[1] - tokens[0] > 200


async def test_json_mode_answers_with_an_object(client: Client, put_image: PutImage) -> None:
    reply = await client.ask(
        question="What is it?",
        images=[put_image()],
        params={"max_tokens": 500, "temperature": 0, "response_format": {"type": "json_object"}},
    )
    assert reply.body["status"] == "succeeded", reply.body
    assert isinstance(json.loads(reply.body["answer"]), dict)
    assert reply.body["parsed"] is None


async def test_an_image_type_that_the_server_does_not_decode_is_converted(
    client: Client, put_image: PutImage
) -> None:
    reply = await client.ask(question="?", images=[put_image(picture("WEBP"))], params={"max_tokens": 3})
    assert reply.body["status"] == "succeeded", reply.body
    (image,) = reply.body["images"]
    assert image["source_type"] == "image/webp"
    assert image["sent_type"] in {"image/jpeg", "image/png"}


async def test_rejections_of_the_server_concern_one_job(
    client: Client, worker: Worker, put_image: PutImage
) -> None:
    rejected: dict[str, dict[str, Any]] = {
        "exceeds the available context size": {"question": "word " * 3000, "images": [put_image()]},
        "temperature": {"question": "?", "images": [put_image()], "params": {"temperature": "hot"}},
    }
    for message, fields in rejected.items():
        body = (await client.ask(**fields)).body
        assert (body["status"], body["attempts"]) == ("failed", 1), body
        assert body["error"]["code"] == "model_rejected", body
        assert message in body["error"]["message"]
    assert worker.ready()[1]["status"] == "ready"
    assert worker.metric("vqa_dependency_up", dependency="model") == 1


def with_damaged_pixels(png: bytes) -> bytes:
    """Return a PNG whose chunks are valid, and whose compressed pixels end too early."""
    before, pixels = png.split(b"IDAT")
    (length,) = struct.unpack(">I", before[-4:])
    chunk = b"IDAT" + pixels[: length // 2]
    return b"".join(
        (
            before[:-4],
            struct.pack(">I", length // 2),
            chunk,
            struct.pack(">I", zlib.crc32(chunk)),
            pixels[length + 4 :],
        )
    )


async def test_a_damaged_image_is_rejected_by_the_server_and_a_truncated_one_by_the_worker(
    client: Client, worker: Worker, put_image: PutImage
) -> None:
    image = picture(size=(300, 300))
    body = (await client.ask(question="?", images=[put_image(image[:-60])])).body
    assert body["error"]["code"] == "image_corrupt", body
    body = (await client.ask(question="?", images=[put_image(with_damaged_pixels(image))])).body
    assert body["error"]["code"] == "model_rejected", body
    assert "Failed to load image" in body["error"]["message"]
    assert worker.metric("vqa_dependency_up", dependency="model") == 1


async def test_an_output_that_the_server_cannot_parse_is_retried_and_no_outage(
    client: Client, worker: Worker
) -> None:
    """The server discards the answer and responds with 500."""
    schema = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 9}}, "required": ["a"]}
    biased = params(schema, temperature=0, max_tokens=100, logit_bias=[[INVALID_TOKEN, 100]])
    asked = (client.ask(messages=[{"role": "user", "content": f"{n}?"}], params=biased) for n in range(8))
    for reply in await asyncio.gather(*asked):
        assert reply.body["error"]["code"] == "attempts_exhausted", reply.body
        assert "does not match the expected" in reply.body["error"]["message"]
        assert reply.body["attempts"] == 2
    assert worker.metric("vqa_dependency_up", dependency="model") == 1
    assert not events(worker, "consumption_paused")


async def test_a_wrong_key_pauses_the_worker(
    server: str, start_worker: StartWorker, client_of: MakeClient, put_image: PutImage
) -> None:
    wrong = "not-the-server's-key"
    worker = await start_worker(**settings(server, VQA_MODEL_API_KEY=wrong))
    client = await client_of(worker)
    await client.publish({"id": "waits", "question": "?", "images": [put_image()]})
    await until(lambda: worker.metric("vqa_dependency_up", dependency="model") == 0, "the worker pauses")
    assert "VQA_MODEL_API_KEY" in json.dumps(worker.ready()[1])
    assert "401" in worker.output()
    assert wrong not in worker.output()
    assert "waits" not in client.replies
