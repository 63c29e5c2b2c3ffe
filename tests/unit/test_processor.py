"""Processing from a delivery to its outcome, with fake images and a fake model."""

import asyncio
import json
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import CapturingLogger

from tests.unit.fake_clock import FakeClock
from tests.unit.fakes import ANSWER, JOB, a_delivery, turns_of_the_loop
from vqa_worker.messages.conversation import ImageRef
from vqa_worker.messages.error_codes import ErrorCode
from vqa_worker.messages.result import SentImage, Usage
from worker.clock import Clock
from worker.errors import Dependency, DependencyDownError, JobError, RateLimitedError, TransientError
from worker.images.encoding import iterate_async
from worker.images.memory_budget import MemoryBudget, Reservation
from worker.images.source import Embedded, ImageSource, Link, Source
from worker.jobs.attempt import Attempt
from worker.jobs.cancellation import CancelledJobs
from worker.jobs.outcome import DeadLettered, Failed, Outcome, Requeued, Retried, Succeeded
from worker.jobs.outcome_builder import OutcomeBuilder
from worker.jobs.request import RequestRules
from worker.model.answer import Answer
from worker.model.request import RequestBody
from worker.observability.redaction import Redactor
from worker.observability.tenants import Tenants
from worker.processor import Processor, ProcessorDependencies
from worker.resilience.admission import ResultStore
from worker.resilience.concurrency_limiter import ConcurrencyLimiter
from worker.resilience.outage_detector import OutageDetector
from worker.resilience.outage_reports import OutageReports
from worker.resilience.retry_policy import RetryPolicy
from worker.s3.aws import S3Object

MODEL, S3 = Dependency.MODEL, Dependency.S3
CANARY = "the words of the question"
JOB_TIMEOUT_S = 60.0
RETRY = RetryPolicy(max_attempts=3, delays_s=(1, 5))
RULES = RequestRules(
    default_model="usual",
    allowed_models=["usual", "other"],
    max_job_bytes=10_000,
    delivery_limit=20,
    send_image_detail=False,
)

# A fake's action: answer, raise, or wait and then answer.
Deed = Exception | Answer | Callable[[], Awaitable[None]]


class Url:
    """The data of an image in the request, or the error while it is read."""

    def __init__(self, name: str, fault: Exception | None = None) -> None:
        self._text = f"loaded {name}".encode()
        self._fault = fault
        self.length = len(self._text)

    async def pieces(self) -> AsyncIterator[bytes]:
        async for piece in iterate_async((self._text[:3], self._text[3:])):
            yield piece
            if self._fault is not None:
                raise self._fault


@dataclass
class Opened:
    """The images of one model request."""

    urls: Sequence[Url]
    sent: Sequence[SentImage] = ()
    converted_s: float = 0.0
    was_sent: bool = False
    was_closed: bool = False

    def mark_sent(self) -> None:
        assert not self.was_closed
        self.was_sent = True


class Images:
    """Locates images; the data of each is "loaded" and its URL."""

    def __init__(self) -> None:
        self.fault: JobError | None = None
        self.deeds: list[Deed] = []
        self.room_deeds: list[Deed] = []
        self.rooms = 0
        self.source: Source = S3Object("photos", "cat.png")
        self.checked = 0
        self.fails_midway: Exception | None = None
        self.opened: list[Opened] = []
        self.loaded = 0
        self.time_left_s = 0.0

    def check(self, refs: Sequence[ImageRef], body: bytes) -> list[ImageSource]:
        assert body
        self.checked += 1
        if self.fault is not None:
            raise self.fault
        return [ImageSource(ref.url, self.source) for ref in refs]

    @asynccontextmanager
    async def reserve(self, images: Sequence[ImageSource]) -> AsyncIterator[Reservation]:
        await _do(self.room_deeds)
        async with MemoryBudget(1000).reserve(len(images)) as reservation:
            self.rooms += 1
            try:
                yield reservation
            finally:
                self.rooms -= 1

    @asynccontextmanager
    async def open(
        self, images: Sequence[ImageSource], reservation: Reservation, *, time_left_s: float
    ) -> AsyncIterator[Opened]:
        assert isinstance(reservation, Reservation)
        assert self.rooms
        self.loaded += 1
        self.time_left_s = time_left_s
        await _do(self.deeds)
        opened = Opened([Url(image.name, self.fails_midway) for image in images])
        self.opened.append(opened)
        try:
            yield opened
        finally:
            opened.was_closed = True


class Model:
    """Reads the request, then runs the next action in the list; the last one repeats."""

    def __init__(self) -> None:
        self.deeds: list[Deed] = []
        self.asked: list[tuple[str, list[dict[str, Any]], Mapping[str, Any], float]] = []

    async def complete(self, model: str, body: RequestBody, *, time_left_s: float) -> Answer:
        raw = b"".join([piece async for piece in body])
        assert len(raw) == body.length
        params = json.loads(raw)
        assert params.pop("model") == model
        self.asked.append((model, params.pop("messages"), params, time_left_s))
        return await _do(self.deeds) or ANSWER


async def _do(deeds: list[Deed]) -> Answer | None:
    deed = (deeds.pop(0) if len(deeds) > 1 else deeds[0]) if deeds else None
    if isinstance(deed, Exception):
        raise deed
    if callable(deed):
        await deed()
        return None
    return deed


class Scene:
    """A processor with fakes."""

    def __init__(
        self,
        *,
        limit: int = 5,
        store: ResultStore | None = None,
        include_response: bool = False,
        job_timeout_s: float = JOB_TIMEOUT_S,
        retry: RetryPolicy = RETRY,
        has_several_models: bool = False,
        clock: Clock | None = None,
        **rules: Any,
    ) -> None:
        self.images = Images()
        self.model = Model()
        clock = clock or Clock()
        self.limiter = ConcurrencyLimiter(limit, initial=limit, clock=clock)
        self.detector = OutageDetector(
            lambda: self.limiter.slots_in_use,
            self.limiter.oldest_request,
            has_several_models=has_several_models,
        )
        self.outage_reports = OutageReports(self.detector, self.limiter, clock)
        self.cancelled_jobs = CancelledJobs()
        dependencies = ProcessorDependencies(
            images=self.images,
            model=self.model,
            store=store,
            limiter=self.limiter,
            detector=self.detector,
            outage_reports=self.outage_reports,
            cancelled_jobs=self.cancelled_jobs,
            tenants=Tenants(),
            outcomes=OutcomeBuilder(Redactor(["s3cr3t-key"]), clock, include_response=include_response),
            rules=replace(RULES, stores_results=store is not None, **rules),
            retry=retry,
            job_timeout_s=job_timeout_s,
            clock=clock,
        )
        self.processor = Processor(dependencies)

    async def process(
        self, job: dict[str, Any] | bytes = JOB, *, delivery: dict[str, Any] | None = None, **fields: Any
    ) -> Outcome:
        body = job if isinstance(job, bytes) else {**job, **fields}
        async with asyncio.timeout(30):
            it = a_delivery(body, **(delivery or {}))
            return await self.processor.process(it, Attempt.from_delivery(it))

    async def is_free(self) -> bool:
        """Return whether no slot and no memory is in use."""
        if self.images.rooms:
            return False
        try:
            async with asyncio.timeout(5), self.limiter.slot("usual"):
                return True
        except TimeoutError:
            return False


@pytest.fixture
def scene() -> Scene:
    return Scene()


def go_down(scene: Scene, dependency: Dependency) -> None:
    """Report that a dependency is down, like another job's failed call."""
    scene.outage_reports.report_unavailable("another", DependencyDownError(dependency, "unreachable"))


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> CapturingLogger:
    log = CapturingLogger()
    monkeypatch.setattr("worker.processor.log", log)
    return log


async def for_ever() -> None:
    await asyncio.Event().wait()


