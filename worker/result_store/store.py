"""The result store: paid answers in S3, so that no worker pays for the same call again.

Each job has one object, named by a hash of its id and its whole request. Before the call, a worker creates
the object with a claim in it (`If-None-Match: *`). The answer then replaces the claim (`If-Match`). A worker
that finds another worker's claim waits for the answer while that worker is alive: each worker with claims
rewrites a heartbeat object every few seconds. A claim can have a draft in it: an answer that another call is
to repair. The worker that takes the claim over goes on with the draft.
"""

import asyncio
import re
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, TypeVar

import structlog

from worker.clock import Clock
from worker.errors import Dependency, DependencyDownError
from worker.observability import metrics
from worker.observability.logs import describe_exception
from worker.s3.conditional_store import ConditionalStore, StoredObject

log = structlog.get_logger(__name__)

T = TypeVar("T")

HEARTBEAT_S = 5.0
# A worker without a heartbeat for this long is dead, or cannot reach S3 to store its answer.
DEAD_AFTER_S = 20.0
# How often a waiting worker reads the object of another worker's job.
FIRST_POLL_S, MAX_POLL_S = 0.25, 2.0
# How often a job that waits for the store checks whether it may go on waiting.
ADMISSION_CHECK_S = 0.5
# How long to try to store an answer before it is published without being stored.
STORE_TIMEOUT_S = 10.0
STORE_RETRY_S = 1.0
# For giving up a claim or the heartbeat. What is left behind expires, or `tidy_up` deletes it.
RELEASE_TIMEOUT_S = 2.0

_NO_PRECONDITIONS = (
    "VQA_RESULT_STORE: this S3 ignores If-None-Match and If-Match, so two workers could pay for the same job:"
    " use another store, or none"
)
_CLAIM = re.compile(rb'\{"claimed_by": ?"([0-9a-f-]{36})"(?:, ?"draft": ?(.*))?\}', re.DOTALL)
# Holds the claim of a job that was released with a draft. It has no heartbeat.
_NOBODY = str(uuid.UUID(int=0))


class Lease:
    """The right to answer one job.

    Attributes:
        answer: the stored answer; None: the holder makes the call and then calls `put`.
        draft: a stored answer that the call is to repair; None: there is none.
        is_settled: whether an answer is stored.
    """

    def __init__(
        self, store: "ResultStore", name: str, etag: str, answer: bytes | None, draft: bytes | None
    ) -> None:
        self._store = store
        self.name = name
        self.etag = etag
        self.answer = answer
        self.draft = draft
        self.is_settled = answer is not None

    async def put(self, answer: bytes) -> bytes:
        """Store an answer; return it, or the one that another worker stored first.

        Never raises: an answer that cannot be stored is still paid for, and is published.
        """
        clock = self._store.clock
        ends = clock.monotonic() + STORE_TIMEOUT_S
        while True:
            try:
                stored = await self._store.put_once(self, answer)
            except DependencyDownError as error:
                if clock.monotonic() > ends:
                    _report_failed_write(error)
                    return answer
            except Exception as error:  # noqa: BLE001 - a bug must not lose a paid answer
                _report_failed_write(error)
                return answer
            else:
                self.is_settled = True
                return stored
            await clock.sleep(STORE_RETRY_S)

    async def put_draft(self, draft: bytes) -> bool:
        """Store an answer that another call is to repair; return whether it is stored. Never raises."""
        try:
            return await self._store.put_draft_once(self, draft)
        except Exception as error:  # noqa: BLE001 - a bug must not lose a paid answer
            _report_failed_write(error)
            return False


