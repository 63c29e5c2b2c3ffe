"""The body of a call: the JSON around the images made once, the images streamed into it."""

import hashlib
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Protocol

import httpx2
import pydantic_core

from worker.errors import Dependency, DependencyDownError, TransientError

# Stands in the place of an image's URL while the JSON is made. Nobody who writes jobs can know it.
PLACEHOLDER = uuid.uuid4().hex
# A body up to this size goes out in one piece: an image that was small enough to be read at once, mostly.
SMALL_BYTES = 400 * 1024


class ImageUrl(Protocol):
    """What stands in an image's `url`, as text of JSON.

    Attributes:
        length: in bytes.
    """

    length: int

    def pieces(self) -> AsyncIterator[bytes]:
        """The text, piece by piece; asked for once."""


def frame(model: str, messages: Sequence[Mapping[str, Any]], params: Mapping[str, Any]) -> list[bytes]:
    """Return the JSON of a request, split at the image URLs, for which `messages` has PLACEHOLDER."""
    request = pydantic_core.to_json({**params, "model": model, "messages": messages})
    return request.split(PLACEHOLDER.encode())


def fingerprint(
    job_id: str,
    model: str,
    messages: Sequence[Mapping[str, Any]],
    params: Mapping[str, Any],
    urls: Sequence[bytes | memoryview],
) -> str:
    """Return the identity of a job: the SHA-256 of its id and request, in hexadecimal.

    It does not depend on the order of fields or on white space in the job's JSON.

    Args:
        job_id: of the job.
        model: that is asked.
        messages: with the same text in place of every image URL.
        params: further fields of the request.
        urls: of the images; of a data URL, its base64.
    """
    digest = hashlib.sha256(pydantic_core.to_json(_sorted([job_id, model, messages, params])))
    for url in urls:
        digest.update(b"%d " % len(url))
        digest.update(url)
    return digest.hexdigest()


def _sorted(value: Any) -> Any:
    """Return a JSON value with the keys of all objects in alphabetical order."""
    if isinstance(value, Mapping):
        return {name: _sorted(value[name]) for name in sorted(value)}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_sorted(item) for item in value]
    return value


class RequestBody(httpx2.AsyncByteStream):
    """A body that is made while it is sent, once.

    Attributes:
        length: in bytes, exact.
        failure: why it could not be made to its end; the images' own errors.
        is_sent: whether all of it was handed to the connection.
    """

    def __init__(
        self,
        frame: Sequence[bytes],
        urls: Sequence[ImageUrl],
        *,
        names: Sequence[str] = (),
        on_sent: Callable[[], None] = lambda: None,
    ) -> None:
        """`names`: how messages call the images."""
        self._frame = frame
        self._urls = [*urls]
        self._names = [*names, *(f"images[{n}]" for n in range(len(names), len(urls)))]
        self._on_sent = on_sent
        self.length = sum(map(len, frame)) + sum(url.length for url in urls)
        self.failure: TransientError | DependencyDownError | None = None
        self.is_sent = False
        self._waited_s = 0.0
        # The image that is waited for at the moment, and since when.
        self._awaits: tuple[int, float] | None = None

    @property
    def waited_s(self) -> float:
        """Seconds spent waiting for the images."""
        return self._waited_s + (time.monotonic() - self._awaits[1] if self._awaits else 0.0)

    @property
    def lateness(self) -> TransientError | None:
        """What to say if time is up now: that an image is late, if one is waited for."""
        if self._awaits is None:
            return None
        text = f"{self._names[self._awaits[0]]}: S3 was still sending it when the time was up"
        return TransientError(Dependency.S3, "timeout", text)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """The body in pieces; a small one in one piece, so that it goes out in one write.

        Raises:
            TransientError, DependencyDownError: an image could not be read to its end; `failure` has it too.
        """
        try:
            if self.length <= SMALL_BYTES:
                yield b"".join([piece async for piece in self._pieces()])
            else:
                async for piece in self._pieces():
                    yield piece
                    del piece  # or it would be there while the next one is made
        except (TransientError, DependencyDownError) as error:
            self.failure = error
            raise
        self._urls.clear()
        self.is_sent = True
        self._on_sent()

    async def _pieces(self) -> AsyncIterator[bytes]:
        yield self._frame[0]
        for n, (url, rest) in enumerate(zip(self._urls, self._frame[1:], strict=True)):
            pieces = url.pieces()
            while True:
                began = time.monotonic()
                self._awaits = n, began
                piece = await anext(pieces, None)
                self._awaits = None
                self._waited_s += time.monotonic() - began
                if piece is None:
                    break
                yield piece
                del piece
            yield rest
