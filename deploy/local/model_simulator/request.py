"""Read a chat request as strictly as a real API."""

import binascii
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

MAX_PICTURE_BYTES = 20_000_000
MEDIA_TYPES = ("image/jpeg", "image/png", "image/webp")
_ROLES = ("system", "developer", "user", "assistant", "tool")


class RefusedError(Exception):
    """The request gets an error answer."""

    def __init__(
        self, message: str, *, status: int = 400, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param


@dataclass(frozen=True)
class InlinePicture:
    """An image in the request itself."""

    content: bytes
    declared_type: str
    detail: str | None


@dataclass
class Conversation:
    """The parts of the messages."""

    pictures: list[InlinePicture] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    question: str = ""
    """The text of the last user message."""

    @property
    def text(self) -> str:
        """All text, e.g. to find a marker in it."""
        return "\n".join(self.texts)


def read_conversation(messages: Any) -> Conversation:
    """Parse the messages of a request.

    Raises:
        RefusedError: The API does not accept them.
    """
    if not isinstance(messages, list) or not messages:
        raise RefusedError("'messages' must be a list of at least one message", param="messages")
    conversation = Conversation()
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise RefusedError(f"{where} needs a role out of {', '.join(_ROLES)}", param=f"{where}.role")
        texts = list(_read_content(message.get("content"), f"{where}.content", conversation))
        conversation.texts += texts
        if message["role"] == "user":
            conversation.question = "\n".join(texts)
    return conversation


def _read_content(content: Any, where: str, conversation: Conversation) -> Iterator[str]:
    """Yield the texts of a message, and collect its images."""
    if isinstance(content, str):
        yield content
        return
    if not isinstance(content, list | None):
        raise RefusedError(f"{where} must be a string or a list of parts", param=where)
    for number, part in enumerate(content or ()):
        match part:
            case {"type": "text", "text": str(text)}:
                yield text
            case {"type": "image_url", "image_url": {"url": str(url)} as image}:
                _read_image_url(url, image.get("detail"), f"{where}[{number}].image_url.url", conversation)
            case _:
                raise RefusedError(f"{where}[{number}] is neither text nor image_url", param=where)


def _read_image_url(url: str, detail: str | None, where: str, conversation: Conversation) -> None:
    scheme = url.partition(":")[0].lower()
    if scheme == "data":
        conversation.pictures.append(_read_data_url(url, detail, where))
    elif scheme == "https" and urlsplit(url).hostname:
        conversation.links.append(url)
    else:
        raise RefusedError(f"{where} must be a data: or an https: URL", code="invalid_image_url", param=where)


def _read_data_url(url: str, detail: str | None, where: str) -> InlinePicture:
    head, comma, encoded = url.partition(",")
    declared, _, encoding = head.removeprefix("data:").partition(";")
    if not comma or encoding != "base64":
        raise RefusedError(f"{where} is not base64", code="invalid_image_url", param=where)
    if declared not in MEDIA_TYPES:
        text = f"{where}: media type {declared!r} is not one of {', '.join(MEDIA_TYPES)}"
        raise RefusedError(text, code="unsupported_image_media_type", param=where)
    try:
        content = binascii.a2b_base64(encoded, strict_mode=True)
    except ValueError:
        raise RefusedError(f"{where}: bad base64", code="invalid_base64", param=where) from None
    if len(content) > MAX_PICTURE_BYTES:
        text = f"{where}: {len(content)} bytes exceed the limit of {MAX_PICTURE_BYTES}"
        raise RefusedError(text, code="image_too_large", param=where)
    return InlinePicture(content, declared, detail)


def without_pictures(messages: Any, digests: Iterator[str]) -> Any:
    """Return the messages with each data URL replaced by the next digest, small enough to remember."""
    match messages:
        case {"url": str(url)} if url.lower().startswith("data:"):
            return messages | {"url": f"sha256:{next(digests, '')}"}
        case dict():
            return {name: without_pictures(value, digests) for name, value in messages.items()}
        case list():
            return [without_pictures(value, digests) for value in messages]
        case _:
            return messages
