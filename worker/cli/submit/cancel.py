"""Cancel jobs: notify the workers, and fail jobs that were not sent yet."""

import asyncio
from collections.abc import Sequence
from contextlib import closing
from typing import Final

from vqa_worker.messages.error_codes import ErrorCode
from vqa_worker.rabbitmq.connection import BrokerUnreachableError
from vqa_worker.rabbitmq.outgoing import RefusedError, UnroutableError
from worker.cli import state_dir
from worker.cli.shell import CommandError, Screen, broker_of
from worker.cli.submit.plan import failed_result
from worker.cli.submit.state import SubmissionState
from worker.rabbitmq.control import cancellation
from worker.rabbitmq.publisher import Publisher
from worker.rabbitmq.topology import Topology
from worker.settings import CommandSettings

CHUNK_JOBS: Final = 500


async def cancel_pending(name: str, settings: CommandSettings, screen: Screen) -> int:
    """Cancel all jobs of a submission that have no result; return how many.

    While another process sends or collects, jobs that are not sent yet are cancelled by the workers.

    Raises: as `publish_cancellations`.
    """
    with closing(SubmissionState.open(state_dir.find(name))) as state:
        sent, unsent = state.pending()
        count = len(sent) + len(unsent)
        code, message = ErrorCode.CANCELLED, "cancelled before it was sent"
        try:
            with state_dir.locked(name):
                state.store([failed_result(it, code, message, retryable=True) for it in unsent])
        except CommandError:
            sent += unsent
        if sent:
            await publish_cancellations(sent, settings, screen)
        return count


async def publish_cancellations(ids: Sequence[str], settings: CommandSettings, screen: Screen) -> int:
    """Notify all workers that jobs are cancelled; return how many.

    Raises:
        CommandError: no worker listens.
        BrokerUnreachableError: the broker is unreachable.
    """
    topology = Topology.from_settings(settings)
    publisher = Publisher(broker_of(settings), topology, retry_refusals=False)
    exchange = topology.control.name
    try:
        async with asyncio.timeout(screen.timeout_s) as timeout, asyncio.TaskGroup() as group:
            publishing = group.create_task(publisher.run(), name="publisher")
            for start in range(0, len(ids), CHUNK_JOBS):
                messages = [cancellation(exchange, job_id) for job_id in ids[start : start + CHUNK_JOBS]]
                await asyncio.gather(*map(publisher.publish, messages))
                timeout.reschedule(asyncio.get_running_loop().time() + screen.timeout_s)
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
