"""The body of a call: the JSON around the images made once, the images streamed into it."""

import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Protocol

from worker.errors import DependencyDownError, TransientError
from worker.job import to_json

# Stands in the place of an image's URL while the JSON is made. Nobody who writes jobs can know it.
PLACEHOLDER = uuid.uuid4().hex
# Smaller pieces are put together; of larger ones a copy would cost more than one more write.
JOINED_BYTES = 400 * 1024


class ImageUrl(Protocol):
    """What stands in an image's `url`, as text of JSON.

    Attributes:
        length: in bytes.
    """

    length: int

    def pieces(self) -> AsyncIterator[bytes]:
        """The text, piece by piece; asked for once."""


def frame(model: str, messages: Sequence[Mapping[str, Any]], params: Mapping[str, Any]) -> list[bytes]:
    """The JSON of a request, cut where images belong: `messages` has PLACEHOLDER for each of their URLs."""
    return to_json({**params, "model": model, "messages": messages}).split(PLACEHOLDER.encode())


class RequestBody:
    """A body that is made while it is sent, once.

    Attributes:
        length: in bytes, exact.
        failure: why it could not be made to its end; the images' own errors.
        waited_s: seconds spent waiting for the images.
        is_sent: whether all of it was handed to the connection.
    """

    def __init__(
        self, frame: Sequence[bytes], urls: Sequence[ImageUrl], *, on_sent: Callable[[], None] = lambda: None
    ) -> None:
        self._frame = frame
        self._urls = [*urls]
        self._on_sent = on_sent
        self.length = sum(map(len, frame)) + sum(url.length for url in urls)
        self.failure: TransientError | DependencyDownError | None = None
        self.waited_s = 0.0
        self.is_sent = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """The body in pieces.

        Raises:
            TransientError, DependencyDownError: an image could not be read to its end; `failure` has it too.
        """
        try:
            async for piece in self._joined():
                yield piece
        except (TransientError, DependencyDownError) as error:
            self.failure = error
            raise
        self._urls.clear()
        self.is_sent = True
        self._on_sent()

    async def _joined(self) -> AsyncIterator[bytes]:
        gathered: list[bytes] = []
        size = 0
        async for piece in self._pieces():
            if size + len(piece) > JOINED_BYTES and gathered:
                yield b"".join(gathered)
                gathered, size = [], 0
            gathered.append(piece)
            size += len(piece)
        yield b"".join(gathered)

    async def _pieces(self) -> AsyncIterator[bytes]:
        yield self._frame[0]
        for url, rest in zip(self._urls, self._frame[1:], strict=True):
            pieces = url.pieces()
            while True:
                began = time.monotonic()
                piece = await anext(pieces, None)
                self.waited_s += time.monotonic() - began
                if piece is None:
                    break
                yield piece
            yield rest
