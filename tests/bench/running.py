"""The servers of the benchmark, and a contender's process among them."""

import contextlib
import json
import os
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import boto3
import trustme
from botocore.config import Config

from deploy.local.ports import PortBlock
from deploy.local.processes import SupervisedProcess
from deploy.local.s3 import S3, Certificate
from deploy.local.stack import Stack
from tests.bench import machine
from tests.bench.contenders import ROOT, Contender, Run
from tests.bench.load import Batch, Load
from tests.bench.machine import Cores
from tests.bench.pictures import Gallery, Picture

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_LOG_TAIL_LINES: Final = 12
_STANDIN_START_S: Final = 10


@dataclass(frozen=True)
class Setup:
    """How a contender is run."""

    concurrency: int = 64
    as_link: bool = False
    tls: bool = False


class StandIn:
    """The simulator's process."""

    def __init__(self, folder: Path, ports: PortBlock, certificate: Certificate) -> None:
        self._port, self._tls_port = ports.take(), ports.take()
        addresses = ("--port", str(self._port), "--tls-port", str(self._tls_port))
        tls = ("--certificate", str(certificate.certificate), "--key", str(certificate.key))
        self._process = SupervisedProcess(
            "simulator",
            [sys.executable, "-m", "tests.bench.standin", *addresses, *tls],
            environment={**os.environ, "PYTHONPATH": str(ROOT)},
            folder=folder,
        )

    def start(self) -> None:
        """Start, and wait until it answers."""
        self._process.launch()
        self._process.wait_until(self._answers, timeout_seconds=_STANDIN_START_S, advice="")

    def stop(self) -> None:
        """End it."""
        self._process.kill()

    def url(self, *, tls: bool) -> str:
        """The base URL of its API."""
        return f"https://127.0.0.1:{self._tls_port}/v1" if tls else f"http://127.0.0.1:{self._port}/v1"

    def set_latency(self, seconds: float) -> None:
        """Let every answer wait from here on."""
        self._ask(f"set?latency={seconds}")

    def look(self) -> dict[str, float]:
        """Its counters; see the module."""
        return self._ask("stats")

    def _answers(self) -> bool:
        try:
            return bool(self._ask("stats"))
        except OSError:
            return False

    def _ask(self, what: str) -> dict[str, float]:
        url = f"http://127.0.0.1:{self._port}/bench/{what}"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=10) as response:
            counters: dict[str, float] = json.load(response)
            return counters


