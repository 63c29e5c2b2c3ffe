"""Objects that are being read from S3."""

from collections.abc import AsyncIterable, AsyncIterator
from typing import Protocol, Self

import aiohttp

from worker.errors import Dependency, TransientError
from worker.s3.checksums import Checksum
from worker.s3.errors import FAILURES, checksum_mismatch, translate


class ObjectStream(Protocol):
    """An object that is being read; can be iterated over once.

    Attributes:
        size: of the object in bytes.
        encoding: its `Content-Encoding`; empty if it has none.
    """

    size: int
    encoding: str

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the content in pieces.

        Raises:
            TransientError: it is not `size` bytes.
            JobError: it differs from its checksum.
        """

    def close(self) -> None:
        """Stop reading."""


class ResponseStream:
    """The body of an HTTP response."""

    def __init__(self, response: aiohttp.ClientResponse, size: int) -> None:
        self._response = response
        self.size = size
        self.encoding = response.headers.get("Content-Encoding", "")

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._response.content.iter_any()

    def close(self) -> None:
        """Stop reading."""
        # This closes the connection unless the body was read to its end.
        self._response.close()


class BufferedStream:
    """An object in memory, or the size of one that is too large."""

    def __init__(self, content: bytes, size: int, encoding: str = "") -> None:
        self._content = content
        self.size = size
        self.encoding = encoding

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the content in one piece."""
        yield self._content

    def close(self) -> None:
        """Do nothing."""


class CheckedStream:
    """A stream that translates errors and raises one if the content has another size or checksum."""

    def __init__(self, stream: ObjectStream, checksum: Checksum | None = None) -> None:
        self._stream = stream
        self._checksum = checksum
        self._pieces = aiter(stream)
        self._received = 0
        self.size = stream.size
        self.encoding = stream.encoding

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        try:
            piece = await anext(self._pieces, b"")
        except FAILURES as error:
            raise translate(error) from None
        self._received += len(piece)
        if piece:
            if self._checksum is not None:
                self._checksum.update(piece)
            return piece
        if self._received != self.size:
            text = f"S3 announced {self.size} bytes and sent {self._received}"
            raise TransientError(Dependency.S3, "connection_error", text)
        if self._checksum is not None and not self._checksum.is_right:
            raise checksum_mismatch()
        raise StopAsyncIteration

    def close(self) -> None:
        """Stop reading."""
        self._stream.close()


async def first_bytes(pieces: AsyncIterable[bytes], length: int) -> bytes:
    """Return the first `length` bytes, or all if there are fewer."""
    beginning = b""
    async for piece in pieces:
        beginning += piece
        if len(beginning) >= length:
            break
    return beginning[:length]
