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
