"""Services as child processes that cannot outlive this one."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_GUARD = Path(__file__).with_name("supervisor.py")
_POLL_SECONDS = 0.05
_LOG_TAIL_LINES = 15
_TERMINAL_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class ServiceStartError(RuntimeError):
    """A service is not up; the message says which, shows the end of its log, and what to do."""


class SupervisedProcess:
    """One service in a process group of its own, ended with everything it started.

    Ctrl-C in a terminal does not reach it: this program decides when it stops.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        folder: Path,
        leftovers: Sequence[Path],
    ) -> None:
        """Describe the service; nothing is started yet.

        Args:
            name: How to call it in messages.
            command: The program and its arguments.
            environment: All of its environment.
            folder: Its working directory, with its log.
            leftovers: Folders and files that have to go if this program dies without cleaning up.
        """
        self.name = name
        self.log = folder / f"{name.lower().replace(' ', '-')}.log"
        self._command = list(command)
        self._environment = dict(environment)
        self._folder = folder
        self._leftovers = [str(path) for path in leftovers]
        self._guard: subprocess.Popen[str] | None = None
        self._pid = 0

    @property
    def running(self) -> bool:
        """Whether the service lives."""
        return self._guard is not None and self._guard.poll() is None

    @property
    def pid(self) -> int:
        """The process id of the service itself, which is also that of its process group."""
        return self._pid

    def launch(self) -> None:
        """Start the service without waiting for it to be ready. Nothing happens if it runs."""
        if self.running:
            return
        self.kill()
        self._folder.mkdir(parents=True, exist_ok=True)
        leftovers = os.pathsep.join(self._leftovers)
        with self.log.open("ab") as log:
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_GUARD), str(self.log), leftovers, *self._command],
                env=self._environment,
                cwd=self._folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        line = self._guard.stdout.readline() if self._guard.stdout else ""
        if not line:
            raise self._given_up("could not be run.")
        self._pid = int(line)

    def wait_until(self, ready: Callable[[], bool], *, timeout_seconds: float, advice: str) -> None:
        """Return when `ready` says so.

        Raises:
            ServiceStartError: The service ended, or was not ready in time and has been killed.
        """
        give_up = time.monotonic() + timeout_seconds
        while not ready():
            if not self.running:
                raise self._given_up(f"ended while it started. {advice}")
            if time.monotonic() > give_up:
                raise self._given_up(f"was not ready after {timeout_seconds:.0f} s. {advice}")
            time.sleep(_POLL_SECONDS)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the service and everything it started in its group."""
        if self._guard is None or self._guard.stdin is None:
            return
        # It may just have ended, which is as good as having got the signal.
        with contextlib.suppress(BrokenPipeError, ValueError):
            self._guard.stdin.write(f"{number.name}\n")
            self._guard.stdin.flush()

    def stop(self, *, grace_seconds: float = 30) -> None:
        """End the service in its own orderly way, and by force after the grace."""
        self._end(signal.SIGTERM, grace_seconds)

    def kill(self) -> None:
        """End the service at once, as a crash would (SIGKILL)."""
        self._end(signal.SIGKILL, 10)

    def pause(self) -> None:
        """Freeze the service (SIGSTOP): connections stay open and nothing answers."""
        if self.running:
            os.killpg(self._pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let a frozen service go on."""
        if self.running:
            os.killpg(self._pid, signal.SIGCONT)

    def _given_up(self, what: str) -> ServiceStartError:
        """End the service; return an error for a person, with the end of the service's log."""
        self.kill()
        return ServiceStartError(f"{self.name} {what}\nThe end of its log ({self.log}):\n{self._log_tail()}")

    def _end(self, number: signal.Signals, grace_seconds: float) -> None:
        guard = self._guard
        if guard is None:
            return
        self.send(number)
        try:
            guard.wait(grace_seconds)
        except subprocess.TimeoutExpired:
            self.send(signal.SIGKILL)
            guard.wait()
        finally:
            for pipe in (guard.stdin, guard.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
        self._guard = None

    def _log_tail(self) -> str:
        if not self.log.exists():
            return "  (empty)"
        text = _TERMINAL_COLOURS.sub("", self.log.read_text(errors="replace"))
        lines = text.splitlines()[-_LOG_TAIL_LINES:]
        return "\n".join(f"  {line}" for line in lines) or "  (empty)"