def in_(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


def refusal(outcome: Outcome) -> tuple[ErrorCode, str]:
    """Return the error code and message of a failed job; check that its result has both."""
    assert isinstance(outcome, Failed)
    error = outcome.result.error
    assert error is not None
    assert (outcome.result.status, outcome.result.answer, error.code) == ("failed", None, outcome.code)
    assert not error.retryable
    return outcome.code, error.message


def transient(
    reason: str = "http_5xx", *, dependency: Dependency = MODEL, refused: bool = False
) -> TransientError:
    return TransientError(dependency, reason, f"it said {reason}", refused=refused)


# Successful jobs


async def test_a_job_s_images_are_fetched_and_the_model_s_answer_returned(scene: Scene) -> None:
    outcome = await scene.process(
        system="Be brief.",
        params={"seed": 7},
        metadata={"order": 9},
        delivery={"queued_s": 1.5, "counted_attempts": 1},
    )
    assert isinstance(outcome, Succeeded)
    assert (outcome.job_id, outcome.model) == ("job-1", "usual")
    ((model, messages, params, time_left_s),) = scene.model.asked
    assert (model, params) == ("usual", {"seed": 7, "stream": False})
    assert messages[0] == {"role": "system", "content": "Be brief."}
    assert messages[1]["content"][0]["image_url"] == {"url": "loaded s3://photos/cat.png"}
    assert 0 < time_left_s <= JOB_TIMEOUT_S
    result = json.loads(outcome.result.to_body())
    assert (result["id"], result["status"], result["answer"]) == ("job-1", "succeeded", "A cat.")
    assert (result["model"], result["finish_reason"], result["attempts"]) == ("usual", "stop", 2)
    assert (result["usage"]["total_tokens"], result["metadata"]) == (7, {"order": 9})
    assert (result["error"], result["response"]) == (None, None)
    timings = result["timings"]
    assert timings["queued_s"] == 1.5
    assert 0 <= timings["fetch_s"] <= timings["total_s"]
    assert 0 <= timings["model_s"] <= timings["total_s"]


async def test_a_job_may_use_any_allowed_model(scene: Scene) -> None:
    outcome = await scene.process(model="other")
    assert outcome.model == "other"
    assert scene.model.asked[0][0] == "other"


@pytest.mark.parametrize("model", ["unheard-of", "", "Usual", "unknown"])
async def test_a_model_that_is_not_allowed_makes_the_job_invalid(scene: Scene, model: str) -> None:
    outcome = await scene.process(model=model)
    code, message = refusal(outcome)
    assert code is ErrorCode.INVALID_JOB
    assert message.startswith("model: ")
    # No metric label has a value that a job can choose.
    assert outcome.model == "unknown"
    assert (scene.images.checked, scene.model.asked) == (0, [])


async def test_the_response_body_is_included_for_more_than_plain_text_or_if_configured() -> None:
    for is_plain, include, expected in (
        (True, False, None),
        (True, True, {"id": "r-1"}),
        (False, False, {"id": "r-1"}),
    ):
        scene = Scene(include_response=include)
        scene.model.deeds = [replace(ANSWER, is_plain=is_plain)]
        outcome = await scene.process()
        assert isinstance(outcome, Succeeded)
        assert outcome.result.response == expected


async def test_a_tool_call_is_an_answer_without_text(scene: Scene) -> None:
    scene.model.deeds = [replace(ANSWER, text=None, calls_tools=True, is_plain=False)]
    outcome = await scene.process()
    assert isinstance(outcome, Succeeded)
    assert (outcome.result.answer, outcome.result.response) == (None, {"id": "r-1"})


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"finish_reason": "length"}, "max_tokens"),
        ({"finish_reason": "content_filter"}, "content filter"),
        ({"finish_reason": "stop", "refusal": "I can't with s3cr3t-key."}, "I can't with [redacted]."),
        ({"finish_reason": None}, "neither text nor a tool call"),
    ],
)
async def test_an_empty_answer_is_billed_and_not_retried(
    scene: Scene, answer: dict[str, Any], words: str
) -> None:
    scene.model.deeds = [replace(ANSWER, text=None, **answer)]
    outcome = await scene.process()
    code, message = refusal(outcome)
    assert code is ErrorCode.EMPTY_ANSWER
    assert words in message
    assert isinstance(outcome, Failed)
    assert outcome.result.usage == ANSWER.usage
    assert outcome.result.finish_reason == answer["finish_reason"]
    assert len(scene.model.asked) == 1


async def test_the_result_says_who_answered(scene: Scene) -> None:
    scene.model.deeds = [replace(ANSWER, provider="p", answered_model="m-2", service_tier="flex")]
    outcome = await scene.process()
    assert isinstance(outcome, Succeeded)
    result = outcome.result
    assert (result.model, result.answered_model, result.provider) == ("usual", "m-2", "p")
    assert result.service_tier == "flex"


USAGE = Usage(prompt_tokens=3, completion_tokens=4, total_tokens=7, cost_usd=0.5)


async def test_the_usage_of_all_unusable_answers_is_in_the_failed_result(scene: Scene) -> None:
    error = transient("malformed_response")
    error.usage = USAGE
    scene.model.deeds = [error]
    retried = await scene.process()
    assert isinstance(retried, Retried)
    assert retried.unusable == USAGE
    earlier = {"counted_attempts": 1, "malformed_answers": 1, "unusable": USAGE}
    outcome = await scene.process(delivery=earlier)
    assert isinstance(outcome, DeadLettered)
    assert outcome.result.usage == Usage(prompt_tokens=6, completion_tokens=8, total_tokens=14, cost_usd=1.0)
    scene.model.deeds = [transient("malformed_response")]
    outcome = await scene.process(delivery=earlier)
    assert isinstance(outcome, DeadLettered)
    assert outcome.result.usage == USAGE
    scene.model.deeds = [ANSWER]
    outcome = await scene.process(delivery=earlier)
    assert isinstance(outcome, Succeeded)
    assert ANSWER.usage is not None
    assert outcome.result.usage == USAGE + ANSWER.usage
    scene.model.deeds = [replace(ANSWER, text=None)]
    outcome = await scene.process(delivery=earlier)
    assert isinstance(outcome, Failed)
    assert (outcome.code, outcome.result.usage) == (ErrorCode.EMPTY_ANSWER, USAGE + ANSWER.usage)
    scene.model.deeds = [replace(ANSWER, usage=None)]
    outcome = await scene.process(delivery=earlier)
    assert isinstance(outcome, Succeeded)
    assert outcome.result.usage == USAGE


async def test_an_answer_that_is_bought_in_an_outage_counts_when_the_job_is_requeued(scene: Scene) -> None:
    """Each probe of a long outage would buy another one."""
    bought = transient("malformed_response")
    bought.usage = USAGE
    scene.model.deeds = [DependencyDownError(MODEL, "check the key")]
    assert isinstance(await scene.process(), Requeued)
    for earlier, is_bought in [({}, True), ({"malformed_answers": 1, "unusable": USAGE}, False)]:
        scene.limiter.allow_probe()
        scene.model.deeds = [bought if is_bought else transient("malformed_response")]
        outcome = await scene.process(delivery=earlier)
        assert isinstance(outcome, Requeued)
        assert (outcome.malformed_answers, outcome.unusable) == (1, USAGE)


@pytest.mark.parametrize("code", [None, ErrorCode.MODEL_REJECTED])
async def test_the_usage_of_an_unusable_answer_is_in_the_failed_result(
    scene: Scene, code: ErrorCode | None
) -> None:
    error = transient("malformed_response") if code is None else JobError(code, "the API answered 400")
    error.usage = USAGE
    scene.model.deeds = [error]
    outcome = await scene.process(delivery={"counted_attempts": 2})
    assert isinstance(outcome, DeadLettered | Failed)
    assert outcome.result.usage == USAGE


FLEX = {"params": {"seed": 7, "service_tier": "flex"}}
DEFAULT_TIER = {"seed": 7, "stream": False}
SENT = {**DEFAULT_TIER, "service_tier": "flex"}


def busy_tier(retry_after_s: float, *, is_overloaded: bool = False) -> RateLimitedError:
    error = RateLimitedError(retry_after_s, is_overloaded=is_overloaded)
    error.concerns_tier = True
    return error


