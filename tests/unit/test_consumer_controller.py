"""The prefetch follows the limiter; in an outage it is 0, with single probe jobs at growing intervals."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import CapturingLogger

from tests.unit.fake_clock import FakeClock
from tests.unit.fakes import a_delivery, cancel_all, turns_of_the_loop
from vqa_worker.messages.error_codes import ErrorCode
from worker.clock import Clock
from worker.errors import (
    REASONS_OF_BAD_JOBS,
    Dependency,
    DependencyDownError,
    Explanation,
    NotAdmittedError,
    RateLimitedError,
    TransientError,
)
from worker.jobs.attempt import Attempt
from worker.jobs.delivery import Delivery
from worker.jobs.outcome import Outcome, Requeued, Retried
from worker.jobs.outcome_builder import OutcomeBuilder
from worker.observability.redaction import Redactor
from worker.resilience import consumer_controller
from worker.resilience.concurrency_limiter import LASTING_LIMIT_S, ConcurrencyLimiter
from worker.resilience.consumer_controller import (
    ADJUST_INTERVAL_S,
    FIRST_PROBE_DELAY_S,
    MAX_PROBE_INTERVAL_S,
    ConsumerController,
    next_prefetch,
)
from worker.resilience.outage_detector import SUCCESSES_TO_RECOVER, OutageDetector, Success

MODEL, S3 = Dependency.MODEL, Dependency.S3
MAXIMUM = 200
RETRIED = Retried(job_id="j", model="m", delay_s=1, attempts=1, reason="http_5xx")
DEAD = OutcomeBuilder(Redactor(()), Clock()).dead_lettered(
    Attempt.from_delivery(a_delivery()), ErrorCode.ATTEMPTS_EXHAUSTED, Explanation.loggable("it failed")
)


class Consumer:
    """A queue; a requeued job goes to its end."""

    def __init__(self, clock: FakeClock, jobs: int) -> None:
        self._clock = clock
        self.applied: list[int] = []
        self.jobs = deque(f"job-{n}" for n in range(jobs))
        self.asked_at: list[float] = []

    async def set_prefetch(self, prefetch: int) -> None:
        self.applied.append(prefetch)

    async def get_one(self) -> Delivery | None:
        self.asked_at.append(self._clock.monotonic())
        return a_delivery(message_id=self.jobs.popleft()) if self.jobs else None


class Worker:
    """A running controller; each job takes a slot, and is requeued unless `succeeds`."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.detector = OutageDetector()
        self.limiter = ConcurrencyLimiter(MAXIMUM, initial=32, clock=self.clock)
        self.consumer = Consumer(self.clock, jobs=3)
        self.started: list[str | None] = []
        self.rejected: list[str | None] = []
        self.succeeds = False
        self.is_left_to_broker = False
        self.downs = 0
        self.outcome: Outcome | None = None
        self.may_finish = asyncio.Event()
        self.may_be_settled = asyncio.Event()
        self.may_finish.set()
        self.may_be_settled.set()
        self.tasks: set[asyncio.Task[Outcome | None]] = set()
        self.controller = ConsumerController(
            self.detector,
            self.limiter,
            consumer=self.consumer,
            jobs=self,
            maximum=MAXIMUM,
            clock=self.clock,
        )
        self.controlling = asyncio.create_task(self.controller.run())

    @property
    def unsettled(self) -> int:
        return len(self.tasks)

    def accept(self, delivery: Delivery) -> asyncio.Task[Outcome | None]:
        task = asyncio.create_task(self._process(delivery))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def accept_jobs(self, count: int) -> None:
        for n in range(count):
            self.accept(a_delivery(message_id=f"new-{n}"))

    async def _process(self, delivery: Delivery) -> Outcome | None:
        outcome = await self._run(delivery)
        await self.may_be_settled.wait()
        if isinstance(outcome, Requeued):
            self.consumer.jobs.append(delivery.message_id or "")
        return None if self.is_left_to_broker else outcome

    async def _run(self, delivery: Delivery) -> Outcome:
        started = self.clock.monotonic()
        try:
            async with self.limiter.slot("m"):
                self.started.append(delivery.message_id)
                await self.may_finish.wait()
        except NotAdmittedError:
            self.rejected.append(delivery.message_id)
        else:
            if self.succeeds:
                for dependency in self.detector.outages:
                    self.detector.observe(dependency, "job", Success(started), self.clock.monotonic())
        return self.outcome or Requeued(job_id=delivery.message_id, model="m", reason="down")

    def go_down(self, dependency: Dependency = MODEL) -> None:
        error = DependencyDownError(dependency, "the key is wrong")
        self.downs += 1
        self.detector.observe(dependency, f"job {self.downs}", error, self.clock.monotonic())

    async def down(self, dependency: Dependency = MODEL) -> None:
        self.go_down(dependency)
        await turns_of_the_loop()

    def up(self, dependency: Dependency = MODEL) -> None:
        now = self.clock.monotonic()
        self.detector.observe(dependency, "job", Success(now), now)

    async def meet_429(self, retry_after_s: float | None) -> None:
        async with self.limiter.slot("m") as slot:
            slot.rate_limited(RateLimitedError(retry_after_s))


