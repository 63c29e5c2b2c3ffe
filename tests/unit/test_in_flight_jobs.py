"""Each message is processed once, even if redelivered; each delivery is settled once."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from structlog.contextvars import get_contextvars
from structlog.testing import CapturingLogger

from tests.running import until
from tests.unit.fakes import TOPOLOGY, FakePublisher, a_delivery, turns_of_the_loop
from vqa_worker.messages.result import Result
from worker.jobs.attempt import Attempt
from worker.jobs.delivery import Delivery
from worker.jobs.in_flight_jobs import LOST_ACK_S, InFlightJobs
from worker.jobs.outcome import Outcome, Requeued, Retried, Succeeded
from worker.observability import metrics
from worker.rabbitmq.settlement import ReplyPolicy, Settlement


def answered(delivery: Delivery) -> Outcome:
    return Succeeded(
        job_id="j", model="m", result=Result(id="j", status="succeeded", answer=str(delivery.body))
    )


class Work:
    """A `process` function whose jobs end when `may_end` is set."""

    def __init__(self) -> None:
        self.started: list[Delivery] = []
        self.attempts: list[Attempt] = []
        self.cancelled = 0
        self.may_end = asyncio.Event()
        self.ends_with: Callable[[Delivery], Outcome] = answered

    async def __call__(self, delivery: Delivery, attempt: Attempt) -> Outcome:
        self.started.append(delivery)
        self.attempts.append(attempt)
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return self.ends_with(delivery)


class Connection:
    """The channel of a delivery; once it is lost, acks have no effect."""

    def __init__(self) -> None:
        self.lives = True

    def delivers(self, **properties: Any) -> tuple[Delivery, list[str]]:
        """Return a delivery that records its acks."""
        events: list[str] = []
        return a_delivery(events=events, can_ack=lambda: self.lives, **properties), events


class Worker:
    """All parts with a publisher that only records."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self.work = Work()
        self.publisher = FakePublisher()
        settlement = Settlement(self.publisher, TOPOLOGY, ReplyPolicy(["results"]))
        self.in_flight = InFlightJobs(tasks, self.work, settlement)
        self.connection = Connection()

    async def finish(self) -> None:
        """Let all jobs end; return when everything is settled."""
        self.work.may_end.set()
        async with asyncio.timeout(60):
            await self.in_flight.wait_until_drained()


@pytest.fixture(autouse=True)
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.rabbitmq.settlement.UNROUTABLE_DELAY_S", 0)


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    async with asyncio.TaskGroup() as tasks:
        worker = Worker(tasks)
        yield worker
        await worker.finish()


@pytest.fixture
def settlement_log(monkeypatch: pytest.MonkeyPatch) -> CapturingLogger:
    log = CapturingLogger()
    monkeypatch.setattr("worker.rabbitmq.settlement.log", log)
    return log


def running() -> float | None:
    return metrics.REGISTRY.get_sample_value("vqa_jobs_in_flight")


async def test_a_job_is_processed_then_published_then_acked(worker: Worker) -> None:
    delivery, events = worker.connection.delivers()
    worker.publisher.events = events
    handler = worker.in_flight.accept(delivery)
    await turns_of_the_loop()
    assert running() == 1
    assert not worker.in_flight.is_idle
    assert events == []
    worker.work.may_end.set()
    await handler
    assert events == ["confirmed results", "ack"]
    assert worker.in_flight.is_idle
    assert running() == 0


async def test_nothing_is_acked_before_the_publisher_confirm(worker: Worker) -> None:
    delivery, events = worker.connection.delivers()
    worker.publisher.let_go.clear()
    worker.work.may_end.set()
    handler = worker.in_flight.accept(delivery)
    await turns_of_the_loop(30)
    assert events == []
    assert running() == 1
    assert not handler.done()
    worker.publisher.let_go.set()
    await handler
    assert events == ["ack"]


async def test_a_redelivery_of_a_running_job_is_attached_to_it(worker: Worker) -> None:
    first, first_events = worker.connection.delivers()
    worker.in_flight.accept(first)
    await turns_of_the_loop()
    worker.connection.lives = False
    second, second_events = Connection().delivers(redelivered=True)
    worker.in_flight.accept(second)
    await turns_of_the_loop()
    assert running() == 1
    await worker.finish()
    assert len(worker.work.started) == 1
    assert len(worker.publisher.results()) == 1
    assert second_events == ["ack"]
    assert "reject" not in first_events


