"""Images reach the API unchanged, byte for byte, from every source."""

import asyncio
import base64
import hashlib
import os
import random
import urllib.request
import uuid
from collections.abc import AsyncIterator
from urllib.parse import parse_qs, quote, urlsplit

import pytest
from aiohttp import web

from deploy.local.model_simulator.calls import Call
from deploy.local.stack import Stack
from tests.conftest import BUCKET, PutImage, picture
from tests.fake_s3 import FakeS3
from tests.running import Client, Worker, calls_with

MEDIA_TYPES = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}

ODD_KEYS = [
    "with blank.png",
    "with%20percent.png",
    "100%.png",
    "%2Fslash.png",
    "plus+plus.png",
    "question?mark=1&x.png",
    "hash#mark.png",
    "back\\slash.png",
    "quotes'\"<>&;.png",
    "~!$()*,=:@[]{}|^`.png",
    "Größe-尺寸-😀.png",
    "e\u0301 is not \u00e9.png",
    " blanks around ",
    "folder/and/file",
    "no-extension",
]
# SeaweedFS normalises these keys; only a fake shows the requested key.
KEYS_OF_ODD_PATHS = [
    "/leading.png",
    "//two.png",
    "double//slash.png",
    "trailing/",
    "./dot.png",
    "a/../b.png",
    "..",
    "s3://again/x.png",
]


@pytest.mark.parametrize("kind", MEDIA_TYPES)
async def test_the_bytes_are_the_same_from_every_source(
    client: Client, stack: Stack, put_image: PutImage, kind: str
) -> None:
    contents = [picture(kind) for _ in range(4)]
    call = await _model_request(
        client,
        stack,
        put_image(contents[0]),
        _data_url(contents[1], MEDIA_TYPES[kind]),
        {"url": put_image(contents[2])},
        {"url": _data_url(contents[3], MEDIA_TYPES[kind])},
    )

    assert [image.sha256 for image in call.images] == [_sha256(content) for content in contents]
    assert {image.declared_type for image in call.images} == {MEDIA_TYPES[kind]}
    assert {image.format for image in call.images} == {kind}


async def test_images_of_every_length_around_base64_boundaries_arrive_unchanged(
    client: Client, stack: Stack, put_image: PutImage
) -> None:
    chance = random.Random(7)  # noqa: S311 - image bytes, not secrets
    base = picture()
    lengths = [*range(4), *(chance.randrange(4, 70_000) for _ in range(4))]
    contents = [base + chance.randbytes(length) for length in lengths]
    by_s3 = await _model_request(client, stack, *[put_image(content) for content in contents])
    by_data = await _model_request(client, stack, *[_data_url(content) for content in contents])

    for call in (by_s3, by_data):
        assert [image.bytes for image in call.images] == [len(base) + length for length in lengths]
        assert [image.sha256 for image in call.images] == [_sha256(content) for content in contents]


async def test_a_large_image_arrives_unchanged(client: Client, stack: Stack, put_image: PutImage) -> None:
    content = picture() + os.urandom(9_000_001)
    call = await _model_request(client, stack, put_image(content))
    assert [image.sha256 for image in call.images] == [_sha256(content)]


async def test_the_type_is_detected_from_the_content_and_not_from_the_name(
    client: Client, stack: Stack, put_image: PutImage
) -> None:
    s3 = stack.s3.client()
    key = f"{uuid.uuid4().hex}.jpg"
    s3.put_object(Bucket=BUCKET, Key=key, Body=picture("PNG"), ContentType="text/html")
    call = await _model_request(
        client,
        stack,
        f"s3://{BUCKET}/{key}",
        put_image(picture("WEBP"), f"{uuid.uuid4().hex}.png"),
        put_image(picture("JPEG"), f"{uuid.uuid4().hex}.txt"),
        _data_url(picture("JPEG"), "image/png"),
        _data_url(picture("PNG"), "application/octet-stream"),
    )

    expected = ["image/png", "image/webp", "image/jpeg", "image/jpeg", "image/png"]
    assert [image.declared_type for image in call.images] == expected


