"""What is known of a job while it is worked on, and the outcomes that are made of it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from worker.errors import ErrorCode
from worker.jobs.delivery import Delivery
from worker.jobs.outcome import DeadLettered, Failed, Outcome, Requeued, Retried, Succeeded
from worker.messages.decoding import InvalidJobError
from worker.messages.job import Job
from worker.messages.result import JobFailure, Result, Timings
from worker.model.answer import Answer
from worker.observability import metrics
from worker.observability.redaction import Redactor

if TYPE_CHECKING:
    from datetime import datetime

_DIGITS = 6

Stage: TypeAlias = Literal["wait", "fetch", "model"]


class Report:
    """One attempt at one job: its id, model and times so far."""

    def __init__(
        self, delivery: Delivery, redact: Redactor, *, include_response: bool, timeout_s: float
    ) -> None:
        """`timeout_s`: how long one delivery may take, `VQA_JOB_TIMEOUT`."""
        self._delivery = delivery
        self._progress = delivery.progress
        self._redact = redact
        self._include_response = include_response
        self._timeout_s = timeout_s
        self._model: str | None = None
        # Seconds by stage: of the try that runs, and of all tries of this delivery.
        self._now: dict[Stage, float] = {}
        self._stages: dict[Stage, float] = {}
        self.job_id: str | None = None
        self.metadata: dict[str, Any] = {}
        self.deadline: datetime | None = None
        self.attempts = delivery.attempts + 1
        self._restored_attempts = 0
        # Once the API has answered, the job is paid for: nothing may lose the answer.
        self.answer: Answer | None = None

    @property
    def received(self) -> float:
        """When the delivery came, in seconds of `time.monotonic`."""
        return self._delivery.received

    @property
    def time_left_s(self) -> float:
        """Seconds until this delivery has to have come to its end."""
        return max(0.0, self.received + self._timeout_s - time.monotonic())

    @property
    def model(self) -> str:
        """The model to ask, or `unknown`: fit for a metric's label."""
        return self._model or metrics.UNKNOWN_MODEL

    def job_is(self, job: Job) -> None:
        """The message could be read. The job itself is not kept: it can hold images."""
        self.job_id = self._progress.job_id = job.id
        self.deadline = job.deadline
        self.metadata = job.metadata or {}

    def model_is(self, model: str) -> None:
        """The model is an allowed one."""
        self._model = self._progress.model = model

    def restore_attempts(self, attempts: int) -> None:
        """Do not count so many of the attempts before this one: an outage caused them."""
        self._restored_attempts = min(attempts, self._delivery.attempts)
        self.attempts -= self._restored_attempts
        self._progress.attempts = self.attempts

    @contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """Measure a stage."""
        self._progress.enters(name)
        started = self._progress.since
        try:
            yield
        finally:
            self._now[name] = self._now.get(name, 0.0) + time.monotonic() - started

    def enters(self, step: Literal["diagnose", "store"]) -> None:
        """What is done now, for whoever asks; it is not measured."""
        self._progress.enters(step)

    def move(self, source: Stage, target: Stage, seconds: float) -> None:
        """Some of the time measured as one stage was spent on another."""
        self._now[source] = max(0.0, self._now.get(source, 0.0) - seconds)
        self._now[target] = self._now.get(target, 0.0) + seconds

    def end_of_try(self) -> None:
        """The stages measured so far are over; those of another try (after a 429) add up."""
        for name, seconds in self._now.items():
            metrics.series(metrics.STAGE_DURATION, name, self.model).observe(seconds)
            self._stages[name] = self._stages.get(name, 0.0) + seconds
        self._now.clear()

    def answered(self, answer: Answer) -> Outcome:
        """The model's answer, or that it was empty: paid for, so never asked again."""
        paid: dict[str, Any] = {
            "finish_reason": answer.finish_reason,
            "usage": answer.usage,
            "response": answer.response if self._include_response or not answer.is_plain else None,
        }
        if answer.is_empty:
            return self.refused(ErrorCode.EMPTY_ANSWER, _why_empty(answer), **paid)
        result = self._result(status="succeeded", answer=answer.text, **paid)
        return Succeeded(job_id=self.job_id, model=self.model, result=result)

    def refused(self, code: ErrorCode, message: str, **paid: Any) -> Outcome:
        """The job failed for good."""
        result = self._failure(code, message, retryable=False, **paid)
        return Failed(job_id=self.job_id, model=self.model, result=result, code=code)

    def dead_letter(self, code: ErrorCode, message: str, *, attempts: int | None = None) -> Outcome:
        """The job failed for good and is to be kept."""
        result = self._failure(code, message, retryable=code is ErrorCode.ATTEMPTS_EXHAUSTED)
        return DeadLettered(
            job_id=self.job_id,
            model=self.model,
            result=result,
            code=code,
            message=self._redact(message),
            attempts=self.attempts if attempts is None else attempts,
        )

    def unreadable(self, error: InvalidJobError) -> Outcome:
        """The message is no job; one whose body gives no id is kept for a person to look at."""
        self.job_id = error.job_id
        if error.id_in_body:
            return self.refused(ErrorCode.INVALID_JOB, error.message)
        return self.dead_letter(ErrorCode.INVALID_JOB, error.message, attempts=self._delivery.attempts)

    def retried(self, delay_s: int, reason: str) -> Outcome:
        """The attempt is counted and another comes later."""
        return Retried(
            job_id=self.job_id, model=self.model, delay_s=delay_s, attempts=self.attempts, reason=reason
        )

    def put_off(self, delay_s: int, reason: str) -> Outcome:
        """Nothing is counted, and another attempt comes later."""
        return Retried(
            job_id=self.job_id, model=self.model, delay_s=delay_s, attempts=self.attempts - 1, reason=reason
        )

    def given_back(self, reason: str) -> Outcome:
        """Nothing is counted."""
        return Requeued(
            job_id=self.job_id, model=self.model, reason=reason, restored_attempts=self._restored_attempts
        )

    def _failure(self, code: ErrorCode, message: str, *, retryable: bool, **paid: Any) -> Result:
        error = JobFailure(code=code, message=self._redact(message), retryable=retryable)
        return self._result(status="failed", error=error, **paid)

    def _result(self, **fields: Any) -> Result:
        return Result(
            id=self.job_id,
            model=self._model,
            attempts=self.attempts,
            metadata=self.metadata,
            timings=Timings(
                queued_s=self._delivery.queued_s,
                fetch_s=self._seconds("fetch"),
                model_s=self._seconds("model"),
                total_s=round(time.monotonic() - self.received, _DIGITS),
            ),
            **fields,
        )

    def _seconds(self, stage: Stage) -> float | None:
        seconds = self._stages.get(stage)
        return None if seconds is None else round(seconds, _DIGITS)


def _why_empty(answer: Answer) -> str:
    if answer.refusal is not None:
        return f"the model refused to answer: {answer.refusal}"
    if answer.finish_reason == "length":
        return "the token limit was used up before any text came: raise params.max_tokens"
    if answer.finish_reason == "content_filter":
        return "the API's content filter left nothing of the answer"
    return f"the API answered with neither text nor a tool call (finish_reason {answer.finish_reason})"
