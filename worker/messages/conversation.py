"""The chat messages of a job, in the format of the OpenAI API."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from worker.messages.job import ChatMessage, ImagePart, ImageUrl, Job, Part, TextPart


@dataclass(frozen=True, slots=True)
class ImageRef:
    """A reference to an image in a job.

    Attributes:
        location: its place in the job, such as `images[0]`.
        url: as the job gives it.
        detail: the requested level of detail.
    """

    location: str
    url: str
    detail: str | None = None


class Conversation:
    """The chat messages of a job in either form; images are still the URLs that the job gives."""

    def __init__(self, job: Job) -> None:
        self._messages = job.messages if job.messages is not None else _from_short_form(job)
        self._is_short = job.messages is None

    def images(self) -> list[ImageRef]:
        """Return all images, in order."""
        return [
            ImageRef(self._location(m, p, n), part.image_url.url, part.image_url.detail)
            for n, (m, p, part) in enumerate(self._image_parts())
        ]

    def render(self, url: str, *, send_detail: bool) -> list[dict[str, Any]]:
        """Return the `messages` of the request, with `url` in place of every image URL."""
        messages = [message.model_dump(exclude_unset=True) for message in self._messages]
        for m, p, _ in self._image_parts():
            image_url = messages[m]["content"][p]["image_url"]
            image_url["url"] = url
            if not send_detail or image_url.get("detail") is None:
                image_url.pop("detail", None)
        return messages

    def _image_parts(self) -> Iterator[tuple[int, int, ImagePart]]:
        for m, message in enumerate(self._messages):
            if isinstance(message.content, list):
                for p, part in enumerate(message.content):
                    if isinstance(part, ImagePart):
                        yield m, p, part

    def _location(self, message: int, part: int, image: int) -> str:
        return f"images[{image}]" if self._is_short else f"messages[{message}].content[{part}]"


def _from_short_form(job: Job) -> list[ChatMessage]:
    """Return the messages with the images before the question, as vendors of vision models recommend."""
    parts: list[Part] = []
    for image in job.images or ():
        fields = {"url": image} if isinstance(image, str) else image.model_dump(exclude_unset=True)
        parts.append(ImagePart(type="image_url", image_url=ImageUrl(**fields)))
    parts.append(TextPart(type="text", text=job.question or ""))
    question = ChatMessage(role="user", content=parts)
    return [question] if job.system is None else [ChatMessage(role="system", content=job.system), question]
