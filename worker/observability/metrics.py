"""Every metric of the worker, declared once; the source of `docs/metrics.md`.

No label has a value that a job can choose freely: each label lists its values.
"""

import asyncio
import platform
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Final, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from vqa_worker.messages.error_codes import ErrorCode
from vqa_worker.messages.result import Usage
from worker import __version__
from worker.observability.instruments import Instruments, Label

UNKNOWN_MODEL: Final = "unknown"
# Window of `vqa_job_queue_wait_max_seconds`.
LATELY_S: Final = 60.0

Metric = TypeVar("Metric", Counter, Histogram)

# The `_created` series double the number of time series and are of no use here.
disable_created_metrics()  # type: ignore[no-untyped-call]
REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)
GCCollector(registry=REGISTRY)


class _TasksCollector(Collector):
    """The number of asyncio tasks, counted at each scrape; a steady increase indicates a leak."""

    def collect(self) -> Iterable[Family]:
        """Yield the gauge; nothing if no event loop is running."""
        try:
            count = len(asyncio.all_tasks())
        except RuntimeError:
            return
        yield GaugeMetricFamily("python_asyncio_tasks", "Number of asyncio tasks.", count)


REGISTRY.register(_TasksCollector())

# Up to the maximum of VQA_JOB_TIMEOUT (1740 s).
_SECONDS: Final = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
    *(20, 30, 60, 120, 300, 600, 1200, 1800),
)
_QUEUE_SECONDS: Final = (
    *(0.01, 0.05, 0.25, 1, 2.5, 5, 10, 15, 30, 60),
    *(120, 300, 600, 900, 1800, 3600, 14400, 86400),
)
_LAG_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
# Buckets of OpenTelemetry's GenAI conventions; the last five durations extend them for slow models.
_GEN_AI_TOKENS: Final = tuple(4**n for n in range(14))
_GEN_AI_SECONDS: Final = tuple(0.01 * 2**n for n in range(19))

# Reasons of failed attempts: see `TransientError.reason`.
RETRY_REASONS: Final = (
    *("timeout", "connection_error", "malformed_response", "http_500", "http_5xx"),
    *("http_408", "http_409", "http_403", "http_4xx"),
    *("model_unavailable", "model_paused", "s3_unavailable", "s3_refused", "result_store_unavailable"),
    "internal_error",
)
DEAD_LETTER_REASONS: Final = (ErrorCode.ATTEMPTS_EXHAUSTED, ErrorCode.INVALID_JOB)

_MODEL = Label("model", f"one of `VQA_ALLOWED_MODELS`, or `{UNKNOWN_MODEL}`")
_ASKED = Label("model", "one of `VQA_ALLOWED_MODELS`")
_STATUS = Label("status", "`succeeded` or `failed`")
_TENANT = Label("tenant", "one of `VQA_TENANTS`, or `other`")
_TOKENS = Label("type", "`prompt` or `completion`")
_GEN_AI = (
    Label("gen_ai_operation_name", "`chat`"),
    Label("gen_ai_provider_name", "`openai`, `deepinfra`, or the host of `VQA_MODEL_BASE_URL`"),
    Label("gen_ai_request_model", "one of `VQA_ALLOWED_MODELS`"),
)

_made = Instruments(REGISTRY)
DECLARED: Final = _made.declared

