"""What builds and runs images: Docker where it answers, else Podman with a store of its own."""

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
from tests.slow.image.python_base import KEYRING, python_base

ROOT = Path(__file__).parents[3]
COMMAND_TIMEOUT_S = 600
PACKAGES = {
    "podman": "podman",
    "runc": "runc",
    "mmdebstrap": "mmdebstrap",
    KEYRING: "debian-archive-keyring",
}
# As the chart runs it, and stricter where it has a /tmp.
CONFINED = (
    "--read-only",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
)


@dataclass(frozen=True)
class Engine:
    """A container engine's command, with what it needs on this machine."""

    command: tuple[str, ...]
    build_flags: tuple[str, ...]
    run_flags: tuple[str, ...] = ()

    def __call__(self, *arguments: str) -> str:
        """Run a command of the engine; what it prints."""
        return run(*self.command, *arguments)

    def start(
        self, image: str, *arguments: str, flags: tuple[str, ...] = (), network: str = "host"
    ) -> list[str]:
        """The command that runs an image, confined, in the foreground."""
        usual = (f"--network={network}", *CONFINED, *self.run_flags)
        return [*self.command, "run", "--rm", *usual, *flags, image, *arguments]

    def tries(self, *arguments: str) -> bool:
        """Run a command of the engine; whether it succeeds."""
        return _succeeds(*self.command, *arguments)

    def remove(self, container: str) -> None:
        """End a container, if it is there: its command may be gone while it is not."""
        self.tries("rm", "--force", container)


def run(*command: str) -> str:
    """Run a command that must succeed; what it prints."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        # Docker before 23 builds without it, and then knows no secrets.
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
    """Docker if it answers; else what root on Debian can have."""
    if sys.platform != "linux":
        pytest.skip("the containers share this machine's network, which takes Linux")
    with tempfile.TemporaryDirectory(prefix="vqa-image-", ignore_cleanup_errors=True) as folder:
        if _succeeds("docker", "info"):
            yield Engine(("docker",), tuple(pip_secrets(Path(folder))))
            return
        install(PACKAGES)
        if not _succeeds("unshare", "--mount", "true"):
            pytest.skip("needs Docker, or a machine that lets root mount file systems")
        with _podman(Path(folder)) as engine:
            yield engine


@contextmanager
def _podman(folder: Path) -> Iterator[Engine]:
    store = folder / "overlay"
    command = _podman_command(store)
    if not _succeeds(*command, "info"):
        # Where this machine's own files are in an overlay, as in a container, there can be no second one.
        store = folder / "vfs"
        command = _podman_command(store)
    engine = Engine(
        command,
        ("--isolation=chroot", "--format=docker", "--layers=false", "--pull=never", *pip_secrets(folder)),
        # By itself it would give more than root may here, mount a /tmp in spite of --read-only, and run on.
        ("--ulimit=nofile=4096:4096", "--ulimit=nproc=1024:1024", "--read-only-tmpfs=false", "--timeout=600"),
    )
    try:
        engine("import", str(python_base()), python_image())
        yield engine
    finally:
        engine("rm", "--all", "--force", "--time=0")
        # Podman leaves it mounted upon itself.
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
    """The base that the Dockerfile names."""
    found = re.search(r"^ARG PYTHON_IMAGE=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert found
    return found[1]


def _succeeds(*command: str) -> bool:
    try:
        done = subprocess.run(command, capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
