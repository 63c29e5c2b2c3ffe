"""The result store: answers that were paid for, kept in S3 so that no worker asks a second time.

Each job has one object, named by a hash of its id and its whole request. Before the call the worker writes a
claim there, on the condition that nothing is there yet; the answer then takes the claim's place, on the
condition that it is still this claim. Who finds a claim waits for its holder, as long as that one lives:
every worker that holds claims rewrites an object of its own every few seconds.
"""

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

import structlog

from worker.errors import Dependency, DependencyDownError
from worker.observability import metrics
from worker.observability.logs import describe_exception
from worker.s3.conditional_store import ConditionalStore, StoredObject

log = structlog.get_logger(__name__)

BEAT_S = 5.0
# A holder that missed so many seconds' beats is dead, or cut off from S3 and unable to keep its answer.
DEAD_AFTER_S = 20.0
# How often a worker looks whether another one's answer has come.
FIRST_LOOK_S, LONGEST_LOOK_S = 0.25, 2.0
# How long to try to keep an answer before it is published all the same.
KEEP_FOR_S = 10.0
KEEP_PAUSE_S = 1.0

_HEEDLESS = (
    "VQA_RESULT_STORE: this S3 does not heed If-None-Match and If-Match, without which two workers would pay"
    " for one job: name another store, or none"
)
_CLAIM = re.compile(rb'\{"claimed_by": ?"([0-9a-f-]{36})"\}')


class Lease:
    """A job's place in the store.

    Attributes:
        answer: what is kept there already; None: the job is the holder's to ask, and `keep` is to be called.
        is_settled: whether an answer is there now.
    """

    def __init__(self, store: "ResultStore", name: str, etag: str, answer: bytes | None) -> None:
        self._store = store
        self.name = name
        self.etag = etag
        self.answer = answer
        self.is_settled = answer is not None

    async def keep(self, answer: bytes) -> bytes:
        """Keep an answer; returns it, or the one that another worker has kept meanwhile.

        It never fails: an answer that cannot be kept is still paid for and wanted.
        """
        ends = time.monotonic() + KEEP_FOR_S
        while True:
            try:
                kept = await self._store.keep_once(self, answer)
            except DependencyDownError as error:
                if time.monotonic() > ends:
                    _count("not_kept")
                    log.error("result_store_write_failed", reason=error.message)  # noqa: TRY400 - the reason says it all
                    return answer
            except Exception as error:  # noqa: BLE001 - a bug must not lose what was paid for
                _count("not_kept")
                log.error("result_store_write_failed", exception=describe_exception(error))  # noqa: TRY400
                return answer
            else:
                self.is_settled = True
                return kept
            await asyncio.sleep(KEEP_PAUSE_S)


