"""Convert images in processes, each with limits of memory and time, so that no image can harm the worker."""

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any, Self, TypeVar

from worker.images.conversion import ConversionError, ConversionOptions, ConvertedImage
from worker.images.memory_budget import MemoryBudget

# For an image, or a page of a document. Reading the source and waiting for memory do not count.
TIMEOUT_S = 20.0
# After that a process without work ends.
IDLE_S = 60.0
# After that many images a process is replaced: decoders leak memory.
IMAGES_PER_PROCESS = 200

# A source that was not read for longer is opened again: its server may have closed the connection.
MAX_PAUSE_S = 5.0

_MAX_FRAME_BYTES = 1024 * 1024
_READ_BYTES = 256 * 1024
# Nothing secret. The other two keep freed memory from staying with the process (glibc, mallopt(3)).
_ENVIRONMENT = ("PATH", "LANG", "PYTHONPATH")
_MALLOC = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": str(1024 * 1024)}

Returned = TypeVar("Returned")
Pieces = AsyncIterator[bytes]
Reserve = Callable[[int], Awaitable[None]]


class _ProcessLostError(Exception):
    """The process crashed or ran into the time limit; the message completes "decoding it …"."""


class ConversionPool:
    """Processes that convert one image at a time each; started when they are needed."""

    def __init__(self, *, processes: int, memory_bytes: int) -> None:
        """`processes`: at most; `memory_bytes`: for decoding, of all processes together."""
        self._slots = asyncio.Semaphore(processes)
        self._memory_bytes = memory_bytes
        self._budget = MemoryBudget(memory_bytes)
        self._idle: list[_Process] = []
        self._busy: set[_Process] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self._is_closed = False

    async def convert(
        self,
        media_type: str,
        pieces: Pieces,
        options: ConversionOptions,
        *,
        again: Callable[[], Awaitable[Pieces]],
        reserve: Reserve,
        asked_at: float | None = None,
        on_start: Callable[[], None] = lambda: None,
    ) -> list[ConvertedImage]:
        """Return the image in a form that may be sent, or its pages.

        An image whose process is lost is tried once more, while no other image is decoded.

        Args:
            media_type: of the source, by its content.
            pieces: the source.
            options: what may be sent.
            again: opens the source a second time: after a crash, or after a long wait for a process.
            reserve: awaited before so many bytes of results are read.
            on_start: called when the image has a process.
            asked_at: since when `pieces` is not read, in seconds of `time.monotonic`. Default: now.

        Raises:
            ConversionError: the source cannot be converted.
            OSError: a process cannot be started.
            Exception: those of `pieces`, `again` and `reserve`.
        """
        options = replace(options, max_decode_bytes=self._memory_bytes)
        asked_at = time.monotonic() if asked_at is None else asked_at
        async with self._slots:
            on_start()
            if time.monotonic() - asked_at > MAX_PAUSE_S:
                pieces = await again()
            with suppress(_ProcessLostError):
                return await self._attempt(media_type, pieces, options, reserve, alone=False)
            try:
                return await self._attempt(media_type, await again(), options, reserve, alone=True)
            except _ProcessLostError as error:
                raise ConversionError("image_corrupt", f"decoding it {error}") from None

    @property
    def process_ids(self) -> list[int]:
        """The processes that run, those that convert an image first."""
        return [process.pid for process in (*self._busy, *self._idle)]

    async def close(self) -> None:
        """End all processes; images that are being converted fail."""
        self._is_closed = True
        for process in [*self._idle, *self._busy]:
            self._end(process)
        while self._ending:
            await asyncio.wait(self._ending)

    async def _attempt(
        self, media_type: str, pieces: Pieces, options: ConversionOptions, reserve: Reserve, *, alone: bool
    ) -> list[ConvertedImage]:
        process = await self._take(new=alone)
        try:
            await process.send(media_type, options, pieces)
            return await self._exchange(process, reserve, alone=alone)
        finally:
            self._busy.discard(process)
            # After a cancellation or a lost process, its state is unknown.
            if process.is_ready and process.images < IMAGES_PER_PROCESS and not self._is_closed:
                self._keep(process)
            else:
                self._end(process)

    async def _exchange(self, process: "_Process", reserve: Reserve, *, alone: bool) -> list[ConvertedImage]:
        """Read the answer of a process; give it the memory that it asks for."""
        reply = await process.reply()
        if "need" not in reply:
            return await _results(process, reply, reserve)
        need = reply["need"]
        if need > self._memory_bytes:
            process.write_frame({"go": False})
            process.is_ready = True
            raise ConversionError(
                "image_too_large",
                f"decoding it needs {need} bytes; VQA_IMAGE_DECODE_BYTES allows {self._memory_bytes}",
            )
        async with self._budget.reserve(self._memory_bytes if alone else need):
            process.write_frame({"go": True})
            reply = await process.reply()
            while "progress" in reply:
                reply = await process.reply()
            return await _results(process, reply, reserve)

    async def _take(self, *, new: bool) -> "_Process":
        if self._is_closed:
            raise RuntimeError("the pool is closed")
        process = None if new else self._running_idle()
        if process is None:
            process = await _Process.start()
        self._busy.add(process)
        return process

    def _running_idle(self) -> "_Process | None":
        while self._idle:
            process = self._idle.pop()
            process.stop_timer()
            if process.is_running:
                return process
            self._end(process)
        return None

    def _keep(self, process: "_Process") -> None:
        self._idle.append(process)
        process.start_timer(lambda: self._end(process))

    def _end(self, process: "_Process") -> None:
        if process in self._idle:
            self._idle.remove(process)
        if process.is_ending:
            return
        process.is_ending = True
        task = asyncio.create_task(process.end())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)


