"""S3: an external server, or SeaweedFS (`weed`), which the development dependencies install."""

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
from deploy.local.service import Service

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_PROBE_KEY = "ready-probe"
_SERVERS = ("s3", "filer", "master", "volume")


@dataclass(frozen=True)
class Certificate:
    """PEM files: a server's certificate with its chain, and its key."""

    certificate: Path
    key: Path


class ObjectStore(Service):
    """An S3 server at a URL."""

    https_endpoint_url: str | None = None
    """The same server over TLS, if it has a certificate."""

    _configuration = Config(signature_version="s3v4")

    def __init__(
        self,
        endpoint_url: str,
        access_key: str,
        secret_key: str,
        *,
        session_token: str | None = None,
        region: str = "us-east-1",
        bucket: str = "vqa-images",
    ) -> None:
        super().__init__()
        self.endpoint_url = endpoint_url
        self.access_key = access_key
        self.secret_key = secret_key
        self.session_token = session_token
        self.region = region
        self.bucket = bucket

    def client(self) -> "S3Client":
        """Return a new boto3 client."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            aws_session_token=self.session_token,
            region_name=self.region,
            config=self._configuration,
        )


class S3(ObjectStore):
    """SeaweedFS on free ports, with an empty bucket."""

    advice = "If the log does not show the reason, try again; it needs about 1 GB of free disk."
    _configuration = Config(
        signature_version="s3v4",
        # Proxies in the environment are for other machines.
        proxies={},
        retries={"total_max_attempts": 1},
        connect_timeout=5,
        read_timeout=30,
    )

    def __init__(self, folder: Path, ports: PortBlock, certificate: Certificate | None = None) -> None:
        used = {f"{server}.port{kind}": ports.take() for server in _SERVERS for kind in ("", ".grpc")}
        super().__init__(f"http://127.0.0.1:{used['s3.port']}", "local", secrets.token_hex(16))
        (folder / "data").mkdir(parents=True)
        (folder / "identities.json").write_text(self._identities())
        arguments = _arguments(folder, used)
        if certificate is not None:
            port = ports.take()
            self.https_endpoint_url = f"https://127.0.0.1:{port}"
            files = f"-s3.cert.file={certificate.certificate}", f"-s3.key.file={certificate.key}"
            arguments += [f"-s3.port.https={port}", *files]
        # SeaweedFS makes these sockets, always in /tmp, and leaves them behind.
        self._sockets = [
            Path(f"/tmp/seaweedfs-{name.replace('.port', '').replace('.', '-')}-{port}.sock")  # noqa: S108
            for name, port in used.items()
        ]
        # One volume for a new bucket instead of seven: its first write is faster, and more buckets fit.
        environment = {"WEED_MASTER_VOLUME_GROWTH_COPY_1": "1", "TMPDIR": str(folder)}
        server = SupervisedProcess(
            "SeaweedFS",
            [_find_weed(), *arguments],
            environment={**_inherited_environment(), **environment},
            folder=folder,
            leftovers=self._sockets,
        )
        self._processes = [server]

    def is_ready(self) -> bool:
        """Return whether an object can be written and read: the port is open long before that."""
        client = self.client()
        try:
            if self.bucket not in [found["Name"] for found in client.list_buckets()["Buckets"]]:
                client.create_bucket(Bucket=self.bucket)
            client.put_object(Bucket=self.bucket, Key=_PROBE_KEY, Body=b"yes")
            stored = client.get_object(Bucket=self.bucket, Key=_PROBE_KEY)["Body"].read()
            client.delete_object(Bucket=self.bucket, Key=_PROBE_KEY)
        except (BotoCoreError, ClientError):
            return False
        finally:
            client.close()
        return stored == b"yes"

    def stop(self) -> None:
        """Stop; the data stays."""
        # An orderly stop waits 15 s for subscribers that are parts of the server itself; confirmed writes are
        # in its files anyway.
        self.kill()

    def close(self) -> None:
        """End permanently."""
        super().close()
        for socket in self._sockets:
            socket.unlink(missing_ok=True)

    def _identities(self) -> str:
        credentials = [{"accessKey": self.access_key, "secretKey": self.secret_key}]
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        return json.dumps({"identities": [{"name": "local", "credentials": credentials, "actions": actions}]})


def _find_weed() -> str:
    """Return the program from this Python's environment, or from PATH."""
    found = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
    if found is None:
        raise ServiceStartError("SeaweedFS is not installed: run `make setup`.")
    return found


def _inherited_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("WEED_")}


def _arguments(folder: Path, ports: dict[str, int]) -> list[str]:
    return [
        "server",
        f"-dir={folder / 'data'}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-s3",
        f"-s3.config={folder / 'identities.json'}",
        "-filer",
        # Without explicit ports two servers on one machine collide.
        *(f"-{name}={port}" for name, port in ports.items()),
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-master.telemetry=false",
        # After a restart a single master waits up to twice this time before it becomes the leader.
        "-master.electionTimeout=500ms",
        "-master.heartbeatInterval=100ms",
        # Tests add users with fewer permissions.
        "-s3.iam.readOnly=false",
        # Each bucket takes its own volumes: the second bucket uses up the default of 8.
        "-volume.max=200",
    ]
