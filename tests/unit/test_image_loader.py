"""Image loading: memory held per job, and errors that name the job's own image."""

import asyncio
import base64
import random
import weakref
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from PIL import Image

from tests.conftest import picture
from tests.fake_s3 import Answer, FakeS3, give, head, say
from tests.running import until
from tests.unit.conversions import OPTIONS, saved
from tests.unit.fakes import turns_of_the_loop
from vqa_worker.messages.conversation import ImageRef
from worker.errors import NotAdmittedError, TransientError
from worker.http.client import proxy_options
from worker.images.conversion_pool import ConversionPool
from worker.images.loader import ImageLoader, LinkPolicy, display_name
from worker.images.open_images import OpenImages
from worker.images.preparation import ImageRules
from worker.images.source import ImageSource, SourcePolicy
from worker.images.urls import BufferedUrl, StreamedUrl
from worker.model.request import PLACEHOLDER, RequestBody, body_parts
from worker.s3.aws import Aws, Endpoint
from worker.s3.client import S3

KIB = 1024
PNG = picture()
RULES = ImageRules(max_image_bytes=10_000_000, max_source_bytes=20_000_000)
MEMORY_BYTES = 256 * 1024 * KIB
NOISE = random.Random(2).randbytes(900 * KIB)  # noqa: S311 - no secret
SMALL, LARGE = PNG + NOISE[: 100 * KIB], PNG + NOISE
PATIENCE_S = 60


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set credentials and no proxy."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name, value in (("ACCESS_KEY_ID", "AKID"), ("SECRET_ACCESS_KEY", "secret"), ("REGION", "eu-west-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    proxy_options.cache_clear()


@pytest.fixture
async def fake() -> AsyncIterator[FakeS3]:
    async with FakeS3.serving(SMALL) as fake:
        yield fake


@asynccontextmanager
async def loader(
    fake: FakeS3,
    *,
    buffer_bytes: int = 1024 * KIB,
    links: LinkPolicy | None = None,
    pool: ConversionPool | None = None,
) -> AsyncIterator[ImageLoader]:
    s3 = S3(Aws(Endpoint(fake.url, "auto")))
    pool = pool or ConversionPool(processes=1, memory_bytes=MEMORY_BYTES)
    policy = SourcePolicy(allowed_buckets=["*"], allowed_link_hosts=["*"])
    try:
        yield ImageLoader(s3, policy, RULES, pool, max_per_job=16, buffer_bytes=buffer_bytes, links=links)
    finally:
        await pool.close()
        await s3.close()


def located(images: ImageLoader, *urls: str) -> list[ImageSource]:
    refs = [ImageRef(f"images[{n}]", url) for n, url in enumerate(urls)]
    return images.check(refs, " ".join(urls).encode())


@asynccontextmanager
async def opened(images: ImageLoader, *urls: str) -> AsyncIterator[OpenImages]:
    wanted = located(images, *urls)
    async with (
        asyncio.timeout(PATIENCE_S),
        images.reserve(wanted) as reservation,
        images.open(wanted, reservation) as opened,
    ):
        yield opened


def data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def body_of(opened: OpenImages) -> RequestBody:
    parts: Sequence[Any] = [
        {"type": "image_url", "image_url": {"url": PLACEHOLDER}} for _ in range(len(opened.urls))
    ]
    return RequestBody(
        body_parts("m", [{"role": "user", "content": parts}], {}), opened.urls, on_sent=opened.mark_sent
    )


async def send(body: RequestBody) -> int:
    return sum([len(piece) async for piece in body])


IMAGES = {
    "small from S3": (give(SMALL), "s3://b/small"),
    "large from S3": (give(LARGE), "s3://b/large"),
    "small in the job": (give(b""), data_url(SMALL)),
    "large in the job": (give(b""), data_url(LARGE)),
    "a link": (give(b""), "https://images.example/a.png"),
}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", IMAGES)
async def test_images_that_were_sent_are_freed(fake: FakeS3, kind: str, count: int) -> None:
    """The API answers after about 15 seconds; other images must not wait for that."""
    fake.answer, url = IMAGES[kind]
    async with loader(fake) as images, opened(images, *[url] * count) as open_images:
        assert len(open_images.urls) == count
        held = [weakref.ref(it) for it in open_images.urls]
        body = body_of(open_images)
        expected = sum(it.length for it in open_images.urls)
        assert await send(body) == body.length > expected
        # A task that was just resumed still references its result.
        await turns_of_the_loop()
        assert list(open_images.urls) == []
        assert [it() for it in held] == [None] * count
        # The whole memory budget is free for another job.
        async with opened(images, data_url(LARGE)) as others:
            assert isinstance(others.urls[0], StreamedUrl)


