"""Temporary certificates for TLS servers."""

import shutil
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pytest


@dataclass(frozen=True)
class Authority:
    """A certificate authority and a server certificate that it signed."""

    folder: Path

    @property
    def certificate(self) -> str:
        return str(self.folder / "ca.pem")

    @classmethod
    def made_in(cls, folder: Path) -> Self:
        """Create both in a new folder; skip the test without the `openssl` program."""
        if shutil.which("openssl") is None:
            pytest.skip("requires the openssl program")
        folder.mkdir()
        authority = cls(folder)
        authority._openssl("-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=test authority")
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-subj", "/CN=a server")
        names = ("-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=CA:FALSE")
        authority._openssl("-keyout", "server.key", "-out", "server.pem", *signed, *names)
        return authority

    def server_context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.folder / "server.pem", self.folder / "server.key")
        return context

    def _openssl(self, *arguments: str) -> None:
        key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
        # Found on PATH, without untrusted input.
        command = ["openssl", "req", "-x509", *key, "-days", "2", *arguments]
        subprocess.run(command, cwd=self.folder, check=True, capture_output=True)  # noqa: S603
