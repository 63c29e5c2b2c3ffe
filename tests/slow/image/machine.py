"""Read the machine's pip configuration."""

import ast
import os
import subprocess
import sys
from configparser import RawConfigParser
from pathlib import Path

# The package index and its connection; other pip settings are local folders.
PIP_SETTINGS = (
    "index-url",
    "extra-index-url",
    "proxy",
    "retries",
    "trusted-host",
    "timeout",
    "default-timeout",
)


def pip_secrets(folder: Path) -> list[str]:
    """Write the pip configuration to `folder`; return the flags that mount it as a build secret."""
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
    # Environment variables, `:env:.name`, are listed first and take precedence. Local indexes are not used.
    pairs = [line.split("=", 1) for line in reversed(listed) if "=" in line]
    settings = {name.rpartition(".")[2]: str(ast.literal_eval(value)) for name, value in pairs}
    indexes = settings.pop("extra-index-url", "").split()
    if reachable := [url for url in indexes if not url.startswith("file:")]:
        settings["extra-index-url"] = " ".join(reachable)
    return settings
