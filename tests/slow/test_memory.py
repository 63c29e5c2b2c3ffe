"""A worker does not exceed its documented memory, enforced by the kernel.

The limit on private writable memory (`RLIMIT_DATA`), above which allocations fail, is

    memory of an idle worker + image buffer (VQA_IMAGE_BUFFER_BYTES) + messages in flight + slack

with three additional messages for the one that is being parsed.
"""

import asyncio
import base64
import json
import subprocess
import sys
import uuid
import zlib
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web

from deploy.local.stack import Stack
from tests.conftest import BUCKET, picture
from tests.fake_s3 import FakeS3
from tests.running import Client, Worker, until

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="RLIMIT_DATA limits private memory on Linux only"
)

MB = 1_000_000
MIB = 1024 * 1024
BUFFER_BYTES = 32 * MIB
# For freed memory kept by allocators, stacks of threads, connections.
SLACK_BYTES = 40 * MIB
JOBS = 64
IMAGE_BYTES = 10 * MB
# Small images of a job are read before the model request.
SMALL_BYTES = 250_000
SMALL_PER_JOB = 16
PATIENCE_S = 60.0

LAUNCHER = """
import os, resource, sys
limit = int(sys.argv[1])
# Each thread allocates its stack in full.
resource.setrlimit(resource.RLIMIT_STACK, (2 << 20, resource.getrlimit(resource.RLIMIT_STACK)[1]))
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
os.execv(sys.argv[2], sys.argv[2:])
"""


def limited(limit: int, *command: str) -> list[str]:
    """Return the command with a memory limit."""
    return [sys.executable, "-c", LAUNCHER, str(limit), *command]


def memory(worker: Worker, name: str) -> int:
    """Return a value of /proc/<pid>/status in bytes."""
    assert worker.process is not None
    status = Path(f"/proc/{worker.process.pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


@dataclass
class BlockingApi:
    """A model API that answers after it has received a number of requests, and records their bodies."""

    url: str = ""
    blocks_until: int = 0
    received: int = 0
    checksums: Counter[int] = field(default_factory=Counter)
    last: bytes = b""
    _enough: asyncio.Condition = field(default_factory=asyncio.Condition)

    def block_until(self, count: int) -> None:
        self.received, self.blocks_until, self.last = 0, count, b""
        self.checksums.clear()

    @classmethod
    @asynccontextmanager
    async def serving(cls) -> AsyncIterator["BlockingApi"]:
        api = cls()
        async with await asyncio.start_server(api.serve, "127.0.0.1", 0, limit=MIB) as server:
            api.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
            yield api

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await self._read(reader)
                async with self._enough:
                    self.received += 1
                    self._enough.notify_all()
                    await self._enough.wait_for(lambda: self.received >= self.blocks_until)
                writer.write(ANSWER)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        left = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
        found = 0
        keep = self.last == b"" and self.blocks_until > 0
        kept = bytearray()
        while left:
            piece = await reader.read(min(left, MIB))
            if not piece:
                raise ConnectionResetError
            found, left = zlib.crc32(piece, found), left - len(piece)
            if keep:
                kept += piece
        if keep:
            self.last = bytes(kept)
        self.checksums[found] += 1


_BODY = json.dumps({"choices": [{"message": {"content": "A cat."}, "finish_reason": "stop"}]}).encode()
ANSWER = (
    f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(_BODY)}\r\n\r\n".encode()
    + _BODY
)


@dataclass(frozen=True)
class Environment:
    stack: Stack
    api: BlockingApi
    s3: FakeS3
    large: bytes
    medium: bytes
    folder: Path

    def worker(self, *, buffer_bytes: int = BUFFER_BYTES, **settings: str) -> Worker:
        return Worker.of(
            self.stack,
            self.folder,
            VQA_S3_ENDPOINT_URL=self.s3.url,
            VQA_MODEL_BASE_URL=self.api.url,
            VQA_IMAGE_BUFFER_BYTES=str(buffer_bytes),
            **settings,
        )


@pytest.fixture(scope="module")
async def environment(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Environment]:
    large, small = large_image(), picture()
    medium = large[:SMALL_BYTES]
    contents = {"large": large, "medium": medium, "small": small}

    async def by_key(request: web.BaseRequest) -> web.StreamResponse:
        kind = request.raw_path.rpartition("/")[2].partition("-")[0]
        return web.Response(body=contents[kind])

    async with BlockingApi.serving() as api, FakeS3.serving(small) as s3:
        s3.answer = by_key
        yield Environment(stack, api, s3, large, medium, tmp_path_factory.mktemp("memory"))


