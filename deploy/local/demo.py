"""`make demo`: the whole way of a few jobs, from nothing, on real parts.

Starts RabbitMQ, S3, a model and a worker, or uses those that the environment names; uploads pictures; asks
questions about them; shows the answers as they come; stops everything that it started.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import aio_pika
from prometheus_client.parser import text_string_to_metric_families

from deploy.local.external import IncompleteConfigurationError
from deploy.local.install import RabbitMQNotInstalledError
from deploy.local.processes import ServiceStartError
from deploy.local.sample_images import create_sample_images
from deploy.local.sample_jobs import UnansweredError, answers, console, show, upload
from deploy.local.stack import Stack
from worker.settings import retry_queue

START_TIMEOUT_S = 30.0
STAND_IN_LATENCY_S = 0.8

_ROOT = Path(__file__).parents[2]
# What the worker needs to know of servers and APIs that the environment names, by what names them.
_FILES_OF_GIVEN_BROKER = ("VQA_RABBITMQ_CA_FILE", "VQA_RABBITMQ_CERT_FILE", "VQA_RABBITMQ_KEY_FILE")
_OF_GIVEN_S3 = ("VQA_S3_ADDRESSING_STYLE",)
_OF_ANY_MODEL = ("VQA_MODEL_HEADERS", "VQA_PRICES")


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


def main() -> int:
    """Run the demo; return its exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with tempfile.TemporaryDirectory(prefix="vqa-demo-") as folder:
            _run(Path(folder))
    except KeyboardInterrupt:
        console.print("Interrupted; everything that was started here is stopped.")
        return 130
    except (
        DemoError,
        UnansweredError,
        ServiceStartError,
        IncompleteConfigurationError,
        RabbitMQNotInstalledError,
    ) as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        return 1
    return 0


def _run(folder: Path) -> None:
    started = time.monotonic()
    console.print(
        "[bold]Starting[/bold] RabbitMQ, S3 and a model (what the environment names is used instead)"
    )
    with Stack.start(use_environment=True, on_progress=lambda line: console.print(f"   {line}")) as stack:
        _say_what_runs(stack, time.monotonic() - started)
        pictures = create_sample_images(folder / "pictures")
        jobs = upload(stack.s3, pictures)
        with _worker(stack, folder) as worker:
            results = asyncio.run(answers(stack.rabbitmq.url, worker.environment["VQA_JOBS_QUEUE"], jobs))
            show(jobs, results)
            _show_metrics(worker.port)
    _show_next(time.monotonic() - started)


def _say_what_runs(stack: Stack, took_s: float) -> None:
    model = (
        "a [bold]stand-in[/bold], which tells what is in the picture file and understands nothing"
        if stack.model_api.is_simulated
        else f"{stack.model_api.models[0]} at {stack.model_api.base_url} (real, and paid for)"
    )
    if stack.model_api.is_simulated:
        stack.model.configure(latency=STAND_IN_LATENCY_S)
    console.print(f"   up after {took_s:.0f} s; the model is {model}")


class _Worker:
    """The worker's process and where it listens."""

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        self.environment = environment
        self.log = log
        with log.open("wb") as output:
            # In a folder without a `.env`: that of the user's own worker is not meant for this one.
            self.process = subprocess.Popen(
                [sys.executable, "-m", "worker", "run"],
                env={**environment, "PYTHONPATH": str(_ROOT)},
                cwd=log.parent,
                stdout=output,
                stderr=output,
            )
        self.port = 0

    def wait_until_started(self) -> None:
        ends = time.monotonic() + START_TIMEOUT_S
        while not self.port or not _is_ready(self.port):
            if self.process.poll() is not None or time.monotonic() > ends:
                raise DemoError(f"The worker did not start:\n{self.log.read_text()}")
            time.sleep(0.1)
            self.port = self.port or _port_in(self.log)


@contextmanager
def _worker(stack: Stack, folder: Path) -> Iterator[_Worker]:
    """A worker with queues of its own, which are deleted afterwards: the broker may be somebody's."""
    environment = _worker_environment(stack)
    worker = _Worker(environment, folder / "worker.log")
    try:
        worker.wait_until_started()
        yield worker
    finally:
        worker.process.terminate()
        worker.process.wait()
        asyncio.run(_delete_queues(stack.rabbitmq.url, _queues(environment)))


