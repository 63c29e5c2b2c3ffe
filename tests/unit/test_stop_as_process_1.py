"""As process 1 of a container the worker stops on a SIGTERM during its start."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

UNSHARE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
PATIENCE_S = 60


def cannot_unshare() -> str | None:
    """Return why a PID namespace cannot be created; None if it can."""
    if shutil.which("unshare") is None:
        return "there is no `unshare`"
    tried = subprocess.run([*UNSHARE, "true"], capture_output=True, text=True, check=False)  # noqa: S603 - fixed arguments
    return None if tried.returncode == 0 else f"no PID namespace may be created: {tried.stderr.strip()}"


# The first module imported after the installation of the handler, and a later one.
@pytest.mark.parametrize("module", ["argparse", "asyncio"])
def test_process_1_stops_at_a_sigterm_during_its_imports(module: str) -> None:
    if (reason := cannot_unshare()) is not None:
        pytest.skip(reason)
    command = [*UNSHARE, sys.executable, "-X", "importtime", "-m", "worker", "run"]
    # Without a setting that is required: a worker that ignores the signal exits with 78.
    environment = {"PATH": os.environ["PATH"]}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as unshare:  # noqa: S603 - fixed
        assert unshare.stderr is not None
        for line in unshare.stderr:
            if line.rpartition("|")[2].strip() == module:
                break
        children = Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGTERM)
        unshare.stderr.read()
        assert unshare.wait(PATIENCE_S) == 128 + signal.SIGTERM
