"""Spans for traces. While disabled (the default), OpenTelemetry is not loaded and spans do nothing.

`otlp` is the only module that uses OpenTelemetry; see docs/tracing.md.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    from vqa_worker.messages.result import Usage
    from worker.jobs.delivery import Delivery
    from worker.jobs.outcome import Outcome

_NO_HEADERS: Mapping[str, str] = {}


class Span(Protocol):
    """One step of a job, entered as a context; steps inside are its children."""

    @property
    def headers(self) -> Mapping[str, str]:
        """Return the W3C trace headers for a message; empty while disabled."""

    @property
    def trace_id(self) -> str | None:
        """Return the trace id in hexadecimal, or None while disabled."""

    def answered(self, usage: "Usage | None", finish_reason: str | None, response: Mapping[str, Any]) -> None:
        """Record the response of a model request."""

    def set_outcome(self, outcome: "Outcome | None") -> None:
        """Record the outcome of a delivery; None if there was none to publish."""

    def failed(self, kind: str) -> None:
        """Record a failure of a kind out of a closed set; exceptions are recorded automatically."""


class Tracer(Protocol):
    """Creates spans."""

    def process(self, delivery: "Delivery") -> AbstractContextManager[Span]:
        """Return the span of a delivery, until it is settled."""

    def fetch(self, image: str) -> AbstractContextManager[Span]:
        """Return the span of reading an image, until it can be sent; `image` is its position in the job."""

    def call(self, model: str, provider: str) -> AbstractContextManager[Span]:
        """Return the span of a model request."""

    def publish(self, exchange: str, routing_key: str, message_id: str) -> AbstractContextManager[Span]:
        """Return the span of publishing a message, until the confirm."""


class _Off:
    """The tracer while traces are disabled, and all of its spans."""

    headers = _NO_HEADERS
    trace_id = None

    def process(self, _: object) -> Self:
        return self

    def fetch(self, _: object) -> Self:
        return self

    def call(self, *_: object) -> Self:
        return self

    def publish(self, *_: object) -> Self:
        return self

    def answered(self, *_: object) -> None: ...

    def set_outcome(self, _: object) -> None: ...

    def failed(self, _: object) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


OFF: Tracer = _Off()
_tracer = OFF


def use(tracer: Tracer) -> None:
    """Set the tracer of the process."""
    global _tracer  # noqa: PLW0603 - like the metrics, there is one for the whole process
    _tracer = tracer


def spans() -> Tracer:
    """Return the tracer of the process."""
    return _tracer
