"""Every metric of the worker, declared once; `docs/metrics.md` is made of these.

No label takes a value that a job can choose freely: each says which values it has.
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

from worker import __version__
from worker.errors import ErrorCode
from worker.messages.result import Usage
from worker.observability.instruments import Instruments, Label

UNKNOWN_MODEL: Final = "unknown"
# How long a wait counts for `vqa_job_queue_wait_max_seconds`.
LATELY_S: Final = 60.0

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

# Seconds; they reach the longest VQA_JOB_TIMEOUT there can be (1740).
_SECONDS: Final = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
    *(20, 30, 60, 120, 300, 600, 1200, 1800),
)
_QUEUE_SECONDS: Final = (
    *(0.01, 0.05, 0.25, 1, 2.5, 5, 10, 15, 30, 60),
    *(120, 300, 600, 900, 1800, 3600, 14400, 86400),
)
_LAG_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
# OpenTelemetry's semantic conventions for generative AI, metrics; the last five durations go beyond them, for
# slow models, as far as a job may take.
_GEN_AI_TOKENS: Final = tuple(4**n for n in range(14))
_GEN_AI_SECONDS: Final = tuple(0.01 * 2**n for n in range(19))

# What the worker itself calls a failed attempt: see `TransientError.reason` and `Failures`.
RETRY_REASONS: Final = (
    *("timeout", "connection_error", "malformed_response", "http_5xx", "http_408", "http_409", "http_403"),
    *("model_unavailable", "s3_unavailable", "result_store_unavailable", "internal_error"),
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
    "Jobs that came to an end.",
    _STATUS,
    Label("error", "an [error code](messages.md), empty for success"),
    _MODEL,
)
RETRIES = _made.counter(
    "vqa_retries_total",
    "attempts",
    "Attempts that failed and were put into a retry queue.",
    Label("reason", ", ".join(f"`{reason}`" for reason in RETRY_REASONS)),
)
DEAD_LETTERS = _made.counter(
    "vqa_dead_letters_total",
    "messages",
    "Messages put into the dead-letter queue.",
    Label("reason", " or ".join(f"`{reason}`" for reason in DEAD_LETTER_REASONS)),
)
JOBS_REQUEUED = _made.counter(
    "vqa_jobs_requeued_total",
    "jobs",
    "Jobs put back into the queue as they were: there was no slot, or the worker paused or stopped.",
)
JOB_DURATION = _made.histogram(
    "vqa_job_duration_seconds",
    "seconds",
    "From a job's delivery to its ack.",
    _STATUS,
    _MODEL,
    buckets=_SECONDS,
)
JOB_QUEUE = _made.histogram(
    "vqa_job_queue_seconds",
    "seconds",
    "From the message's timestamp to its delivery; only jobs whose message has one.",
    buckets=_QUEUE_SECONDS,
)
JOB_QUEUE_LONGEST = _made.gauge(
    "vqa_job_queue_wait_max_seconds",
    "seconds",
    "The longest wait in the queue among the jobs delivered in the last one to two minutes: about as long as"
    " the oldest one still waits. 0 if none came, or none with a timestamp.",
)
STAGE_DURATION = _made.histogram(
    "vqa_stage_duration_seconds",
    "seconds",
    "A job's stages: wait (for a free slot), fetch (images), model (the API's answer), publish (the result).",
    Label("stage", "`wait`, `fetch`, `model`, `publish`"),
    _MODEL,
    buckets=_SECONDS,
)
TOKENS = _made.counter("vqa_tokens_total", "tokens", "Tokens as the API counted them.", _ASKED, _TOKENS)
COST = _made.counter(
    "vqa_cost_usd_total",
    "US dollars",
    "US dollars spent: the provider's own figure, else from `VQA_PRICES`; nothing where there is neither.",
    _ASKED,
)
TENANT_JOBS = _made.counter(
    "vqa_tenant_jobs_total",
    "jobs",
    "Jobs that came to an end, by tenant; only with `VQA_TENANT_FROM`.",
    _TENANT,
    _STATUS,
)
TENANT_TOKENS = _made.counter(
    "vqa_tenant_tokens_total",
    "tokens",
    "Tokens as the API counted them, by tenant; only with `VQA_TENANT_FROM`.",
    _TENANT,
    _ASKED,
    _TOKENS,
)
TENANT_COST = _made.counter(
    "vqa_tenant_cost_usd_total",
    "US dollars",
    "US dollars spent, by tenant; only with `VQA_TENANT_FROM`.",
    _TENANT,
    _ASKED,
)
MODEL_REQUESTS = _made.counter(
    "vqa_model_requests_total",
    "calls",
    "Calls to the API.",
    _ASKED,
    Label("code", "the HTTP status, or `timeout`, `connection`, `malformed`"),
)
AMBIGUOUS_CALLS = _made.counter(
    "vqa_ambiguous_calls_total",
    "calls",
    "Calls that may have been paid for without an answer: timed out or cut off.",
    _ASKED,
)
RESULT_STORE = _made.counter(
    "vqa_result_store_operations_total",
    "jobs",
    "Operations on the result store.",
    Label(
        "result",
        "`claimed`, `reused` (the stored answer was published), `waited` (for another worker's answer),"
        " `taken_over` (from a dead worker), `stored`, `stored_by_another` (paid twice),"
        " `store_failed` (S3 failed)",
    ),
)
IMAGE_BYTES = _made.counter(
    "vqa_image_bytes_total",
    "bytes",
    "Bytes of the images handed to the API.",
    Label("delivery", "`inline`"),
)
JOBS_IN_FLIGHT = _made.gauge(
    "vqa_jobs_in_flight", "jobs", "Jobs being worked on in this process, those that wait for a slot included."
)
CONCURRENCY_LIMIT = _made.gauge(
    "vqa_concurrency_limit", "jobs", "How many jobs may call the API at once, at the moment."
)
CONCURRENCY_IN_USE = _made.gauge(
    "vqa_concurrency_in_use", "jobs", "How many jobs hold one of those places: they fetch images or call."
)
DEPENDENCY_UP = _made.gauge(
    "vqa_dependency_up",
    "1 or 0",
    "0 while the worker is paused for it (model, s3) or not connected to it (rabbitmq).",
    Label("dependency", "`model`, `s3`, `rabbitmq`"),
)
LOOP_LAG = _made.histogram(
    "vqa_event_loop_lag_seconds",
    "seconds",
    "How much later than it was due the event loop turned to its heartbeat, every second.",
    buckets=_LAG_SECONDS,
)
BUILD_INFO = _made.info(
    "vqa_build_info",
    "The worker's version and Python's; always 1.",
    {"version": __version__, "python": platform.python_version()},
    Label("version", "the worker's"),
    Label("python", "Python's"),
)
GEN_AI_TOKEN_USAGE = _made.histogram(
    "gen_ai_client_token_usage",
    "tokens",
    "Tokens of one API call (OpenTelemetry: gen_ai.client.token.usage).",
    *_GEN_AI,
    Label("gen_ai_token_type", "`input` or `output`"),
    buckets=_GEN_AI_TOKENS,
)
GEN_AI_OPERATION_DURATION = _made.histogram(
    "gen_ai_client_operation_duration_seconds",
    "seconds",
    "Seconds of one API call (OpenTelemetry: gen_ai.client.operation.duration).",
    *_GEN_AI,
    Label("error_type", "empty, the HTTP status, `timeout`, `connection`, or `malformed`"),
    buckets=_GEN_AI_SECONDS,
)


class Longest:
    """The longest of the times seen in this window and the one before it, without keeping them all.

    `now` is always the seconds of one clock.
    """

    def __init__(self, window_s: float, now: float) -> None:
        self._window_s = window_s
        self._began = now
        self._before = self._current = 0.0

    def saw(self, seconds: float, now: float) -> None:
        """One more of them."""
        self._turn(now)
        self._current = max(self._current, seconds)

    def value(self, now: float) -> float:
        """The longest; 0.0 if none was seen."""
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
    """A job was delivered that had waited so long."""
    JOB_QUEUE.observe(seconds)
    _longest_wait.saw(seconds, time.monotonic())


def initialize_series(models: Collection[str]) -> None:
    """Show the counters that queries and alerts add up as 0 before anything happens.

    `increase` sees no growth in a series that begins with its first count, and a pod that was started for a
    few jobs may end before the second.
    """
    for model in models:
        series(JOBS, "succeeded", "", model)
        for code in ErrorCode:
            series(JOBS, "failed", code, model)
        for kind in ("prompt", "completion"):
            series(TOKENS, model, kind)
        series(COST, model)
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
            series(AMBIGUOUS_CALLS, self._model).inc()

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
