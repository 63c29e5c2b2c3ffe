"""Install programs from Debian packages, or skip the test."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from deploy.local.install import exclusive_lock

INSTALL_TIMEOUT_S = 900


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
