"""The use case: from a delivery to what became of the job."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol

import structlog
from structlog.contextvars import bound_contextvars

from worker.errors import (
    Dependency,
    DependencyDownError,
    ErrorCode,
    JobError,
    RateLimitedError,
    TransientError,
)
from worker.images.memory_budget import Reservation
from worker.images.source import ImageSource
from worker.jobs.attempt import Report
from worker.jobs.cancellation import Cancellations
from worker.jobs.delivery import Delivery
from worker.jobs.outcome import Outcome
from worker.messages.conversation import Conversation, ImageRef
from worker.messages.decoding import InvalidJobError, decode
from worker.messages.job import Job
from worker.model.answer import Answer, deserialize_answer, serialize_answer
from worker.model.request import PLACEHOLDER, ImageUrl, RequestBody, fingerprint, frame
from worker.observability.logs import describe_exception
from worker.observability.redaction import Redactor
from worker.observability.tenants import Tenants
from worker.resilience.concurrency_limiter import AdmissionClosedError, ConcurrencyLimiter, Slot
from worker.resilience.failures import Failures
from worker.resilience.outage_detector import Health
from worker.resilience.retry_policy import RetryPolicy
from worker.s3.aws import S3Object

log = structlog.get_logger(__name__)

# Event loops fire timers some milliseconds early: waiting for a moment, wait a little longer.
TIMER_SLACK_S = 0.02

# A job that could not start for so long goes back, so that a worker with more luck can have it.
LONGEST_WAIT_S = 25.0

# How long to look for the stored answer of a job past its deadline.
STORED_ANSWER_TIMEOUT_S = 5.0

# How often a job is read that was delivered too often, to find the id for its last result.
LAST_READINGS = 3

_NO_SLOT = f"no free slot within {LONGEST_WAIT_S:g} s, or half of VQA_JOB_TIMEOUT"
_NO_ROOM = "no room for the images within half of VQA_JOB_TIMEOUT"
_NO_TURN = "another worker is still at the same job after half of VQA_JOB_TIMEOUT"
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

    def mark_sent(self) -> None:
        """All of them were handed to the API."""


class ImageLoader(Protocol):
    """Where images come from."""

    def check(self, refs: Sequence[ImageRef], body: bytes) -> list[ImageSource]:
        """Tell where each image is, or raise JobError."""

    def reserve(self, images: Sequence[ImageSource]) -> AbstractAsyncContextManager[Reservation]:
        """Wait until they may be held, and hold their place."""

    def open(
        self, images: Sequence[ImageSource], reservation: Reservation
    ) -> AbstractAsyncContextManager[OpenImages]:
        """Begin to read them."""


class Lease(Protocol):
    """The right to answer one job.

    Attributes:
        answer: the stored answer, if there is one.
    """

    answer: bytes | None

    async def put(self, answer: bytes) -> bytes:
        """Store an answer; return it, or the one that another worker stored first."""


class ResultStore(Protocol):
    """Stored answers."""

    async def find(self, name: str) -> bytes | None:
        """Return a job's stored answer, if there is one; no lease is needed."""

    def acquire(self, name: str, check_admission: Callable[[], None]) -> AbstractAsyncContextManager[Lease]:
        """Acquire the job's lease; wait while another job or worker holds it."""


class ModelApi(Protocol):
    """Who answers."""

    async def complete(self, model: str, body: RequestBody, *, time_left_s: float) -> Answer:
        """Make one call."""


