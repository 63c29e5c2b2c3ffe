"""Run commands with their own queues and state folder: in this process, or in a separate one."""

import asyncio
import contextlib
import gc
import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import uuid
import warnings
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from unittest.mock import patch

import aio_pika
import structlog

from deploy.local.stack import Stack
from tests.running import ROOT, Ended, Worker
from worker.__main__ import main
from worker.cli.submit.state import Counts, read_state

PATIENCE_S = 60.0
COMMAND = [sys.executable, "-m", "worker"]
# Environment, working directory and standard streams belong to the process: one command at a time.
_ONE_COMMAND = threading.Lock()
# The environment variables that commands inherit.
INHERITED = ("PATH", "HOME", "LANG")


@dataclass(frozen=True)
class Completed:
    """A command that has exited."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """Return the lines of stdout."""
        return self.out.splitlines()

    @property
    def err_lines(self) -> list[str]:
        """Return the lines of stderr."""
        return self.err.splitlines()

    @property
    def objects(self) -> list[dict[str, Any]]:
        """Return the objects on stdout with `--json`."""
        return [json.loads(line) for line in self.lines]

    @property
    def summary(self) -> dict[str, Any]:
        """Return the last object."""
        return self.objects[-1]

    def as_ended(self) -> Ended:
        """Return the exit code, stdout and the lines of stderr without `Error: `."""
        return Ended(self.code, self.out, [line.removeprefix("Error: ") for line in self.err_lines])


class Cli:
    """`vqa-worker` with its own settings; its state folder is in `folder`."""

    def __init__(self, folder: Path, settings: Mapping[str, str]) -> None:
        self.folder = folder
        self.settings = dict(settings)
        self.command = COMMAND
        self._started: list[subprocess.Popen[Any]] = []

    @classmethod
    def of(cls, stack: Stack, folder: Path, worker: Worker | None = None, **settings: str) -> "Cli":
        """Return commands for a worker's queues, or for queues without a worker."""
        name = f"t{uuid.uuid4().hex[:10]}"
        queues = {
            "VQA_JOBS_QUEUE": worker.jobs_queue if worker else f"{name}.jobs",
            "VQA_RESULTS_QUEUE": worker.results_queue if worker else f"{name}.results",
        }
        environment = stack.environment()
        # Settings of workers only.
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
        inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}
        state = str(self.folder / "state")
        return {
            **inherited,
            **self.settings,
            "XDG_STATE_HOME": state,
            "PYTHONPATH": str(ROOT),
            "NO_COLOR": "1",
        }

    async def run(self, *arguments: str, stdin: str | bytes = "", **settings: str) -> Completed:
        """Run a command to its end: in this process, which is much faster than starting another."""
        raw = stdin.encode() if isinstance(stdin, str) else stdin
        if self.command is COMMAND:
            environment = {**self.environment, **settings}
            return await asyncio.to_thread(_run_here, arguments, environment, self.folder, raw)
        return await self.run_process(*arguments, stdin=raw, **settings)

    async def run_process(self, *arguments: str, stdin: bytes = b"", **settings: str) -> Completed:
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
        return Completed(done.returncode, done.stdout.decode(), done.stderr.decode())

    async def run_json(self, *arguments: str, code: int = 0) -> list[dict[str, Any]]:
        """Run a command with `--json`; check its exit code and return the objects."""
        ended = await self.run(*arguments, "--json")
        assert ended.code == code, ended
        return ended.objects

    def with_settings(self, **settings: str) -> "Cli":
        """Return commands with changed settings."""
        return Cli(self.folder, {**self.settings, **settings})

    def start(self, *arguments: str, stdout: int | IO[Any] = subprocess.PIPE) -> "subprocess.Popen[str]":
        """Start a command; `end_all` kills it."""
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
        """Let `end_all` kill a process."""
        self._started.append(process)

    def write(self, name: str, *lines: Mapping[str, Any] | str) -> str:
        """Write a file of lines; return its name."""
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (self.folder / name).write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
        return name

    def read(self, name: str) -> list[dict[str, Any]]:
        """Read a JSONL file."""
        return [json.loads(line) for line in (self.folder / name).read_text(encoding="utf-8").splitlines()]

    @property
    def state_files(self) -> list[Path]:
        """Return the state files of submissions."""
        return sorted((self.folder / "state" / "vqa-worker").glob("*.submission"))

    def counts(self) -> Counts | None:
        """Return the progress of the only submission; None before there is one."""
        return read_state(self.state_files[0])[1] if self.state_files else None

    def end_all(self) -> None:
        """Kill all processes that still run."""
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.wait()
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()


def _run_here(
    arguments: Sequence[str], environment: Mapping[str, str], folder: Path, stdin: bytes
) -> Completed:
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
        warnings.catch_warnings(),
    ):
        # aiormq leaves a coroutine unawaited if it cannot connect; a real command does not show that warning.
        warnings.simplefilter("ignore")
        try:
            code = main(arguments)
        except SystemExit as exited:
            # argparse exits on wrong usage.
            code = exited.code if isinstance(exited.code, int) else 1
        if code:
            gc.collect()
    return Completed(code, _text(out), _text(err))


def _text(stream: io.TextIOWrapper) -> str:
    stream.seek(0)
    return stream.read()


def _log_nothing(*_: Any, **__: Any) -> None:
    """Send structlog's events to the standard library's loggers, which the command disables."""
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


def finished(process: "subprocess.Popen[str]") -> Completed:
    """Wait for a started command."""
    out, err = process.communicate(timeout=PATIENCE_S)
    return Completed(process.returncode, out or "", err)


async def ended(process: "subprocess.Popen[str]") -> Completed:
    """Wait for a started command without blocking the event loop."""
    return await asyncio.to_thread(finished, process)


async def kill(process: "subprocess.Popen[str]") -> None:
    """Kill a command with SIGKILL."""
    process.send_signal(signal.SIGKILL)
    assert (await ended(process)).code == -signal.SIGKILL


@contextlib.contextmanager
def commands(stack: Stack, folder: Path, worker: Worker | None = None, **settings: str) -> Iterator[Cli]:
    """Yield commands whose processes are killed at the end."""
    cli = Cli.of(stack, folder, worker, **settings)
    try:
        yield cli
    finally:
        cli.end_all()


@asynccontextmanager
async def channel_of(stack: Stack) -> AsyncIterator[aio_pika.abc.AbstractChannel]:
    """Yield a channel."""
    async with await aio_pika.connect(stack.rabbitmq.url) as connection:
        yield await connection.channel()


async def depth(stack: Stack, queue: str) -> int | None:
    """Return the depth of a queue; None if it does not exist."""
    async with channel_of(stack) as channel:
        try:
            found = await channel.declare_queue(queue, passive=True)
        except aio_pika.exceptions.ChannelNotFoundEntity:
            return None
        return found.declaration_result.message_count


async def drain(stack: Stack, queue: str) -> list[aio_pika.abc.AbstractIncomingMessage]:
    """Take the messages that are in a queue now, and none that arrive meanwhile."""
    count = await depth(stack, queue) or 0
    async with channel_of(stack) as channel:
        reader = await channel.get_queue(queue, ensure=False)
        return [await reader.get(no_ack=True) for _ in range(count)]
