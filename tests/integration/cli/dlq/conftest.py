from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from deploy.local.stack import Stack
from tests.integration.cli.dlq.dead_letters import Queues
from tests.integration.cli.running import Cli, commands


@pytest.fixture
def cli(stack: Stack, tmp_path: Path) -> Iterator[Cli]:
    """Return commands for the test's own queues, without a worker."""
    with commands(stack, tmp_path) as cli:
        yield cli


@pytest.fixture
async def queues(stack: Stack, cli: Cli) -> AsyncIterator[Queues]:
    """Return the queues of `cli`."""
    async with Queues.of(stack, cli) as queues:
        yield queues
