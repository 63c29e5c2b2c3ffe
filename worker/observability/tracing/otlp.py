"""Spans with OpenTelemetry's SDK, sent over OTLP: the only module that uses the library.

Names follow the semantic conventions 1.41 for messaging, RabbitMQ and generative AI. Spans contain no
questions, answers or image locations: only the ids of the job and its message, the (allowed) model and the
worker's own queues.
"""

import asyncio
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import urlsplit

import structlog
from opentelemetry.context import Context, attach, detach
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span as LibrarySpan
from opentelemetry.trace import SpanKind, StatusCode, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue
from requests import Session

from vqa_worker.messages.result import Usage
from worker import __version__
from worker.errors import DependencyDownError, JobError, TransientError
from worker.jobs.delivery import Delivery
from worker.jobs.outcome import DeadLettered, Failed, Outcome, Requeued, Retried, Succeeded
from worker.settings.urls import split_broker_urls

log = structlog.get_logger(__name__)

# Limits how long an unreachable collector can delay a shutdown.
FLUSH_S: Final = 5.0
# Strings in the API's response are untrusted and may be long.
MAX_CHARS: Final = 200
# Placeholder for a queue that a job named.
REPLY_TO: Final = "{reply_to}"

_W3C: Final = TraceContextTextMapPropagator()


@dataclass(frozen=True)
class Scene:
    """Common attributes of spans: the worker's queues, and the addresses of the broker and the model API."""

    jobs_queue: str
    own_queues: frozenset[str]
    rabbitmq_address: str
    model_base_url: str


