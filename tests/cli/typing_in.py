"""Runs commands as a person or a script would: a process of its own, with these settings and no others."""

import asyncio
import contextlib
import json
import os
import pty
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from deploy.local.stack import Stack
from tests.running import ROOT, Ended, until

COMMAND = (sys.executable, "-m", "worker")


@dataclass(frozen=True)
class Terminal:
    """Where commands are typed in: an environment and a working directory."""

    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def beside(cls, stack: Stack, folder: Path, **settings: str) -> Self:
        """With the stack's settings, and queues under a name of its own."""
        name = f"c{uuid.uuid4().hex[:10]}"
        queues = {"VQA_JOBS_QUEUE": f"{name}.jobs", "VQA_RESULTS_QUEUE": f"{name}.results"}
        return cls(folder, {**stack.environment(), **queues, "VQA_RETRY_DELAYS": "1", **settings})

    def having(self, **settings: str) -> "Terminal":
        """The same with other settings."""
        return Terminal(self.folder, {**self.environment, **settings})

    @property
    def whole_environment(self) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("VQA_", "AWS_", "COLUMNS"))}
        return {**inherited, "PYTHONPATH": str(ROOT), **self.environment}

    async def run(self, *arguments: str, patience_s: float = 60.0) -> Ended:
        """Run a command to its end, without a terminal."""
        done = await asyncio.to_thread(
            subprocess.run,
            [*COMMAND, *arguments],
            env=self.whole_environment,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=patience_s,
            check=False,
        )
        return Ended(done.returncode, done.stdout, done.stderr.splitlines())

    async def told(self, *arguments: str, code: int = 0) -> list[dict[str, Any]]:
        """What it prints with `--json`."""
        ended = await self.run(*arguments, "--json")
        assert ended.code == code, ended
        return [json.loads(line) for line in ended.output.splitlines()]

    @contextlib.contextmanager
    def started(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """A command that is still running; killed in the end."""
        with subprocess.Popen(  # noqa: S603 - a test's own
            [*COMMAND, *arguments],
            env=self.whole_environment,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    @contextlib.contextmanager
    def watched(self, *arguments: str) -> Iterator["Watched"]:
        """A command in a terminal of 100 by 30 characters."""
        ours, theirs = pty.openpty()
        environment = {**self.whole_environment, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
        process = subprocess.Popen(  # noqa: S603 - a test's own
            [*COMMAND, *arguments],
            env=environment,
            cwd=self.folder,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        os.set_blocking(ours, False)
        try:
            yield Watched(process, ours)
        finally:
            process.kill()
            process.wait()
            os.close(ours)


class Watched:
    """A command in a terminal, and what it has shown there so far."""

    def __init__(self, process: subprocess.Popen[bytes], descriptor: int) -> None:
        self._process = process
        self._descriptor = descriptor
        self.screen = ""

    def type(self, keys: str) -> None:
        os.write(self._descriptor, keys.encode())

    async def sees(self, text: str) -> None:
        """Wait until it has shown this."""
        await until(lambda: text in self._look(), f"{text!r} on the screen: {self.screen!r}")

    async def ended(self) -> int:
        """Wait for its end; returns the exit code."""

        def has_ended() -> bool:
            self._look()
            return self._process.poll() is not None

        await until(has_ended, "the command ends")
        self._look()
        return self._process.returncode

    def _look(self) -> str:
        with contextlib.suppress(OSError):
            while piece := os.read(self._descriptor, 1 << 16):
                self.screen += piece.decode(errors="replace")
        return self.screen