@pytest.fixture(autouse=True)
def log(monkeypatch: pytest.MonkeyPatch) -> CapturingLogger:
    log = CapturingLogger()
    monkeypatch.setattr(consumer_controller, "log", log)
    return log


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    worker = Worker()
    await turns_of_the_loop()
    yield worker
    await cancel_all([worker.controlling, *worker.tasks])


def logged(log: CapturingLogger) -> list[tuple[str, Dependency | None]]:
    events = [(call.args[0], call.kwargs.get("dependency")) for call in log.calls]
    return [event for event in events if event[0] != "prefetch_changed"]


# The next prefetch


@pytest.mark.parametrize(
    ("prefetch", "wanted", "unsettled", "then"),
    [
        pytest.param(200, 200, 200, 200, id="no change"),
        pytest.param(200, 120, 200, 200, id="slightly less: no change"),
        pytest.param(200, 40, 200, 0, id="much less: none until most are settled"),
        pytest.param(0, 40, 100, 0, id="more unsettled than wanted"),
        pytest.param(0, 40, 40, 40, id="no more unsettled than wanted"),
        pytest.param(0, 0, 0, 0, id="none wanted"),
        pytest.param(0, 200, 150, 50, id="unsettled jobs count towards the maximum"),
        pytest.param(40, 47, 40, 40, id="slightly more: no change"),
        pytest.param(40, 60, 40, 60, id="much more"),
        pytest.param(190, 200, 190, 200, id="the maximum is always applied"),
        pytest.param(40, 200, 80, 160, id="jobs delivered before count towards the maximum"),
        pytest.param(3, 0, 3, 0, id="a long Retry-After"),
    ],
)
def test_the_next_prefetch(prefetch: int, wanted: int, unsettled: int, then: int) -> None:
    assert next_prefetch(prefetch, wanted, unsettled, maximum=200) == then


@given(
    maximum=st.integers(1, 300),
    wishes=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=50),
)
def test_unsettled_jobs_never_exceed_the_maximum_and_there_are_some_if_some_are_wanted(
    maximum: int, wishes: list[tuple[float, float]]
) -> None:
    # An endless queue: each consumer gets as many jobs as its prefetch.
    prefetch, current, earlier = maximum, maximum, 0
    for wish, share_settled in wishes:
        before, wanted = prefetch, round(wish * maximum)
        prefetch = next_prefetch(prefetch, wanted, current + earlier, maximum)
        if prefetch < before:
            earlier += current
        current = prefetch
        assert current + earlier <= maximum
        earlier -= round(share_settled * earlier)
    for _ in range(4):
        prefetch = next_prefetch(prefetch, maximum, prefetch, maximum)
    assert prefetch == maximum


