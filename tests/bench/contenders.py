"""The compared workers and their commands, environments and messages."""

import json
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from aio_pika import DeliveryMode, Message
from pamqp.common import FieldValue

PEERS: Final = Path(__file__).with_name("peers")
ROOT: Final = Path(__file__).parents[2]

Environment = Mapping[str, str]


@dataclass(frozen=True)
class RunConfig:
    """The configuration of a contender for one run."""

    rabbitmq_url: str
    jobs_queue: str
    results_queue: str
    s3_endpoint_url: str
    s3_credentials: Mapping[str, str]
    model_base_url: str
    concurrency: int
    http_port: int
    as_link: bool = False
    ca_file: Path | None = None


@dataclass(frozen=True)
class Contender:
    """A worker to compare."""

    name: str
    command: tuple[str, ...]
    environment: Callable[[RunConfig], Environment]
    message: Callable[[str, bytes], Message]
    """Build the message of a job from its id and its JSON."""
    jobs_queue_arguments: Mapping[str, FieldValue]
    takes_links: bool = False
    max_in_flight: int = 1_000_000
    """The upper bound of its concurrency, independent of the configuration."""
    is_optional: bool = False
    """Run only if named by `--only`."""


def worker(command: str | None = None) -> Contender:
    """Return this project's worker, from this checkout or started by `command`."""
    default = [str(Path(sys.executable).with_name("vqa-worker"))]
    return Contender(
        name=WORKER,
        command=(*(shlex.split(command) if command else default), "run"),
        environment=_worker_environment,
        message=_plain_message,
        jobs_queue_arguments={},
        takes_links=True,
    )


def traced(command: str | None = None) -> list[Contender]:
    """Return the worker with tracing, for all jobs and for 1 %; the simulator accepts the spans."""
    return [
        replace(
            worker(command),
            name=name,
            environment=partial(_traced_environment, ratio),
            is_optional=True,
        )
        for name, ratio in ((TRACED, "1"), (TRACED_SAMPLED, "0.01"))
    ]


def peers() -> list[Contender]:
    """Return the equivalent workers, one for each library."""
    return [
        Contender(
            name="aio-pika",
            command=(sys.executable, str(PEERS / "aio_pika_worker.py")),
            environment=_peer_environment,
            message=_plain_message,
            jobs_queue_arguments=_QUORUM,
            takes_links=True,
        ),
        Contender(
            name="FastStream",
            command=(sys.executable, str(PEERS / "faststream_worker.py")),
            environment=_peer_environment,
            message=_plain_message,
            jobs_queue_arguments=_QUORUM,
        ),
        _celery("Celery prefork 2", "prefork", 2),
        _celery("Celery threads", "threads", 64),
    ]


def jobs_queue_arguments(contender: Contender, jobs_queue: str) -> dict[str, FieldValue]:
    """Return the arguments with which the contender itself declares its jobs queue."""
    if contender.name not in (WORKER, TRACED, TRACED_SAMPLED):
        return dict(contender.jobs_queue_arguments)
    # See docs/messages.md.
    return {
        **_QUORUM,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": f"{jobs_queue}.dead",
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
        "x-delivery-limit": 100,
    }


WORKER: Final = "vqa-worker"
TRACED: Final = "vqa-worker, traced"
TRACED_SAMPLED: Final = "vqa-worker, 1 % traced"
_QUORUM: Final = {"x-queue-type": "quorum"}
_MODEL: Final = "bench"
# Unique: the worker redacts this string in all its output.
_KEY: Final = "no-key-is-needed-here"


def _celery(name: str, pool: str, concurrency: int) -> Contender:
    # Gossip, mingle and heartbeats synchronise several workers.
    quiet = ("--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "WARNING")
    arguments = ("-A", "celery_worker", "worker", "--pool", pool, "-c", str(concurrency), *quiet)
    return Contender(
        name=name,
        command=(sys.executable, "-m", "celery", *arguments),
        environment=_peer_environment,
        message=_celery_message,
        jobs_queue_arguments=_QUORUM,
        max_in_flight=concurrency,
    )


def _worker_environment(run: RunConfig) -> Environment:
    return {
        **_common(run),
        "VQA_RABBITMQ_URL": run.rabbitmq_url,
        "VQA_JOBS_QUEUE": run.jobs_queue,
        "VQA_RESULTS_QUEUE": run.results_queue,
        "VQA_S3_ENDPOINT_URL": run.s3_endpoint_url,
        "VQA_ALLOWED_BUCKETS": "*",
        "VQA_MODEL_BASE_URL": run.model_base_url,
        "VQA_MODEL_API_KEY": _KEY,
        "VQA_MODEL": _MODEL,
        "VQA_MAX_CONCURRENCY": str(run.concurrency),
        "VQA_HTTP_HOST": "127.0.0.1",
        "VQA_HTTP_PORT": str(run.http_port),
        "VQA_IMAGE_DELIVERY": "link" if run.as_link else "inline",
    }


def _traced_environment(ratio: str, run: RunConfig) -> Environment:
    return {
        **_worker_environment(run),
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{run.model_base_url}/traces",
        "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
        "OTEL_TRACES_SAMPLER_ARG": ratio,
        # Large enough that no span is dropped.
        "OTEL_BSP_MAX_QUEUE_SIZE": "50000",
    }


def _peer_environment(run: RunConfig) -> Environment:
    return {
        **_common(run),
        "RABBITMQ_URL": run.rabbitmq_url,
        "JOBS_QUEUE": run.jobs_queue,
        "RESULTS_QUEUE": run.results_queue,
        "S3_ENDPOINT_URL": run.s3_endpoint_url,
        "MODEL_BASE_URL": run.model_base_url,
        "MODEL_API_KEY": _KEY,
        "MODEL": _MODEL,
        "CONCURRENCY": str(run.concurrency),
        "IMAGE_DELIVERY": "link" if run.as_link else "inline",
        # For `celery -A celery_worker`.
        "PYTHONPATH": str(PEERS),
    }


def _common(run: RunConfig) -> Environment:
    tls = {"SSL_CERT_FILE": str(run.ca_file), "AWS_CA_BUNDLE": str(run.ca_file)} if run.ca_file else {}
    return {**run.s3_credentials, **tls}


def _plain_message(_job_id: str, body: bytes) -> Message:
    return Message(body, delivery_mode=DeliveryMode.PERSISTENT, content_type="application/json")


def _celery_message(job_id: str, body: bytes) -> Message:
    """Return the message of `answer.delay(job)`: Celery's message protocol, version 2."""
    job: dict[str, Any] = json.loads(body)
    embedded = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    return Message(
        json.dumps([[job], {}, embedded]).encode(),
        delivery_mode=DeliveryMode.PERSISTENT,
        content_type="application/json",
        content_encoding="utf-8",
        correlation_id=job_id,
        headers={
            "lang": "py",
            "task": "answer",
            "id": job_id,
            "root_id": job_id,
            "parent_id": None,
            "group": None,
            "retries": 0,
            "eta": None,
            "expires": None,
            "timelimit": [None, None],
            "argsrepr": "…",
            "kwargsrepr": "{}",
            "ignore_result": True,
        },
    )