async def test_a_redelivery_while_the_result_is_unconfirmed_adds_no_second_result(
    worker: Worker,
) -> None:
    worker.publisher.let_go.clear()
    worker.work.may_end.set()
    worker.in_flight.accept(worker.connection.delivers()[0])
    await turns_of_the_loop()
    worker.connection.lives = False
    again, events = Connection().delivers(redelivered=True)
    worker.in_flight.accept(again)
    await turns_of_the_loop()
    worker.publisher.let_go.set()
    await worker.finish()
    assert len(worker.work.started) == 1
    assert len(worker.publisher.results()) == 1
    assert events == ["ack"]


async def test_a_redelivery_after_the_result_is_only_acked(worker: Worker) -> None:
    worker.work.may_end.set()
    await worker.in_flight.accept(worker.connection.delivers()[0])
    worker.connection.lives = False
    for _ in range(3):
        # The ack is lost several times.
        connection = Connection()
        again, events = connection.delivers(redelivered=True)
        await worker.in_flight.accept(again)
        assert events == ["ack"]
        connection.lives = False
    assert len(worker.work.started) == 1
    assert len(worker.publisher.results()) == 1


async def test_a_redelivered_job_that_did_not_end_here_is_processed(worker: Worker) -> None:
    # Another worker had it and crashed.
    delivery, events = worker.connection.delivers(redelivered=True)
    worker.in_flight.accept(delivery)
    await worker.finish()
    assert len(worker.publisher.results()) == 1
    assert events == ["ack"]


async def test_a_message_that_the_publisher_sent_twice_is_answered_twice(worker: Worker) -> None:
    both = [worker.connection.delivers() for _ in range(2)]
    for delivery, _ in both:
        worker.in_flight.accept(delivery)
    await turns_of_the_loop()
    await worker.finish()
    assert len(worker.publisher.results()) == 2
    assert [events for _, events in both] == [["ack"], ["ack"]]


async def test_a_message_that_the_publisher_sends_again_later_is_processed_again(worker: Worker) -> None:
    worker.work.may_end.set()
    for count in (1, 2, 3):
        await worker.in_flight.accept(worker.connection.delivers()[0])
        assert len(worker.work.started) == count
    assert len(worker.publisher.results()) == 3


async def test_a_message_that_is_sent_again_after_a_lost_connection_is_not_a_redelivery(
    worker: Worker,
) -> None:
    worker.work.may_end.set()
    await worker.in_flight.accept(worker.connection.delivers()[0])
    worker.connection.lives = False
    again, events = Connection().delivers()
    await worker.in_flight.accept(again)
    assert len(worker.work.started) == 2
    assert len(worker.publisher.results()) == 2
    assert events == ["ack"]


async def test_a_lost_connection_with_one_of_two_duplicates_settled_loses_no_result(
    worker: Worker,
) -> None:
    """The connection is lost with the ack of the first and before the end of the second."""
    worker.work.may_end.set()
    await worker.in_flight.accept(worker.connection.delivers()[0])
    worker.connection.lives = False
    connection = Connection()
    both = [connection.delivers(redelivered=True) for _ in range(2)]
    for delivery, _ in both:
        await worker.in_flight.accept(delivery)
    assert len(worker.publisher.results()) == 2
    assert [events for _, events in both] == [["ack"], ["ack"]]


@pytest.mark.parametrize(
    "difference",
    [
        {"message_id": "m-2"}, {"message_id": None}, {"correlation_id": "c"}, {"reply_to": "results.a"},
        {"counted_attempts": 1}, {"copy": "c"}, {"body": b"{} "},
    ],
    ids=str,
)  # fmt: skip
async def test_messages_that_differ_are_different_jobs(worker: Worker, difference: dict[str, Any]) -> None:
    worker.in_flight.accept(worker.connection.delivers()[0])
    worker.in_flight.accept(worker.connection.delivers(redelivered=True, **difference)[0])
    await turns_of_the_loop()
    assert len(worker.work.started) == 2