async def test_a_tier_without_capacity_falls_back_to_the_default_tier_without_a_pause() -> None:
    scene = Scene(flex_fallback=True)
    scene.model.deeds = [busy_tier(1000.0), ANSWER]
    started = time.monotonic()
    outcome = await scene.process(**FLEX)
    assert isinstance(outcome, Succeeded)
    assert [params for _, _, params, _ in scene.model.asked] == [SENT, DEFAULT_TIER]
    assert time.monotonic() - started < 30


async def test_a_tier_without_capacity_for_long_is_no_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.resilience.outage_detector.OVERLOAD_S", 0.0)
    scene = Scene(flex_fallback=True)
    monkeypatch.setattr(scene.detector, "_oldest_request", lambda: float("inf"))
    for _ in range(3):
        scene.model.deeds = [busy_tier(1000.0, is_overloaded=True), ANSWER]
        assert isinstance(await scene.process(**FLEX), Succeeded)
    assert not scene.detector.outages


async def test_without_a_fallback_a_tier_without_capacity_is_waited_for() -> None:
    scene = Scene()
    scene.model.deeds = [busy_tier(0.0), ANSWER]
    assert isinstance(await scene.process(**FLEX), Succeeded)
    assert [params for _, _, params, _ in scene.model.asked] == [SENT] * 2


async def test_the_limit_of_the_account_is_waited_for_in_the_same_tier() -> None:
    scene = Scene(flex_fallback=True)
    scene.model.deeds = [RateLimitedError(0.0), ANSWER]
    assert isinstance(await scene.process(**FLEX), Succeeded)
    assert [params for _, _, params, _ in scene.model.asked] == [SENT] * 2


async def test_a_tier_that_times_out_is_asked_again() -> None:
    """The request may be billed: one in the default tier would be bought in addition."""
    scene = Scene(flex_fallback=True)
    scene.model.deeds = [transient("timeout"), ANSWER]
    outcome = await scene.process(**FLEX)
    assert isinstance(outcome, Retried)
    assert (outcome.attempts, len(scene.model.asked)) == (1, 1)


@pytest.mark.parametrize("job_timeout_s", [600.0, 100.0])
async def test_a_tier_that_answers_late_that_it_has_no_capacity_falls_back(job_timeout_s: float) -> None:
    """DeepInfra answers after ten minutes: after the usual wait for a slot, and half of the time."""
    clock = FakeClock(time.monotonic())
    scene = Scene(flex_fallback=True, job_timeout_s=job_timeout_s, clock=clock)

    async def late() -> None:
        clock.jump(90)
        raise busy_tier(1000.0)

    scene.model.deeds = [late, ANSWER]
    outcome = await scene.process(**FLEX)
    assert isinstance(outcome, Succeeded)
    assert [params for _, _, params, _ in scene.model.asked] == [SENT, DEFAULT_TIER]


async def test_the_default_tier_is_rate_limited_as_usual() -> None:
    scene = Scene(flex_fallback=True)
    scene.model.deeds = [busy_tier(1000.0), RateLimitedError(0.0), ANSWER]
    assert isinstance(await scene.process(**FLEX), Succeeded)
    assert [params for _, _, params, _ in scene.model.asked] == [SENT, DEFAULT_TIER, DEFAULT_TIER]


# Invalid and rejected jobs


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"id":"\\n"}', b'{"question":"?"}'])
async def test_a_message_without_a_readable_id_is_dead_lettered(scene: Scene, body: bytes) -> None:
    outcome = await scene.process(body, delivery={"message_id": "m-9", "counted_attempts": 2})
    assert isinstance(outcome, DeadLettered)
    assert (outcome.code, outcome.job_id, outcome.attempts) == (ErrorCode.INVALID_JOB, "m-9", 2)
    assert outcome.result.id == "m-9"
    assert outcome.result.error is not None
    assert not outcome.result.error.retryable
    assert scene.images.checked == 0


async def test_an_invalid_job_with_an_id_fails(scene: Scene) -> None:
    code, message = refusal(await scene.process(imagse=[]))
    assert (code, message) == (ErrorCode.INVALID_JOB, "imagse: unknown field")


async def test_a_body_over_the_limit_fails() -> None:
    scene = Scene(max_job_bytes=100)
    code, message = refusal(await scene.process(question="?" * 100))
    assert code is ErrorCode.INVALID_JOB
    assert "VQA_MAX_JOB_BYTES" in message


async def test_images_that_are_not_allowed_fail_the_job_without_a_call(scene: Scene) -> None:
    scene.images.fault = JobError(ErrorCode.IMAGE_SOURCE_NOT_ALLOWED, "images[0]: no, s3cr3t-key")
    assert refusal(await scene.process()) == (
        ErrorCode.IMAGE_SOURCE_NOT_ALLOWED,
        "images[0]: no, [redacted]",
    )
    assert (scene.images.loaded, scene.model.asked) == (0, [])


async def test_an_unreadable_image_fails_the_job_without_a_call(scene: Scene) -> None:
    scene.images.deeds = [JobError(ErrorCode.IMAGE_CORRUPT, "images[0]: broken")]
    assert refusal(await scene.process())[0] is ErrorCode.IMAGE_CORRUPT
    assert scene.model.asked == []
    assert await scene.is_free()


async def test_a_job_that_may_crash_the_worker_is_dead_lettered_without_decoding() -> None:
    scene = Scene(delivery_limit=3)
    unread = {"deliveries": 7, "message_id": "its sender's"}
    outcome = await scene.process(b"no job", delivery=unread)
    assert isinstance(outcome, DeadLettered)
    assert (outcome.code, outcome.job_id) == (ErrorCode.ATTEMPTS_EXHAUSTED, "its sender's")


async def test_a_job_beyond_its_delivery_limit_is_dead_lettered_without_a_call() -> None:
    scene = Scene(delivery_limit=3)
    assert isinstance(await scene.process(delivery={"deliveries": 3}), Succeeded)
    outcome = await scene.process(delivery={"deliveries": 4})
    assert isinstance(outcome, DeadLettered)
    assert outcome.code is ErrorCode.ATTEMPTS_EXHAUSTED
    assert outcome.result.error is not None
    assert outcome.result.error.retryable
    assert "VQA_DELIVERY_LIMIT" in outcome.message
    assert len(scene.model.asked) == 1


# The deadline


@pytest.mark.parametrize("deadline", ["0001-01-01T00:00:00Z", "1990-12-31T23:59:60Z"])
async def test_past_its_deadline_a_job_fails_without_a_call(scene: Scene, deadline: str) -> None:
    code, message = refusal(await scene.process(deadline=deadline))
    assert code is ErrorCode.DEADLINE_EXCEEDED
    assert "deadline" in message
    assert (scene.images.loaded, scene.model.asked) == (0, [])


@pytest.mark.parametrize("deadline", ["9999-12-31T23:59:59Z", "2999-01-01T00:00:00+23:59"])
async def test_before_its_deadline_a_job_is_processed(scene: Scene, deadline: str) -> None:
    assert isinstance(await scene.process(deadline=deadline), Succeeded)


async def test_a_deadline_that_passes_while_waiting_for_a_slot_fails_the_job() -> None:
    scene = Scene(limit=1)
    async with scene.limiter.slot("usual"):
        code, _ = refusal(await scene.process(deadline=in_(0.2)))
    assert code is ErrorCode.DEADLINE_EXCEEDED
    assert (scene.images.loaded, scene.model.asked) == (0, [])
    assert await scene.is_free()


async def test_a_deadline_that_passes_while_images_are_fetched_fails_the_job(scene: Scene) -> None:
    """The deadline is checked when the API is called, not only when processing begins."""
    deadline = datetime.now(UTC) + timedelta(seconds=0.5)

    async def slowly() -> None:
        while datetime.now(UTC) <= deadline:  # noqa: ASYNC110 - it is the clock that is waited for
            await asyncio.sleep(0.01)

    scene.images.deeds = [slowly]
    code, _ = refusal(await scene.process(deadline=deadline.isoformat()))
    assert code is ErrorCode.DEADLINE_EXCEEDED
    assert (scene.images.loaded, scene.model.asked) == (1, [])


async def test_a_deadline_that_passes_in_a_pause_after_a_429_fails_the_job(scene: Scene) -> None:
    scene.model.deeds = [RateLimitedError(60.0)]
    code, _ = refusal(await scene.process(deadline=in_(0.5)))
    assert code is ErrorCode.DEADLINE_EXCEEDED
    assert len(scene.model.asked) == 1


