"""A worker needs no more memory than it says, whatever the jobs are: the kernel sees to it.

The limit is on private writable memory (`RLIMIT_DATA`): beyond it, allocations fail. It is

    what an idle worker has + images on their way (VQA_IMAGE_BUFFER_BYTES) + messages in flight + slack

where the messages count once each, or twice where JSON escapes make the text of an image and its place in the
message differ, and three more times for the one that is being read.
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

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's data so")

MB = 1_000_000
MIB = 1024 * 1024
BUFFER_BYTES = 32 * MIB
# Of allocators that keep freed memory, of threads' stacks, of connections.
SLACK_BYTES = 40 * MIB
JOBS = 64
IMAGE_BYTES = 10 * MB
# Of these a job may have many, and all of them are at hand when the call is made.
SMALL_BYTES = 250_000
SMALL_PER_JOB = 16
PATIENCE_S = 60.0

LAUNCHER = """
import os, resource, sys
limit = int(sys.argv[1])
# Threads get this much of it each, whether they need it or not.
resource.setrlimit(resource.RLIMIT_STACK, (2 << 20, resource.getrlimit(resource.RLIMIT_STACK)[1]))
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
os.execv(sys.argv[2], sys.argv[2:])
"""


def limited(limit: int, *command: str) -> list[str]:
    """The command, with no more memory than that."""
    return [sys.executable, "-c", LAUNCHER, str(limit), *command]


def memory(worker: Worker, name: str) -> int:
    """A figure of the process, in bytes."""
    assert worker.process is not None
    status = Path(f"/proc/{worker.process.pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


@dataclass
class HoldingApi:
    """Reads requests and looks at them, and holds its answers back until it has so many requests."""

    url: str = ""
    holds_until: int = 0
    whole: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    sums: Counter[int] = field(default_factory=Counter)
    last: bytes = b""
    _enough: asyncio.Condition = field(default_factory=asyncio.Condition)

    def hold(self, count: int) -> None:
        self.whole, self.holds_until, self.last = 0, count, b""
        self.lengths.clear()
        self.sums.clear()

    @classmethod
    @asynccontextmanager
    async def serving(cls) -> AsyncIterator["HoldingApi"]:
        api = cls()
        async with await asyncio.start_server(api.serve, "127.0.0.1", 0, limit=MIB) as server:
            api.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
            yield api

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await self._read(reader)
                async with self._enough:
                    self.whole += 1
                    self._enough.notify_all()
                    await self._enough.wait_for(lambda: self.whole >= self.holds_until)
                writer.write(ANSWER)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = left = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
        found = 0
        keep = self.last == b"" and self.holds_until > 0
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
        self.lengths[length] += 1
        self.sums[found] += 1


_BODY = json.dumps({"choices": [{"message": {"content": "A cat."}, "finish_reason": "stop"}]}).encode()
ANSWER = (
    f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(_BODY)}\r\n\r\n".encode()
    + _BODY
)


@dataclass(frozen=True)
class Scene:
    stack: Stack
    api: HoldingApi
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
async def scene(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    large, small = large_image(), picture()
    medium = large[:SMALL_BYTES]
    contents = {"large": large, "medium": medium, "small": small}

    async def by_key(request: web.BaseRequest) -> web.StreamResponse:
        kind = request.raw_path.rpartition("/")[2].partition("-")[0]
        return web.Response(body=contents[kind])

    async with HoldingApi.serving() as api, FakeS3.serving(small) as s3:
        s3.answer = by_key
        yield Scene(stack, api, s3, large, medium, tmp_path_factory.mktemp("memory"))


def large_image() -> bytes:
    start = picture()
    return start + bytes(range(256)) * ((IMAGE_BYTES - len(start)) // 256)


@pytest.fixture(scope="module")
async def idle_bytes(scene: Scene) -> int:
    """What a worker has that has just done its first job."""
    worker = scene.worker()
    worker.command = limited(1 << 40, *worker.command)
    try:
        await worker.start()
        async with Client.of(scene.stack, worker) as client:
            scene.api.hold(0)
            await client.ask(question="?", images=[f"s3://{BUCKET}/small"])
        return memory(worker, "VmData")
    finally:
        worker.kill()


@asynccontextmanager
async def running(worker: Worker, limit: int) -> AsyncIterator[Worker]:
    """The worker under a limit, which must bite: another program that needs more does not get it."""
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
    """Publish jobs, whose ids are 0 and so on behind a marker, and see to it that all succeed."""
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


async def test_images_from_s3_need_no_more_than_the_buffer_however_many_are_in_flight(
    scene: Scene, idle_bytes: int
) -> None:
    limit = idle_bytes + BUFFER_BYTES + SLACK_BYTES
    assert limit < JOBS * IMAGE_BYTES / 2
    async with running(scene.worker(), limit) as worker, Client.of(scene.stack, worker) as client:
        await let_it_grow(scene, worker, client)
        scene.api.hold(JOBS)
        await ask_all(client, [job(f"s3://{BUCKET}/large-{n}") for n in range(JOBS)])
        # All of them were in flight at once, and each request had its image.
        assert scene.api.whole == JOBS
        assert list(scene.api.sums.values()) == [JOBS]
        assert urls_in(scene.api.last) == [data_url(scene.large)]


async def let_it_grow(scene: Scene, worker: Worker, client: Client) -> None:
    """The limit of calls at once starts at half: small jobs bring it up, which come back all at once."""
    scene.api.hold(0)
    await client.ask(question="?", images=[f"s3://{BUCKET}/small"])
    for _ in range(10):
        if worker.metric("vqa_concurrency_limit") >= JOBS:
            return
        scene.api.hold(int(worker.metric("vqa_concurrency_limit")))
        await ask_all(client, [job(f"s3://{BUCKET}/small-{n}") for n in range(2 * JOBS)])
    raise AssertionError("the limit of calls at once does not grow")


async def test_small_images_are_not_held_while_the_api_thinks(scene: Scene, idle_bytes: int) -> None:
    """They go out from memory, all of a job's at once, and are released when they were sent."""
    jobs = 32
    limit = idle_bytes + BUFFER_BYTES + SLACK_BYTES
    assert limit < idle_bytes + jobs * SMALL_PER_JOB * SMALL_BYTES * 4 / 3 / 2
    worker = scene.worker(VQA_MAX_IMAGES_PER_JOB=str(SMALL_PER_JOB))
    async with running(worker, limit), Client.of(scene.stack, worker) as client:
        scene.api.hold(jobs)
        keys = [[f"s3://{BUCKET}/medium-{n}-{m}" for m in range(SMALL_PER_JOB)] for n in range(jobs)]
        await ask_all(client, [job(*urls) for urls in keys])
        assert scene.api.whole == jobs
        assert list(scene.api.sums.values()) == [jobs]
        assert urls_in(scene.api.last) == [data_url(scene.medium)] * SMALL_PER_JOB