JOBS = _made.counter(
    "vqa_jobs_total",
    "jobs",
    "Completed jobs, by status and error code.",
    _STATUS,
    Label("error", "an [error code](messages.md), empty for success"),
    _MODEL,
)
RETRIES = _made.counter(
    "vqa_retries_total",
    "attempts",
    "Failed attempts whose jobs were moved to a retry queue, by reason.",
    Label("reason", ", ".join(f"`{reason}`" for reason in RETRY_REASONS)),
)
DEAD_LETTERS = _made.counter(
    "vqa_dead_letters_total",
    "messages",
    "Messages moved to the dead-letter queue, by reason.",
    Label("reason", " or ".join(f"`{reason}`" for reason in DEAD_LETTER_REASONS)),
)
JOBS_REQUEUED = _made.counter(
    "vqa_jobs_requeued_total",
    "jobs",
    "Jobs requeued without counting an attempt: no free concurrency slot, a pause, or a shutdown.",
)
REDELIVERED_JOBS = _made.counter(
    "vqa_redelivered_jobs_total",
    "jobs",
    "Redelivered jobs that other workers were asked about; without a result store only.",
    Label("result", "`processed` or `published_elsewhere`"),
)
JOB_DURATION = _made.histogram(
    "vqa_job_duration_seconds",
    "seconds",
    "Time from a job's delivery to its ack.",
    _STATUS,
    _MODEL,
    buckets=_SECONDS,
)
JOB_QUEUE = _made.histogram(
    "vqa_job_queue_seconds",
    "seconds",
    "Time from the message's timestamp to its delivery; only messages with a timestamp.",
    buckets=_QUEUE_SECONDS,
)
JOB_QUEUE_LONGEST = _made.gauge(
    "vqa_job_queue_wait_max_seconds",
    "seconds",
    "Longest queue wait of the jobs delivered in the last one to two minutes. 0 if none was delivered, or"
    " none with a timestamp.",
)
STAGE_DURATION = _made.histogram(
    "vqa_stage_duration_seconds",
    "seconds",
    "Duration of a job's stages: wait (for a concurrency slot), fetch (images), convert (images), model"
    " (request), publish.",
    Label("stage", "`wait`, `fetch`, `convert`, `model`, `publish`"),
    _MODEL,
    buckets=_SECONDS,
)
TOKENS = _made.counter("vqa_tokens_total", "tokens", "Tokens reported by the model API.", _ASKED, _TOKENS)
COST = _made.counter(
    "vqa_cost_usd_total",
    "US dollars",
    "Cost in USD as reported by the provider, else computed from `VQA_PRICES`.",
    _ASKED,
)
TENANT_JOBS = _made.counter(
    "vqa_tenant_jobs_total",
    "jobs",
    "Completed jobs by tenant; only with `VQA_TENANT_FROM`.",
    _TENANT,
    _STATUS,
)
TENANT_TOKENS = _made.counter(
    "vqa_tenant_tokens_total",
    "tokens",
    "Tokens reported by the model API, by tenant; only with `VQA_TENANT_FROM`.",
    _TENANT,
    _ASKED,
    _TOKENS,
)
TENANT_COST = _made.counter(
    "vqa_tenant_cost_usd_total",
    "US dollars",
    "Cost in USD by tenant; only with `VQA_TENANT_FROM`.",
    _TENANT,
    _ASKED,
)
MODEL_REQUESTS = _made.counter(
    "vqa_model_requests_total",
    "requests",
    "Model requests, by HTTP status code or kind of failure.",
    _ASKED,
    Label("code", "the HTTP status, or `timeout`, `connection`, `malformed`"),
)
AMBIGUOUS_CALLS = _made.counter(
    "vqa_ambiguous_calls_total",
    "requests",
    "Model requests with unknown outcome (timeout, connection loss, cancellation); may have been billed.",
    _ASKED,
)
RESULT_STORE = _made.counter(
    "vqa_result_store_operations_total",
    "jobs",
    "Result store operations, by result.",
    Label(
        "result",
        "`claimed` (lease acquired), `reused` (stored answer published), `waited` (for another worker's"
        " answer), `taken_over` (expired lease), `stored`, `stored_by_another` (billed twice),"
        " `store_failed` (S3 error)",
    ),
)
SCHEMA_REPAIRS = _made.counter(
    "vqa_schema_repairs_total",
    "repairs",
    "Repairs of answers that did not satisfy the job's JSON schema, by result.",
    _ASKED,
    Label("result", "`repaired`, or `failed` (the next answer did not satisfy it either, or there was none)"),
)
IMAGE_BYTES = _made.counter(
    "vqa_image_bytes_total",
    "bytes",
    "Image bytes sent to the model API.",
    Label("delivery", "`inline`"),
)
_SOURCE_TYPE = Label("source_type", "media type of the content, such as `image/heic`")
_SENT_TYPE = Label("sent_type", "media type of what was sent: `image/jpeg`, `image/png`, …")
IMAGES_CONVERTED = _made.counter(
    "vqa_images_converted_total",
    "images",
    "Images and pages that were converted before they were sent.",
    _SOURCE_TYPE,
    _SENT_TYPE,
)
IMAGE_BYTES_SAVED = _made.counter(
    "vqa_image_bytes_saved_total",
    "bytes",
    "Bytes by which converted images are smaller than their content; 0 for those that became larger.",
    _SOURCE_TYPE,
    _SENT_TYPE,
)
JOBS_IN_FLIGHT = _made.gauge(
    "vqa_jobs_in_flight", "jobs", "Jobs in flight in this process, including those that wait for a slot."
)
CONCURRENCY_LIMIT = _made.gauge(
    "vqa_concurrency_limit", "jobs", "Current adaptive concurrency limit, in slots."
)
CONCURRENCY_IN_USE = _made.gauge(
    "vqa_concurrency_in_use",
    "jobs",
    "Concurrency slots in use: jobs that fetch images or wait for the model.",
)
DEPENDENCY_UP = _made.gauge(
    "vqa_dependency_up",
    "1 or 0",
    "1 if the dependency is available; 0 if consumption is paused for it, or RabbitMQ is not connected.",
    Label("dependency", "`model`, `s3`, `rabbitmq`"),
)
LOOP_LAG = _made.histogram(
    "vqa_event_loop_lag_seconds",
    "seconds",
    "Event loop lag: delay of a timer that fires every second.",
    buckets=_LAG_SECONDS,
)
BUILD_INFO = _made.info(
    "vqa_build_info",
    "Version of the worker and of Python; always 1.",
    {"version": __version__, "python": platform.python_version()},
    Label("version", "of the worker"),
    Label("python", "of Python"),
)
GEN_AI_TOKEN_USAGE = _made.histogram(
    "gen_ai_client_token_usage",
    "tokens",
    "Tokens per model request (OpenTelemetry: gen_ai.client.token.usage).",
    *_GEN_AI,
    Label("gen_ai_token_type", "`input` or `output`"),
    buckets=_GEN_AI_TOKENS,
)
GEN_AI_OPERATION_DURATION = _made.histogram(
    "gen_ai_client_operation_duration_seconds",
    "seconds",
    "Duration of a model request (OpenTelemetry: gen_ai.client.operation.duration).",
    *_GEN_AI,
    Label("error_type", "empty, the HTTP status, `timeout`, `connection`, or `malformed`"),
    buckets=_GEN_AI_SECONDS,
)