@dataclass(frozen=True, slots=True)
class _Question:
    """What is left of a job when it has been read: nothing that is as large as its images."""

    deadline: datetime | None
    frame: Sequence[bytes]
    images: Sequence[ImageSource]
    # Its name in the result store, if there is one.
    name: str = ""


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

    def __init__(  # noqa: PLR0913 - the use case's whole world
        self,
        images: ImageLoader,
        model: ModelApi,
        *,
        gate: ConcurrencyLimiter,
        health: Health,
        rules: Rules,
        redact: Redactor,
        cancellations: Cancellations,
        store: ResultStore | None = None,
        tenants: Tenants | None = None,
    ) -> None:
        self._images = images
        self._model = model
        self._gate = gate
        self._health = health
        self._rules = rules
        self._redact = redact
        self._cancellations = cancellations
        self._store = store
        self._tenants = tenants or Tenants()
        self._failures = Failures(gate, health, rules.retry)

    async def process(self, delivery: Delivery) -> Outcome:
        """Decode, check, fetch, ask, report. Every error becomes an outcome, a bug too."""
        report = Report(
            delivery,
            self._redact,
            include_response=self._rules.include_response,
            timeout_s=self._rules.job_timeout_s,
        )
        try:
            question = self._read(delivery, report)
            with self._cancellations.heeded(report.job_id or ""):
                answer = await self._answer_or_paid(question, report)
        except InvalidJobError as error:
            return report.unreadable(error)
        except _TooOftenError as error:
            return report.dead_letter(ErrorCode.ATTEMPTS_EXHAUSTED, str(error))
        except JobError as error:
            return report.refused(error.code, error.message)
        except TransientError as error:
            fault = error.without_traceback()
        except DependencyDownError as error:
            return self._failures.after_refusal(report, error)
        except AdmissionClosedError as error:
            return report.given_back(str(error))
        except MemoryError:
            # No fault of this job alone: the whole process is in trouble.
            raise
        except Exception as error:  # noqa: BLE001 - a bug must not lose the job, nor loop for ever
            log.error("internal_error", job_id=report.job_id, exception=describe_exception(error))  # noqa: TRY400
            return self._failures.try_again(
                report, "internal_error", f"the worker failed: {type(error).__name__}"
            )
        else:
            return report.answered(answer)
        return await self._failures.after_fault(report, fault)

    def _read(self, delivery: Delivery, report: Report) -> _Question:
        """Decode and check."""
        if delivery.deliveries > self._rules.delivery_limit + LAST_READINGS:
            # To read it may be what stops the workers: that is not tried without end either.
            report.job_id = delivery.message_id
            raise _TooOftenError(_TOO_OFTEN.format(delivery.deliveries))
        job = decode(delivery.body, delivery.message_id, self._rules.max_job_bytes)
        report.job_is(job)
        report.restore_attempts(self._health.take_restored_attempts(report.job_id or ""))
        report.model_is(self._model_of(job))
        if delivery.deliveries > self._rules.delivery_limit:
            raise _TooOftenError(_TOO_OFTEN.format(delivery.deliveries))
        conversation = Conversation(job)
        images = self._images.check(conversation.images(), delivery.body)
        messages = conversation.render(PLACEHOLDER, send_detail=self._rules.send_image_detail)
        parts = frame(report.model, messages, job.params or {})
        return _Question(job.deadline, parts, images, self._name_of(job, conversation, report.model))

    def _name_of(self, job: Job, conversation: Conversation, model: str) -> str:
        """The job's name in the result store; nobody can guess it who does not know all that it asks."""
        if self._store is None:
            return ""
        messages = conversation.render("", send_detail=self._rules.send_image_detail)
        urls = [ref.url for ref in conversation.images()]
        return fingerprint(job.id or "", model, messages, job.params or {}, urls)

    async def _answer_or_paid(self, question: _Question, report: Report) -> Answer:
        """Return the answer, also if the job is cancelled when the API has already answered."""
        try:
            return await self._answer(question, report)
        except asyncio.CancelledError:
            if report.answer is None:
                raise
            return report.answer

    async def _answer(self, question: _Question, report: Report) -> Answer:
        """The answer that is kept for the job, or else the model's, kept before anybody hears of it."""
        if self._store is None:
            _check_deadline(question.deadline)
            return await self._ask(question, report)
        try:
            return await self._answer_with_lease(self._store, question, report)
        except JobError as error:
            if error.code is not ErrorCode.DEADLINE_EXCEEDED:
                raise
            if (stored := await self._stored_answer(self._store, question)) is None:
                raise
            return stored

    async def _stored_answer(self, store: ResultStore, question: _Question) -> Answer | None:
        """Return the answer that an earlier delivery of the job paid for, if the store returns it in time."""
        try:
            async with asyncio.timeout(STORED_ANSWER_TIMEOUT_S):
                stored = await store.find(question.name)
        except (DependencyDownError, TimeoutError) as error:
            log.warning("result_store_unreachable", reason=str(error) or "timeout")
            return None
        return deserialize_answer(stored) if stored is not None else None

    async def _answer_with_lease(self, store: ResultStore, question: _Question, report: Report) -> Answer:
        _check_deadline(question.deadline)
        async with AsyncExitStack() as stack:
            stack.callback(report.end_of_try)
            # The store's own lines say whose answer they are about.
            stack.enter_context(bound_contextvars(job_id=report.job_id))
            started = time.monotonic()
            self._gate.check(also_trials=False)
            with report.stage("wait"):
                async with _patience(report, question, self._rules.job_timeout_s / 2, _NO_TURN):
                    acquired = store.acquire(question.name, self._gate.check)
                    lease = await stack.enter_async_context(acquired)
            self._health.succeeded(Dependency.RESULT_STORE, started, time.monotonic())
            kept = deserialize_answer(lease.answer) if lease.answer is not None else None
            if kept is not None:
                return kept
            answer = await self._ask(question, report)
            report.enters("store")
            return deserialize_answer(await lease.put(serialize_answer(answer))) or answer

    async def _ask(self, question: _Question, report: Report) -> Answer:
        """Fetch and ask until there is an answer or an error other than 429."""
        patience_s = time.monotonic() - report.received + LONGEST_WAIT_S
        while True:
            async with AsyncExitStack() as stack:
                stack.callback(report.end_of_try)
                with report.stage("wait"):
                    slot, room = await self._take_slot(stack, question, report, patience_s)
                _check_deadline(question.deadline)
                started = time.monotonic()
                with report.stage("fetch"):
                    images = await self._open(stack, question, room, report)
                _check_deadline(question.deadline)
                if slot.must_wait:
                    continue
                try:
                    answer = await self._call(question, images, report, started)
                except RateLimitedError as error:
                    # The API is there and knows us: an outage, if there was one, is over.
                    self._health.succeeded(Dependency.MODEL, started, time.monotonic())
                    slot.rate_limited(error.retry_after_s)
                else:
                    slot.succeeded()
                    return answer

    async def _take_slot(
        self, stack: AsyncExitStack, question: _Question, report: Report, patience_s: float
    ) -> tuple[Slot, Reservation]:
        """Wait for a slot and for room for the images, for half of the delivery's time at most.

        For a slot it waits until the delivery is `patience_s` old, whatever came of it before. The other half
        is for the work: a call begun with less could be cut off when it is already paid for.

        Raises:
            AdmissionClosedError: the gate is closed, or there was no slot, or no room, in time.
            JobError: the job's deadline passed while waiting, or passes before the API may be called again.
        """
        half_s = self._rules.job_timeout_s / 2
        try:
            async with _patience(report, question, min(half_s, patience_s), _NO_SLOT):
                slot = await stack.enter_async_context(self._gate.slot(report.model))
        except AdmissionClosedError:
            _check_deadline(question.deadline, self._gate.closed_s(report.model))
            raise
        async with _patience(report, question, half_s, _NO_ROOM):
            return slot, await stack.enter_async_context(self._images.reserve(question.images))

    async def _open(
        self, stack: AsyncExitStack, question: _Question, reservation: Reservation, report: Report
    ) -> OpenImages:
        started = time.monotonic()
        try:
            async with asyncio.timeout(report.time_left_s):
                return await stack.enter_async_context(self._images.open(question.images, reservation))
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
        body = RequestBody(question.frame, images.urls, names=names, on_sent=images.mark_sent)
        started = time.monotonic()
        try:
            with report.stage("model"):
                answer = await self._model.complete(report.model, body, time_left_s=report.time_left_s)
        except JobError:
            # Refusing one request is a sign of life like any answer.
            self._health.succeeded(Dependency.MODEL, started, time.monotonic())
            raise
        finally:
            report.move("model", "fetch", body.waited_s)
            if body.is_sent and any(isinstance(image.source, S3Object) for image in question.images):
                self._health.succeeded(Dependency.S3, fetch_started, time.monotonic())
        self._health.succeeded(Dependency.MODEL, started, time.monotonic())
        report.answer = answer
        self._tenants.paid(report.metadata, report.model, answer.usage)
        return answer

    def _model_of(self, job: Job) -> str:
        model = job.model if job.model is not None else self._rules.default_model
        if model not in self._rules.allowed_models:
            raise JobError(ErrorCode.INVALID_JOB, "model: is not among VQA_ALLOWED_MODELS")
        return model


@asynccontextmanager
async def _patience(report: Report, question: _Question, seconds: float, reason: str) -> AsyncIterator[None]:
    """Wait for something, until the delivery is so many seconds old or the job's deadline passes.

    Raises:
        AdmissionClosedError: the time is over; `reason` says what for.
        JobError: the deadline has passed.
    """
    left_s = report.received + seconds - time.monotonic()
    if left_s <= 0:
        raise AdmissionClosedError(reason)
    if question.deadline is not None:
        left_s = min(left_s, (question.deadline - datetime.now(UTC)).total_seconds() + TIMER_SLACK_S)
    try:
        async with asyncio.timeout(left_s):
            yield
    except TimeoutError:
        _check_deadline(question.deadline)
        raise AdmissionClosedError(reason) from None


def _check_deadline(deadline: datetime | None, in_s: float = 0.0) -> None:
    """Whether the deadline has passed, or will have in so many seconds."""
    if deadline is not None and datetime.now(UTC) + timedelta(seconds=in_s) >= deadline:
        when = "comes before the API may be called again" if in_s else "has passed"
        raise JobError(ErrorCode.DEADLINE_EXCEEDED, f"the deadline {deadline.isoformat()} {when}")