async def test_the_delivery_count_does_not_change_the_identity_of_a_job(worker: Worker) -> None:
    worker.in_flight.accept(worker.connection.delivers()[0])
    await turns_of_the_loop()
    worker.connection.lives = False
    worker.in_flight.accept(Connection().delivers(redelivered=True, deliveries=2)[0])
    await turns_of_the_loop()
    assert len(worker.work.started) == 1


async def test_a_job_that_is_cancelled_at_shutdown_is_requeued(worker: Worker) -> None:
    several = [worker.connection.delivers(message_id=f"m-{n}", counted_attempts=n) for n in range(3)]
    for delivery, _ in several:
        worker.in_flight.accept(delivery)
    await turns_of_the_loop()
    worker.in_flight.cancel_all()
    async with asyncio.timeout(60):
        await worker.in_flight.wait_until_drained()
    assert worker.work.cancelled == 3
    assert [message.message_id for message in worker.publisher.to("jobs")] == ["m-0", "m-1", "m-2"]
    assert [message.headers.get("vqa-attempts") for message in worker.publisher.published] == [None, 1, 2]
    assert [events for _, events in several] == [["ack"]] * 3


async def test_a_job_cancelled_at_the_end_of_the_grace_period_keeps_restored_attempts_and_id(
    worker: Worker, settlement_log: CapturingLogger
) -> None:
    delivery, _ = worker.connection.delivers(message_id="m-1", counted_attempts=3)
    worker.in_flight.accept(delivery)
    await turns_of_the_loop()
    # The job was read, and an outage caused two of its three attempts.
    (attempt,) = worker.work.attempts
    attempt.job_id, attempt.allowed_model = "job-1", "llama"
    attempt.restore_attempts(2)
    worker.in_flight.cancel_all()
    async with asyncio.timeout(60):
        await worker.in_flight.wait_until_drained()
    (copy,) = worker.publisher.to("jobs")
    assert copy.headers["vqa-attempts"] == 1
    (line,) = [call.kwargs for call in settlement_log.calls if call.args == ("job_requeued",)]
    assert (line["job_id"], line["model"]) == ("job-1", "llama")


async def test_a_job_cancelled_before_it_was_read_is_logged_with_its_message_id(
    worker: Worker, settlement_log: CapturingLogger
) -> None:
    worker.in_flight.accept(worker.connection.delivers(message_id="m-1")[0])
    await turns_of_the_loop()
    worker.in_flight.cancel_all()
    async with asyncio.timeout(60):
        await worker.in_flight.wait_until_drained()
    (line,) = [call.kwargs for call in settlement_log.calls if call.args == ("job_requeued",)]
    assert line["job_id"] == "m-1"


async def test_a_result_that_waits_for_its_confirm_is_not_cancelled(worker: Worker) -> None:
    worker.publisher.let_go.clear()
    worker.work.may_end.set()
    worker.in_flight.accept(worker.connection.delivers()[0])
    await turns_of_the_loop()
    worker.in_flight.cancel_all()
    worker.publisher.let_go.set()
    await worker.finish()
    assert len(worker.publisher.results()) == 1
    assert worker.publisher.to("jobs") == []


async def test_a_delivery_that_cannot_be_requeued_is_left_unsettled(worker: Worker) -> None:
    delivery, events = worker.connection.delivers()
    worker.publisher.let_go.clear()
    handler = worker.in_flight.accept(delivery)
    await turns_of_the_loop()
    worker.in_flight.cancel_all()
    await turns_of_the_loop()
    worker.in_flight.abandon_all()
    async with asyncio.timeout(60):
        await worker.in_flight.wait_until_drained()
    assert handler.cancelled()
    assert events == []
    assert worker.publisher.published == []


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> CapturingLogger:
    log = CapturingLogger()
    monkeypatch.setattr("worker.jobs.in_flight_jobs.log", log)
    return log


async def test_a_bug_in_the_settlement_rejects_the_message_so_that_the_broker_dead_letters_it(
    worker: Worker, log: CapturingLogger
) -> None:
    delivery, events = worker.connection.delivers()
    worker.publisher.broken = KeyError("the question of the job")
    worker.work.may_end.set()
    await worker.in_flight.accept(delivery)
    assert events == ["reject"]
    (call,) = log.calls
    assert (call.method_name, call.args) == ("error", ("settlement_failed",))
    assert "KeyError" in call.kwargs["exception"]
    assert "question" not in str(call.kwargs)


