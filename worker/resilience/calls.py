"""Calls to S3 and to the API for one job; what they show about the dependencies goes to the detector."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

from worker.clock import Clock
from worker.errors import Dependency, ErrorCode, JobError, RateLimitedError
from worker.images.memory_budget import Reservation
from worker.images.source import ImageSource
from worker.jobs.attempt import Attempt
from worker.jobs.request import Request
from worker.messages.conversation import ImageRef
from worker.model.answer import Answer
from worker.model.request import ImageUrl, RequestBody
from worker.resilience.diagnostics import Diagnostics


class OpenImages(Protocol):
    """The images of one call, ready to be sent."""

    @property
    def urls(self) -> Sequence[ImageUrl]:
        """What the request has in the place of each image's URL, in order."""

    def mark_sent(self) -> None:
        """Release the images: the API has received all of them."""


class Images(Protocol):
    """Where images come from."""

    def check(self, refs: Sequence[ImageRef], body: bytes) -> list[ImageSource]:
        """Return where each image is, or raise JobError."""

    def reserve(self, images: Sequence[ImageSource]) -> AbstractAsyncContextManager[Reservation]:
        """Wait for memory for the images of a call, and hold it."""

    def open(
        self, images: Sequence[ImageSource], reservation: Reservation, *, time_left_s: float
    ) -> AbstractAsyncContextManager[OpenImages]:
        """Start to read the images."""


class ModelApi(Protocol):
    """The API."""

    async def complete(self, model: str, body: RequestBody, *, time_left_s: float) -> Answer:
        """Make one call."""


class Calls:
    """Open the images and call the API."""

    def __init__(self, images: Images, model: ModelApi, diagnostics: Diagnostics, clock: Clock) -> None:
        self._images = images
        self._model = model
        self._diagnostics = diagnostics
        self._clock = clock

    @asynccontextmanager
    async def open_images(
        self, request: Request, attempt: Attempt, memory: Reservation
    ) -> AsyncIterator[OpenImages]:
        """Open the images of a request.

        Raises:
            JobError, TransientError, DependencyDownError: see `Images.open`.
        """
        started = self._clock.monotonic()
        attempt.enter("fetch", started)
        time_left_s = attempt.time_left_s(started)
        try:
            async with self._images.open(request.images, memory, time_left_s=time_left_s) as images:
                yield images
        except JobError as error:
            if error.code is ErrorCode.IMAGE_NOT_FOUND:
                self._diagnostics.succeeded(Dependency.S3, attempt.job_id, started)
            raise

    async def ask(self, request: Request, attempt: Attempt, images: OpenImages) -> Answer:
        """Call the API with open images; the time it waits for them counts as fetching.

        Raises:
            JobError, RateLimitedError, TransientError, DependencyDownError: see `ModelApi.complete`.
        """
        names = [image.name for image in request.images]
        body = RequestBody(request.frame, images.urls, names=names, on_sent=images.mark_sent)
        fetch_started, started = attempt.since, self._clock.monotonic()
        attempt.enter("model", started)
        try:
            answer = await self._model.complete(request.model, body, time_left_s=attempt.time_left_s(started))
        except (JobError, RateLimitedError):
            # The API works, although it refuses this request or this rate.
            self._diagnostics.succeeded(Dependency.MODEL, attempt.job_id, started)
            raise
        else:
            self._diagnostics.succeeded(Dependency.MODEL, attempt.job_id, started)
            return answer
        finally:
            attempt.enter("diagnose", self._clock.monotonic())
            attempt.move("model", "fetch", body.waited_s)
            if body.is_sent and request.reads_s3:
                self._diagnostics.succeeded(Dependency.S3, attempt.job_id, fetch_started)
