"""Deliveries without a broker, and fakes of the project's Protocols."""

import asyncio
import json
import time
from collections.abc import Iterable
from typing import Any

from vqa_worker.messages.result import Usage
from vqa_worker.rabbitmq.outgoing import (
    OutgoingMessage,
    PublishAbandonedError,
    TooLargeError,
    UnroutableError,
)
from worker.images.memory_budget import MemoryBudget
from worker.jobs.delivery import Delivery
from worker.model.answer import Answer
from worker.rabbitmq.topology import Topology

JOB: dict[str, Any] = {"id": "job-1", "question": "What is it?", "images": ["s3://photos/cat.png"]}

ANSWER = Answer(
    text="A cat.",
    calls_tools=False,
    finish_reason="stop",
    usage=Usage(prompt_tokens=3, completion_tokens=4, total_tokens=7),
    refusal=None,
    is_plain=True,
    response={"id": "r-1"},
)

TOPOLOGY = Topology(
    jobs="jobs",
    results="results",
    dead_letters="jobs.dead",
    retry_delays_s=[1, 5],
    reply_exchange="",
    jobs_exchange="",
    declare=True,
)


def a_delivery(
    body: bytes | dict[str, Any] = b"{}", *, events: list[str] | None = None, **properties: Any
) -> Delivery:
    """Return a delivery like the consumer's; `events` collects "ack", "reject" and "requeue"."""
    seen: list[str] = [] if events is None else events

    async def ack() -> None:
        seen.append("ack")

    async def reject() -> None:
        seen.append("reject")

    async def requeue() -> None:
        seen.append("requeue")

    async def wait_until_requeue_is_safe() -> None:
        pass

    usual: dict[str, Any] = {
        "body": body if isinstance(body, bytes) else json.dumps(body).encode(),
        "message_id": "m-1",
        "correlation_id": None,
        "reply_to": None,
        "content_type": None,
        "timestamp": None,
        "trace": {},
        "enqueued_ms": None,
        "queued_s": None,
        "counted_attempts": 0,
        "malformed_answers": 0,
        "deliveries": 1,
        "redelivered": False,
        "copy": None,
        "received_at": time.monotonic(),
        "ack": ack,
        "reject": reject,
        "requeue": requeue,
        "can_ack": lambda: True,
        "wait_until_requeue_is_safe": wait_until_requeue_is_safe,
    }
    return Delivery(**{**usual, **properties})


class FakePublisher:
    """Record published messages. While `let_go` is cleared every publish waits, as without a connection."""

    def __init__(self, events: list[str] | None = None) -> None:
        self.events: list[str] = [] if events is None else events
        self.published: list[OutgoingMessage] = []
        self.unroutable: set[str] = set()
        self.fatal: set[str] = set()
        self.full: set[str] = set()
        self.most_bytes: int | None = None
        self.refuses: bytes | None = None
        """Part of the bodies that are too large."""
        self.refused = 0
        self.broken: Exception | None = None
        self.restored = 0
        self.let_go = asyncio.Event()
        self.let_go.set()

    async def publish(self, message: OutgoingMessage) -> None:
        await self.let_go.wait()
        if self.broken is not None:
            raise self.broken
        is_too_large = self.most_bytes is not None and len(message.body) > self.most_bytes
        if is_too_large or (self.refuses is not None and self.refuses in message.body):
            self.refused += 1
            raise TooLargeError(self.most_bytes or len(message.body) - 1)
        # Each publish closes the connection or meets a full queue; a limit of tries ends that.
        if message.tries is not None and message.routing_key in self.fatal | self.full:
            self.events.append(f"given up {message.routing_key}")
            raise PublishAbandonedError(message.routing_key)
        if message.mandatory and message.routing_key in self.unroutable:
            self.events.append(f"returned {message.routing_key}")
            raise UnroutableError(message.routing_key)
        self.published.append(message)
        self.events.append(f"confirmed {message.routing_key}")

    async def restore_topology(self) -> None:
        self.restored += 1
        self.unroutable.clear()

    def to(self, queue: str) -> list[OutgoingMessage]:
        return [message for message in self.published if message.routing_key == queue]

    def results(self, queue: str = "results") -> list[dict[str, Any]]:
        """Return the bodies of the results in a queue."""
        return [json.loads(message.body) for message in self.to(queue)]


async def turns_of_the_loop(times: int = 10) -> None:
    """Run everything that does not wait for the clock."""
    for _ in range(times):
        await asyncio.sleep(0)


async def cancel_all(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until they have ended."""
    tasks = [*tasks]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def free(budget: MemoryBudget) -> int:
    """Return the number of free bytes; no task may be waiting."""
    low, high = 0, 1 << 40
    while low < high:
        middle = (low + high + 1) // 2
        share = budget.try_reserve(middle)
        if share is None:
            high = middle - 1
        else:
            share.release()
            low = middle
    return low
