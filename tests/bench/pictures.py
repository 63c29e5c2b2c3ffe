"""Pictures of any size, each unlike the others, and what the simulator must say of them."""

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

from tests.bench.standin import describe_picture

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_UPLOADS_AT_ONCE: Final = 4


@dataclass(frozen=True)
class Picture:
    """An object in S3, and the answer that proves that all of it arrived."""

    url: str
    answer: str
    answer_to_link: str


class Gallery:
    """Uploads pictures when they are first asked for."""

    def __init__(self, s3: "S3Client", bucket: str, cores: AbstractSet[int]) -> None:
        self._s3 = s3
        self._cores = cores
        self._bucket = bucket
        self._pictures: dict[int, list[Picture]] = {}

    def of(self, size: int, count: int) -> Sequence[Picture]:
        """`count` pictures of `size` bytes, no two alike.

        A job's picture should not be in flight a second time, as a worker may read it once for both: take
        more pictures than jobs are in flight.
        """
        pictures = self._pictures.setdefault(size, [])
        filling = os.urandom(size)
        # No contender runs meanwhile, so its core can help.
        help_from = (0, self._cores)
        with ThreadPoolExecutor(_UPLOADS_AT_ONCE, "upload", os.sched_setaffinity, help_from) as pool:
            pictures += pool.map(
                lambda number: self._upload(_png(size, number, filling), f"bench/{size}/{number}.png"),
                range(len(pictures), count),
            )
        return pictures[:count]

    def _upload(self, content: bytes, key: str) -> Picture:
        self._s3.put_object(Bucket=self._bucket, Key=key, Body=content, ContentType="image/png")
        encoded = base64.b64encode(content)
        return Picture(
            url=f"s3://{self._bucket}/{key}",
            answer=describe_picture(len(encoded), isal_zlib.crc32(encoded)),
            answer_to_link=f"/{self._bucket}/{key}",
        )


def _png(size: int, number: int, filling: bytes) -> bytes:
    """A valid picture of one pixel, with a private chunk that makes it `size` bytes long."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    pixel = _chunk(b"IDAT", zlib.compress(b"\0\0"))
    end = _chunk(b"IEND", b"")
    empty = len(_SIGNATURE + header + _chunk(b"biGg", b"") + pixel + end)
    content = b"%020d" % number + filling[: size - empty - 20]
    return _SIGNATURE + header + _chunk(b"biGg", content) + pixel + end


def _chunk(kind: bytes, content: bytes) -> bytes:
    crc = isal_zlib.crc32(content, isal_zlib.crc32(kind))
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)
