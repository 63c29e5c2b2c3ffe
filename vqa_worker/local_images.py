"""Local images: files and bytes are sent inside the job, as data URLs."""

import base64
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

from vqa_worker.messages.decoding import InvalidJobError
from vqa_worker.messages.image_types import describe, media_type

# A URL (`s3://…`, `https://…`, `data:…`), the path of a file, or the content of one.
Image: TypeAlias = str | bytes | os.PathLike[str]

# Base64 adds a third; the rest of a job has 1 MB.
MAX_BYTES: Final = 11_000_000
_URL: Final = re.compile(r"data:|[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def has_local_images(fields: Mapping[str, Any]) -> bool:
    """Return whether a job in the short form has images that are not URLs."""
    return any(_is_local(image) for image in _images(fields))


def embed_local_images(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a job with its files and bytes replaced with data URLs.

    Raises:
        InvalidJobError: an image is of an unsupported type, or they are too large for a message.
        OSError: a file cannot be read.
    """
    left, embedded = MAX_BYTES, []
    for index, image in enumerate(_images(fields)):
        if not _is_local(image):
            embedded.append(image)
            continue
        name = f"images[{index}]" if isinstance(image, bytes) else f"images[{index}] ({os.fspath(image)})"
        content = _read(image, left, name)
        left -= len(content)
        embedded.append(_data_url(content, name))
    return {**fields, "images": embedded}


def _images(fields: Mapping[str, Any]) -> Sequence[Any]:
    images = fields.get("images")
    return images if isinstance(images, list | tuple) else ()


def _is_local(image: object) -> bool:
    return isinstance(image, bytes | os.PathLike) or (isinstance(image, str) and not _URL.match(image))


def _read(image: Image, most: int, name: str) -> bytes:
    """Return the content of an image of at most `most` bytes."""
    if isinstance(image, bytes):
        content = image
    else:
        with Path(image).open("rb") as file:
            content = file.read(most + 1)
    if len(content) > most:
        raise _invalid(
            f"{name}: the local images of a job may have {MAX_BYTES} bytes together; upload larger ones to S3"
        )
    return content


def _data_url(content: bytes, name: str) -> str:
    kind = media_type(content)
    if kind is None:
        raise _invalid(f"{name}: the content is {describe(content)}")
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _invalid(message: str) -> InvalidJobError:
    return InvalidJobError(message, job_id=None, id_in_body=False)
