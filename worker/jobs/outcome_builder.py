"""Build outcomes from an attempt and the answer or the error that ended it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from vqa_worker.messages.decoding import InvalidJobError
from vqa_worker.messages.error_codes import ErrorCode
from vqa_worker.messages.result import JobFailure, Result, Timings
from worker.clock import Clock
from worker.errors import MALFORMED_RESPONSE, Explanation
from worker.jobs.attempt import Attempt, Stage
from worker.jobs.outcome import DeadLettered, Failed, Outcome, Requeued, Retried, Succeeded
from worker.model.answer import Answer
from worker.model.usage import total

_DIGITS = 6
_UNWRITTEN = "the result could not be written to VQA_LARGE_RESULTS; its answer is in the result store"


@dataclass(frozen=True, slots=True)
class OutcomeBuilder:
    """Build the outcomes that carry a result.

    Attributes:
        redact: removes secrets from a text.
        include_response: whether each result has the API's complete response (`VQA_INCLUDE_RESPONSE`).
    """

    redact: Callable[[str], str]
    clock: Clock
    include_response: bool = False

    def for_answer(self, attempt: Attempt, answer: Answer, repair_failure: str = "") -> Succeeded | Failed:
        """Return Succeeded, or Failed for an answer that is empty or does not satisfy the job's JSON schema.

        It is billed, so it is not retried.

        Args:
            attempt: that ended with the answer.
            answer: of the model.
            repair_failure: why the answer could not be repaired, in the worker's own words.
        """
        outcome = self._for_answer(attempt, answer, repair_failure)
        return replace(outcome, if_unwritten=requeued(attempt, _UNWRITTEN)) if attempt.is_stored else outcome

    def _for_answer(self, attempt: Attempt, answer: Answer, repair_failure: str) -> Succeeded | Failed:
        billed: dict[str, Any] = {
            "finish_reason": answer.finish_reason,
            "usage": total(attempt.unusable, answer.usage),
            "response": answer.response if self.include_response or not answer.is_plain else None,
            "provider": answer.provider,
            "answered_model": answer.answered_model,
            "service_tier": answer.service_tier,
            "images": answer.images or attempt.images,
        }
        if answer.is_empty:
            return self.failed(attempt, ErrorCode.EMPTY_ANSWER, _why_empty(answer), **billed)
        if answer.checked is not None and answer.checked.errors is not None:
            billed["response"] = answer.response
            why = _why_mismatched(answer.checked.errors, answer.repairs, repair_failure)
            return self.failed(attempt, ErrorCode.SCHEMA_MISMATCH, why, **billed)
        parsed = answer.checked.value if answer.checked is not None else None
        result = self._result(attempt, status="succeeded", answer=answer.text, parsed=parsed, **billed)
        return Succeeded(job_id=attempt.job_id, model=attempt.model, result=result)

    def failed(self, attempt: Attempt, code: ErrorCode, why: Explanation, **billed: Any) -> Failed:
        """Return the outcome of a job that failed permanently."""
        result = self._failure(attempt, code, why.message, retryable=False, **billed)
        return Failed(
            job_id=attempt.job_id,
            model=attempt.model,
            result=result,
            code=code,
            reason=self.redact(why.log_message),
        )

    def dead_lettered(self, attempt: Attempt, code: ErrorCode, why: Explanation) -> Outcome:
        """Return the outcome of a job that failed permanently and goes to the dead-letter queue."""
        is_exhausted = code is ErrorCode.ATTEMPTS_EXHAUSTED
        return DeadLettered(
            job_id=attempt.job_id,
            model=attempt.model,
            result=self._failure(attempt, code, why.message, retryable=is_exhausted),
            code=code,
            message=self.redact(why.message),
            reason=self.redact(why.log_message),
            # No attempt was made at a message that is not a job.
            attempts=attempt.number if is_exhausted else attempt.counted_before,
        )

    def invalid(self, attempt: Attempt, error: InvalidJobError) -> Outcome:
        """Return the outcome of a message that is not a job: a dead letter if its body has no readable id."""
        attempt.job_id = error.job_id
        fail = self.failed if error.id_in_body else self.dead_lettered
        return fail(attempt, ErrorCode.INVALID_JOB, Explanation.loggable(error.message))

    def _failure(
        self, attempt: Attempt, code: ErrorCode, message: str, *, retryable: bool, **billed: Any
    ) -> Result:
        error = JobFailure(code=code, message=self.redact(message), retryable=retryable)
        known = {"usage": attempt.unusable, "images": attempt.images}
        return self._result(attempt, status="failed", error=error, **{**known, **billed})

    def _result(self, attempt: Attempt, **fields: Any) -> Result:
        now = self.clock.monotonic()
        return Result(
            id=attempt.job_id,
            model=attempt.allowed_model,
            attempts=attempt.number,
            metadata=attempt.metadata,
            timings=Timings(
                queued_s=attempt.queued_s,
                fetch_s=_seconds(attempt, now, "fetch", "convert"),
                model_s=_seconds(attempt, now, "model"),
                total_s=round(now - attempt.received_at, _DIGITS),
            ),
            **fields,
        )


def retried(attempt: Attempt, delay_s: int, reason: str) -> Outcome:
    """Return the outcome of an attempt that failed and counts; the next one follows after `delay_s`."""
    return Retried(
        job_id=attempt.job_id,
        model=attempt.model,
        delay_s=delay_s,
        attempts=attempt.number,
        reason=reason,
        malformed_answers=attempt.malformed_before + (reason == MALFORMED_RESPONSE),
        unusable=attempt.unusable,
    )


def retried_uncounted(attempt: Attempt, delay_s: int, reason: str) -> Outcome:
    """Return the outcome of an attempt that does not count; the next one follows after `delay_s`."""
    return Retried(
        job_id=attempt.job_id,
        model=attempt.model,
        delay_s=delay_s,
        attempts=attempt.number - 1,
        reason=reason,
        malformed_answers=attempt.billed_malformed,
        unusable=attempt.unusable,
    )


def requeued(attempt: Attempt, reason: str) -> Requeued:
    """Return the outcome of an attempt that does not count, of a job that any worker may take at once."""
    return Requeued(
        job_id=attempt.job_id,
        model=attempt.model,
        reason=reason,
        restored_attempts=attempt.restored_attempts,
        malformed_answers=attempt.billed_malformed,
        unusable=attempt.unusable,
    )


def _seconds(attempt: Attempt, now: float, *stages: Stage) -> float | None:
    """Return the seconds spent in stages; None if the first one was not entered."""
    if not attempt.has_entered(stages[0]):
        return None
    return round(sum(attempt.seconds_in(stage, now) for stage in stages), _DIGITS)


def _why_mismatched(errors: str, repairs: int, repair_failure: str) -> Explanation:
    known = "the answer does not satisfy the job's JSON schema"
    after = f" (after {repairs} {'repair' if repairs == 1 else 'repairs'})" if repairs else ""
    failed = f"; it could not be repaired: {repair_failure}" if repair_failure else ""
    return Explanation(f"{known}{after}: {errors}{failed}", f"{known}{after}{failed}")


def _why_empty(answer: Answer) -> Explanation:
    if answer.refusal is not None:
        refused = "the model refused to answer"
        return Explanation(f"{refused}: {answer.refusal}", refused)
    if answer.finish_reason == "length":
        text = "the token limit was reached before any text: raise params.max_tokens"
    elif answer.finish_reason == "content_filter":
        text = "the API's content filter removed the whole answer"
    else:
        text = f"the API answered with neither text nor a tool call (finish_reason {answer.finish_reason})"
    return Explanation.loggable(text)
