"""Where manifests are kept, and what they go by."""

import os
import re
from pathlib import Path
from typing import Final

from worker.cli.shell import CommandError
from worker.cli.submit.manifest import Manifest

SUFFIX: Final = ".submission"
# It stands in the name of a queue, which has 255 bytes.
MAX_NAME_CHARS: Final = 100


def folder() -> Path:
    """The folder of all manifests (XDG Base Directory Specification: state of a program)."""
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "vqa-worker"


def path_of(name: str) -> Path:
    """Where the manifest of a submission is."""
    return folder() / f"{name}{SUFFIX}"


def find(name: str) -> Manifest:
    """The manifest of this name or at this path.

    Raises:
        CommandError: there is none.
    """
    path = Path(name)
    if not path.is_file():
        path = path_of(name)
        if not path.is_file():
            known = ", ".join(names()) or "none"
            raise CommandError(f"there is no submission of the name {name} here (there are: {known})")
    return Manifest.open(path)


def names() -> list[str]:
    """The names of all submissions, the youngest first."""
    found = [path for path in folder().glob(f"*{SUFFIX}") if not path.name.startswith(".")]
    found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    return [path.name.removesuffix(SUFFIX) for path in found]


def fit_for_name(title: str) -> str:
    """A title as a part of a name."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", title).strip("-")[:40] or "jobs"


def check_name(name: str) -> str:
    """A name that a person has chosen.

    Raises:
        ValueError: it can be none.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name) or len(name) > MAX_NAME_CHARS:
        raise ValueError(f"must be letters, digits, '-', '_' and '.', {MAX_NAME_CHARS} at most")
    return name
