"""Measure one picture in a process: the worker's, and one that uses Pillow in the plain way."""

import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.bench import machine
from tests.bench.contenders import ROOT
from tests.bench.conversion.sources import PDF_DPI, Source
from worker.images import converter
from worker.images.conversion import ConversionError, ConversionOptions, ConvertedImage
from worker.images.conversion_pool import ConversionPool

_PIECE_BYTES = 256 * 1024
_MEMORY_BYTES = 2 * 1024**3
_MAX_BYTES = 20_000_000


@dataclass(frozen=True)
class Cost:
    """What a conversion needed.

    Attributes:
        cpu_s: user and system time of the process, without its start.
        peak_mb: the largest resident memory of the process so far.
        sent_bytes: of the results.
    """

    cpu_s: float
    time_s: float
    peak_mb: float
    sent_bytes: int

    def figures(self) -> dict[str, float]:
        """Return the measurement of a table."""
        return {
            "cpu_s": self.cpu_s,
            "time_s": self.time_s,
            "peak_mb": self.peak_mb,
            "sent_kb": self.sent_bytes / 1000,
        }


def cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process, as clock_getcpuclockid(3) of Linux."""
    return time.clock_gettime((~pid << 3) | 2)


class WorkerConversion:
    """Converts in a new process, with the pool of the worker."""

    def __init__(self, pool: ConversionPool) -> None:
        self._pool = pool

    @classmethod
    @asynccontextmanager
    async def started(cls, source: Source | None = None) -> AsyncIterator["WorkerConversion"]:
        """Start a process that has loaded the libraries for a source."""
        os.environ["PYTHONPATH"] = str(ROOT)
        pool = ConversionPool(processes=1, memory_bytes=_MEMORY_BYTES)
        try:
            conversion = cls(pool)
            if source is not None:
                await conversion.convert(source, source.tiny)
            yield conversion
        finally:
            await pool.close()

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self._pool.process_ids[0]

    def cpu_s(self) -> float:
        """Return the CPU seconds of the process so far."""
        return cpu_s(self.pid)

    async def convert(self, source: Source, content: bytes | None = None) -> list[ConvertedImage]:
        """Convert a source; `content`: other content."""
        content = source.content if content is None else content

        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(content), _PIECE_BYTES):
                yield content[start : start + _PIECE_BYTES]

        async def again() -> AsyncIterator[bytes]:
            raise AssertionError(f"{source.name}: the process was lost")

        async def reserve(_: int) -> None:
            """Need no memory of the worker."""

        return await self._pool.convert(
            source.media_type, pieces(), options(source), again=again, reserve=reserve
        )

    async def cost(self, source: Source) -> Cost:
        """Convert the source and measure it."""
        pid, started = self.pid, time.perf_counter()
        before_s = cpu_s(pid)
        images = await self.convert(source)
        took_s = time.perf_counter() - started
        sent_bytes = sum(len(image.content) for image in images)
        return Cost(cpu_s(pid) - before_s, took_s, machine.peak_mb(pid), sent_bytes)


class PlainConversion:
    """Converts in a new process that runs `plain`."""

    def __init__(self, process: "subprocess.Popen[str]", folder: Path) -> None:
        self._process = process
        self._folder = folder

    @classmethod
    @contextmanager
    def started(cls, source: Source, folder: Path) -> Iterator["PlainConversion"]:
        """Start a process that has loaded the libraries for a source."""
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.conversion.plain"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with process:
            conversion = cls(process, folder)
            conversion._convert(source, source.tiny)
            yield conversion
            assert process.stdin is not None
            process.stdin.close()

    def cost(self, source: Source) -> Cost:
        """Convert the source and measure it."""
        path = self._written(source.content)
        pid, started = self._process.pid, time.perf_counter()
        before_s = cpu_s(pid)
        sent_bytes = self._answer(source, path)
        took_s = time.perf_counter() - started
        return Cost(cpu_s(pid) - before_s, took_s, machine.peak_mb(pid), sent_bytes)

    def _convert(self, source: Source, content: bytes) -> int:
        return self._answer(source, self._written(content))

    def _written(self, content: bytes) -> Path:
        path = self._folder / "source"
        path.write_bytes(content)
        return path

    def _answer(self, source: Source, path: Path) -> int:
        request = {
            "path": str(path),
            "media_type": source.media_type,
            "max_edge": source.max_edge,
            "dpi": PDF_DPI,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return sum(json.loads(self._process.stdout.readline()))


def options(source: Source) -> ConversionOptions:
    """Return the options with the defaults of the settings."""
    return ConversionOptions(
        types=("image/jpeg", "image/png", "image/webp"),
        max_bytes=_MAX_BYTES,
        max_edge=source.max_edge,
        max_pixels=200_000_000,
        pages=None,
        max_pages=20,
        pdf_dpi=PDF_DPI,
    )


def reserved_mb(source: Source) -> float:
    """Return the memory that a process asks for before it decodes a source; nothing is decoded here."""
    asked: list[int] = []

    def reserve(need: int) -> None:
        asked.append(need)
        raise ConversionError("image_corrupt", "not decoded")

    with suppress(ConversionError):
        converter.convert(source.content, source.media_type, options(source), reserve)
    return sum(asked) / 1e6


async def measured(source: Source, folder: Path) -> tuple[Cost, Cost]:
    """Return the costs of the worker's and of the plain conversion of a source, one after the other."""
    async with WorkerConversion.started(source) as conversion:
        ours = await conversion.cost(source)
    with PlainConversion.started(source, folder) as plain:
        return ours, plain.cost(source)