async def test_a_retry_that_would_come_after_the_deadline_is_not_waited_for() -> None:
    scene = Scene(retry=RetryPolicy(max_attempts=3, delays_s=(200,)))
    scene.model.deeds = [transient("timeout")]
    code, message = refusal(await scene.process(deadline=in_(100)))
    assert code is ErrorCode.DEADLINE_EXCEEDED
    assert "it said timeout" in message


def expiring_in(seconds: float) -> dict[str, Any]:
    return {"expires_at": datetime.now(UTC) + timedelta(seconds=seconds)}


@pytest.mark.parametrize("deadline", [None, in_(1000)], ids=["no deadline", "a later deadline"])
async def test_an_expired_message_fails_without_a_call(scene: Scene, deadline: str | None) -> None:
    code, message = refusal(await scene.process(deadline=deadline, delivery=expiring_in(-1)))
    assert code is ErrorCode.DEADLINE_EXCEEDED
    assert "the message's expiration" in message
    assert (scene.images.loaded, scene.model.asked) == (0, [])


async def test_the_deadline_counts_if_it_comes_before_the_expiration(scene: Scene) -> None:
    code, message = refusal(await scene.process(deadline=in_(-1), delivery=expiring_in(1000)))
    assert (code, "the deadline" in message) == (ErrorCode.DEADLINE_EXCEEDED, True)
    assert isinstance(await scene.process(delivery=expiring_in(1000)), Succeeded)


async def test_a_message_that_expires_while_waiting_for_a_slot_fails() -> None:
    scene = Scene(limit=1)
    async with scene.limiter.slot("usual"):
        code, _ = refusal(await scene.process(delivery=expiring_in(0.2)))
    assert code is ErrorCode.DEADLINE_EXCEEDED
    assert scene.model.asked == []


async def test_a_retry_that_would_come_after_the_expiration_is_not_waited_for() -> None:
    scene = Scene(retry=RetryPolicy(max_attempts=3, delays_s=(200,)))
    scene.model.deeds = [transient("timeout")]
    assert refusal(await scene.process(delivery=expiring_in(100)))[0] is ErrorCode.DEADLINE_EXCEEDED


async def test_a_message_that_expires_during_its_call_is_answered(scene: Scene) -> None:
    expiring = expiring_in(0.2)

    async def slowly() -> None:
        while datetime.now(UTC) <= expiring["expires_at"]:  # noqa: ASYNC110 - it is the clock that is waited for
            await asyncio.sleep(0.01)

    scene.model.deeds = [slowly]
    assert isinstance(await scene.process(delivery=expiring), Succeeded)


async def test_an_expired_message_whose_answer_is_stored_is_answered() -> None:
    scene = Scene(store=FakeResultStore())
    assert isinstance(await scene.process(), Succeeded)
    assert isinstance(await scene.process(delivery=expiring_in(-1)), Succeeded)
    assert len(scene.model.asked) == 1


# Transient errors


@pytest.mark.parametrize(("attempts", "delay_s"), [(0, 1), (1, 5)])
@pytest.mark.parametrize("part", ["images", "model"])
async def test_a_transient_error_is_counted_and_retried(
    scene: Scene, attempts: int, delay_s: int, part: str
) -> None:
    dependency = S3 if part == "images" else MODEL
    getattr(scene, part).deeds = [transient("timeout", dependency=dependency)]
    outcome = await scene.process(delivery={"counted_attempts": attempts})
    assert outcome == Retried(
        job_id="job-1", model="usual", delay_s=delay_s, attempts=attempts + 1, reason="timeout"
    )
    assert await scene.is_free()


async def test_an_image_that_fails_while_it_is_sent_is_an_error_of_its_source(scene: Scene) -> None:
    scene.images.fails_midway = transient("connection_error", dependency=S3)
    outcome = await scene.process()
    assert isinstance(outcome, Retried)
    assert outcome.reason == "connection_error"
    (opened,) = scene.images.opened
    assert (opened.was_sent, opened.was_closed) == (False, True)
    assert await scene.is_free()
    scene.images.fails_midway = None
    assert isinstance(await scene.process(), Succeeded)
    assert scene.images.opened[-1].was_sent


async def test_an_unreachable_source_while_an_image_is_sent_pauses_the_worker(scene: Scene) -> None:
    scene.images.fails_midway = DependencyDownError(S3, "it is unreachable")
    assert isinstance(await scene.process(), Requeued)
    assert set(scene.detector.outages) == {S3}


async def test_the_last_attempt_dead_letters_the_job_with_the_reason(scene: Scene) -> None:
    scene.model.deeds = [TransientError(MODEL, "http_5xx", "the API answered 500: s3cr3t-key")]
    outcome = await scene.process(delivery={"counted_attempts": 2})
    assert isinstance(outcome, DeadLettered)
    assert (outcome.code, outcome.attempts) == (ErrorCode.ATTEMPTS_EXHAUSTED, 3)
    assert outcome.message == "3 attempts failed, the last one because the API answered 500: [redacted]"
    error = outcome.result.error
    assert error is not None
    assert (error.code, error.retryable, error.message) == (
        ErrorCode.ATTEMPTS_EXHAUSTED,
        True,
        outcome.message,
    )
    assert outcome.result.attempts == 3


async def test_images_have_half_of_the_time_that_is_left_and_the_model_request_the_rest(
    scene: Scene,
) -> None:
    await scene.process(delivery={"received_at": time.monotonic() - 20})
    assert 15 < scene.images.time_left_s <= 20
    assert 30 < scene.model.asked[0][3] <= 40


async def test_a_job_that_gets_no_memory_in_time_is_requeued_without_a_counted_attempt() -> None:
    """The memory budget is the worker's: S3 is not at fault."""
    scene = Scene(job_timeout_s=0.6, limit=1)
    scene.images.room_deeds = [for_ever]
    for n in range(6):
        outcome = await scene.process(id=f"job-{n}", delivery={"counted_attempts": 2})
        assert isinstance(outcome, Requeued)
        assert "VQA_JOB_TIMEOUT" in outcome.reason
    assert scene.detector.outages == {}
    assert (scene.images.loaded, scene.model.asked) == (0, [])
    assert await scene.is_free()


async def test_memory_that_is_granted_late_leaves_half_of_the_time_for_processing() -> None:
    scene = Scene(job_timeout_s=20.0)
    waited = asyncio.Event()

    async def a_while() -> None:
        await asyncio.sleep(0.3)
        waited.set()

    scene.images.room_deeds = [a_while]
    outcome = await scene.process()
    assert waited.is_set()
    assert isinstance(outcome, Succeeded)
    assert scene.images.rooms == 0
    # This time counts as waiting, not as fetching.
    timings = json.loads(outcome.result.to_body())["timings"]
    assert timings["fetch_s"] < 0.3 <= timings["total_s"]


async def test_a_deadline_that_passes_while_waiting_for_memory_fails_the_job(scene: Scene) -> None:
    scene.images.room_deeds = [for_ever]
    code, _ = refusal(await scene.process(deadline=in_(0.2)))
    assert code is ErrorCode.DEADLINE_EXCEEDED
    assert (scene.images.loaded, scene.model.asked) == (0, [])
    assert await scene.is_free()


async def test_a_429_releases_memory_before_the_pause(scene: Scene) -> None:
    scene.model.deeds = [RateLimitedError(3600.0)]
    task = asyncio.create_task(scene.process())
    while not scene.model.asked:  # noqa: ASYNC110 - the fake has no event for it
        await asyncio.sleep(0.01)
    await turns_of_the_loop()
    assert (scene.images.rooms, task.done()) == (0, False)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_the_timeout_of_a_delivery_starts_at_its_receipt(scene: Scene) -> None:
    await scene.process(delivery={"received_at": time.monotonic() - 20})
    assert 30 < scene.model.asked[0][3] <= 40


async def test_no_call_begins_in_the_second_half_of_a_delivery_s_timeout(scene: Scene) -> None:
    outcome = await scene.process(delivery={"received_at": time.monotonic() - 31})
    assert isinstance(outcome, Requeued)
    assert scene.model.asked == []


