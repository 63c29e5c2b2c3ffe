"""Install programs from Debian packages, or skip the test; build file systems of other Debian suites."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from deploy.local.install import exclusive_lock

INSTALL_TIMEOUT_S = 900
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
RECIPE = (
    "--variant=minbase",
    "--mode=root",
    # Allow snapshots.
    '--aptopt=Acquire::Check-Valid-Until "false"',
)


def install(packages: Mapping[str, str]) -> None:
    """Install missing programs or files from their Debian packages; skip the test if that fails."""
    with exclusive_lock():
        missing = sorted({package for it, package in packages.items() if not _is_here(it)})
        if not missing:
            return
        if not shutil.which("apt-get") or not _may_install():
            pytest.skip(f"requires {', '.join(missing)}, or apt-get with root or sudo")
        if not (_apt("install", *missing) or (_apt("update") and _apt("install", *missing))):
            pytest.skip(f"apt-get could not install {', '.join(missing)}")
        for package in missing:
            _stop_service(package)


def cache_folder() -> Path:
    """Return the folder for what takes long to install, which outlives the tests."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vqa-worker-tests"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def make_file_system(suite: str, target: Path, *options: str) -> None:
    """Install a minimal Debian of this suite in a folder, or in an archive; skip the test if that fails.

    `options`: mmdebstrap's.
    """
    install({"mmdebstrap": "mmdebstrap", KEYRING: "debian-archive-keyring"})
    mirror = _mirror()
    source = [f"deb [signed-by={KEYRING}] {mirror} {suite} main"] if mirror else []
    if not _runs("mmdebstrap", *RECIPE, *options, suite, str(target), *source):
        pytest.skip(f"Debian {suite} could not be installed from {mirror or 'the default mirror'}")


def unpacked(suite: str, *packages: str, variant: str = "extract") -> Path:
    """Return a folder with packages of a Debian suite and their dependencies, unpacked and not installed.

    It is created on first use; the test is skipped if that fails. With the variant `minbase` the packages are
    installed in a separate Debian system.
    """
    if os.geteuid() != 0:
        pytest.skip(f"{packages[0]} of Debian {suite}: requires root")
    root = cache_folder() / f"{packages[0]}-{suite}"
    with exclusive_lock(cache_folder()):
        if not root.exists():
            making = root.with_suffix(".making")
            shutil.rmtree(making, ignore_errors=True)
            make_file_system(suite, making, f"--variant={variant}", f"--include={','.join(packages)}")
            making.rename(root)
    return root


def _mirror() -> str | None:
    """Return the machine's Debian mirror, or None."""
    targets = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(LABEL) $(REPO_URI)", "Created-By: Packages"],  # noqa: S607 - found on PATH
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    return next((line.split()[1] for line in targets if line.startswith("Debian ")), None)


def _is_here(program_or_file: str) -> bool:
    return shutil.which(program_or_file) is not None or Path(program_or_file).exists()


def _become_root() -> tuple[str, ...]:
    return () if os.geteuid() == 0 else ("sudo", "-n")


def _may_install() -> bool:
    return os.geteuid() == 0 or (shutil.which("sudo") is not None and _runs("sudo", "-n", "true"))


def _apt(command: str, *packages: str) -> bool:
    options = ("-y", "--no-install-recommends") if command == "install" else ()
    # Without systemd, RUNLEVEL=1 prevents packages from starting services.
    environment = ("env", "DEBIAN_FRONTEND=noninteractive", "RUNLEVEL=1")
    apt = ("apt-get", "-o", "DPkg::Lock::Timeout=300", command)
    return _runs(*_become_root(), *environment, *apt, *options, *packages)


def _stop_service(package: str) -> None:
    if Path("/run/systemd/system").is_dir():
        _runs(*_become_root(), "systemctl", "disable", "--now", package)


def _runs(*command: str) -> bool:
    done = subprocess.run(  # noqa: S603 - of this file
        command, stdin=subprocess.DEVNULL, stdout=sys.stderr, timeout=INSTALL_TIMEOUT_S, check=False
    )
    return done.returncode == 0
