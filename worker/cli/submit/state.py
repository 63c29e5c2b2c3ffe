"""The state file of a submission (SQLite): its jobs, which of them are confirmed, and their results.

It makes a submission resumable. A job is `PLANNED`, then `SENT` just before it is published, then `CONFIRMED`
when the broker's confirm is recorded; a job found `SENT` by a later run may be on the queue or not. A result
is acked only after it is committed here, and commits are on the disk.

The holder of `state_dir.locked` writes the file; other processes only read it.
"""

import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

from vqa_worker.messages.error_codes import ErrorCode
from worker.cli.shell import CommandError, dollars
from worker.cli.state_dir import open_private

# An invalid job is `UNSENT`: it has a failed result from the beginning.
PLANNED, SENT, CONFIRMED, UNSENT = range(4)

_FORMAT: Final = "4"
_BUSY_TIMEOUT_S: Final = 30.0
_ROWS_AT_ONCE: Final = 500
_CODES_SHOWN: Final = 3
_TABLES: Final = """
    CREATE TABLE head (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE jobs (
        ordinal INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        custom_id TEXT,
        state INTEGER NOT NULL,
        failed INTEGER,
        code TEXT,
        at INTEGER,
        tokens INTEGER,
        cost REAL,
        body BLOB,
        result BLOB
    );
"""


class ToSend(NamedTuple):
    """A job without a recorded confirm; `is_new` if it was never sent."""

    ordinal: int
    id: str
    body: bytes
    is_new: bool


class JobResult(NamedTuple):
    """A result: `at` in Unix seconds, `cost` in USD, `custom_id` of a Batch API request, error `code`."""

    id: str
    body: bytes
    at: int
    failed: bool
    tokens: int = 0
    cost: float | None = None
    custom_id: str | None = None
    code: str | None = None


@dataclass
class Counts:
    """The progress of a submission; `cost` in USD, None if no result has one.

    Attributes:
        failed: includes the `cancelled` jobs and the `invalid` ones, which were never sent.
        priced: the results with a cost.
        unpriced: the results without a cost of jobs that were billed.
    """

    total: int = 0
    sent: int = 0
    confirmed: int = 0
    succeeded: int = 0
    failed: int = 0
    tokens: int = 0
    cost: float | None = None
    cancelled: int = 0
    invalid: int = 0
    priced: int = 0
    unpriced: int = 0

    @property
    def received(self) -> int:
        """The number of jobs with a result."""
        return self.succeeded + self.failed

    @property
    def pending(self) -> int:
        """The number of jobs without a result."""
        return self.total - self.received

    @property
    def unconfirmed(self) -> int:
        """The number of jobs without a recorded confirm."""
        return self.total - self.confirmed

    def add(self, result: JobResult) -> None:
        """Count one more result."""
        self.failed += result.failed
        self.succeeded += not result.failed
        self.tokens += result.tokens
        self.cancelled += result.code == ErrorCode.CANCELLED
        if result.cost is not None:
            self.cost = (self.cost or 0.0) + result.cost
            self.priced += 1
        elif result.tokens or not result.failed:
            self.unpriced += 1

    def note(self) -> str:
        """Return failures, tokens and cost of the results so far."""
        cost = "" if self.cost is None else f", {dollars(self.cost)}"
        failed = f"{self.failed:,} failed, " if self.failed else ""
        return f"{failed}{self.tokens:,} tokens{cost}"

    def as_json(self) -> dict[str, Any]:
        """Return the progress for `--json`."""
        return {
            "jobs": self.total,
            "submitted": self.confirmed,
            "succeeded": self.succeeded,
            "failed": self.failed,
            "pending": self.pending,
            "cost_usd": self.cost,
        }


