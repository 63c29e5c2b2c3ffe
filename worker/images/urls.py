"""The URLs of images in the model request: links and data URLs."""

from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import TypeAlias

from worker.images.encoding import EncodedStream, encoded_length, iterate_async
from worker.settings.model import IMAGE_ON_ITS_WAY_BYTES


class BufferedUrl:
    """An image URL in memory.

    Attributes:
        length: in bytes.
        memory: that it holds until it is sent, in bytes.
    """

    def __init__(self, text: bytes) -> None:
        """`text`: escaped for a JSON string."""
        self.length = self.memory = len(text)
        self._text = text

    def pieces(self) -> AsyncIterator[bytes]:
        """Return the text in one piece."""
        return iterate_async((self._text,))


class StreamedUrl:
    """A data URL that is encoded while it is sent.

    Attributes:
        length: in bytes.
        memory: that it holds until it is sent, in bytes.
    """

    def __init__(
        self, prefix: bytes, size: int, content: AsyncIterator[bytes], *, is_buffered: bool = False
    ) -> None:
        """`prefix`: up to the base64; `size`: of the content in bytes, all of which is in memory or not."""
        self.memory = IMAGE_ON_ITS_WAY_BYTES + (size if is_buffered else 0)
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


class PagesUrl:
    """The URLs of the pages of a document, with the JSON between them: each page is an image.

    Attributes:
        length: in bytes.
        memory: that they hold until they are sent, in bytes.
    """

    def __init__(self, urls: "Sequence[PageUrl]", separator: bytes) -> None:
        """`separator`: the JSON from the end of one URL to the beginning of the next."""
        self.length = sum(url.length for url in urls) + len(separator) * (len(urls) - 1)
        self.memory = sum(url.memory for url in urls)
        self._urls = urls
        self._separator = separator

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the text in pieces; can be called once."""
        for number, url in enumerate(self._urls):
            if number:
                yield self._separator
            async for piece in url.pieces():
                yield piece


PageUrl: TypeAlias = BufferedUrl | StreamedUrl
ImageUrl: TypeAlias = PageUrl | PagesUrl
