"""Types of the fixtures of these tests."""

import io
from collections.abc import Callable, Coroutine
from typing import Any

from PIL import Image

Ask = Callable[..., Coroutine[Any, Any, tuple[int, dict[str, Any]]]]
"""Send a question with image URLs and other fields; return the status and the JSON body."""

Plain = Callable[..., bytes]
"""Create an image file of one colour."""

Inline = Callable[..., str]
"""Create a data URL."""


def encoded(image: Image.Image, kind: str) -> bytes:
    """Return the bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()
