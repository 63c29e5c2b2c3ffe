"""The chat messages of a job, in the format of the OpenAI API."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vqa_worker.messages.job import ImageObject, ImagePart, ImageUrl, Job, PromptOrder

# Fields of an image that are not for the model API.
_FOR_THE_WORKER = ("version_id", "max_edge", "pages")


@dataclass(frozen=True, slots=True)
class ImageRef:
    """A reference to an image in a job.

    Attributes:
        location: its place in the job, such as `images[0]`.
        url: as the job gives it.
        detail: the requested level of detail.
        version_id: of the S3 object; None: the current version.
        max_edge: the longest side in pixels that it is sent with; None: as it is.
        pages: of a document, see `parse_pages`; None: all.
    """

    location: str
    url: str
    detail: str | None = None
    version_id: str | None = None
    max_edge: int | None = None
    pages: str | None = None


class Conversation:
    """The chat messages of a job in either form; images are still the URLs that the job gives."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def images(self) -> list[ImageRef]:
        """Return all images, in order."""
        max_edge = self._job.image_max_edge
        if self._job.messages is None:
            images = self._job.images or ()
            return [_image_ref(f"images[{n}]", image, max_edge) for n, image in enumerate(images)]
        return [
            _image_ref(f"messages[{m}].content[{p}]", part.image_url, max_edge)
            for m, p, part in self._image_parts()
        ]

    def render(
        self, url: str, *, send_detail: bool, prompt_order: PromptOrder = "images_first"
    ) -> list[dict[str, Any]]:
        """Return the `messages` of the request.

        Args:
            url: in place of every image URL.
            send_detail: whether to send the field `detail` of images.
            prompt_order: of a job in the short form that does not say it.
        """
        if self._job.messages is None:
            return self._render_short_form(url, prompt_order, send_detail=send_detail)
        messages = [message.model_dump(exclude_unset=True) for message in self._job.messages]
        for m, p, _ in self._image_parts():
            image_url = messages[m]["content"][p]["image_url"]
            image_url["url"] = url
            for name in _FOR_THE_WORKER:
                image_url.pop(name, None)
            if not send_detail or image_url.get("detail") is None:
                image_url.pop("detail", None)
        return messages

    def _image_parts(self) -> Iterator[tuple[int, int, ImagePart]]:
        for m, message in enumerate(self._job.messages or ()):
            if isinstance(message.content, list):
                for p, part in enumerate(message.content):
                    if isinstance(part, ImagePart):
                        yield m, p, part

    def _render_short_form(
        self, url: str, prompt_order: PromptOrder, *, send_detail: bool
    ) -> list[dict[str, Any]]:
        content: list[dict[str, Any]] = []
        for image in self.images():
            detail = {"detail": image.detail} if send_detail and image.detail is not None else {}
            content.append({"type": "image_url", "image_url": {"url": url, **detail}})
        text = {"type": "text", "text": self._job.question or ""}
        # Vendors of vision models recommend images first.
        is_first = (self._job.prompt_order or prompt_order) == "question_first"
        content.insert(0 if is_first else len(content), text)
        question = {"role": "user", "content": content}
        system = self._job.system
        return [question] if system is None else [{"role": "system", "content": system}, question]


def _image_ref(location: str, image: str | ImageObject | ImageUrl, max_edge: int | None) -> ImageRef:
    if isinstance(image, str):
        return ImageRef(location, image, max_edge=max_edge)
    edges = [it for it in (image.max_edge, max_edge) if it is not None]
    return ImageRef(
        location, image.url, image.detail, image.version_id, min(edges, default=None), image.pages
    )