async def test_a_key_is_literal(client: Client, stack: Stack, put_image: PutImage) -> None:
    contents = {f"{uuid.uuid4().hex}/{key}": picture() for key in ODD_KEYS}
    # The keys after decoding or trimming belong to other images.
    decoys = {"with percent.png", "plus plus.png", "question", "hash", "é is not é.png", "blanks around"}
    for key in contents:
        for decoy in decoys:
            put_image(picture(), f"{key.partition('/')[0]}/{decoy}")
    call = await _model_request(
        client, stack, *[put_image(content, key) for key, content in contents.items()]
    )

    seen = [image.sha256 for image in call.images]
    assert dict(zip(contents, seen, strict=True)) == {
        key: _sha256(content) for key, content in contents.items()
    }


@pytest.fixture(scope="module")
async def faked(
    stack: Stack, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[FakeS3, Client]]:
    """Return a worker with a fake S3, and its client."""
    folder = tmp_path_factory.mktemp("faked")
    async with (
        FakeS3.serving(picture()) as s3,
        Worker.running(stack, folder, VQA_S3_ENDPOINT_URL=s3.url, VQA_MAX_IMAGE_BYTES="1000") as worker,
        Client.of(stack, worker) as client,
    ):
        yield s3, client


@pytest.mark.parametrize("key", KEYS_OF_ODD_PATHS)
async def test_slashes_and_dots_of_a_key_are_requested_unchanged(
    stack: Stack, faked: tuple[FakeS3, Client], key: str
) -> None:
    s3, client = faked
    await _model_request(client, stack, f"s3://{BUCKET}/{key}")
    assert s3.targets.pop().partition("?")[0] == f"/{BUCKET}/{quote(key, safe='/~')}"


async def test_a_too_large_image_is_rejected_before_its_bytes_are_read(
    faked: tuple[FakeS3, Client],
) -> None:
    s3, client = faked

    async def announce(request: web.BaseRequest) -> web.StreamResponse:
        """Announce the size and never send the body."""
        response = web.StreamResponse(headers={"Content-Length": str(10**12)})
        await response.prepare(request)
        await asyncio.Event().wait()
        return response

    usual, s3.answer = s3.answer, announce
    reply = await client.ask(question="?", images=[f"s3://{BUCKET}/large"])
    s3.answer = usual

    assert reply.body["error"]["code"] == "image_too_large"
    assert "has 1000000000000 bytes; VQA_MAX_SOURCE_BYTES allows 100000000" in reply.body["error"]["message"]
    assert len(s3.targets) == 1


