"""The content of an image: an object in S3, also one that is stored compressed, or a data URL."""

import asyncio
import zlib
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from vqa_worker.messages.error_codes import ErrorCode
from vqa_worker.messages.image_types import media_type
from worker.errors import JobError
from worker.s3.object_stream import ObjectStream

# RFC 9110, §8.4.1: `deflate` is the zlib format. zlib detects which of the two it is.
_COMPRESSED: Final = frozenset({"gzip", "x-gzip", "deflate"})
_GZIP_OR_ZLIB: Final = zlib.MAX_WBITS | 32
_GZIP_MAGIC: Final = b"\x1f\x8b"
# Of decompressed content; takes about a millisecond.
_PIECE_BYTES: Final = 256 * 1024


@dataclass(slots=True)
class Content:
    """The content of an image.

    Attributes:
        size: in bytes.
        pieces: the content from its beginning; can be read once.
        again: returns the content from its beginning once more.
    """

    size: int
    pieces: AsyncIterator[bytes]
    again: Callable[[], Awaitable[AsyncIterator[bytes]]]


async def content_of_object(
    stream: ObjectStream, reopen: Callable[[], Awaitable[ObjectStream]], *, max_bytes: int
) -> Content:
    """Return the content of an object, decompressed if it is stored with `Content-Encoding: gzip`.

    Compressed content is read twice, first to find its size. Reading ends at more than `max_bytes`.

    Raises:
        JobError: the compressed data is damaged.
    """

    async def again() -> AsyncIterator[bytes]:
        return aiter(await reopen())

    if stream.encoding.strip().lower() not in _COMPRESSED:
        return Content(stream.size, aiter(stream), again)

    async def decompressed() -> AsyncIterator[bytes]:
        return _decompressed(await again())

    size = 0
    async for piece in _decompressed(stream):
        size += len(piece)
        if size > max_bytes:
            break
    return Content(size, await decompressed(), decompressed)


async def _decompressed(pieces: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """Yield the decompressed content; content that was never compressed is yielded as it is."""
    decompressor, is_first, is_plain = zlib.decompressobj(_GZIP_OR_ZLIB), True, False
    async for piece in pieces:
        is_plain = is_plain or (is_first and media_type(piece) is not None)
        is_first = False
        if is_plain:
            yield piece
            continue
        left = decompressor.unused_data + piece if decompressor.eof else piece
        while left:
            if decompressor.eof and left.startswith(_GZIP_MAGIC):
                # A gzip file can have several members (RFC 1952, §2.2).
                decompressor = zlib.decompressobj(_GZIP_OR_ZLIB)
            if decompressor.eof:
                break
            try:
                yield decompressor.decompress(left, _PIECE_BYTES)
            except zlib.error:
                raise JobError(ErrorCode.IMAGE_CORRUPT, _DAMAGED) from None
            left = decompressor.unconsumed_tail or decompressor.unused_data
            await asyncio.sleep(0)
    if not (is_plain or decompressor.eof):
        raise JobError(ErrorCode.IMAGE_CORRUPT, _DAMAGED)


_DAMAGED: Final = "is stored with Content-Encoding: gzip, and the compressed data is damaged"