class ResultStore:
    """The answers in `VQA_RESULT_STORE`."""

    def __init__(self, objects: ConditionalStore, *, max_job_s: float, clock: Clock) -> None:
        """`max_job_s`: the longest time that a worker works on one delivery, `VQA_JOB_TIMEOUT`."""
        self.clock = clock
        self._objects = objects
        self._claim_expires_s = max_job_s + DEAD_AFTER_S
        self._id = str(uuid.uuid4())
        # The jobs that this worker holds; the event is set when the holder is done.
        self._held: dict[str, asyncio.Event] = {}
        # Jobs that are done here and whose claims may still exist.
        self._leftovers: set[str] = set()
        self._last_heartbeat = float("-inf")
        self._ensuring: asyncio.Task[None] | None = None
        self._is_verified = False

    async def find(self, name: str) -> bytes | None:
        """Return the stored answer of a job, or its draft, or None.

        Raises:
            DependencyDownError: the store is unreachable or refuses.
        """
        found = await self._objects.read(_job(name))
        claim = _CLAIM.fullmatch(found.body) if found is not None else None
        if found is None or (claim is not None and claim[2] is None):
            return None
        _count("reused")
        return found.body if claim is None else claim[2]

    @asynccontextmanager
    async def acquire(
        self, name: str, check_admission: Callable[[], None] = lambda: None
    ) -> AsyncIterator[Lease]:
        """Acquire the lease of a job; wait while another job or worker holds it.

        Args:
            name: the job's name in the store.
            check_admission: called while waiting; raises if the job must not wait any longer.

        Raises:
            DependencyDownError: the store is unreachable or refuses.
        """
        while (held := self._held.get(name)) is not None:
            await _while_admitted(held.wait(), check_admission)
        done = self._held[name] = asyncio.Event()
        try:
            # From here on the claim may exist, even if the request fails.
            self._leftovers.add(name)
            lease = await _while_admitted(self._claim(name, check_admission), check_admission)
            try:
                yield lease
            finally:
                await self._release(lease)
        finally:
            del self._held[name]
            done.set()

    async def send_heartbeats(self) -> None:
        """Show other workers that this one is alive while it holds claims; run until cancelled."""
        while True:
            await self.clock.sleep(HEARTBEAT_S)
            if self._held:
                with _log_unreachable():
                    await self._send_heartbeat()

    async def tidy_up(self) -> None:
        """Delete claims that could not be deleted at once; run until cancelled."""
        while True:
            await self.clock.sleep(HEARTBEAT_S)
            for name in self._leftovers - self._held.keys():
                with _log_unreachable():
                    await self._delete_leftover(name)

    async def close(self) -> None:
        """Delete the heartbeat, so that other workers take over remaining claims at once."""
        if self._ensuring is not None:
            self._ensuring.cancel()
        if self._last_heartbeat > float("-inf"):
            with suppress(DependencyDownError, TimeoutError):
                async with asyncio.timeout(RELEASE_TIMEOUT_S):
                    await self._objects.delete(_heartbeat(self._id))

    async def _claim(self, name: str, check_admission: Callable[[], None]) -> Lease:
        """Claim a job or find its answer; wait while another worker that is alive has it."""
        await self._ensure_alive()
        poll_s = FIRST_POLL_S
        while True:
            if (etag := await self._objects.create(_job(name), _claim_of(self._id))) is not None:
                return self._lease(name, etag, "claimed")
            found = await self._objects.read(_job(name))
            if found is not None:
                holder = _CLAIM.fullmatch(found.body)
                if holder is None:
                    return self._lease(name, found.etag, "reused", answer=found.body)
                if not await self._is_working(holder[1].decode(), found):
                    draft: bytes | None = holder[2]
                    etag = await self._objects.replace(_job(name), _claim_of(self._id, draft), found.etag)
                    if etag is not None:
                        return self._lease(name, etag, "taken_over", draft=draft)
            check_admission()
            if poll_s == FIRST_POLL_S:
                _count("waited")
            await self.clock.sleep(poll_s)
            poll_s = min(poll_s * 2, MAX_POLL_S)

    def _lease(
        self, name: str, etag: str, result: str, *, answer: bytes | None = None, draft: bytes | None = None
    ) -> Lease:
        _count(result)
        return Lease(self, name, etag, answer, draft)

    async def _is_working(self, holder: str, claim: StoredObject) -> bool:
        """Return whether the worker with a claim can still be working on the job."""
        if holder == self._id or claim.age_s > self._claim_expires_s:
            return False
        heartbeat = await self._objects.read(_heartbeat(holder))
        return heartbeat is not None and heartbeat.age_s <= DEAD_AFTER_S

    async def put_once(self, lease: Lease, answer: bytes) -> bytes:
        """Replace the claim by the answer, also if another worker has taken the claim over.

        Raises:
            DependencyDownError: it is unknown whether the answer is stored.
        """
        name, etag = _job(lease.name), lease.etag
        while await self._objects.replace(name, answer, etag) is None:
            found = await self._objects.read(name)
            if found is None:
                if await self._objects.create(name, answer) is not None:
                    break
            elif _CLAIM.fullmatch(found.body):
                etag = found.etag
            else:
                # From an earlier attempt of this worker, or from another worker: the first answer wins.
                _count("stored" if found.body == answer else "stored_by_another")
                return found.body
        _count("stored")
        return answer

    async def put_draft_once(self, lease: Lease, draft: bytes) -> bool:
        """Add a draft to the claim; return whether it is stored: not if another worker has the claim.

        Raises:
            DependencyDownError: it is unknown whether the draft is stored.
        """
        etag = await self._objects.replace(_job(lease.name), _claim_of(self._id, draft), lease.etag)
        if etag is None:
            return False
        lease.etag, lease.draft = etag, draft
        return True

    async def _release(self, lease: Lease) -> None:
        """Delete the claim of a job without an answer; one with a draft is left for any worker."""
        if lease.is_settled:
            self._leftovers.discard(lease.name)
            return
        with suppress(DependencyDownError, TimeoutError):
            async with asyncio.timeout(RELEASE_TIMEOUT_S):
                if lease.draft is None:
                    await self._objects.delete(_job(lease.name), lease.etag)
                else:
                    await self._objects.replace(_job(lease.name), _claim_of(_NOBODY, lease.draft), lease.etag)
            self._leftovers.discard(lease.name)

    async def _delete_leftover(self, name: str) -> None:
        """Delete a claim that was left behind, or release its draft, if it is this worker's and unused."""
        found = await self._objects.read(_job(name))
        claim = _CLAIM.fullmatch(found.body) if found is not None else None
        if found is not None and claim and claim[1] == self._id.encode() and name not in self._held:
            if claim[2] is None:
                await self._objects.delete(_job(name), found.etag)
            else:
                await self._objects.replace(_job(name), _claim_of(_NOBODY, claim[2]), found.etag)
        self._leftovers.discard(name)

    async def _ensure_alive(self) -> None:
        """Send a heartbeat if the last one is old; jobs that wait share one attempt and its failure."""
        if self._ensuring is None:
            if self._is_verified and self.clock.monotonic() - self._last_heartbeat < HEARTBEAT_S:
                return
            self._ensuring = asyncio.create_task(self._verify_or_send(), name="result-store-heartbeat")
            self._ensuring.add_done_callback(self._ensured)
        await asyncio.shield(self._ensuring)

    def _ensured(self, task: asyncio.Task[None]) -> None:
        self._ensuring = None
        if not task.cancelled():
            # Retrieved here, since all who waited may have left.
            task.exception()

    async def _verify_or_send(self) -> None:
        if self._is_verified:
            await self._send_heartbeat()
        else:
            await self._verify_store()

    async def _send_heartbeat(self) -> None:
        began = self.clock.monotonic()
        await self._objects.write(_heartbeat(self._id), b"")
        self._last_heartbeat = began

    async def _verify_store(self) -> None:
        """Check that the store supports preconditions: without them each job would look new."""
        await self._send_heartbeat()
        name = _heartbeat(self._id)
        if await self._objects.create(name, b"") or await self._objects.replace(name, b"", '"none"'):
            raise DependencyDownError(Dependency.RESULT_STORE, _NO_PRECONDITIONS)
        # Deleting claims is needed when a job fails; a missing right shows now, before a call is paid.
        await self._objects.delete(name)
        await self._send_heartbeat()
        self._is_verified = True


