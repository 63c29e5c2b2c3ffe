"""The body of a model request: JSON with the images streamed into it."""

import hashlib
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Protocol

import httpx2
import pydantic_core

from worker.errors import Dependency, DependencyDownError, Explanation, JobError, TransientError

_TOKEN_LIMITS = ("max_tokens", "max_completion_tokens")
# Replaces the URLs of images while the JSON is created. Publishers cannot know it.
PLACEHOLDER = uuid.uuid4().hex
# A body of at most this size is sent in one piece.
SMALL_BYTES = 400 * 1024
# The pieces of a text that are looked for in a request, and where they begin.
QUOTE_CHARS = 20
QUOTE_STEP_CHARS = 5
# Searching more would hold the event loop.
MAX_SEARCHED_BYTES = 256 * 1024


class ImageUrl(Protocol):
    """The URL of an image, escaped for a JSON string.

    Attributes:
        length: in bytes.
    """

    length: int

    def pieces(self) -> AsyncIterator[bytes]:
        """Yield the text in pieces; called once."""


def body_parts(
    model: str, messages: Sequence[Mapping[str, Any]], params: Mapping[str, Any], *, streams: bool = False
) -> list[bytes]:
    """Return the JSON of a request, split at the image URLs, for which `messages` has PLACEHOLDER.

    `stream` is always sent, because some gateways stream by default.

    Args:
        model: that is asked.
        messages: of the conversation.
        params: further fields.
        streams: whether to ask for a stream, with the usage at its end: the model answers in no other way.
    """
    own = {"stream": True, "stream_options": {"include_usage": True}} if streams else {"stream": False}
    request = pydantic_core.to_json({**params, "model": model, **own, "messages": messages})
    return request.split(PLACEHOLDER.encode())


def with_further_messages(parts: Sequence[bytes], messages: Sequence[Mapping[str, Any]]) -> list[bytes]:
    """Return the parts of `body_parts` with messages added at the end of the conversation."""
    end = b"]}"
    added = pydantic_core.to_json(messages).removeprefix(b"[").removesuffix(b"]")
    return [*parts[:-1], parts[-1].removesuffix(end) + b"," + added + end]


def page_separators(messages: Sequence[Mapping[str, Any]]) -> list[bytes]:
    """Return, for each image, the JSON between its URL and that of another one like it right after it.

    `messages`: of the conversation, with PLACEHOLDER in place of every image URL.
    """
    contents = [it["content"] for it in messages if isinstance(it.get("content"), list)]
    parts = [part for content in contents for part in content if part.get("type") == "image_url"]
    sides = [pydantic_core.to_json(part).split(PLACEHOLDER.encode()) for part in parts]
    return [b"%s,%s" % (after, before) for before, after in sides]


def with_token_bounds(
    params: Mapping[str, Any], *, default: int | None, limit: int | None
) -> Mapping[str, Any]:
    """Return the fields of a request with a token limit of at most `limit`.

    Args:
        params: further fields of the request.
        default: for a request that names none; None: `limit`.
        limit: that no request exceeds; None: any.
    """
    given = {name: params[name] for name in _TOKEN_LIMITS if params.get(name) is not None}
    if not given:
        bounds = [it for it in (default, limit) if it is not None]
        return {**params, "max_tokens": min(bounds)} if bounds else params
    if limit is None:
        return params
    lowered = {name: limit for name, value in given.items() if isinstance(value, int) and value > limit}
    return {**params, **lowered}


def with_token_limit(params: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the fields of a request with the token limit under the name that the API takes.

    `name`: `max_tokens` or `max_completion_tokens`; otherwise, and if both are there, nothing is renamed.
    """
    other = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}.get(name)
    if other is None or other not in params or name in params:
        return params
    return {(name if field == other else field): value for field, value in params.items()}


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
    """A request body that is generated while it is sent; it can be sent once.

    Attributes:
        length: in bytes.
        service_tier: that the request asks for.
        failure: the error of the image that could not be read.
        is_sent: whether the whole body was passed to the connection.
    """

    def __init__(
        self,
        parts: Sequence[bytes],
        urls: Sequence[ImageUrl],
        *,
        names: Sequence[str] = (),
        on_sent: Callable[[], None] = lambda: None,
        service_tier: str | None = None,
    ) -> None:
        """`names`: of the images, for error messages; `on_sent`: called when the whole body was sent."""
        self._parts = parts
        self._urls = [*urls]
        self._names = [*names, *(f"images[{n}]" for n in range(len(names), len(urls)))]
        self._on_sent = on_sent
        self.service_tier = service_tier
        self.length = sum(map(len, parts)) + sum(url.length for url in urls)
        self.failure: JobError | TransientError | DependencyDownError | None = None
        self.is_sent = False
        self._waited_s = 0.0
        # The index of the image that is being read now, and since when.
        self._reading: tuple[int, float] | None = None

    @property
    def waited_s(self) -> float:
        """The time spent waiting for images, in seconds."""
        return self._waited_s + (time.monotonic() - self._reading[1] if self._reading else 0.0)

    @property
    def late_image_error(self) -> TransientError | None:
        """The error for a timeout now: a slow image, or None if no image is being read."""
        if self._reading is None:
            return None
        name, text = self._names[self._reading[0]], "the timeout expired while S3 was still sending it"
        message, log_message = Explanation.loggable(text).about_image(name)
        return TransientError(Dependency.S3, "timeout", message, log_message=log_message)

    def quotes(self, text: str) -> bool:
        """Return whether a text repeats a part of the request, so that it may have words of the job.

        A part of less than `QUOTE_CHARS` may be missed. A long request is not searched: it may always be.
        """
        if sum(map(len, self._parts)) > MAX_SEARCHED_BYTES:
            return True
        starts = range(0, max(1, len(text) - QUOTE_CHARS + 1), QUOTE_STEP_CHARS)
        pieces = (pydantic_core.to_json(text[n : n + QUOTE_CHARS])[1:-1] for n in starts)
        return any(len(piece) >= QUOTE_CHARS and piece in part for piece in pieces for part in self._parts)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the body in pieces; a small one in one piece, to send it in one write.

        Raises:
            JobError, TransientError, DependencyDownError: an image could not be read; also in `failure`.
        """
        try:
            if self.length <= SMALL_BYTES:
                yield b"".join([piece async for piece in self._pieces()])
            else:
                async for piece in self._pieces():
                    yield piece
                    del piece  # free it before the next one is created
        except (JobError, TransientError, DependencyDownError) as error:
            self.failure = error
            raise
        self._urls.clear()
        self.is_sent = True
        self._on_sent()

    async def _pieces(self) -> AsyncIterator[bytes]:
        yield self._parts[0]
        for n, (url, rest) in enumerate(zip(self._urls, self._parts[1:], strict=True)):
            pieces = url.pieces()
            while True:
                started = time.monotonic()
                self._reading = n, started
                piece = await anext(pieces, None)
                self._reading = None
                self._waited_s += time.monotonic() - started
                if piece is None:
                    break
                yield piece
                del piece
            yield rest
