"""Decide the outcome of a failed attempt, from the diagnosis of its failure."""

from worker.clock import Clock
from worker.errors import Dependency, DependencyDownError, ErrorCode, TransientError
from worker.jobs.attempt import Attempt
from worker.jobs.outcome import Outcome, Retried
from worker.jobs.results import Results, postponed, requeued, retried
from worker.resilience.diagnostics import Diagnostics
from worker.resilience.outage_detector import Diagnosis, OutageDetector
from worker.resilience.retry_policy import Exhausted, RetryPolicy, TooLate, TryAgain, after, after_attempt

# Event loops fire timers some milliseconds early and late: a retry must not come after the deadline.
DEADLINE_SLACK_S = 0.02


class Failures:
    """Requeue the jobs that an outage stopped; retry, fail or dead-letter those that failed on their own."""

    def __init__(
        self,
        detector: OutageDetector,
        diagnostics: Diagnostics,
        retry: RetryPolicy,
        results: Results,
        clock: Clock,
    ) -> None:
        self._detector = detector
        self._diagnostics = diagnostics
        self._retry = retry
        self._results = results
        self._clock = clock

    async def after_transient_error(self, attempt: Attempt, error: TransientError) -> Outcome:
        """Return the outcome of a failed call; wait a moment for what other calls show about it."""
        failed_at = self._clock.monotonic()
        attempt.enter("diagnose", failed_at)
        match await self._diagnostics.failed(attempt.job_id, error, self._patience_s(attempt)):
            case Diagnosis.OUTAGE:
                return requeued(attempt, f"{error.dependency} is down")
            case Diagnosis.CLEARED if error.forbidden:
                self._end(error.dependency, attempt)
                return self._results.failed(attempt, ErrorCode.MODEL_REJECTED, error.message)
            case Diagnosis.PENDING:
                self._detector.count_attempt(error.dependency, attempt.job_id or "", failed_at)
        return self._counted(attempt, error.dependency, error.reason, error.message)

    def after_unavailable(self, attempt: Attempt, error: DependencyDownError) -> Outcome:
        """Return the outcome of a job whose dependency is unreachable or refuses all calls.

        It is requeued, unless only this job is affected. Then the attempt counts; but one bucket or one model
        may be unavailable for as long as nobody repairs it, and a job that needs it loses no attempt
        meanwhile.
        """
        if self._diagnostics.unavailable(attempt.job_id, error) is not Diagnosis.CLEARED:
            return requeued(attempt, error.message)
        reason = f"{error.dependency}_unavailable"
        if error.may_be_partial:
            return self._postponed(attempt, reason, error.message)
        return self._counted(attempt, error.dependency, reason, error.message)

    def try_again(self, attempt: Attempt, reason: str, message: str) -> Outcome:
        """Return the outcome of a counted attempt: a retry, if attempts and time are left."""
        match after_attempt(attempt.number, self._retry, attempt.deadline, self._clock.now()):
            case TryAgain(delay_s):
                return retried(attempt, delay_s, reason)
            case Exhausted():
                text = f"{attempt.number} attempts failed, the last one because {message}"
                return self._results.dead_lettered(attempt, ErrorCode.ATTEMPTS_EXHAUSTED, text)
            case TooLate():
                return self._too_late(attempt, message)

    def _postponed(self, attempt: Attempt, reason: str, message: str) -> Outcome:
        match after(self._retry.longest_delay_s, attempt.deadline, self._clock.now()):
            case TryAgain(delay_s):
                return postponed(attempt, delay_s, reason)
            case TooLate():
                return self._too_late(attempt, message)

    def _counted(self, attempt: Attempt, dependency: Dependency, reason: str, message: str) -> Outcome:
        outcome = self.try_again(attempt, reason, message)
        if not isinstance(outcome, Retried):
            self._end(dependency, attempt)
        return outcome

    def _end(self, dependency: Dependency, attempt: Attempt) -> None:
        self._detector.end_job(dependency, attempt.job_id or "")

    def _too_late(self, attempt: Attempt, message: str) -> Outcome:
        text = f"the deadline comes before the next attempt; the last one failed because {message}"
        return self._results.failed(attempt, ErrorCode.DEADLINE_EXCEEDED, text)

    def _patience_s(self, attempt: Attempt) -> float:
        """Return how long the diagnosis may take, so that a retry still comes before the deadline."""
        patience_s = attempt.time_left_s(self._clock.monotonic())
        if attempt.deadline is None:
            return patience_s
        until_deadline_s = (attempt.deadline - self._clock.now()).total_seconds()
        delay_s = self._retry.delay_s(attempt.number)
        return min(patience_s, until_deadline_s - delay_s - DEADLINE_SLACK_S)
