"""What `/readyz` says about the model API."""

from types import SimpleNamespace
from typing import cast

from tests.unit.fake_clock import FakeClock
from worker.app.parts import Parts
from worker.app.runner import readiness
from worker.errors import Dependency, DependencyDownError, RateLimitedError
from worker.resilience.concurrency_limiter import LASTING_LIMIT_S, ConcurrencyLimiter
from worker.resilience.outage_detector import OutageDetector, Success


def parts_of(detector: OutageDetector, limiter: ConcurrencyLimiter) -> Parts:
    consumer = SimpleNamespace(is_connected=True)
    publisher = SimpleNamespace(delay_reason="")
    parts = SimpleNamespace(detector=detector, limiter=limiter, consumer=consumer, publisher=publisher)
    return cast("Parts", parts)


async def test_a_rate_limit_that_lasts_is_reported_with_the_words_of_the_api() -> None:
    """As a daily quota that the API reports with a plain 429."""
    clock = FakeClock()
    limiter = ConcurrencyLimiter(4, initial=4, clock=clock)
    parts = parts_of(OutageDetector(), limiter)
    async with limiter.slot("m") as slot:
        slot.rate_limited(RateLimitedError(None, "the API answered 429 (Daily requests used up)"))
        assert readiness(parts, stopping=False).reasons == ()
        await clock.advance(LASTING_LIMIT_S)
        found = readiness(parts, stopping=False)
        assert (found.is_ready, found.status) == (True, "ready")
        assert found.reasons == ("model: m is rate-limited (the API answered 429 (Daily requests used up))",)
        slot.succeeded()
    assert readiness(parts, stopping=False).reasons == ()


def test_a_paused_model_and_a_paused_worker_are_reported_with_the_words_of_the_api() -> None:
    detector = OutageDetector(has_several_models=True)
    parts = parts_of(detector, ConcurrencyLimiter(4, initial=4))
    detector.observe(Dependency.MODEL, "job", DependencyDownError(Dependency.MODEL, "retired", model="m"), 1)
    assert readiness(parts, stopping=False).reasons == ("model: m is paused: retired",)
    detector.observe(Dependency.MODEL, "job", Success(2, "m"), 3)
    detector.observe(Dependency.MODEL, "job", DependencyDownError(Dependency.MODEL, "check the key"), 4)
    found = readiness(parts, stopping=False)
    assert (found.is_ready, found.status, found.reasons) == (True, "paused", ("model: check the key",))


def test_messages_that_rabbitmq_does_not_confirm_are_reported() -> None:
    parts = parts_of(OutageDetector(), ConcurrencyLimiter(4, initial=4))
    cast("SimpleNamespace", parts.publisher).delay_reason = "2 not published: no confirm"
    found = readiness(parts, stopping=False)
    assert (found.is_ready, found.reasons) == (True, ("rabbitmq: 2 not published: no confirm",))
