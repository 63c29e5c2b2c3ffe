"""The state folder, which only its owner can read: a file for each submission, and its lock."""

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from worker.cli.shell import CommandError

SUFFIX: Final = ".submission"
# The name is part of a queue name, which is limited to 255 bytes.
MAX_NAME_CHARS: Final = 100
# The files hold questions and answers: only their owner can read them.
PRIVATE_FILE_MODE: Final = 0o600
PRIVATE_FOLDER_MODE: Final = 0o700


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


def open_private(path: str, flags: int) -> int:
    """Open a file, created with mode 0600; an `opener` for `open`."""
    return os.open(path, flags, PRIVATE_FILE_MODE)


def make_private_folder(path: Path) -> None:
    """Create a folder with mode 0700 and its parents; leave one that exists as it is."""
    if not path.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=PRIVATE_FOLDER_MODE, exist_ok=True)


def append_lines(path: Path, *lines: Mapping[str, Any]) -> None:
    """Append lines to a private JSONL file; they are on the disk when this returns.

    Raises:
        CommandError: the file cannot be written.
    """
    try:
        make_private_folder(path.parent)
        with open(path, "ab", opener=open_private) as file:  # pathlib has no opener
            if path.is_file():
                # It may exist with another mode. (The mode of a device such as /dev/stdout stays.)
                os.fchmod(file.fileno(), PRIVATE_FILE_MODE)
            texts = (json.dumps(line, ensure_ascii=False) for line in lines)
            file.writelines(f"{text}\n".encode(errors="replace") for text in texts)
            file.flush()
            if path.is_file():
                os.fsync(file.fileno())
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}. Choose another file.") from None
