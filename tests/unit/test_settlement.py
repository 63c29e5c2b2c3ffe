"""Each outcome is published and confirmed first, then acked, then counted and logged."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest
from structlog.testing import CapturingLogger

from tests.running import until
from tests.unit.fakes import TOPOLOGY, FakePublisher, a_delivery, turns_of_the_loop
from vqa_worker.messages.error_codes import ErrorCode
from vqa_worker.messages.result import JobFailure, Result, Timings, Usage
from vqa_worker.rabbitmq.outgoing import OutgoingMessage
from worker.errors import UnwrittenResultError
from worker.jobs.outcome import DeadLettered, Failed, Outcome, Requeued, Retried, Succeeded
from worker.observability import metrics
from worker.rabbitmq import settlement
from worker.rabbitmq.settlement import LargeResultPolicy, ReplyPolicy, Settlement
from worker.rabbitmq.topology import Topology

POLICY = ReplyPolicy(["results", "results.*", "amq.rabbitmq.reply-to.*", "amq.gen-*"])
ANSWER = "The answer that nobody else may read."
USAGE = Usage(prompt_tokens=3, completion_tokens=4, total_tokens=7, cost_usd=0.5)
SUCCEEDED = Result(
    id="j", status="succeeded", answer=ANSWER, usage=USAGE, finish_reason="stop", timings=Timings(model_s=1.5)
)
FAILED = Result(
    id="j", status="failed", error=JobFailure(code=ErrorCode.INVALID_JOB, message=ANSWER, retryable=False)
)
ANSWERED = Succeeded(job_id="j", model="m", result=SUCCEEDED)
REFUSED = Failed(job_id="j", model="m", result=FAILED, code=ErrorCode.MODEL_REJECTED, reason="refused")
DEAD = DeadLettered(
    job_id="j",
    model="m",
    result=FAILED,
    code=ErrorCode.ATTEMPTS_EXHAUSTED,
    message="why",
    reason="exhausted",
    attempts=5,
)
UNREADABLE = replace(
    DEAD, job_id=None, code=ErrorCode.INVALID_JOB, result=FAILED.model_copy(update={"id": None})
)
RETRY = Retried(job_id="j", model="m", delay_s=5, attempts=2, reason="timeout")
JOBS_REQUEUED = Requeued(job_id="j", model="m", reason="paused")


@pytest.fixture(autouse=True)
def log(monkeypatch: pytest.MonkeyPatch) -> CapturingLogger:
    log = CapturingLogger()
    monkeypatch.setattr(settlement, "log", log)
    monkeypatch.setattr(settlement, "UNROUTABLE_DELAY_S", 0)
    return log


async def settled(
    outcome: Outcome,
    *,
    topology: Topology = TOPOLOGY,
    publisher: FakePublisher | None = None,
    large_results: LargeResultPolicy | None = None,
    **properties: Any,
) -> tuple[list[OutgoingMessage], list[str]]:
    """Settle a delivery; return the published messages and all events in order."""
    events: list[str] = []
    publisher = publisher or FakePublisher()
    publisher.events = events
    settlement = Settlement(publisher, topology, POLICY, large_results=large_results)
    delivery = a_delivery(events=events, **properties)
    published = await settlement.publish(delivery, outcome)
    assert "ack" not in events
    if published is not None:
        await settlement.finish(delivery, published)
    return publisher.published, events


@pytest.mark.parametrize(
    ("outcome", "queues"),
    [
        (ANSWERED, ["results"]),
        (REFUSED, ["results"]),
        (DEAD, ["results", "jobs.dead"]),
        (RETRY, ["jobs.retry.5s"]),
        (JOBS_REQUEUED, ["jobs"]),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_each_outcome_is_published_to_its_queues_before_the_ack(
    outcome: Outcome, queues: list[str]
) -> None:
    published, events = await settled(outcome)
    assert [message.routing_key for message in published] == queues
    assert events == [*(f"confirmed {queue}" for queue in queues), "ack"]


async def test_a_published_message_is_a_result_or_a_copy_of_the_job() -> None:
    body = {"id": "j"}
    for outcome in (ANSWERED, REFUSED):
        (reply,), _ = await settled(outcome, body=body)
        assert reply.body == outcome.result.to_body()
    for unsettled in (RETRY, JOBS_REQUEUED):
        (copy,), _ = await settled(unsettled, body=body)
        assert json.loads(copy.body) == body
    (reply, dead), _ = await settled(DEAD, body=body)
    assert reply.body == FAILED.to_body()
    assert json.loads(dead.body) == body
    assert (dead.headers["vqa-error-code"], dead.headers["vqa-error-message"]) == (
        "attempts_exhausted",
        "why",
    )
    assert dead.headers["vqa-attempts"] == 5


async def test_a_retry_carries_its_attempts_and_a_requeued_job_the_previous_ones() -> None:
    (retry,), _ = await settled(RETRY, counted_attempts=1)
    assert retry.headers["vqa-attempts"] == 2
    (back,), _ = await settled(JOBS_REQUEUED, counted_attempts=1)
    assert back.headers["vqa-attempts"] == 1


# Who gets a result


async def test_an_unreadable_message_without_a_recipient_is_only_dead_lettered() -> None:
    published, _ = await settled(UNREADABLE, message_id=None)
    assert [message.routing_key for message in published] == ["jobs.dead"]


@pytest.mark.parametrize(
    ("sign", "queue"),
    [
        ({"message_id": "m"}, "results"),
        ({"message_id": "not\nprintable"}, "results"),
        ({"correlation_id": "c"}, "results"),
        ({"reply_to": "results.a"}, "results.a"),
        ({"reply_to": "somewhere.else"}, "results"),
    ],
    ids=str,
)
async def test_an_unreadable_message_with_a_recipient_gets_a_result_and_is_dead_lettered(
    sign: dict[str, Any], queue: str
) -> None:
    properties: dict[str, Any] = {"message_id": None, **sign}
    published, _ = await settled(UNREADABLE, **properties)
    assert [message.routing_key for message in published] == [queue, "jobs.dead"]
    assert json.loads(published[0].body)["id"] is None


async def test_an_unreadable_message_with_an_id_gets_a_result() -> None:
    published, _ = await settled(replace(UNREADABLE, job_id="m"), message_id=None)
    assert [message.routing_key for message in published] == ["results", "jobs.dead"]


@pytest.mark.parametrize(
    ("reply_to", "queue"),
    [
        (None, "results"),
        ("results", "results"),
        ("results.a", "results.a"),
        ("results.", "results."),
        ("results.a.b", "results.a.b"),
        ("amq.gen-abc", "amq.gen-abc"),
        ("amq.rabbitmq.reply-to.g1h2", "amq.rabbitmq.reply-to.g1h2"),
        ("Results.a", "results"),
        ("my.results.a", "results"),
        ("jobs", "results"),
        ("jobs.dead", "results"),
        ("amq.rabbitmq.reply-to", "results"),
        ("results\n.a", "results"),
        ("*", "results"),
        ("", "results"),
    ],
)
async def test_only_an_allowed_reply_queue_replaces_the_results_queue(
    reply_to: str | None, queue: str
) -> None:
    (reply,), _ = await settled(ANSWERED, reply_to=reply_to)
    assert reply.routing_key == queue


async def test_with_no_reply_queue_allowed_everything_goes_to_the_results() -> None:
    assert ReplyPolicy([]).queue_for(a_delivery(reply_to="results.a"), "results") == "results"


REPLY_EXCHANGE = replace(TOPOLOGY, reply_exchange="replies")


async def test_results_use_the_reply_exchange_and_jobs_the_default_one() -> None:
    for reply_to in (None, "results.a"):
        (reply, dead), _ = await settled(DEAD, topology=REPLY_EXCHANGE, reply_to=reply_to)
        assert (reply.exchange, dead.exchange) == ("replies", "")
    for outcome in (RETRY, JOBS_REQUEUED):
        (copy,), _ = await settled(outcome, topology=REPLY_EXCHANGE)
        assert copy.exchange == ""


async def test_copies_of_jobs_use_the_jobs_exchange_and_results_do_not() -> None:
    topology = replace(TOPOLOGY, jobs_exchange="back")
    (reply, dead), _ = await settled(DEAD, topology=topology)
    assert (reply.exchange, dead.exchange) == ("", "back")
    for outcome in (RETRY, JOBS_REQUEUED):
        (copy,), _ = await settled(outcome, topology=topology)
        assert copy.exchange == "back"


async def test_a_direct_reply_uses_the_default_exchange_and_is_not_mandatory() -> None:
    publisher = FakePublisher()
    queue = "amq.rabbitmq.reply-to.g1h2"
    publisher.unroutable.add(queue)
    (reply,), events = await settled(ANSWERED, topology=REPLY_EXCHANGE, publisher=publisher, reply_to=queue)
    assert (reply.exchange, reply.routing_key, reply.mandatory) == ("", queue, False)
    assert events == [f"confirmed {queue}", "ack"]


async def test_a_direct_reply_that_closes_the_connection_each_time_goes_to_the_results_queue() -> None:
    """RabbitMQ closes it for some invalid names: endless retries of one job would stop the worker."""
    publisher = FakePublisher()
    queue = "amq.rabbitmq.reply-to.made.up"
    publisher.fatal.add(queue)
    (reply,), events = await settled(ANSWERED, topology=REPLY_EXCHANGE, publisher=publisher, reply_to=queue)
    assert events == [f"given up {queue}", "confirmed results", "ack"]
    assert (reply.exchange, reply.mandatory, reply.tries) == ("replies", True, None)
    assert reply.headers["vqa-undeliverable-to"] == queue


# Undeliverable messages


async def test_a_result_whose_queue_is_missing_goes_to_the_results_queue() -> None:
    publisher = FakePublisher()
    publisher.unroutable.add("results.a")
    (reply,), events = await settled(ANSWERED, publisher=publisher, reply_to="results.a", correlation_id="c")
    assert events == ["returned results.a", "confirmed results", "ack"]
    assert reply.headers["vqa-undeliverable-to"] == "results.a"
    assert reply.correlation_id == "c"
    assert publisher.restored == 0


@pytest.mark.parametrize(
    ("outcome", "queue"),
    [(ANSWERED, "results"), (RETRY, "jobs.retry.5s"), (JOBS_REQUEUED, "jobs"), (DEAD, "jobs.dead")],
    ids=lambda value: str(value) if isinstance(value, str) else type(value).__name__,
)
async def test_a_missing_queue_of_the_worker_is_declared_again_and_then_used(
    outcome: Outcome, queue: str, log: CapturingLogger
) -> None:
    publisher = FakePublisher()
    publisher.unroutable.add(queue)
    published, events = await settled(outcome, publisher=publisher)
    assert publisher.restored == 1
    assert published[-1].routing_key == queue
    assert events[-3:] == [f"returned {queue}", f"confirmed {queue}", "ack"]
    assert events.count(f"returned {queue}") == 1
    assert "vqa-undeliverable-to" not in published[-1].headers
    assert log.calls[0].args == ("queue_missing",)
    assert log.calls[0].kwargs["queue"] == queue


async def test_a_result_without_any_queue_waits_for_the_results_queue() -> None:
    publisher = FakePublisher()
    publisher.unroutable |= {"results.a", "results"}
    (reply,), events = await settled(ANSWERED, publisher=publisher, reply_to="results.a")
    assert events == ["returned results.a", "returned results", "confirmed results", "ack"]
    assert reply.headers["vqa-undeliverable-to"] == "results.a"


async def test_the_result_is_published_before_the_dead_letter() -> None:
    """After a crash in between the job is redelivered, and the publisher does not wait forever."""
    publisher = FakePublisher()
    publisher.let_go.clear()
    delivery = a_delivery()
    task = asyncio.create_task(Settlement(publisher, TOPOLOGY, POLICY).publish(delivery, DEAD))
    await turns_of_the_loop()
    assert publisher.published == []
    publisher.let_go.set()
    await task
    assert [message.routing_key for message in publisher.published] == ["results", "jobs.dead"]


@pytest.mark.parametrize(
    ("outcome", "queue", "last"),
    [(RETRY, "jobs.retry.5s", "requeue"), (JOBS_REQUEUED, "jobs", "requeue"), (DEAD, "jobs.dead", "reject")],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
@pytest.mark.parametrize("fault", ["full", "missing permanently", "too large"])
async def test_a_job_whose_copy_is_refused_is_left_to_the_broker(
    outcome: Outcome, queue: str, last: str, fault: str, log: CapturingLogger
) -> None:
    """The delivery is not held until the broker's consumer timeout closes the channel."""
    publisher = Stubborn(queue) if fault == "missing permanently" else FakePublisher()
    body = json.dumps({"id": "j"}).encode()
    if fault == "full":
        publisher.full.add(queue)
    if fault == "too large":
        publisher.most_bytes = 9_000
        body += b" " * 10_000
    published, events = await settled(outcome, publisher=publisher, body=body)
    assert [message.routing_key for message in published] == (["results"] if outcome is DEAD else [])
    settlings = [event for event in events if event in {"ack", "reject", "requeue"}]
    # Only the first settlement of a delivery has an effect.
    assert settlings[0] == last
    assert ("job_left_to_broker",) in [call.args for call in log.calls]


