"""How many bytes of images the process may hold at once; whoever needs more waits its turn."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Reservation:
    """What one holder has of a budget; it can only give back, in part or all of it."""

    def __init__(self, budget: "MemoryBudget", held: int) -> None:
        self._budget = budget
        self._held = held

    def shrink_to(self, needed: int) -> None:
        """Give back what is not needed."""
        if needed < self._held:
            surplus, self._held = self._held - needed, needed
            self._budget._put_back(surplus)  # noqa: SLF001 - a share is the budget's own

    def release(self) -> None:
        """Give back everything; may be called again."""
        self.shrink_to(0)


class MemoryBudget:
    """A number of bytes, handed out in the order in which it is asked for."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._free = limit
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def share(self, wanted: int) -> AsyncIterator[Reservation]:
        """Wait for `wanted` bytes and hold them; more than there can ever be is cut down to all there is."""
        share = Reservation(self, await self._take(min(wanted, self._limit)))
        try:
            yield share
        finally:
            share.release()

    def share_at_once(self, wanted: int) -> Reservation | None:
        """`wanted` bytes if they are free and nobody waits; else None."""
        if self._waiting or wanted > self._free:
            return None
        self._free -= wanted
        return Reservation(self, wanted)

    async def _take(self, wanted: int) -> int:
        if wanted and (self._waiting or wanted > self._free):
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append((wanted, turn))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._put_back(wanted)
                else:
                    self._waiting.remove((wanted, turn))
                    self._serve()
                raise
        else:
            self._free -= wanted
        return wanted

    def _put_back(self, surplus: int) -> None:
        self._free += surplus
        self._serve()

    def _serve(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._free:
            wanted, turn = self._waiting.popleft()
            if turn.cancelled():
                continue
            self._free -= wanted
            turn.set_result(None)