def large_image() -> bytes:
    start = picture()
    return start + bytes(range(256)) * ((IMAGE_BYTES - len(start)) // 256)


@pytest.fixture(scope="module")
async def idle_bytes(environment: Environment) -> int:
    """The memory of a worker after its first job."""
    worker = environment.worker()
    worker.command = limited(1 << 40, *worker.command)
    try:
        await worker.start()
        async with Client.of(environment.stack, worker) as client:
            environment.api.block_until(0)
            await client.ask(question="?", images=[f"s3://{BUCKET}/small"])
        return memory(worker, "VmData")
    finally:
        worker.kill()


@asynccontextmanager
async def running(worker: Worker, limit: int) -> AsyncIterator[Worker]:
    """Run the worker with a limit, after a check that the kernel enforces it."""
    control = [sys.executable, "-c", f"bytearray({limit})"]
    failed = await asyncio.to_thread(
        subprocess.run, limited(limit, *control), capture_output=True, check=False
    )
    assert b"MemoryError" in failed.stderr
    worker.command = limited(limit, *worker.command)
    try:
        yield await worker.start()
        assert await worker.stop() == 0, worker.output()
    finally:
        worker.kill()


async def ask_all(client: Client, bodies: list[bytes]) -> None:
    """Publish jobs and check that all succeed at the first attempt."""
    ids = [json.loads(body)["id"] for body in bodies]
    await asyncio.gather(*[client.publish(body) for body in bodies])
    replies = [await client.result(it, PATIENCE_S) for it in ids]
    assert [reply.body["error"] for reply in replies] == [None] * len(ids)
    assert {reply.body["attempts"] for reply in replies} == {1}


def job(*images: str) -> bytes:
    return json.dumps({"id": uuid.uuid4().hex, "question": "What is it?", "images": images}).encode()


def data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def urls_in(body: bytes) -> list[str]:
    parts = json.loads(body)["messages"][0]["content"]
    return [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]


async def test_images_from_s3_use_only_the_image_buffer(environment: Environment, idle_bytes: int) -> None:
    limit = idle_bytes + BUFFER_BYTES + SLACK_BYTES
    assert limit < JOBS * IMAGE_BYTES / 2
    async with running(environment.worker(), limit) as worker, Client.of(environment.stack, worker) as client:
        await raise_the_limit(environment, worker, client)
        environment.api.block_until(JOBS)
        await ask_all(client, [job(f"s3://{BUCKET}/large-{n}") for n in range(JOBS)])
        # All were in flight at the same time, each request with its image.
        assert environment.api.received == JOBS
        assert list(environment.api.checksums.values()) == [JOBS]
        assert urls_in(environment.api.last) == [data_url(environment.large)]


async def raise_the_limit(environment: Environment, worker: Worker, client: Client) -> None:
    """Raise the concurrency limit to its maximum with small jobs."""
    environment.api.block_until(0)
    await client.ask(question="?", images=[f"s3://{BUCKET}/small"])
    for _ in range(10):
        if worker.metric("vqa_concurrency_limit") >= JOBS:
            return
        environment.api.block_until(int(worker.metric("vqa_concurrency_limit")))
        await ask_all(client, [job(f"s3://{BUCKET}/small-{n}") for n in range(2 * JOBS)])
    raise AssertionError("the concurrency limit does not grow")


async def test_small_images_are_released_after_the_request_is_sent(
    environment: Environment, idle_bytes: int
) -> None:
    """Small images are sent from memory, all of a job at once."""
    jobs = 32
    limit = idle_bytes + BUFFER_BYTES + SLACK_BYTES
    assert limit < idle_bytes + jobs * SMALL_PER_JOB * SMALL_BYTES * 4 / 3 / 2
    worker = environment.worker(VQA_MAX_IMAGES_PER_JOB=str(SMALL_PER_JOB))
    async with running(worker, limit), Client.of(environment.stack, worker) as client:
        environment.api.block_until(jobs)
        keys = [[f"s3://{BUCKET}/medium-{n}-{m}" for m in range(SMALL_PER_JOB)] for n in range(jobs)]
        await ask_all(client, [job(*urls) for urls in keys])
        assert environment.api.received == jobs
        assert list(environment.api.checksums.values()) == [jobs]
        assert urls_in(environment.api.last) == [data_url(environment.medium)] * SMALL_PER_JOB


@pytest.mark.parametrize("escaped", [False, True], ids=["plain", "escaped"])
async def test_data_urls_use_only_the_memory_of_their_messages(
    environment: Environment, idle_bytes: int, escaped: bool
) -> None:
    jobs, buffer_bytes = 8, 8 * MIB
    content = picture() + large_image()[: 8 * MB]
    url = data_url(content)
    bodies = [job(url) for _ in range(jobs)]
    if escaped:
        # PHP escapes slashes.
        bodies = [body.replace(b"/", b"\\/") for body in bodies]
    message = max(map(len, bodies))
    limit = idle_bytes + buffer_bytes + SLACK_BYTES + (jobs + 3) * message
    # A second copy of each message exceeds the limit.
    assert limit < idle_bytes + jobs * 2 * message
    worker = environment.worker(buffer_bytes=buffer_bytes, VQA_MAX_CONCURRENCY=str(jobs))
    async with running(worker, limit), Client.of(environment.stack, worker) as client:
        environment.api.block_until(jobs)
        await ask_all(client, bodies)
        assert environment.api.received == jobs
        assert list(environment.api.checksums.values()) == [jobs]
        assert urls_in(environment.api.last) == [url]
        await until(lambda: worker.metric("vqa_jobs_in_flight") == 0, "all jobs are settled")