class Stubborn(FakePublisher):
    """Publisher whose queue cannot be declared again."""

    def __init__(self, queue: str) -> None:
        super().__init__()
        self.unroutable.add(queue)

    async def restore_topology(self) -> None:
        self.restored += 1


async def test_a_copy_of_a_job_that_the_broker_lost_is_published_until_it_is_confirmed() -> None:
    """The connection or queue was lost: nothing can be requeued, and this may be the only copy."""
    publisher, lives = Stubborn("jobs"), True
    delivery = a_delivery(can_ack=lambda: lives)
    lives = False
    task = asyncio.create_task(Settlement(publisher, TOPOLOGY, POLICY).publish(delivery, JOBS_REQUEUED))
    await until(lambda: publisher.restored > 20, "many tries")
    publisher.unroutable.clear()
    assert await task == JOBS_REQUEUED
    assert [message.routing_key for message in publisher.published] == ["jobs"]


async def test_a_result_is_published_until_it_is_confirmed() -> None:
    publisher = Stubborn("results")
    task = asyncio.create_task(Settlement(publisher, TOPOLOGY, POLICY).publish(a_delivery(), ANSWERED))
    await until(lambda: publisher.restored > 20, "many tries")
    publisher.unroutable.clear()
    assert await task == ANSWERED


