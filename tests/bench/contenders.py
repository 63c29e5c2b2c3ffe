"""Who takes part, and how each is run."""

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
class Run:
    """What a contender is given for one run."""

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
    """One way to do the same work."""

    name: str
    command: tuple[str, ...]
    environment: Callable[[Run], Environment]
    message: Callable[[str, bytes], Message]
    """Makes the message of a job out of its id and its JSON."""
    jobs_queue_arguments: Mapping[str, FieldValue]
    takes_links: bool = False
    most_in_flight: int = 1_000_000
    """By its nature, regardless of its arguments."""
    only_by_name: bool = False
    """Whether it takes part only where it is asked for."""


def worker(command: str | None = None) -> Contender:
    """This project's worker: that of this checkout, or the one that `command` starts."""
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
    """The worker sending traces, all of them and one in a hundred; the simulator takes them, too."""
    return [
        replace(
            worker(command),
            name=name,
            environment=partial(_traced_environment, ratio),
            only_by_name=True,
        )
        for name, ratio in ((TRACED, "1"), (TRACED_SELDOM, "0.01"))
    ]


def peers() -> list[Contender]:
    """What a user would write instead, each with the means of one library."""
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
    """How the contender declares its jobs queue: declared before it starts, it has to be the same."""
    if contender.name not in (WORKER, TRACED, TRACED_SELDOM):
        return dict(contender.jobs_queue_arguments)
    # As docs/messages.md says for those who declare the queues themselves.
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
TRACED_SELDOM: Final = "vqa-worker, 1 % traced"
_QUORUM: Final = {"x-queue-type": "quorum"}
_MODEL: Final = "bench"
# A word that occurs nowhere else: the worker takes secrets out of whatever it writes.
_KEY: Final = "no-key-is-needed-here"


def _celery(name: str, pool: str, concurrency: int) -> Contender:
    # Gossip, mingling and heartbeats are for several workers that want to know of each other.
    quiet = ("--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "WARNING")
    arguments = ("-A", "celery_worker", "worker", "--pool", pool, "-c", str(concurrency), *quiet)
    return Contender(
        name=name,
        command=(sys.executable, "-m", "celery", *arguments),
        environment=_peer_environment,
        message=_celery_message,
        jobs_queue_arguments=_QUORUM,
        most_in_flight=concurrency,
    )


def _worker_environment(run: Run) -> Environment:
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


def _traced_environment(ratio: str, run: Run) -> Environment:
    return {
        **_worker_environment(run),
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{run.model_base_url}/traces",
        "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
        "OTEL_TRACES_SAMPLER_ARG": ratio,
        # None is dropped: what is measured is what sending all of them takes.
        "OTEL_BSP_MAX_QUEUE_SIZE": "50000",
    }


def _peer_environment(run: Run) -> Environment:
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
        # Where `celery -A celery_worker` finds its module.
        "PYTHONPATH": str(PEERS),
    }


def _common(run: Run) -> Environment:
    tls = {"SSL_CERT_FILE": str(run.ca_file), "AWS_CA_BUNDLE": str(run.ca_file)} if run.ca_file else {}
    return {**run.s3_credentials, **tls}


def _plain_message(_job_id: str, body: bytes) -> Message:
    return Message(body, delivery_mode=DeliveryMode.PERSISTENT, content_type="application/json")


def _celery_message(job_id: str, body: bytes) -> Message:
    """What `answer.delay(job)` sends: Celery's message protocol, version 2."""
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
