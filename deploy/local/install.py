"""Find RabbitMQ on this machine, or install it."""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# The scripts themselves: Debian's wrappers on PATH change to a user who cannot write the stack's folder.
_SCRIPT_FOLDERS = (
    "/usr/lib/rabbitmq/bin",  # Debian, Ubuntu, Fedora
    "/opt/homebrew/opt/rabbitmq/sbin",  # Homebrew on Apple silicon
    "/usr/local/opt/rabbitmq/sbin",  # Homebrew on Intel
    "/opt/rabbitmq/sbin",  # the generic archive
)
_ERLANG_FOLDERS = "/opt/homebrew/opt/erlang/bin", "/usr/local/opt/erlang/bin", "/usr/lib/erlang/bin"
# Other users of the package manager, such as unattended upgrades, are waited for.
_APT = "DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300"
_DISABLE_SERVICE = "{ [ ! -d /run/systemd/system ] || systemctl disable --now rabbitmq-server; }"
_INSTALL_TIMEOUT_SECONDS = 900
_PROBE_TIMEOUT_SECONDS = 5

HOW_TO_INSTALL = (
    "RabbitMQ is needed and could not be installed: install it (Debian/Ubuntu: "
    "`sudo apt-get install rabbitmq-server`, macOS: `brew install rabbitmq`), or start Docker, "
    "or set VQA_RABBITMQ_URL to the URL of a broker."
)


class RabbitMQNotInstalledError(RuntimeError):
    """RabbitMQ is not installed and cannot be installed; the message is one line that says what to do."""


@dataclass(frozen=True)
class Installation:
    """The paths of RabbitMQ's programs."""

    server: Path
    ctl: Path
    epmd: Path


def ensure_rabbitmq(on_progress: Callable[[str], None] = lambda _: None) -> Installation:
    """Return where RabbitMQ is, after installing it if necessary.

    Args:
        on_progress: Called with a line of text before a step that takes long.

    Raises:
        RabbitMQNotInstalledError: It cannot be installed.
    """
    with exclusive_lock():
        found = find_installation() or _install(install_commands(), on_progress)
    if found is None:
        raise RabbitMQNotInstalledError(HOW_TO_INSTALL)
    return found


def find_installation() -> Installation | None:
    """Return where RabbitMQ's programs are, or None if they are not installed."""
    folders = [Path(folder) for folder in _SCRIPT_FOLDERS]
    if on_path := shutil.which("rabbitmq-server"):
        folders.append(Path(on_path).resolve().parent)
    epmd = shutil.which("epmd") or shutil.which("epmd", path=os.pathsep.join(_ERLANG_FOLDERS))
    for folder in folders:
        server, ctl = folder / "rabbitmq-server", folder / "rabbitmqctl"
        if epmd and server.exists() and ctl.exists():
            return Installation(server, ctl, Path(epmd))
    return None


def install_commands() -> list[tuple[str, ...]]:
    """Return the commands of this machine's package manager, to be tried in turn; none if it has none."""
    is_root = os.geteuid() == 0
    if shutil.which("apt-get") and (is_root or succeeds("sudo", "-n", "true")):
        # RUNLEVEL=1 prevents the package from starting a system service where there is no systemd.
        shell = (*(() if is_root else ("sudo", "-n")), "env", "RUNLEVEL=1", "sh", "-c")
        install = (*shell, f"{_APT} install -y --no-install-recommends rabbitmq-server && {_DISABLE_SERVICE}")
        # The package lists may be missing or old.
        return [install, (*shell, f"{_APT} update"), install]
    # Homebrew refuses to run as root.
    if shutil.which("brew") and not is_root:
        return [("brew", "install", "rabbitmq")]
    return []


@contextmanager
def exclusive_lock(folder: str | Path | None = None) -> Iterator[None]:
    """Hold a lock on a folder, by default that for temporary files: nobody uses half an installation."""
    # The folder itself is locked, so that no file is left behind.
    lock = os.open(folder or tempfile.gettempdir(), os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _install(commands: list[tuple[str, ...]], on_progress: Callable[[str], None]) -> Installation | None:
    for command in commands:
        on_progress(f"RabbitMQ is not installed: {' '.join(command)}")
        # Not to standard output, which may be another program's input.
        subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            timeout=_INSTALL_TIMEOUT_SECONDS,
            check=False,
        )
        if found := find_installation():
            return found
    return None


def succeeds(*command: str) -> bool:
    """Return whether a short command runs and ends with exit code 0."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PROBE_TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
