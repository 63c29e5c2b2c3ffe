"""What the benchmark needs of the operating system: cores to pin to, and what processes used. Linux only."""

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
# Places in /proc/<pid>/stat behind the command's closing parenthesis; see proc(5).
_PARENT, _USER, _SYSTEM, _REAPED_USER, _REAPED_SYSTEM, _STARTED = 1, 11, 12, 13, 14, 19


@dataclass(frozen=True)
class Cores:
    """Which cores a contender runs on, and which everything else does."""

    contender: frozenset[int]
    rest: frozenset[int]

    @classmethod
    def split(cls) -> "Cores":
        """The first core for the contender; with one core only, all share it."""
        first, *others = sorted(os.sched_getaffinity(0))
        return cls(frozenset([first]), frozenset(others or [first]))

    @property
    def are_shared(self) -> bool:
        """Whether the contender has no core for itself."""
        return self.contender == self.rest


@contextmanager
def pinned(cores: frozenset[int]) -> Iterator[None]:
    """Let processes that are started in the block run on these cores, now and permanently."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def cpu_s(pid: int) -> float:
    """CPU seconds, user and system, of a process, its descendants, and those of them that have ended."""
    counted = (_USER, _SYSTEM, _REAPED_USER, _REAPED_SYSTEM)
    return (
        sum(int(stat[place]) for stat in map(_stat, _tree(pid)) if stat for place in counted) / _TICKS_PER_S
    )


def busy_s(cores: frozenset[int]) -> float:
    """CPU seconds that these cores have spent on anything, up to now."""
    names = {f"cpu{core}" for core in cores}
    counts = [line.split() for line in (_PROC / "stat").read_text().splitlines() if line.startswith("cpu")]
    # user nice system idle iowait irq softirq steal
    spent = (1, 2, 3, 6, 7, 8)
    return sum(int(it[place]) for it in counts if it[0] in names for place in spent) / _TICKS_PER_S


def peak_mb(pid: int) -> float:
    """The highest resident memory so far, in MB: of one process exactly, of several an upper bound."""
    return sum(_status_kb(each, "VmHWM") for each in _tree(pid)) * 1024 / 1e6


def resident_mb(pid: int) -> float:
    """Resident memory in MB; what several processes share is counted once."""
    tree = _tree(pid)
    if len(tree) == 1:
        return _status_kb(pid, "VmRSS") * 1024 / 1e6
    return sum(_proportional_kb(each) for each in tree) * 1024 / 1e6


def started_at_s(pid: int) -> float:
    """When the process was started, on the clock CLOCK_BOOTTIME; known to a hundredth of a second."""
    stat = _stat(pid)
    return int(stat[_STARTED]) / _TICKS_PER_S if stat else float("nan")


def free_memory_mb() -> float:
    """Memory that programs can still be given without swapping."""
    return _field_kb(_PROC / "meminfo", "MemAvailable") * 1024 / 1e6


def free_disk_mb() -> float:
    """Room where temporary files go, in MB."""
    return shutil.disk_usage(tempfile.gettempdir()).free / 1e6


def description(cores: Cores) -> str:
    """The machine in a line."""
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
    """Whether this system has what is read here."""
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
