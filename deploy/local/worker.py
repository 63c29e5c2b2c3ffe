"""A worker of this checkout, which uses the services of a stack."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

from deploy.local.ports import PortBlock
from deploy.local.processes import SupervisedProcess
from deploy.local.service import Service, http_ok
from deploy.local.stack import Stack

_REPOSITORY = Path(__file__).parents[2]
# Settings of the user's own worker that say how to use the services that the environment names.
_KEPT_SETTINGS = ("VQA_RABBITMQ_", "VQA_S3_", "VQA_MODEL_HEADERS", "VQA_PRICES")


class LocalWorker(Service):
    """A worker; `log` is the file with its log."""

    ready_timeout_seconds = 30.0

    def __init__(self, stack: Stack, folder: Path, port: int, settings: Mapping[str, str]) -> None:
        self.address = f"localhost:{port}"
        process = SupervisedProcess(
            "worker",
            [sys.executable, "-m", "worker", "run"],
            environment={**_environment(stack, port), **settings},
            # Without the user's `.env`, which is not meant for this worker.
            folder=folder,
        )
        self.log = process.log
        super().__init__([process])

    def is_ready(self) -> bool:
        """Return whether it consumes jobs."""
        return http_ok(f"http://{self.address}/readyz")


@contextmanager
def running_worker(stack: Stack, folder: Path, **settings: str) -> Iterator[LocalWorker]:
    """Run a worker in the context; it is ready."""
    with closing(PortBlock()) as ports:
        worker = LocalWorker(stack, folder, ports.take(), settings)
        try:
            worker.start()
            yield worker
        finally:
            worker.stop()


def _environment(stack: Stack, port: int) -> dict[str, str]:
    given = {
        # The worker runs in another folder.
        name: str(Path(value).absolute()) if name.startswith("VQA_") and name.endswith("_FILE") else value
        for name, value in os.environ.items()
        if not name.startswith("VQA_") or name.startswith(_KEPT_SETTINGS)
    }
    return {
        **given,
        **stack.environment(),
        "PYTHONPATH": str(_REPOSITORY),
        "VQA_ALLOWED_BUCKETS": stack.s3.bucket,
        "VQA_HTTP_HOST": "127.0.0.1",
        "VQA_HTTP_PORT": str(port),
    }