# Following the limiter


async def test_without_429s_the_prefetch_stays_at_the_maximum(worker: Worker) -> None:
    async with worker.limiter.slot("m") as slot:
        slot.succeeded()
    await worker.clock.advance(10 * ADJUST_INTERVAL_S)
    assert worker.consumer.applied == []


async def test_after_a_429_no_jobs_come_until_most_are_settled_and_then_as_many_as_wanted(
    worker: Worker,
) -> None:
    worker.may_finish.clear()
    worker.accept_jobs(10)
    await turns_of_the_loop()
    await worker.meet_429(None)
    await worker.clock.advance(ADJUST_INTERVAL_S)
    assert worker.consumer.applied == [0]
    worker.may_finish.set()
    await worker.clock.advance(10 * ADJUST_INTERVAL_S)
    assert worker.consumer.applied == [0, worker.limiter.target_prefetch()]
    assert 1 <= worker.consumer.applied[-1] < 100


async def test_jobs_that_are_being_published_are_added_to_the_limiter_s_target(worker: Worker) -> None:
    await worker.meet_429(None)
    await worker.clock.advance(2 * ADJUST_INTERVAL_S)
    assert worker.consumer.applied == [0, worker.limiter.target_prefetch()]
    worker.may_be_settled.clear()
    worker.accept_jobs(60)
    await worker.clock.advance(20 * ADJUST_INTERVAL_S)
    assert worker.limiter.slots_and_waiting() == 0
    assert worker.consumer.applied[-1] > 40


async def test_during_a_long_retry_after_no_jobs_come_until_shortly_before_its_end(worker: Worker) -> None:
    await worker.meet_429(3600.0)
    await worker.clock.advance(3590.0)
    assert worker.consumer.applied == [0]
    await worker.clock.advance(10.0)
    assert worker.consumer.applied == [0, 2]


async def test_with_calls_of_20_s_a_maximum_of_200_is_reached_in_three_rounds(worker: Worker) -> None:
    """Calls that begin together end together, and the prefetch lets new ones come in time."""

    async def call() -> None:
        async with worker.limiter.slot("m") as slot:
            await worker.clock.sleep(20.0)
            slot.succeeded()

    async def deliver() -> None:
        """Keep as many jobs unsettled as the prefetch allows."""
        while True:
            prefetch = (worker.consumer.applied or [MAXIMUM])[-1]
            for _ in range(prefetch - len(worker.tasks)):
                task = asyncio.create_task(call())
                worker.tasks.add(task)
                task.add_done_callback(worker.tasks.discard)
            await worker.clock.sleep(0.1)

    delivering = asyncio.create_task(deliver())
    await worker.clock.advance(3 * 21.0)
    assert worker.limiter.slots_in_use == MAXIMUM
    await cancel_all([delivering])


# Outages


async def test_a_failure_that_is_not_an_outage_changes_nothing(worker: Worker) -> None:
    worker.up()
    failure = TransientError(MODEL, "http_5xx", "it failed")
    worker.detector.observe(MODEL, "job", failure, worker.clock.monotonic())
    await worker.clock.advance(10.0)
    assert worker.consumer.applied == []
    async with worker.limiter.slot("m"):
        pass


async def test_an_outage_closes_the_limiter_and_stops_consuming(worker: Worker, log: CapturingLogger) -> None:
    await worker.down()
    assert worker.consumer.applied == [0]
    with pytest.raises(NotAdmittedError, match="paused"):
        async with worker.limiter.slot("m"):
            pass
    assert log.calls[0].method_name == "error"
    assert log.calls[0].args == ("consumption_paused",)
    assert log.calls[0].kwargs == {"dependency": MODEL, "reason": "the key is wrong"}


async def test_an_outage_rejects_the_jobs_that_wait_for_a_slot(worker: Worker) -> None:
    worker.may_finish.clear()
    worker.accept_jobs(34)
    await turns_of_the_loop()
    assert len(worker.started) == 32
    await worker.down()
    assert worker.rejected == ["new-32", "new-33"]