@pytest.mark.parametrize("escaped", [False, True], ids=["plain", "escaped"])
async def test_data_urls_need_no_more_than_their_messages(
    scene: Scene, idle_bytes: int, escaped: bool
) -> None:
    jobs, buffer_bytes = 8, 8 * MIB
    content = picture() + large_image()[: 8 * MB]
    url = data_url(content)
    bodies = [job(url) for _ in range(jobs)]
    if escaped:
        # As PHP does.
        bodies = [body.replace(b"/", b"\\/") for body in bodies]
    message = max(map(len, bodies))
    limit = idle_bytes + buffer_bytes + SLACK_BYTES + (jobs + 3) * message
    # One more copy of each would not fit, whatever else is small.
    assert limit < idle_bytes + jobs * 2 * message
    worker = scene.worker(buffer_bytes=buffer_bytes, VQA_MAX_CONCURRENCY=str(jobs))
    async with running(worker, limit), Client.of(scene.stack, worker) as client:
        scene.api.hold(jobs)
        await ask_all(client, bodies)
        assert scene.api.whole == jobs
        assert list(scene.api.sums.values()) == [jobs]
        assert urls_in(scene.api.last) == [url]
        await until(lambda: worker.metric("vqa_jobs_in_flight") == 0, "all jobs are settled")
