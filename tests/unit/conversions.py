"""Conversions by a pool, for tests."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pillow_heif
import pytest
from PIL import Image

from vqa_worker.messages.error_codes import ErrorCode
from worker.images.conversion import ConversionError, ConversionOptions, ConvertedImage
from worker.images.conversion_pool import ConversionPool

pillow_heif.register_heif_opener()

OPTIONS = ConversionOptions(
    types=("image/jpeg", "image/png", "image/webp"),
    max_bytes=5_000_000,
    max_edge=512,
    max_pixels=100_000_000,
    pages=None,
    max_pages=5,
    pdf_dpi=72,
)
PIECE_BYTES = 64 * 1024
# How an upright picture is stored with an EXIF orientation: what the orientation asks a viewer for, undone.
LYING = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(kind: str = "GIF", size: tuple[int, int] = (60, 40)) -> bytes:
    return saved(Image.new("RGB", size, "teal"), kind)


class Conversion:
    """Converts one image, and records how."""

    def __init__(
        self, pool: ConversionPool, content: bytes, media_type: str = "image/gif", **options: Any
    ) -> None:
        self.openings = 1
        self.reserved: list[int] = []
        self.sent = asyncio.Event()
        self.on_piece: Callable[[], None] = lambda: None
        self.on_reserve: Callable[[], Awaitable[object]] = _nothing
        self._pool = pool
        self._content = content
        self._media_type = media_type
        self._options = replace(OPTIONS, **options)

    async def run(self) -> list[ConvertedImage]:
        return await self._pool.convert(
            self._media_type, self._pieces(), self._options, again=self._again, reserve=self._reserve
        )

    async def refusal(self) -> tuple[ErrorCode, str]:
        with pytest.raises(ConversionError) as caught:
            await self.run()
        return caught.value.code, caught.value.message

    async def _pieces(self) -> AsyncIterator[bytes]:
        for start in range(0, len(self._content), PIECE_BYTES):
            self.on_piece()
            yield self._content[start : start + PIECE_BYTES]
        self.sent.set()

    async def _again(self) -> AsyncIterator[bytes]:
        self.openings += 1
        self.sent.clear()
        return self._pieces()

    async def _reserve(self, size: int) -> None:
        self.reserved.append(size)
        await self.on_reserve()


async def _nothing() -> None:
    pass


@asynccontextmanager
async def pool_of(processes: int = 1, memory_bytes: int = 10**9) -> AsyncIterator[ConversionPool]:
    pool = ConversionPool(processes=processes, memory_bytes=memory_bytes)
    try:
        yield pool
    finally:
        await pool.close()
        assert not [pid for pid in pool.process_ids if is_running(pid)]


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
