"""Pin processes to cores, and read their CPU time and memory. Linux only."""

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
# Fields of /proc/<pid>/stat after the command's closing parenthesis; see proc(5).
_PARENT, _USER, _SYSTEM, _REAPED_USER, _REAPED_SYSTEM, _STARTED = 1, 11, 12, 13, 14, 19


@dataclass(frozen=True)
class Cores:
    """The core for the contender, and the cores for all other processes."""

    contender: frozenset[int]
    rest: frozenset[int]

    @classmethod
    def split(cls) -> "Cores":
        """Reserve the first core for the contender; share it if it is the only one."""
        first, *others = sorted(os.sched_getaffinity(0))
        return cls(frozenset([first]), frozenset(others or [first]))

    @property
    def are_shared(self) -> bool:
        """Whether the contender shares its core."""
        return self.contender == self.rest


@contextmanager
def pinned(cores: frozenset[int]) -> Iterator[None]:
    """Pin processes started in this context to these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def cpu_s(pid: int) -> float:
    """Return user and system CPU seconds of a process and its descendants, including exited ones."""
    counted = (_USER, _SYSTEM, _REAPED_USER, _REAPED_SYSTEM)
    return (
        sum(int(stat[place]) for stat in map(_stat, _tree(pid)) if stat for place in counted) / _TICKS_PER_S
    )


def busy_s(cores: frozenset[int]) -> float:
    """Return the CPU seconds of all processes on these cores since boot."""
    names = {f"cpu{core}" for core in cores}
    counts = [line.split() for line in (_PROC / "stat").read_text().splitlines() if line.startswith("cpu")]
    # user nice system idle iowait irq softirq steal
    spent = (1, 2, 3, 6, 7, 8)
    return sum(int(it[place]) for it in counts if it[0] in names for place in spent) / _TICKS_PER_S


def peak_mb(pid: int) -> float:
    """Return the peak resident memory in MB; for several processes an upper bound."""
    return sum(_status_kb(each, "VmHWM") for each in _tree(pid)) * 1024 / 1e6


def own_peak_mb(pid: int) -> float:
    """Return the peak resident memory of one process in MB, without its descendants."""
    return _status_kb(pid, "VmHWM") * 1024 / 1e6


def descendants(pid: int) -> list[int]:
    """Return the ids of the running descendants of a process."""
    return sorted(_tree(pid)[1:])


def resident_mb(pid: int) -> float:
    """Return the resident memory in MB; count shared memory of several processes once."""
    tree = _tree(pid)
    if len(tree) == 1:
        return _status_kb(pid, "VmRSS") * 1024 / 1e6
    return sum(_proportional_kb(each) for each in tree) * 1024 / 1e6


def started_at_s(pid: int) -> float:
    """Return the start time of a process on CLOCK_BOOTTIME, with a resolution of 10 ms."""
    stat = _stat(pid)
    return int(stat[_STARTED]) / _TICKS_PER_S if stat else float("nan")


def free_memory_mb() -> float:
    """Return the memory available without swapping, in MB."""
    return _field_kb(_PROC / "meminfo", "MemAvailable") * 1024 / 1e6


def free_disk_mb() -> float:
    """Return the free disk space for temporary files, in MB."""
    return shutil.disk_usage(tempfile.gettempdir()).free / 1e6


def description(cores: Cores) -> str:
    """Return a one-line description of the machine."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in (_PROC / "cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory_gb = _field_kb(_PROC / "meminfo", "MemTotal") * 1024 / 1e9
    count = len(cores.contender | cores.rest)
    return f"{model}, {count} core{'s' * (count > 1)}, {memory_gb:.0f} GB, Linux {platform.release()}"


def is_supported() -> bool:
    """Return whether this system has /proc."""
    return sys.platform == "linux" and (_PROC / "self" / "stat").exists()


def _tree(pid: int) -> list[int]:
    parents = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit() and (stat := _stat(int(entry.name))):
            parents[int(entry.name)] = int(stat[_PARENT])
    tree = [pid]
    for each in tree:
        tree += [child for child, parent in parents.items() if parent == each]
    return tree


def _stat(pid: int) -> list[str] | None:
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _status_kb(pid: int, field: str) -> int:
    return _field_kb(_PROC / str(pid) / "status", field)


def _proportional_kb(pid: int) -> int:
    return _field_kb(_PROC / str(pid) / "smaps_rollup", "Pss")


def _field_kb(path: Path, field: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)
