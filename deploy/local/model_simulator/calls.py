"""What the simulator remembers of the calls it received."""

from typing import Any

from pydantic import BaseModel


class Picture(BaseModel):
    """An image of a request, as it arrived."""

    sha256: str
    """Of the exact bytes."""
    bytes: int
    declared_type: str
    """The media type in the data URL, e.g. `image/png`."""
    format: str
    """The format of the bytes: JPEG, PNG or WEBP."""
    width: int
    height: int
    colours: list[str] = []
    """The names of the main colours, the most frequent first; empty if the image was not decoded."""
    corners: list[str] = []
    """The colours near the four corners as `#rrggbb`: top left, top right, bottom left, bottom right."""
    detail: str | None = None
    """`image_url.detail` of the request."""


class Call(BaseModel):
    """A POST to the chat completions."""

    number: int
    """From 1, in the order of arrival."""
    started: float
    """Unix time."""
    ended: float | None = None
    """Unix time; None while it is in progress."""
    status: int | None = None
    """The HTTP status of the answer; None if there was none."""
    played: str | None = None
    """The kind of the scripted outcome, if there was one."""
    disconnected: bool = False
    """Whether the caller disconnected before the answer."""
    authorized: bool = False
    headers: dict[str, str] = {}
    """All request headers except the key, names in lower case."""
    body_bytes: int = 0
    model: str | None = None
    question: str = ""
    """The text of the last user message."""
    messages: list[Any] = []
    """The conversation, each inline image replaced by its digest (`sha256:…`)."""
    params: dict[str, Any] = {}
    """Every field of the body except `model`, `messages` and `stream`."""
    images: list[Picture] = []
    links: list[str] = []
    """Image links in the request; the simulator does not fetch them."""
    error: str | None = None
    """The message of the error body, if the answer was an error."""


class State(BaseModel):
    """Counters since the start or the last reset."""

    calls: int = 0
    in_progress: int = 0
