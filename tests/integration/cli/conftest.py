from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from deploy.local.stack import Stack
from tests.conftest import PutImage
from tests.integration.cli.running import Cli, commands
from tests.running import Worker


@pytest.fixture
def cli(stack: Stack, worker: Worker, tmp_path: Path) -> Iterator[Cli]:
    """Return commands for the queues of the shared worker."""
    with commands(stack, tmp_path, worker) as cli:
        yield cli


@pytest.fixture
async def no_worker_cli(stack: Stack, tmp_path: Path) -> AsyncIterator[Cli]:
    """Return commands for existing queues without a worker."""
    with commands(stack, tmp_path) as cli:
        made = await cli.run("topology", "apply")
        assert made.code == 0, made.err
        yield cli


@pytest.fixture
def put_image_url(put_image: PutImage) -> str:
    """Return the URL of an image in S3."""
    return put_image()
