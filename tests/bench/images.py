"""Generate distinct images of any size, with the expected answers of the simulator."""

import base64
import os
import struct
import zlib
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from isal import isal_zlib

from tests.bench.simulator import describe_image

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_UPLOADS_AT_ONCE: Final = 4


@dataclass(frozen=True)
class Image:
    """An object in S3, with the answers that depend on all its bytes."""

    url: str
    answer: str
    link_answer: str


class ImageUploader:
    """Upload images on first use."""

    def __init__(self, s3: "S3Client", bucket: str, cores: AbstractSet[int]) -> None:
        self._s3 = s3
        self._cores = cores
        self._bucket = bucket
        self._images: dict[int, list[Image]] = {}

    def of(self, size: int, count: int) -> Sequence[Image]:
        """Return `count` distinct images of `size` bytes.

        A job's image should not be in flight a second time, as a worker may read it once for both: take
        Use more images than jobs in flight: a worker may share one read between two jobs.
        """
        images = self._images.setdefault(size, [])
        filling = os.urandom(size)
        # No contender runs now: use all cores.
        help_from = (0, self._cores)
        with ThreadPoolExecutor(_UPLOADS_AT_ONCE, "upload", os.sched_setaffinity, help_from) as pool:
            images += pool.map(
                lambda number: self._upload(_png(size, number, filling), f"bench/{size}/{number}.png"),
                range(len(images), count),
            )
        return images[:count]

    def _upload(self, content: bytes, key: str) -> Image:
        self._s3.put_object(Bucket=self._bucket, Key=key, Body=content, ContentType="image/png")
        encoded = base64.b64encode(content)
        return Image(
            url=f"s3://{self._bucket}/{key}",
            answer=describe_image(len(encoded), isal_zlib.crc32(encoded)),
            link_answer=f"/{self._bucket}/{key}",
        )


def _png(size: int, number: int, filling: bytes) -> bytes:
    """Return a PNG of one pixel, padded to `size` bytes by a private chunk."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    pixel = _chunk(b"IDAT", zlib.compress(b"\0\0"))
    end = _chunk(b"IEND", b"")
    empty = len(_SIGNATURE + header + _chunk(b"biGg", b"") + pixel + end)
    content = b"%020d" % number + filling[: size - empty - 20]
    return _SIGNATURE + header + _chunk(b"biGg", content) + pixel + end


def _chunk(kind: bytes, content: bytes) -> bytes:
    crc = isal_zlib.crc32(content, isal_zlib.crc32(kind))
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)
