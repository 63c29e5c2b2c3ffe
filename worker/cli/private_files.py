"""Files and folders that only their owner can read: they hold questions and answers."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from worker.cli.shell import CommandError

PRIVATE_FILE_MODE: Final = 0o600
PRIVATE_FOLDER_MODE: Final = 0o700


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