async def test_a_bug_in_the_processing_affects_that_message_only(
    worker: Worker, log: CapturingLogger
) -> None:
    def fails(_: Delivery) -> Outcome:
        raise ZeroDivisionError("the question of the job")

    bad, bad_events = worker.connection.delivers()
    worker.in_flight.accept(bad)
    await turns_of_the_loop()
    worker.work.ends_with = fails
    worker.work.may_end.set()
    await until(lambda: bad_events, "the message is settled")
    assert bad_events == ["reject"]
    assert "question" not in str(log.calls)

    worker.work.ends_with = answered
    good, good_events = worker.connection.delivers(message_id="m-2")
    await worker.in_flight.accept(good)
    assert good_events == ["ack"]


async def test_after_a_failed_settlement_the_message_can_be_redelivered(
    worker: Worker, log: CapturingLogger
) -> None:
    worker.publisher.broken = KeyError()
    worker.work.may_end.set()
    await worker.in_flight.accept(worker.connection.delivers()[0])
    assert log.calls
    worker.publisher.broken = None
    again, events = worker.connection.delivers(redelivered=True)
    await worker.in_flight.accept(again)
    assert len(worker.work.started) == 2
    assert len(worker.publisher.results()) == 1
    assert events == ["ack"]


async def test_a_job_that_was_left_to_the_broker_and_redelivered_is_processed_again(worker: Worker) -> None:
    """Also after a lost connection: no lost ack has to be repeated."""
    worker.publisher.full.add("jobs")
    worker.work.ends_with = lambda _: Requeued(job_id="j", model="m", reason="paused")
    worker.work.may_end.set()
    delivery, events = worker.connection.delivers()
    assert await worker.in_flight.accept(delivery) is None
    assert events[-1] == "requeue"
    worker.connection.lives = False
    worker.work.ends_with = answered
    again, events = Connection().delivers(redelivered=True)
    await worker.in_flight.accept(again)
    assert len(worker.work.started) == 2
    assert events[-1] == "ack"


async def test_drained_also_waits_for_jobs_that_arrive_meanwhile(worker: Worker) -> None:
    worker.in_flight.accept(worker.connection.delivers()[0])
    drained = asyncio.create_task(worker.in_flight.wait_until_drained())
    await turns_of_the_loop()
    worker.in_flight.accept(worker.connection.delivers(message_id="m-2")[0])
    await turns_of_the_loop()
    assert not drained.done()
    worker.work.may_end.set()
    async with asyncio.timeout(60):
        await drained
    assert len(worker.publisher.results()) == 2


async def test_the_time_in_the_queue_is_measured_once_per_job(worker: Worker) -> None:
    def measured() -> float:
        return metrics.REGISTRY.get_sample_value("vqa_job_queue_seconds_count") or 0

    before = measured()
    worker.in_flight.accept(worker.connection.delivers(queued_s=1.0)[0])
    await turns_of_the_loop()
    worker.connection.lives = False
    worker.in_flight.accept(Connection().delivers(queued_s=2.0, redelivered=True)[0])
    worker.in_flight.accept(Connection().delivers(queued_s=None, message_id="m-2")[0])
    await turns_of_the_loop()
    assert measured() == before + 1


async def test_a_requeued_or_retried_job_is_remembered_like_any_other(worker: Worker) -> None:
    worker.work.ends_with = lambda _: Requeued(job_id="j", model="m", reason="paused")
    worker.work.may_end.set()
    await worker.in_flight.accept(worker.connection.delivers()[0])
    worker.connection.lives = False
    again, events = Connection().delivers(redelivered=True)
    await worker.in_flight.accept(again)
    assert events == ["ack"]
    # Its copy is another message and is processed.
    (copy,) = worker.publisher.to("jobs")
    await worker.in_flight.accept(Connection().delivers(copy=copy.headers["vqa-copy"])[0])
    assert len(worker.work.started) == 2


