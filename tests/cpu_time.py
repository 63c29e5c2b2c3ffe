"""Limits of CPU time, in units of this machine's speed at the moment: slow machines fail no test."""

import json
import time
from collections.abc import Callable

# What the reference takes on the machine for which the limits in the tests are given.
_REFERENCE_S = 0.0015
_TRIES = 5
_TEXT = json.dumps([{"name": f"a{n}", "value": n / 3} for n in range(3_000)])


def is_within(limit_s: float, work: Callable[[], object]) -> bool:
    """Return whether `work` takes at most so many CPU seconds of this thread, on a machine of that speed.

    The least of several measurements counts, since other processes share the caches.
    """
    return any(_scaled_s(work) <= limit_s for _ in range(_TRIES))


def _scaled_s(work: Callable[[], object]) -> float:
    took_s = _thread_s(work)
    reference_s = _thread_s(lambda: json.loads(_TEXT))
    return took_s * _REFERENCE_S / max(reference_s, _REFERENCE_S)


def _thread_s(work: Callable[[], object]) -> float:
    began = time.thread_time()
    work()
    return time.thread_time() - began
