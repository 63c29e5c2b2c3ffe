"""Jobs whose body is compressed, or encoded in another way than JSON in UTF-8."""

import base64
import gzip
import hashlib
import json
import os
import uuid
import zlib
from collections.abc import Callable
from io import BytesIO

import pytest
from PIL import Image

from deploy.local.stack import Stack
from tests.breaking import job
from tests.conftest import MakeClient, StartWorker
from tests.running import Client, Worker, calls_with, until

Encode = Callable[[bytes], bytes]


def noise() -> bytes:
    """Return a PNG that is too long to be parsed with the rest of the body."""
    buffer = BytesIO()
    Image.frombytes("RGB", (40, 40), os.urandom(4800)).save(buffer, "PNG")
    return buffer.getvalue()


def raw_deflate(body: bytes) -> bytes:
    return zlib.compress(body, wbits=-zlib.MAX_WBITS)


def with_mark(body: bytes) -> bytes:
    return b"\xef\xbb\xbf" + body


def same(body: bytes) -> bytes:
    return body


ACCEPTED: dict[str, tuple[str | None, Encode]] = {
    "gzip": ("gzip", gzip.compress),
    "gzip in capitals": ("GZIP", gzip.compress),
    "x-gzip": ("x-gzip", gzip.compress),
    "gzip in two members": ("gzip", lambda body: gzip.compress(body[:9]) + gzip.compress(body[9:])),
    "gzip of text with a byte order mark": ("gzip", lambda body: gzip.compress(with_mark(body))),
    "deflate": ("deflate", zlib.compress),
    "raw deflate": ("deflate", raw_deflate),
    "gzip named, not used": ("gzip", same),
    "utf-8": ("utf-8", same),
    "identity": ("identity", same),
    "byte order mark": (None, with_mark),
}


@pytest.mark.parametrize("kind", ACCEPTED)
async def test_a_job_is_answered_however_its_body_is_encoded(stack: Stack, client: Client, kind: str) -> None:
    encoding, encode = ACCEPTED[kind]
    marker, image = uuid.uuid4().hex, noise()
    url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    asked = job(marker, url, metadata={"kind": kind})
    await client.publish(encode(json.dumps(asked).encode()), content_encoding=encoding)
    reply = await client.result(asked["id"])

    assert reply.body["status"] == "succeeded", reply.body["error"]
    assert reply.body["metadata"] == {"kind": kind}
    (call,) = calls_with(stack, marker)
    assert [sent.sha256 for sent in call.images] == [hashlib.sha256(image).hexdigest()]


REJECTED: dict[str, tuple[str | None, Encode, str]] = {
    "brotli": ("br", same, "content_encoding br is not supported: gzip, deflate"),
    "base64": ("base64", same, "content_encoding base64 is not supported: gzip, deflate"),
    "two encodings": ("gzip, gzip", same, "content_encoding gzip, gzip is not supported"),
    "damaged": ("gzip", lambda body: gzip.compress(body)[:-8] + bytes(8), "not valid gzip"),
    "incomplete": ("gzip", lambda body: gzip.compress(body)[:-1], "incomplete"),
    "gzip named deflate": ("deflate", gzip.compress, "not valid deflate"),
    "gzip without its name": (None, gzip.compress, "not strict JSON"),
    "UTF-16": (None, lambda body: body.decode().encode("utf-16"), "the body is UTF-16: publish it in UTF-8"),
    "UTF-32": (None, lambda body: body.decode().encode("utf-32"), "the body is UTF-32: publish it in UTF-8"),
    "compressed UTF-16": (
        "gzip",
        lambda body: gzip.compress(body.decode().encode("utf-16")),
        "the body is UTF-16",
    ),
    "encoded twice": (None, lambda body: json.dumps(body.decode()).encode(), "encode the job only once"),
    "encoded three times": (
        None,
        lambda body: json.dumps(json.dumps(body.decode())).encode(),
        "encode the job only once",
    ),
    "bomb": (
        "gzip",
        lambda _: gzip.compress(bytes(40_000_000)),
        "more than 16000000 bytes, which VQA_MAX",
    ),
    "deflate bomb": ("deflate", lambda _: raw_deflate(bytes(40_000_000)), "more than 16000000 bytes"),
}


@pytest.mark.parametrize("kind", REJECTED)
async def test_another_encoding_is_an_invalid_job_whose_message_names_it(
    stack: Stack, client: Client, worker: Worker, kind: str
) -> None:
    encoding, encode, says = REJECTED[kind]
    marker, message_id = uuid.uuid4().hex, uuid.uuid4().hex
    body = encode(json.dumps(job(marker)).encode())
    async with client.reading(worker.dead_letter_queue) as dead_letters:
        await client.publish(body, content_encoding=encoding, message_id=message_id)
        reply = await client.result(message_id)
        (dead_letter,) = await until(
            lambda: [it for it in dead_letters if it.message_id == message_id], "the dead letter"
        )

    assert reply.body["error"]["code"] == "invalid_job"
    assert says in reply.body["error"]["message"]
    assert dead_letter.body == body
    assert calls_with(stack, marker) == []


async def test_bombs_do_not_delay_other_jobs(start_worker: StartWorker, client_of: MakeClient) -> None:
    worker = await start_worker(VQA_MAX_JOB_BYTES="100000")
    client = await client_of(worker)
    bomb = gzip.compress(bytes(90_000_000))
    assert len(bomb) < 100_000
    bombs = [uuid.uuid4().hex for _ in range(20)]
    for message_id in bombs:
        await client.publish(bomb, content_encoding="gzip", message_id=message_id)
    asked = job()
    await client.publish(asked)

    assert (await client.result(asked["id"])).body["status"] == "succeeded"
    for message_id in bombs:
        failed = (await client.result(message_id)).body
        assert failed["error"]["code"] == "invalid_job"
        assert failed["timings"]["total_s"] < 5
    await until(lambda: worker.metric("vqa_jobs_in_flight") == 0, "nothing is in flight")
