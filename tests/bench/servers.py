"""Start the servers of the benchmark and the contenders' processes."""

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
from tests.bench.contenders import ROOT, Contender, RunConfig
from tests.bench.images import Image, ImageUploader
from tests.bench.load import Batch, Load
from tests.bench.machine import Cores

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_LOG_TAIL_LINES: Final = 12
_SIMULATOR_START_S: Final = 10


@dataclass(frozen=True)
class Setup:
    """The configuration of a scenario."""

    concurrency: int = 64
    as_link: bool = False
    tls: bool = False


class Simulator:
    """The process of the simulated model API."""

    def __init__(self, folder: Path, ports: PortBlock, certificate: Certificate) -> None:
        self._port, self._tls_port = ports.take(), ports.take()
        addresses = ("--port", str(self._port), "--tls-port", str(self._tls_port))
        tls = ("--certificate", str(certificate.certificate), "--key", str(certificate.key))
        self._process = SupervisedProcess(
            "simulator",
            [sys.executable, "-m", "tests.bench.simulator", *addresses, *tls],
            environment={**os.environ, "PYTHONPATH": str(ROOT)},
            folder=folder,
        )

    def start(self) -> None:
        """Start the process and wait until it answers."""
        self._process.launch()
        self._process.wait_until(self._answers, timeout_seconds=_SIMULATOR_START_S, advice="")

    def stop(self) -> None:
        """Kill the process."""
        self._process.kill()

    def url(self, *, tls: bool) -> str:
        """Return the base URL."""
        return f"https://127.0.0.1:{self._tls_port}/v1" if tls else f"http://127.0.0.1:{self._port}/v1"

    def set_latency(self, seconds: float) -> None:
        """Set the latency of all further answers."""
        self._ask(f"set?latency={seconds}")

    def counters(self) -> dict[str, float]:
        """Return the counters; see `simulator`."""
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


class ContenderProcess:
    """A contender's process and its queues."""

    def __init__(self, process: SupervisedProcess, cores: Cores, http_port: int, as_link: bool) -> None:
        self._process = process
        self._cores = cores
        self._http_port = http_port
        self._as_link = as_link
        self._batches = 0
        self.load: Load

    @property
    def pid(self) -> int:
        """The id of its first process."""
        return self._process.pid

    def launch(self) -> None:
        """Start the process on the contender's core."""
        with machine.pinned(self._cores.contender):
            self._process.launch()

    def cpu_s(self) -> float:
        """Return the CPU seconds so far."""
        return machine.cpu_s(self.pid)

    def batch(self, images: Sequence[Image], count: int) -> Batch:
        """Return a new batch of jobs with these images in turn."""
        self._batches += 1
        return Batch(f"b{self._batches}", images, count, self._as_link)

    def concurrency_limit(self) -> float | None:
        """Return the worker's current concurrency limit; None for other contenders."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._http_port}/metrics", timeout=5) as response:
                lines = response.read().decode().splitlines()
        except OSError:
            return None
        return next((float(it.split()[1]) for it in lines if it.startswith("vqa_concurrency_limit ")), None)

    def log_tail(self) -> str:
        """Return the last lines of the output."""
        if not self._process.log.exists():
            return "  (none)"
        lines = self._process.log.read_text(errors="replace").splitlines()
        return "\n".join(f"  {line[:600]}" for line in lines[-_LOG_TAIL_LINES:])


class Bench:
    """RabbitMQ, S3, the simulated model API and the images."""

    def __init__(
        self, stack: Stack, simulator: Simulator, cores: Cores, folder: Path, ports: PortBlock, ca_file: Path
    ) -> None:
        assert isinstance(stack.s3, S3)
        self.stack = stack
        self.simulator = simulator
        self.cores = cores
        self.images = ImageUploader(_uploader(stack.s3), stack.s3.bucket, cores.contender | cores.rest)
        self._s3 = stack.s3
        self._folder = folder
        self._http_port = ports.take()
        self._ca_file = ca_file
        self._runs = 0

    @classmethod
    @contextlib.contextmanager
    def start(cls, cores: Cores, log: Callable[[str], None]) -> Iterator["Bench"]:
        """Start all servers on the cores that no contender uses."""
        os.sched_setaffinity(0, cores.rest)
        with contextlib.ExitStack() as resources:
            folder = Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="vqa-bench-")))
            ports = PortBlock()
            resources.callback(ports.close)
            ca_file, certificate = _certificate(folder)
            stack = resources.enter_context(Stack.start(s3_certificate=certificate, on_progress=log))
            simulator = Simulator(folder / "simulator", ports, certificate)
            resources.callback(simulator.stop)
            simulator.start()
            yield cls(stack, simulator, cores, folder, ports, ca_file)

    @contextlib.asynccontextmanager
    async def prepared(self, contender: Contender, setup: Setup) -> AsyncIterator[ContenderProcess]:
        """Prepare a contender with empty queues; kill it at the end of the context."""
        self._runs += 1
        name = f"bench{self._runs}"
        run = self._run(name, setup)
        supervised = SupervisedProcess(
            name,
            contender.command,
            environment={**_inherited(), **contender.environment(run)},
            folder=self._folder / name,
        )
        process = ContenderProcess(supervised, self.cores, self._http_port, setup.as_link)
        self.simulator.set_latency(0)
        url = self.stack.rabbitmq.url
        async with Load.on(url, contender, name, process.log_tail) as process.load:
            try:
                yield process
            finally:
                # All results are checked: no graceful shutdown needed.
                supervised.kill()

    @contextlib.asynccontextmanager
    async def launched(self, contender: Contender, setup: Setup) -> AsyncIterator[ContenderProcess]:
        """Prepare and launch a contender."""
        async with self.prepared(contender, setup) as process:
            process.launch()
            yield process

    def _run(self, name: str, setup: Setup) -> RunConfig:
        s3_url = self._s3.https_endpoint_url if setup.tls else self._s3.endpoint_url
        assert s3_url is not None
        return RunConfig(
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
            model_base_url=self.simulator.url(tls=setup.tls),
            concurrency=setup.concurrency,
            http_port=self._http_port,
            as_link=setup.as_link,
            ca_file=self._ca_file if setup.tls else None,
        )


def elapsed_since_start_s(pid: int) -> float:
    """Return the seconds since the start of a process."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - machine.started_at_s(pid)


def _uploader(s3: S3) -> "S3Client":
    """Return a client without checksums, which would use most of the CPU time of an upload."""
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
    """Create a temporary authority and a server certificate for localhost."""
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1", "localhost")
    ca_file, certificate, key = (folder / name for name in ("ca.pem", "server.pem", "server-key.pem"))
    authority.cert_pem.write_to_path(str(ca_file))
    certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(str(key))
    return ca_file, Certificate(certificate, key)


def _inherited() -> dict[str, str]:
    """Return the environment without proxies and without variables that configure a contender."""
    ours = ("VQA_", "AWS_", "OPENAI_", "DEEPINFRA_", "SSL_CERT_", "CELERY_", "OTEL_", "PYTHON")
    proxies = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(ours) and name.lower() not in proxies
    }