class _Process:
    """A process of `worker.images.converter`.

    Attributes:
        images: that it has been sent.
        is_ready: it has answered, and waits for an image.
        is_ending: `end` was called.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None  # noqa: S101 - for mypy
        assert process.stdout is not None  # noqa: S101 - for mypy
        self.images = 0
        self.is_ready = True
        self.is_ending = False
        self._process = process
        self._stdin = process.stdin
        self._stdout = process.stdout
        self._timer: asyncio.TimerHandle | None = None

    @classmethod
    async def start(cls) -> Self:
        """Start a process and wait until it has loaded the libraries.

        Raises:
            OSError: it cannot be started; the image has no part in that.
        """
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        process = cls(
            await asyncio.create_subprocess_exec(
                sys.executable,
                "-B",
                "-m",
                "worker.images.converter",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                env=environment | _MALLOC,
                limit=_READ_BYTES,
            )
        )
        try:
            await process.reply()
        except BaseException as error:
            await process.end()
            if isinstance(error, _ProcessLostError):
                raise OSError("a process that converts images cannot be started") from None
            raise
        return process

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.returncode is None

    def start_timer(self, end: Callable[[], None]) -> None:
        """Call `end` after the process has been idle for a while."""
        self._timer = asyncio.get_running_loop().call_later(IDLE_S, end)

    def stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    async def send(self, media_type: str, options: ConversionOptions, pieces: Pieces) -> None:
        """Send an image."""
        self.images += 1
        self.is_ready = False
        self.write_frame({"media_type": media_type, "options": asdict(options)})
        async for piece in pieces:
            if piece:
                self._write(len(piece).to_bytes(4), piece)
                await self._in_time(self._stdin.drain())
        self._write(bytes(4))
        await self._in_time(self._stdin.drain())

    def write_frame(self, frame: dict[str, Any]) -> None:
        text = json.dumps(frame).encode()
        self._write(len(text).to_bytes(4) + text)

    def _write(self, *parts: bytes) -> None:
        try:
            self._stdin.writelines(parts)
        except RuntimeError:
            # uvloop: the pipe is closed.
            raise _ProcessLostError("crashes") from None

    async def reply(self) -> dict[str, Any]:
        """Return the next frame."""
        return await self._in_time(self._read_frame())

    async def content(self, size: int) -> bytes:
        """Return the content of a result."""
        return await self._in_time(self._stdout.readexactly(size))

    async def end(self) -> None:
        """Kill the process and wait until it has ended."""
        self.stop_timer()
        with suppress(ProcessLookupError):
            self._process.kill()
        self._stdin.close()
        # A full pipe would never report its end. If a result is being read, its reader empties the pipe.
        with suppress(OSError, RuntimeError):
            while await self._stdout.read(_READ_BYTES):
                pass
        await self._process.wait()

    async def _read_frame(self) -> dict[str, Any]:
        length = int.from_bytes(await self._stdout.readexactly(4))
        if length > _MAX_FRAME_BYTES:
            raise ConnectionError
        frame: dict[str, Any] = json.loads(await self._stdout.readexactly(length))
        return frame

    async def _in_time(self, operation: Awaitable[Returned]) -> Returned:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await operation
        except TimeoutError:
            raise _ProcessLostError(f"takes more than {TIMEOUT_S:g} s") from None
        except (asyncio.IncompleteReadError, ConnectionError):
            raise _ProcessLostError("crashes") from None


async def _results(process: _Process, reply: dict[str, Any], reserve: Reserve) -> list[ConvertedImage]:
    if "error" in reply:
        process.is_ready = True
        raise ConversionError(reply["error"], reply["message"])
    heads = reply["images"]
    await reserve(sum(head["size"] for head in heads))
    images = []
    for head in heads:
        content = await process.content(head.pop("size"))
        images.append(ConvertedImage(**(head | {"content": content})))
    process.is_ready = True
    return images
