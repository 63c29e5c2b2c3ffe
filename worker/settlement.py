"""The one place that settles deliveries: publish, wait for the confirm, then ack."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol, assert_never

import structlog

from worker import metrics
from worker.delivery import Delivery
from worker.errors import ErrorCode
from worker.outcome import Answered, DeadLetter, GiveBack, Outcome, Refused, Retry
from worker.rabbit import messages
from worker.rabbit.publisher import Outgoing, UnroutableError
from worker.rabbit.topology import Topology
from worker.result import Result

log = structlog.get_logger(__name__)

DIRECT_REPLY_TO = "amq.rabbitmq.reply-to."
# How long to wait before a message is tried again that no queue took, though the queues were made anew.
UNROUTABLE_DELAY_S = 5.0


class Publisher(Protocol):
    """Where messages go."""

    async def publish(self, message: Outgoing) -> None:
        """Publish, confirmed, or raise UnroutableError."""

    async def restore_topology(self) -> None:
        """Make queues again that have gone."""


@dataclass(frozen=True, slots=True)
class ReplyPolicy:
    """Which `reply_to` names are honoured (`VQA_ALLOWED_REPLY_TO`)."""

    allowed: Sequence[str]

    def queue_for(self, delivery: Delivery, default: str) -> str:
        """The queue that the result goes to."""
        reply_to = delivery.reply_to
        if reply_to is not None and any(fnmatchcase(reply_to, glob) for glob in self.allowed):
            return reply_to
        return default


class Settlement:
    """Turns outcomes into messages, and acks when the broker has them."""

    def __init__(self, publisher: Publisher, topology: Topology, replies: ReplyPolicy) -> None:
        self._publisher = publisher
        self._topology = topology
        self._replies = replies

    async def publish(self, delivery: Delivery, outcome: Outcome) -> None:
        """Publish what the outcome calls for; returns when the broker has confirmed all of it."""
        with metrics.stage("publish", outcome.model):
            match outcome:
                case Answered(result=result) | Refused(result=result):
                    await self._reply(delivery, result)
                case DeadLetter():
                    await self._bury(delivery, outcome)
                case Retry(delay_s=delay_s, attempts=attempts):
                    queue = self._topology.retry(delay_s)
                    await self._deliver(messages.retry_copy(delivery, queue, attempts))
                case GiveBack():
                    await self._deliver(messages.given_back_copy(delivery, self._topology.jobs))
                case _:
                    assert_never(outcome)

    async def finish(self, delivery: Delivery, outcome: Outcome) -> None:
        """Ack, then count and log what became of the job."""
        await delivery.ack()
        took_s = time.monotonic() - delivery.received
        match outcome:
            case Answered(result=result):
                _count_job("succeeded", "", outcome.model, took_s)
                log.info("job", **_facts(outcome), **_details(result))
            case Refused(result=result, code=code):
                _count_job("failed", code, outcome.model, took_s)
                log.warning("job", **_facts(outcome), error=code, **_details(result))
            case DeadLetter(result=result, code=code):
                _count_job("failed", code, outcome.model, took_s)
                metrics.DEAD_LETTERS.labels(code).inc()
                log.error("job", **_facts(outcome), error=code, dead_letter=True, **_details(result))
            case Retry(delay_s=delay_s, attempts=attempts, reason=reason):
                metrics.RETRIES.labels(reason).inc()
                log.warning("job_retry", **_facts(outcome), reason=reason, attempts=attempts, delay_s=delay_s)
            case GiveBack():
                log.debug("job_given_back", **_facts(outcome), total_s=round(took_s, 3))
            case _:
                assert_never(outcome)

    async def _reply(self, delivery: Delivery, result: Result) -> None:
        queue = self._replies.queue_for(delivery, self._topology.results)
        reply = messages.reply(delivery, result, queue, exchange=self._topology.reply_exchange)
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
                return
        await self._deliver(reply)

    async def _bury(self, delivery: Delivery, outcome: DeadLetter) -> None:
        """The result first: a publisher that waits is told even if the worker dies in between."""
        if outcome.code is not ErrorCode.INVALID_JOB or _has_somebody_to_tell(delivery, outcome):
            await self._reply(delivery, outcome.result)
        await self._deliver(messages.dead_letter(delivery, self._topology.dead_letters, outcome))

    async def _deliver(self, message: Outgoing) -> None:
        """Publish to a queue of the worker's own; one that has gone is made again."""
        delay_s = 0.0
        while True:
            try:
                return await self._publisher.publish(message)
            except UnroutableError:
                log.error("queue_missing", queue=message.routing_key, next_try_s=delay_s)  # noqa: TRY400
            await self._publisher.restore_topology()
            await asyncio.sleep(delay_s)
            delay_s = UNROUTABLE_DELAY_S


def _has_somebody_to_tell(delivery: Delivery, outcome: DeadLetter) -> bool:
    return any((outcome.job_id, delivery.message_id, delivery.reply_to, delivery.correlation_id))


def _count_job(status: str, error: str, model: str, took_s: float) -> None:
    metrics.series(metrics.JOBS, status, error, model).inc()
    metrics.series(metrics.JOB_DURATION, status, model).observe(took_s)


def _facts(outcome: Outcome) -> Mapping[str, Any]:
    return {"job_id": outcome.job_id, "outcome": type(outcome).__name__.lower(), "model": outcome.model}


def _details(result: Result) -> Mapping[str, Any]:
    """What a log line says of a result; never the question, the answer or the API's own words."""
    usage = result.usage.model_dump() if result.usage else {}
    details = {"attempts": result.attempts, "finish_reason": result.finish_reason, **usage}
    return {
        name: value for name, value in {**details, **result.timings.model_dump()}.items() if value is not None
    }
