"""Process states and descendants, from /proc."""

import time
from collections.abc import Iterable
from pathlib import Path


def alive(pids: Iterable[int]) -> list[int]:
    """Return the processes that run; zombies do not count."""
    return [pid for pid in pids if _state(pid) not in ("", "Z")]


def wait_until_ended(pids: Iterable[int], *, timeout_seconds: float = 20) -> list[int]:
    """Wait for processes to end; return those that still run."""
    left = alive(pids)
    give_up = time.monotonic() + timeout_seconds
    while left and time.monotonic() < give_up:
        time.sleep(0.05)
        left = alive(left)
    return left


def family(pid: int) -> list[int]:
    """Return the ids of all descendants of a process."""
    everyone = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    parents = {child: _parent(child) for child in everyone}
    found = [pid]
    for ancestor in found:
        found += [child for child, parent in parents.items() if parent == ancestor]
    return found[1:]


def _state(pid: int) -> str:
    return _fields(pid)[0]


def _parent(pid: int) -> int:
    return int(_fields(pid)[1] or 0)


def _fields(pid: int) -> tuple[str, str]:
    try:
        # The name in brackets may contain any character.
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return "", ""
    return state, parent