async def test_repeated_failures_of_one_job_are_not_an_outage(scene: Scene) -> None:
    scene.model.deeds = [transient()]
    for attempts in (0, 1, 2, 0, 1, 2):
        assert not isinstance(await scene.process(delivery={"counted_attempts": attempts}), Requeued)
    assert scene.detector.outages == {}


async def test_three_distinct_jobs_that_fail_in_a_row_are_an_outage_and_the_rest_is_requeued(
    scene: Scene,
) -> None:
    scene.model.deeds = [transient()]
    outcomes = [await scene.process(id=f"job-{n}") for n in range(7)]
    assert [type(outcome) for outcome in outcomes] == [Retried] * 2 + [Requeued] * 5
    assert set(scene.detector.outages) == {MODEL}


async def test_bad_jobs_one_after_another_each_get_their_outcome(scene: Scene) -> None:
    scene.model.deeds = [transient()]
    for n in range(3):
        assert isinstance(await scene.process(id=f"job-{n}", delivery={"counted_attempts": 2}), DeadLettered)
    assert scene.detector.outages == {}
    # Their failure may concern all jobs: it fails three in a row at most.
    assert isinstance(await scene.process(id="job-3", delivery={"counted_attempts": 2}), Requeued)
    assert set(scene.detector.outages) == {MODEL}


async def test_attempts_that_an_outage_caused_are_restored_at_the_next_delivery(
    scene: Scene,
) -> None:
    scene.model.deeds = [transient()]
    for n in range(2):
        assert isinstance(await scene.process(id=f"job-{n}"), Retried)
    assert isinstance(await scene.process(id="job-1", delivery={"counted_attempts": 1}), Retried)
    assert isinstance(await scene.process(id="job-2"), Requeued)
    again = await scene.process(id="job-0", delivery={"counted_attempts": 1})
    assert isinstance(again, Requeued)
    assert again.restored_attempts == 1
    scene.model.deeds = [ANSWER]
    answered = [
        await scene.process(id=name, delivery={"counted_attempts": attempts})
        # The requeued copy has fewer attempts, and none is restored twice.
        for name, attempts in (("job-0", 0), ("job-1", 2), ("job-1", 2), ("job-2", 0))
    ]
    assert [it.result.attempts for it in answered if isinstance(it, Succeeded)] == [1, 1, 3, 1]


async def test_no_more_attempts_are_restored_than_the_job_has(scene: Scene) -> None:
    scene.detector.count_attempt(MODEL, "job-1", time.monotonic())
    go_down(scene, MODEL)
    outcome = await scene.process()
    assert isinstance(outcome, Succeeded)
    assert outcome.result.attempts == 1


# The diagnosis of a failure


@asynccontextmanager
async def pending_job(scene: Scene, **job: Any) -> AsyncIterator[asyncio.Task[Outcome]]:
    """A failed job that waits for the result of another job's call."""
    async with scene.limiter.slot("usual"):
        task = asyncio.create_task(scene.process(**job))
        while not scene.model.asked:  # noqa: ASYNC110 - the fake has no event for it
            await asyncio.sleep(0.01)
        await turns_of_the_loop()
        assert not task.done()
        yield task
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture(autouse=True)
def nobody_waits_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.resilience.outage_reports.MAX_WAIT_ALONE_S", 0.0)


