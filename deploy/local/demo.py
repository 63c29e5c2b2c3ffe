"""`make demo`: run a few jobs from end to end on real services.

Starts RabbitMQ, S3, the model simulator and a worker, or uses those that the environment names; uploads
images; submits questions about them; shows the answers; stops everything that it started.
"""

import asyncio
import os
import signal
import ssl
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy.local.external import without_local_stack
from deploy.local.sample_jobs import ask, console
from deploy.local.stack import Stack
from deploy.local.terminal import raise_keyboard_interrupt
from deploy.local.worker import running_worker
from vqa_worker.rabbitmq.connection import Broker
from worker.rabbitmq.topology import Topology

SIMULATED_LATENCY_S = 0.8

NEXT_STEPS = """
Next:
   make stack                     keep it running, and ask your own questions
   DEEPINFRA_TOKEN=… make demo    ask a real model (or OPENAI_API_KEY=…)
   .venv/bin/vqa-worker --help    the command line; see docs/quickstart.md"""


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
    given = without_local_stack(os.environ, console.print)
    console.print("[bold]Starting[/bold] RabbitMQ, S3 and a model, except those that the environment names")
    for name in ("VQA_RABBITMQ_URL", "VQA_S3_ENDPOINT_URL", "VQA_MODEL_BASE_URL"):
        if given.get(name):
            console.print(f"   {name} is set: using it")
    with Stack.start(given, on_progress=lambda line: console.print(f"   {line}")) as stack:
        if stack.model_api.is_simulated:
            stack.model.configure(latency=SIMULATED_LATENCY_S)
            model = "[bold]simulated[/bold]: it only describes the image file"
        else:
            model = f"{stack.model_api.models[0]} at {stack.model_api.base_url} (real, costs money)"
        console.print(f"   ready after {time.monotonic() - started:.0f} s; the model is {model}")
        topology = _own_topology()
        with _worker(stack, topology):
            ask(stack.rabbitmq.url, topology.jobs, stack.s3)
    took_s = time.monotonic() - started
    console.print(f"Done in {took_s:.0f} s. Everything that was started here is stopped.", highlight=False)
    console.print(NEXT_STEPS, highlight=False, markup=False)


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
    """Run a worker with these queues in the context; delete them at its end."""
    settings = {
        "VQA_JOBS_QUEUE": topology.jobs,
        "VQA_RESULTS_QUEUE": topology.results,
        "VQA_DEAD_LETTER_QUEUE": topology.dead_letters,
        "VQA_RETRY_DELAYS": ",".join(map(str, topology.retry_delays_s)),
    }
    with tempfile.TemporaryDirectory(prefix="vqa-demo-") as folder:
        try:
            with running_worker(stack, Path(folder), **settings):
                yield
        finally:
            asyncio.run(_delete(topology, stack.rabbitmq.url))


async def _delete(topology: Topology, url: str) -> None:
    broker = Broker(url, ssl.create_default_context() if url.startswith("amqps:") else None, "vqa-demo")
    async with await broker.connect() as connection:
        channel = await connection.channel()
        for queue in topology.queues():
            await channel.queue_delete(queue.name, if_unused=False, if_empty=False)
        await channel.exchange_delete(topology.control.name)


if __name__ == "__main__":
    sys.exit(main())
