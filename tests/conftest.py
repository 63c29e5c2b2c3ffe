import os
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from deploy.local.stack import Stack
from tests.rabbitmq_releases import chosen_installation
from tests.running import Client, Worker

StartWorker = Callable[..., Awaitable[Worker]]
MakeClient = Callable[[Worker], Awaitable[Client]]
PutImage = Callable[..., str]

BUCKET = "test-images"

# Hundreds of processes import the same modules: cache their bytecode.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts background jobs with SIGINT ignored, which child processes inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    with Stack.start(installation=chosen_installation()) as stack:
        stack.s3.client().create_bucket(Bucket=BUCKET)
        yield stack


@pytest.fixture(scope="session")
def own_stack() -> Iterator[Stack]:
    """A separate stack, for tests that stop, kill or overload its services."""
    with Stack.start(installation=chosen_installation()) as stack:
        stack.s3.client().create_bucket(Bucket=BUCKET)
        yield stack


@pytest.fixture(scope="session")
def put_image(stack: Stack) -> PutImage:
    """Upload bytes (by default a new small PNG) and return the s3:// URL."""
    s3 = stack.s3.client()

    def put(content: bytes | None = None, key: str | None = None) -> str:
        key = key or f"{uuid.uuid4().hex}.png"
        s3.put_object(Bucket=BUCKET, Key=key, Body=picture() if content is None else content)
        return f"s3://{BUCKET}/{key}"

    return put


def picture(kind: str = "PNG", size: tuple[int, int] = (48, 32)) -> bytes:
    """Return an image of a random colour."""
    colour = tuple(uuid.uuid4().bytes[:3])
    buffer = BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


@asynccontextmanager
async def _starting(stack: Stack, folder: Path) -> AsyncIterator[StartWorker]:
    """Start workers with the given settings; kill them at the end."""
    workers: list[Worker] = []

    async def start(*, wait: bool = True, like: Worker | None = None, **settings: str) -> Worker:
        if like is not None:
            settings = {
                "VQA_JOBS_QUEUE": like.jobs_queue,
                "VQA_RESULTS_QUEUE": like.results_queue,
                **settings,
            }
        worker = Worker.of(stack, folder, **settings)
        workers.append(worker)
        if wait:
            await worker.start()
        return worker

    try:
        yield start
    finally:
        for worker in workers:
            worker.kill()


@pytest.fixture
async def start_worker(stack: Stack, tmp_path: Path) -> AsyncIterator[StartWorker]:
    """Start workers with the given settings; kill them at the end."""
    async with _starting(stack, tmp_path) as start:
        yield start


@pytest.fixture
async def start_own_worker(own_stack: Stack, tmp_path: Path) -> AsyncIterator[StartWorker]:
    """The same on `own_stack`."""
    async with _starting(own_stack, tmp_path) as start:
        yield start


@asynccontextmanager
async def _making_clients(stack: Stack) -> AsyncIterator[MakeClient]:
    """Create clients for workers."""
    async with AsyncExitStack() as clients:

        async def make(worker: Worker) -> Client:
            return await clients.enter_async_context(Client.of(stack, worker))

        yield make


@pytest.fixture
async def client_of(stack: Stack) -> AsyncIterator[MakeClient]:
    """Create clients for workers."""
    async with _making_clients(stack) as make:
        yield make


@pytest.fixture
async def own_client_of(own_stack: Stack) -> AsyncIterator[MakeClient]:
    """The same on `own_stack`."""
    async with _making_clients(own_stack) as make:
        yield make


@pytest.fixture(scope="session")
async def worker(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Worker]:
    """A worker shared by many tests; jobs are distinguished by their ids and markers."""
    worker = Worker.of(stack, tmp_path_factory.mktemp("shared-worker"), VQA_MAX_ATTEMPTS="3")
    await worker.start()
    yield worker
    assert await worker.stop() == 0, worker.output()


@pytest.fixture
async def client(stack: Stack, worker: Worker) -> AsyncIterator[Client]:
    """A new client for the shared worker; a cancelled AMQP request closes the client's channel."""
    async with Client.of(stack, worker) as client:
        yield client
