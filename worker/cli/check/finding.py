"""Findings of `vqa-worker check`, and how they are printed."""

import os
import sys
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Final

import typer

from worker.cli.shell import Screen


class Status(StrEnum):
    """The outcome of a check; with a warning a worker still runs, what is skipped cannot be checked."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


# A mark and a color.
_STYLES: Final = {
    Status.OK: ("✓", "green"),
    Status.WARNING: ("!", "yellow"),
    Status.FAILED: ("✗", "red"),
    Status.SKIPPED: ("–", "blue"),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """A check's name and status, and a message with a fix if there is a problem."""

    status: Status
    check: str
    message: str


ok = partial(Finding, Status.OK)
warning = partial(Finding, Status.WARNING)
failed = partial(Finding, Status.FAILED)
skipped = partial(Finding, Status.SKIPPED)


class Report:
    """Print and count findings."""

    def __init__(self, screen: Screen) -> None:
        from worker.observability.redaction import Redactor

        self._screen = screen
        self._redact = Redactor(())
        self.count: Counter[Status] = Counter()

    def add(self, finding: Finding) -> None:
        """Print and count a finding."""
        self.count[finding.status] += 1
        message = self._redact(finding.message)
        self._screen.emit({"check": finding.check, "status": finding.status, "message": message})
        self._screen.print(f"{_mark(finding.status)} {finding.check}: {message}")

    def print_summary(self) -> None:
        """Print the number of findings per status."""
        self._screen.note(", ".join(f"{self.count[it]} {it}" for it in Status if self.count[it]))


def _mark(status: Status) -> str:
    mark, color = _STYLES[status]
    try:
        mark.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        mark = f"[{status}]"
    is_colored = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return typer.style(mark, fg=color) if is_colored else mark
