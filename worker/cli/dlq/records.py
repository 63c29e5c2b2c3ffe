"""JSONL files with copies of dead letters and records of replays and purges."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from worker.cli.private_files import PRIVATE_FILE_MODE, make_private_folder, open_private
from worker.cli.shell import CommandError


class Lines:
    """A JSONL file that lines are appended to, readable by its owner only.

    Raises:
        CommandError: the file cannot be written.
    """

    def __init__(self, path: Path, *, fsync: bool = False) -> None:
        """`fsync`: wait for the disk after each line, because the message is then deleted."""
        self.path = path
        self._fsync = fsync
        try:
            make_private_folder(path.parent)
            # pathlib has no opener; `__exit__` closes the file.
            self._file = open(path, "ab", opener=open_private)  # noqa: SIM115 - see above
            if path.is_file():
                # It may exist with another mode. (The mode of a device such as /dev/stdout stays.)
                os.fchmod(self._file.fileno(), PRIVATE_FILE_MODE)
        except OSError as error:
            raise self._write_error(error) from None

    def add(self, line: Mapping[str, Any]) -> None:
        """Append one line; it is in the file when this returns."""
        try:
            self._file.write(json.dumps(line, ensure_ascii=False).encode(errors="replace") + b"\n")
            self._file.flush()
            if self._fsync:
                os.fsync(self._file.fileno())
        except OSError as error:
            raise self._write_error(error) from None

    def _write_error(self, error: OSError) -> CommandError:
        return CommandError(f"cannot write {self.path}: {error.strerror}. Choose another file.")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # `add` has reported write errors.
        with suppress(OSError):
            self._file.close()
