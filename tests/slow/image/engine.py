"""Build and run images with Docker, or else with Podman and a temporary store."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.debian import install
from tests.slow.image.machine import pip_secrets
from tests.slow.image.python_base import python_base

ROOT = Path(__file__).parents[3]
COMMAND_TIMEOUT_S = 600
PACKAGES = {"podman": "podman", "runc": "runc"}
# As in the chart, but without a writable /tmp.
CONFINED = (
    "--read-only",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
)


@dataclass(frozen=True)
class Engine:
    """A container engine's command, with the flags for this machine."""

    command: tuple[str, ...]
    build_flags: tuple[str, ...]
    run_flags: tuple[str, ...] = ()

    def __call__(self, *arguments: str) -> str:
        """Run a command of the engine; return its output."""
        return run(*self.command, *arguments)

    def start(
        self, image: str, *arguments: str, flags: tuple[str, ...] = (), network: str = "host"
    ) -> list[str]:
        """Return the command that runs an image in the foreground, without privileges."""
        usual = (f"--network={network}", *CONFINED, *self.run_flags)
        return [*self.command, "run", "--rm", *usual, *flags, image, *arguments]

    def tries(self, *arguments: str) -> bool:
        """Run a command of the engine; return whether it succeeds."""
        return _succeeds(*self.command, *arguments)

    def remove(self, container: str) -> None:
        """Remove a container, if it exists; it can outlive its command."""
        self.tries("rm", "--force", container)


def run(*command: str) -> str:
    """Run a command that must succeed; return its output."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        # Docker before 23 supports build secrets only with BuildKit.
        env={**os.environ, "DOCKER_BUILDKIT": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@contextmanager
def an_engine() -> Iterator[Engine]:
    """Yield Docker if it is running, else Podman, which requires root on Debian."""
    if sys.platform != "linux":
        pytest.skip("containers with the host's network require Linux")
    with tempfile.TemporaryDirectory(prefix="vqa-image-", ignore_cleanup_errors=True) as folder:
        if _succeeds("docker", "info"):
            yield Engine(("docker",), tuple(pip_secrets(Path(folder))))
            return
        install(PACKAGES)
        if not _succeeds("unshare", "--mount", "true"):
            pytest.skip("requires Docker, or root with the permission to mount file systems")
        with _podman(Path(folder)) as engine:
            yield engine


@contextmanager
def _podman(folder: Path) -> Iterator[Engine]:
    store = folder / "overlay"
    command = _podman_command(store)
    if not _succeeds(*command, "info"):
        # An overlay cannot be mounted on an overlay, as in a container.
        store = folder / "vfs"
        command = _podman_command(store)
    engine = Engine(
        command,
        ("--isolation=chroot", "--format=docker", "--layers=false", "--pull=never", *pip_secrets(folder)),
        # Limits that root can set here, no writable /tmp with --read-only, and a maximum lifetime.
        ("--ulimit=nofile=4096:4096", "--ulimit=nproc=1024:1024", "--read-only-tmpfs=false", "--timeout=600"),
    )
    try:
        engine("import", str(python_base()), python_image())
        yield engine
    finally:
        engine("rm", "--all", "--force", "--time=0")
        # Podman leaves a bind mount of this folder.
        _succeeds("umount", str(store / "root" / "overlay"))


def _podman_command(store: Path) -> tuple[str, ...]:
    return (
        "podman",
        f"--root={store / 'root'}",
        f"--runroot={store / 'run'}",
        f"--storage-driver={store.name}",
        "--cgroup-manager=cgroupfs",
        "--events-backend=file",
        "--runtime=runc",
    )


def python_image() -> str:
    """Return the base image of the Dockerfile."""
    found = re.search(r"^ARG PYTHON_IMAGE=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert found
    return found[1]


def _succeeds(*command: str) -> bool:
    try:
        done = subprocess.run(command, capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
