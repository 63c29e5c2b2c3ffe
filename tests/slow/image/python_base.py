"""Build a replacement of the official Python image from Debian packages, without pulling an image.

Debian's testing suite has the Python version of the Dockerfile. As in the official image,
`python` and `pip` are in /usr/local/bin, and the standard library is not compiled.
"""

import hashlib
from pathlib import Path

from deploy.local.install import exclusive_lock
from tests.debian import cache_folder, make_file_system

SUITE = "forky"
RECIPE = (
    "--include=ca-certificates,python3,python3-pip",
    "--dpkgopt=path-exclude=/usr/share/doc/*",
    "--dpkgopt=path-exclude=/usr/share/locale/*",
    "--dpkgopt=path-exclude=/usr/share/man/*",
    '--customize-hook=ln -s /usr/bin/python3 "$1/usr/local/bin/python"',
    '--customize-hook=ln -s /usr/bin/python3 "$1/usr/local/bin/python3"',
    '--customize-hook=ln -s /usr/bin/pip3 "$1/usr/local/bin/pip"',
    "--customize-hook=find \"$1/usr/lib\" -name '*.pyc' -delete",
)


def python_base() -> Path:
    """Return an archive of the image's root file system, created on first use (30 s)."""
    recipe = hashlib.sha256("\n".join((SUITE, *RECIPE)).encode()).hexdigest()[:12]
    folder = cache_folder()
    archive = folder / f"python-{SUITE}-{recipe}.tar"
    with exclusive_lock(folder):
        if not archive.exists():
            making = archive.with_suffix(".making.tar")
            make_file_system(SUITE, making, *RECIPE)
            making.rename(archive)
    return archive
