"""Read an object once for all jobs that want it at the same time, such as many questions about one page."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from worker.errors import DependencyDownError, TransientError
from worker.images.memory_budget import MemoryBudget, Reservation
from worker.s3.aws import S3Object
from worker.s3.object_stream import ObjectStream

Open = Callable[[S3Object], Awaitable[ObjectStream]]


class CoalescedReads:
    """Opens objects; jobs that ask for the same object while it is being opened share one read.

    A shared read buffers what its slowest reader has not read yet, at most the whole object. If the memory
    budget has no room for that, each job reads the object itself. Each job has already reserved `own_bytes`.
    """

    def __init__(self, open_: Open, budget: MemoryBudget, *, own_bytes: int) -> None:
        self._open = open_
        self._budget = budget
        self._own_bytes = own_bytes
        self._opening: dict[S3Object, _SharedRead] = {}

    async def open(self, source: S3Object) -> ObjectStream:
        """Start to read an object.

        Raises:
            JobError, TransientError, DependencyDownError: as the function that opens it.
        """
        read = self._opening.get(source)
        if read is None:
            read = self._opening[source] = _SharedRead()
            await self._start(source, read)
        else:
            read.readers += 1
            try:
                await read.opened.wait()
            except asyncio.CancelledError:
                read.leave()
                raise
        return read.stream_for_reader() or await self._open(source)

    async def _start(self, source: S3Object, read: "_SharedRead") -> None:
        """Open the object for all that ask for it meanwhile; if cancelled, they open it themselves."""
        try:
            read.stream = await self._open(source)
        except Exception as error:  # noqa: BLE001 - each reader raises it
            read.open_error = error
        finally:
            del self._opening[source]
            read.opened.set()
        if read.stream is not None and read.readers > 1:
            read.buffer = self._budget.try_reserve(max(0, read.stream.size - self._own_bytes))
            if read.buffer is not None:
                read.task = asyncio.create_task(read.fill(read.stream), name="shared-read")


class _SharedRead:
    """One read of an object and its readers.

    Attributes:
        task: fills the buffer.
        readers: how many jobs want the object.
        opened: set when opening has succeeded or failed.
        stream: the object.
        open_error: why the object could not be opened.
        buffer: the memory of a read with several readers; None if there is one reader or no memory.
    """

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None
        self.readers = 1
        self.opened = asyncio.Event()
        self.stream: ObjectStream | None = None
        self.open_error: Exception | None = None
        self.buffer: Reservation | None = None
        self._was_raised = False
        self._is_taken = False
        self._pieces: list[bytes] = []
        self._is_complete = False
        self._read_error: Exception | None = None
        self._changed = asyncio.Event()

    def stream_for_reader(self) -> ObjectStream | None:
        """Return the stream for one of the readers; None if it must open the object itself.

        Raises:
            JobError, TransientError, DependencyDownError: the object could not be opened.
        """
        if self.open_error is not None:
            raise self._for_reader(self.open_error)
        if self.stream is None or self._is_taken:
            return None
        if self.buffer is not None:
            return _SharedStream(self, self.stream)
        self._is_taken = True
        return self.stream

    def leave(self) -> None:
        """Remove one reader; the last one ends the read, unless a single reader has taken the stream."""
        self.readers -= 1
        if self.readers:
            return
        if self.task is not None:
            self.task.cancel()
            # Nobody should still wait; if somebody does, this ends the wait.
            self._complete(ConnectionError("the read was ended"))
        if self.stream is not None and not self._is_taken:
            self.stream.close()
        if self.buffer is not None:
            self.buffer.release()
        self._pieces.clear()

    async def fill(self, stream: ObjectStream) -> None:
        """Read the whole object into the buffer."""
        try:
            async for piece in stream:
                self._pieces.append(piece)
                self._notify()
        except Exception as error:  # noqa: BLE001 - each reader raises it
            self._complete(error)
        else:
            self._complete(None)

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield all pieces from the first as they arrive."""
        position = 0
        while True:
            while position < len(self._pieces):
                yield self._pieces[position]
                position += 1
            if self._is_complete:
                break
            await self._changed.wait()
        if self._read_error is not None:
            raise self._for_reader(self._read_error)

    def _complete(self, error: Exception | None) -> None:
        self._is_complete = True
        self._read_error = error
        self._notify()

    def _for_reader(self, error: Exception) -> Exception:
        """Return the error for one reader; all but the first get a duplicate."""
        is_first, self._was_raised = not self._was_raised, True
        if is_first or not isinstance(error, TransientError | DependencyDownError):
            return error
        return error.duplicate()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class _SharedStream:
    """The stream of one reader of a shared read."""

    def __init__(self, read: _SharedRead, stream: ObjectStream) -> None:
        self._read = read
        self._is_closed = False
        self.size = stream.size
        self.encoding = stream.encoding

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._read.pieces()

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._read.leave()
