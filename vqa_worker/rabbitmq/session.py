"""A session with the broker: one connection, made again whenever it is lost."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import NoReturn, Self, TypeVar

import structlog
from aio_pika.abc import AbstractConnection
from aio_pika.exceptions import CONNECTION_EXCEPTIONS

from vqa_worker.rabbitmq.connection import (
    Broker,
    BrokerRefusedError,
    BrokerUnreachableError,
    TopologyError,
    close,
    connection_losses,
    explain,
    node_of,
    raise_if_cancelled,
)
from vqa_worker.rabbitmq.rate_limited_warnings import RateLimitedWarnings

log = structlog.get_logger(__name__)

T = TypeVar("T")

FIRST_DELAY_S = 0.25
LONGEST_DELAY_S = 3.0
# After a connection that lasted this long, the next one is tried with the first delay again.
STABLE_S = 2.0
_REFUSALS = (BrokerRefusedError, TopologyError)


class Session:
    """Connect, connect again after each loss, and report what is wrong.

    Three ways to use the connection: `run` serves it for as long as the process lives, `opened` lends it to
    a block, `call` makes one request. A refusal by the broker is raised until the session was ready once;
    from then on it is reported and retried, because an administrator can revoke and restore permissions.

    Attributes:
        connection: the current connection, if there is one.
        ready: set while the connection is ready for use, see `mark_ready`.
        problem: why there is no connection, as far as known; empty while it is ready.
    """

    def __init__(self, broker: Broker, purpose: str, *, report: Callable[[str], None] | None = None) -> None:
        """`purpose` identifies the session in the log; `report` gets each problem instead of the log."""
        self._broker = broker
        self._purpose = purpose
        self._report_to = report
        self._warnings = RateLimitedWarnings()
        self._was_ready = False
        # `host:port` of the node whose connection was lost, until the next attempt.
        self._lost_node = ""
        self.connection: AbstractConnection | None = None
        self.ready = asyncio.Event()
        self.problem = ""

    @classmethod
    async def once(
        cls, broker: Broker, timeout_s: float, request: Callable[[AbstractConnection], Awaitable[T]]
    ) -> T:
        """Make one request on a new connection.

        Raises:
            BrokerRefusedError, BrokerUnreachableError: as `call`.
        """
        async with cls(broker, "command") as session:
            return await session.call(request, timeout_s=timeout_s)

    async def __aenter__(self) -> Self:
        """Return the session, which connects when it is used."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the connection."""
        await self.close()

    async def run(self, serve: Callable[[AbstractConnection], Awaitable[None]]) -> None:
        """Pass each new connection to `serve`, until cancelled.

        `serve` calls `mark_ready` when it is, and returns or raises when the connection is lost.

        Raises:
            BrokerRefusedError, TopologyError: before the session was ready for the first time.
        """

        async def attempt() -> NoReturn:
            try:
                with connection_losses():
                    await serve(await self._connect())
            finally:
                await self.close()
            raise ConnectionError("the connection was closed")

        await self._retried(attempt, None)

    @asynccontextmanager
    async def opened(self, timeout_s: float) -> AsyncIterator[AbstractConnection]:
        """Connect within `timeout_s` seconds and close the connection after the block.

        Raises:
            BrokerRefusedError, BrokerUnreachableError: as `call`.
        """
        try:
            yield await self._retried(self._connect, timeout_s)
        finally:
            await self.close()

    async def call(
        self, request: Callable[[AbstractConnection], Awaitable[T]], *, timeout_s: float | None = None
    ) -> T:
        """Make a request; connect first if needed, and repeat it when the connection is lost.

        Args:
            request: may run more than once.
            timeout_s: seconds for everything; None: no limit.

        Raises:
            BrokerRefusedError: the broker refuses the credentials or the virtual host.
            BrokerUnreachableError: the time was not enough.
        """

        async def attempt() -> T:
            try:
                with connection_losses():
                    result = await request(self.connection or await self._connect())
                    raise_if_cancelled()
            except BaseException:
                await self.close()
                raise
            self.mark_ready()
            return result

        return await self._retried(attempt, timeout_s)

    def mark_ready(self) -> None:
        """Record that the connection is ready for use."""
        self._was_ready = True
        self.problem = ""
        self._warnings = RateLimitedWarnings()
        self.ready.set()

    async def close(self) -> None:
        """Close the connection, if there is one."""
        self.ready.clear()
        connection, self.connection = self.connection, None
        if connection is not None:
            self._lost_node = node_of(connection)
            await close(connection)

    async def _connect(self) -> AbstractConnection:
        last, self._lost_node = self._lost_node, ""
        self.connection = await self._broker.connect(last=last)
        return self.connection

    async def _retried(self, attempt: Callable[[], Awaitable[T]], timeout_s: float | None) -> T:
        try:
            async with asyncio.timeout(timeout_s):
                return await self._repeated(attempt)
        except TimeoutError:
            reason = self.problem or "it does not answer"
            raise BrokerUnreachableError(
                f"{self._broker.setting}: the broker was unreachable for {timeout_s:g} s ({reason})"
            ) from None

    async def _repeated(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Repeat `attempt` until it returns: the only reconnect loop."""
        delay_s = FIRST_DELAY_S
        while True:
            began = time.monotonic()
            try:
                return await attempt()
            except (*_REFUSALS, BrokerUnreachableError, TimeoutError, *CONNECTION_EXCEPTIONS) as error:
                if isinstance(error, _REFUSALS) and not self._was_ready:
                    raise
                if time.monotonic() - began > STABLE_S:
                    delay_s = FIRST_DELAY_S
                # Random, so that the clients of a broker that fails do not all come back at the same moment.
                pause_s = round(delay_s * random.uniform(0.5, 1.5), 2)  # noqa: S311 - not a secret
                self._report(error, pause_s)
            await asyncio.sleep(pause_s)
            delay_s = min(delay_s * 2, LONGEST_DELAY_S)

    def _report(self, error: Exception, pause_s: float) -> None:
        is_unreachable = isinstance(error, BrokerUnreachableError | BrokerRefusedError | TopologyError)
        self.problem = str(error) if is_unreachable else explain(error)
        if self._report_to is not None:
            self._report_to(self.problem)
            return
        match error:
            case TopologyError() if self._warnings.should_log("topology", self.problem):
                log.error("topology_mismatch", faults=error.faults)
            case TopologyError():
                pass
            case BrokerUnreachableError() | BrokerRefusedError():
                log.warning(
                    "rabbitmq_unreachable", purpose=self._purpose, reason=self.problem, next_try_s=pause_s
                )
            case _ if self._warnings.should_log("connection", self.problem):
                log.warning(
                    "rabbitmq_connection_lost",
                    purpose=self._purpose,
                    node=self._lost_node,
                    reason=self.problem,
                )