async def test_memory_is_reserved_and_released_at_the_end(fake: FakeS3) -> None:
    async with loader(fake, buffer_bytes=1024 * KIB) as images:
        (first,) = located(images, data_url(LARGE))
        async with images.reserve([first]) as reservation:
            waiting = asyncio.create_task(images.reserve([first]).__aenter__())
            async with images.open([first], reservation):
                await asyncio.sleep(0.05)
                assert not waiting.done()
        async with asyncio.timeout(PATIENCE_S):
            (await waiting).release()
            async with images.reserve([first]):
                pass


async def test_small_images_reserve_no_more_than_their_size(fake: FakeS3) -> None:
    async with (
        loader(fake, buffer_bytes=1024 * KIB) as images,
        opened(images, "s3://b/1") as one,
        opened(images, "s3://b/2") as other,
    ):
        assert [type(it) for it in (*one.urls, *other.urls)] == [BufferedUrl] * 2


@pytest.mark.parametrize("check_content", [True, False])
async def test_links_reserve_no_memory(fake: FakeS3, check_content: bool) -> None:
    fake.answer = give(SMALL[:12], 206, Content_Range=f"bytes 0-11/{len(SMALL)}")
    async with (
        loader(fake, links=LinkPolicy(expires_s=60, check_content=check_content)) as images,
        opened(images, data_url(LARGE)),
        opened(images, "s3://b/k", "https://h/") as links,
    ):
        assert [type(it) for it in links.urls] == [BufferedUrl] * 2


def torn(content: bytes) -> Answer:
    """Return the headers for the whole object, and half of its body."""
    return say(head(len(content)), content[: len(content) // 2])


@pytest.mark.parametrize("content", [SMALL, LARGE], ids=["small", "large"])
async def test_an_interrupted_shared_read_names_the_image_of_each_job_and_counts_once(
    fake: FakeS3, content: bytes
) -> None:
    """Small images are interrupted before the model request, large ones while they are sent."""
    jobs = 8
    fake.answer = torn(content)

    async def one(images: ImageLoader, number: int) -> TransientError:
        url = "s3://b/torn"
        with pytest.raises(TransientError) as caught:
            async with opened(images, *["https://h/"] * number, url) as open_images:
                await send(body_of(open_images))
        assert caught.value.message.startswith(f"{display_name(ImageRef(f'images[{number}]', url))}: ")
        return caught.value

    async with loader(fake, buffer_bytes=100 * 1024 * KIB) as images:
        faults = await asyncio.gather(*[one(images, number) for number in range(jobs)])
    assert len(fake.asked) == 1
    assert [it.reason for it in faults] == ["connection_error"] * jobs
    assert sum(not it.is_duplicate for it in faults) == 1


async def test_images_that_cannot_be_opened_in_time_are_a_transient_error(fake: FakeS3) -> None:
    async def hang(_: web.BaseRequest) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    fake.answer = hang
    async with loader(fake) as images:
        wanted = located(images, "s3://photos/a.png")
        async with images.reserve(wanted) as reservation:
            with pytest.raises(TransientError) as caught:
                async with images.open(wanted, reservation, time_left_s=0.2):
                    pass
    assert caught.value.reason == "timeout"


async def endless() -> AsyncIterator[bytes]:
    yield b"GIF89a"
    await asyncio.Event().wait()


async def test_a_job_that_gets_no_process_for_its_images_is_left_to_another_worker(fake: FakeS3) -> None:
    fake.answer = give(saved(Image.new("RGB", (60, 40)), "GIF"))

    async def again() -> AsyncIterator[bytes]:
        return endless()

    async def reserve(_: int) -> None:
        pass

    pool = ConversionPool(processes=1, memory_bytes=MEMORY_BYTES)
    async with loader(fake, pool=pool) as images:
        wanted = located(images, "s3://b/one")
        holding = asyncio.create_task(
            pool.convert("image/gif", endless(), OPTIONS, again=again, reserve=reserve)
        )
        await until(lambda: pool.process_ids, "the other image has the process")
        with pytest.raises(NotAdmittedError, match="no process to convert the images"):
            async with (
                images.reserve(wanted) as memory,
                images.open(wanted, memory, time_left_s=2.0),
            ):
                pass
        holding.cancel()
        await asyncio.gather(holding, return_exceptions=True)
        async with opened(images, "s3://b/one") as found:
            assert found.sent[0].source_type == "image/gif"
