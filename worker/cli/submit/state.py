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
from itertools import islice, starmap
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

from worker.cli.private_files import open_private
from worker.cli.shell import CommandError, dollars

# An invalid job is `UNSENT`: it has a failed result from the beginning.
PLANNED, SENT, CONFIRMED, UNSENT = range(4)

_FORMAT: Final = "2"
_BUSY_TIMEOUT_S: Final = 30.0
_ROWS_AT_ONCE: Final = 500
_TABLES: Final = """
    CREATE TABLE IF NOT EXISTS {file}.head (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS {file}.jobs (
        ordinal INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        custom_id TEXT,
        body BLOB,
        state INTEGER NOT NULL,
        result BLOB,
        received_at INTEGER,
        failed INTEGER,
        tokens INTEGER,
        cost REAL
    );
"""
_PLANNED_COLUMNS: Final = "id, custom_id, body, state, result, received_at, failed"
_RESULTS: Final = "SELECT id, custom_id, result, received_at, failed FROM jobs"


class ToSend(NamedTuple):
    """A job without a recorded confirm."""

    ordinal: int
    id: str
    body: bytes


class StoredResult(NamedTuple):
    """A stored result with the ids of its job; `at` in Unix seconds."""

    id: str
    custom_id: str | None
    body: bytes
    at: int
    failed: bool


@dataclass(frozen=True, slots=True)
class Received:
    """A result from the reply queue, with the figures that the progress shows; `at` in Unix seconds."""

    id: str
    body: bytes
    at: int
    failed: bool
    tokens: int = 0
    cost: float | None = None


@dataclass
class Counts:
    """The progress of a submission; `cost` in USD, None if no result has one."""

    total: int = 0
    sent: int = 0
    confirmed: int = 0
    succeeded: int = 0
    failed: int = 0
    tokens: int = 0
    cost: float | None = None

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

    def add(self, received: Received) -> None:
        """Count one more result."""
        self.failed += received.failed
        self.succeeded += not received.failed
        self.tokens += received.tokens
        if received.cost is not None:
            self.cost = (self.cost or 0.0) + received.cost

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


