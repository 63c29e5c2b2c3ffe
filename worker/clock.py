"""A clock that tests can replace."""

import asyncio
import time
from datetime import UTC, datetime

# Timers of event loops may fire some milliseconds early or late.
TIMER_SLACK_S = 0.02


class Clock:
    """Read the time and wait.

    Code that depends on the time gets a clock passed in; its tests use one that they advance explicitly.
    """

    def monotonic(self) -> float:
        """Return seconds of which only differences are meaningful: see `time.monotonic`."""
        return time.monotonic()

    def now(self) -> datetime:
        """Return the date and time in UTC, to compare with deadlines."""
        return datetime.now(UTC)

    async def sleep(self, seconds: float) -> None:
        """Sleep; timers of event loops may fire some milliseconds early."""
        await asyncio.sleep(seconds)

    def timeout(self, seconds: float) -> asyncio.Timeout:
        """Return a context manager that raises TimeoutError: see `asyncio.timeout`."""
        return asyncio.timeout(seconds)
