"""Model requests, with their images; report their results to the outage detector."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

from vqa_worker.messages.conversation import ImageRef
from vqa_worker.messages.error_codes import ErrorCode
from vqa_worker.messages.result import SentImage
from worker.clock import Clock
from worker.errors import Dependency, DependencyDownError, JobError, RateLimitedError, TransientError
from worker.images.memory_budget import Reservation
from worker.images.source import ImageSource
from worker.jobs.attempt import Attempt
from worker.jobs.request import Request
from worker.model.answer import Answer
from worker.model.request import ImageUrl, RequestBody
from worker.resilience.admission import ImageMemory
from worker.resilience.outage_detector import Diagnosis
from worker.resilience.outage_reports import OutageReports


class OpenImages(Protocol):
    """The images of one model request, ready to be sent."""

    @property
    def urls(self) -> Sequence[ImageUrl]:
        """What the request body has in the place of each image's URL, in order."""

    @property
    def sent(self) -> Sequence[SentImage]:
        """What is sent of each image that the worker reads, in order."""

    @property
    def converted_s(self) -> float:
        """The time in which any of the images was being converted, in seconds."""

    def mark_sent(self) -> None:
        """Release the images: the model API has received all of them."""


class Images(ImageMemory, Protocol):
    """The source of images."""

    def check(self, refs: Sequence[ImageRef], body: bytes) -> list[ImageSource]:
        """Return where each image is, or raise JobError."""

    def open(
        self, images: Sequence[ImageSource], reservation: Reservation, *, time_left_s: float
    ) -> AbstractAsyncContextManager[OpenImages]:
        """Start to read the images."""


class ModelApi(Protocol):
    """The model API."""

    async def complete(self, model: str, body: RequestBody, *, time_left_s: float) -> Answer:
        """Send one request."""


class ModelRequests:
    """Open the images and send the model request."""

    def __init__(self, images: Images, model: ModelApi, outage_reports: OutageReports, clock: Clock) -> None:
        self._images = images
        self._model = model
        self._outage_reports = outage_reports
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
        # The other half is for the model request, which is billed even if the time ends before its answer.
        time_left_s = attempt.time_left_s(started) / 2
        try:
            async with self._images.open(request.images, memory, time_left_s=time_left_s) as images:
                yield images
        except JobError as error:
            if error.code is ErrorCode.IMAGE_NOT_FOUND:
                self._outage_reports.report_success(Dependency.S3, attempt.decoded_job_id, started)
            raise

    async def send(self, request: Request, attempt: Attempt, images: OpenImages) -> Answer:
        """Send the model request with open images; the time it waits for them counts as `fetch`.

        Raises:
            JobError, RateLimitedError, TransientError, DependencyDownError: see `ModelApi.complete`.
        """
        job, names = attempt.decoded_job_id, [image.name for image in request.images]
        body = RequestBody(
            request.body_parts,
            images.urls,
            names=names,
            on_sent=images.mark_sent,
            service_tier=request.service_tier,
        )
        fetch_started, started = attempt.stage_started_at, self._clock.monotonic()
        attempt.enter("model", started)
        if images.converted_s:
            attempt.reassign("fetch", "convert", images.converted_s)
        try:
            answer = await self._model.complete(request.model, body, time_left_s=attempt.time_left_s(started))
        except RateLimitedError as error:
            # The request in the default tier will show how the API is.
            if not (error.concerns_tier and request.fallback is not None):
                self._report_limit(job, error, started)
            raise
        except JobError:
            if body.failure is None:
                # The model API works, although it rejects this request.
                self._outage_reports.report_success(Dependency.MODEL, job, started)
            raise
        else:
            self._outage_reports.report_success(Dependency.MODEL, job, started, request.model)
            return answer
        finally:
            # Record the stage's time so far.
            attempt.enter("model", self._clock.monotonic())
            attempt.reassign("model", "fetch", body.waited_s)
            if body.is_sent:
                attempt.images = [*images.sent] or None
            if body.is_sent and request.reads_s3:
                self._outage_reports.report_success(Dependency.S3, job, fetch_started)

    def _report_limit(self, job: str, error: RateLimitedError, started: float) -> None:
        """Report that the API limits the rate, which shows that it works, or that it is overloaded.

        Raises:
            DependencyDownError: it has been overloaded for so long that it is down.
            TransientError: it says so of this job only.
        """
        if not error.is_overloaded:
            self._outage_reports.report_success(Dependency.MODEL, job, started)
            return
        match self._outage_reports.report_overload(job, error):
            case Diagnosis.OUTAGE:
                raise DependencyDownError(Dependency.MODEL, error.message) from None
            case Diagnosis.CLEARED:
                raise TransientError(Dependency.MODEL, "http_5xx", error.message) from None
