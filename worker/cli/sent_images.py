"""What a worker would send of an image, for `check --image` and `submit --estimate`."""

from dataclasses import replace
from typing import NamedTuple

from vqa_worker.messages.conversation import ImageRef
from vqa_worker.messages.result import SentImage
from worker.images.loader import ImageLoader
from worker.images.source import Link
from worker.model.image_tokens import image_tokens


class Sent(NamedTuple):
    """What would be sent, as text, and its prompt tokens; None: unknown."""

    text: str
    tokens: int | None = None


async def prepare(loader: ImageLoader, model: str, ref: ImageRef, url: str) -> Sent:
    """Prepare an image as a worker does; `url`: where it is read, which may be a data URL of a local file.

    Raises:
        JobError, TransientError, DependencyDownError: it cannot be sent.
    """
    sources = loader.check([replace(ref, url=url)], url.encode())
    if isinstance(sources[0].source, Link):
        return Sent("allowed; the API fetches it")
    async with loader.reserve(sources) as memory, loader.open(sources, memory) as opened:
        sent = [*opened.sent]
    if not sent:
        return Sent("allowed; the API fetches it by a presigned link")
    first, counts = sent[0], [_tokens(it, model) for it in sent]
    source = f"{first.source_type}, {first.source_bytes:,} bytes"
    tokens = None if None in counts else sum(it or 0 for it in counts)
    if first.sent_bytes == first.source_bytes and first.sent_type == first.source_type:
        return Sent(f"{source}, {_size(first, model)}; sent unchanged", tokens)
    pages = "; ".join(f"{it.sent_type}, {it.sent_bytes:,} bytes, {_size(it, model)}" for it in sent)
    return Sent(f"{source}; sent as {pages}", tokens)


def _tokens(image: SentImage, model: str) -> int | None:
    return image_tokens(model, image.width, image.height) if image.width and image.height else None


def _size(image: SentImage, model: str) -> str:
    if image.width is None:
        return "size unknown"
    tokens = _tokens(image, model)
    return f"{image.width} × {image.height}" + ("" if tokens is None else f", about {tokens:,} tokens")
