"""Decide the outcome of a failed attempt, from the diagnosis of its failure."""

from dataclasses import replace
from typing import Final

from vqa_worker.messages.error_codes import ErrorCode
from worker.clock import TIMER_SLACK_S, Clock
from worker.errors import (
    MALFORMED_RESPONSE,
    Dependency,
    DependencyDownError,
    Explanation,
    NotAdmittedError,
    TransientError,
)
from worker.jobs.attempt import Attempt
from worker.jobs.outcome import Outcome, Retried
from worker.jobs.outcome_builder import OutcomeBuilder, requeued, retried, retried_uncounted
from worker.resilience.concurrency_limiter import ModelPausedError
from worker.resilience.outage_detector import Diagnosis, OutageDetector
from worker.resilience.outage_reports import OutageReports
from worker.resilience.retry_policy import (
    Exhausted,
    PastDeadline,
    RetryAfter,
    RetryPolicy,
    check_deadline,
    next_step,
)

# The reason of a retry because the job's model is paused.
MODEL_PAUSED: Final = "model_paused"
# A malformed answer is billed, and the same request is likely to get it again.
MAX_MALFORMED: Final = 2


class FailureOutcomes:
    """Requeue the jobs that an outage stopped; retry, fail or dead-letter those that failed on their own."""

    def __init__(
        self,
        detector: OutageDetector,
        outage_reports: OutageReports,
        retry: RetryPolicy,
        outcomes: OutcomeBuilder,
        clock: Clock,
    ) -> None:
        self._detector = detector
        self._outage_reports = outage_reports
        self._retry = retry
        self._outcomes = outcomes
        self._clock = clock

    async def after_transient_error(self, attempt: Attempt, error: TransientError) -> Outcome:
        """Return the outcome of a failed request, after a short wait for the results of other requests."""
        job, failed_at = attempt.decoded_job_id, self._clock.monotonic()
        attempt.enter("diagnose", failed_at)
        diagnosis = await self._outage_reports.diagnose(job, error, self._max_wait_s(attempt))
        if diagnosis is Diagnosis.OUTAGE:
            return self._stopped_by_outage(attempt, error.model, f"{error.dependency} is down")
        if diagnosis is Diagnosis.CLEARED and error.refused:
            self._detector.end_job(error.dependency, job, error.model)
            is_image = error.dependency is Dependency.S3
            code = ErrorCode.IMAGE_FORBIDDEN if is_image else ErrorCode.MODEL_REJECTED
            return self._outcomes.failed(attempt, code, error.explanation)
        if diagnosis is Diagnosis.PENDING:
            self._detector.count_attempt(error.dependency, job, failed_at, error.model)
        return self._counted(attempt, error, error.reason, error.explanation)

    def after_unavailable(self, attempt: Attempt, error: DependencyDownError) -> Outcome:
        """Return the outcome of a job whose dependency is unreachable or rejects every request.

        Requeue, unless only this job may be concerned. Then retry later: without counting, until the results
        of other jobs show that it is.
        """
        diagnosis = self._outage_reports.report_unavailable(attempt.decoded_job_id, error)
        reason, why = f"{error.dependency}_unavailable", Explanation.loggable(error.message)
        match diagnosis:
            case Diagnosis.OUTAGE:
                return self._stopped_by_outage(attempt, error.model, error.message)
            case Diagnosis.PENDING:
                return self._uncounted(attempt, reason, why, self._retry.delay_s(1))
            case Diagnosis.CLEARED:
                # A whole bucket or model can be concerned for a while: its jobs must not end within minutes.
                patient = replace(self._retry, delays_s=(self._retry.longest_delay_s,))
                return self._counted(attempt, error, reason, why, patient)

    def after_refused_admission(self, attempt: Attempt, error: NotAdmittedError) -> Outcome:
        """Requeue a job that was not admitted, or retry it later while its model is paused."""
        if isinstance(error, ModelPausedError):
            return self._while_model_paused(attempt, str(error))
        return requeued(attempt, str(error))

    def after_counted_failure(
        self, attempt: Attempt, reason: str, why: Explanation, policy: RetryPolicy | None = None
    ) -> Outcome:
        """Return the outcome of a counted attempt: a retry, if attempts and time are left.

        `policy`: None for the settings'.
        """
        policy = policy or self._retry
        if reason == MALFORMED_RESPONSE and attempt.malformed_before + 1 >= MAX_MALFORMED:
            policy = replace(policy, max_attempts=attempt.number)
        match next_step(attempt.number, policy, attempt.deadline, self._clock.now()):
            case RetryAfter(delay_s):
                return retried(attempt, delay_s, reason)
            case Exhausted():
                why = why.after(f"{attempt.number} attempts failed, the last one because ")
                return self._outcomes.dead_lettered(attempt, ErrorCode.ATTEMPTS_EXHAUSTED, why)
            case PastDeadline():
                return self._past_deadline(attempt, why)

    def _counted(
        self,
        attempt: Attempt,
        error: TransientError | DependencyDownError,
        reason: str,
        why: Explanation,
        policy: RetryPolicy | None = None,
    ) -> Outcome:
        outcome = self.after_counted_failure(attempt, reason, why, policy)
        if not isinstance(outcome, Retried):
            self._detector.end_job(error.dependency, attempt.decoded_job_id, error.model)
        return outcome

    def _uncounted(self, attempt: Attempt, reason: str, why: Explanation, delay_s: int) -> Outcome:
        match check_deadline(delay_s, attempt.deadline, self._clock.now()):
            case RetryAfter(delay_s):
                return retried_uncounted(attempt, delay_s, reason)
            case PastDeadline():
                return self._past_deadline(attempt, why)

    def _stopped_by_outage(self, attempt: Attempt, model: str, reason: str) -> Outcome:
        """Requeue the job; if only its model is paused, it must wait elsewhere than in the queue's front."""
        if self._detector.one_model(model):
            return self._while_model_paused(attempt, reason)
        return requeued(attempt, reason)

    def _while_model_paused(self, attempt: Attempt, reason: str) -> Outcome:
        """Return the outcome of a job whose model is paused: a later try, so that others take its place."""
        why = Explanation.loggable(reason)
        until_probe_s = self._detector.next_probe_s(attempt.model, self._clock.monotonic())
        enough_s = [delay_s for delay_s in self._retry.delays_s if delay_s >= until_probe_s]
        delay_s = min(enough_s, default=self._retry.longest_delay_s)
        return self._uncounted(attempt, MODEL_PAUSED, why, delay_s)

    def _past_deadline(self, attempt: Attempt, why: Explanation) -> Outcome:
        why = why.after("the deadline comes before the next attempt; the last one failed because ")
        return self._outcomes.failed(attempt, ErrorCode.DEADLINE_EXCEEDED, why)

    def _max_wait_s(self, attempt: Attempt) -> float:
        """Return how long the diagnosis may take, so that a retry still comes before the deadline."""
        max_wait_s = attempt.time_left_s(self._clock.monotonic())
        if attempt.deadline is None:
            return max_wait_s
        until_deadline_s = (attempt.deadline - self._clock.now()).total_seconds()
        return min(max_wait_s, until_deadline_s - self._retry.delay_s(attempt.number) - TIMER_SLACK_S)
