"""The use case: from a delivery to what became of the job."""

import asyncio
import time
from collections.abc import Collection, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

import structlog

from worker.delivery import Delivery
from worker.errors import (
    Dependency,
    DependencyDownError,
    ErrorCode,
    JobError,
    RateLimitedError,
    TransientError,
)
from worker.health import Health
from worker.images.budget import Share
from worker.images.load import Located
from worker.job import Conversation, ImageRef, InvalidJobError, Job, decode
from worker.limiter import Gate, GateClosedError
from worker.logs import describe_bug
from worker.model.answer import Answer
from worker.model.request import PLACEHOLDER, ImageUrl, RequestBody, frame
from worker.outcome import Outcome
from worker.redact import Redactor
from worker.report import Report
from worker.retry import Exhausted, RetryPolicy, TooLate, TryAgain, after_attempt
from worker.s3.aws import S3Object

log = structlog.get_logger(__name__)

# Event loops fire timers some milliseconds early: waiting for a moment, wait a little longer.
TIMER_SLACK_S = 0.02

_NO_SLOT = "half of VQA_JOB_TIMEOUT has passed without a free slot, or room for the images"
_TOO_OFTEN = (
    "the job was delivered {} times without coming to an end (VQA_DELIVERY_LIMIT): "
    "it may be what stops the workers that take it"
)


class _TooOftenError(Exception):
    """The job was delivered too often without coming to an end."""


class OpenImages(Protocol):
    """The images of one call, ready to be sent."""

    @property
    def urls(self) -> Sequence[ImageUrl]:
        """What stands in the places of their URLs, in order."""

    def sent(self) -> None:
        """All of them were handed to the API."""


class ImageLoader(Protocol):
    """Where images come from."""

    def check(self, refs: Sequence[ImageRef], body: bytes) -> list[Located]:
        """Tell where each image is, or raise JobError."""

    def room(self, images: Sequence[Located]) -> AbstractAsyncContextManager[Share]:
        """Wait until they may be held, and hold their place."""

    def open(self, images: Sequence[Located], room: Share) -> AbstractAsyncContextManager[OpenImages]:
        """Begin to read them."""


class ModelApi(Protocol):
    """Who answers."""

    async def ask(self, model: str, body: RequestBody, *, time_left_s: float) -> Answer:
        """Make one call."""


@dataclass(frozen=True, slots=True)
class _Question:
    """What is left of a job when it has been read: nothing that is as large as its images."""

    deadline: datetime | None
    frame: Sequence[bytes]
    images: Sequence[Located]


@dataclass(frozen=True, slots=True)
class Rules:
    """The settings that decide what becomes of a job."""

    default_model: str
    allowed_models: Collection[str]
    max_job_bytes: int
    delivery_limit: int
    job_timeout_s: float
    send_image_detail: bool
    include_response: bool
    retry: RetryPolicy


