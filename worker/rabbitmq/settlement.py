"""Settle deliveries: publish the outcome, wait for the confirm, then ack. Nothing else settles them."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Protocol, assert_never

import structlog

from vqa_worker.messages.error_codes import ErrorCode
from vqa_worker.messages.result import JobFailure, Result
from vqa_worker.rabbitmq.outgoing import (
    OutgoingMessage,
    PublishAbandonedError,
    TooLargeError,
    UnroutableError,
)
from vqa_worker.rabbitmq.rate_limited_warnings import RateLimitedWarnings
from worker.errors import UnwrittenResultError
from worker.jobs.delivery import Delivery
from worker.jobs.outcome import DeadLettered, Failed, Outcome, Requeued, Retried, Succeeded
from worker.observability import metrics
from worker.observability.tenants import Tenants
from worker.rabbitmq import messages
from worker.rabbitmq.topology import Topology

log = structlog.get_logger(__name__)

DIRECT_REPLY_TO = "amq.rabbitmq.reply-to."
# Before the next publish of a message that stayed unroutable although the queues were declared again.
UNROUTABLE_DELAY_S = 5.0
# The outcomes whose result may be too large for a message.
WithResult = Succeeded | Failed | DeadLettered
# Publishes of a copy of a job, each with its own tries, before the broker gets the job itself back.
COPY_ROUNDS = 4


class Publisher(Protocol):
    """Publishes messages."""

    async def publish(self, message: OutgoingMessage) -> None:
        """Publish and wait for the confirm; raise UnroutableError, PublishAbandonedError or TooLargeError."""

    async def restore_topology(self) -> None:
        """Declare the queues again after one of them went missing."""


@dataclass(frozen=True, slots=True)
class ReplyPolicy:
    """Decide which `reply_to` names are used (`VQA_ALLOWED_REPLY_TO`)."""

    allowed: Sequence[str]

    def queue_for(self, delivery: Delivery, default: str) -> str:
        """Return the queue for the result: `reply_to` if it is allowed, else `default`."""
        reply_to = delivery.reply_to
        if reply_to is not None and any(fnmatchcase(reply_to, glob) for glob in self.allowed):
            return reply_to
        return default


@dataclass(frozen=True, slots=True)
class LargeResultPolicy:
    """What to do with results that are too large for a message.

    Attributes:
        max_bytes: the largest body to publish (`VQA_MAX_RESULT_BYTES`); None: what the broker accepts.
        write: writes a result and its body to S3 and returns the URL, or raises UnwrittenResultError; None:
            such results become failed ones.
    """

    max_bytes: int | None = None
    write: Callable[[Result, bytes], Awaitable[str]] | None = None


class Settlement:
    """Publish the messages of an outcome, and ack the delivery when the broker has confirmed them."""

    def __init__(
        self,
        publisher: Publisher,
        topology: Topology,
        replies: ReplyPolicy,
        tenants: Tenants | None = None,
        large_results: LargeResultPolicy | None = None,
    ) -> None:
        self._publisher = publisher
        self._topology = topology
        self._replies = replies
        self._tenants = tenants or Tenants()
        self._large_results = large_results or LargeResultPolicy()
        # Its latest refusal. Each closes a channel, so that further results of this size go to S3 at once.
        self._refusal: TooLargeError | None = None
        self._warnings = RateLimitedWarnings()

    async def publish(self, delivery: Delivery, outcome: Outcome) -> Outcome | None:
        """Publish the messages of an outcome and wait for their confirms.

        Returns:
            The outcome that was published. If the result is too large for a message, it is one with the URL
            of the result in S3; if that cannot be written, a failed or a requeued one.
            None if the broker has the job itself, because it refused a copy or the connection was lost.
        """
        with metrics.stage("publish", outcome.model):
            if not isinstance(outcome, WithResult):
                return await self._publish(delivery, outcome)
            body = outcome.result.to_body()
            why = self._why_too_large(body)
            if why is None:
                try:
                    return await self._publish(delivery, outcome, body)
                except TooLargeError as error:
                    self._refusal, why = error, str(error)
            smaller = await self._without_answer(outcome, body, why)
            if isinstance(smaller, Requeued) and not delivery.can_ack():
                return None
            try:
                return await self._publish(delivery, smaller)
            except TooLargeError as error:
                failed = _failed_as_too_large(outcome, body, f"also without its answer, {error}")
                return await self._publish(delivery, failed)

    def _why_too_large(self, body: bytes) -> str | None:
        """Return why a result is not to be published; None: try to publish it."""
        policy, refusal = self._large_results, self._refusal
        if policy.max_bytes is not None and len(body) > policy.max_bytes:
            return f"VQA_MAX_RESULT_BYTES is {policy.max_bytes}"
        # Without S3 a result that is not published is lost, and the broker's limit may have been raised.
        if policy.write is not None and refusal is not None and len(body) > refusal.max_bytes:
            return str(refusal)
        return None

    async def _without_answer(self, outcome: WithResult, body: bytes, why: str) -> Outcome:
        """Write a result that is too large to S3; return the outcome to publish in its place."""
        if self._large_results.write is None:
            return _failed_as_too_large(outcome, body, f"{why}: set VQA_LARGE_RESULTS, or ask for less")
        try:
            url = await self._large_results.write(outcome.result, body)
        except UnwrittenResultError as error:
            if not isinstance(outcome, DeadLettered) and outcome.if_unwritten is not None:
                return outcome.if_unwritten
            unwritten = f"{why}; it could not be written to VQA_LARGE_RESULTS: {error}"
            return _failed_as_too_large(outcome, body, unwritten)
        short = {"answer": None, "parsed": None, "response": None, "result_url": url}
        return replace(outcome, result=outcome.result.model_copy(update=short))

    async def _publish(
        self, delivery: Delivery, outcome: Outcome, body: bytes | None = None
    ) -> Outcome | None:
        """Publish an outcome, whose result has this `body`; return it, or None as `publish`.

        Raises:
            TooLargeError: its result is larger than the broker accepts.
        """
        if not await self._is_published(delivery, outcome, body):
            return await self._leave_to_broker(delivery, outcome)
        return outcome

    async def _is_published(self, delivery: Delivery, outcome: Outcome, body: bytes | None) -> bool:
        match outcome:
            case Succeeded(result=result) | Failed(result=result):
                return await self._reply(delivery, result, body)
            case DeadLettered():
                return await self._dead_letter(delivery, outcome, body)
            case Retried(delay_s=delay_s):
                copy = messages.retry_copy(delivery, self._topology.retry(delay_s), outcome)
            case Requeued():
                await delivery.wait_until_requeue_is_safe()
                copy = messages.requeued_copy(delivery, self._topology.jobs, outcome)
            case _:
                assert_never(outcome)
        return await self._publish_copy(copy, delivery)

    async def _leave_to_broker(self, delivery: Delivery, outcome: Outcome) -> Outcome | None:
        """Let the broker move the job itself, rather than keep it until the consumer timeout."""
        log.error("job_left_to_broker", **_log_fields(delivery, outcome))
        if isinstance(outcome, DeadLettered):
            await delivery.reject()
            return outcome
        await delivery.requeue()
        return None

    async def finish(self, delivery: Delivery, outcome: Outcome) -> None:
        """Ack, then count and log the outcome."""
        await delivery.ack()
        took_s = time.monotonic() - delivery.received_at
        self._count(outcome, took_s)
        _log_outcome(delivery, outcome, took_s)

    def _count(self, outcome: Outcome, took_s: float) -> None:
        match outcome:
            case Succeeded(result=result):
                self._count_finished(result, "", outcome.model, took_s)
            case Failed(result=result, code=code):
                self._count_finished(result, code, outcome.model, took_s)
            case DeadLettered(result=result, code=code):
                self._count_finished(result, code, outcome.model, took_s)
                metrics.series(metrics.DEAD_LETTERS, code).inc()
            case Retried(reason=reason):
                metrics.series(metrics.RETRIES, reason).inc()
            case Requeued():
                metrics.JOBS_REQUEUED.inc()
            case _:
                assert_never(outcome)

    def _count_finished(self, result: Result, error: str, model: str, took_s: float) -> None:
        metrics.series(metrics.JOBS, result.status, error, model).inc()
        metrics.series(metrics.JOB_DURATION, result.status, model).observe(took_s)
        self._tenants.ended(result.metadata, result.status)

    async def _reply(self, delivery: Delivery, result: Result, body: bytes | None) -> bool:
        queue = self._replies.queue_for(delivery, self._topology.results)
        reply = messages.reply(delivery, result, queue, exchange=self._topology.reply_exchange, body=body)
        if queue != self._topology.results:
            is_direct = queue.startswith(DIRECT_REPLY_TO)
            try:
                # Direct replies are at most once by nature, and only the default exchange knows them.
                await self._publisher.publish(
                    messages.to_direct_reply(reply) if is_direct else messages.to_private_queue(reply)
                )
            except UnroutableError:
                reply = messages.undeliverable(reply, self._topology.results)
            else:
                return True
        return await self._publish_to_own(reply)

    async def _dead_letter(self, delivery: Delivery, outcome: DeadLettered, body: bytes | None) -> bool:
        """Publish the result first: a waiting publisher gets it even if the worker dies in between."""
        if outcome.code is not ErrorCode.INVALID_JOB or _has_recipient(delivery, outcome):
            await self._reply(delivery, outcome.result, body)
        copy = messages.dead_letter(delivery, self._topology.dead_letters, outcome)
        return await self._publish_copy(copy, delivery)

    async def _publish_copy(self, copy: OutgoingMessage, delivery: Delivery) -> bool:
        """Publish a copy of a job that the broker still has; return whether it accepted the copy."""
        copy = replace(copy, exchange=self._topology.jobs_exchange)
        try:
            return await self._publish_to_own(copy, may_abandon=delivery.can_ack)
        except TooLargeError:
            return False

    async def _publish_to_own(
        self, message: OutgoingMessage, *, may_abandon: Callable[[], bool] = lambda: False
    ) -> bool:
        """Publish to a queue of the worker until it is confirmed; declare the queue if it is missing.

        Return False after `COPY_ROUNDS` if `may_abandon`, because the broker still has the original.
        """
        delay_s, rounds = 0.0, 0
        while True:
            try:
                await self._publisher.publish(message)
            except PublishAbandonedError:
                pass
            except UnroutableError:
                self._log_missing(message)
            else:
                self._warnings.recovered(message.routing_key)
                return True
            rounds += 1
            if rounds >= COPY_ROUNDS and may_abandon():
                return False
            await self._publisher.restore_topology()
            await asyncio.sleep(delay_s)
            delay_s = UNROUTABLE_DELAY_S

    def _log_missing(self, message: OutgoingMessage) -> None:
        if self._warnings.should_log(message.routing_key, "missing"):
            log.error("queue_missing", queue=message.routing_key, exchange=message.exchange)


def _has_recipient(delivery: Delivery, outcome: DeadLettered) -> bool:
    return any((outcome.job_id, delivery.message_id, delivery.reply_to, delivery.correlation_id))


def _failed_as_too_large(outcome: WithResult, body: bytes, why: str) -> Outcome:
    """Return the failed outcome for a result with a `body` that is too large; it keeps usage and cost."""
    text = f"the result has {len(body)} bytes, and {why}"
    failure = JobFailure(code=ErrorCode.RESULT_TOO_LARGE, message=text, retryable=False)
    failed = {"status": "failed", "answer": None, "parsed": None, "response": None, "error": failure}
    result = outcome.result.model_copy(update=failed)
    return Failed(
        job_id=outcome.job_id, model=outcome.model, result=result, code=failure.code, reason=failure.message
    )


def _log_outcome(delivery: Delivery, outcome: Outcome, took_s: float) -> None:
    fields = _log_fields(delivery, outcome)
    match outcome:
        case Succeeded(result=result):
            log.info("job_finished", **fields, **_details(result))
        case Failed(result=result, code=code, reason=why):
            log.warning("job_finished", **fields, error=code, reason=why, **_details(result))
        case DeadLettered(result=result, code=code, reason=why):
            log.error("job_finished", **fields, error=code, reason=why, dead_letter=True, **_details(result))
        case Retried(delay_s=delay_s, attempts=attempts, reason=reason):
            log.warning("job_retried", **fields, reason=reason, attempts=attempts, delay_s=delay_s)
        case Requeued(reason=reason):
            log.debug("job_requeued", **fields, reason=reason, total_s=took_s)
        case _:
            assert_never(outcome)


def _log_fields(delivery: Delivery, outcome: Outcome) -> Mapping[str, Any]:
    """Return a log line's fields of a job; all lines of a delivery also have the trace id."""
    fields = {"job_id": outcome.job_id, "outcome": outcome.name, "model": outcome.model}
    if delivery.correlation_id not in (None, outcome.job_id):
        fields["correlation_id"] = delivery.correlation_id
    return fields


def _details(result: Result) -> Mapping[str, Any]:
    """Return a log line's fields of a result; never the question, the answer or the API's text."""
    usage = result.usage.model_dump() if result.usage else {}
    names = ("attempts", "finish_reason", "result_url")
    details = {**{name: getattr(result, name) for name in names}, **usage}
    return {
        name: value for name, value in {**details, **result.timings.model_dump()}.items() if value is not None
    }
