"""What the stand-in remembers of the calls it got."""

from typing import Any

from pydantic import BaseModel, Field


class Picture(BaseModel):
    """One picture of a request, as it arrived."""

    sha256: str
    """Of the exact bytes."""
    bytes: int
    declared_type: str
    """The media type that the data URL claims, e.g. `image/png`."""
    format: str
    """What the bytes are: JPEG, PNG or WEBP."""
    width: int
    height: int
    colours: list[str] = []
    """The main colours by name, the most frequent first."""
    text: list[str] | None = None
    """The lines that OCR found in it; None if nothing looked."""
    detail: str | None = None
    """`image_url.detail` of the request."""


class Call(BaseModel):
    """One POST to the chat completions."""

    number: int
    """From 1, in the order of arrival."""
    started: float
    """Unix time."""
    ended: float | None = None
    """Unix time; None while it is in progress."""
    status: int | None = None
    """The HTTP status of the answer; None if there was none."""
    played: str | None = None
    """The kind of the scripted outcome, if one was played."""
    disconnected: bool = False
    """Whether the caller left before the answer."""
    authorized: bool = False
    headers: dict[str, str] = {}
    """All request headers, names in lower case; the key is left out."""
    body_bytes: int = 0
    model: str | None = None
    question: str = ""
    """The text of the last user message."""
    messages: list[Any] = []
    """The conversation, each inline picture replaced by its digest (`sha256:…`)."""
    params: dict[str, Any] = {}
    """Every field of the body but `model` and `messages`."""
    images: list[Picture] = []
    links: list[str] = []
    """Image links in the request; the stand-in opens none."""
    error: str | None = None
    """The message of the error body, if the answer was an error."""


class State(BaseModel):
    """Counters since the start or the last reset."""

    calls: int = 0
    in_progress: int = 0
    most_at_once: int = Field(default=0, description="The most calls there ever were in progress.")
