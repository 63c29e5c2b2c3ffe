"""While a dependency is down: no flow of jobs, single trials at growing intervals, and then on again."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from itertools import pairwise

import pytest
from structlog.testing import CapturingLogger

from tests.running import until
from tests.unit.fakes import a_delivery, turns_of_the_loop
from worker.errors import Dependency
from worker.jobs.delivery import Delivery
from worker.jobs.in_flight_jobs import InFlightJobs
from worker.jobs.outcome import Outcome, Requeued, Retried
from worker.resilience import pause
from worker.resilience.concurrency_limiter import AdmissionClosedError, ConcurrencyLimiter
from worker.resilience.outage_detector import FIRST_SUCCESSES, Health
from worker.resilience.pause import PauseKeeper

MODEL, S3 = Dependency.MODEL, Dependency.S3
FIRST_S, LONGEST_S = 0.01, 0.04


class Queue:
    """Where jobs come from; a job given back goes to its end."""

    def __init__(self, jobs: int) -> None:
        self.events: list[str] = []
        self.jobs = deque(f"job-{n}" for n in range(jobs))
        self.asked_at: list[float] = []

    async def hold(self) -> None:
        self.events.append("hold")

    async def resume(self) -> None:
        self.events.append("resume")

    async def take_one(self) -> Delivery | None:
        self.asked_at.append(time.monotonic())
        return a_delivery(message_id=self.jobs.popleft()) if self.jobs else None


class Worker:
    """A pause keeper at work; every job that passes the gate is tried, and fails unless told otherwise."""

    def __init__(self, tasks: asyncio.TaskGroup, jobs: int) -> None:
        self.health = Health()
        self.gate = ConcurrencyLimiter(8, initial=8)
        self.queue = Queue(jobs)
        self.in_flight = InFlightJobs(tasks, self._process, self)
        self.tried: list[str | None] = []
        self.given_back: list[str | None] = []
        self.succeeds = False
        self.outcome: Outcome | None = None
        self.may_end = asyncio.Event()
        self.may_end.set()
        keeper = PauseKeeper(self.health, self.gate, self.queue, self.in_flight)
        self.keeping = tasks.create_task(keeper.run())

    async def _process(self, delivery: Delivery) -> Outcome:
        started = time.monotonic()
        try:
            async with self.gate.slot("m"):
                self.tried.append(delivery.message_id)
                await self.may_end.wait()
        except AdmissionClosedError:
            self.given_back.append(delivery.message_id)
        else:
            if self.succeeds:
                for dependency in self.health.outages:
                    self.health.succeeded(dependency, started, time.monotonic())
        return self.outcome or Requeued(job_id=delivery.message_id, model="m", reason="down")

    async def publish(self, delivery: Delivery, outcome: Outcome) -> Outcome:
        if isinstance(outcome, Requeued):
            self.queue.jobs.append(delivery.message_id or "")
        return outcome

    async def finish(self, delivery: Delivery, outcome: Outcome) -> None:
        assert isinstance(outcome, Requeued | Retried)
        await delivery.ack()

    def down(self, dependency: Dependency = MODEL) -> None:
        self.health.down(dependency, "the key is wrong", time.monotonic())

    async def resumed(self, times: int = 1) -> None:
        await until(lambda: self.queue.events.count("resume") == times, "the worker resumes")


@pytest.fixture(autouse=True)
def log(monkeypatch: pytest.MonkeyPatch) -> CapturingLogger:
    log = CapturingLogger()
    monkeypatch.setattr(pause, "log", log)
    monkeypatch.setattr(pause, "FIRST_TRIAL_S", FIRST_S)
    monkeypatch.setattr(pause, "LONGEST_TRIAL_S", LONGEST_S)
    return log


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    async with asyncio.TaskGroup() as tasks:
        worker = Worker(tasks, jobs=3)
        yield worker
        worker.keeping.cancel()
        worker.may_end.set()


async def test_as_long_as_everything_is_up_nothing_is_held(worker: Worker) -> None:
    worker.health.succeeded(MODEL, 0.0, 1.0)
    worker.health.failed(MODEL, "job", "http_5xx", 2.0)
    await asyncio.sleep(3 * FIRST_S)
    assert worker.queue.events == []
    async with worker.gate.slot("m"):
        pass


async def test_an_outage_closes_the_gate_and_holds_the_flow(worker: Worker, log: CapturingLogger) -> None:
    worker.may_end.clear()
    worker.down()
    await until(lambda: worker.queue.events == ["hold"], "the flow is held")
    with pytest.raises(AdmissionClosedError, match="paused"):
        async with worker.gate.slot("m"):
            pass
    assert log.calls[0].method_name == "error"
    assert log.calls[0].args == ("consumption_paused",)
    assert log.calls[0].kwargs == {"dependency": MODEL, "reason": "the key is wrong"}


async def test_jobs_that_wait_for_a_slot_go_back_at_once(worker: Worker) -> None:
    worker.may_end.clear()
    for n in range(10):
        worker.in_flight.accept(a_delivery(message_id=f"held-{n}"))
    await turns_of_the_loop()
    assert len(worker.tried) == 8
    worker.down()
    await until(lambda: len(worker.given_back) == 2, "those who wait go back")
    assert worker.given_back == ["held-8", "held-9"]


async def test_trials_are_made_with_one_job_after_the_other_at_growing_intervals(worker: Worker) -> None:
    began = time.monotonic()
    worker.down()
    await until(lambda: len(worker.tried) >= 5, "five trials")
    assert worker.tried[:5] == ["job-0", "job-1", "job-2", "job-0", "job-1"]
    moments = [began, *worker.queue.asked_at[:5]]
    waited = [later - earlier for earlier, later in pairwise(moments)]
    for seconds, least in zip(waited, (0.01, 0.02, 0.04, 0.04, 0.04), strict=True):
        assert seconds >= 0.95 * least


async def test_a_job_that_ends_without_meeting_what_is_down_lets_the_next_try_at_once(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pause, "LONGEST_TRIAL_S", 1000.0)
    worker.queue.jobs.extend(f"more-{n}" for n in range(10))
    worker.outcome = Retried(job_id="j", model="m", delay_s=1, attempts=1, reason="http_5xx")
    worker.down()
    # With growing intervals the thirteenth would come after a minute and a half.
    await until(lambda: len(worker.tried) == 13, "thirteen trials")


async def test_the_intervals_have_an_upper_end(worker: Worker) -> None:
    worker.down()
    # Growing on and on, the fifteenth would come after minutes.
    await until(lambda: len(worker.tried) >= 15, "fifteen trials")


async def test_the_next_trial_waits_for_the_end_of_the_last(worker: Worker) -> None:
    worker.may_end.clear()
    worker.down()
    await until(lambda: worker.tried, "the first trial")
    # Whatever else arrives meanwhile goes back.
    worker.in_flight.accept(a_delivery(message_id="late"))
    await asyncio.sleep(3 * LONGEST_S)
    assert worker.tried == ["job-0"]
    assert worker.given_back == ["late"]


async def test_an_empty_queue_is_asked_again_and_again(worker: Worker) -> None:
    jobs = worker.queue.jobs.copy()
    worker.queue.jobs.clear()
    worker.down()
    await until(lambda: len(worker.queue.asked_at) >= 3, "the queue is asked")
    assert worker.tried == []
    worker.succeeds = True
    worker.queue.jobs.extend(jobs)
    await worker.resumed()
    assert worker.tried == ["job-0"]


async def test_when_an_interval_is_over_an_empty_queue_is_looked_at_often(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the next job that comes is tried at once, and the worker resumes."""
    monkeypatch.setattr(pause, "_longer", lambda _: 1.0)
    worker.down()
    await until(lambda: worker.tried, "a trial")
    jobs = worker.queue.jobs.copy()
    worker.queue.jobs.clear()
    # Looked at once an interval, it would take longer than anybody waits.
    await until(lambda: len(worker.queue.asked_at) > 60, "sixty looks")
    worker.succeeds = True
    worker.queue.jobs.extend(jobs)
    await worker.resumed()


