"""Run the OpenTelemetry Collector, built from Debian's Go packages."""

import hashlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from deploy.local.install import exclusive_lock
from deploy.local.ports import PortBlock
from deploy.local.processes import SupervisedProcess
from deploy.local.service import Service
from tests import debian

SUITE: Final = "sid"
PACKAGES: Final = ("golang-go", "golang-opentelemetry-collector-dev")
SOURCE: Final = Path(__file__).parent / "otelcol" / "main.go"
BUILD_TIMEOUT_S: Final = 1800
PROBE_TIMEOUT_S: Final = 5


class Collector(Service):
    """A collector that receives OTLP over HTTP and sends it on."""

    def __init__(self, program: Path, folder: Path, port: int) -> None:
        command = [str(program), f"--config=file:{folder / 'collector.yaml'}"]
        super().__init__([SupervisedProcess("Collector", command, environment={}, folder=folder)])
        self.port = port

    def is_ready(self) -> bool:
        """Return whether it accepts connections."""
        try:
            socket.create_connection(("127.0.0.1", self.port), PROBE_TIMEOUT_S).close()
        except OSError:
            return False
        return True

    @classmethod
    @contextmanager
    def sending_to(cls, url: str, tls: Mapping[str, str] | None = None) -> Iterator["Collector"]:
        """Run a collector in this context; skip the test if it cannot be had.

        Args:
            url: Where it sends what it receives, without `/v1/traces`.
            tls: The receiver's TLS settings.
        """
        program = _program()
        with ExitStack() as resources:
            folder = Path(tempfile.mkdtemp(prefix="vqa-collector-"))
            resources.callback(shutil.rmtree, folder, ignore_errors=True)
            ports = PortBlock()
            resources.callback(ports.close)
            port = ports.take()
            (folder / "collector.yaml").write_text(yaml.safe_dump(_configuration(port, url, tls)))
            collector = cls(program, folder, port)
            resources.callback(collector.close)
            collector.start()
            yield collector


def _configuration(port: int, url: str, tls: Mapping[str, str] | None) -> dict[str, Any]:
    http: dict[str, Any] = {"endpoint": f"127.0.0.1:{port}", **({"tls": dict(tls)} if tls else {})}
    return {
        "receivers": {"otlp": {"protocols": {"http": http}}},
        "exporters": {"otlp_http": {"endpoint": url}},
        "service": {
            "telemetry": {"metrics": {"level": "none"}},
            "pipelines": {"traces": {"receivers": ["otlp"], "exporters": ["otlp_http"]}},
        },
    }


def _program() -> Path:
    """Return the program, built on first use (minutes); skip the test if Go or the packages cannot be had."""
    if os.geteuid() != 0:
        pytest.skip("the OpenTelemetry Collector is built from Debian packages, which requires root")
    debian.install({"mmdebstrap": "mmdebstrap", debian.KEYRING: "debian-archive-keyring"})
    folder = debian.cache_folder() / f"otelcol-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}"
    folder.mkdir(exist_ok=True)
    program = folder / "otelcol"
    with exclusive_lock(folder):
        if not program.exists():
            with tempfile.TemporaryDirectory(dir=folder) as build:
                _build(Path(build)).rename(program)
    return program


def _build(folder: Path) -> Path:
    root, program = folder / "root", folder / "otelcol"
    debian.make_file_system(SUITE, root, "--variant=extract", f"--include={','.join(PACKAGES)}")
    environment = {
        "GO111MODULE": "off",  # only Debian's packages
        "GOTOOLCHAIN": "local",
        "GOPATH": str(root / "usr/share/gocode"),
        "GOCACHE": str(folder / "cache"),
        "CGO_ENABLED": "0",
        "PATH": os.defpath,
    }
    done = subprocess.run(  # noqa: S603 - of this file
        [root / "usr/bin/go", "build", "-o", program, SOURCE],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=BUILD_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return program