class _Jobs:
    """A database with jobs."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def counts(self) -> Counts:
        """Return the progress."""
        row: tuple[Any, ...] = self._db.execute(
            "SELECT count(*), coalesce(sum(state = 1), 0), coalesce(sum(state >= 2), 0),"
            " coalesce(sum(failed = 0), 0), coalesce(sum(failed), 0), coalesce(sum(tokens), 0), sum(cost)"
            " FROM jobs"
        ).fetchone()
        return Counts(*row)


class Plan(_Jobs):
    """Planned jobs that are in no state file yet: in memory, or in a temporary file if there are many.

    Attributes:
        uploads: the local files to upload first, by URL.
    """

    def __init__(self) -> None:
        # An empty name means a temporary file, which SQLite uses only when its cache is full.
        super().__init__(sqlite3.connect("", isolation_level=None))
        # It is not kept after a crash.
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.executescript(_TABLES.format(file="main"))
        self.uploads: dict[str, Path] = {}

    def add(
        self, job_id: str, body: bytes | None, custom_id: str | None = None, failed: Received | None = None
    ) -> bool:
        """Add a job unless its id exists; return whether it was added.

        An invalid job has the result `failed` instead of a body.
        """
        row = (UNSENT, failed.body, failed.at, True) if failed else (PLANNED, None, None, None)
        added = self._db.execute(
            f"INSERT OR IGNORE INTO jobs ({_PLANNED_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)",  # noqa: S608 - constants
            (job_id, custom_id, body, *row),
        )
        return added.rowcount == 1

    def save(self, path: Path, head: Mapping[str, str]) -> None:
        """Create the state file with these jobs, or add them to it: all of them or none."""
        if path.exists():
            self._copy_to(path, {})
            return
        draft = path.with_name(f".{path.name}.draft")
        for suffix in ("", "-journal"):
            Path(f"{draft}{suffix}").unlink(missing_ok=True)
        os.close(open_private(str(draft), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        self._copy_to(draft, {"format": _FORMAT, **head})
        draft.rename(path)

    def _copy_to(self, path: Path, head: Mapping[str, str]) -> None:
        self._db.execute("ATTACH ? AS file", (str(path),))
        self._db.executescript(_TABLES.format(file="file"))
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("INSERT INTO file.head VALUES (?, ?)", head.items())
            self._db.execute(
                f"INSERT OR IGNORE INTO file.jobs ({_PLANNED_COLUMNS})"  # noqa: S608 - constants
                f" SELECT {_PLANNED_COLUMNS} FROM main.jobs ORDER BY ordinal"
            )
        self._db.execute("DETACH file")


class SubmissionState(_Jobs):
    """An open state file. Not thread-safe."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        super().__init__(connection)
        self.path = path

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

    # Jobs

    def has(self, job_id: str) -> bool:
        """Return whether there is such a job."""
        return self._db.execute("SELECT 1 FROM jobs WHERE id = ?", (job_id,)).fetchone() is not None

    def is_unsent(self) -> bool:
        """Return whether no job was ever sent."""
        return not self._db.execute("SELECT 1 FROM jobs WHERE state IN (1, 2) LIMIT 1").fetchone()

    def unconfirmed(self, after: int, limit: int) -> list[ToSend]:
        """Return at most `limit` unconfirmed jobs after an ordinal, in order."""
        rows = self._db.execute(
            "SELECT ordinal, id, body FROM jobs WHERE state < 2 AND ordinal > ? ORDER BY ordinal LIMIT ?",
            (after, limit),
        )
        return list(starmap(ToSend, rows))

    def set_sent(self, jobs: Sequence[ToSend]) -> None:
        """Record that jobs are about to be published."""
        self._update("state = 1", jobs)

    def set_confirmed(self, jobs: Sequence[ToSend]) -> None:
        """Record confirms, and delete the bodies of the jobs."""
        self._update("state = 2, body = NULL", jobs)

    def _update(self, values: str, jobs: Sequence[ToSend]) -> None:
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany(
                f"UPDATE jobs SET {values} WHERE ordinal = ?",  # noqa: S608 - constants
                [(job.ordinal,) for job in jobs],
            )

    def pending(self) -> tuple[list[str], list[str]]:
        """Return the ids of the jobs without a result: those that were sent, and those that were not."""
        rows = self._db.execute("SELECT id, state FROM jobs WHERE result IS NULL ORDER BY ordinal").fetchall()
        return (
            [job_id for job_id, state in rows if state != PLANNED],
            [job_id for job_id, state in rows if state == PLANNED],
        )

    # Results

    def store(self, received: Sequence[Received]) -> tuple[list[Received], list[Received]]:
        """Store results on the disk; return the new ones, and those of unknown jobs.

        A second result of a job is ignored.
        """
        new, unknown = [], []
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            for one in received:
                # A result also proves that its job was on the queue.
                stored = self._db.execute(
                    "UPDATE jobs SET result = ?, received_at = ?, failed = ?, tokens = ?, cost = ?,"
                    " state = 2, body = NULL WHERE id = ? AND result IS NULL",
                    (one.body, one.at, one.failed, one.tokens, one.cost, one.id),
                )
                if stored.rowcount:
                    new.append(one)
                elif not self.has(one.id):
                    unknown.append(one)
        return new, unknown

    def results(self, *, failed: bool | None = None) -> Iterator[StoredResult]:
        """Yield the results in the order of the jobs: all, or those that failed or did not."""
        rows = self._db.execute(
            f"{_RESULTS} WHERE result IS NOT NULL AND failed = ifnull(?, failed) ORDER BY ordinal", (failed,)
        )
        while some := list(islice(rows, _ROWS_AT_ONCE)):
            yield from starmap(StoredResult, some)

    def result(self, job_id: str) -> StoredResult:
        """Return the result of a job that has one."""
        return StoredResult(*self._db.execute(f"{_RESULTS} WHERE id = ?", (job_id,)).fetchone())


def read_state(path: Path) -> tuple[dict[str, str], Counts]:
    """Return the head and the progress of a submission.

    Raises:
        CommandError: as `SubmissionState.open`.
    """
    with closing(SubmissionState.open(path)) as state:
        return state.head(), state.counts()
