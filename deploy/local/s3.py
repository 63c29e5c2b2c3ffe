"""SeaweedFS as the S3 server: the `weed` program, which the development dependencies bring along."""

import json
import os
import secrets
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from deploy.local.ports import PortBlock
from deploy.local.processes import ServiceStartError, SupervisedProcess

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_READY_SECONDS = 60
_ADVICE = "If the log does not say why, try again; it needs about 1 GB of free disk."
_PROBE = "is-it-up"
_IDENTITIES = "identities.json"
_PORTS = (
    "s3.port",
    "s3.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
)


@dataclass(frozen=True)
class Certificate:
    """PEM files of a server's certificate, with its chain, and of the key that goes with it."""

    certificate: Path
    key: Path


class S3:
    """SeaweedFS on free ports; `stop`, `kill` and `restart` keep its ports and its data."""

    session_token: str | None = None
    region = "us-east-1"
    bucket = "vqa-images"
    """Exists from the start."""

    https_endpoint_url: str | None = None
    """The same server over TLS, if it was given a certificate."""

    def __init__(
        self,
        folder: Path,
        ports: PortBlock,
        *,
        temporary: bool = True,
        certificate: Certificate | None = None,
    ) -> None:
        self.access_key = "local"
        self.secret_key = secrets.token_hex(16)
        arguments, used_ports = _arguments(folder, ports)
        self.endpoint_url = f"http://127.0.0.1:{used_ports['s3.port']}"
        if certificate is not None:
            https_port = ports.take()
            self.https_endpoint_url = f"https://127.0.0.1:{https_port}"
            arguments += _tls_arguments(https_port, certificate)
        self._sockets = _socket_files(used_ports)
        (folder / "data").mkdir(parents=True)
        (folder / _IDENTITIES).write_text(json.dumps(self._identities()))
        self._server = SupervisedProcess(
            "SeaweedFS",
            [str(_find_weed()), *arguments],
            environment=_environment(folder),
            folder=folder,
            leftovers=[*self._sockets, folder] if temporary else self._sockets,
        )

    @property
    def running(self) -> bool:
        """Whether the server process lives."""
        return self._server.running

    @property
    def pids(self) -> list[int]:
        """The process id of the server."""
        return [self._server.pid]

    def client(self) -> "S3Client":
        """Return a new boto3 client for this server."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=self.region,
            config=Config(
                signature_version="s3v4",
                s3={"addressing_style": "path"},
                # Proxies from the environment are for the world outside.
                proxies={},
                retries={"total_max_attempts": 1},
                connect_timeout=5,
                read_timeout=30,
            ),
        )

    def launch(self) -> None:
        """Start without waiting."""
        self._server.launch()

    def wait_until_ready(self) -> None:
        """Return when an object can really be written and read: the port is open long before that.

        Raises:
            ServiceStartError: With the end of the log.
        """
        client = self.client()
        try:
            self._server.wait_until(
                lambda: self._keeps_an_object(client), timeout_seconds=_READY_SECONDS, advice=_ADVICE
            )
        finally:
            client.close()

    def start(self) -> None:
        """Start, and wait until it is ready."""
        self.launch()
        self.wait_until_ready()

    def stop(self) -> None:
        """Stop it; the data stays."""
        # An orderly stop waits 15 s for subscribers that are all parts of itself. What it has confirmed is in
        # its files anyway.
        self._server.kill()

    kill = stop

    def restart(self) -> None:
        """Stop in an orderly way and start again on the same port with the same data."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Freeze the server: connections stay open and nothing answers."""
        self._server.pause()

    def resume(self) -> None:
        """Let a frozen server go on."""
        self._server.resume()

    def close(self) -> None:
        """End it for good."""
        self._server.kill()
        for socket in self._sockets:
            socket.unlink(missing_ok=True)

    def _keeps_an_object(self, client: "S3Client") -> bool:
        try:
            if not _has_bucket(client, self.bucket):
                client.create_bucket(Bucket=self.bucket)
            client.put_object(Bucket=self.bucket, Key=_PROBE, Body=b"yes")
            kept = client.get_object(Bucket=self.bucket, Key=_PROBE)["Body"].read()
            client.delete_object(Bucket=self.bucket, Key=_PROBE)
        except (BotoCoreError, ClientError):
            return False
        return kept == b"yes"

    def _identities(self) -> dict[str, object]:
        credentials = [{"accessKey": self.access_key, "secretKey": self.secret_key}]
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        return {"identities": [{"name": "local", "credentials": credentials, "actions": actions}]}


def _has_bucket(client: "S3Client", bucket: str) -> bool:
    return any(found["Name"] == bucket for found in client.list_buckets()["Buckets"])


def _find_weed() -> Path:
    """Return the program from this Python's environment, or from PATH."""
    beside_python = Path(sysconfig.get_path("scripts")) / "weed"
    if beside_python.exists():
        return beside_python
    found = shutil.which("weed")
    if found is None:
        raise ServiceStartError("SeaweedFS is not installed: run `make setup`.")
    return Path(found)


def _arguments(folder: Path, ports: PortBlock) -> tuple[list[str], dict[str, int]]:
    """Return the command line and the ports in it; left unnamed, they collide with another server's."""
    used = {name: ports.take() for name in _PORTS}
    arguments = [
        "server",
        f"-dir={folder / 'data'}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-s3",
        f"-s3.config={folder / _IDENTITIES}",
        "-filer",
        *(f"-{name}={port}" for name, port in used.items()),
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-master.telemetry=false",
        # After a restart the only master waits that long, up to twice, for others before it leads itself.
        "-master.electionTimeout=500ms",
        "-master.heartbeatInterval=100ms",
        # Users with fewer rights can be made, to see what the worker does with those.
        "-s3.iam.readOnly=false",
        # Each bucket takes volumes of its own, and the default of 8 is used up by the second bucket.
        "-volume.max=200",
    ]
    return arguments, used


def _tls_arguments(port: int, certificate: Certificate) -> list[str]:
    return [
        f"-s3.port.https={port}",
        f"-s3.cert.file={certificate.certificate}",
        f"-s3.key.file={certificate.key}",
    ]


def _socket_files(used_ports: dict[str, int]) -> list[Path]:
    """Return the sockets that SeaweedFS makes, always in /tmp, and leaves behind."""
    folder = Path("/tmp")  # noqa: S108 - not our choice
    names = [f"{name.replace('.port', '').replace('.', '-')}-{port}" for name, port in used_ports.items()]
    return [folder / f"seaweedfs-{name}.sock" for name in names]


def _environment(folder: Path) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WEED_")}
    # One volume for a new bucket instead of seven: the first write to it is faster, and more buckets fit.
    return inherited | {"WEED_MASTER_VOLUME_GROWTH_COPY_1": "1", "TMPDIR": str(folder)}
