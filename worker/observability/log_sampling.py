"""Rate limiting of repeated log records: the first ones of a kind are logged, the rest are counted."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

WINDOW_S: Final = 60.0
# Records of one kind that are logged in a window.
MAX_SHOWN: Final = 10
# Kinds with an open window; bounds the memory.
MAX_KINDS: Final = 1000


class Kind(NamedTuple):
    """Two records with the same kind are repetitions."""

    logger: str
    level: int
    event: str
    reason: str


@dataclass(slots=True)
class _Window:
    began: float
    lines: int = 0


class Suppressed(NamedTuple):
    """Records that were not logged in a window of `window_s` seconds."""

    kind: Kind
    records: int
    window_s: float


class LogSampler:
    """Counts records by kind, in windows of a minute that begin with the first record of a kind.

    Thread-safe.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._windows: OrderedDict[Kind, _Window] = OrderedDict()
        self._suppressed: list[Suppressed] = []

    def should_log(self, kind: Kind) -> bool:
        """Count a record of this kind and return whether to log it."""
        with self._lock:
            now = self._clock()
            window = self._windows.get(kind)
            if window is None or now - window.began >= WINDOW_S:
                self._end(kind, now)
                window = self._windows[kind] = _Window(now)
                if len(self._windows) > MAX_KINDS:
                    self._end(next(iter(self._windows)), now)
            window.lines += 1
            return window.lines <= MAX_SHOWN

    def suppressed(self, *, flush: bool = False) -> list[Suppressed]:
        """Return what was suppressed in closed windows, or with `flush` in all; each window once."""
        with self._lock:
            now = self._clock()
            # Ordered by start time.
            while self._windows:
                kind, window = next(iter(self._windows.items()))
                if not flush and now - window.began < WINDOW_S:
                    break
                self._end(kind, now)
            withheld, self._suppressed = self._suppressed, []
            return withheld

    def _end(self, kind: Kind, now: float) -> None:
        window = self._windows.pop(kind, None)
        if window is not None and window.lines > MAX_SHOWN:
            window_s = min(now - window.began, WINDOW_S)
            self._suppressed.append(Suppressed(kind, window.lines - MAX_SHOWN, round(window_s, 1)))