def _worker_environment(stack: Stack) -> dict[str, str]:
    """What the demo's worker is told: nothing that the user's own worker is told, but for the servers."""
    name = f"vqa.demo.{uuid.uuid4().hex[:8]}"
    return {
        **{variable: value for variable, value in os.environ.items() if not variable.startswith("VQA_")},
        **_of_given(os.environ),
        **stack.environment(),
        "VQA_JOBS_QUEUE": name,
        "VQA_RESULTS_QUEUE": f"{name}.results",
        "VQA_DEAD_LETTER_QUEUE": f"{name}.dead",
        "VQA_RETRY_DELAYS": "1,5,30,120",
        "VQA_ALLOWED_REPLY_TO": "amq.gen-*",
        "VQA_REPLY_EXCHANGE": "",
        "VQA_DECLARE_TOPOLOGY": "true",
        "VQA_ALLOWED_BUCKETS": stack.s3.bucket,
        "VQA_IMAGE_DELIVERY": "inline",
        "VQA_HTTP_HOST": "127.0.0.1",
        "VQA_HTTP_PORT": "0",
        "VQA_LOG_FORMAT": "json",
        # The port is read from an entry of this level.
        "VQA_LOG_LEVEL": "info",
    }


def _of_given(environment: Mapping[str, str]) -> dict[str, str]:
    """How to speak with the servers and the API that the environment names."""
    wanted = _OF_ANY_MODEL + (_OF_GIVEN_S3 if environment.get("VQA_S3_ENDPOINT_URL") else ())
    files = _FILES_OF_GIVEN_BROKER if environment.get("VQA_RABBITMQ_URL") else ()
    return {
        **{variable: environment[variable] for variable in wanted if environment.get(variable)},
        # The worker runs in another folder.
        **{
            variable: str(Path(environment[variable]).absolute())
            for variable in files
            if environment.get(variable)
        },
    }


def _queues(environment: Mapping[str, str]) -> list[str]:
    """The queues that a worker with these settings declares."""
    jobs = environment["VQA_JOBS_QUEUE"]
    delays = environment["VQA_RETRY_DELAYS"].split(",")
    return [
        jobs,
        environment["VQA_RESULTS_QUEUE"],
        environment["VQA_DEAD_LETTER_QUEUE"],
        *(retry_queue(jobs, int(delay)) for delay in delays),
    ]


async def _delete_queues(url: str, queues: Sequence[str]) -> None:
    async with await aio_pika.connect(url) as connection:
        for queue in queues:
            channel = await connection.channel()
            await channel.queue_delete(queue, if_unused=False, if_empty=False)


def _show_metrics(port: int) -> None:
    wanted = (
        "vqa_jobs_total",
        "vqa_model_requests_total",
        "vqa_tokens_total",
        "vqa_cost_usd_total",
        "vqa_image_bytes_total",
        "vqa_concurrency_limit",
    )
    console.print("A few of the worker's metrics, as Prometheus would scrape them:")
    for family in text_string_to_metric_families(_get(port, "/metrics")):
        for sample in family.samples:
            if sample.name in wanted:
                labels = ",".join(f'{label}="{value}"' for label, value in sample.labels.items())
                text = f"   {sample.name}{{{labels}}} {sample.value:g}"
                console.print(text, highlight=False, markup=False)


def _show_next(took_s: float) -> None:
    console.print(
        f"\nDone in {took_s:.0f} s; everything that was started here is stopped. Next:\n"
        "   make stack         keep RabbitMQ, S3 and the stand-in running, and try things yourself\n"
        "   DEEPINFRA_TOKEN=… make demo    the same questions to a real model (OPENAI_API_KEY works too)\n"
        "   README.md          run the worker against your own RabbitMQ, S3 and API\n"
        "   docs/settings.md   every setting",
        highlight=False,
    )


def _port_in(log: Path) -> int:
    for line in log.read_text().splitlines():
        if line.startswith("{") and (entry := json.loads(line)).get("event") == "started":
            return int(entry["http_port"])
    return 0


def _is_ready(port: int) -> bool:
    try:
        return bool(_get(port, "/readyz"))
    except OSError:
        return False


def _get(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
        return str(response.read().decode())


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
