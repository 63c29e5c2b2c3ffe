"""Notify the workers that jobs are cancelled."""

import asyncio
from collections.abc import Sequence
from typing import Final

from vqa_worker.rabbitmq.connection import BrokerUnreachableError
from vqa_worker.rabbitmq.outgoing import RefusedError, UnroutableError
from worker.cli.shell import CommandError, broker_of
from worker.rabbitmq.control import cancellation
from worker.rabbitmq.publisher import Publisher
from worker.rabbitmq.topology import Topology
from worker.settings import BrokerSettings

CANCELLED_AT_ONCE: Final = 500


async def publish_cancellations(ids: Sequence[str], settings: BrokerSettings, timeout_s: float) -> int:
    """Notify all workers of the jobs queue that jobs are cancelled, the last one first; return how many.

    A worker that aborts a running job, one of the first, starts the next one.

    `timeout_s`: for the connection and for each `CANCELLED_AT_ONCE` jobs.

    Raises:
        CommandError: no worker listens.
        BrokerUnreachableError: the broker is unreachable.
        RefusedError: the user may not publish cancellations.
    """
    ids, topology = ids[::-1], Topology.from_settings(settings)
    publisher = Publisher(broker_of(settings), topology, retry_refusals=False)
    exchange = topology.control.name
    try:
        async with asyncio.timeout(timeout_s) as timeout, asyncio.TaskGroup() as group:
            publishing = group.create_task(publisher.run(), name="publisher")
            for start in range(0, len(ids), CANCELLED_AT_ONCE):
                some = ids[start : start + CANCELLED_AT_ONCE]
                await asyncio.gather(*(publisher.publish(cancellation(exchange, it)) for it in some))
                timeout.reschedule(asyncio.get_running_loop().time() + timeout_s)
            publishing.cancel()
    except* (UnroutableError, RefusedError) as failed:
        error = failed.exceptions[0]
        if isinstance(error, RefusedError) and "NOT_FOUND" not in str(error):
            raise
        text = f"no worker listens on the exchange {exchange}, so nothing was cancelled. Start a worker."
        raise CommandError(text) from None
    except* TimeoutError:
        raise BrokerUnreachableError("VQA_RABBITMQ_URL: the broker is unreachable") from None
    return len(ids)
