"""The images of one model request."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from worker.images.memory_budget import Reservation
from worker.observability import metrics

if TYPE_CHECKING:
    from vqa_worker.messages.result import SentImage
    from worker.images.urls import ImageUrl
    from worker.s3.object_stream import ObjectStream


@dataclass(frozen=True, slots=True)
class Prepared:
    """An image that is ready to be sent; `sent` is empty if the worker has not read it."""

    url: "ImageUrl"
    sent: "Sequence[SentImage]" = ()


class OpenImages:
    """The images of one model request.

    Attributes:
        urls: the URLs in the request, in order.
        sent: what is sent of each image that the worker reads, in order.
        streams: the S3 objects that are being read.
        reservation: the memory for the images.
        has_process: whether any image had a process that converts it.
    """

    def __init__(self, reservation: Reservation) -> None:
        self.urls: Sequence[ImageUrl] = ()
        self.sent: Sequence[SentImage] = ()
        self.streams: list[ObjectStream] = []
        self.reservation = reservation
        self.has_process = False
        self._converted_s = 0.0
        self._conversions = 0
        self._converting_since = 0.0

    def add(self, prepared: "Sequence[Prepared]") -> None:
        """Add images that are ready to be sent."""
        self.urls = [it.url for it in prepared]
        self.sent = [image for it in prepared for image in it.sent]

    @property
    def converted_s(self) -> float:
        """The time in which any of the images was being converted or waited for it, in seconds."""
        now = time.monotonic()
        return self._converted_s + (now - self._converting_since if self._conversions else 0.0)

    def start(self) -> None:
        """Note that an image has a process."""
        self.has_process = True

    @contextmanager
    def converting(self) -> Iterator[None]:
        """Measure the time of a conversion and of the wait for it; several at the same time count once."""
        if not self._conversions:
            self._converting_since = time.monotonic()
        self._conversions += 1
        try:
            yield
        finally:
            converted_s = self.converted_s
            self._conversions -= 1
            if not self._conversions:
                self._converted_s = converted_s

    def mark_sent(self) -> None:
        """Count the images and release their memory, after the request was sent."""
        self.urls = ()
        self.reservation.release()
        metrics.series(metrics.IMAGE_BYTES, "inline").inc(sum(image.sent_bytes for image in self.sent))
        self.close()

    def close(self) -> None:
        """Stop reading; can be called again."""
        for stream in self.streams:
            stream.close()