class Longest:
    """The maximum of the durations observed in this window and the previous one.

    `now` is the time of one monotonic clock, in seconds.
    """

    def __init__(self, window_s: float, now: float) -> None:
        self._window_s = window_s
        self._began = now
        self._before = self._current = 0.0

    def observe(self, seconds: float, now: float) -> None:
        """Record a duration."""
        self._turn(now)
        self._current = max(self._current, seconds)

    def value(self, now: float) -> float:
        """Return the maximum in seconds; 0.0 if nothing was observed."""
        self._turn(now)
        return max(self._before, self._current)

    def _turn(self, now: float) -> None:
        passed = (now - self._began) // self._window_s
        if passed >= 1:
            self._before, self._current = (self._current if passed == 1 else 0.0), 0.0
            self._began += passed * self._window_s


_longest_wait = Longest(LATELY_S, time.monotonic())
JOB_QUEUE_LONGEST.set_function(lambda: _longest_wait.value(time.monotonic()))


def waited_in_queue(seconds: float) -> None:
    """Record the queue wait of a delivered job, in seconds."""
    JOB_QUEUE.observe(seconds)
    _longest_wait.observe(seconds, time.monotonic())


def initialize_series(models: Collection[str]) -> None:
    """Create the counters that queries and alerts use, with value 0.

    `increase()` ignores the first sample of a new series, and a short-lived pod may have no second one.
    """
    for model in models:
        series(JOBS, "succeeded", "", model)
        for code in ErrorCode:
            series(JOBS, "failed", code, model)
        for kind in ("prompt", "completion"):
            series(TOKENS, model, kind)
        series(COST, model)
        for result in ("repaired", "failed"):
            series(SCHEMA_REPAIRS, model, result)
        series(AMBIGUOUS_CALLS, model)
        for answer in ("200", "429"):
            series(MODEL_REQUESTS, model, answer)
    for code in DEAD_LETTER_REASONS:
        series(JOBS, "failed", code, UNKNOWN_MODEL)
        series(DEAD_LETTERS, code)
    for reason in RETRY_REASONS:
        series(RETRIES, reason)


