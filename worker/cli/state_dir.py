"""The state folder: one file for each submission, named after it."""

import os
import re
from pathlib import Path
from typing import Final

from worker.cli.shell import CommandError
from worker.cli.submit.state import SubmissionState

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


def find(name: str) -> SubmissionState:
    """Open the state file of a submission, by name or by path.

    Raises:
        CommandError: there is no such submission.
    """
    path = Path(name)
    if not path.is_file():
        path = path_of(name)
        if not path.is_file():
            known = ", ".join(names()) or "none"
            raise CommandError(
                f"no such submission: {name} (known: {known}). Run `vqa-worker results` for a list."
            )
    return SubmissionState.open(path)


def names() -> list[str]:
    """Return the names of all submissions, newest first."""
    found = [path for path in folder().glob(f"*{SUFFIX}") if not path.name.startswith(".")]
    found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    return [path.name.removesuffix(SUFFIX) for path in found]


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
