"""Start real worker processes, publish jobs and read results, for tests."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage, AbstractQueue, HeadersType
from prometheus_client.parser import text_string_to_metric_families
from yarl import URL

from deploy.local.model_simulator.calls import Call
from deploy.local.stack import Stack
from tests.forked import ForkedRun

ROOT = Path(__file__).parents[1]
COMMAND = (sys.executable, "-m", "worker", "run")
PATCHED = "{patch}\nimport sys\nfrom worker.__main__ import main\nsys.exit(main(['run']))"
PATIENCE_S = 90.0
# More frequent polling would use CPU time that the worker needs.
MAX_POLL_INTERVAL_S = 0.1


async def until(condition: Any, what: str, patience_s: float = PATIENCE_S) -> Any:
    """Poll `condition` (sync or async) until its result is true; return the result."""
    ends = time.monotonic() + patience_s
    interval_s = 0.01
    while True:
        value = condition()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        if time.monotonic() > ends:
            raise AssertionError(f"waited {patience_s} s without success: {what}")
        await asyncio.sleep(interval_s)
        interval_s = min(1.3 * interval_s, MAX_POLL_INTERVAL_S)


@dataclass(frozen=True)
class Reply:
    """A result message."""

    body: dict[str, Any]
    message: AbstractIncomingMessage


@dataclass(frozen=True)
class Ended:
    """A finished process: its exit code, its stdout and the lines of its stderr without `Error: `."""

    code: int
    output: str
    errors: list[str]


class Worker:
    """Run `vqa-worker run` in its own process with its own queues."""

    # Whether to fork a process that has imported the modules instead of starting the command.
    forks: ClassVar[bool] = False

    def __init__(self, environment: Mapping[str, str], log_file: Path) -> None:
        self._environment = {**environment, "PYTHONUNBUFFERED": "1"}
        self._log_file = log_file
        self._log_bytes = 0
        self._log_lines: list[dict[str, Any]] = []
        self.command: Sequence[str] = COMMAND
        # Python code that the process runs before the worker, to change constants.
        self.patch = ""
        self.process: subprocess.Popen[bytes] | ForkedRun | None = None
        self.port = 0

    @classmethod
    def of(cls, stack: Stack, folder: Path, **settings: str) -> Self:
        """Return a worker on the stack with new queues; `settings` are environment variables."""
        name = f"t{uuid.uuid4().hex[:10]}"
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("VQA_", "AWS_", "OTEL_"))}
        environment = {
            **inherited,
            **stack.environment(),
            "VQA_HTTP_HOST": "127.0.0.1",
            "VQA_HTTP_PORT": "0",
            "VQA_JOBS_QUEUE": f"{name}.jobs",
            "VQA_RESULTS_QUEUE": f"{name}.results",
            "VQA_RETRY_DELAYS": "1",
            "VQA_ALLOWED_BUCKETS": "*",
            "VQA_LOG_FORMAT": "json",
            **settings,
        }
        return cls(environment, folder / f"{name}.log")

    @property
    def environment(self) -> Mapping[str, str]:
        """The environment variables of the process."""
        return self._environment

    @property
    def jobs_queue(self) -> str:
        return self._environment["VQA_JOBS_QUEUE"]

    @property
    def results_queue(self) -> str:
        return self._environment["VQA_RESULTS_QUEUE"]

    @property
    def dead_letter_queue(self) -> str:
        return self._environment.get("VQA_DEAD_LETTER_QUEUE", f"{self.jobs_queue}.dead")

    def launch(self, errors: Path | None = None) -> None:
        """Start without waiting; write stderr to `errors`, by default to the log with stdout."""
        log, errors = self._log_file, errors or self._log_file
        if self.forks and self.command is COMMAND:
            self.process = ForkedRun(self._environment, log.parent, log, errors, patch=self.patch)
            return
        patched = [sys.executable, "-c", PATCHED.format(patch=self.patch)]
        # A working directory without a developer's `.env`.
        with log.open("ab") as stdout, errors.open("ab") as stderr:
            self.process = subprocess.Popen(  # noqa: S603 - a test's own
                patched if self.patch else self.command,
                env={**self._environment, "PYTHONPATH": str(ROOT)},
                cwd=log.parent,
                stdout=stdout,
                stderr=stderr,
            )

    async def start(self) -> Self:
        """Start the worker and wait until it is ready."""
        await self.serve()
        await until(lambda: self.ready()[0] == 200, "the worker is ready")
        return self

    async def serve(self) -> None:
        """Start the worker and wait until its HTTP endpoints answer, ready or not."""
        seen = len(self.log())
        self.launch()
        await until(lambda: self._started(seen), "the worker logs that it started")

    def _started(self, seen: int) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"the worker exited with {self.process.returncode}:\n{self.output()}")
        for line in self.log()[seen:]:
            if line.get("event") == "started":
                self.port = line["http_port"]
                return True
        return False

    async def stop(self, number: signal.Signals = signal.SIGTERM, patience_s: float = PATIENCE_S) -> int:
        """Send a signal, wait for the exit and return the exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return await self.ended(patience_s)

    async def ended(self, patience_s: float = PATIENCE_S) -> int:
        """Wait for the exit and return the exit code."""
        process = self.process
        assert process is not None
        await until(lambda: process.poll() is not None, "the worker exits", patience_s)
        return process.wait()

    @classmethod
    @contextlib.asynccontextmanager
    async def running(cls, stack: Stack, folder: Path, **settings: str) -> AsyncIterator[Self]:
        """Run a worker in this context; stop it with SIGTERM at the end."""
        worker = cls.of(stack, folder, **settings)
        try:
            yield await worker.start()
            assert await worker.stop() == 0, worker.output()
        finally:
            worker.kill()

    async def run_to_end(self, patience_s: float = PATIENCE_S) -> "Ended":
        """Run a worker that exits by itself."""
        errors = self._log_file.with_suffix(".errors")
        self.launch(errors)
        try:
            code = await self.ended(patience_s)
        finally:
            self.kill()
        lines = [line.removeprefix("Error: ") for line in errors.read_text().splitlines()]
        return Ended(code, self.output(), lines)

    def kill(self) -> None:
        """Send SIGKILL if the process still runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def output(self) -> str:
        """Return the output so far."""
        return self._log_file.read_text() if self._log_file.exists() else ""

    def log(self) -> list[dict[str, Any]]:
        """Return the log lines so far."""
        if self._log_file.exists():
            with self._log_file.open("rb") as file:
                file.seek(self._log_bytes)
                complete, newline, _ = file.read().rpartition(b"\n")
            self._log_bytes += len(complete) + len(newline)
            for line in complete.splitlines():
                with contextlib.suppress(ValueError):
                    self._log_lines.append(json.loads(line))
        return list(self._log_lines)

    def get(self, path: str) -> tuple[int, str]:
        """Return status and body of an HTTP endpoint; status 0 if it does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def ready(self) -> tuple[int, dict[str, Any]]:
        """Return status and body of `/readyz`."""
        status, body = self.get("/readyz")
        return status, json.loads(body) if body else {}

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of the samples with these labels; 0.0 if there are none."""
        return sample_sum(self.get("/metrics")[1], name, **labels)


def sample_sum(exposition: str, name: str, **labels: str) -> float:
    """Return the sum of the samples with these labels in a Prometheus exposition."""
    samples = "".join(line for line in exposition.splitlines(keepends=True) if line.startswith(name))
    return sum(
        sample.value
        for family in text_string_to_metric_families(samples)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def calls_with(stack: Stack, marker: str) -> list[Call]:
    """Return the simulator's calls whose last user message contains `marker`."""
    return stack.model.calls(marker)