class Processor:
    """Takes one delivery in and hands one outcome on; publishes and settles nothing itself."""

    def __init__(
        self,
        images: ImageLoader,
        model: ModelApi,
        *,
        gate: Gate,
        health: Health,
        rules: Rules,
        redact: Redactor,
    ) -> None:
        self._images = images
        self._model = model
        self._gate = gate
        self._health = health
        self._rules = rules
        self._redact = redact

    async def process(self, delivery: Delivery) -> Outcome:
        """Decode, check, fetch, ask, report. Every error becomes an outcome, a bug too."""
        report = Report(delivery, self._redact, include_response=self._rules.include_response)
        try:
            question = self._read(delivery, report)
            answer = await self._ask(question, report)
        except InvalidJobError as error:
            return report.unreadable(error)
        except _TooOftenError as error:
            return report.dead_letter(ErrorCode.ATTEMPTS_EXHAUSTED, str(error))
        except JobError as error:
            return report.refused(error.code, error.message)
        except TransientError as error:
            return self._after_failure(report, error)
        except DependencyDownError as error:
            return self._after_refusal(report, error)
        except GateClosedError as error:
            return report.given_back(str(error))
        except Exception as error:  # noqa: BLE001 - a bug must not lose the job, nor loop for ever
            log.error("bug", job_id=report.job_id, exception=describe_bug(error))  # noqa: TRY400
            return self._try_again(report, "bug", f"the worker failed: {type(error).__name__}")
        return report.answered(answer)

    def _read(self, delivery: Delivery, report: Report) -> _Question:
        """Decode and check."""
        job = decode(delivery.body, delivery.message_id, self._rules.max_job_bytes)
        report.job_is(job)
        report.model_is(self._model_of(job))
        if delivery.deliveries > self._rules.delivery_limit:
            raise _TooOftenError(_TOO_OFTEN.format(delivery.deliveries))
        _check_deadline(job.deadline)
        conversation = Conversation(job)
        images = self._images.check(conversation.images(), delivery.body)
        messages = conversation.render(PLACEHOLDER, send_detail=self._rules.send_image_detail)
        return _Question(job.deadline, frame(report.model, messages, job.params or {}), images)

    async def _ask(self, question: _Question, report: Report) -> Answer:
        """Fetch and ask until there is an answer or an error other than 429."""
        while True:
            started = time.monotonic()
            try:
                async with AsyncExitStack() as stack:
                    stack.callback(report.end_of_try)
                    with report.stage("wait"):
                        room = await self._take_slot(stack, question, report)
                    _check_deadline(question.deadline)
                    started = time.monotonic()
                    with report.stage("fetch"):
                        images = await self._open(stack, question, room, report)
                    _check_deadline(question.deadline)
                    answer = await self._call(question, images, report, started)
                    self._gate.succeeded()
                    return answer
            except RateLimitedError as error:
                # The API is there and knows us: an outage, if there was one, is over.
                self._health.succeeded(Dependency.MODEL, started, time.monotonic())
                self._gate.refused(started, error.retry_after_s)

    async def _take_slot(self, stack: AsyncExitStack, question: _Question, report: Report) -> Share:
        """Wait for a slot and for room for the images, for half of the delivery's time at most.

        The other half is for the work: a call begun with less could be cut off when it is already paid for.

        Raises:
            GateClosedError: the gate is closed, or there was no slot, or no room, in time.
            JobError: the job's deadline passed while waiting.
        """
        left_s = self._time_left_s(report) - self._rules.job_timeout_s / 2
        if left_s <= 0:
            raise GateClosedError(_NO_SLOT)
        if question.deadline is not None:
            left_s = min(left_s, (question.deadline - datetime.now(UTC)).total_seconds() + TIMER_SLACK_S)
        try:
            async with asyncio.timeout(left_s):
                await stack.enter_async_context(self._gate.slot())
                return await stack.enter_async_context(self._images.room(question.images))
        except TimeoutError:
            _check_deadline(question.deadline)
            raise GateClosedError(_NO_SLOT) from None

    async def _open(
        self, stack: AsyncExitStack, question: _Question, room: Share, report: Report
    ) -> OpenImages:
        started = time.monotonic()
        try:
            async with asyncio.timeout(self._time_left_s(report)):
                return await stack.enter_async_context(self._images.open(question.images, room))
        except TimeoutError:
            raise TransientError(Dependency.S3, "timeout", "the images could not be read in time") from None
        except JobError as error:
            if error.code is ErrorCode.IMAGE_NOT_FOUND:
                self._health.succeeded(Dependency.S3, started, time.monotonic())
            raise

    async def _call(
        self, question: _Question, images: OpenImages, report: Report, fetch_started: float
    ) -> Answer:
        names = [image.name for image in question.images]
        body = RequestBody(question.frame, images.urls, names=names, on_sent=images.sent)
        started = time.monotonic()
        try:
            with report.stage("model"):
                answer = await self._model.ask(report.model, body, time_left_s=self._time_left_s(report))
        except JobError:
            # Refusing one request is a sign of life like any answer.
            self._health.succeeded(Dependency.MODEL, started, time.monotonic())
            raise
        finally:
            report.move("model", "fetch", body.waited_s)
            if body.is_sent and any(isinstance(image.source, S3Object) for image in question.images):
                self._health.succeeded(Dependency.S3, fetch_started, time.monotonic())
        self._health.succeeded(Dependency.MODEL, started, time.monotonic())
        return answer

    def _after_failure(self, report: Report, error: TransientError) -> Outcome:
        """Tell the job's own trouble from an outage, and decide what follows."""
        job_id = report.job_id or ""
        if error.forbidden and self._health.succeeds_for_others(error.dependency, job_id):
            return report.refused(ErrorCode.MODEL_REJECTED, error.message)
        if error.is_echo:
            is_down = error.dependency in self._health.outages
        else:
            is_down = self._health.failed(error.dependency, job_id, error.reason, time.monotonic())
        if is_down:
            return report.given_back(f"{error.dependency} is down")
        return self._try_again(report, error.reason, error.message)

    def _after_refusal(self, report: Report, error: DependencyDownError) -> Outcome:
        """Give the job back while the dependency is down; count it if it is down for this job only."""
        down = self._health.refused_everybody(
            error.dependency, report.job_id or "", error.message, time.monotonic()
        )
        if down:
            return report.given_back(error.message)
        return self._try_again(report, f"{error.dependency}_refused", error.message)

    def _try_again(self, report: Report, reason: str, message: str) -> Outcome:
        match after_attempt(report.attempts, self._rules.retry, report.deadline, datetime.now(UTC)):
            case TryAgain(delay_s):
                return report.retried(delay_s, reason)
            case Exhausted():
                text = f"{report.attempts} attempts failed, the last one because {message}"
                return report.dead_letter(ErrorCode.ATTEMPTS_EXHAUSTED, text)
            case TooLate():
                text = f"the deadline comes before the next attempt; the last one failed because {message}"
                return report.refused(ErrorCode.DEADLINE_EXCEEDED, text)

    def _model_of(self, job: Job) -> str:
        model = job.model if job.model is not None else self._rules.default_model
        if model not in self._rules.allowed_models:
            raise JobError(ErrorCode.INVALID_JOB, "model: is not among VQA_ALLOWED_MODELS")
        return model

    def _time_left_s(self, report: Report) -> float:
        """Seconds until this delivery has to have come to its end."""
        return max(0.0, report.received + self._rules.job_timeout_s - time.monotonic())


def _check_deadline(deadline: datetime | None) -> None:
    if deadline is not None and datetime.now(UTC) >= deadline:
        raise JobError(ErrorCode.DEADLINE_EXCEEDED, f"the deadline {deadline.isoformat()} has passed")
