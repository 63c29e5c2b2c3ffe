"""Child processes that cannot outlive this one."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_SUPERVISOR = Path(__file__).with_name("supervisor.py")
_POLL_SECONDS = 0.05
_LOG_TAIL_LINES = 15
_TERMINAL_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class ServiceStartError(RuntimeError):
    """A service did not start; the message names it, shows the end of its log, and says what to do."""


class SupervisedProcess:
    """A process in its own process group, which ends together with all its children.

    Ctrl-C in a terminal does not reach it: this program decides when it stops.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        folder: Path,
        leftovers: Sequence[Path] = (),
    ) -> None:
        """Describe the process; `launch` starts it.

        Args:
            name: Its name in messages and of its log file.
            command: The program and its arguments.
            environment: Its whole environment.
            folder: Its working directory with its log; deleted if this program dies without cleaning up.
            leftovers: Files and folders to delete in addition if this program dies without cleaning up.
        """
        self.name = name
        self.log = folder / f"{name.lower().replace(' ', '-')}.log"
        self.pid = 0
        self._command = command
        self._environment = environment
        self._folder = folder
        self._leftovers = os.pathsep.join(map(str, [*leftovers, folder]))
        self._supervisor: subprocess.Popen[str] | None = None

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._supervisor is not None and self._supervisor.poll() is None

    def launch(self) -> None:
        """Start the process without waiting until it is ready; do nothing if it runs.

        Raises:
            ServiceStartError: The program could not be run.
        """
        if self.running:
            return
        self.kill()
        self._folder.mkdir(parents=True, exist_ok=True)
        supervisor = [sys.executable, "-I", "-S", str(_SUPERVISOR), str(self.log), self._leftovers]
        with self.log.open("ab") as log:
            self._supervisor = subprocess.Popen(
                [*supervisor, *self._command],
                env=self._environment,
                cwd=self._folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        line = self._supervisor.stdout.readline() if self._supervisor.stdout else ""
        if not line:
            raise self._failed("could not be run.")
        self.pid = int(line)

    def wait_until(self, ready: Callable[[], bool], *, timeout_seconds: float, advice: str) -> None:
        """Poll `ready` until it returns true.

        Raises:
            ServiceStartError: The process ended, or was not ready in time and was killed.
        """
        deadline = time.monotonic() + timeout_seconds
        while not ready():
            if not self.running:
                raise self._failed(f"ended while it started. {advice}")
            if time.monotonic() > deadline:
                raise self._failed(f"was not ready after {timeout_seconds:.0f} s. {advice}")
            time.sleep(_POLL_SECONDS)

    def stop(self, *, grace_seconds: float = 30) -> None:
        """Send SIGTERM to the process group, and SIGKILL after the grace period."""
        self._end(signal.SIGTERM, grace_seconds)

    def kill(self) -> None:
        """Send SIGKILL to the process group, as in a crash."""
        self._end(signal.SIGKILL, 10)

    def _end(self, number: signal.Signals, grace_seconds: float) -> None:
        supervisor = self._supervisor
        if supervisor is None:
            return
        self._send(supervisor, number)
        try:
            supervisor.wait(grace_seconds)
        except subprocess.TimeoutExpired:
            self._send(supervisor, signal.SIGKILL)
            supervisor.wait()
        with contextlib.suppress(BrokenPipeError):
            supervisor.communicate()
        self._supervisor = None

    def _send(self, supervisor: "subprocess.Popen[str]", number: signal.Signals) -> None:
        # The process may have ended in this moment.
        with contextlib.suppress(BrokenPipeError, ValueError):
            if supervisor.stdin is not None:
                supervisor.stdin.write(f"{number.name}\n")
                supervisor.stdin.flush()

    def _failed(self, what: str) -> ServiceStartError:
        """End the process; return an error with the end of its log."""
        self.kill()
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        lines = _TERMINAL_COLOURS.sub("", text).splitlines()[-_LOG_TAIL_LINES:] or ["(empty)"]
        tail = "\n".join(f"  {line}" for line in lines)
        return ServiceStartError(f"{self.name} {what}\nThe end of its log ({self.log}):\n{tail}")