async def _while_admitted(waiting: Coroutine[Any, Any, T], check_admission: Callable[[], None]) -> T:
    """Await something; cancel it when `check_admission` raises."""
    task = asyncio.create_task(waiting)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=ADMISSION_CHECK_S)
            if not task.done():
                check_admission()
        return task.result()
    finally:
        task.cancel()


@contextmanager
def _log_unreachable() -> Iterator[None]:
    """Log that the store is unreachable, and go on."""
    try:
        yield
    except DependencyDownError as error:
        log.warning("result_store_unreachable", reason=error.message)


def _report_failed_write(error: Exception) -> None:
    _count("store_failed")
    if isinstance(error, DependencyDownError):
        log.error("result_store_write_failed", reason=error.message)
    else:
        log.error("result_store_write_failed", exception=describe_exception(error))


def _claim_of(holder: str, draft: bytes | None = None) -> bytes:
    if draft is None:
        return b'{"claimed_by": "%s"}' % holder.encode()
    return b'{"claimed_by": "%s", "draft": %s}' % (holder.encode(), draft)


def _job(name: str) -> str:
    return f"jobs/{name}"


def _heartbeat(worker: str) -> str:
    return f"workers/{worker}"


def _count(result: str) -> None:
    metrics.RESULT_STORE.labels(result).inc()