@pytest.mark.parametrize(
    "outcome",
    [
        Requeued(job_id="j", model="m", reason="paused"),
        Retried(job_id="j", model="m", delay_s=1, attempts=1, reason="http_5xx"),
    ],
    ids=["requeued", "retried"],
)
async def test_a_job_that_was_left_to_the_broker_is_not_copied(worker: Worker, outcome: Outcome) -> None:
    """The broker may have delivered it to another worker already: a copy would duplicate it."""
    worker.work.ends_with = lambda _: outcome
    lost, events = worker.connection.delivers()
    handler = worker.in_flight.accept(lost)
    await turns_of_the_loop()
    worker.connection.lives = False
    worker.work.may_end.set()
    assert await handler is None
    assert (worker.publisher.published, events) == ([], [])
    # A redelivery is processed like a first delivery.
    again, events = Connection().delivers(redelivered=True)
    assert await worker.in_flight.accept(again) == outcome
    assert (len(worker.publisher.published), events) == (1, ["ack"])
    assert len(worker.work.started) == 2


async def test_an_equal_message_long_after_an_ack_is_a_new_job(worker: Worker) -> None:
    worker.work.may_end.set()
    await worker.in_flight.accept(worker.connection.delivers()[0])
    worker.connection.lives = False
    much_later = time.monotonic() + LOST_ACK_S + 1
    again, _ = Connection().delivers(redelivered=True, received_at=much_later)
    await worker.in_flight.accept(again)
    assert len(worker.publisher.results()) == 2


async def test_the_snapshot_lists_the_oldest_delivery_first(worker: Worker) -> None:
    now = time.monotonic()
    young, _ = worker.connection.delivers(received_at=now - 1, message_id="young", counted_attempts=2)
    old, _ = worker.connection.delivers(received_at=now - 5, message_id="old", body={"secret": "of the job"})
    for delivery in (young, old):
        worker.in_flight.accept(delivery)
    await turns_of_the_loop()
    attempt = worker.work.attempts[0]
    attempt.job_id, attempt.allowed_model = "read", "m"
    attempt.enter("model", time.monotonic())
    first, second = worker.in_flight.snapshot()

    assert (first["job_id"], first["stage"], first["attempts"], first["model"]) == ("old", "decode", 1, None)
    assert (second["job_id"], second["stage"], second["attempts"], second["model"]) == (
        "read",
        "model",
        3,
        "m",
    )
    assert first["age_s"] == first["stage_s"] >= 5
    assert second["age_s"] >= 1 > second["stage_s"]
    assert "secret" not in str(first)


async def test_a_redelivery_of_a_running_job_shows_that_jobs_stage(worker: Worker) -> None:
    first, _ = worker.connection.delivers()
    worker.in_flight.accept(first)
    await turns_of_the_loop()
    worker.work.attempts[0].enter("model", time.monotonic())
    worker.connection.lives = False
    worker.in_flight.accept(Connection().delivers(redelivered=True)[0])
    await turns_of_the_loop()
    assert [job["stage"] for job in worker.in_flight.snapshot()] == ["model", "model"]
    await worker.finish()
    assert worker.in_flight.snapshot() == []


async def test_a_job_that_waits_for_its_confirm_is_in_stage_publish(worker: Worker) -> None:
    worker.publisher.let_go.clear()
    worker.work.may_end.set()
    handler = worker.in_flight.accept(worker.connection.delivers()[0])
    await turns_of_the_loop(30)
    assert [job["stage"] for job in worker.in_flight.snapshot()] == ["publish"]
    worker.publisher.let_go.set()
    await handler


async def test_the_trace_of_a_message_is_on_every_line_about_it(worker: Worker) -> None:
    seen: list[dict[str, Any]] = []

    def looks(delivery: Delivery) -> Outcome:
        seen.append(get_contextvars())
        return answered(delivery)

    worker.work.ends_with = looks
    worker.work.may_end.set()
    for trace in ({"traceparent": f"00-{'a' * 32}-{'b' * 16}-00"}, {}):
        delivery, _ = worker.connection.delivers(trace=trace, message_id=str(trace))
        await worker.in_flight.accept(delivery)
    assert seen == [{"trace_id": "a" * 32}, {}]
    assert get_contextvars() == {}
