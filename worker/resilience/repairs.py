"""Repairs: further model requests for an answer that does not satisfy its job's JSON schema."""

import asyncio

from worker.jobs.answer_checks import checked, received, repair_of
from worker.jobs.attempt import Attempt
from worker.jobs.outcome import Outcome, Requeued, Retried, Succeeded
from worker.jobs.outcome_builder import OutcomeBuilder
from worker.jobs.request import Request
from worker.model.answer import Answer
from worker.observability import metrics
from worker.resilience.admission import Admission, Grant


class Repairs:
    """Check answers, and decide what follows an answer, or the failure of a repair."""

    def __init__(self, admission: Admission, outcomes: OutcomeBuilder) -> None:
        self._admission = admission
        self._outcomes = outcomes

    def resume(self, request: Request, grant: Grant) -> Answer | Request:
        """Return the request to begin with: a repair, if the result store has an answer that needs one."""
        attempt, draft = grant.attempt, grant.draft
        if draft is None:
            return request
        attempt.answer = draft
        repair = repair_of(request, draft)
        if repair is None:
            return draft
        attempt.draft, attempt.can_resume = draft, True
        return repair

    def received(self, request: Request, answer: Answer, attempt: Attempt) -> None:
        """Record an answer: from here on, a cancelled job ends with it, and no longer with a draft."""
        attempt.answer = received(request, answer)
        attempt.draft, attempt.can_resume = None, False

    async def after_answer(self, request: Request, grant: Grant) -> Answer | Request:
        """Check the answer and return it, or store it and return the request that repairs it."""
        attempt = grant.attempt
        answer = attempt.answer
        assert answer is not None  # noqa: S101 - for the type checker: see `received`
        if request.schema is not None:
            # In a thread: a long answer takes longer than the event loop may be blocked.
            answer = attempt.answer = await asyncio.to_thread(checked, request, answer)
        if request.draft is not None:
            _count(attempt, is_repaired=answer.checked is not None and answer.checked.errors is None)
        repair = repair_of(request, answer)
        if repair is None:
            return answer
        attempt.can_resume = await self._admission.store_draft(grant, answer)
        attempt.draft = answer
        return repair

    def after_failure(self, attempt: Attempt, outcome: Outcome) -> Outcome:
        """Return the outcome of an attempt that ended without an answer, or whose repair failed.

        The answer that was to be repaired is billed. Unless another attempt can go on with it, it is the
        outcome.
        """
        if attempt.draft is None or isinstance(outcome, Succeeded):
            return outcome
        if attempt.can_resume and isinstance(outcome, Retried | Requeued):
            return outcome
        _count(attempt, is_repaired=False)
        return self._outcomes.for_answer(attempt, attempt.draft, repair_failure=outcome.reason)


def _count(attempt: Attempt, *, is_repaired: bool) -> None:
    result = "repaired" if is_repaired else "failed"
    metrics.series(metrics.SCHEMA_REPAIRS, attempt.model, result).inc()
