"""Run commands with their own queues and state folder: in this process, or in one that can be killed."""

import asyncio
import contextlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from unittest.mock import patch

import aio_pika
import structlog

from deploy.local.stack import Stack
from tests.running import ROOT, Worker
from worker.__main__ import main
from worker.cli.submit.manifest import Counts, Manifest

PATIENCE_S = 60.0
COMMAND = [sys.executable, "-m", "worker"]
# The environment, the folder and the standard streams are the process's: one command at a time.
_ONE_COMMAND = threading.Lock()
# The environment variables that commands inherit.
KEPT = ("PATH", "HOME", "LANG")


@dataclass(frozen=True)
class Ended:
    """A command that has come to its end."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """What it printed, a line each."""
        return self.out.splitlines()

    @property
    def warnings_(self) -> list[str]:
        """What it said beside that, a line each."""
        return self.err.splitlines()

    @property
    def objects(self) -> list[dict[str, Any]]:
        """What it printed with `--json`."""
        return [json.loads(line) for line in self.lines]

    @property
    def summary(self) -> dict[str, Any]:
        """The last of these."""
        return self.objects[-1]


class Cli:
    """`vqa-worker` with settings of its own; what it remembers is below `folder`."""

    def __init__(self, folder: Path, settings: Mapping[str, str]) -> None:
        self.folder = folder
        self.settings = dict(settings)
        self.command = COMMAND
        self._started: list[subprocess.Popen[Any]] = []

    @classmethod
    def of(cls, stack: Stack, folder: Path, worker: Worker | None = None, **settings: str) -> "Cli":
        """Commands for a worker's queues, or for queues that no worker reads."""
        name = f"t{uuid.uuid4().hex[:10]}"
        queues = {
            "VQA_JOBS_QUEUE": worker.jobs_queue if worker else f"{name}.jobs",
            "VQA_RESULTS_QUEUE": worker.results_queue if worker else f"{name}.results",
        }
        environment = stack.environment()
        # What is a worker's business only.
        for needless in (
            "VQA_MODEL_API_KEY",
            "VQA_MODEL_BASE_URL",
            "VQA_ALLOWED_MODELS",
            "VQA_ALLOWED_BUCKETS",
        ):
            del environment[needless]
        return cls(folder, {**environment, **queues, **settings})

    @property
    def jobs_queue(self) -> str:
        return self.settings["VQA_JOBS_QUEUE"]

    @property
    def environment(self) -> dict[str, str]:
        inherited = {name: os.environ[name] for name in KEPT if name in os.environ}
        state = str(self.folder / "state")
        return {
            **inherited,
            **self.settings,
            "XDG_STATE_HOME": state,
            "PYTHONPATH": str(ROOT),
            "NO_COLOR": "1",
        }

    async def run(self, *arguments: str, stdin: str | bytes = "", **settings: str) -> Ended:
        """Run a command to its end: in this process, which is much faster than starting another."""
        raw = stdin.encode() if isinstance(stdin, str) else stdin
        if self.command is COMMAND:
            environment = {**self.environment, **settings}
            return await asyncio.to_thread(_run_here, arguments, environment, self.folder, raw)
        return await self.run_process(*arguments, stdin=raw, **settings)

    async def run_process(self, *arguments: str, stdin: bytes = b"", **settings: str) -> Ended:
        """Run a command to its end in its own process."""
        done = await asyncio.to_thread(
            subprocess.run,
            [*self.command, *arguments],
            env={**self.environment, **settings},
            cwd=self.folder,
            input=stdin,
            capture_output=True,
            timeout=PATIENCE_S,
            check=False,
        )
        return Ended(done.returncode, done.stdout.decode(), done.stderr.decode())

    async def told(self, *arguments: str, code: int = 0) -> list[dict[str, Any]]:
        """What it prints with `--json` before it ends with this code."""
        ended = await self.run(*arguments, "--json")
        assert ended.code == code, ended
        return ended.objects

    def having(self, **settings: str) -> "Cli":
        """The same with other settings."""
        return Cli(self.folder, {**self.settings, **settings})

    def start(self, *arguments: str, stdout: int | IO[Any] = subprocess.PIPE) -> "subprocess.Popen[str]":
        """Start a command; killed in the end if it still runs."""
        process = subprocess.Popen(  # noqa: S603 - a test's own
            [*self.command, *arguments],
            env=self.environment,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.adopt(process)
        return process

    def adopt(self, process: "subprocess.Popen[Any]") -> None:
        """Have it killed in the end, if it still runs."""
        self._started.append(process)

    def write(self, name: str, *lines: Mapping[str, Any] | str) -> str:
        """A file of these lines; returns its name."""
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (self.folder / name).write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
        return name

    def read(self, name: str) -> list[dict[str, Any]]:
        """The lines of a JSONL file."""
        return [json.loads(line) for line in (self.folder / name).read_text(encoding="utf-8").splitlines()]

    @property
    def manifests(self) -> list[Path]:
        """The manifests that there are."""
        return sorted((self.folder / "state" / "vqa-worker").glob("*.submission"))

    def counts(self) -> Counts | None:
        """How far the only submission has come; None before it is planned."""
        if not self.manifests:
            return None
        with contextlib.closing(Manifest.open(self.manifests[0])) as manifest:
            return manifest.counts() if "planned" in manifest.head() else None

    def end_all(self) -> None:
        """Kill what still runs."""
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.wait()
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()


def _run_here(arguments: Sequence[str], environment: Mapping[str, str], folder: Path, stdin: bytes) -> Ended:
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding, newline="") for _ in range(2))
    with (
        _ONE_COMMAND,
        patch.dict(os.environ, environment, clear=True),
        patch("worker.observability.logs.configure_logging", _log_nothing),
        patch("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")),
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        _logging_restored(),
    ):
        try:
            code = main(arguments)
        except SystemExit as exited:
            # argparse exits by itself where the usage is wrong.
            code = exited.code if isinstance(exited.code, int) else 1
    return Ended(code, _text(out), _text(err))


