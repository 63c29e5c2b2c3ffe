"""Start `vqa-worker run` as a fork of a process that has imported its modules, which is much faster."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from worker.__main__ import main

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["worker.__main__", "worker.app.assembly"])


class ForkedRun:
    """A running `vqa-worker run`, with the part of `subprocess.Popen` that tests use.

    What a start does before and while it imports modules is for the tests of the real command.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        folder: Path,
        stdout: Path,
        stderr: Path,
        *,
        patch: str,
    ) -> None:
        """Append output to `stdout` and errors to `stderr`, perhaps the same file; run `patch` first."""
        self._process = FORKS.Process(
            target=_run, args=(dict(environment), folder, stdout, stderr, patch), daemon=True
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError(f"the worker did not end within {timeout} s")
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(environment: dict[str, str], folder: Path, stdout: Path, stderr: Path, patch: str) -> None:
    for path, descriptor in ((stdout, 1), (stderr, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    exec(patch, {})  # noqa: S102 - a test's own
    sys.exit(main(["run"]))
