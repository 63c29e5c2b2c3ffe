"""What the image's tests take from the machine: programs, Debian's mirror, pip's settings."""

import ast
import os
import subprocess
import sys
from configparser import RawConfigParser
from pathlib import Path

# The package index and the way to it; pip's other settings concern the machine's own folders.
PIP_SETTINGS = (
    "index-url",
    "extra-index-url",
    "proxy",
    "retries",
    "trusted-host",
    "timeout",
    "default-timeout",
)


def debian_mirror() -> str | None:
    """Where this machine gets Debian's packages from; None on one that is not Debian."""
    targets = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(LABEL) $(REPO_URI)", "Created-By: Packages"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    return next((line.split()[1] for line in targets if line.startswith("Debian ")), None)


def pip_secrets(folder: Path) -> list[str]:
    """The flags that hand pip's settings to a build, as the Dockerfile takes them; files go to `folder`."""
    settings = _pip_settings()
    configuration = RawConfigParser()
    configuration["global"] = {name: settings[name] for name in PIP_SETTINGS if name in settings}
    flags = [f"--secret=id=pip-conf,src={folder / 'pip.conf'}"]
    if authorities := settings.get("cert") or os.environ.get("SSL_CERT_FILE"):
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
    settings = {name.rpartition(".")[2]: str(ast.literal_eval(value)) for name, value in pairs}
    indexes = settings.pop("extra-index-url", "").split()
    if reachable := [url for url in indexes if not url.startswith("file:")]:
        settings["extra-index-url"] = " ".join(reachable)
    return settings
