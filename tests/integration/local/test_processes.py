import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deploy.local.processes import ServiceStartError, SupervisedProcess
from tests.integration.local.proc import alive, wait_until_ended

OWNER = """
import os, signal, sys, time
from pathlib import Path
from deploy.local.processes import SupervisedProcess
# It may have been started with SIGINT ignored; and a KeyboardInterrupt can be lost in a finalizer.
signal.signal(signal.SIGINT, signal.SIG_DFL)
folder = Path(sys.argv[1]) / "stack" / "part"
command = ["sh", "-c", "sleep 600 & sleep 600"]
process = SupervisedProcess("sleeper", command, environment=os.environ, folder=folder)
process.launch()
print(process.pid, flush=True)
time.sleep(600)
"""


def start(folder: Path, *command: str) -> SupervisedProcess:
    process = SupervisedProcess("Sleeper", command, environment=os.environ, folder=folder)
    process.launch()
    return process


def wait_until_ready(process: SupervisedProcess, *, timeout_seconds: float = 0.2) -> None:
    process.wait_until(lambda: False, timeout_seconds=timeout_seconds, advice="Have a rest.")


def test_the_children_of_a_killed_service_end_too(tmp_path: Path) -> None:
    process = start(tmp_path, "sh", "-c", "sleep 600 & echo $!; wait")
    while not process.log.read_text():
        time.sleep(0.01)
    child = int(process.log.read_text())
    process.kill()
    assert not process.running
    assert wait_until_ended([child, process.pid]) == []


def test_a_service_that_ignores_sigterm_is_killed_after_the_grace_period(tmp_path: Path) -> None:
    process = start(tmp_path, "sh", "-c", "trap 'echo asked' TERM; while :; do sleep 0.1; done")
    time.sleep(0.2)
    process.stop(grace_seconds=0.5)
    assert process.log.read_text().splitlines()[-1] == "asked"
    assert alive([process.pid]) == []


def test_a_service_can_be_started_again(tmp_path: Path) -> None:
    process = start(tmp_path, "sleep", "600")
    first = process.pid
    process.kill()
    process.launch()
    assert process.pid != first
    process.kill()


def test_a_service_that_fails_to_start_shows_the_end_of_its_log_and_a_fix(tmp_path: Path) -> None:
    process = start(tmp_path, "sh", "-c", "printf '\\033[31mno disk left\\033[0m'; exit 3")
    with pytest.raises(ServiceStartError, match=r"Sleeper ended .*Have a rest(.|\n)*  no disk left"):
        wait_until_ready(process, timeout_seconds=5)


def test_a_service_that_is_never_ready_is_an_error(tmp_path: Path) -> None:
    process = start(tmp_path, "sleep", "600")
    with pytest.raises(ServiceStartError, match="was not ready"):
        wait_until_ready(process)
    process.kill()


def test_a_missing_program_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ServiceStartError, match="no-such-program"):
        start(tmp_path, "/no-such-program")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_services_end_with_their_killed_owner(tmp_path: Path, how: signal.Signals) -> None:
    owner = subprocess.Popen(  # noqa: S603 - a program of this test
        [sys.executable, "-c", OWNER, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert owner.stdout is not None
    with owner, owner.stdout as output:
        try:
            service = int(output.readline())
            assert alive([service]) == [service]
            owner.send_signal(how)
            assert owner.wait(60) == -how
        finally:
            owner.kill()
    assert wait_until_ended([service]) == []
    # The folder is deleted just after the processes have ended.
    give_up = time.monotonic() + 5
    while (tmp_path / "stack").exists() and time.monotonic() < give_up:
        time.sleep(0.02)
    assert list(tmp_path.iterdir()) == []
