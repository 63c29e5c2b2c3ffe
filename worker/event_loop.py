"""Run a coroutine on uvloop, which is faster than the event loop of asyncio, where it is installed."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

Returned = TypeVar("Returned")


def run_coroutine(main: Coroutine[Any, Any, Returned]) -> Returned:
    """Run `main` in a new event loop and return its result."""
    try:
        try:
            import uvloop  # noqa: PLC0415 - `--help` does not load it
        except ImportError:
            return asyncio.run(main)
        return uvloop.run(main)
    finally:
        # An interrupted import leaves it unawaited, of which Python would warn.
        main.close()