async def test_probes_take_one_job_after_another_at_growing_intervals(worker: Worker) -> None:
    moments = [worker.clock.monotonic()]
    await worker.down()
    await worker.clock.advance(200.0)
    moments += worker.consumer.asked_at
    assert worker.started[:5] == ["job-0", "job-1", "job-2", "job-0", "job-1"]
    waited = [later - earlier for earlier, later in pairwise(moments)]
    assert waited[:8] == [1, 2, 4, 8, 16, MAX_PROBE_INTERVAL_S, MAX_PROBE_INTERVAL_S, MAX_PROBE_INTERVAL_S]


async def test_a_probe_whose_job_does_not_use_the_dependency_is_followed_at_once_by_the_next(
    worker: Worker,
) -> None:
    worker.consumer.jobs.extend(f"more-{n}" for n in range(10))
    worker.outcome = RETRIED
    await worker.down()
    await worker.clock.advance(2 * FIRST_PROBE_DELAY_S)
    assert len(worker.started) == 13


@pytest.mark.parametrize(
    "outcome", [*(replace(RETRIED, reason=reason) for reason in sorted(REASONS_OF_BAD_JOBS)), DEAD]
)
async def test_a_probe_that_may_show_the_outage_is_not_followed_at_once(
    worker: Worker, outcome: Outcome
) -> None:
    """Its attempt may count, and be its last, but the outage lasts."""
    worker.outcome = outcome
    await worker.down()
    await worker.clock.advance(2 * FIRST_PROBE_DELAY_S)
    assert len(worker.started) == 1


async def test_a_probe_whose_job_is_left_to_the_broker_is_not_followed_at_once(worker: Worker) -> None:
    """RabbitMQ returns such a job, for example if it cannot be published."""
    worker.is_left_to_broker = True
    await worker.down()
    await worker.clock.advance(2 * FIRST_PROBE_DELAY_S)
    assert len(worker.started) == 1


async def test_the_next_probe_waits_for_the_end_of_the_last(worker: Worker) -> None:
    worker.may_finish.clear()
    await worker.down()
    await worker.clock.advance(FIRST_PROBE_DELAY_S)
    worker.accept(a_delivery(message_id="late"))
    await worker.clock.advance(100.0)
    assert worker.started == ["job-0"]
    assert worker.rejected == ["late"]


async def test_a_job_that_arrives_in_an_empty_queue_is_tried_within_the_first_interval(
    worker: Worker,
) -> None:
    await worker.down()
    await worker.clock.advance(100.0)
    started = len(worker.started)
    jobs = worker.consumer.jobs.copy()
    worker.consumer.jobs.clear()
    await worker.clock.advance(100.0)
    assert len(worker.started) == started
    worker.succeeds = True
    worker.consumer.jobs.extend(jobs)
    await worker.clock.advance(FIRST_PROBE_DELAY_S)
    assert len(worker.started) == started + 1
    assert worker.consumer.applied == [0, MAXIMUM]


async def test_after_a_relapse_probes_are_less_frequent(worker: Worker) -> None:
    worker.succeeds, worker.outcome = True, RETRIED
    waited = []
    for _ in range(7):
        worker.consumer.jobs.append("one more")
        started = worker.clock.monotonic()
        await worker.down()
        while worker.detector.outages:
            await worker.clock.advance(0.5)
        waited.append(worker.consumer.asked_at[-1] - started)
    assert waited == [1, 2, 4, 8, 16, MAX_PROBE_INTERVAL_S, MAX_PROBE_INTERVAL_S]


