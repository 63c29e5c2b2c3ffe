"""The state file of a submission (SQLite): its jobs, which of them are confirmed, and their results.

It makes a submission resumable. A job is `PLANNED`, then `SENT` just before it is published, then `CONFIRMED`
when the broker's confirm is recorded; a job found `SENT` by a later run may be on the queue or not. A result
is acked only after it is committed here, and commits are on the disk.
"""

import fcntl
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final, Self

from worker.cli.private_files import make_private_folder, open_private
from worker.cli.shell import CommandError

PLANNED, SENT, CONFIRMED = range(3)

_FORMAT: Final = "1"
_BUSY_TIMEOUT_S: Final = 30.0
_ROWS_AT_ONCE: Final = 500
_SCHEMA: Final = """
    CREATE TABLE head (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE jobs (
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
    CREATE INDEX unconfirmed ON jobs (ordinal) WHERE state < 2;
    CREATE TABLE uploads (url TEXT PRIMARY KEY, path TEXT NOT NULL, is_done INTEGER NOT NULL) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Planned:
    """A job to send; an invalid job has a failed result instead of a body."""

    id: str
    body: bytes | None
    custom_id: str | None = None
    result: "Received | None" = None


@dataclass(frozen=True, slots=True)
class ToSend:
    """A job without a recorded confirm."""

    ordinal: int
    id: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Received:
    """A result from the reply queue, with the figures that the progress shows; `at` in Unix seconds."""

    id: str
    body: bytes
    at: int
    failed: bool
    tokens: int = 0
    cost: float | None = None


@dataclass(frozen=True, slots=True)
class StoredResult:
    """A stored result with the ids of its job; `at` in Unix seconds."""

    ordinal: int
    id: str
    custom_id: str | None
    body: bytes
    at: int
    failed: bool


@dataclass
class Counts:
    """The progress of a submission."""

    total: int = 0
    sent: int = 0
    confirmed: int = 0
    succeeded: int = 0
    failed: int = 0
    tokens: int = 0
    cost: float = 0.0
    knows_cost: bool = False

    @property
    def received(self) -> int:
        """The number of jobs with a result."""
        return self.succeeded + self.failed

    @property
    def pending(self) -> int:
        """The number of jobs without a result."""
        return self.total - self.received

    def add(self, received: Received) -> None:
        """Count one more result."""
        self.failed += received.failed
        self.succeeded += not received.failed
        self.tokens += received.tokens
        if received.cost is not None:
            self.cost += received.cost
            self.knows_cost = True


class SubmissionState:
    """An open state file. Not thread-safe."""

    def __init__(self, connection: sqlite3.Connection, path: Path | None) -> None:
        self._db = connection
        self.path = path

    @classmethod
    def temporary(cls) -> Self:
        """Create a temporary state that is deleted with the process."""
        # An empty name means a temporary file, which SQLite uses only when its cache is full.
        connection = sqlite3.connect("", isolation_level=None)
        connection.executescript(_SCHEMA)
        return cls(connection, None)

    @classmethod
    def create(cls, path: Path, head: Mapping[str, str]) -> Self:
        """Create a state file with mode 0600 in a folder with mode 0700; open one that exists."""
        make_private_folder(path.parent)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        draft.unlink(missing_ok=True)
        os.close(open_private(str(draft), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        try:
            connection = sqlite3.connect(draft, isolation_level=None)
            connection.executescript(_SCHEMA)
            cls(connection, draft).set_head({"format": _FORMAT, **head})
            connection.close()
            with suppress(FileExistsError):
                # Unlike a rename, a link does not replace a file that another process created meanwhile.
                path.hardlink_to(draft)
        finally:
            draft.unlink(missing_ok=True)
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a state file.

        Raises:
            CommandError: it does not exist, or is not a state file of this version.
        """
        if not path.is_file():
            raise CommandError(f"no such state file: {path}.")
        try:
            connection = sqlite3.connect(path, isolation_level=None, timeout=_BUSY_TIMEOUT_S)
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

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def delete(self) -> None:
        """Close and delete the file."""
        self.close()
        if self.path is not None:
            for suffix in ("", "-wal", "-shm", ".lock"):
                Path(f"{self.path}{suffix}").unlink(missing_ok=True)

    def head(self) -> dict[str, str]:
        """Return the fields of the submission as a whole."""
        return dict(self._db.execute("SELECT key, value FROM head"))

    def set_head(self, values: Mapping[str, str]) -> None:
        """Set fields of the submission as a whole."""
        self._db.executemany("INSERT OR REPLACE INTO head VALUES (?, ?)", values.items())

    @contextmanager
    def locked(self, what: str) -> Iterator[None]:
        """Hold the lock for `what` (submitting or collecting).

        Raises:
            CommandError: another process holds it.
        """
        if self.path is None:
            yield
            return
        with open(f"{self.path}.lock", "w", opener=open_private) as lock:
            try:
                # One byte per kind of lock; the kernel releases it when the process ends.
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, ord(what[0]))
            except OSError:
                raise CommandError(
                    f"another process is {what} with {self.path}. Wait until it has finished."
                ) from None
            yield

    # Jobs

    def add(self, job: Planned) -> bool:
        """Add a job unless its id exists; return whether it was added. Call it in a transaction."""
        result = job.result
        added = self._db.execute(
            "INSERT OR IGNORE INTO jobs (id, custom_id, body, state, result, received_at, failed)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (job.id, job.custom_id, job.body, PLANNED, None, None, None)
            if result is None
            else (job.id, job.custom_id, None, CONFIRMED, result.body, result.at, result.failed),
        )
        return added.rowcount == 1

    def unconfirmed(self, after: int, limit: int) -> list[ToSend]:
        """Return at most `limit` unconfirmed jobs after an ordinal, in order."""
        rows = self._db.execute(
            "SELECT ordinal, id, body FROM jobs WHERE state < 2 AND ordinal > ? ORDER BY ordinal LIMIT ?",
            (after, limit),
        )
        return [ToSend(*row) for row in rows]

    def set_sent(self, jobs: Sequence[ToSend]) -> None:
        """Record that jobs are about to be published."""
        self._set_state(SENT, jobs)

    def set_confirmed(self, jobs: Sequence[ToSend]) -> None:
        """Record confirms, and delete the bodies of the jobs."""
        with self.transaction():
            self._db.executemany(
                "UPDATE jobs SET state = 2, body = NULL WHERE ordinal = ?", ((job.ordinal,) for job in jobs)
            )

    def _set_state(self, state: int, jobs: Sequence[ToSend]) -> None:
        with self.transaction():
            self._db.executemany(
                "UPDATE jobs SET state = ? WHERE ordinal = ?", ((state, job.ordinal) for job in jobs)
            )

    # Uploads

    def add_upload(self, url: str, path: str) -> bool:
        """Add a file to upload before jobs are sent; return whether it is new. Call it in a transaction."""
        added = self._db.execute("INSERT OR IGNORE INTO uploads VALUES (?, ?, 0)", (url, path))
        return added.rowcount == 1

    def pending_uploads(self) -> list[tuple[str, str]]:
        """Return URL and path of the files that are not uploaded yet."""
        return self._db.execute("SELECT url, path FROM uploads WHERE NOT is_done").fetchall()

    def set_uploaded(self, url: str) -> None:
        """Record that a file is uploaded."""
        self._db.execute("UPDATE uploads SET is_done = 1 WHERE url = ?", (url,))

    # Results

    def store(self, received: Sequence[Received]) -> tuple[list[Received], list[Received]]:
        """Store results on the disk; return the new ones, and those of unknown jobs.

        A second result of a job is ignored.
        """
        new, unknown = [], []
        with self.transaction():
            for one in received:
                # A result also proves that its job was on the queue.
                stored = self._db.execute(
                    "UPDATE jobs SET result = ?, received_at = ?, failed = ?, tokens = ?, cost = ?,"
                    " state = 2, body = NULL WHERE id = ? AND result IS NULL",
                    (one.body, one.at, one.failed, one.tokens, one.cost, one.id),
                )
                if stored.rowcount:
                    new.append(one)
                elif not self._db.execute("SELECT 1 FROM jobs WHERE id = ?", (one.id,)).fetchone():
                    unknown.append(one)
        return new, unknown

    def results(self) -> Iterator[StoredResult]:
        """Yield the results in the order of the jobs."""
        rows = self._db.execute(
            "SELECT ordinal, id, custom_id, result, received_at, failed FROM jobs"
            " WHERE result IS NOT NULL ORDER BY ordinal"
        )
        while some := list(islice(rows, _ROWS_AT_ONCE)):
            yield from map(_stored_result, some)

    def result(self, job_id: str) -> StoredResult:
        """Return the result of a job that has one."""
        row = self._db.execute(
            "SELECT ordinal, id, custom_id, result, received_at, failed FROM jobs WHERE id = ?", (job_id,)
        ).fetchone()
        return _stored_result(row)

    def counts(self) -> Counts:
        """Return the progress."""
        row: tuple[Any, ...] = self._db.execute(
            "SELECT count(*), coalesce(sum(state = 1), 0), coalesce(sum(state = 2), 0),"
            " coalesce(sum(failed = 0), 0), coalesce(sum(failed), 0), coalesce(sum(tokens), 0),"
            " coalesce(sum(cost), 0), count(cost) > 0 FROM jobs"
        ).fetchone()
        return Counts(*row)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit everything done in the context, or nothing."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")


def _stored_result(row: tuple[Any, ...]) -> StoredResult:
    ordinal, job_id, custom_id, body, at, failed = row
    return StoredResult(ordinal, job_id, custom_id, body, at, bool(failed))