class SubmissionState:
    """A state file, or a draft of one. Not thread-safe."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._db = connection
        self.path = path

    @classmethod
    def draft(cls) -> Self:
        """Return a state without a file; `save` writes it to one."""
        # An empty name means a temporary file, which SQLite uses only when its cache is full.
        connection = sqlite3.connect("", isolation_level=None)
        connection.execute("PRAGMA journal_mode = OFF")
        connection.executescript(_TABLES)
        return cls(connection, Path())

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a state file.

        Raises:
            CommandError: it does not exist, or is not a state file of this version.
        """
        try:
            # Without `mode=rw` SQLite would create a missing file.
            connection = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None, timeout=_BUSY_TIMEOUT_S
            )
            state = cls(connection, path)
            is_ours = state.head().get("format") == _FORMAT
            # Readers in other processes do not block, and each commit is on the disk.
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
        except sqlite3.DatabaseError as error:
            raise CommandError(f"{path} is not the state file of a submission ({error}).") from None
        if not is_ours:
            raise CommandError(
                f"{path} was written by another version of vqa-worker. Submit with another --name."
            )
        return state

    def save(self, path: Path, head: Mapping[str, str]) -> None:
        """Write a draft to a new state file, which exists completely or not."""
        self.set_head({"format": _FORMAT, **head})
        unfinished = path.with_name(f".{path.name}.draft")
        unfinished.unlink(missing_ok=True)
        descriptor = open_private(str(unfinished), os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        self._db.execute("VACUUM INTO ?", (str(unfinished),))
        os.fsync(descriptor)
        os.close(descriptor)
        unfinished.rename(path)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def delete(self) -> None:
        """Close and delete the file."""
        self.close()
        for suffix in ("", "-wal", "-shm"):
            Path(f"{self.path}{suffix}").unlink(missing_ok=True)

    def head(self) -> dict[str, str]:
        """Return the fields of the submission as a whole."""
        return dict(self._db.execute("SELECT key, value FROM head"))

    def set_head(self, values: Mapping[str, str]) -> None:
        """Set fields of the submission as a whole."""
        self._db.executemany("INSERT OR REPLACE INTO head VALUES (?, ?)", values.items())

    def counts(self) -> Counts:
        """Return the progress."""
        row: tuple[Any, ...] = self._db.execute(
            "SELECT count(*), coalesce(sum(state = 1), 0), coalesce(sum(state >= 2), 0),"
            " coalesce(sum(failed = 0), 0), coalesce(sum(failed), 0), coalesce(sum(tokens), 0), sum(cost),"
            " coalesce(sum(code = ?), 0), coalesce(sum(state = 3), 0), count(cost),"
            " coalesce(sum(cost IS NULL AND (failed = 0 OR tokens > 0)), 0) FROM jobs",
            (ErrorCode.CANCELLED,),
        ).fetchone()
        return Counts(*row)

    # Jobs

    def add(
        self, job_id: str, body: bytes | None, custom_id: str | None = None, failed: JobResult | None = None
    ) -> bool:
        """Add a job unless its id exists; return whether it was added.

        An invalid job has the result `failed` instead of a body.
        """
        result = (True, failed.code, failed.at, failed.body) if failed else (None, None, None, None)
        added = self._db.execute(
            "INSERT OR IGNORE INTO jobs (id, custom_id, body, state, failed, code, at, result)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (job_id, custom_id, body, UNSENT if failed else PLANNED, *result),
        )
        return added.rowcount == 1

    def is_unsent(self) -> bool:
        """Return whether no job was ever sent."""
        return not self._db.execute("SELECT 1 FROM jobs WHERE state IN (1, 2) LIMIT 1").fetchone()

    def unconfirmed(self, after: int, limit: int) -> list[ToSend]:
        """Return at most `limit` unconfirmed jobs after an ordinal, in order."""
        rows = self._db.execute(
            "SELECT ordinal, id, body, state = 0 FROM jobs WHERE state < 2 AND ordinal > ?"
            " ORDER BY ordinal LIMIT ?",
            (after, limit),
        )
        return [ToSend(*row) for row in rows]

    def set_sent(self, jobs: Sequence[ToSend]) -> list[ToSend]:
        """Record that jobs are about to be published; return those that have no result meanwhile."""
        return self._for_each("UPDATE jobs SET state = 1 WHERE ordinal = ? AND result IS NULL", jobs)

    def set_confirmed(self, jobs: Sequence[ToSend]) -> None:
        """Record confirms, and delete the bodies of the jobs."""
        self._for_each("UPDATE jobs SET state = 2, body = NULL WHERE ordinal = ?", jobs)

    def _for_each(self, statement: str, jobs: Sequence[ToSend]) -> list[ToSend]:
        """Execute an update for each job; return the updated jobs."""
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            return [job for job in jobs if self._db.execute(statement, (job.ordinal,)).rowcount]

    def pending(self, *, sent: bool) -> list[str]:
        """Return the ids of the jobs without a result that were sent, or those that were not."""
        rows = self._db.execute(
            "SELECT id FROM jobs WHERE result IS NULL AND (state > 0) = ? ORDER BY ordinal", (sent,)
        )
        return [job_id for (job_id,) in rows]

    def awaited(self) -> int:
        """Return the number of confirmed jobs without a result."""
        found: tuple[int] = self._db.execute(
            "SELECT count(*) FROM jobs WHERE state = 2 AND result IS NULL"
        ).fetchone()
        return found[0]

    # Results

    def is_pending(self, job_id: str) -> bool:
        """Return whether there is such a job, and it has no result."""
        row = self._db.execute("SELECT 1 FROM jobs WHERE id = ? AND result IS NULL", (job_id,)).fetchone()
        return row is not None

    def store(self, results: Sequence[JobResult]) -> tuple[list[JobResult], int]:
        """Store results on the disk; return the new ones, and the number of results of unknown jobs.

        A second result of a job is ignored.
        """
        new, unknown = [], 0
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            for one in results:
                # A result also proves that its job was on the queue.
                stored = self._db.execute(
                    "UPDATE jobs SET result = ?, at = ?, failed = ?, code = ?, tokens = ?, cost = ?,"
                    " state = 2, body = NULL WHERE id = ? AND result IS NULL RETURNING custom_id",
                    (one.body, one.at, one.failed, one.code, one.tokens, one.cost, one.id),
                ).fetchone()
                if stored is not None:
                    new.append(one._replace(custom_id=stored[0]))
                elif not self._db.execute("SELECT 1 FROM jobs WHERE id = ?", (one.id,)).fetchone():
                    unknown += 1
        return new, unknown

    def results(self, *, failed: bool | None = None) -> Iterator[JobResult]:
        """Yield the results in the order of the jobs: all, or those that failed or did not."""
        rows = self._db.execute(
            "SELECT id, result, at, failed, tokens, cost, custom_id, code FROM jobs"
            " WHERE result IS NOT NULL AND failed = ifnull(?, failed) ORDER BY ordinal",
            (failed,),
        )
        # Not one by one, since other statements run meanwhile.
        while some := list(islice(rows, _ROWS_AT_ONCE)):
            yield from (JobResult(*row) for row in some)

    def error_codes(self) -> list[tuple[str, int]]:
        """Return the most frequent error codes of jobs that ran, each with the number of jobs."""
        return self._db.execute(
            "SELECT code, count(*) FROM jobs WHERE failed AND state < 3 AND code <> ?"
            " GROUP BY code ORDER BY count(*) DESC, code LIMIT ?",
            (ErrorCode.CANCELLED, _CODES_SHOWN),
        ).fetchall()


def read_state(path: Path) -> tuple[dict[str, str], Counts]:
    """Return the head and the progress of a submission.

    Raises:
        CommandError: as `SubmissionState.open`.
    """
    with closing(SubmissionState.open(path)) as state:
        return state.head(), state.counts()