class Running:
    """A contender with queues of its own; its process runs from `launch` to the end of the context."""

    def __init__(self, process: SupervisedProcess, cores: Cores, http_port: int, as_link: bool) -> None:
        self._process = process
        self._cores = cores
        self._http_port = http_port
        self._as_link = as_link
        self._batches = 0
        self.load: Load

    @property
    def pid(self) -> int:
        """Its first process."""
        return self._process.pid

    def launch(self) -> None:
        """Start it on its core."""
        with machine.pinned(self._cores.contender):
            self._process.launch()

    def cpu_s(self) -> float:
        """CPU seconds so far."""
        return machine.cpu_s(self.pid)

    def batch(self, pictures: Sequence[Picture], count: int) -> Batch:
        """A new batch of jobs about these pictures in turn."""
        self._batches += 1
        return Batch(f"b{self._batches}", pictures, count, self._as_link)

    def concurrency_limit(self) -> float | None:
        """What the worker says of its own limit in force; None for a contender that has none."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._http_port}/metrics", timeout=5) as response:
                lines = response.read().decode().splitlines()
        except OSError:
            return None
        return next((float(it.split()[1]) for it in lines if it.startswith("vqa_concurrency_limit ")), None)

    def log_tail(self) -> str:
        """The last lines that it printed."""
        if not self._process.log.exists():
            return "  (none)"
        lines = self._process.log.read_text(errors="replace").splitlines()
        return "\n".join(f"  {line[:600]}" for line in lines[-_LOG_TAIL_LINES:])


class Bench:
    """RabbitMQ, S3, the simulator and the pictures."""

    def __init__(
        self, stack: Stack, standin: StandIn, cores: Cores, folder: Path, ports: PortBlock, ca_file: Path
    ) -> None:
        assert isinstance(stack.s3, S3)
        self.stack = stack
        self.standin = standin
        self.cores = cores
        self.gallery = Gallery(_uploader(stack.s3), stack.s3.bucket, cores.contender | cores.rest)
        self._s3 = stack.s3
        self._folder = folder
        self._http_port = ports.take()
        self._ca_file = ca_file
        self._runs = 0

    @classmethod
    @contextlib.contextmanager
    def start(cls, cores: Cores, tell: Callable[[str], None]) -> Iterator["Bench"]:
        """All servers, up and answering, on the cores that no contender runs on."""
        os.sched_setaffinity(0, cores.rest)
        with contextlib.ExitStack() as resources:
            folder = Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="vqa-bench-")))
            ports = PortBlock()
            resources.callback(ports.close)
            ca_file, certificate = _certificate(folder)
            stack = resources.enter_context(Stack.start(s3_certificate=certificate, on_progress=tell))
            standin = StandIn(folder / "simulator", ports, certificate)
            resources.callback(standin.stop)
            standin.start()
            yield cls(stack, standin, cores, folder, ports, ca_file)

    @contextlib.asynccontextmanager
    async def prepared(self, contender: Contender, setup: Setup) -> AsyncIterator[Running]:
        """A contender that is not yet launched, with empty queues; nothing is left of it afterwards."""
        self._runs += 1
        name = f"bench{self._runs}"
        run = self._run(name, setup)
        process = SupervisedProcess(
            name,
            contender.command,
            environment={**_inherited(), **contender.environment(run)},
            folder=self._folder / name,
        )
        running = Running(process, self.cores, self._http_port, setup.as_link)
        self.standin.set_latency(0)
        url = self.stack.rabbitmq.url
        async with Load.on(url, contender, name, running.log_tail) as running.load:
            try:
                yield running
            finally:
                # Every result has been compared: there is nothing that an orderly end could save.
                process.kill()

    @contextlib.asynccontextmanager
    async def running(self, contender: Contender, setup: Setup) -> AsyncIterator[Running]:
        """As `prepared`, and launched."""
        async with self.prepared(contender, setup) as running:
            running.launch()
            yield running

    def _run(self, name: str, setup: Setup) -> Run:
        s3_url = self._s3.https_endpoint_url if setup.tls else self._s3.endpoint_url
        assert s3_url is not None
        return Run(
            rabbitmq_url=self.stack.rabbitmq.url,
            jobs_queue=f"{name}.jobs",
            results_queue=f"{name}.results",
            s3_endpoint_url=s3_url,
            s3_credentials={
                "AWS_ACCESS_KEY_ID": self._s3.access_key,
                "AWS_SECRET_ACCESS_KEY": self._s3.secret_key,
                "AWS_REGION": self._s3.region,
                "AWS_DEFAULT_REGION": self._s3.region,
            },
            model_base_url=self.standin.url(tls=setup.tls),
            concurrency=setup.concurrency,
            http_port=self._http_port,
            as_link=setup.as_link,
            ca_file=self._ca_file if setup.tls else None,
        )


def elapsed_since_start_s(pid: int) -> float:
    """Seconds since a process was started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - machine.started_at_s(pid)


def _uploader(s3: S3) -> "S3Client":
    """A client that leaves out the checksums, which cost more than all the rest of an upload."""
    return boto3.client(
        "s3",
        endpoint_url=s3.endpoint_url,
        aws_access_key_id=s3.access_key,
        aws_secret_access_key=s3.secret_key,
        region_name=s3.region,
        config=Config(
            signature_version="s3v4",
            s3={"addressing_style": "path", "payload_signing_enabled": False},
            request_checksum_calculation="when_required",
            proxies={},
        ),
    )


def _certificate(folder: Path) -> tuple[Path, Certificate]:
    """A throw-away authority, and a certificate by it for this machine's own address."""
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1", "localhost")
    ca_file, certificate, key = (folder / name for name in ("ca.pem", "server.pem", "server-key.pem"))
    authority.cert_pem.write_to_path(str(ca_file))
    certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(str(key))
    return ca_file, Certificate(certificate, key)


def _inherited() -> dict[str, str]:
    """The environment without what would tell a contender something else, and without proxies."""
    ours = ("VQA_", "AWS_", "OPENAI_", "DEEPINFRA_", "SSL_CERT_", "CELERY_", "OTEL_", "PYTHON")
    proxies = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(ours) and name.lower() not in proxies
    }
