"""What becomes of a job whose attempt failed: an outage's victim, or in trouble of its own."""

import time
from datetime import UTC, datetime

from worker.errors import DependencyDownError, ErrorCode, TransientError
from worker.jobs.attempt import Attempt
from worker.jobs.outcome import Outcome, Retried
from worker.jobs.results import Results, postponed, requeued, retried
from worker.resilience.concurrency_limiter import ConcurrencyLimiter
from worker.resilience.outage_detector import ALONE_S, VERDICT_S, Health, Verdict
from worker.resilience.retry_policy import Exhausted, RetryPolicy, TooLate, TryAgain, after, after_attempt

# Event loops fire timers some milliseconds early: what must not come too late, ends a little sooner.
DEADLINE_SLACK_S = 0.02


class Failures:
    """Tells failures of one job from failures of everybody, and decides what follows."""

    def __init__(
        self, gate: ConcurrencyLimiter, health: Health, retry: RetryPolicy, results: Results
    ) -> None:
        self._gate = gate
        self._health = health
        self._retry = retry
        self._results = results

    async def after_fault(self, attempt: Attempt, error: TransientError) -> Outcome:
        """Tell the job's own trouble from an outage, and decide what follows."""
        job_id, failed_at = attempt.job_id or "", time.monotonic()
        if error.forbidden and self._health.is_forbidden_alone(error.dependency, job_id, failed_at):
            self._health.ended(error.dependency, job_id)
            return self._results.failed(attempt, ErrorCode.MODEL_REJECTED, error.message)
        verdict = await self._verdict(attempt, error, failed_at)
        if verdict is Verdict.DOWN:
            return requeued(attempt, f"{error.dependency} is down")
        if verdict is Verdict.OPEN:
            self._health.counted(error.dependency, job_id, failed_at)
        elif error.forbidden:
            return self._results.failed(attempt, ErrorCode.MODEL_REJECTED, error.message)
        return self._counted(attempt, error, error.reason)

    def after_refusal(self, attempt: Attempt, error: DependencyDownError) -> Outcome:
        """Give the job back while the dependency is down.

        If it is down for this job only, that counts, unless it can be so for one bucket or one model: then
        the job waits at the broker until somebody puts that right, and loses no attempt by it.
        """
        verdict = Verdict.OPEN
        if not error.is_duplicate:
            verdict = self._health.refused_everybody(
                error.dependency,
                attempt.job_id or "",
                error.message,
                time.monotonic(),
                others=self._gate.in_flight,
                may_be_partial=error.may_be_partial,
            )
        if verdict is Verdict.OWN and error.may_be_partial:
            return self._put_off(attempt, error)
        if verdict is Verdict.OWN:
            return self._counted(attempt, error, f"{error.dependency}_unavailable")
        return requeued(attempt, error.message)

    def try_again(self, attempt: Attempt, reason: str, message: str) -> Outcome:
        """Another attempt, if there is one left and time for it."""
        match after_attempt(attempt.number, self._retry, attempt.deadline, datetime.now(UTC)):
            case TryAgain(delay_s):
                return retried(attempt, delay_s, reason)
            case Exhausted():
                text = f"{attempt.number} attempts failed, the last one because {message}"
                return self._results.dead_lettered(attempt, ErrorCode.ATTEMPTS_EXHAUSTED, text)
            case TooLate():
                return self._too_late(attempt, message)

    def _put_off(self, attempt: Attempt, error: DependencyDownError) -> Outcome:
        match after(self._retry.longest_delay_s, attempt.deadline, datetime.now(UTC)):
            case TryAgain(delay_s):
                return postponed(attempt, delay_s, f"{error.dependency}_unavailable")
            case TooLate():
                return self._too_late(attempt, error.message)

    def _counted(self, attempt: Attempt, error: TransientError | DependencyDownError, reason: str) -> Outcome:
        """The attempt counts; if it was the last, the job is no more that could tell of an outage."""
        outcome = self.try_again(attempt, reason, error.message)
        if not isinstance(outcome, Retried):
            self._health.ended(error.dependency, attempt.job_id or "")
        return outcome

    async def _verdict(self, attempt: Attempt, error: TransientError, failed_at: float) -> Verdict:
        """Whose trouble a failure was; where others call too, what they meet is waited for."""
        attempt.enter("diagnose", time.monotonic())
        others, verdict = self._gate.in_flight, Verdict.OPEN
        if not error.is_duplicate:
            verdict = self._health.failed(
                error.dependency, attempt.job_id or "", error.reason, failed_at, others=others
            )
        if verdict is not Verdict.OPEN:
            return verdict
        is_alone = not others and not self._health.has_suspects(error.dependency)
        patience_s = self._patience_s(attempt, ALONE_S if is_alone else VERDICT_S)
        return await self._health.verdict(error.dependency, failed_at, patience_s)

    def _patience_s(self, attempt: Attempt, most_s: float) -> float:
        """How long a job that failed may wait for a verdict: a retry must not come too late by that."""
        patience_s = min(most_s, attempt.time_left_s(time.monotonic()))
        if attempt.deadline is None:
            return patience_s
        until_deadline_s = (attempt.deadline - datetime.now(UTC)).total_seconds()
        return min(patience_s, until_deadline_s - self._retry.delay_s(attempt.number) - DEADLINE_SLACK_S)

    def _too_late(self, attempt: Attempt, message: str) -> Outcome:
        text = f"the deadline comes before the next attempt; the last one failed because {message}"
        return self._results.failed(attempt, ErrorCode.DEADLINE_EXCEEDED, text)
