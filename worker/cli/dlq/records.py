"""What was done with letters, and the letters themselves, kept in files: JSON, one object a line."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from worker.cli.shell import CommandError


class Lines:
    """A file that lines are added to; each is in it when `add` returns.

    Raises:
        CommandError: it cannot be written to.
    """

    def __init__(self, path: Path, *, keeps: bool = False) -> None:
        """`keeps`: it holds what is nowhere else soon, so that a line has to be on the disk."""
        self.path = path
        self._keeps = keeps
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
        except OSError as error:
            raise self._trouble(error) from None

    def add(self, line: Mapping[str, Any]) -> None:
        """Write one line."""
        try:
            self._file.write(json.dumps(line, ensure_ascii=False).encode(errors="replace") + b"\n")
            self._file.flush()
            if self._keeps:
                os.fsync(self._file.fileno())
        except OSError as error:
            raise self._trouble(error) from None

    def _trouble(self, error: OSError) -> CommandError:
        return CommandError(f"{self.path}: cannot be written to: {error.strerror}; name another file")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What could not be written was told then.
        with suppress(OSError):
            self._file.close()
