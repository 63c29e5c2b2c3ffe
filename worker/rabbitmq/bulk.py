"""Working with many dead letters: a look at them, and round after round through them until all is done."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from aio_pika.abc import AbstractConnection
from aio_pika.exceptions import CONNECTION_EXCEPTIONS

from worker.rabbitmq.connection import Broker, BrokerUnreachableError, connection_losses
from worker.rabbitmq.dead_letters import DeadLetters, Held
from worker.rabbitmq.session import Session
from worker.rabbitmq.topology import Topology

T = TypeVar("T")

# What is passed over is with nobody else for so long at most; RabbitMQ itself loses patience in 30 minutes.
HOLD_S = 60.0
# After a lost connection.
PAUSE_S = 0.5
FRUITLESS_SESSIONS = 3
# Ctrl-C waits so long for the step that is under way.
LAST_STEP_S = 5.0

Step = Callable[[DeadLetters, Held], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Look(Generic[T]):
    """What a look has found.

    Attributes:
        there: how many letters there were.
        seen: how many of them were looked at.
        picked: what was made of them, in the order of the queue.
    """

    there: int
    seen: int
    picked: list[T]


async def look(
    broker: Broker,
    topology: Topology,
    pick: Callable[[Held], T | None],
    *,
    most: int | None,
    patience_s: float,
) -> Look[T]:
    """Show `pick` the letters, `most` of them if given; they are all in the queue again when this returns.

    Raises:
        LettersError: the queue is not there, or the user lacks a permission.
        BrokerRefusedError, BrokerUnreachableError: there is no broker, or it went away meanwhile.
    """
    async with Session(broker, "dead letters").opened(patience_s) as connection:
        try:
            async with DeadLetters.looked_into(connection, topology) as letters:
                return await _pick(letters, pick, most)
        except CONNECTION_EXCEPTIONS as error:
            text = f"the broker went away during the look ({type(error).__name__}); nothing was changed"
            raise BrokerUnreachableError(text) from None


async def _pick(letters: DeadLetters, pick: Callable[[Held], T | None], most: int | None) -> Look[T]:
    picked: list[T] = []
    seen = 0
    while most is None or seen < most:
        if (held := await letters.next()) is None:
            break
        seen += 1
        if (found := pick(held)) is not None:
            picked.append(found)
    return Look(letters.there, seen, picked)


async def work_off(
    broker: Broker,
    topology: Topology,
    wanted: Counter[str],
    step: Step,
    *,
    rate: float | None,
    patience_s: float,
) -> None:
    """Take a step with each letter whose name is `wanted`, then take it from the queue.

    At most `rate` letters a second. What is done is counted off in `wanted`; what is left there in the end
    was not found. A letter is acked only after its step; if the broker goes away in between, the step is
    taken once more.

    Raises:
        LettersError, BrokerRefusedError, BrokerUnreachableError: as `look`. All else is still in the queue.
    """
    pace = _Pace(rate)
    fruitless = 0
    while wanted.total():
        before = wanted.total()
        async with Session(broker, "dead letters").opened(patience_s) as connection:
            try:
                while wanted.total() and await _round(connection, topology, wanted, step, pace):
                    pass
            except CONNECTION_EXCEPTIONS as error:
                fruitless = 0 if wanted.total() < before else fruitless + 1
                if fruitless >= FRUITLESS_SESSIONS:
                    text = f"the broker went away {fruitless} times in a row ({type(error).__name__})"
                    raise BrokerUnreachableError(text) from None
            else:
                return
        await asyncio.sleep(PAUSE_S)


async def _round(
    connection: AbstractConnection, topology: Topology, wanted: Counter[str], step: Step, pace: "_Pace"
) -> bool:
    """Go through the queue, for as long as its letters may be held; returns whether one was wanted."""
    ends, is_of_use = time.monotonic() + HOLD_S, False
    # Acks are not confirmed: one counts when the broker has answered to what was said after it.
    acked: Counter[str] = Counter()
    async with DeadLetters.looked_into(connection, topology) as letters:
        while (wanted - acked).total() and (held := await letters.next()) is not None:
            wanted -= acked
            acked.clear()
            if wanted[held.letter.name]:
                await pace.turn()
                await _to_its_end(_take(letters, held, step))
                acked[held.letter.name] = 1
                is_of_use = True
            if is_of_use and time.monotonic() > ends:
                break
        await letters.sync()
        wanted -= acked
    return is_of_use


async def _take(letters: DeadLetters, held: Held, step: Step) -> None:
    with connection_losses():
        await step(letters, held)
        await held.ack()


async def _to_its_end(step: Coroutine[Any, Any, None]) -> None:
    """Do not leave a letter in two places because somebody has pressed Ctrl-C."""
    task = asyncio.create_task(step)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task}, timeout=LAST_STEP_S)
        task.cancel()
        raise


class _Pace:
    """Turns at a rate, the first one at once."""

    def __init__(self, rate: float | None) -> None:
        self._every_s = 1 / rate if rate else 0.0
        self._next = time.monotonic()

    async def turn(self) -> None:
        """Wait for the next turn."""
        wait_s = self._next - time.monotonic()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        self._next = max(self._next, time.monotonic() - self._every_s) + self._every_s