@lru_cache(maxsize=4096)
def series(metric: Metric, *labels: str) -> Metric:
    """Return one time series of a metric; cached, because the library's lookup is slow."""
    return metric.labels(*labels)


class ModelCall:
    """The metrics of one model request; exactly one of `answered` and `failed` is called, once.

    Neither is called if reading an image failed while it was sent: the API never received the request.
    """

    def __init__(self, model: str, provider: str) -> None:
        self._model = model
        self._provider = provider
        self._started = time.monotonic()

    def answered(self, usage: Usage | None) -> None:
        """Record a response with a chat completion."""
        self._ended("200", error_type="")
        self._billed(usage)

    def failed(self, code: str, *, ambiguous: bool = False, usage: Usage | None = None) -> None:
        """Record a failure: an HTTP status, `timeout`, `connection` or `malformed`."""
        self._ended(code, error_type=code)
        self._billed(usage)
        if ambiguous:
            series(AMBIGUOUS_CALLS, self._model).inc()

    def _billed(self, usage: Usage | None) -> None:
        """Count the tokens and the cost that are known."""
        if usage is None:
            return
        for ours, theirs, count in (
            ("prompt", "input", usage.prompt_tokens),
            ("completion", "output", usage.completion_tokens),
        ):
            if count is not None:
                series(TOKENS, self._model, ours).inc(count)
                series(GEN_AI_TOKEN_USAGE, "chat", self._provider, self._model, theirs).observe(count)
        series(COST, self._model).inc(usage.cost_usd or 0.0)

    def _ended(self, code: str, error_type: str) -> None:
        series(MODEL_REQUESTS, self._model, code).inc()
        series(GEN_AI_OPERATION_DURATION, "chat", self._provider, self._model, error_type).observe(
            time.monotonic() - self._started
        )


@contextmanager
def model_call(model: str, provider: str, is_sent: Callable[[], bool]) -> Iterator[ModelCall]:
    """Measure one model request; cancelled after it was sent, its outcome is unknown and it may be billed."""
    call = ModelCall(model, provider)
    try:
        yield call
    except BaseException as error:
        if not isinstance(error, Exception):
            call.failed("connection", ambiguous=is_sent())
        raise


@contextmanager
def stage(name: str, model: str) -> Iterator[None]:
    """Measure the duration of one stage of a job."""
    started = time.monotonic()
    try:
        yield
    finally:
        series(STAGE_DURATION, name, model).observe(time.monotonic() - started)


def exposition() -> tuple[bytes, str]:
    """Return the body of `/metrics` and its content type."""
    return generate_latest(REGISTRY), CONTENT_TYPE_PLAIN_0_0_4
