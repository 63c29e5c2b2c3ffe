"""Files and folders that only their owner can read: they hold questions and answers."""

import os
from pathlib import Path
from typing import Final

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