async def test_a_missing_queue_is_logged_once(log: CapturingLogger) -> None:
    await settled(JOBS_REQUEUED, publisher=Stubborn("jobs"))
    assert [call.args for call in log.calls].count(("queue_missing",)) == 1


@pytest.mark.parametrize("reply_to", [None, "results.a"])
async def test_a_result_that_is_too_large_is_replaced_by_a_failed_one_with_the_usage(
    reply_to: str | None, log: CapturingLogger
) -> None:
    publisher = FakePublisher()
    publisher.most_bytes = 1000
    result = SUCCEEDED.model_copy(update={"answer": "x" * 1000, "metadata": {"a": 1}})
    (reply,), events = await settled(replace(ANSWERED, result=result), publisher=publisher, reply_to=reply_to)
    body = json.loads(reply.body)
    assert reply.routing_key == (reply_to or "results")
    assert (body["status"], body["error"]["code"]) == ("failed", "result_too_large")
    assert "1000 bytes" in body["error"]["message"]
    assert (body["answer"], body["response"]) == (None, None)
    assert body["usage"]["total_tokens"] == USAGE.total_tokens
    assert body["metadata"] == {"a": 1}
    assert events[-1] == "ack"
    assert log.calls[-1].kwargs["error"] == "result_too_large"


LARGE = SUCCEEDED.model_copy(
    update={
        "answer": "x" * 1000,
        "parsed": ["x" * 1000],
        "response": {"x": "x" * 1000},
        "metadata": {"a": 1},
        "images": [],
    }
)
URL = "s3://bucket/large/1.json"
REQUEUED = Requeued(job_id="j", model="m", reason="unwritten")