async def test_an_https_url_is_passed_on_unchanged_and_not_fetched(client: Client, stack: Stack) -> None:
    visits = 0

    def count(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal visits
        visits += 1
        writer.close()

    async with await asyncio.start_server(count, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        links = [
            f"https://127.0.0.1:{port}/a%20b/../c//d.png?X=%2F&y=a+b&y=2#part",
            f'HTTPS://user:pass@LocalHost:{port}/ünïcödé?q="quoted"&{{}}|',
            "https://example.com",
            "https://[::1]:9/x",
        ]
        call = await _model_request(client, stack, links[0], {"url": links[1]}, *links[2:])

    assert call.links == links
    assert visits == 0


async def test_an_https_url_in_the_long_form_is_passed_on_too(client: Client, stack: Stack) -> None:
    marker = uuid.uuid4().hex
    link = f"https://images.example.com/{marker}.png?sig=a%2Bb"
    parts = [{"type": "image_url", "image_url": {"url": link}}, {"type": "text", "text": marker}]
    await client.ask(messages=[{"role": "user", "content": parts}])

    (call,) = calls_with(stack, marker)
    assert call.links == [link]


async def test_a_data_url_is_parsed_as_in_browsers(client: Client, stack: Stack) -> None:
    content = picture() + b"xx"
    while len(content) % 3 != 1:  # two characters of padding
        content += b"x"
    encoded = base64.b64encode(content).decode()
    lines = "\r\n".join(encoded[start : start + 76] for start in range(0, len(encoded), 76))
    urls = [
        f"data:image/png;base64,{encoded.rstrip('=')}",
        f"data:image/png;base64, {lines}\n",
        f"data:image/png;base64,{encoded[:10]}\t\f{encoded[10:]}",
        f"DATA:image/PNG;BASE64,{encoded}",
        f"data:image/png;charset=utf-8;base64,{encoded}",
        f"data:image/png;base64,{encoded[:-1]}",
    ]
    call = await _model_request(client, stack, *urls)
    assert [image.sha256 for image in call.images] == [_sha256(content)] * len(urls)


@pytest.fixture(scope="module")
async def by_link(
    stack: Stack, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Worker, Client]]:
    """Start a worker with `VQA_IMAGE_DELIVERY=link`."""
    # The simulator accepts https URLs only. The scheme is not part of the signature, and the worker itself
    # does not connect to S3 for a presigned URL: so the endpoint can be configured as https here.
    endpoint = stack.s3.endpoint_url.replace("http://", "https://")
    folder = tmp_path_factory.mktemp("by-link")
    async with (
        Worker.running(
            stack,
            folder,
            VQA_IMAGE_DELIVERY="link",
            VQA_S3_ENDPOINT_URL=endpoint,
            VQA_MODEL_TIMEOUT="50",
            VQA_JOB_TIMEOUT="70",
        ) as worker,
        Client.of(stack, worker) as client,
    ):
        yield worker, client


async def test_the_request_has_presigned_urls_that_return_the_images(
    stack: Stack, put_image: PutImage, by_link: tuple[Worker, Client]
) -> None:
    _, client = by_link
    contents = {f"{uuid.uuid4().hex}/{key}": picture() for key in ODD_KEYS}
    call = await _model_request(
        client, stack, *[put_image(content, key) for key, content in contents.items()]
    )

    assert call.images == []
    for link, (key, content) in zip(call.links, contents.items(), strict=True):
        assert await asyncio.to_thread(_get, link) == content, key


async def test_a_presigned_url_is_valid_until_after_the_last_call(
    stack: Stack, put_image: PutImage, by_link: tuple[Worker, Client]
) -> None:
    _, client = by_link
    call = await _model_request(client, stack, put_image())
    query = parse_qs(urlsplit(call.links[0]).query)
    assert int(query["X-Amz-Expires"][0]) >= 120
    assert query["X-Amz-Algorithm"] == ["AWS4-HMAC-SHA256"]


async def test_the_api_checks_the_content_behind_presigned_urls(
    stack: Stack, put_image: PutImage, by_link: tuple[Worker, Client]
) -> None:
    _, client = by_link
    call = await _model_request(
        client, stack, put_image(b"no image"), f"s3://{BUCKET}/missing-{uuid.uuid4().hex}"
    )
    assert len(call.links) == 2


async def test_embedded_images_stay_embedded_and_https_urls_are_passed_on(
    stack: Stack, by_link: tuple[Worker, Client]
) -> None:
    _, client = by_link
    content = picture("WEBP")
    call = await _model_request(client, stack, "https://example.com/x.png", _data_url(content))
    assert call.links == ["https://example.com/x.png"]
    assert [image.sha256 for image in call.images] == [_sha256(content)]


async def test_only_the_api_gets_the_signature(
    stack: Stack, put_image: PutImage, by_link: tuple[Worker, Client]
) -> None:
    worker, client = by_link
    call = await _model_request(client, stack, put_image())
    signature = parse_qs(urlsplit(call.links[0]).query)["X-Amz-Signature"][0]
    results = [reply.message.body for replies in client.replies.values() for reply in replies]
    assert not any(signature.encode() in body for body in results)
    assert signature not in worker.output()
    assert signature not in worker.get("/metrics")[1]


async def _model_request(client: Client, stack: Stack, *images: object) -> Call:
    """Return the model request for a job with these images."""
    question = f"What is {uuid.uuid4().hex}?"
    reply = await client.ask(question=question, images=images)
    assert reply.body["status"] == "succeeded", reply.body
    (call,) = calls_with(stack, question)
    return call


def _get(link: str) -> bytes:
    assert link.startswith("https://")
    plain = link.replace("https://", "http://", 1)
    with urllib.request.urlopen(plain, timeout=30) as response:  # noqa: S310 - the scheme is checked above
        content: bytes = response.read()
    return content


def _data_url(content: bytes, declared: str = "image/png") -> str:
    return f"data:{declared};base64,{base64.b64encode(content).decode()}"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