def _text(stream: io.TextIOWrapper) -> str:
    stream.seek(0)
    return stream.read()


def _log_nothing(*_: Any, **__: Any) -> None:
    """Send what structlog's loggers say to the standard library's, which the command then disables."""
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, structlog.stdlib.render_to_log_kwargs],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


@contextlib.contextmanager
def _logging_restored() -> Iterator[None]:
    """Undo what a command changes for its process."""
    saved, level = structlog.get_config(), logging.root.manager.disable
    try:
        yield
    finally:
        logging.disable(level)
        structlog.configure(**saved)


def finished(process: "subprocess.Popen[str]") -> Ended:
    """A started command, waited for."""
    out, err = process.communicate(timeout=PATIENCE_S)
    return Ended(process.returncode, out or "", err)


async def ended(process: "subprocess.Popen[str]") -> Ended:
    """The same without holding up anybody."""
    return await asyncio.to_thread(finished, process)


async def killed(process: "subprocess.Popen[str]") -> None:
    """Killed with SIGKILL, in the midst of whatever it does."""
    process.send_signal(signal.SIGKILL)
    assert (await ended(process)).code == -signal.SIGKILL


@contextlib.contextmanager
def commands(stack: Stack, folder: Path, worker: Worker | None = None, **settings: str) -> Iterator[Cli]:
    """Commands whose processes end with the context."""
    cli = Cli.of(stack, folder, worker, **settings)
    try:
        yield cli
    finally:
        cli.end_all()


@asynccontextmanager
async def channel_of(stack: Stack) -> AsyncIterator[aio_pika.abc.AbstractChannel]:
    """A channel for looking at queues."""
    async with await aio_pika.connect(stack.rabbitmq.url) as connection:
        yield await connection.channel()


async def depth(stack: Stack, queue: str) -> int | None:
    """How many messages wait in a queue; None if there is none."""
    async with channel_of(stack) as channel:
        try:
            found = await channel.declare_queue(queue, passive=True)
        except aio_pika.exceptions.ChannelNotFoundEntity:
            return None
        return found.declaration_result.message_count


async def emptied(stack: Stack, queue: str) -> list[aio_pika.abc.AbstractIncomingMessage]:
    """Everything that was in a queue, taken out."""
    count = await depth(stack, queue) or 0
    messages: list[aio_pika.abc.AbstractIncomingMessage] = []
    async with channel_of(stack) as channel:
        await channel.set_qos(prefetch_count=1000)
        reader = await channel.get_queue(queue, ensure=False)
        async with reader.iterator(no_ack=True) as arriving:
            while len(messages) < count:
                messages.append(await anext(arriving))
    return messages
