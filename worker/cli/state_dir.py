"""The state folder: one file for each submission, named after it, and its lock."""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from worker.cli.private_files import make_private_folder, open_private
from worker.cli.shell import CommandError

SUFFIX: Final = ".submission"
# The name is part of a queue name, which is limited to 255 bytes.
MAX_NAME_CHARS: Final = 100


def folder() -> Path:
    """Return the state folder (XDG Base Directory Specification: `XDG_STATE_HOME`)."""
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "vqa-worker"


def path_of(name: str) -> Path:
    """Return the path of a submission's state file."""
    return folder() / f"{name}{SUFFIX}"


def find(name: str) -> Path:
    """Return the path of an existing submission's state file.

    Raises:
        CommandError: there is no such submission.
    """
    path = path_of(name)
    if "/" in name or not path.is_file():
        raise CommandError(f"no such submission: {name}. `vqa-worker submissions list` shows all.")
    return path


@contextmanager
def locked(name: str) -> Iterator[Path]:
    """Hold the lock of a submission, which need not exist; yield the path of its state file.

    Only the holder creates, changes or deletes the state file. The kernel releases the lock when the process
    ends.

    Raises:
        CommandError: another process holds it.
    """
    make_private_folder(folder())
    path = folder() / f"{name}.lock"
    descriptor = _lock(path)
    if descriptor is None:
        raise CommandError(
            f"another vqa-worker command is using the submission {name}. Wait until it has finished, or stop"
            " it."
        )
    try:
        yield path_of(name)
    finally:
        # Nobody else can hold a lock on this file now; `_lock` detects that it was deleted.
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(path: Path) -> int | None:
    """Return the descriptor that holds the lock, or None if another process holds it.

    `flock` belongs to the descriptor. A POSIX lock would end when the process closes any descriptor of the
    file.
    """
    while True:
        descriptor = open_private(str(path), os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(descriptor)):
                return descriptor
        # The last holder has deleted this file, and another process may have created the next one.
        os.close(descriptor)


def names() -> list[str]:
    """Return the names of all submissions."""
    return sorted(path.name.removesuffix(SUFFIX) for path in folder().glob(f"[!.]*{SUFFIX}"))


def to_name(title: str) -> str:
    """Turn a title into a part of a submission's name."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", title).strip("-")[:40] or "jobs"


def check_name(name: str) -> str:
    """Return the name if it is valid.

    Raises:
        ValueError: The name is invalid.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name) or len(name) > MAX_NAME_CHARS:
        raise ValueError(f"must consist of at most {MAX_NAME_CHARS} letters, digits, '-', '_' and '.'")
    return name
