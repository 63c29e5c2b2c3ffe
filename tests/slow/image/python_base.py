"""Build a replacement of the official Python image from Debian packages, without pulling an image.

Debian's testing suite has the Python version of the Dockerfile. As in the official image,
`python` and `pip` are in /usr/local/bin, and the standard library is not compiled.
"""

import hashlib
import os
import subprocess
from pathlib import Path

from deploy.local.install import exclusive_lock
from tests.slow.image.machine import debian_mirror

TIMEOUT_S = 600
SUITE = "forky"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
RECIPE = (
    "--variant=minbase",
    "--mode=root",
    "--include=ca-certificates,python3,python3-pip",
    "--dpkgopt=path-exclude=/usr/share/doc/*",
    "--dpkgopt=path-exclude=/usr/share/locale/*",
    "--dpkgopt=path-exclude=/usr/share/man/*",
    # Allow snapshots.
    '--aptopt=Acquire::Check-Valid-Until "false"',
    '--customize-hook=ln -s /usr/bin/python3 "$1/usr/local/bin/python"',
    '--customize-hook=ln -s /usr/bin/python3 "$1/usr/local/bin/python3"',
    '--customize-hook=ln -s /usr/bin/pip3 "$1/usr/local/bin/pip"',
    "--customize-hook=find \"$1/usr/lib\" -name '*.pyc' -delete",
)


def python_base() -> Path:
    """Return an archive of the image's root file system, created on first use (30 s)."""
    recipe = hashlib.sha256("\n".join((SUITE, *RECIPE)).encode()).hexdigest()[:12]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vqa-worker"
    archive = folder / f"python-{SUITE}-{recipe}.tar"
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(folder):
        if not archive.exists():
            _make(archive.with_suffix(".making.tar")).rename(archive)
    return archive


def _make(archive: Path) -> Path:
    mirror = debian_mirror()
    source = [f"deb [signed-by={KEYRING}] {mirror} {SUITE} main"] if mirror else []
    done = subprocess.run(
        ["mmdebstrap", *RECIPE, SUITE, str(archive), *source],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return archive
