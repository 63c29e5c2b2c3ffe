"""What is known of a submission, in one SQLite file: its jobs, which are in the queue, and their results.

It is what makes a submission resumable. A job is `PLANNED` until the moment before it is published, `SENT`
from then on until the broker's confirm is written down, then `CONFIRMED`. So one that is found `SENT` later
may be in the queue or not. A result is acked at the broker only when it stands here; commits are on the disk.
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
    """A job as it will be sent; one that cannot be sent has its (failed) result already."""

    id: str
    body: bytes | None
    custom_id: str | None = None
    result: "Received | None" = None


@dataclass(frozen=True, slots=True)
class ToSend:
    """A job that is not known to be in the queue."""

    ordinal: int
    id: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Received:
    """A result as it came, with what the progress needs of it; `at` in seconds since 1970."""

    id: str
    body: bytes
    at: int
    failed: bool
    tokens: int = 0
    cost: float | None = None


@dataclass(frozen=True, slots=True)
class Kept:
    """A result with the job that it is of."""

    ordinal: int
    id: str
    custom_id: str | None
    body: bytes
    at: int
    failed: bool


@dataclass
class Counts:
    """How far a submission has come."""

    total: int = 0
    sent: int = 0
    confirmed: int = 0
    succeeded: int = 0
    failed: int = 0
    tokens: int = 0
    cost: float = 0.0
    knows_cost: bool = False

    @property
    def in_hand(self) -> int:
        """How many results there are."""
        return self.succeeded + self.failed

    @property
    def missing(self) -> int:
        """How many results there are not."""
        return self.total - self.in_hand

    def add(self, received: Received) -> None:
        """One more result."""
        self.failed += received.failed
        self.succeeded += not received.failed
        self.tokens += received.tokens
        if received.cost is not None:
            self.cost += received.cost
            self.knows_cost = True


class Manifest:
    """One submission's file. Not for several threads."""

    def __init__(self, connection: sqlite3.Connection, path: Path | None) -> None:
        self._db = connection
        self.path = path

    @classmethod
    def temporary(cls) -> Self:
        """One that is gone with the process; what does not fit into the cache is on the disk."""
        # An empty name: SQLite's own temporary file.
        connection = sqlite3.connect("", isolation_level=None)
        connection.executescript(_SCHEMA)
        return cls(connection, None)

    @classmethod
    def make(cls, path: Path, head: Mapping[str, str]) -> Self:
        """A new one, readable for its owner only; one that is there by now instead."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        draft.unlink(missing_ok=True)
        os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        try:
            connection = sqlite3.connect(draft, isolation_level=None)
            connection.executescript(_SCHEMA)
            cls(connection, draft).set_head({"format": _FORMAT, **head})
            connection.close()
            with suppress(FileExistsError):
                # Unlike a renaming it takes nobody else's place.
                path.hardlink_to(draft)
        finally:
            draft.unlink(missing_ok=True)
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """One that is there.

        Raises:
            CommandError: it is not there, or is something else.
        """
        if not path.is_file():
            raise CommandError(f"{path}: there is no such manifest")
        try:
            connection = sqlite3.connect(path, isolation_level=None, timeout=_BUSY_TIMEOUT_S)
            manifest = cls(connection, path)
            is_ours = manifest.head().get("format") == _FORMAT
            # Readers in other processes need not wait, and each commit is on the disk.
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
        except sqlite3.DatabaseError as error:
            raise CommandError(f"{path}: is not the manifest of a submission ({error})") from None
        if not is_ours:
            raise CommandError(f"{path}: is a manifest of another version of vqa-worker")
        return manifest

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def delete(self) -> None:
        """Close it and take it away."""
        self.close()
        if self.path is not None:
            for suffix in ("", "-wal", "-shm", ".lock"):
                Path(f"{self.path}{suffix}").unlink(missing_ok=True)

    def head(self) -> dict[str, str]:
        """What is said of the submission as a whole."""
        return dict(self._db.execute("SELECT key, value FROM head"))

    def set_head(self, values: Mapping[str, str]) -> None:
        """Say something of the submission as a whole. Within a transaction."""
        self._db.executemany("INSERT OR REPLACE INTO head VALUES (?, ?)", values.items())

    @contextmanager
    def locked(self, what: str) -> Iterator[None]:
        """Be the only process that submits, or that gathers, by this manifest.

        Raises:
            CommandError: another one does.
        """
        if self.path is None:
            yield
            return
        with Path(f"{self.path}.lock").open("w") as lock:
            try:
                # The byte says what is locked; it goes with the process, however that ends.
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, ord(what[0]))
            except OSError:
                raise CommandError(f"{self.path}: another process is {what} by it") from None
            yield

    # What is to be sent.

    def add(self, job: Planned) -> bool:
        """Add a job, unless there is one of its id; returns whether it was added. Within a transaction."""
        result = job.result
        added = self._db.execute(
            "INSERT OR IGNORE INTO jobs (id, custom_id, body, state, result, received_at, failed)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (job.id, job.custom_id, job.body, PLANNED, None, None, None)
            if result is None
            else (job.id, job.custom_id, None, CONFIRMED, result.body, result.at, result.failed),
        )
        return added.rowcount == 1

    def unconfirmed(self, after: int, most: int) -> list[ToSend]:
        """Jobs that are not known to be in the queue, in order."""
        rows = self._db.execute(
            "SELECT ordinal, id, body FROM jobs WHERE state < 2 AND ordinal > ? ORDER BY ordinal LIMIT ?",
            (after, most),
        )
        return [ToSend(*row) for row in rows]

    def about_to_send(self, jobs: Sequence[ToSend]) -> None:
        """From now on they may be in the queue."""
        self._set_state(SENT, jobs)

    def are_confirmed(self, jobs: Sequence[ToSend]) -> None:
        """They are in the queue; what they ask is kept no longer."""
        with self.transaction():
            self._db.executemany(
                "UPDATE jobs SET state = 2, body = NULL WHERE ordinal = ?", ((job.ordinal,) for job in jobs)
            )

    def _set_state(self, state: int, jobs: Sequence[ToSend]) -> None:
        with self.transaction():
            self._db.executemany(
                "UPDATE jobs SET state = ? WHERE ordinal = ?", ((state, job.ordinal) for job in jobs)
            )

    # Files that jobs need in S3.

    def add_upload(self, url: str, path: str) -> bool:
        """A file has to be at this URL before the jobs are sent; returns whether that is new.

        Within a transaction.
        """
        added = self._db.execute("INSERT OR IGNORE INTO uploads VALUES (?, ?, 0)", (url, path))
        return added.rowcount == 1

    def uploads_to_do(self) -> list[tuple[str, str]]:
        """URL and path of the files that are not known to be there."""
        return self._db.execute("SELECT url, path FROM uploads WHERE NOT is_done").fetchall()

    def is_uploaded(self, url: str) -> None:
        """A file is there."""
        self._db.execute("UPDATE uploads SET is_done = 1 WHERE url = ?", (url,))

    # What has come.

    def keep(self, received: Sequence[Received]) -> tuple[list[Received], list[Received]]:
        """Keep results; returns those that are new, and those of jobs that are not this submission's.

        When it returns, they are on the disk. A second result of a job is not kept.
        """
        new, strange = [], []
        with self.transaction():
            for one in received:
                # A result also says that its job was in the queue.
                kept = self._db.execute(
                    "UPDATE jobs SET result = ?, received_at = ?, failed = ?, tokens = ?, cost = ?,"
                    " state = 2, body = NULL WHERE id = ? AND result IS NULL",
                    (one.body, one.at, one.failed, one.tokens, one.cost, one.id),
                )
                if kept.rowcount:
                    new.append(one)
                elif not self._db.execute("SELECT 1 FROM jobs WHERE id = ?", (one.id,)).fetchone():
                    strange.append(one)
        return new, strange

    def results(self) -> Iterator[Kept]:
        """The results that there are, in the order of the jobs."""
        rows = self._db.execute(
            "SELECT ordinal, id, custom_id, result, received_at, failed FROM jobs"
            " WHERE result IS NOT NULL ORDER BY ordinal"
        )
        while some := list(islice(rows, _ROWS_AT_ONCE)):
            yield from map(_kept, some)

    def result(self, job_id: str) -> Kept:
        """The result of a job that has one."""
        row = self._db.execute(
            "SELECT ordinal, id, custom_id, result, received_at, failed FROM jobs WHERE id = ?", (job_id,)
        ).fetchone()
        return _kept(row)

    def counts(self) -> Counts:
        """How far it has come."""
        row: tuple[Any, ...] = self._db.execute(
            "SELECT count(*), coalesce(sum(state = 1), 0), coalesce(sum(state = 2), 0),"
            " coalesce(sum(failed = 0), 0), coalesce(sum(failed), 0), coalesce(sum(tokens), 0),"
            " coalesce(sum(cost), 0), count(cost) > 0 FROM jobs"
        ).fetchone()
        return Counts(*row)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of what is done within, on the disk; or none of it."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")


def _kept(row: tuple[Any, ...]) -> Kept:
    ordinal, job_id, custom_id, body, at, failed = row
    return Kept(ordinal, job_id, custom_id, body, at, bool(failed))