@pytest.fixture
def patiently(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the maximum wait longer than a test."""
    monkeypatch.setattr("worker.resilience.outage_reports.MAX_WAIT_S", 1000.0)


def succeeds(scene: Scene) -> None:
    """Report the success of another job's call that begins now."""
    scene.outage_reports.report_success(MODEL, "another", time.monotonic())


@pytest.mark.usefixtures("patiently")
async def test_a_job_that_waits_for_a_diagnosis_holds_neither_its_slot_nor_its_images(scene: Scene) -> None:
    scene.model.deeds = [transient()]
    async with pending_job(scene):
        assert (scene.limiter.slots_in_use, scene.images.rooms) == (1, 0)
        opened = weakref.ref(scene.images.opened.pop())
        assert opened() is None


@pytest.mark.usefixtures("patiently")
@pytest.mark.parametrize("is_duplicate", [False, True])
async def test_the_jobs_that_reveal_an_outage_lose_no_attempt(scene: Scene, is_duplicate: bool) -> None:
    scene.model.deeds = [TransientError(MODEL, "http_5xx", "no", is_duplicate=is_duplicate)]
    async with pending_job(scene, delivery={"counted_attempts": 2}) as task:
        go_down(scene, MODEL)
        assert isinstance(await task, Requeued)


@pytest.mark.usefixtures("patiently")
async def test_a_failure_of_a_single_job_is_counted_permanently(scene: Scene) -> None:
    scene.model.deeds = [transient()]
    async with pending_job(scene) as task:
        succeeds(scene)
        outcome = await task
        assert isinstance(outcome, Retried)
        assert outcome.attempts == 1
    go_down(scene, MODEL)
    assert scene.detector.take_restored_attempts("job-1") == 0


@pytest.mark.usefixtures("patiently")
async def test_a_403_fails_the_job_as_soon_as_another_succeeds(scene: Scene) -> None:
    scene.model.deeds = [transient("http_403", refused=True)]
    async with pending_job(scene) as task:
        succeeds(scene)
        assert refusal(await task) == (ErrorCode.MODEL_REJECTED, "it said http_403")


async def test_without_a_diagnosis_the_attempt_is_counted_until_there_is_one(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.resilience.outage_reports.MAX_WAIT_S", 0.3)
    scene.model.deeds = [transient()]
    async with pending_job(scene) as task:
        assert isinstance(await task, Retried)
    go_down(scene, MODEL)
    assert scene.detector.take_restored_attempts("job-1") == 1


@pytest.mark.usefixtures("patiently")
async def test_a_diagnosis_does_not_delay_a_stop(scene: Scene) -> None:
    scene.model.deeds = [transient()]
    async with pending_job(scene) as task:
        scene.outage_reports.stop()
        assert isinstance(await task, Retried)


@pytest.mark.usefixtures("patiently")
async def test_without_other_calls_the_wait_for_a_diagnosis_is_short(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.resilience.outage_reports.MAX_WAIT_ALONE_S", 0.1)
    scene.model.deeds = [transient()]
    assert isinstance(await scene.process(), Retried)
    alone = asyncio.create_task(scene.process(id="another"))
    await turns_of_the_loop()
    go_down(scene, MODEL)
    assert isinstance(await alone, Requeued)


@pytest.mark.usefixtures("patiently")
async def test_the_wait_for_a_diagnosis_leaves_time_for_a_retry_before_the_deadline(scene: Scene) -> None:
    scene.model.deeds = [transient()]
    async with pending_job(scene, deadline=in_(8.0)) as task:
        assert isinstance(await task, Retried)


@pytest.mark.usefixtures("patiently")
async def test_the_wait_for_a_diagnosis_ends_with_the_timeout_of_the_delivery() -> None:
    scene = Scene(job_timeout_s=1.0)
    scene.model.deeds = [transient()]
    async with pending_job(scene) as task:
        assert isinstance(await task, Retried)


# Failures that may concern only one bucket or one model


def partial_refusal(*, is_duplicate: bool = False) -> DependencyDownError:
    return DependencyDownError(
        S3, "S3 answered 503 SlowDown", may_be_the_jobs=True, is_duplicate=is_duplicate
    )


async def test_a_short_failure_between_successes_is_tried_later_without_a_counted_attempt(
    scene: Scene,
) -> None:
    await scene.process(id="another")
    scene.images.deeds = [partial_refusal()]
    outcome = await scene.process(delivery={"counted_attempts": 2})
    assert isinstance(outcome, Retried)
    assert (outcome.delay_s, outcome.attempts) == (1, 2)
    for n in range(10):
        scene.images.deeds = [partial_refusal(is_duplicate=True)]
        outcome = await scene.process(id=f"echo-{n}")
        assert isinstance(outcome, Retried)
        assert (outcome.delay_s, outcome.attempts) == (1, 0)
    assert scene.detector.outages == {}
    scene.images.deeds = [partial_refusal()]
    assert isinstance(await scene.process(delivery={"counted_attempts": 2}), Requeued)
    assert set(scene.detector.outages) == {S3}


async def test_a_refusal_by_a_router_while_others_succeed_is_tried_later_without_a_counted_attempt(
    scene: Scene,
) -> None:
    def refusal() -> DependencyDownError:
        return DependencyDownError(MODEL, "answered 401", may_be_the_jobs=True)

    found = []
    for _ in range(6):
        scene.model.deeds = []
        await scene.process(id="another")
        scene.model.deeds = [refusal()]
        outcome = await scene.process(delivery={"counted_attempts": 1})
        found.append((outcome.delay_s, outcome.attempts) if isinstance(outcome, Retried) else None)
    assert scene.detector.outages == {}
    # After several refusals among successes of others it is the job's own: it must end.
    assert found == [(1, 1)] * 4 + [(5, 2)] * 2
    # Twice in a row without a success of another job: it concerns all.
    assert isinstance(await scene.process(id="b"), Retried)
    assert isinstance(await scene.process(id="b"), Requeued)
    assert set(scene.detector.outages) == {MODEL}


async def test_repeated_refusals_of_one_object_are_counted_eventually(scene: Scene) -> None:
    found = []
    for _ in range(6):
        scene.images.deeds = []
        await scene.process(id="another")
        scene.images.deeds = [partial_refusal()]
        outcome = await scene.process()
        found.append((outcome.delay_s, outcome.attempts) if isinstance(outcome, Retried) else None)
    assert found == [(1, 0)] * 4 + [(5, 1)] * 2
    assert scene.detector.outages == {}


@pytest.mark.parametrize("attempts", [0, 2])
async def test_a_shared_error_is_not_an_outage_and_fails_each_job(scene: Scene, attempts: int) -> None:
    """Jobs that share the read of an image fail together, by one error of S3."""
    for n in range(10):
        scene.images.deeds = [TransientError(S3, "connection_error", "reset", is_duplicate=n > 0)]
        outcome = await scene.process(id=f"job-{n}", delivery={"counted_attempts": attempts})
        if attempts:
            assert isinstance(outcome, DeadLettered)
            assert "reset" in outcome.message
        else:
            assert isinstance(outcome, Retried)
            assert (outcome.reason, outcome.attempts) == ("connection_error", 1)
    assert scene.detector.outages == {}


async def test_a_shared_error_during_an_outage_requeues_the_job(scene: Scene) -> None:
    go_down(scene, S3)
    scene.images.fails_midway = TransientError(S3, "connection_error", "reset", is_duplicate=True)
    assert isinstance(await scene.process(delivery={"counted_attempts": 2}), Requeued)


async def test_a_shared_image_that_fails_while_it_is_sent_is_not_an_outage(scene: Scene) -> None:
    for n in range(10):
        scene.images.fails_midway = TransientError(S3, "connection_error", "reset", is_duplicate=n > 0)
        assert isinstance(await scene.process(id=f"job-{n}"), Retried)
    assert scene.detector.outages == {}


@pytest.mark.parametrize(
    "sign",
    [ANSWER, JobError(ErrorCode.MODEL_REJECTED, "no"), replace(ANSWER, text=None)],
    ids=["answer", "rejection", "empty"],
)
async def test_every_response_of_the_api_shows_that_it_is_up(scene: Scene, sign: Deed) -> None:
    go_down(scene, MODEL)
    scene.model.deeds = [sign]
    await scene.process()
    assert scene.detector.outages == {}


async def test_a_429_shows_that_the_api_is_up(scene: Scene) -> None:
    go_down(scene, MODEL)
    scene.model.deeds = [RateLimitedError(0.01), for_ever]
    task = asyncio.create_task(scene.process())
    while len(scene.model.asked) < 2:  # noqa: ASYNC110 - the fake has no event for it
        await asyncio.sleep(0.01)
    assert scene.detector.outages == {}
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize(
    ("source", "deeds", "is_sign"),
    [
        (S3Object("b", "k"), [], True),
        (S3Object("b", "k"), [JobError(ErrorCode.IMAGE_NOT_FOUND, "none")], True),
        (S3Object("b", "k"), [JobError(ErrorCode.IMAGE_FORBIDDEN, "denied")], False),
        (Link("https://h/"), [], False),
        (Embedded(memoryview(b"")), [], False),
    ],
    ids=["an image", "a missing one", "a forbidden one", "a link", "an embedded one"],
)
async def test_only_a_response_of_s3_shows_that_it_is_up(
    scene: Scene, source: Source, deeds: list[Deed], is_sign: bool
) -> None:
    go_down(scene, S3)
    scene.images.source, scene.images.deeds = source, deeds
    await scene.process()
    assert (scene.detector.outages == {}) is is_sign


async def test_a_403_fails_the_job_once_others_have_succeeded(scene: Scene) -> None:
    scene.model.deeds = [transient("http_403", refused=True)]
    assert isinstance(await scene.process(), Retried)
    assert isinstance(await scene.process(delivery={"counted_attempts": 1}), Retried)
    scene.model.deeds = [ANSWER]
    await scene.process(id="another")
    scene.model.deeds = [transient("http_403", refused=True)]
    assert refusal(await scene.process(delivery={"counted_attempts": 1})) == (
        ErrorCode.MODEL_REJECTED,
        "it said http_403",
    )


async def test_permanently_rejected_jobs_are_not_an_outage(scene: Scene) -> None:
    refused = transient("http_403", refused=True)
    for n in range(4):
        scene.model.deeds = [refused, ANSWER, refused]
        assert isinstance(await scene.process(id=f"job-{n}"), Retried)
        assert isinstance(await scene.process(id=f"good-{n}"), Succeeded)
        assert refusal(await scene.process(id=f"job-{n}"))[0] is ErrorCode.MODEL_REJECTED


async def test_a_key_that_is_revoked_while_idle_fails_no_job(scene: Scene) -> None:
    succeeds(scene)
    scene.model.deeds = [transient("http_403", refused=True)]
    outcomes = [
        await scene.process(id=f"job-{n}", delivery={"counted_attempts": a}) for n in range(5) for a in (0, 1)
    ]
    assert {type(outcome) for outcome in outcomes} <= {Retried, Requeued}
    assert isinstance(outcomes[-1], Requeued)


async def test_an_outage_that_continues_with_403_fails_no_job(scene: Scene) -> None:
    succeeds(scene)
    scene.model.deeds = [DependencyDownError(MODEL, "cannot be reached")]
    assert isinstance(await scene.process(), Requeued)
    scene.model.deeds = [transient("http_403", refused=True)]
    for _ in range(3):
        assert isinstance(await scene.process(), Requeued)
    assert set(scene.detector.outages) == {MODEL}


async def test_a_refused_job_whose_deadline_comes_before_its_next_try_fails(scene: Scene) -> None:
    for deadline_s in (0.5, 3):
        scene.model.deeds = [ANSWER, DependencyDownError(MODEL, "answered 401", may_be_the_jobs=True)]
        await scene.process(id="another")
        outcome = await scene.process(deadline=in_(deadline_s))
        if deadline_s > RETRY.delay_s(1):
            assert isinstance(outcome, Retried)
        else:
            assert refusal(outcome)[0] is ErrorCode.DEADLINE_EXCEEDED


async def test_jobs_of_a_paused_model_wait_without_a_request_or_a_counted_attempt() -> None:
    scene = Scene(has_several_models=True)
    scene.model.deeds = [DependencyDownError(MODEL, "it is missing", model="usual"), ANSWER]
    # After the shortest delay that lasts until the next probe.
    paused = Retried(job_id="job-1", model="usual", delay_s=1, attempts=1, reason="model_paused")
    for _ in range(3):
        assert await scene.process(delivery={"counted_attempts": 1}) == paused
    assert len(scene.model.asked) == 1
    assert isinstance(await scene.process(id="another", model="other"), Succeeded)
    assert (scene.detector.outages, set(scene.detector.paused_models)) == ({}, {"usual"})
    late = await scene.process(deadline=in_(0.5))
    assert refusal(late)[0] is ErrorCode.DEADLINE_EXCEEDED
    assert await scene.is_free()


async def test_an_overloaded_api_is_asked_again_like_one_that_limits_the_rate(scene: Scene) -> None:
    busy = RateLimitedError(0.01, "it says 503", is_overloaded=True)
    scene.model.deeds = [busy, busy, ANSWER]
    outcome = await scene.process()
    assert isinstance(outcome, Succeeded)
    assert (outcome.result.attempts, len(scene.model.asked)) == (1, 3)
    assert scene.detector.outages == {}


async def test_an_api_that_stays_overloaded_is_an_outage(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.resilience.outage_detector.OVERLOAD_S", 0.0)
    # Its own request began before its answer.
    monkeypatch.setattr(scene.detector, "_oldest_request", lambda: float("inf"))
    scene.model.deeds = [RateLimitedError(None, "it says 503", is_overloaded=True)]
    assert isinstance(await scene.process(), Requeued)
    assert "it says 503" in scene.detector.outages[MODEL].reason


async def test_a_malformed_answer_is_bought_twice_at_most(scene: Scene) -> None:
    scene.model.deeds = [transient("malformed_response")]
    assert isinstance(await scene.process(), Retried)
    later = {"counted_attempts": 1}
    first = await scene.process(delivery=later)
    assert isinstance(first, Retried)
    assert first.malformed_answers == 1
    outcome = await scene.process(delivery={**later, "malformed_answers": 1})
    assert isinstance(outcome, DeadLettered)
    assert outcome.code is ErrorCode.ATTEMPTS_EXHAUSTED


# The result store


class StoredLease:
    """The lease of a job; a stored answer is never replaced."""

    def __init__(self) -> None:
        self.answer: bytes | None = None
        self.draft: bytes | None = None
        self.is_settled = False
        self.is_writable = True
        self.put_deeds: list[Deed] = []

    async def put(self, answer: bytes) -> bytes:
        await _do(self.put_deeds)
        if self.is_writable:
            self.answer, self.is_settled = answer, True
        return answer

    async def put_draft(self, draft: bytes) -> bool:
        await _do(self.put_deeds)
        self.draft = draft
        return True


class FakeResultStore:
    """A result store in memory; `waits` runs before a lease is acquired."""

    def __init__(self) -> None:
        self.leases: dict[str, StoredLease] = {}
        self.claims = 0
        self.is_writable = True
        self.waits: Callable[[Callable[[], None]], Awaitable[None]] | None = None
        self.find_deeds: list[Deed] = []
        self.put_deeds: list[Deed] = []
        self.release_deeds: list[Deed] = []

    async def find(self, name: str) -> bytes | None:
        await _do(self.find_deeds)
        return self.leases[name].answer if name in self.leases else None

    @asynccontextmanager
    async def acquire(self, name: str, check_admission: Callable[[], None]) -> AsyncIterator[StoredLease]:
        self.claims += 1
        if self.waits is not None:
            await self.waits(check_admission)
        lease = self.leases.setdefault(name, StoredLease())
        lease.put_deeds, lease.is_writable = self.put_deeds, self.is_writable
        try:
            yield lease
        finally:
            await _do(self.release_deeds)


async def test_a_success_of_the_result_store_does_not_show_that_the_images_s3_is_up() -> None:
    scene = Scene(store=FakeResultStore())
    scene.images.deeds = [transient("timeout", dependency=S3)]
    outcomes = [await scene.process(id=f"job-{n}") for n in range(5)]
    assert isinstance(outcomes[-1], Requeued)
    assert set(scene.detector.outages) == {S3}
    await scene.process(id="the next")
    assert set(scene.detector.outages) == {S3}


async def test_while_admission_is_closed_only_a_probe_acquires_a_lease() -> None:
    store = FakeResultStore()
    scene = Scene(store=store)
    scene.limiter.close("paused")
    assert isinstance(await scene.process(), Requeued)
    assert store.claims == 0
    scene.limiter.allow_probe()
    assert isinstance(await scene.process(), Succeeded)
    assert store.claims == 1


async def test_when_admission_closes_no_job_waits_for_another_worker() -> None:
    store, waits = FakeResultStore(), asyncio.Event()

    async def wait(may_wait: Callable[[], None]) -> None:
        waits.set()
        while True:
            may_wait()
            await asyncio.sleep(0)

    store.waits = wait
    scene = Scene(store=store)
    job = asyncio.create_task(scene.process())
    await waits.wait()
    scene.limiter.close("the worker is shutting down")
    outcome = await job
    assert isinstance(outcome, Requeued)
    assert outcome.reason == "the worker is shutting down"


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("step", ["put_deeds", "release_deeds"])
async def test_a_job_that_is_cancelled_after_the_api_has_answered_publishes_the_answer(
    step: str, times: int
) -> None:
    """The answer is billed: a requeued job would be billed again."""
    store, reached = FakeResultStore(), asyncio.Event()

    async def hang() -> None:
        reached.set()
        await for_ever()

    setattr(store, step, [hang])
    scene = Scene(store=store)
    job = asyncio.create_task(scene.process())
    await reached.wait()
    for _ in range(times):
        job.cancel()
        await turns_of_the_loop()
    outcome = await job
    assert isinstance(outcome, Succeeded)
    assert outcome.result.answer == ANSWER.text
    assert await scene.is_free()


async def test_a_cancel_message_after_the_answer_of_the_api_has_no_effect() -> None:
    store, reached = FakeResultStore(), asyncio.Event()

    async def hang() -> None:
        reached.set()
        await for_ever()

    store.put_deeds = [hang]
    scene = Scene(store=store)
    job = asyncio.create_task(scene.process())
    await reached.wait()
    scene.cancelled_jobs.cancel("job-1")
    assert isinstance(await job, Succeeded)


async def test_an_outcome_says_what_to_do_if_it_cannot_be_published_once_its_answer_is_stored() -> None:
    store = FakeResultStore()
    scene, bare = Scene(store=store), Scene()
    for it in range(2):
        stored = await scene.process(delivery={"counted_attempts": it})
        assert isinstance(stored, Succeeded)
        assert isinstance(stored.if_unwritten, Requeued)
    assert len(scene.model.asked) == 1
    unstored = await bare.process()
    assert isinstance(unstored, Succeeded)
    assert unstored.if_unwritten is None
    # The store could not be reached.
    scene.model.deeds = [replace(ANSWER, text=None)]
    for store.is_writable in (False, True):
        empty = await scene.process(id="job-2")
        assert isinstance(empty, Failed)
        assert (empty.if_unwritten is not None) == store.is_writable


async def test_past_its_deadline_a_job_whose_answer_is_stored_is_answered() -> None:
    scene = Scene(store=FakeResultStore())
    assert isinstance(await scene.process(deadline=in_(1000)), Succeeded)
    outcome = await scene.process(deadline=in_(-1), delivery={"redelivered": True})
    assert isinstance(outcome, Succeeded)
    assert outcome.result.answer == ANSWER.text
    assert len(scene.model.asked) == 1


async def test_a_deadline_that_passes_while_another_worker_has_the_job_leaves_time_for_its_answer() -> None:
    store = FakeResultStore()

    async def wait(_: Callable[[], None]) -> None:
        # The other worker stores its answer, and this one has not seen it yet when the deadline passes.
        (lease,) = store.leases.values()
        lease.answer = stored
        await for_ever()

    scene = Scene(store=store)
    await scene.process()
    (lease,) = store.leases.values()
    stored, lease.answer = lease.answer, None
    store.waits = wait
    assert isinstance(await scene.process(deadline=in_(0.2)), Succeeded)
    assert len(scene.model.asked) == 1


@pytest.mark.parametrize(
    "deed",
    [None, DependencyDownError(Dependency.RESULT_STORE, "unreachable"), asyncio.Event().wait],
    ids=["holds nothing", "is down", "hangs"],
)
async def test_past_its_deadline_a_job_fails_if_the_store_has_no_answer(
    monkeypatch: pytest.MonkeyPatch, deed: Deed | None
) -> None:
    monkeypatch.setattr("worker.resilience.admission.STORED_ANSWER_TIMEOUT_S", 0.1)
    store = FakeResultStore()
    store.find_deeds = [] if deed is None else [deed]
    scene = Scene(store=store)
    assert refusal(await scene.process(deadline=in_(-1)))[0] is ErrorCode.DEADLINE_EXCEEDED
    assert (store.claims, scene.model.asked, scene.detector.outages) == (0, [], {})


async def test_a_403_for_everyone_is_an_outage(scene: Scene) -> None:
    scene.model.deeds = [transient("http_403", refused=True)]
    outcomes = [await scene.process(id=f"job-{n}") for n in range(5)]
    assert isinstance(outcomes[-1], Requeued)
    assert set(scene.detector.outages) == {MODEL}


@pytest.mark.parametrize("part", ["images", "model"])
async def test_an_outage_requeues_the_job_without_a_counted_attempt(scene: Scene, part: str) -> None:
    dependency = S3 if part == "images" else MODEL
    getattr(scene, part).deeds = [DependencyDownError(dependency, "check the key")]
    outcome = await scene.process(delivery={"counted_attempts": 2})
    assert outcome == Requeued(job_id="job-1", model="usual", reason="check the key")
    assert scene.detector.outages[dependency].reason == "check the key"
    assert await scene.is_free()


# 429


async def test_a_job_waits_after_a_429_without_a_counted_attempt(scene: Scene) -> None:
    scene.model.deeds = [RateLimitedError(0.1), RateLimitedError(0.1), ANSWER]
    started = time.monotonic()
    outcome = await scene.process()
    assert isinstance(outcome, Succeeded)
    assert outcome.result.attempts == 1
    assert time.monotonic() - started >= 0.2
    assert len(scene.model.asked) == 3
    # Fetched images are not held in memory during the pause.
    assert scene.images.loaded == 3


async def test_a_429_lowers_the_limit(scene: Scene) -> None:
    scene.model.deeds = [RateLimitedError(0.01), ANSWER]
    limiter = scene.limiter
    async with limiter.slot("usual"), limiter.slot("usual"), limiter.slot("usual"):
        task = asyncio.create_task(scene.process())
        await asyncio.sleep(0.5)
        assert len(scene.model.asked) == 1
    assert isinstance(await task, Succeeded)


@pytest.mark.parametrize(
    ("deed", "is_diagnosed"), [(ANSWER, False), (TransientError(MODEL, "http_5xx", "no"), True)]
)
async def test_only_a_transient_error_begins_the_stage_diagnose(
    scene: Scene, deed: Deed, is_diagnosed: bool
) -> None:
    scene.model.deeds = [deed]
    delivery = a_delivery(JOB)
    attempt = Attempt.from_delivery(delivery)
    await scene.processor.process(delivery, attempt)
    assert attempt.has_entered("diagnose") is is_diagnosed
    assert attempt.has_entered("model")


async def test_endless_429s_requeue_the_job_after_its_timeout() -> None:
    scene = Scene(job_timeout_s=0.8)
    scene.model.deeds = [RateLimitedError(0.05)]
    outcome = await scene.process(delivery={"counted_attempts": 2})
    assert isinstance(outcome, Requeued)
    assert "VQA_JOB_TIMEOUT" in outcome.reason
    assert len(scene.model.asked) > 1
    assert scene.detector.outages == {}


async def test_a_long_backoff_requeues_the_job_after_its_timeout() -> None:
    scene = Scene(job_timeout_s=0.5)
    scene.model.deeds = [RateLimitedError(3600.0)]
    assert isinstance(await scene.process(), Requeued)
    assert len(scene.model.asked) == 1


# Pause and stop


async def test_while_the_worker_is_paused_a_job_is_requeued(scene: Scene) -> None:
    scene.limiter.close("the worker is paused")
    assert await scene.process() == Requeued(job_id="job-1", model="usual", reason="the worker is paused")
    assert (scene.images.loaded, scene.model.asked) == (0, [])


async def test_a_paused_worker_still_fails_jobs_that_need_no_call(scene: Scene) -> None:
    scene.limiter.close("the worker is paused")
    assert refusal(await scene.process(deadline="2020-01-01T00:00:00Z"))[0] is ErrorCode.DEADLINE_EXCEEDED
    assert refusal(await scene.process(model="unheard-of"))[0] is ErrorCode.INVALID_JOB


@pytest.mark.parametrize("part", ["images", "model"])
async def test_a_cancelled_job_ends_at_once_and_releases_its_slot(part: str) -> None:
    scene = Scene(limit=1)
    getattr(scene, part).deeds = [for_ever]
    task = asyncio.create_task(scene.process())
    await turns_of_the_loop()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await scene.is_free()


# Bugs


@pytest.mark.parametrize("part", ["images", "model"])
async def test_a_bug_is_a_counted_attempt_and_its_message_is_not_published(
    scene: Scene, part: str, log: CapturingLogger
) -> None:
    getattr(scene, part).deeds = [KeyError(CANARY)]
    outcome = await scene.process(question=CANARY)
    assert outcome == Retried(job_id="job-1", model="usual", delay_s=1, attempts=1, reason="internal_error")
    (call,) = log.calls
    assert (call.method_name, call.args, call.kwargs["job_id"]) == ("error", ("internal_error",), "job-1")
    assert "KeyError" in call.kwargs["exception"]
    assert "test_processor.py" in call.kwargs["exception"]
    assert CANARY not in str(log.calls)
    # A bug is not a failure of a dependency.
    assert scene.detector.outages == {}


async def test_a_repeated_bug_dead_letters_the_job(scene: Scene, log: CapturingLogger) -> None:
    scene.model.deeds = [KeyError(CANARY)]
    outcome = await scene.process(question=CANARY, delivery={"counted_attempts": 2})
    assert isinstance(outcome, DeadLettered)
    assert outcome.code is ErrorCode.ATTEMPTS_EXHAUSTED
    assert "KeyError" in outcome.message
    assert CANARY not in outcome.message
    assert CANARY not in outcome.result.to_body().decode()
    assert CANARY not in str(log.calls)


async def test_bugs_in_many_jobs_are_not_an_outage(scene: Scene, log: CapturingLogger) -> None:
    scene.model.deeds = [KeyError(CANARY)]
    outcomes = [await scene.process(id=f"job-{n}") for n in range(10)]
    assert {type(outcome) for outcome in outcomes} == {Retried}
    assert len(log.calls) == 10


DEEDS: st.SearchStrategy[Deed] = st.sampled_from(
    [
        ANSWER,
        replace(ANSWER, text=None),
        transient("timeout"),
        transient("http_403", refused=True),
        transient("timeout", dependency=S3),
        DependencyDownError(MODEL, "unreachable"),
        DependencyDownError(S3, "unreachable"),
        RateLimitedError(1e-3),
        JobError(ErrorCode.MODEL_REJECTED, "no"),
        JobError(ErrorCode.IMAGE_NOT_FOUND, "none"),
        KeyError("bug"),
        TimeoutError(),
        OSError("bug"),
    ]
)


@given(
    images=st.lists(DEEDS, max_size=3),
    model=st.lists(DEEDS, max_size=3),
    jobs=st.lists(st.integers(0, 6), min_size=1, max_size=12),
    attempts=st.integers(0, 4),
)
async def test_every_job_has_an_outcome_and_releases_its_slot(
    images: list[Deed], model: list[Deed], jobs: list[int], attempts: int
) -> None:
    scene = Scene(limit=1)
    # The fakes end with an answer: 429s alone would never end.
    scene.images.deeds, scene.model.deeds = [*images, for_no_time], [*model, ANSWER]
    for number in jobs:
        outcome = await scene.process(id=f"job-{number}", delivery={"counted_attempts": attempts})
        assert outcome.job_id == f"job-{number}"
        if isinstance(outcome, Requeued):
            assert scene.detector.outages
        if isinstance(outcome, Retried):
            # Attempts that an outage caused are restored.
            assert 1 <= outcome.attempts <= attempts + 1
            assert outcome.attempts < RETRY.max_attempts
        if isinstance(outcome, Succeeded | Failed | DeadLettered):
            outcome.result.to_body()
    assert await scene.is_free()


async def for_no_time() -> None:
    pass
