"""Spans for traces. Off, as it is by default, nothing of OpenTelemetry is loaded and a span is no work.

What the spans say is put together in `otlp`, the one place that knows OpenTelemetry; see docs/tracing.md.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    from worker.jobs.delivery import Delivery
    from worker.jobs.outcome import Outcome
    from worker.messages.result import Usage

_NO_HEADERS: Mapping[str, str] = {}


class Span(Protocol):
    """One step of a job, from when it is entered to when it is left; steps inside of it are its children."""

    @property
    def headers(self) -> Mapping[str, str]:
        """What a message carries whose reader is to go on with the trace; empty if that is unchanged."""

    @property
    def trace_id(self) -> str | None:
        """The trace that it belongs to, in hexadecimal."""

    def answered(self, usage: "Usage | None", finish_reason: str | None, response: Mapping[str, Any]) -> None:
        """Of a call to the API: it answered."""

    def became(self, outcome: "Outcome | None") -> None:
        """Of a delivery: what was published for it; None if there was nothing left to say."""

    def failed(self, kind: str) -> None:
        """It failed, and how, by a word out of a small set. Exceptions that leave it are told anyway."""


class Tracer(Protocol):
    """Who begins spans."""

    def process(self, delivery: "Delivery") -> AbstractContextManager[Span]:
        """The work on a delivery, until it is settled."""

    def fetch(self, image: str) -> AbstractContextManager[Span]:
        """Reading an image, until it can be sent; `image` is its place in the job."""

    def call(self, model: str, provider: str) -> AbstractContextManager[Span]:
        """A call to the API."""

    def publish(self, exchange: str, routing_key: str, message_id: str) -> AbstractContextManager[Span]:
        """Publishing a message, until the broker has confirmed it."""


class _Off:
    """The tracer of those who want no traces, and all of its spans."""

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

    def became(self, _: object) -> None: ...

    def failed(self, _: object) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


OFF: Tracer = _Off()
_tracer = OFF


def use(tracer: Tracer) -> None:
    """Let this one begin the spans from now on."""
    global _tracer  # noqa: PLW0603 - like the metrics, there is one for the whole process
    _tracer = tracer


def spans() -> Tracer:
    """Who begins spans, at the moment."""
    return _tracer