async def test_what_falls_over_again_soon_is_tried_at_longer_intervals_than_before(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pause, "LONGEST_TRIAL_S", 8 * FIRST_S)
    worker.succeeds = True
    waited = []
    for times in range(1, 6):
        began = time.monotonic()
        worker.down()
        await worker.resumed(times)
        waited.append(worker.queue.asked_at[-1] - began)
        worker.queue.jobs.append("one more")
    for seconds, least in zip(waited, (1, 2, 4, 8, 8), strict=True):
        assert seconds >= 0.95 * least * FIRST_S


async def test_an_outage_after_some_successes_is_tried_as_soon_as_the_first(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pause, "LONGEST_TRIAL_S", 1000.0)
    worker.succeeds = True
    # Doubled each time, the waits would come to hours.
    for times in range(1, 20):
        worker.queue.jobs.append("one more")
        worker.down()
        await worker.resumed(times)
        for _ in range(FIRST_SUCCESSES):
            worker.health.succeeded(MODEL, time.monotonic(), time.monotonic())


async def test_each_outage_is_told_once_when_it_comes_and_at_the_end_how_long_it_was(
    worker: Worker, log: CapturingLogger
) -> None:
    worker.down(MODEL)
    await until(lambda: len(worker.tried) >= 3, "three trials")
    worker.down(S3)
    await until(lambda: len(worker.tried) >= 6, "more trials")
    worker.succeeds = True
    await worker.resumed()
    told = [(call.args[0], call.kwargs.get("dependency")) for call in log.calls]
    assert told == [("consumption_paused", MODEL), ("consumption_paused", S3), ("consumption_resumed", None)]
    assert log.calls[-1].kwargs["after_s"] >= FIRST_S


