"""`make demo`: run a few jobs from end to end on real services.

Starts RabbitMQ, S3, the model simulator and a worker, or uses those that the environment names; uploads
images; submits questions about them; shows the answers; stops everything that it started.
"""

import asyncio
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import aio_pika

from deploy.local.ports import PortBlock
from deploy.local.processes import SupervisedProcess
from deploy.local.sample_jobs import ask, console
from deploy.local.service import http_ok
from deploy.local.stack import Stack
from deploy.local.terminal import raise_keyboard_interrupt
from worker.rabbitmq.topology import Topology

WORKER_START_TIMEOUT_S = 30.0
SIMULATED_LATENCY_S = 0.8

_REPOSITORY = Path(__file__).parents[2]
# Settings of the user's own worker that say how to use the services that the environment names.
_KEPT_SETTINGS = ("VQA_RABBITMQ_", "VQA_S3_", "VQA_MODEL_HEADERS", "VQA_PRICES")


def main() -> int:
    """Run the demo; return its exit code."""
    signal.signal(signal.SIGTERM, raise_keyboard_interrupt)
    try:
        _run()
    except KeyboardInterrupt:
        console.print("Interrupted. Everything that was started here is stopped.")
        return 130
    except RuntimeError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        return 1
    return 0


def _run() -> None:
    started = time.monotonic()
    console.print("[bold]Starting[/bold] RabbitMQ, S3 and a model, except those that the environment names")
    with Stack.start(use_environment=True, on_progress=lambda line: console.print(f"   {line}")) as stack:
        if stack.model_api.is_simulated:
            stack.model.configure(latency=SIMULATED_LATENCY_S)
            model = "[bold]simulated[/bold]: it only describes pixels"
        else:
            model = f"{stack.model_api.models[0]} at {stack.model_api.base_url} (real, costs money)"
        console.print(f"   ready after {time.monotonic() - started:.0f} s; the model is {model}")
        topology = _own_topology()
        with _worker(stack, topology):
            ask(stack.rabbitmq.url, topology.jobs, stack.s3)
    console.print(
        f"\nDone in {time.monotonic() - started:.0f} s. Everything that was started here is stopped. Next:\n"
        "   make stack          keep RabbitMQ, S3 and the simulated model running\n"
        "   DEEPINFRA_TOKEN=… make demo    ask a real model (or OPENAI_API_KEY=…)\n"
        "   README.md           run the worker with your own RabbitMQ, S3 and API\n"
        "   docs/settings.md    all settings",
        highlight=False,
    )


def _own_topology() -> Topology:
    """Return queues of the demo's own, as the broker may be in use."""
    name = f"vqa.demo.{uuid.uuid4().hex[:8]}"
    return Topology(
        jobs=name,
        results=f"{name}.results",
        dead_letters=f"{name}.dead",
        retry_delays_s=(1, 5),
        reply_exchange="",
        jobs_exchange="",
        declare=True,
    )


@contextmanager
def _worker(stack: Stack, topology: Topology) -> Iterator[None]:
    """Run a worker in the context; it is ready."""
    with closing(PortBlock()) as ports, tempfile.TemporaryDirectory(prefix="vqa-demo-") as folder:
        port = ports.take()
        process = SupervisedProcess(
            "worker",
            [sys.executable, "-m", "worker", "run"],
            environment=_worker_environment(stack, topology, port),
            # Without the user's `.env`, which is not meant for this worker.
            folder=Path(folder),
        )
        try:
            process.launch()
            process.wait_until(
                lambda: http_ok(f"http://127.0.0.1:{port}/readyz"),
                timeout_seconds=WORKER_START_TIMEOUT_S,
                advice="",
            )
            yield
        finally:
            process.stop()
            asyncio.run(_delete(topology, stack.rabbitmq.url))


def _worker_environment(stack: Stack, topology: Topology, port: int) -> dict[str, str]:
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
        "VQA_JOBS_QUEUE": topology.jobs,
        "VQA_RESULTS_QUEUE": topology.results,
        "VQA_DEAD_LETTER_QUEUE": topology.dead_letters,
        "VQA_RETRY_DELAYS": ",".join(map(str, topology.retry_delays_s)),
        "VQA_ALLOWED_BUCKETS": stack.s3.bucket,
        "VQA_HTTP_HOST": "127.0.0.1",
        "VQA_HTTP_PORT": str(port),
    }


async def _delete(topology: Topology, url: str) -> None:
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        for queue in topology.queues():
            await channel.queue_delete(queue.name, if_unused=False, if_empty=False)
        await channel.exchange_delete(topology.control.name)


if __name__ == "__main__":
    sys.exit(main())
