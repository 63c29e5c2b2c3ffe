"""The time, as decisions see it."""

import asyncio
import time
from datetime import UTC, datetime


class Clock:
    """Tell the time and wait for it.

    Whatever decides by the time gets a clock passed in, so that its tests use one that they advance by hand.
    """

    def monotonic(self) -> float:
        """Return seconds that only differences have a meaning of: see `time.monotonic`."""
        return time.monotonic()

    def now(self) -> datetime:
        """Return the date and time in UTC, to compare with deadlines."""
        return datetime.now(UTC)

    async def sleep(self, seconds: float) -> None:
        """Return after so many seconds; timers of event loops may fire some milliseconds early."""
        await asyncio.sleep(seconds)

    def timeout(self, seconds: float) -> asyncio.Timeout:
        """Return a context manager that raises TimeoutError after so many seconds: see `asyncio.timeout`."""
        return asyncio.timeout(seconds)
