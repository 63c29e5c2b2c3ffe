"""One read of an object for all jobs that want it at the same time: a batch of questions on one page."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from worker.errors import DependencyDownError, TransientError
from worker.images.memory_budget import MemoryBudget, Reservation
from worker.s3.aws import S3Object
from worker.s3.client import ObjectStream

Open = Callable[[S3Object], Awaitable[ObjectStream]]


class CoalescedReads:
    """Opens objects; those who ask for the same one while it is being opened read it together.

    What one of them has not read yet is kept for it, at most the whole object, and only if the budget has
    room for that at once: if not, each reads for itself. Readers have shares of `own_bytes` of their own.
    """

    def __init__(self, open_: Open, budget: MemoryBudget, *, own_bytes: int) -> None:
        self._open = open_
        self._budget = budget
        self._own_bytes = own_bytes
        self._opening: dict[S3Object, _Joint] = {}

    async def open(self, source: S3Object) -> ObjectStream:
        """Begin to read an object.

        Raises:
            JobError, TransientError, DependencyDownError: as the function that opens it.
        """
        joint = self._opening.get(source)
        if joint is None:
            joint = self._opening[source] = _Joint()
            await self._begin(source, joint)
        else:
            joint.readers += 1
            try:
                await joint.begun.wait()
            except asyncio.CancelledError:
                joint.leave()
                raise
        return joint.hand_out() or await self._open(source)

    async def _begin(self, source: S3Object, joint: "_Joint") -> None:
        """Open the object for all who ask for it until it is open; one that is cut off leaves them alone."""
        try:
            joint.reading = await self._open(source)
        except Exception as error:  # noqa: BLE001 - each reader raises it
            joint.failure = error
        finally:
            del self._opening[source]
            joint.begun.set()
        if joint.reading is not None and joint.readers > 1:
            joint.share = self._budget.share_at_once(max(0, joint.reading.size - self._own_bytes))
            if joint.share is not None:
                joint.pump = asyncio.create_task(joint.keep(joint.reading), name="shared-read")


class _Joint:
    """A read, and those who want it."""

    def __init__(self) -> None:
        self.pump: asyncio.Task[None] | None = None
        self.readers = 1
        self.begun = asyncio.Event()
        self.reading: ObjectStream | None = None
        self.failure: Exception | None = None
        # Set if there are several readers, and room to keep what the slowest has not read.
        self.share: Reservation | None = None
        self._was_told = False
        self._is_handed_out = False
        self._pieces: list[bytes] = []
        self._is_over = False
        self._broke_off: Exception | None = None
        self._news = asyncio.Event()

    def hand_out(self) -> ObjectStream | None:
        """The read for one of its readers; None if he has to make one of his own.

        Raises:
            JobError, TransientError, DependencyDownError: it could not be begun.
        """
        if self.failure is not None:
            raise self._told(self.failure)
        if self.reading is None or self._is_handed_out:
            return None
        if self.share is not None:
            return _Together(self, self.reading.size)
        self._is_handed_out = True
        return self.reading

    def leave(self) -> None:
        """One reader less; the last one ends the read, unless somebody has it for himself."""
        self.readers -= 1
        if self.readers:
            return
        if self.pump is not None:
            self.pump.cancel()
            # Nobody should be waiting for it any more; if somebody is, it must not be for ever.
            self._end(ConnectionError("the read was ended"))
        if self.reading is not None and not self._is_handed_out:
            self.reading.close()
        if self.share is not None:
            self.share.release()
        self._pieces.clear()

    async def keep(self, reading: ObjectStream) -> None:
        """Read to the end as fast as S3 gives."""
        try:
            async for piece in reading:
                self._pieces.append(piece)
                self._tell()
        except Exception as error:  # noqa: BLE001 - each reader raises it
            self._end(error)
        else:
            self._end(None)

    async def pieces(self) -> AsyncIterator[bytes]:
        """All pieces from the first, as they come."""
        seen = 0
        while True:
            while seen < len(self._pieces):
                yield self._pieces[seen]
                seen += 1
            if self._is_over:
                break
            await self._news.wait()
        if self._broke_off is not None:
            raise self._told(self._broke_off)

    def _end(self, broke_off: Exception | None) -> None:
        self._is_over = True
        self._broke_off = broke_off
        self._tell()

    def _told(self, error: Exception) -> Exception:
        """The fault for one reader; for all but the first it is only an echo."""
        is_echo, self._was_told = self._was_told, True
        return error.echo() if is_echo and isinstance(error, TransientError | DependencyDownError) else error

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


class _Together:
    """What one of several readers has of a read."""

    def __init__(self, joint: _Joint, size: int) -> None:
        self._joint = joint
        self._is_closed = False
        self.size = size

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._joint.pieces()

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._joint.leave()
