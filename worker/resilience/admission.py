"""Admission: a model request needs the job's lease, a slot and image memory, acquired in this order."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

import structlog
from structlog.contextvars import bound_contextvars

from worker.clock import TIMER_SLACK_S, Clock
from worker.errors import Dependency, DependencyDownError, JobError, NotAdmittedError
from worker.images.memory_budget import Reservation
from worker.images.source import ImageSource
from worker.jobs.attempt import Attempt
from worker.jobs.request import Request
from worker.model.answer import Answer, deserialize_answer, serialize_answer
from worker.resilience.concurrency_limiter import (
    ConcurrencyLimiter,
    ModelPausedError,
    Slot,
)
from worker.resilience.outage_reports import OutageReports

log = structlog.get_logger(__name__)

# A job without a slot for this long is requeued, so that another worker can take it.
MAX_SLOT_WAIT_S = 25.0
# How long to look for the stored answer of a job past its deadline.
STORED_ANSWER_TIMEOUT_S = 5.0

_NO_SLOT = f"no free slot within {MAX_SLOT_WAIT_S:g} s, or half of VQA_JOB_TIMEOUT"
_NO_MEMORY = "no memory for the images within half of VQA_JOB_TIMEOUT"
_NO_LEASE = "another worker still has the same job after half of VQA_JOB_TIMEOUT"


class Lease(Protocol):
    """The right to answer one job.

    Attributes:
        answer: the stored answer, if there is one.
        draft: a stored answer that another request is to repair.
        is_settled: whether an answer is stored.
    """

    answer: bytes | None
    draft: bytes | None
    is_settled: bool

    async def put(self, answer: bytes) -> bytes:
        """Store an answer; return it, or the one that another worker stored first."""

    async def put_draft(self, draft: bytes) -> bool:
        """Store an answer that another request is to repair; return whether it is stored."""


class ResultStore(Protocol):
    """Stored answers."""

    async def find(self, name: str) -> bytes | None:
        """Return a job's stored answer, if there is one; no lease is needed."""

    def acquire(self, name: str, check_admission: Callable[[], None]) -> AbstractAsyncContextManager[Lease]:
        """Acquire the job's lease; wait while another job or worker holds it."""


class ImageMemory(Protocol):
    """The memory budget for images."""

    def reserve(self, images: Sequence[ImageSource]) -> AbstractAsyncContextManager[Reservation]:
        """Wait for memory for the images of a model request, and hold it."""


@dataclass(slots=True, eq=False)
class Grant:
    """The right to send one model request, or the stored answer instead.

    Attributes:
        answer: the job's stored answer; None if a model request is needed.
        draft: the job's stored answer that this request is to repair.
        lease: the right to answer the job; None without a result store.
        slot: the concurrency slot; `memory`: the image memory reservation. Set if a model request is needed.
        slot_until: until when to wait for a slot, in seconds of the monotonic clock; `until`: for anything.
        per_request: holds the slot and the memory.
    """

    request: Request
    attempt: Attempt
    answer: Answer | None = None
    draft: Answer | None = None
    lease: Lease | None = None
    slot: Slot = field(init=False)
    memory: Reservation = field(init=False)
    slot_until: float = float("inf")
    until: float = float("inf")
    per_request: AsyncExitStack = field(default_factory=AsyncExitStack)


