"""Install releases of RabbitMQ next to this machine's, each in its own Debian system."""

import os
import shlex
import shutil
from pathlib import Path

import pytest

from deploy.local.install import Installation, exclusive_lock
from tests import debian

# Debian's suites: trixie has RabbitMQ 4.0, sid a recent release (4.3 in 2026).
SUITES = ("trixie", "sid")
# One of the suites, or a folder with rabbitmq-server and rabbitmqctl; empty: the machine's RabbitMQ.
VARIABLE = "VQA_TEST_RABBITMQ"
_PROGRAMS = {
    "rabbitmq-server": "/usr/lib/rabbitmq/bin/rabbitmq-server",
    "rabbitmqctl": "/usr/lib/rabbitmq/bin/rabbitmqctl",
    "epmd": "/usr/bin/epmd",
}
# Runs a program inside the file system, as the same process. `HOME` is the node's folder; it and the working
# directory are seen inside under their own names. The mounts end with the process.
_ENTER = """\
#!/bin/sh
exec unshare --mount sh -ec '
root=$1 program=$2
shift 2
mount --rbind /proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/tmp"
for folder in "$HOME" "$PWD"; do
  if [ "$folder" != / ]; then
    mkdir -p "$root$folder"
    mount --bind "$folder" "$root$folder"
  fi
done
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
exec chroot "$root" "$program" "$@"
' enter {root} {program} "$@"
"""


def chosen_installation() -> Installation | None:
    """Return the RabbitMQ that `VQA_TEST_RABBITMQ` names; None if it is not set."""
    name = os.environ.get(VARIABLE)
    if not name:
        return None
    return installation(name) if name in SUITES else _installation_in(Path(name))


def installation(suite: str) -> Installation:
    """Return the RabbitMQ of a Debian suite, installed on first use (a minute); skip if it cannot be had."""
    debian.install({"unshare": "util-linux"})
    root = debian.unpacked(suite, "rabbitmq-server", variant="minbase")
    with exclusive_lock(root):
        # Without it the node waits for a name server.
        (root / "etc/hosts").write_text("127.0.0.1 localhost\n")
        return _installation_in(_write_programs(root))


def _write_programs(root: Path) -> Path:
    """Write a script for each program; return their folder."""
    folder = root.with_suffix(".programs")
    folder.mkdir(exist_ok=True)
    for name, path in _PROGRAMS.items():
        program, text = folder / name, _ENTER.format(root=shlex.quote(str(root)), program=path)
        # A shell may be reading an existing script.
        if not program.exists() or program.read_text() != text:
            new = folder / f"{name}.new"
            new.write_text(text)
            new.chmod(0o755)
            new.rename(program)
    return folder


def _installation_in(folder: Path) -> Installation:
    server, ctl, epmd = (folder / name for name in _PROGRAMS)
    if not (server.exists() and ctl.exists()):
        pytest.fail(f"{VARIABLE}: {folder} has no rabbitmq-server and rabbitmqctl; suites are {SUITES}")
    return Installation(server, ctl, epmd if epmd.exists() else Path(shutil.which("epmd") or epmd))
