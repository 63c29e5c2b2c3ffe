"""Runs one command and ends it as soon as whoever asked for it is gone.

Started as a script of its own by `processes.py`, which holds the other end of this program's standard input:
each line there is the name of a signal for the command, and the end of the input means that the owner died,
by whatever means, `kill -9` included. (Linux's parent-death signal would not do: it fires when the *thread*
that started the child ends, and only Linux has it.)

Arguments: the log file, what to remove if the owner died (paths joined as in PATH, or nothing), the command.
It imports little, since one of these runs beside every service.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

# Nobody needs the data of an orphan; this is for what has to be cleared away elsewhere.
ORPHAN_GRACE_SECONDS = 3


def main() -> int:
    """Run the command to its end; return its exit code, or 128 plus the signal that ended it."""
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
    threading.Thread(target=_obey, args=(child.pid, orphaned), daemon=True).start()
    code = child.wait()
    _signal_group(child.pid, signal.SIGKILL)
    if orphaned.is_set():
        for path in filter(None, leftovers.split(os.pathsep)):
            _remove(Path(path))
    return code if code >= 0 else 128 - code


def _obey(group: int, orphaned: threading.Event) -> None:
    for line in sys.stdin:
        _signal_group(group, signal.Signals[line.strip()])
    orphaned.set()
    _signal_group(group, signal.SIGCONT)
    _signal_group(group, signal.SIGTERM)
    threading.Event().wait(ORPHAN_GRACE_SECONDS)
    _signal_group(group, signal.SIGKILL)


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _remove(path: Path) -> None:
    import shutil  # noqa: PLC0415 - only orphans need it, and every start would pay for it

    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    shutil.rmtree(path, ignore_errors=True)
    # The stack's folder goes with the last of its parts.
    with contextlib.suppress(OSError):
        path.parent.rmdir()


if __name__ == "__main__":
    sys.exit(main())
