"""What the image's tests take from the machine: programs, Debian's mirror, pip's settings."""

import ast
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from configparser import RawConfigParser
from contextlib import contextmanager
from pathlib import Path

import pytest

INSTALL_TIMEOUT_S = 900
USUAL_MIRROR = "http://deb.debian.org/debian"
# Where to fetch packages from, and how to get there; what else a machine tells pip is about its own folders.
PIP_SETTINGS = (
    "index-url",
    "extra-index-url",
    "proxy",
    "retries",
    "trusted-host",
    "timeout",
    "default-timeout",
)


@contextmanager
def one_at_a_time(name: str) -> Iterator[None]:
    """Keep other processes waiting that want the same, in this checkout or another."""
    path = Path(tempfile.gettempdir()) / f"vqa-{name}-{os.getuid()}.lock"
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def install(packages: Mapping[str, str]) -> None:
    """Have these programs or files, each from the Debian package named; skip the test otherwise."""
    with one_at_a_time("image-install"):
        missing = [package for it, package in packages.items() if not (shutil.which(it) or Path(it).exists())]
        if not missing:
            return
        if os.geteuid() != 0 or not shutil.which("apt-get"):
            pytest.skip(
                f"needs {', '.join(missing)}: run the tests as root on Debian, which then installs it"
            )
        if not (_apt("install", *missing) or (_apt("update") and _apt("install", *missing))):
            pytest.skip(f"apt-get could not install {', '.join(missing)}")


def _apt(command: str, *packages: str) -> bool:
    options = ["-y", "--no-install-recommends"] if command == "install" else []
    done = subprocess.run(
        ["apt-get", "-o", "DPkg::Lock::Timeout=300", command, *options, *packages],
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"},
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        timeout=INSTALL_TIMEOUT_S,
        check=False,
    )
    return done.returncode == 0


def debian_mirror() -> str:
    """Where this machine gets Debian's packages from."""
    targets = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(LABEL) $(REPO_URI)", "Created-By: Packages"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    return next((line.split()[1] for line in targets if line.startswith("Debian ")), USUAL_MIRROR)


def pip_secrets(folder: Path) -> list[str]:
    """The flags that hand pip's settings to a build, as the Dockerfile takes them; files go to `folder`."""
    said = _pip_settings()
    configuration = RawConfigParser()
    configuration["global"] = {name: said[name] for name in PIP_SETTINGS if name in said}
    flags = [f"--secret=id=pip-conf,src={folder / 'pip.conf'}"]
    if authorities := said.get("cert") or os.environ.get("SSL_CERT_FILE"):
        configuration["global"]["cert"] = "/run/secrets/ca-bundle"
        flags.append(f"--secret=id=ca-bundle,src={authorities}")
    with (folder / "pip.conf").open("w") as file:
        configuration.write(file)
    return flags


def _pip_settings() -> dict[str, str]:
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    # Variables, `:env:.name`, come first in the list and last in rank; folders of this machine are not there.
    pairs = [line.split("=", 1) for line in reversed(listed) if "=" in line]
    said = {name.rpartition(".")[2]: str(ast.literal_eval(value)) for name, value in pairs}
    indexes = said.pop("extra-index-url", "").split()
    if reachable := [url for url in indexes if not url.startswith("file:")]:
        said["extra-index-url"] = " ".join(reachable)
    return said
