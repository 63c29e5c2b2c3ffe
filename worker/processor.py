"""Process one delivery: decode, admit, send the model request, map errors to an outcome."""

import asyncio
from dataclasses import dataclass

import structlog

from vqa_worker.messages.decoding import InvalidJobError
from vqa_worker.messages.error_codes import ErrorCode
from vqa_worker.messages.result import Usage
from worker.clock import Clock
from worker.errors import (
    MALFORMED_RESPONSE,
    DependencyDownError,
    Explanation,
    JobError,
    NotAdmittedError,
    RateLimitedError,
    TransientError,
)
from worker.jobs.answer_checks import checked, with_schema
from worker.jobs.attempt import Attempt, observe_stages
from worker.jobs.cancellation import CancelledJobs
from worker.jobs.delivery import Delivery
from worker.jobs.outcome import Outcome
from worker.jobs.outcome_builder import OutcomeBuilder
from worker.jobs.request import DeliveredTooOftenError, Request, RequestRules, check_job, decompress, read_job
from worker.model.answer import Answer
from worker.observability.logs import describe_exception
from worker.observability.tenants import Tenants
from worker.resilience.admission import Admission, Grant, ResultStore
from worker.resilience.concurrency_limiter import ConcurrencyLimiter
from worker.resilience.failure_outcomes import FailureOutcomes
from worker.resilience.model_requests import Images, ModelApi, ModelRequests
from worker.resilience.outage_detector import OutageDetector
from worker.resilience.outage_reports import OutageReports
from worker.resilience.repairs import Repairs
from worker.resilience.retry_policy import RetryPolicy

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ProcessorDependencies:
    """The processor's collaborators and settings; `job_timeout_s` is for one attempt (`VQA_JOB_TIMEOUT`)."""

    images: Images
    model: ModelApi
    store: ResultStore | None
    limiter: ConcurrencyLimiter
    detector: OutageDetector
    outage_reports: OutageReports
    cancelled_jobs: CancelledJobs
    tenants: Tenants
    outcomes: OutcomeBuilder
    rules: RequestRules
    retry: RetryPolicy
    job_timeout_s: float
    clock: Clock


class Processor:
    """Turn a delivery into an outcome. The caller publishes the outcome and settles the delivery."""

    def __init__(self, deps: ProcessorDependencies) -> None:
        self._deps = deps
        reports, clock = deps.outage_reports, deps.clock
        self._admission = Admission(deps.limiter, deps.images, deps.store, reports, clock)
        self._requests = ModelRequests(deps.images, deps.model, reports, clock)
        self._repairs = Repairs(self._admission, deps.outcomes)
        self._failures = FailureOutcomes(deps.detector, reports, deps.retry, deps.outcomes, clock)

    async def process(self, delivery: Delivery, attempt: Attempt) -> Outcome:
        """Return the outcome of an attempt. Unexpected exceptions become retries.

        Raises:
            MemoryError, CancelledError: they concern the worker, not the job.
        """
        attempt.ends_at = attempt.received_at + self._deps.job_timeout_s
        return self._repairs.after_failure(attempt, await self._process(delivery, attempt))

    async def _process(self, delivery: Delivery, attempt: Attempt) -> Outcome:
        try:
            request = await self._decode(delivery, attempt)
            with self._deps.cancelled_jobs.cancellable(attempt.decoded_job_id):
                answer = await self._answer(request, attempt)
        except InvalidJobError as error:
            return self._deps.outcomes.invalid(attempt, error)
        except DeliveredTooOftenError as error:
            return self._deps.outcomes.dead_lettered(
                attempt, ErrorCode.ATTEMPTS_EXHAUSTED, Explanation.loggable(str(error))
            )
        except JobError as error:
            self._record_unusable(attempt, error.usage)
            return self._deps.outcomes.failed(attempt, error.code, error.explanation)
        except NotAdmittedError as error:
            return self._failures.after_refused_admission(attempt, error)
        except DependencyDownError as error:
            return self._failures.after_unavailable(attempt, error)
        except TransientError as error:
            self._record_unusable(attempt, error.usage)
            attempt.has_bought_malformed = error.reason == MALFORMED_RESPONSE and error.usage is not None
            failure = error.without_traceback()
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - a bug must neither lose the job nor retry it for ever
            return self._internal_error(attempt, error)
        else:
            return self._deps.outcomes.for_answer(attempt, answer)
        finally:
            observe_stages(attempt, self._deps.clock.monotonic())
        # After the `try`, so that the traceback no longer keeps the images in memory.
        return await self._failures.after_transient_error(attempt, failure)

    async def _decode(self, delivery: Delivery, attempt: Attempt) -> Request:
        delivery = await decompress(delivery, attempt, self._deps.rules)
        job = read_job(delivery, attempt, self._deps.rules)
        attempt.restore_attempts(self._deps.detector.take_restored_attempts(attempt.decoded_job_id))
        request = check_job(job, delivery, attempt, self._deps.rules, self._deps.images.check)
        return await with_schema(request, job.params or {}, self._deps.rules)

    async def _answer(self, request: Request, attempt: Attempt) -> Answer:
        """Return the stored answer; without one, send the model request and store its answer."""
        try:
            async with self._admission.admit(request, attempt) as grant:
                if grant.answer is not None:
                    return grant.answer
                step = self._repairs.resume(request, grant)
                while isinstance(step, Request):
                    request, step = step, await self._send_request(step, attempt, grant)
                    if isinstance(step, Request):
                        # Rate-limited: release slot and memory, and wait. A repair keeps the slot.
                        observe_stages(attempt, self._deps.clock.monotonic())
                        is_new, is_repair = step is not request, step.draft is not request.draft
                        await self._admission.readmit(grant, is_new=is_new, keeps_slot=is_repair)
                return await self._admission.store(grant, step)
        except asyncio.CancelledError:
            if attempt.answer is None or attempt.can_resume:
                raise
            # The answer is billed: publish it. Requeueing the job would bill it again.
            attempt.draft = None
            return checked(request, attempt.answer)

    async def _send_request(self, request: Request, attempt: Attempt, grant: Grant) -> Answer | Request:
        """Open the images and send the model request; return the answer, or the request to send next.

        There is one if this one is rate-limited, or if the answer does not satisfy the job's JSON schema.
        """
        async with self._requests.open_images(request, attempt, grant.memory) as images:
            request.check_deadline(self._deps.clock.now())
            if grant.slot.must_wait:
                return request
            try:
                answer = await self._requests.send(request, attempt, images)
                self._repairs.received(request, answer, attempt)
            except RateLimitedError as error:
                if error.concerns_tier and request.fallback is not None:
                    return request.fallback
                grant.slot.rate_limited(error)
                return request
        grant.slot.succeeded()
        self._deps.tenants.billed(attempt.metadata, request.model, answer.usage)
        return await self._repairs.after_answer(request, grant)

    def _record_unusable(self, attempt: Attempt, usage: Usage | None) -> None:
        """Record the usage of an answer that cannot be used, and was billed all the same."""
        if usage is not None:
            attempt.unusable = usage if attempt.unusable is None else attempt.unusable + usage
            self._deps.tenants.billed(attempt.metadata, attempt.model, usage)

    def _internal_error(self, attempt: Attempt, error: Exception) -> Outcome:
        # The description leaves out the exception's text, which may quote the job.
        log.error("internal_error", job_id=attempt.job_id, exception=describe_exception(error))
        why = Explanation.loggable(f"internal error: {type(error).__name__}")
        return self._failures.after_counted_failure(attempt, "internal_error", why)
