"""Objects that are stored with a `Content-Encoding`."""

import gzip
from collections.abc import AsyncIterator

import pytest

from worker.images.content import content_of_object


class Stream:
    """An object in pieces."""

    encoding = "gzip"

    def __init__(self, *pieces: bytes) -> None:
        self.size = sum(map(len, pieces))
        self._pieces = pieces

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece

    def close(self) -> None:
        """Do nothing."""


@pytest.mark.parametrize("split", range(-3, 4))
async def test_a_gzip_file_of_several_members_is_read_wherever_its_pieces_begin(split: int) -> None:
    first, second = gzip.compress(b"one "), gzip.compress(b"two")
    whole, border = first + second + b"\0\0", len(first) + split

    async def reopen() -> Stream:
        return Stream(whole[:border], whole[border:])

    content = await content_of_object(await reopen(), reopen, max_bytes=100)
    assert content.size == 7
    assert b"".join([piece async for piece in content.pieces]) == b"one two"
