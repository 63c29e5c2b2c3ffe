"""One call to the API as it is seen from outside: its figures in the metrics, and its span in the trace."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from worker.model.answer import Answer
from worker.observability import metrics
from worker.observability.tracing import Span, spans


class Call:
    """What is reported of one API call; one of `answered` and `failed` is called, once.

    Neither is, if an image was interrupted while it was sent: the API never had the request.
    """

    def __init__(self, figures: metrics.ModelCall, span: Span) -> None:
        self._figures = figures
        self._span = span

    def answered(self, answer: Answer) -> None:
        """Record a response with a chat completion."""
        self._figures.answered(answer.usage)
        self._span.answered(answer.usage, answer.finish_reason, answer.response)

    def failed(self, code: str, *, ambiguous: bool = False) -> None:
        """The call ended with an HTTP status, or as `timeout`, `connection` or `malformed`."""
        self._figures.failed(code, ambiguous=ambiguous)
        self._span.failed(code)


@contextmanager
def observed(model: str, provider: str, is_sent: Callable[[], bool]) -> Iterator[Call]:
    """Watch one API call; one that is cancelled after it was sent is ambiguous: it may be paid for."""
    with spans().call(model, provider) as span, metrics.model_call(model, provider, is_sent) as figures:
        yield Call(figures, span)
