"""Select dead letters, and process them in rounds through the queue."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from vqa_worker.rabbitmq.connection import Broker, BrokerUnreachableError, ConnectionLostError
from worker.rabbitmq.dead_letters import DeadLetters, FetchedDeadLetter
from worker.rabbitmq.topology import Topology

T = TypeVar("T")

# The maximum time for which a round holds skipped dead letters, which no other consumer can read meanwhile.
# RabbitMQ closes a channel after 30 minutes without an ack.
HOLD_S = 60.0
# After Ctrl-C, the step under way may take this long.
LAST_STEP_S = 5.0

Step = Callable[[DeadLetters, FetchedDeadLetter], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Selection(Generic[T]):
    """The result of `select`.

    Attributes:
        total: the number of dead letters in the queue.
        examined: how many of them were read.
        picked: what `pick` returned for them, in the order of the queue.
    """

    total: int
    examined: int
    picked: list[T]


async def select(
    broker: Broker,
    topology: Topology,
    pick: Callable[[FetchedDeadLetter], T | None],
    *,
    limit: int | None,
    timeout_s: float,
) -> Selection[T]:
    """Call `pick` with each dead letter until it has picked `limit` of them, then requeue all.

    Raises:
        DeadLettersError: the queue does not exist, or the user lacks a permission.
        BrokerRefusedError, BrokerUnreachableError: there is no connection to the broker, or it was lost.
    """
    picked: list[T] = []
    examined = 0
    try:
        async with DeadLetters.opened(broker, topology, timeout_s) as dead_letters:
            while limit is None or len(picked) < limit:
                if (fetched := await dead_letters.next()) is None:
                    break
                examined += 1
                if (found := pick(fetched)) is not None:
                    picked.append(found)
            return Selection(dead_letters.total, examined, picked)
    except ConnectionLostError as error:
        text = f"the connection to the broker was lost ({error}); nothing was changed"
        raise BrokerUnreachableError(text) from None


async def process(
    broker: Broker, topology: Topology, wanted: Counter[str], step: Step, *, timeout_s: float
) -> None:
    """Run `step` for each dead letter whose name is in `wanted`, then ack it.

    Names are counted down in `wanted`; those left at the end were not found.

    Raises:
        DeadLettersError, BrokerRefusedError, BrokerUnreachableError: as `select`. Everything else is still in
            the queue, and at most the last one too, if its ack was lost.
    """
    is_useful = True
    try:
        while wanted.total() and is_useful:
            async with DeadLetters.opened(broker, topology, timeout_s) as dead_letters:
                is_useful = await _round(dead_letters, wanted, step)
    except ConnectionLostError as error:
        text = f"the connection to the broker was lost ({error}). Run the command again for the rest"
        raise BrokerUnreachableError(text) from None


async def _round(dead_letters: DeadLetters, wanted: Counter[str], step: Step) -> bool:
    """Read the queue for at most `HOLD_S`; return whether it had a wanted dead letter."""
    ends, is_useful = time.monotonic() + HOLD_S, False
    while wanted.total() and (fetched := await dead_letters.next()) is not None:
        if wanted[fetched.record.name] > 0:
            await _finish(dead_letters, fetched, step)
            wanted[fetched.record.name] -= 1
            is_useful = True
        if is_useful and time.monotonic() > ends:
            break
    # Acks are not confirmed: the answer to a later request confirms them.
    await dead_letters.sync()
    return is_useful


async def _finish(dead_letters: DeadLetters, fetched: FetchedDeadLetter, step: Step) -> None:
    """Run the step and ack, also after Ctrl-C; otherwise the job could be on both queues."""

    async def run() -> None:
        await step(dead_letters, fetched)
        await fetched.ack()

    task = asyncio.create_task(run())
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task}, timeout=LAST_STEP_S)
        task.cancel()
        raise