class Otlp:
    """A tracer that sends spans in batches, in a thread of the SDK; spans that cannot be sent are dropped."""

    def __init__(self, scene: Scene) -> None:
        self._own_queues = scene.own_queues
        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(session=_Session())))
        self._tracer = self._provider.get_tracer("vqa-worker", __version__)
        rabbitmq = {"messaging.system": "rabbitmq", **_broker(scene.rabbitmq_address)}
        self._process_name = f"process {scene.jobs_queue}"
        self._process = {
            **rabbitmq,
            "messaging.operation.name": "process",
            "messaging.operation.type": "process",
            "messaging.destination.name": scene.jobs_queue,
        }
        self._publish = {
            **rabbitmq,
            "messaging.operation.name": "publish",
            "messaging.operation.type": "send",
        }
        self._call = {"gen_ai.operation.name": "chat", **_server(scene.model_base_url)}

    def process(self, delivery: Delivery) -> "_Span":
        """Return the span of a delivery, in the trace of the message or in a new one."""
        attributes = _given(
            {
                "messaging.message.id": delivery.message_id,
                "messaging.message.body.size": len(delivery.body),
                "vqa.deliveries": delivery.deliveries,
                "vqa.queued_s": delivery.queued_s,
            }
        )
        parent = _W3C.extract(delivery.trace, Context())
        return self._begin(self._process_name, SpanKind.CONSUMER, {**self._process, **attributes}, parent)

    def fetch(self, image: str) -> "_Span":
        """Return the span of reading an image from S3."""
        return self._begin("fetch image", SpanKind.CLIENT, {"vqa.image": image})

    def call(self, model: str, provider: str) -> "_Span":
        """Return the span of a model request."""
        named = {"gen_ai.provider.name": provider, "gen_ai.request.model": model}
        return self._begin(f"chat {model}", SpanKind.CLIENT, {**self._call, **named})

    def publish(self, exchange: str, routing_key: str, message_id: str) -> "_Span":
        """Return the span of publishing a message."""
        is_own = routing_key in self._own_queues
        target = ":".join(filter(None, (exchange, routing_key if is_own else REPLY_TO)))
        kind = "messaging.destination.name" if is_own else "messaging.destination.template"
        attributes = {**self._publish, kind: target, "messaging.message.id": message_id}
        return self._begin(f"publish {target}", SpanKind.PRODUCER, attributes)

    async def close(self) -> None:
        """Send the remaining spans, for at most `FLUSH_S` seconds."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def shut_down() -> None:
            self._provider.shutdown()
            with suppress(RuntimeError):  # the loop was closed after the timeout
                loop.call_soon_threadsafe(done.set)

        # A daemon thread does not delay the exit of the process.
        threading.Thread(target=shut_down, name="spans-flush", daemon=True).start()
        try:
            async with asyncio.timeout(FLUSH_S):
                await done.wait()
        except TimeoutError:
            log.warning("trace_export_failed", after_s=FLUSH_S)

    def _begin(
        self,
        name: str,
        kind: SpanKind,
        attributes: Mapping[str, AttributeValue],
        parent: Context | None = None,
    ) -> "_Span":
        return _Span(self._tracer.start_span(name, parent, kind, attributes))


class _Session(Session):
    """An HTTP session whose `verify` is not overridden by REQUESTS_CA_BUNDLE and CURL_CA_BUNDLE.

    OpenTelemetry's exporter sets it to OTEL_EXPORTER_OTLP_CERTIFICATE.
    """

    def merge_environment_settings(self, url: Any, proxies: Any, stream: Any, verify: Any, cert: Any) -> Any:
        chosen = self.verify if verify is None else verify
        return super().merge_environment_settings(url, proxies, stream, chosen, cert)


class _Span:
    """A span that is the current span while its context is entered."""

    def __init__(self, span: LibrarySpan) -> None:
        self._span = span
        self._is_failed = False

    @property
    def headers(self) -> Mapping[str, str]:
        carrier: dict[str, str] = {}
        _W3C.inject(carrier, set_span_in_context(self._span))
        return carrier

    @property
    def trace_id(self) -> str | None:
        return format_trace_id(self._span.get_span_context().trace_id)

    def answered(self, usage: Usage | None, finish_reason: str | None, response: Mapping[str, Any]) -> None:
        said: dict[str, AttributeValue | None] = {
            "gen_ai.response.model": _text(response.get("model")),
            "gen_ai.response.id": _text(response.get("id")),
            "gen_ai.response.finish_reasons": [finish_reason[:MAX_CHARS]] if finish_reason else None,
        }
        if usage is not None:
            said["gen_ai.usage.input_tokens"] = usage.prompt_tokens
            said["gen_ai.usage.output_tokens"] = usage.completion_tokens
            said["vqa.cost_usd"] = usage.cost_usd
        self._span.set_attributes(_given(said))

    def set_outcome(self, outcome: Outcome | None) -> None:
        if outcome is None:
            return
        attempts, error = _end_of(outcome)
        said = {
            "vqa.job.id": outcome.job_id,
            "vqa.outcome": outcome.name,
            "vqa.attempts": attempts,
        }
        self._span.set_attributes(_given(said))
        if error is not None:
            self.failed(error)

    def failed(self, kind: str) -> None:
        if not self._is_failed:
            self._is_failed = True
            self._span.set_attribute("error.type", kind)
            self._span.set_status(StatusCode.ERROR)

    def __enter__(self) -> Self:
        self._token = attach(set_span_in_context(self._span))
        return self

    def __exit__(
        self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None
    ) -> None:
        detach(self._token)
        if error is not None:
            self.failed(_kind_of(error))
        self._span.end()


def _resource() -> Resource:
    """Return the resource; `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` override the defaults."""
    own = Resource.create({"service.name": "vqa-worker", "service.version": __version__})
    return own.merge(OTELResourceDetector().detect())


def _broker(address: str) -> dict[str, AttributeValue]:
    """Return the attributes of the broker's address; none if it has several."""
    return _server(address) if len(split_broker_urls(address)) == 1 else {}


def _server(url: str) -> dict[str, AttributeValue]:
    parts = urlsplit(url)
    default = 443 if parts.scheme == "https" else 80
    return {"server.address": parts.hostname or "", "server.port": parts.port or default}


def _given(attributes: Mapping[str, AttributeValue | None]) -> dict[str, AttributeValue]:
    return {name: value for name, value in attributes.items() if value is not None}


def _text(value: object) -> str | None:
    return value[:MAX_CHARS] if isinstance(value, str) else None


def _end_of(outcome: Outcome) -> tuple[int | None, str | None]:
    """Return the number of counted attempts and the error, if any."""
    match outcome:
        case Succeeded(result=result):
            return result.attempts, None
        case Failed(result=result, code=code) | DeadLettered(result=result, code=code):
            return result.attempts, code
        case Retried(attempts=attempts, reason=reason):
            return attempts, reason
        case Requeued():
            return None, None


def _kind_of(error: BaseException) -> str:
    match error:
        case JobError(code=code):
            return code
        case TransientError(reason=reason):
            return reason
        case DependencyDownError(dependency=dependency):
            return f"{dependency}_down"
        case asyncio.CancelledError():
            return "cancelled"
    return type(error).__name__
