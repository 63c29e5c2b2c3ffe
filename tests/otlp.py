"""A receiver of spans over OTLP/HTTP, like an OpenTelemetry Collector."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1 import trace_pb2

KINDS = {number: name.removeprefix("SPAN_KIND_") for name, number in trace_pb2.Span.SpanKind.items()}


@dataclass(frozen=True)
class Seen:
    """A received span."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    tracestate: str
    attributes: Mapping[str, Any]
    is_error: bool
    resource: Mapping[str, Any]
    began: int
    ended: int


@dataclass
class Receiver:
    """Record requests to `/v1/traces`; respond with `status` once `answering` is set."""

    url: str = ""
    status: int = 200
    answering: asyncio.Event = field(default_factory=asyncio.Event)
    spans: list[Seen] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)

    @classmethod
    @contextlib.asynccontextmanager
    async def serving(cls, tls: ssl.SSLContext | None = None) -> AsyncIterator[Self]:
        receiver = cls()
        receiver.answering.set()
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/v1/traces", receiver._take)
        runner = web.AppRunner(app, shutdown_timeout=1, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
        receiver.url = f"{'https' if tls else 'http'}://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield receiver
        finally:
            await runner.cleanup()

    def environment(self) -> dict[str, str]:
        """Return variables for a worker that exports its spans to this receiver, with a short delay."""
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": self.url, "OTEL_BSP_SCHEDULE_DELAY": "50"}

    def of(self, trace_id: str) -> list[Seen]:
        """Return the spans of a trace, in order of their start."""
        return sorted((span for span in self.spans if span.trace_id == trace_id), key=lambda span: span.began)

    async def _take(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.bodies.append(body)
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        await self.answering.wait()
        if self.status == web.HTTPOk.status_code:
            self.spans.extend(_spans(ExportTraceServiceRequest.FromString(body)))
        return web.Response(status=self.status)


def _spans(request: ExportTraceServiceRequest) -> list[Seen]:
    return [
        Seen(
            name=span.name,
            kind=KINDS[span.kind],
            trace_id=span.trace_id.hex(),
            span_id=span.span_id.hex(),
            parent_id=span.parent_span_id.hex(),
            tracestate=span.trace_state,
            attributes={item.key: _value(item.value) for item in span.attributes},
            is_error=span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
            resource={item.key: _value(item.value) for item in group.resource.attributes},
            began=span.start_time_unix_nano,
            ended=span.end_time_unix_nano,
        )
        for group in request.resource_spans
        for scope in group.scope_spans
        for span in scope.spans
    ]


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return getattr(value, kind) if kind else None
