"""The limits of a submission: `--stop-after-failures` and `--max-cost`."""

import asyncio
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from worker.cli.shell import counted, dollars

if TYPE_CHECKING:
    from worker.cli.submit.state import Counts, SubmissionState

# The fields of a state file's head; the options have the same names.
FAILURES: Final = "stop_after_failures"
COST: Final = "max_cost"
# A share of fewer results says little.
MIN_RESULTS: Final = 20
# So many jobs, and one more for each result with a cost, may be on the queue: the first results need not be
# like the others.
FIRST_JOBS: Final = 10
UNLIMITED: Final = 1_000_000


def check_failure_limit(text: str) -> str:
    """Return a share of the results such as `5%` or a number of failures such as `100`, without blanks.

    Raises:
        ValueError: it is neither.
    """
    found = re.fullmatch(r"(\d{1,3}(?:\.\d{1,3})?)\s?%|([1-9]\d{0,8})", text.strip(), re.ASCII)
    if found is None or (found[1] and float(found[1]) > 100):  # noqa: PLR2004 - percent
        raise ValueError(f"{text!r} is not a share such as 5% or a number of failures such as 100")
    return found[2] or f"{float(found[1]):g}%"


def check_max_cost(text: str) -> str:
    """Return an amount in USD without the dollar sign.

    Raises:
        ValueError: it is not an amount above 0.
    """
    found = re.fullmatch(r"\$?(\d{1,9}(?:\.\d{1,9})?)", text.strip(), re.ASCII)
    if found is None or not float(found[1]):
        raise ValueError(f"{text!r} is not an amount in USD above 0, such as 20 or 0.50")
    return found[1]


class Limits:
    """What the limits of a submission allow after the results so far.

    Attributes:
        stopped: why `--stop-after-failures` stopped the submission; empty if it did not.
        outstanding: the number of jobs that were sent and have no result.
        unsent: the number of jobs that were never sent.
        changed: set when a result has arrived.
    """

    def __init__(self, head: Mapping[str, str], counts: "Counts") -> None:
        """Read the limits from the head of a state file; `counts` includes each result before its `add`."""
        self._name = head["name"]
        self._max_failures = head.get(FAILURES)
        self._max_usd = float(head[COST]) if COST in head else None
        self._counts = counts
        # After the workers' prices have been set, the same command must be able to go on.
        self._unpriced_before = counts.unpriced
        self.outstanding = counts.sent + counts.confirmed - counts.received
        self.unsent = counts.total - counts.sent - counts.confirmed
        self.stopped = head.get("stopped") or self._failures()
        self.changed = asyncio.Event()

    def add(self, results: int) -> None:
        """Count results, which `counts` includes already."""
        self.outstanding -= results
        self.stopped = self.stopped or self._failures()
        self.changed.set()

    def add_sent(self, jobs: int) -> None:
        """Count jobs that are sent for the first time."""
        self.outstanding += jobs
        self.unsent -= jobs

    @property
    def room(self) -> int:
        """The number of jobs that may be sent now; results can change it."""
        counts = self._counts
        if self._max_usd is None:
            return UNLIMITED
        room = FIRST_JOBS + counts.priced - self.outstanding
        if not counts.priced:
            room -= counts.unpriced - self._unpriced_before
        elif mean := (counts.cost or 0.0) / counts.priced:
            # A result without a cost counts as an average one. The sum of many floats is not exact.
            affordable = (self._max_usd - (counts.cost or 0.0)) / mean + 1e-6
            room = min(room, math.floor(min(affordable, UNLIMITED)) - self.outstanding - counts.unpriced)
        return max(0, room)

    @property
    def reason(self) -> str:
        """Why no further job is sent; empty while one can be."""
        if self.stopped or not self.unsent or self.outstanding or self.room:
            return self.stopped
        counts, limit = self._counts, dollars(self._max_usd or 0.0)
        if not counts.priced:
            return f"--max-cost {limit} needs results with a cost, and they have none"
        unpriced = f", and {counted(counts.unpriced, 'result')} without a cost" if counts.unpriced else ""
        return f"spent {dollars(counts.cost or 0.0)} of --max-cost {limit}{unpriced}"

    def report(self, state: "SubmissionState") -> list[str]:
        """Return what to print about a stopped submission; nothing about others."""
        if not (reason := self.reason):
            return []
        jobs = f"of {self._counts.total:,} jobs were"
        rest = ((self._counts.cancelled, "cancelled"), (self.unsent, "not submitted"))
        first = (f"Stopped: {reason}.", *(f"{count:,} {jobs} {what}." for count, what in rest if count))
        codes = ", ".join(f"{code} ({count:,})" for code, count in state.error_codes())
        errors = [f"Most frequent errors: {codes}."] if self.stopped else []
        return [" ".join(first), *errors, *([self._hint()] if self.unsent else [])]

    def _hint(self) -> str:
        """Return how to send the rest."""
        change = "a higher --max-cost"
        if self.stopped:
            change = "a higher --stop-after-failures (100%: no limit)"
        elif not self._counts.priced:
            return f"Set VQA_PRICES on the workers, then run the same command with --name {self._name}."
        return f"To submit the rest, run the same command with --name {self._name} and {change}."

    def _failures(self) -> str:
        """Return a sentence about too many failures; empty if there are not too many.

        Jobs that were cancelled or never sent do not count.
        """
        counts, limit = self._counts, self._max_failures
        not_run = counts.cancelled + counts.invalid
        failed, ran = counts.failed - not_run, counts.received - not_run
        text = f"{failed:,} of {counted(ran, 'result')} failed"
        if limit is None or not failed:
            return ""
        if not limit.endswith("%"):
            return f"{text} (--{FAILURES.replace('_', '-')} {limit})" if failed >= int(limit) else ""
        is_over = 100 * failed > round(float(limit[:-1]) * ran, 6)
        if not is_over or (ran < MIN_RESULTS and counts.pending):
            return ""
        return f"{text} ({100 * failed / ran:.1f} %, --{FAILURES.replace('_', '-')} {limit})"
