"""Metrics and the trace span of a model request."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vqa_worker.messages.result import Usage
from worker.model.answer import Answer
from worker.observability import metrics
from worker.observability.tracing import Span, spans


class RequestObserver:
    """Records the outcome of one model request: call either `answered` or `failed`, once.

    Call neither if an image could not be sent: the API has not received the whole request.
    """

    def __init__(self, call: metrics.ModelCall, span: Span) -> None:
        self._call = call
        self._span = span

    def answered(self, answer: Answer) -> None:
        """Record a chat completion."""
        self._call.answered(answer.usage)
        self._span.answered(answer.usage, answer.finish_reason, answer.response)

    def failed(self, code: str, *, ambiguous: bool = False, usage: Usage | None = None) -> None:
        """Record an HTTP status, or `timeout`, `connection` or `malformed`.

        `ambiguous`: the request may have been billed; `usage`: what the API reports of it.
        """
        self._call.failed(code, ambiguous=ambiguous, usage=usage)
        self._span.failed(code)


@contextmanager
def observed_request(model: str, provider: str, is_sent: Callable[[], bool]) -> Iterator[RequestObserver]:
    """Measure one model request; if cancelled after it was sent, it is ambiguous."""
    with spans().call(model, provider) as span, metrics.model_call(model, provider, is_sent) as call:
        yield RequestObserver(call, span)
