"""The URLs of images in the model request: links and data URLs."""

from collections.abc import AsyncIterator
from contextlib import suppress

from worker.images.encoding import EncodedStream, encoded_length, iterate_async


class BufferedUrl:
    """An image URL in memory.

    Attributes:
        length: in bytes.
    """

    def __init__(self, text: bytes) -> None:
        """`text`: escaped for a JSON string."""
        self.length = len(text)
        self._text = text

    def pieces(self) -> AsyncIterator[bytes]:
        """Return the text in one piece."""
        return iterate_async((self._text,))


class StreamedUrl:
    """A data URL that is encoded while it is sent.

    Attributes:
        length: in bytes.
    """

    def __init__(self, prefix: bytes, size: int, content: AsyncIterator[bytes]) -> None:
        """`prefix`: up to the base64; `size`: of the content in bytes."""
        self.length = len(prefix) + encoded_length(size)
        self._prefix = prefix
        self._content = content

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the text in pieces; can be called once."""
        yield self._prefix
        encoded = EncodedStream(self._content)
        with suppress(StopAsyncIteration):
            while True:
                # A variable would keep this piece in memory while the next one is encoded.
                yield await anext(encoded)
