"""Findings of `vqa-worker check`, and how they are printed."""

import os
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import typer

from worker.cli.shell import Screen


class Status(StrEnum):
    """The outcome of a check."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


MARKS: Final[Mapping[Status, str]] = {
    Status.OK: "✓",
    Status.WARNING: "!",
    Status.FAILED: "✗",
    Status.SKIPPED: "–",
}
COLOURS: Final[Mapping[Status, str]] = {
    Status.OK: "green",
    Status.WARNING: "yellow",
    Status.FAILED: "red",
    Status.SKIPPED: "blue",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: its name, status, and a message with a fix if there is a problem."""

    check: str
    status: Status
    message: str


def ok(check: str, message: str) -> Finding:
    """Return a finding without a problem."""
    return Finding(check, Status.OK, message)


def warning(check: str, message: str) -> Finding:
    """Return a finding for a problem with which a worker still runs."""
    return Finding(check, Status.WARNING, message)


def failed(check: str, message: str) -> Finding:
    """Return a finding for a problem that prevents a worker from running."""
    return Finding(check, Status.FAILED, message)


def skipped(check: str, message: str) -> Finding:
    """Return a finding for a check that is not possible."""
    return Finding(check, Status.SKIPPED, message)


class Report:
    """Print and count findings."""

    def __init__(self, screen: Screen) -> None:
        from worker.observability.redaction import Redactor

        self._screen = screen
        self._clean = Redactor(())
        self.count: Counter[Status] = Counter()

    def add(self, finding: Finding) -> None:
        """Print and count a finding."""
        self.count[finding.status] += 1
        message = self._clean(finding.message)
        self._screen.emit({"check": finding.check, "status": finding.status, "message": message})
        self._screen.print(f"{_mark(finding.status)} {finding.check}: {message}")

    def print_summary(self) -> None:
        """Print the number of findings per status."""
        counts = [f"{count} {status}" for status in Status if (count := self.count[status])]
        self._screen.note(", ".join(counts))


def _mark(status: Status) -> str:
    try:
        mark = MARKS[status]
        mark.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        mark = f"[{status}]"
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return typer.style(mark, fg=COLOURS[status]) if coloured else mark
