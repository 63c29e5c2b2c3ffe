"""Finds RabbitMQ on this machine, or gets it here by the shortest way there is."""

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
from typing import assert_never

# The scripts themselves: Debian's wrappers on PATH change to a user who cannot write the stack's folder.
_SCRIPT_FOLDERS = (
    Path("/usr/lib/rabbitmq/bin"),  # Debian, Ubuntu, Fedora
    Path("/opt/homebrew/opt/rabbitmq/sbin"),  # Homebrew on Apple silicon
    Path("/usr/local/opt/rabbitmq/sbin"),  # Homebrew on Intel
    Path("/home/linuxbrew/.linuxbrew/opt/rabbitmq/sbin"),
    Path("/opt/rabbitmq/sbin"),  # the generic archive, and the official container image
    Path("/usr/lib/rabbitmq/sbin"),
)
_ERLANG_FOLDERS = (
    Path("/opt/homebrew/opt/erlang/bin"),
    Path("/usr/local/opt/erlang/bin"),
    Path("/home/linuxbrew/.linuxbrew/opt/erlang/bin"),
    Path("/usr/lib/erlang/bin"),
    Path("/usr/local/lib/erlang/bin"),
)
_INSTALL_SECONDS = 900
_DOCKER_ANSWER_SECONDS = 5

HOW_TO_INSTALL = (
    "RabbitMQ is needed and could not be installed from here: install it (Debian/Ubuntu: "
    "`sudo apt-get install rabbitmq-server`, macOS: `brew install rabbitmq`), or start Docker, "
    "or set VQA_RABBITMQ_URL to a broker of yours."
)


class RabbitMQNotInstalledError(RuntimeError):
    """There is no RabbitMQ and no way to get one; the message is one line that says what to install."""


@dataclass(frozen=True)
class Installation:
    """Where RabbitMQ's programs are on this machine."""

    server: Path
    ctl: Path
    epmd: Path


@dataclass(frozen=True)
class Machine:
    """What this machine offers, as far as it matters here."""

    installed: Installation | None = None
    docker: bool = False
    apt: bool = False
    brew: bool = False
    root: bool = False
    sudo: bool = False
    """Whether sudo works without asking for a password."""


@dataclass(frozen=True)
class UseInstalled:
    """RabbitMQ is here already."""

    installation: Installation


@dataclass(frozen=True)
class UseContainer:
    """Run the official image."""


@dataclass(frozen=True)
class Install:
    """Run a package manager: `commands`, and where that fails `refresh` and `commands` again."""

    commands: tuple[tuple[str, ...], ...]
    refresh: tuple[str, ...] | None


@dataclass(frozen=True)
class TellPerson:
    """Nothing can be done from here."""

    message: str = HOW_TO_INSTALL


Plan = UseInstalled | UseContainer | Install | TellPerson


def plan(machine: Machine) -> Plan:
    """Choose the way to a broker: the one that is here, then the one that changes least on the machine."""
    if machine.installed is not None:
        return UseInstalled(machine.installed)
    if machine.docker:
        return UseContainer()
    if machine.apt and (machine.root or machine.sudo):
        return _apt(() if machine.root else ("sudo", "-n"))
    if machine.brew:
        return Install((("brew", "install", "rabbitmq"),), refresh=None)
    return TellPerson()


def ensure_rabbitmq(on_progress: Callable[[str], None] = lambda _: None) -> Installation | UseContainer:
    """Return where RabbitMQ is, after installing it if need be, or that it has to be run as a container.

    Args:
        on_progress: Called with a line for a person before anything that takes long.

    Raises:
        RabbitMQNotInstalledError: There is no way to get it from here.
    """
    with exclusive_lock():
        return _ensure(on_progress)


def _ensure(on_progress: Callable[[str], None]) -> Installation | UseContainer:
    chosen = plan(look_around())
    match chosen:
        case UseInstalled(installation):
            return installation
        case UseContainer():
            return chosen
        case Install():
            on_progress(f"RabbitMQ is not installed: {' '.join(chosen.commands[0])}")
            return _install(chosen)
        case TellPerson(message):
            raise RabbitMQNotInstalledError(message)
        case _:
            assert_never(chosen)


@contextmanager
def exclusive_lock(folder: str | Path | None = None) -> Iterator[None]:
    """Keep others waiting who want the same: half an installation is none, and two are not made at once.

    They are told by the folder, by default the one for temporary files.
    """
    # The folder itself is locked: no file is left behind.
    lock = os.open(folder or tempfile.gettempdir(), os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def look_around() -> Machine:
    """Find out what this machine offers; at once where RabbitMQ is installed, in some seconds elsewhere."""
    installed = find_installation()
    if installed is not None:
        return Machine(installed=installed)
    root = os.geteuid() == 0
    return Machine(
        docker=_succeeds("docker", "info"),
        apt=shutil.which("apt-get") is not None,
        # Homebrew refuses to run as root.
        brew=shutil.which("brew") is not None and not root,
        root=root,
        sudo=not root and _succeeds("sudo", "-n", "true"),
    )


def find_installation() -> Installation | None:
    """Return where RabbitMQ's programs are, or None where they are not installed."""
    folders = list(_SCRIPT_FOLDERS)
    on_path = shutil.which("rabbitmq-server")
    if on_path is not None:
        folders.append(Path(on_path).resolve().parent)
    for folder in folders:
        server, ctl = folder / "rabbitmq-server", folder / "rabbitmqctl"
        epmd = _find_epmd()
        if server.exists() and ctl.exists() and epmd is not None:
            return Installation(server, ctl, epmd)
    return None


def _find_epmd() -> Path | None:
    found = shutil.which("epmd")
    candidates = ([Path(found)] if found else []) + [folder / "epmd" for folder in _ERLANG_FOLDERS]
    return next((candidate for candidate in candidates if candidate.exists()), None)


def _apt(become_root: tuple[str, ...]) -> Install:
    # RUNLEVEL=1 keeps the package from starting a system service where there is no systemd; where there is,
    # the second command stops it again. It would not be in the way, as the stack uses ports of its own.
    environment = ("env", "DEBIAN_FRONTEND=noninteractive", "RUNLEVEL=1")
    # Other users of the package manager, such as unattended upgrades, are waited for.
    apt = (*become_root, *environment, "apt-get", "-o", "DPkg::Lock::Timeout=300")
    disable = "if [ -d /run/systemd/system ]; then systemctl disable --now rabbitmq-server; fi"
    return Install(
        commands=(
            (*apt, "install", "-y", "--no-install-recommends", "rabbitmq-server"),
            (*become_root, "sh", "-c", disable),
        ),
        refresh=(*apt, "update"),
    )


def _install(chosen: Install) -> Installation:
    first, *rest = chosen.commands
    if not _runs(first) and not (chosen.refresh and _runs(chosen.refresh) and _runs(first)):
        raise RabbitMQNotInstalledError(HOW_TO_INSTALL)
    for command in rest:
        _runs(command)
    found = find_installation()
    if found is None:
        raise RabbitMQNotInstalledError(HOW_TO_INSTALL)
    return found


def _runs(command: tuple[str, ...]) -> bool:
    """Run a command whose output is for a person: not on standard output, which may be somebody's input."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=sys.stderr, timeout=_INSTALL_SECONDS, check=False
    )
    return done.returncode == 0


def _succeeds(*command: str) -> bool:
    """Tell whether a command exists, and ends quickly and well."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_DOCKER_ANSWER_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
