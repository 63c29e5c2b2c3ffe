"""Run one command, and end it when the program that asked for it dies.

Started as a script by `processes.py`, which holds the other end of standard input: each line there is the
name of a signal for the command, and the end of the input means that the owner died, by `kill -9` too.
(Linux's parent-death signal fires when the *thread* that started the child ends, and only Linux has it.)

Arguments: the log file, the paths to delete if the owner died (joined as in PATH, or empty), the command.
It imports little, as one of these runs next to every service.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

# An orphan need not save its data; this time is for what it has to clean up elsewhere.
ORPHAN_GRACE_SECONDS = 3


def main() -> int:
    """Run the command; return its exit code, or 128 plus the number of the signal that ended it."""
    log, leftovers, *command = sys.argv[1:]
    # This program has to outlive the command. Handlers, as the command would inherit an ignored signal.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    with Path(log).open("ab") as output:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, process_group=0
        )
    print(child.pid, flush=True)
    orphaned = threading.Event()
    threading.Thread(target=_forward_signals, args=(child.pid, orphaned), daemon=True).start()
    code = child.wait()
    _signal_group(child.pid, signal.SIGKILL)
    if orphaned.is_set():
        for path in filter(None, leftovers.split(os.pathsep)):
            _delete(Path(path))
    return code if code >= 0 else 128 - code


def _forward_signals(group: int, orphaned: threading.Event) -> None:
    for line in sys.stdin:
        _signal_group(group, signal.Signals[line.strip()])
    orphaned.set()
    _signal_group(group, signal.SIGCONT)
    _signal_group(group, signal.SIGTERM)
    time.sleep(ORPHAN_GRACE_SECONDS)
    _signal_group(group, signal.SIGKILL)


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _delete(path: Path) -> None:
    import shutil  # noqa: PLC0415 - only orphans need it, and it would slow every start

    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    shutil.rmtree(path, ignore_errors=True)
    # The last service to end deletes the stack's folder.
    with contextlib.suppress(OSError):
        path.parent.rmdir()


if __name__ == "__main__":
    sys.exit(main())
