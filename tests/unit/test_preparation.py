"""What is converted, and what a job waits for meanwhile."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.unit.conversions import picture, pool_of
from tests.unit.fakes import turns_of_the_loop
from vqa_worker.messages.result import SentImage
from worker.images import conversion_pool
from worker.images.content import Content
from worker.images.memory_budget import MemoryBudget
from worker.images.open_images import OpenImages
from worker.images.preparation import ImageRules, Preparation
from worker.images.source import ImageSource, Link

LIMIT = 10_000_000


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
            (image,) = prepared.sent
            return image


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