class ResultStore:
    """The answers in `VQA_RESULT_STORE`."""

    def __init__(self, objects: ConditionalStore, *, claims_last_s: float) -> None:
        """`claims_last_s`: the longest that a worker can be at one job, `VQA_JOB_TIMEOUT`."""
        self._objects = objects
        self._claims_last_s = claims_last_s + DEAD_AFTER_S
        self._id = str(uuid.uuid4())
        # The jobs that this worker holds, and who waits here for their end.
        self._held: dict[str, asyncio.Event] = {}
        # Jobs that ended here and whose claims may still stand there.
        self._leftovers: set[str] = set()
        self._beaten_at = float("-inf")
        self._beating = asyncio.Lock()
        self._is_tried = False

    @property
    def _mark(self) -> bytes:
        return b'{"claimed_by": "%s"}' % self._id.encode()

    @asynccontextmanager
    async def claimed(self, name: str, may_wait: Callable[[], None] = lambda: None) -> AsyncIterator[Lease]:
        """The place of the job that `name` stands for; waits while anybody else is at the same job.

        `may_wait` is asked each time before it waits for another worker, and raises if it must not.

        Raises:
            DependencyDownError: the store is out of reach, or refuses the worker.
        """
        while (held := self._held.get(name)) is not None:
            await held.wait()
        ended = self._held[name] = asyncio.Event()
        try:
            # Until it has been released, it may stand there, whatever comes between.
            self._leftovers.add(name)
            claim = await self._claim(name, may_wait)
            try:
                yield claim
            finally:
                await self._release(claim)
        finally:
            del self._held[name]
            ended.set()

    async def beat(self) -> None:
        """Show that this worker lives while it holds claims; until cancelled."""
        while True:
            await asyncio.sleep(BEAT_S)
            if self._held:
                with _said():
                    await self._beat()

    async def tidy_up(self) -> None:
        """Give up the claims that were left behind; until cancelled."""
        while True:
            await asyncio.sleep(BEAT_S)
            for name in self._leftovers - self._held.keys():
                with _said():
                    await self._give_up(name)

    async def close(self) -> None:
        """Let others have at once what this worker still claims, if anything."""
        if self._beaten_at > float("-inf"):
            with suppress(DependencyDownError):
                await self._objects.delete(_life(self._id))

    async def _claim(self, name: str, may_wait: Callable[[], None]) -> Lease:
        """Claim a job, or find its answer; waits while another worker that lives has it."""
        await self._be_alive()
        look_s = FIRST_LOOK_S
        while True:
            if (etag := await self._objects.create(_job(name), self._mark)) is not None:
                return self._taken(name, etag, "claimed")
            found = await self._objects.read(_job(name))
            if found is not None:
                holder = _CLAIM.fullmatch(found.body)
                if holder is None:
                    return self._taken(name, found.etag, "reused", answer=found.body)
                if not await self._is_at_it(holder[1].decode(), found):
                    etag = await self._objects.replace(_job(name), self._mark, found.etag)
                    if etag is not None:
                        return self._taken(name, etag, "taken_over")
            may_wait()
            if look_s == FIRST_LOOK_S:
                _count("waited")
            await asyncio.sleep(look_s)
            look_s = min(look_s * 2, LONGEST_LOOK_S)

    def _taken(self, name: str, etag: str, how: str, *, answer: bytes | None = None) -> Lease:
        _count(how)
        return Lease(self, name, etag, answer)

    async def _is_at_it(self, holder: str, claim: StoredObject) -> bool:
        """Whether the holder of a claim can still be at the job."""
        if holder == self._id or claim.age_s > self._claims_last_s:
            return False
        life = await self._objects.read(_life(holder))
        return life is not None and life.age_s <= DEAD_AFTER_S

    async def keep_once(self, claim: Lease, answer: bytes) -> bytes:
        """Put the answer in the place of the claim, or of the claim of who has taken the job over.

        Raises:
            DependencyDownError: it cannot be told whether it was.
        """
        name, etag = _job(claim.name), claim.etag
        while await self._objects.replace(name, answer, etag) is None:
            found = await self._objects.read(name)
            if found is None:
                if await self._objects.create(name, answer) is not None:
                    break
            elif _CLAIM.fullmatch(found.body):
                etag = found.etag
            else:
                # An earlier try of this worker's own, or another one's answer: who comes first is right.
                _count("kept" if found.body == answer else "kept_by_another")
                return found.body
        _count("kept")
        return answer

    async def _release(self, claim: Lease) -> None:
        """Leave a job to others, if it has no answer."""
        if claim.is_settled:
            self._leftovers.discard(claim.name)
            return
        with suppress(DependencyDownError):
            await self._objects.delete(_job(claim.name), claim.etag)
            self._leftovers.discard(claim.name)

    async def _give_up(self, name: str) -> None:
        """Take away a claim that was left behind, if it is this worker's, and the job is not back."""
        found = await self._objects.read(_job(name))
        if found is not None and found.body == self._mark and name not in self._held:
            await self._objects.delete(_job(name), found.etag)
        self._leftovers.discard(name)

    async def _be_alive(self) -> None:
        """Others must not take a claim for a dead worker's."""
        async with self._beating:
            if not self._is_tried:
                await self._try_out()
            if time.monotonic() - self._beaten_at >= BEAT_S:
                await self._beat()

    async def _beat(self) -> None:
        began = time.monotonic()
        await self._objects.write(_life(self._id), b"")
        self._beaten_at = began

    async def _try_out(self) -> None:
        """See that the store heeds conditions, for else every job would look new."""
        await self._beat()
        name = _life(self._id)
        if await self._objects.create(name, b"") or await self._objects.replace(name, b"", '"none"'):
            raise DependencyDownError(Dependency.RESULT_STORE, _HEEDLESS)
        # The right to take claims away is needed as soon as a job fails; better to be told of it now.
        await self._objects.delete(name)
        await self._beat()
        self._is_tried = True


@contextmanager
def _said() -> Iterator[None]:
    """Say that the store is out of reach, and go on."""
    try:
        yield
    except DependencyDownError as error:
        log.warning("result_store_unreachable", reason=error.message)


def _job(name: str) -> str:
    return f"jobs/{name}"


def _life(worker: str) -> str:
    return f"workers/{worker}"


def _count(event: str) -> None:
    metrics.RESULT_STORE.labels(event).inc()
