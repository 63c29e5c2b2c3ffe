"""Declare the queues again after one of them went missing."""

import asyncio
import time

import structlog
from aio_pika.exceptions import CONNECTION_EXCEPTIONS

from vqa_worker.rabbitmq.connection import TopologyError, connection_losses, explain
from vqa_worker.rabbitmq.rate_limited_warnings import RateLimitedWarnings
from vqa_worker.rabbitmq.session import Session
from worker.rabbitmq.topology import Topology, establish

log = structlog.get_logger(__name__)

# aio-pika waits forever for a channel on a connection that is lost while the broker blocks it.
TIMEOUT_S = 60.0
# Each redeclaration declares every queue; jobs that settle at the same time share one.
INTERVAL_S = 5.0


class Redeclaration:
    """Declare a topology on a session's connection, once for all callers of the same time."""

    def __init__(self, session: Session, topology: Topology) -> None:
        self._session = session
        self._topology = topology
        self._warnings = RateLimitedWarnings()
        self._task: asyncio.Task[None] | None = None
        self._began = 0.0

    async def run(self) -> None:
        """Declare the queues; within `INTERVAL_S` of the last start, only wait for its end.

        A failure is logged, at most once a minute, and not raised.
        """
        now = time.monotonic()
        is_due = now - self._began > INTERVAL_S
        if self._task is None or (self._task.done() and is_due):
            self._began = now
            self._task = asyncio.create_task(self._declare(), name="redeclare")
        await asyncio.shield(self._task)

    async def _declare(self) -> None:
        connection = self._session.connection
        if connection is None:
            return
        try:
            async with asyncio.timeout(TIMEOUT_S):
                with connection_losses():
                    await establish(connection, self._topology)
        except TopologyError as error:
            self._report_mismatch(error)
        except CONNECTION_EXCEPTIONS as error:
            if self._warnings.should_log("redeclare", type(error).__name__):
                log.warning("topology_redeclare_failed", reason=explain(error))

    def _report_mismatch(self, error: TopologyError) -> None:
        if self._warnings.should_log("topology", str(error)):
            log.error("topology_mismatch", faults=error.faults)
