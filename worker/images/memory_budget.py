"""A limit on the memory that images may use at the same time."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress


class Reservation:
    """Reserved bytes of a memory budget."""

    def __init__(self, budget: "MemoryBudget", size: int) -> None:
        self._budget = budget
        self._size = size
        self._extending = asyncio.Lock()
        self._holds = False

    def fits(self, size: int) -> bool:
        """Return whether `size` more bytes are within the limit of the budget, if nothing else is."""
        return self._size + size <= self._budget.limit

    async def extend(self, size: int, *, holds: bool = True) -> None:
        """Reserve `size` more bytes; wait until they are free, unless the reservation holds content already.

        The present bytes are free meanwhile, so that two reservations never wait for each other. Memory with
        content cannot be free: from the second content on, others wait until the bytes are free again.

        Args:
            size: in bytes.
            holds: whether they hold content from now on.
        """
        async with self._extending:
            if self._holds:
                self.grow(size)
                return
            wanted = min(self._size + size, self._budget.limit)
            self.release()
            await self._budget._acquire(wanted)  # noqa: SLF001 - a reservation is part of its budget
            self._size += wanted
            self._holds = holds

    def grow(self, size: int) -> None:
        """Reserve `size` more bytes at once, also if they are not free; others wait until they are."""
        self._size += size
        self._budget._free -= size  # noqa: SLF001 - a reservation is part of its budget

    def shrink_to(self, size: int) -> None:
        """Release all but `size` bytes."""
        if size < self._size:
            surplus, self._size = self._size - size, size
            self._budget._release(surplus)  # noqa: SLF001 - a reservation is part of its budget

    def release(self) -> None:
        """Release all bytes; can be called again."""
        self.shrink_to(0)


class MemoryBudget:
    """A number of bytes, reserved in first-in, first-out order.

    Attributes:
        limit: in bytes.
    """

    def __init__(self, limit: int) -> None:
        """`limit`: in bytes."""
        self.limit = limit
        self._free = limit
        self._waiters: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def reserve(self, size: int) -> AsyncIterator[Reservation]:
        """Wait until `size` bytes are free, or the whole budget if `size` exceeds it; hold them."""
        size = min(size, self.limit)
        await self._acquire(size)
        reservation = Reservation(self, size)
        try:
            yield reservation
        finally:
            reservation.release()

    def try_reserve(self, size: int) -> Reservation | None:
        """Reserve `size` bytes if they are free and nobody waits; else return None."""
        if self._waiters or size > self._free:
            return None
        self._free -= size
        return Reservation(self, size)

    async def _acquire(self, size: int) -> None:
        if not size or not (self._waiters or size > self._free):
            self._free -= size
            return
        granted = asyncio.get_running_loop().create_future()
        self._waiters.append((size, granted))
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():
                self._release(size)
            else:
                # Bytes that were released since may have removed it already.
                with suppress(ValueError):
                    self._waiters.remove((size, granted))
                self._grant()
            raise

    def _release(self, size: int) -> None:
        self._free += size
        self._grant()

    def _grant(self) -> None:
        while self._waiters and self._waiters[0][0] <= self._free:
            size, granted = self._waiters.popleft()
            if granted.cancelled():
                continue
            self._free -= size
            granted.set_result(None)