class Writer:
    """Writes large results nowhere."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.written: list[bytes] = []

    async def write(self, result: Result, body: bytes) -> str:
        if self.error is not None:
            raise self.error
        assert body == result.to_body()
        self.written.append(body)
        return URL

    def policy(self, max_bytes: int | None = None) -> LargeResultPolicy:
        return LargeResultPolicy(max_bytes, self.write)


@pytest.mark.parametrize(
    ("outcome", "queues"),
    [
        (replace(ANSWERED, result=LARGE), ["results"]),
        (replace(REFUSED, result=LARGE), ["results"]),
        (replace(DEAD, result=LARGE), ["results", "jobs.dead"]),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("limit", ["of the broker", "of the setting"])
async def test_a_result_that_is_too_large_is_written_and_its_message_has_the_rest_and_the_url(
    outcome: Outcome, queues: list[str], limit: str, log: CapturingLogger
) -> None:
    publisher, writer = FakePublisher(), Writer()
    publisher.most_bytes = 1000 if limit == "of the broker" else None
    policy = writer.policy(1000 if limit == "of the setting" else None)
    published, events = await settled(outcome, publisher=publisher, large_results=policy)
    assert [message.routing_key for message in published] == queues
    assert writer.written == [LARGE.to_body()]
    short = {"answer": None, "parsed": None, "response": None, "result_url": URL}
    assert json.loads(published[0].body) == {**LARGE.model_dump(mode="json"), **short}
    assert events[-1] == "ack"
    (call,) = log.calls
    assert (call.kwargs["result_url"], call.kwargs["outcome"]) == (URL, outcome.name)


async def test_the_broker_s_limit_is_tried_once() -> None:
    publisher, writer = FakePublisher(), Writer()
    publisher.most_bytes = 1000
    settlement = Settlement(publisher, TOPOLOGY, POLICY, large_results=writer.policy())
    for _ in range(3):
        assert await settlement.publish(a_delivery(), replace(ANSWERED, result=LARGE))
        # Smaller results are published.
        assert await settlement.publish(a_delivery(), ANSWERED) == ANSWERED
    assert publisher.refused == 1
    assert [it["result_url"] for it in publisher.results()] == [URL, None] * 3


async def test_without_s3_every_large_result_is_tried_since_the_limit_may_have_been_raised() -> None:
    publisher = FakePublisher()
    publisher.most_bytes = 1000
    settlement = Settlement(publisher, TOPOLOGY, POLICY)
    assert await settlement.publish(a_delivery(), replace(ANSWERED, result=LARGE))
    publisher.most_bytes = None
    assert await settlement.publish(a_delivery(), replace(ANSWERED, result=LARGE))
    failed, whole = publisher.results()
    assert failed["error"]["code"] == "result_too_large"
    assert "set VQA_LARGE_RESULTS" in failed["error"]["message"]
    assert (failed["answer"], failed["parsed"], failed["response"]) == (None, None, None)
    assert whole["answer"] == LARGE.answer


@pytest.mark.parametrize("outcome", [ANSWERED, REFUSED, DEAD], ids=lambda outcome: type(outcome).__name__)
async def test_a_large_result_that_cannot_be_written_and_is_stored_nowhere_is_a_failed_one(
    outcome: Any, log: CapturingLogger
) -> None:
    policy = Writer(UnwrittenResultError("S3 says no")).policy(1000)
    (reply,), events = await settled(replace(outcome, result=LARGE), large_results=policy)
    body = json.loads(reply.body)
    assert (body["status"], body["error"]["code"]) == ("failed", "result_too_large")
    assert body["error"]["message"].endswith("could not be written to VQA_LARGE_RESULTS: S3 says no")
    assert (body["answer"], body["result_url"]) == (None, None)
    assert body["usage"]["total_tokens"] == USAGE.total_tokens
    assert events[-1] == "ack"
    assert log.calls[-1].kwargs["error"] == "result_too_large"


@pytest.mark.parametrize("outcome", [ANSWERED, REFUSED], ids=lambda outcome: type(outcome).__name__)
async def test_a_large_result_that_cannot_be_written_and_whose_answer_is_stored_is_requeued(
    outcome: Any,
) -> None:
    policy = Writer(UnwrittenResultError("S3 says no")).policy(1000)
    stored = replace(outcome, result=LARGE, if_unwritten=REQUEUED)
    (copy,), events = await settled(stored, large_results=policy, counted_attempts=1)
    assert (copy.routing_key, copy.headers["vqa-attempts"]) == ("jobs", 1)
    assert events == ["confirmed jobs", "ack"]


async def test_a_large_result_that_cannot_be_written_is_left_to_the_broker_if_it_has_the_job_again() -> None:
    policy = Writer(UnwrittenResultError("S3 says no")).policy(1000)
    stored = replace(ANSWERED, result=LARGE, if_unwritten=REQUEUED)
    published, events = await settled(stored, large_results=policy, can_ack=lambda: False)
    assert (published, events) == ([], [])


async def test_a_result_that_is_too_large_without_its_answer_is_a_failed_one() -> None:
    publisher, result = FakePublisher(), LARGE.model_copy(update={"finish_reason": "y" * 1000})
    publisher.refuses = b'"result_url":"'
    (reply,), _ = await settled(
        replace(ANSWERED, result=result), publisher=publisher, large_results=Writer().policy(1000)
    )
    error = json.loads(reply.body)["error"]
    assert error["code"] == "result_too_large"
    assert "also without its answer" in error["message"]


@pytest.mark.parametrize("outcome", [DEAD, RETRY, JOBS_REQUEUED], ids=lambda outcome: type(outcome).__name__)
async def test_a_copy_of_a_job_that_is_too_large_is_left_to_the_broker_and_no_result_is_written(
    outcome: Outcome,
) -> None:
    publisher, writer = FakePublisher(), Writer()
    publisher.refuses = b"question"
    published, events = await settled(
        outcome, publisher=publisher, large_results=writer.policy(), body={"question": "?"}
    )
    assert [message.routing_key for message in published] == ["results"] * isinstance(outcome, DeadLettered)
    assert ("reject" if isinstance(outcome, DeadLettered) else "requeue") in events
    assert writer.written == []


async def test_a_job_is_requeued_only_when_that_is_allowed() -> None:
    wait_until_requeue_is_safe = asyncio.Event()
    publisher = FakePublisher()
    delivery = a_delivery(wait_until_requeue_is_safe=wait_until_requeue_is_safe.wait)
    settlement = Settlement(publisher, TOPOLOGY, POLICY)
    task = asyncio.create_task(settlement.publish(delivery, JOBS_REQUEUED))
    await turns_of_the_loop()
    assert publisher.published == []
    wait_until_requeue_is_safe.set()
    assert await task == JOBS_REQUEUED
    assert [message.routing_key for message in publisher.published] == ["jobs"]


# Metrics and logs


def value(name: str, **labels: str) -> float:
    return metrics.REGISTRY.get_sample_value(name, labels) or 0.0


@pytest.mark.parametrize(
    ("outcome", "name", "labels"),
    [
        (ANSWERED, "vqa_jobs_total", {"status": "succeeded", "error": "", "model": "m"}),
        (REFUSED, "vqa_jobs_total", {"status": "failed", "error": "model_rejected", "model": "m"}),
        (DEAD, "vqa_jobs_total", {"status": "failed", "error": "attempts_exhausted", "model": "m"}),
        (DEAD, "vqa_dead_letters_total", {"reason": "attempts_exhausted"}),
        (RETRY, "vqa_retries_total", {"reason": "timeout"}),
        (ANSWERED, "vqa_job_duration_seconds_count", {"status": "succeeded", "model": "m"}),
        (REFUSED, "vqa_job_duration_seconds_count", {"status": "failed", "model": "m"}),
        (JOBS_REQUEUED, "vqa_stage_duration_seconds_count", {"stage": "publish", "model": "m"}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
async def test_each_outcome_is_counted(outcome: Outcome, name: str, labels: dict[str, str]) -> None:
    before = value(name, **labels)
    await settled(outcome)
    assert value(name, **labels) == before + 1


@pytest.mark.parametrize("outcome", [RETRY, JOBS_REQUEUED], ids=lambda outcome: type(outcome).__name__)
async def test_an_unfinished_job_is_not_counted_as_finished(outcome: Outcome) -> None:
    def ended() -> float:
        samples = [sample for metric in metrics.JOBS.collect() for sample in metric.samples]
        return sum(sample.value for sample in samples if sample.name == "vqa_jobs_total")

    before = ended()
    await settled(outcome)
    assert ended() == before


@pytest.mark.parametrize(
    ("outcome", "level", "event"),
    [
        (ANSWERED, "info", "job_finished"),
        (REFUSED, "warning", "job_finished"),
        (DEAD, "error", "job_finished"),
        (RETRY, "warning", "job_retried"),
        (JOBS_REQUEUED, "debug", "job_requeued"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
async def test_each_outcome_is_one_log_line_without_question_or_answer(
    outcome: Outcome, level: str, event: str, log: CapturingLogger
) -> None:
    await settled(outcome, body={"question": ANSWER})
    (call,) = log.calls
    assert (call.method_name, call.args) == (level, (event,))
    assert call.kwargs["job_id"] == "j"
    assert call.kwargs.get("reason") == getattr(outcome, "reason", None)
    assert ANSWER not in str(call.kwargs)


async def test_the_log_line_has_tokens_cost_and_timings(log: CapturingLogger) -> None:
    await settled(ANSWERED)
    fields = log.calls[0].kwargs
    assert (fields["prompt_tokens"], fields["completion_tokens"], fields["cost_usd"]) == (3, 4, 0.5)
    assert (fields["model_s"], fields["attempts"], fields["finish_reason"]) == (1.5, 1, "stop")