class Admission:
    """Admit model requests: `async with admission.admit(request, attempt) as grant`.

    The waits end after half of the attempt's time. The other half is for the model request: one that starts
    later could be cancelled although it is billed.
    """

    def __init__(
        self,
        limiter: ConcurrencyLimiter,
        images: ImageMemory,
        store: ResultStore | None,
        outage_reports: OutageReports,
        clock: Clock,
    ) -> None:
        self._limiter = limiter
        self._images = images
        self._store = store
        self._outage_reports = outage_reports
        self._clock = clock

    @asynccontextmanager
    async def admit(self, request: Request, attempt: Attempt) -> AsyncIterator[Grant]:
        """Hold lease, slot and memory; release them in the reverse order.

        Raises:
            NotAdmittedError: the worker is paused or stopping, or the wait timed out.
            ModelPausedError: only the job's model is paused.
            DependencyDownError: the result store is unreachable or denies access.
            JobError: the deadline passed, or passes before the end of the model's backoff.
        """
        grant = Grant(request, attempt)
        attempt.enter("wait", self._clock.monotonic())
        async with AsyncExitStack() as held:
            # For the log lines of the result store.
            held.enter_context(bound_contextvars(job_id=attempt.job_id))
            await self._lease_or_answer(held, grant)
            attempt.is_stored = grant.answer is not None
            if grant.answer is None:
                grant.slot_until = self._clock.monotonic() + MAX_SLOT_WAIT_S
                grant.until = _half(attempt)
                # `readmit` closes and refills this stack; leaving `admit` closes it.
                await held.enter_async_context(grant.per_request)
                await self._slot_and_memory(grant)
            yield grant

    async def readmit(self, grant: Grant, *, is_new: bool = False, keeps_slot: bool = False) -> None:
        """Release the slot and the memory and wait for them again, for another model request.

        Args:
            grant: of the model request before.
            is_new: the next request is another one: it may wait as long as the first, within half of the
                time that is left. The first can have taken minutes.
            keeps_slot: only wait for memory, so that a worker that shuts down finishes a billed job.

        Raises:
            NotAdmittedError, JobError: see `admit`.
        """
        now = self._clock.monotonic()
        if is_new:
            grant.slot_until, grant.until = now + MAX_SLOT_WAIT_S, (now + grant.attempt.ends_at) / 2
        grant.attempt.enter("wait", now)
        if keeps_slot:
            grant.memory.release()
            await self._memory(grant)
            grant.slot.restart()
        else:
            await grant.per_request.aclose()
            await self._slot_and_memory(grant)

    async def store(self, grant: Grant, answer: Answer) -> Answer:
        """Store a billed answer; return it, or the one that another worker stored first."""
        if grant.lease is None:
            return answer
        grant.attempt.enter("store", self._clock.monotonic())
        with_images = replace(answer, images=grant.attempt.images)
        stored = deserialize_answer(await grant.lease.put(serialize_answer(with_images)))
        grant.attempt.is_stored = grant.lease.is_settled and stored is not None
        return stored or with_images

    async def store_draft(self, grant: Grant, draft: Answer) -> bool:
        """Store a billed answer that is to be repaired; return whether another worker can go on with it."""
        if grant.lease is None:
            return False
        grant.attempt.enter("store", self._clock.monotonic())
        return await grant.lease.put_draft(serialize_answer(draft))

    async def _lease_or_answer(self, held: AsyncExitStack, grant: Grant) -> None:
        """Acquire the job's lease, or find its stored answer; past its deadline, only the latter."""
        if self._store is None:
            grant.request.check_deadline(self._clock.now())
            return
        try:
            grant.request.check_deadline(self._clock.now())
            grant.lease = await self._acquire(self._store, held, grant)
        except JobError:
            # The deadline has passed; a stored answer is still published.
            grant.answer = await self._find(self._store, grant.request)
            if grant.answer is None:
                raise
            return
        if grant.lease.answer is not None:
            grant.answer = deserialize_answer(grant.lease.answer)
        elif grant.lease.draft is not None:
            grant.draft = deserialize_answer(grant.lease.draft)

    async def _acquire(self, store: ResultStore, held: AsyncExitStack, grant: Grant) -> Lease:
        request, started = grant.request, self._clock.monotonic()
        self._limiter.check(allow_probe=True)
        async with self._until(_half(grant.attempt), request, _NO_LEASE):
            lease = await held.enter_async_context(store.acquire(request.store_key, self._limiter.check))
        self._outage_reports.report_success(Dependency.RESULT_STORE, grant.attempt.decoded_job_id, started)
        return lease

    async def _find(self, store: ResultStore, request: Request) -> Answer | None:
        """Return the answer to an earlier delivery, if the store returns it in time."""
        try:
            async with self._clock.timeout(STORED_ANSWER_TIMEOUT_S):
                stored = await store.find(request.store_key)
        except (DependencyDownError, TimeoutError) as error:
            log.warning("result_store_unreachable", reason=str(error) or "timeout")
            return None
        return deserialize_answer(stored) if stored is not None else None

    async def _slot_and_memory(self, grant: Grant) -> None:
        request = grant.request
        if not self._outage_reports.may_request(request.model):
            raise ModelPausedError(f"the model {request.model} is paused")
        try:
            async with self._until(min(grant.until, grant.slot_until), request, _NO_SLOT):
                grant.slot = await grant.per_request.enter_async_context(self._limiter.slot(request.model))
        except NotAdmittedError:
            request.check_deadline(self._clock.now(), in_s=self._limiter.backoff_left_s(request.model))
            raise
        await self._memory(grant)

    async def _memory(self, grant: Grant) -> None:
        request = grant.request
        async with self._until(grant.until, request, _NO_MEMORY):
            memory = self._images.reserve(request.images)
            grant.memory = await grant.per_request.enter_async_context(memory)
        request.check_deadline(self._clock.now())

    @asynccontextmanager
    async def _until(self, moment: float, request: Request, reason: str) -> AsyncIterator[None]:
        """Wait for something until a moment of the monotonic clock, or until the job's deadline.

        Raises:
            NotAdmittedError: the moment is past; `reason` says what was waited for.
            JobError: the deadline is past.
        """
        left_s = moment - self._clock.monotonic()
        if left_s <= 0:
            raise NotAdmittedError(reason)
        if request.deadline is not None:
            left_s = min(left_s, (request.deadline - self._clock.now()).total_seconds() + TIMER_SLACK_S)
        try:
            async with self._clock.timeout(left_s):
                yield
        except TimeoutError:
            request.check_deadline(self._clock.now())
            raise NotAdmittedError(reason) from None


def _half(attempt: Attempt) -> float:
    """Return the moment when half of the attempt's time is over."""
    return (attempt.received_at + attempt.ends_at) / 2
