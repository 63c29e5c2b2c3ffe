"""A pseudo-terminal for commands."""

import os
import pty
import re
import subprocess
from collections.abc import Mapping

from tests.integration.cli.running import Cli
from tests.running import PATIENCE_S, until


class Terminal:
    """A command whose stdin and stderr are a terminal; its stdout too by default."""

    def __init__(
        self,
        cli: Cli,
        *arguments: str,
        pipes: bool = False,
        columns: int = 150,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._side, command_side = pty.openpty()
        # With and without escape sequences.
        self.raw = self.shown = ""
        self.process = subprocess.Popen(  # noqa: S603 - a test's own
            [*cli.command, *arguments],
            env={**cli.environment, "TERM": "xterm", "COLUMNS": str(columns), **(environment or {})},
            cwd=cli.folder,
            stdin=command_side,
            stdout=subprocess.PIPE if pipes else command_side,
            stderr=command_side,
        )
        cli.adopt(self.process)
        os.close(command_side)
        os.set_blocking(self._side, False)

    def type(self, text: str) -> None:
        """Type text."""
        os.write(self._side, text.encode())

    async def shows(self, pattern: str) -> None:
        """Wait until the screen has shown a pattern."""
        await until(lambda: re.search(pattern, self._read()), f"{pattern!r} on the screen: {self.shown!r}")

    async def ended(self) -> int:
        """Wait for the exit; return the exit code."""

        def has_ended() -> bool:
            self._read()
            return self.process.poll() is not None

        await until(has_ended, f"the end: {self.shown!r}", PATIENCE_S)
        self._read()
        os.close(self._side)
        return self.process.returncode

    def _read(self) -> str:
        try:
            while some := os.read(self._side, 65536):
                self.raw += some.decode(errors="replace")
                self.shown += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", some.decode(errors="replace"))
        except OSError:
            pass  # no data now, or the other side is closed
        return self.shown


def rows(raw: str, columns: int) -> list[str]:
    """Return what a terminal of this width shows after the output of text and progress bars."""
    lines: list[list[str]] = [[]]
    row = column = 0
    for token in re.findall(r"\x1b\[[0-9;?]*[a-zA-Z]|.|\n", raw, re.DOTALL):
        if token[-1] == "A" and len(token) > 1:
            row -= int(token[2:-1] or 1)
        elif token == "\x1b[2K":
            lines[row] = []
        elif token == "\r":
            column = 0
        elif token == "\n" or (len(token) == 1 and column == columns):
            row, column = row + 1, 0 if token != "\n" else column
            lines += [[]] if row == len(lines) else []
        if len(token) == 1 and token.isprintable():
            lines[row] += [" "] * (column + 1 - len(lines[row]))
            lines[row][column] = token
            column += 1
    return ["".join(line).rstrip() for line in lines]
