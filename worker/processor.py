"""The use case: from one delivery to its outcome."""

import asyncio
from dataclasses import dataclass

import structlog

from worker.clock import Clock
from worker.errors import DependencyDownError, ErrorCode, JobError, RateLimitedError, TransientError
from worker.jobs.attempt import Attempt, observe_stages
from worker.jobs.cancellation import Cancellations
from worker.jobs.delivery import Delivery
from worker.jobs.outcome import Outcome
from worker.jobs.request import DeliveredTooOftenError, Request, RequestRules, make_request, read_job
from worker.jobs.results import Results, requeued
from worker.messages.decoding import InvalidJobError
from worker.model.answer import Answer
from worker.observability.logs import describe_exception
from worker.observability.tenants import Tenants
from worker.resilience.admission import Admission, Grant, ResultStore
from worker.resilience.calls import Calls, Images, ModelApi
from worker.resilience.concurrency_limiter import AdmissionClosedError, ConcurrencyLimiter
from worker.resilience.diagnostics import Diagnostics
from worker.resilience.failures import Failures
from worker.resilience.outage_detector import OutageDetector
from worker.resilience.retry_policy import RetryPolicy

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class World:
    """All that a job meets on its way.

    Attributes:
        job_timeout_s: for one attempt, from the delivery to its outcome (`VQA_JOB_TIMEOUT`).
    """

    images: Images
    model: ModelApi
    store: ResultStore | None
    limiter: ConcurrencyLimiter
    detector: OutageDetector
    diagnostics: Diagnostics
    cancellations: Cancellations
    tenants: Tenants
    results: Results
    rules: RequestRules
    retry: RetryPolicy
    job_timeout_s: float
    clock: Clock


class Processor:
    """Turn a delivery into an outcome. The caller publishes the outcome and settles the delivery."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._detector = world.detector
        self._clock = world.clock
        self._results = world.results
        self._admission = Admission(world.limiter, world.images, world.store, world.diagnostics, world.clock)
        self._calls = Calls(world.images, world.model, world.diagnostics, world.clock)
        self._failures = Failures(world.detector, world.diagnostics, world.retry, world.results, world.clock)

    async def process(self, delivery: Delivery, attempt: Attempt) -> Outcome:
        """Return the outcome of an attempt. Every error becomes one, a bug in the worker included."""
        attempt.ends_at = attempt.received + self._world.job_timeout_s
        try:
            request = self._decode(delivery, attempt)
            with self._world.cancellations.cancellable(attempt.job_id or ""):
                answer = await self._answer(request, attempt)
        except InvalidJobError as error:
            return self._results.invalid(attempt, error)
        except DeliveredTooOftenError as error:
            return self._results.dead_lettered(attempt, ErrorCode.ATTEMPTS_EXHAUSTED, str(error))
        except JobError as error:
            return self._results.failed(attempt, error.code, error.message)
        except AdmissionClosedError as error:
            return requeued(attempt, str(error))
        except DependencyDownError as error:
            return self._failures.after_unavailable(attempt, error)
        except TransientError as error:
            failure = error.without_traceback()
        except MemoryError:
            # It concerns the whole process, not this job.
            raise
        except Exception as error:  # noqa: BLE001 - a bug must neither lose the job nor retry it for ever
            return self._internal_error(attempt, error)
        else:
            return self._results.answered(attempt, answer)
        finally:
            observe_stages(attempt, self._clock.monotonic())
        # Outside of the `try`: its exception holds on to the images.
        return await self._failures.after_transient_error(attempt, failure)

    def _decode(self, delivery: Delivery, attempt: Attempt) -> Request:
        rules = self._world.rules
        job = read_job(delivery, attempt, rules)
        attempt.restore_attempts(self._detector.take_restored_attempts(attempt.job_id or ""))
        return make_request(job, delivery, attempt, rules, self._world.images.check)

    async def _answer(self, request: Request, attempt: Attempt) -> Answer:
        """Return the stored answer; without one, call the API until it answers, and store the answer."""
        try:
            async with self._admission(request, attempt) as grant:
                if grant.answer is not None:
                    return grant.answer
                while (answer := await self._call(request, attempt, grant)) is None:
                    observe_stages(attempt, self._clock.monotonic())
                    await self._admission.renew(grant)
                return await self._admission.store(grant, answer)
        except asyncio.CancelledError:
            if attempt.answer is None:
                raise
            # It is paid for: published, it is not paid for again.
            return attempt.answer

    async def _call(self, request: Request, attempt: Attempt, grant: Grant) -> Answer | None:
        """Fetch the images and call the API; return None if it limits the rate."""
        async with self._calls.open_images(request, attempt, grant.memory) as images:
            request.check_deadline(self._clock.now())
            if grant.slot.must_wait:
                return None
            try:
                answer = attempt.answer = await self._calls.ask(request, attempt, images)
            except RateLimitedError as error:
                grant.slot.rate_limited(error.retry_after_s)
                return None
        grant.slot.succeeded()
        self._world.tenants.paid(attempt.metadata, request.model, answer.usage)
        return answer

    def _internal_error(self, attempt: Attempt, error: Exception) -> Outcome:
        # The description leaves out the exception's text, which may quote the job.
        log.error("internal_error", job_id=attempt.job_id, exception=describe_exception(error))
        text = f"the worker failed: {type(error).__name__}"
        return self._failures.try_again(attempt, "internal_error", text)