async def test_an_outage_that_comes_back_within_a_pause_is_told_again(
    worker: Worker, log: CapturingLogger
) -> None:
    worker.down(MODEL)
    worker.down(S3)
    await until(lambda: len(worker.tried) >= 2, "two trials")
    worker.health.succeeded(MODEL, time.monotonic(), time.monotonic())
    count = len(worker.tried)
    await until(lambda: len(worker.tried) >= count + 2, "two more")
    worker.down(MODEL)
    await until(lambda: len(log.calls) == 3, "it is told")
    assert [call.kwargs["dependency"] for call in log.calls].count(MODEL) == 2


async def test_after_a_success_everything_flows_again(worker: Worker, log: CapturingLogger) -> None:
    worker.down()
    await until(lambda: len(worker.tried) >= 2, "two trials")
    worker.succeeds = True
    await worker.resumed()
    assert worker.queue.events == ["hold", "resume"]
    assert (log.calls[-1].method_name, log.calls[-1].args) == ("info", ("consumption_resumed",))
    count = len(worker.tried)
    for n in range(5):
        worker.in_flight.accept(a_delivery(message_id=f"new-{n}"))
    await worker.in_flight.drained()
    assert len(worker.tried) == count + 5


async def test_it_takes_both_dependencies_to_go_on(worker: Worker, log: CapturingLogger) -> None:
    worker.down(MODEL)
    worker.down(S3)
    await until(lambda: worker.tried, "a trial")
    assert {call.kwargs["dependency"] for call in log.calls} == {MODEL, S3}
    worker.health.succeeded(MODEL, time.monotonic(), time.monotonic())
    count = len(worker.tried)
    await until(lambda: len(worker.tried) > count + 1, "more trials")
    assert worker.queue.events == ["hold"]
    worker.health.succeeded(S3, time.monotonic(), time.monotonic())
    await worker.resumed()


async def test_one_outage_may_follow_another(worker: Worker) -> None:
    worker.succeeds = True
    for times in (1, 2, 3):
        worker.down(MODEL if times % 2 else S3)
        await worker.resumed(times)
    assert worker.queue.events == ["hold", "resume"] * 3


async def test_an_outage_that_was_over_before_anybody_looked_holds_nothing(worker: Worker) -> None:
    worker.down()
    worker.health.succeeded(MODEL, time.monotonic(), time.monotonic())
    await asyncio.sleep(3 * FIRST_S)
    assert worker.queue.events == []


async def test_a_stop_ends_the_waiting(worker: Worker) -> None:
    worker.down()
    await until(lambda: worker.tried, "a trial")
    worker.keeping.cancel()
    async with asyncio.timeout(20):
        await asyncio.gather(worker.keeping, return_exceptions=True)
    assert worker.queue.events == ["hold"]