async def test_a_rate_limit_that_lasts_is_logged_once_with_the_words_of_the_api(
    worker: Worker, log: CapturingLogger
) -> None:
    async with worker.limiter.slot("m") as slot:
        slot.rate_limited(RateLimitedError(None, "Daily requests used up"))
        await worker.clock.advance(3 * LASTING_LIMIT_S)
        (warning,) = [call for call in log.calls if call.args == ("rate_limit_lasts",)]
        assert warning.method_name == "warning"
        assert (warning.kwargs["model"], warning.kwargs["reason"]) == ("m", "Daily requests used up")
        slot.succeeded()
        await worker.clock.advance(1)
        slot.rate_limited(RateLimitedError(None, "again"))
        await worker.clock.advance(2 * LASTING_LIMIT_S)
    assert [call.kwargs["reason"] for call in log.calls if call.args == ("rate_limit_lasts",)][1:] == [
        "again"
    ]


async def test_an_outage_after_some_successes_starts_with_the_first_probe_interval(worker: Worker) -> None:
    worker.succeeds = True
    for _ in range(20):
        worker.consumer.jobs.append("one more")
        await worker.down()
        await worker.clock.advance(FIRST_PROBE_DELAY_S)
        assert worker.detector.outages == {}
        for _ in range(SUCCESSES_TO_RECOVER):
            worker.up()


async def test_each_outage_is_logged_once_and_its_end_with_its_duration(
    worker: Worker, log: CapturingLogger
) -> None:
    await worker.down(MODEL)
    await worker.clock.advance(10.0)
    await worker.down(S3)
    await worker.clock.advance(30.0)
    worker.succeeds = True
    await worker.clock.advance(MAX_PROBE_INTERVAL_S)
    assert logged(log) == [
        ("consumption_paused", MODEL),
        ("consumption_paused", S3),
        ("consumption_resumed", None),
    ]
    (resumed,) = [call for call in log.calls if call.args == ("consumption_resumed",)]
    assert resumed.method_name == "info"
    assert resumed.kwargs["after_s"] == 61


async def test_an_outage_that_returns_during_a_pause_is_logged_again(
    worker: Worker, log: CapturingLogger
) -> None:
    await worker.down(MODEL)
    await worker.down(S3)
    await worker.clock.advance(10.0)
    worker.up(MODEL)
    await worker.clock.advance(60.0)
    await worker.down(MODEL)
    await worker.clock.advance(60.0)
    assert [dependency for _, dependency in logged(log)].count(MODEL) == 2


async def test_after_a_successful_probe_the_worker_consumes_again(worker: Worker) -> None:
    await worker.down()
    await worker.clock.advance(10.0)
    worker.succeeds = True
    await worker.clock.advance(10.0)
    assert worker.consumer.applied == [0, MAXIMUM]
    count = len(worker.started)
    worker.accept_jobs(5)
    await turns_of_the_loop()
    assert len(worker.started) == count + 5


async def test_the_worker_consumes_only_after_the_end_of_all_outages(worker: Worker) -> None:
    await worker.down(MODEL)
    await worker.down(S3)
    await worker.clock.advance(10.0)
    worker.up(MODEL)
    await worker.clock.advance(60.0)
    assert worker.consumer.applied == [0]
    worker.up(S3)
    await worker.clock.advance(MAX_PROBE_INTERVAL_S)
    assert worker.consumer.applied == [0, MAXIMUM]


async def test_one_outage_may_follow_another(worker: Worker) -> None:
    worker.succeeds = True
    for dependency in (MODEL, S3, MODEL):
        worker.consumer.jobs.append("one more")
        await worker.down(dependency)
        await worker.clock.advance(10.0)
    assert worker.consumer.applied == [0, MAXIMUM] * 3


async def test_an_outage_that_ends_at_once_does_not_pause_consumption(worker: Worker) -> None:
    worker.go_down()
    worker.up()
    await worker.clock.advance(10.0)
    assert worker.consumer.applied == []


async def test_a_stop_ends_a_pause(worker: Worker) -> None:
    await worker.down()
    await worker.clock.advance(10.0)
    await cancel_all([worker.controlling])
    assert worker.controlling.cancelled()
    assert worker.consumer.applied == [0]