class Client:
    """Publish jobs and read results, as a backend does."""

    def __init__(self, channel: AbstractChannel, worker: Worker, exchange: str = "") -> None:
        self._channel = channel
        self._worker = worker
        self._exchange = exchange
        self.replies: dict[str | None, list[Reply]] = {}
        self._arrival = asyncio.Condition()

    @classmethod
    @contextlib.asynccontextmanager
    async def of(
        cls, stack: Stack, worker: Worker, *, url: str | None = None, exchange: str = ""
    ) -> AsyncIterator[Self]:
        """Connect, consume the worker's results queue, and publish through `exchange`."""
        # No heartbeats: the event loop does not run during synchronous tests.
        broker = URL(url or stack.rabbitmq.url).update_query(heartbeat=0)
        connection = await aio_pika.connect(broker)
        async with connection:
            channel = await connection.channel(on_return_raises=True)
            client = cls(channel, worker, exchange)
            await client.listen(worker.results_queue)
            yield client

    async def listen(self, queue: str) -> None:
        """Collect the results of another queue in `replies` too."""
        results = await self._channel.get_queue(queue, ensure=False)
        await results.consume(self._receive)

    async def reply_queue(self, exchange: str = "") -> str:
        """Declare an exclusive reply queue, bound to `exchange` if one is given; return its name."""
        queue = await self._channel.declare_queue(exclusive=True)
        if exchange:
            await queue.bind(exchange, queue.name)
        await queue.consume(self._receive)
        return queue.name

    async def _receive(self, message: AbstractIncomingMessage) -> None:
        await message.ack()
        body = json.loads(message.body)
        self.replies.setdefault(body["id"], []).append(Reply(body, message))
        async with self._arrival:
            self._arrival.notify_all()

    async def publish(
        self, body: bytes | Mapping[str, Any], *, headers: HeadersType | None = None, **properties: Any
    ) -> None:
        """Publish a job; `properties` as aio_pika.Message takes them."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        message = aio_pika.Message(raw, headers=headers, **properties)
        exchange = (
            await self._channel.get_exchange(self._exchange, ensure=False)
            if self._exchange
            else self._channel.default_exchange
        )
        await exchange.publish(message, self._worker.jobs_queue)

    async def cancel(self, job_id: str) -> None:
        """Publish a cancel message for a job."""
        control = await self._channel.get_exchange(f"{self._worker.jobs_queue}.control", ensure=False)
        await control.publish(aio_pika.Message(json.dumps({"cancel": job_id}).encode()), "")

    async def result(self, job_id: str | None, patience_s: float = PATIENCE_S) -> Reply:
        """Wait for the first result of a job."""
        try:
            async with asyncio.timeout(patience_s), self._arrival:
                await self._arrival.wait_for(lambda: self.replies.get(job_id))
        except TimeoutError:
            raise AssertionError(f"waited {patience_s} s without success: a result for {job_id}") from None
        return self.replies[job_id][0]

    async def ask(self, patience_s: float = PATIENCE_S, **fields: Any) -> Reply:
        """Publish a job (with a new id unless one is given) and wait for its result."""
        job = {"id": uuid.uuid4().hex, **fields}
        await self.publish(job)
        return await self.result(job["id"], patience_s)

    async def queue(self, name: str) -> AbstractQueue:
        """Return a queue."""
        return await self._channel.get_queue(name, ensure=False)

    async def take(self, queue_name: str, patience_s: float = PATIENCE_S) -> AbstractIncomingMessage:
        """Wait for one message of a queue and ack it."""
        queue = await self.queue(queue_name)
        message: AbstractIncomingMessage = await until(
            lambda: queue.get(fail=False), f"a message in {queue_name}", patience_s
        )
        await message.ack()
        return message

    @contextlib.asynccontextmanager
    async def reading(self, queue_name: str) -> AsyncIterator[list[AbstractIncomingMessage]]:
        """Consume a queue in this context; the list grows with each acked message."""
        queue = await self.queue(queue_name)
        messages: list[AbstractIncomingMessage] = []

        async def receive(message: AbstractIncomingMessage) -> None:
            await message.ack()
            messages.append(message)

        tag = await queue.consume(receive)
        try:
            yield messages
        finally:
            await queue.cancel(tag)

    async def depth(self, queue_name: str) -> int:
        """Return the number of ready messages in a queue."""
        queue = await self._channel.declare_queue(queue_name, passive=True)
        return queue.declaration_result.message_count or 0


def build_wheel(project: Path, folder: Path) -> Path:
    """Build the wheel of the folder of a pyproject.toml."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=project, check=True, capture_output=True)  # noqa: S603
    (wheel,) = folder.glob("*.whl")
    return wheel
