"""What the fixtures of these tests hand out, as types."""

import io
from collections.abc import Callable, Coroutine
from typing import Any

from PIL import Image

Ask = Callable[..., Coroutine[Any, Any, tuple[int, dict[str, Any]]]]
"""Sends a question with any number of image URLs and other fields; returns the status and the JSON body."""

Plain = Callable[..., bytes]
"""Makes the file of a picture of one colour."""

Inline = Callable[..., str]
"""Makes a data URL."""


def encoded(image: Image.Image, kind: str) -> bytes:
    """Return the bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()
