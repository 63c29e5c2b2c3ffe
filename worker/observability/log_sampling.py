"""Lines of a log that say the same again and again: the first ones go through, the rest is counted."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

WINDOW_S: Final = 60.0
# Of one kind in a window; enough to see several jobs that meet the same.
SHOWN: Final = 10
# Kinds whose windows are open; many more at once would be lines that never say the same.
MOST_KINDS: Final = 1000


class Kind(NamedTuple):
    """What makes two lines say the same."""

    logger: str
    level: int
    event: str
    reason: str


@dataclass(slots=True)
class _Window:
    began: float
    lines: int = 0


class Withheld(NamedTuple):
    """Lines that were not shown, within so many seconds."""

    kind: Kind
    times: int
    within_s: float


class Repeats:
    """Counts lines by kind, in windows of a minute that begin with a kind's first line.

    May be used from several threads.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._windows: OrderedDict[Kind, _Window] = OrderedDict()
        self._withheld: list[Withheld] = []

    def may_be_shown(self, kind: Kind) -> bool:
        """Whether the next line of this kind may be, which is counted."""
        with self._lock:
            now = self._clock()
            window = self._windows.get(kind)
            if window is None or now - window.began >= WINDOW_S:
                self._end(kind, now)
                window = self._windows[kind] = _Window(now)
                if len(self._windows) > MOST_KINDS:
                    self._end(next(iter(self._windows)), now)
            window.lines += 1
            return window.lines <= SHOWN

    def withheld(self, *, all_of_it: bool = False) -> list[Withheld]:
        """What was not shown in windows that are over, or in `all_of_it`; told once."""
        with self._lock:
            now = self._clock()
            # In the order of their beginnings.
            while self._windows:
                kind, window = next(iter(self._windows.items()))
                if not all_of_it and now - window.began < WINDOW_S:
                    break
                self._end(kind, now)
            withheld, self._withheld = self._withheld, []
            return withheld

    def _end(self, kind: Kind, now: float) -> None:
        window = self._windows.pop(kind, None)
        if window is not None and window.lines > SHOWN:
            within_s = min(now - window.began, WINDOW_S)
            self._withheld.append(Withheld(kind, window.lines - SHOWN, round(within_s, 1)))
