"""What is converted, and what a job waits for meanwhile."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from PIL import Image

from tests.unit.conversions import picture, pool_of, saved
from tests.unit.fakes import turns_of_the_loop
from vqa_worker.messages.error_codes import ErrorCode
from vqa_worker.messages.result import SentImage
from worker.errors import JobError
from worker.images import conversion_pool
from worker.images.content import Content
from worker.images.memory_budget import MemoryBudget
from worker.images.open_images import OpenImages
from worker.images.preparation import ImageRules, Preparation
from worker.images.source import ImageSource, Link

LIMIT = 10_000_000
NEVER = "VQA_IMAGE_CONVERT is never"
JPEG = "image/jpeg"
# A segment of metadata of 64 KB.
SEGMENT = b"\xff\xe1\xff\xfd" + b"http://ns.adobe.com/xmp/extension/\0".ljust(0xFFFB, b"x")


class Scene:
    """A preparation of images and its memory; `openings` counts how often a source was opened."""

    def __init__(self, preparation: Preparation) -> None:
        self.budget = MemoryBudget(LIMIT)
        self.openings = 0
        self.converted_s = 0.0
        self._preparation = preparation

    async def prepare(self, content: bytes, **wanted: Any) -> SentImage:
        async def pieces() -> AsyncIterator[bytes]:
            self.openings += 1
            for start in range(0, len(content), 64 * 1024):
                yield content[start : start + 64 * 1024]

        async def again() -> AsyncIterator[bytes]:
            return pieces()

        source = Content(len(content), pieces(), again)
        async with self.budget.reserve(1) as reservation:
            opened = OpenImages(reservation)
            prepared = await self._preparation.prepare(
                ImageSource("image", Link(""), **wanted), source, opened
            )
            self.converted_s = opened.converted_s
            sent = b"".join([piece async for piece in prepared.url.pieces()])
            assert len(sent) == prepared.url.length
            return prepared.sent[0]


@asynccontextmanager
async def scene(**rules: Any) -> AsyncIterator[Scene]:
    async with pool_of() as pool:
        yield Scene(Preparation(ImageRules(**{"max_image_bytes": LIMIT, **rules}), pool))


async def test_the_wait_for_memory_counts_as_conversion_and_not_as_reading(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(conversion_pool, "MAX_PAUSE_S", 0.01)
    async with scene() as it:
        async with it.budget.reserve(LIMIT - 1):
            preparing = asyncio.create_task(it.prepare(picture()))
            await turns_of_the_loop()
            await asyncio.sleep(0.05)
            assert not preparing.done()
        await preparing
        assert it.converted_s > 0.05
        # The server may have closed the connection meanwhile.
        assert it.openings == 2


@pytest.mark.parametrize("size", [(60, 40), (2000, 1500)])
async def test_without_conversion_every_type_that_the_api_takes_is_sent_unchanged(
    size: tuple[int, int],
) -> None:
    frames = [Image.effect_noise(size, 50) for _ in range(2)]
    content = saved(frames[0], "GIF", save_all=True, append_images=frames[1:], loop=0)
    async with scene(types=(JPEG, "image/gif"), max_edge=64, why_not_converted=NEVER) as it:
        sent = await it.prepare(content)
        assert (sent.sent_type, sent.sent_bytes, sent.width) == ("image/gif", len(content), None)
        with pytest.raises(JobError, match=NEVER) as caught:
            await it.prepare(content, pages=((1, 1),))
        assert caught.value.code == ErrorCode.INVALID_JOB


async def test_a_jpeg_whose_header_is_behind_long_metadata_is_checked_by_a_decoder() -> None:
    image = Image.effect_noise((900, 600), 50)
    plain = saved(image.convert("RGB"), "JPEG")
    content = plain[:2] + 20 * SEGMENT + plain[2:]
    async with scene() as it:
        sent = await it.prepare(content)
        assert (sent.sent_bytes, sent.width, sent.height) == (len(content), 900, 600)
        sent = await it.prepare(content, max_edge=300)
        assert (sent.width, sent.height) == (300, 200)
        plain = saved(image.convert("CMYK"), "JPEG")
        content = plain[:2] + 20 * SEGMENT + plain[2:]
        assert (await it.prepare(content)).sent_bytes < len(content)
    async with scene(max_pixels=1000) as it:
        with pytest.raises(JobError) as caught:
            await it.prepare(content)
        assert caught.value.code == ErrorCode.IMAGE_TOO_LARGE


async def test_what_only_begins_and_ends_like_a_jpeg_is_corrupt() -> None:
    async with scene() as it:
        with pytest.raises(JobError) as caught:
            await it.prepare(b"\xff\xd8\xff" + bytes(range(254)) * 8000 + b"\xff\xd9")
        assert caught.value.code == ErrorCode.IMAGE_CORRUPT


async def test_the_pages_of_a_document_fit_into_the_memory_of_a_job() -> None:
    pages = [Image.frombytes("L", (700, 700), os.urandom(700 * 700)) for _ in range(2)]
    content = saved(pages[0], "TIFF", save_all=True, append_images=pages[1:] * 9)
    async with scene(max_image_bytes=1_000_000, max_source_bytes=LIMIT) as it:
        it.budget = MemoryBudget(2_000_000)
        with pytest.raises(JobError, match="VQA_IMAGE_BUFFER_BYTES") as caught:
            await it.prepare(content)
        assert caught.value.code == ErrorCode.IMAGE_TOO_LARGE
        assert (await it.prepare(content, max_edge=100)).page == 1
