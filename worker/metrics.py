"""Every metric of the worker, declared once.

`model` is one of the allowed models or `unknown`: no label takes a value that a job can choose freely.
"""

import asyncio
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from worker import __version__
from worker.result import Usage

UNKNOWN_MODEL = "unknown"

Metric = TypeVar("Metric", Counter, Histogram)

# The `_created` series double the number of time series and nobody looks at them.
disable_created_metrics()  # type: ignore[no-untyped-call]
REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)
GCCollector(registry=REGISTRY)


class _TasksCollector(Collector):
    """How many tasks the event loop has, counted when it is asked: what is left behind shows there first."""

    def collect(self) -> Iterable[Family]:
        """The gauge, beside Python's own; nothing where no event loop runs."""
        try:
            count = len(asyncio.all_tasks())
        except RuntimeError:
            return
        yield GaugeMetricFamily("python_asyncio_tasks", "Tasks of the event loop, at the moment.", count)


REGISTRY.register(_TasksCollector())

# Seconds; they reach VQA_JOB_TIMEOUT's default and beyond.
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1200)
_QUEUE_SECONDS = (0.01, 0.05, 0.25, 1, 5, 15, 60, 300, 900, 3600, 14400, 86400)
# OpenTelemetry's semantic conventions for generative AI, metrics; the last two durations go beyond
# them, for slow models.
_GEN_AI_TOKENS = tuple(4**n for n in range(14))
_GEN_AI_SECONDS = tuple(0.01 * 2**n for n in range(16))

JOBS = Counter("vqa_jobs", "Jobs that came to an end.", ["status", "error", "model"], registry=REGISTRY)
RETRIES = Counter(
    "vqa_retries", "Attempts that failed and were put into a retry queue.", ["reason"], registry=REGISTRY
)
DEAD_LETTERS = Counter(
    "vqa_dead_letters",
    "Messages put into the dead-letter queue, by error code.",
    ["reason"],
    registry=REGISTRY,
)
JOB_DURATION = Histogram(
    "vqa_job_duration_seconds",
    "From a job's delivery to its ack.",
    ["status", "model"],
    buckets=_SECONDS,
    registry=REGISTRY,
)
JOB_QUEUE = Histogram(
    "vqa_job_queue_seconds",
    "From the message's timestamp to its delivery.",
    buckets=_QUEUE_SECONDS,
    registry=REGISTRY,
)
STAGE_DURATION = Histogram(
    "vqa_stage_duration_seconds",
    "A job's stages: wait (for a free slot), fetch (images), model (the API's answer), publish (the result).",
    ["stage", "model"],
    buckets=_SECONDS,
    registry=REGISTRY,
)
TOKENS = Counter("vqa_tokens", "Tokens as the API counted them.", ["model", "type"], registry=REGISTRY)
COST = Counter(
    "vqa_cost_usd",
    "US dollars spent: the provider's own figure, else from VQA_PRICES.",
    ["model"],
    registry=REGISTRY,
)
MODEL_REQUESTS = Counter(
    "vqa_model_requests",
    "Calls to the API by HTTP status, or timeout, connection, malformed.",
    ["model", "code"],
    registry=REGISTRY,
)
AMBIGUOUS_CALLS = Counter(
    "vqa_ambiguous_calls",
    "Calls that may have been paid for without an answer: timed out or cut off.",
    ["model"],
    registry=REGISTRY,
)
RESULT_STORE = Counter(
    "vqa_result_store",
    "What became of jobs at the result store: claimed, reused (answered from it), waited (for another's"
    " answer), taken_over (from a dead worker), kept, kept_by_another (paid twice), not_kept (S3 failed).",
    ["event"],
    registry=REGISTRY,
)
IMAGE_BYTES = Counter(
    "vqa_image_bytes", "Bytes of the images handed to the API.", ["delivery"], registry=REGISTRY
)
JOBS_IN_FLIGHT = Gauge("vqa_jobs_in_flight", "Jobs being worked on in this process.", registry=REGISTRY)
CONCURRENCY_LIMIT = Gauge(
    "vqa_concurrency_limit", "How many jobs may call the API at once, at the moment.", registry=REGISTRY
)
DEPENDENCY_UP = Gauge(
    "vqa_dependency_up",
    "0 while the worker is paused for it (model, s3) or not connected to it (rabbitmq).",
    ["dependency"],
    registry=REGISTRY,
)
BUILD_INFO = Info("vqa_build", "The worker's version and Python's.", registry=REGISTRY)
BUILD_INFO.info({"version": __version__, "python": platform.python_version()})
GEN_AI_TOKEN_USAGE = Histogram(
    "gen_ai_client_token_usage",
    "Tokens of one API call (OpenTelemetry: gen_ai.client.token.usage).",
    ["gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model", "gen_ai_token_type"],
    buckets=_GEN_AI_TOKENS,
    registry=REGISTRY,
)
GEN_AI_OPERATION_DURATION = Histogram(
    "gen_ai_client_operation_duration_seconds",
    "Seconds of one API call (OpenTelemetry: gen_ai.client.operation.duration).",
    ["gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model", "error_type"],
    buckets=_GEN_AI_SECONDS,
    registry=REGISTRY,
)


@lru_cache(maxsize=4096)
def series(metric: Metric, *labels: str) -> Metric:
    """One of the metric's time series; the library's own look-up is dear, and a job needs a dozen of them."""
    return metric.labels(*labels)


class ModelCall:
    """The figures of one API call; one of `answered` and `failed` is called, once.

    Neither is, if an image broke off while it was sent: the API never had the request.
    """

    def __init__(self, model: str, provider: str) -> None:
        self._model = model
        self._provider = provider
        self._started = time.monotonic()

    def answered(self, usage: Usage | None) -> None:
        """The API answered with a chat completion, whatever it says."""
        self._ended("200", error_type="")
        if usage is None:
            return
        for ours, theirs, count in (
            ("prompt", "input", usage.prompt_tokens),
            ("completion", "output", usage.completion_tokens),
        ):
            series(TOKENS, self._model, ours).inc(count)
            series(GEN_AI_TOKEN_USAGE, "chat", self._provider, self._model, theirs).observe(count)
        series(COST, self._model).inc(usage.cost_usd or 0.0)

    def failed(self, code: str, *, ambiguous: bool = False) -> None:
        """The call ended with an HTTP status, or as `timeout`, `connection` or `malformed`."""
        self._ended(code, error_type=code)
        if ambiguous:
            AMBIGUOUS_CALLS.labels(self._model).inc()

    def _ended(self, code: str, error_type: str) -> None:
        series(MODEL_REQUESTS, self._model, code).inc()
        series(GEN_AI_OPERATION_DURATION, "chat", self._provider, self._model, error_type).observe(
            time.monotonic() - self._started
        )


@contextmanager
def model_call(model: str, provider: str, is_sent: Callable[[], bool]) -> Iterator[ModelCall]:
    """Measure one API call; one that is cancelled after it was sent is ambiguous: it may be paid for."""
    call = ModelCall(model, provider)
    try:
        yield call
    except BaseException as error:
        if not isinstance(error, Exception):
            call.failed("connection", ambiguous=is_sent())
        raise


@contextmanager
def stage(name: str, model: str) -> Iterator[None]:
    """Measure one stage of a job."""
    started = time.monotonic()
    try:
        yield
    finally:
        series(STAGE_DURATION, name, model).observe(time.monotonic() - started)


def exposition() -> tuple[bytes, str]:
    """What `/metrics` answers with: the body and its content type."""
    return generate_latest(REGISTRY), CONTENT_TYPE_PLAIN_0_0_4
