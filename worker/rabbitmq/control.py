"""The control exchange: what is said there, every worker hears."""

import json
from collections.abc import Callable

import structlog
from aio_pika.abc import AbstractConnection, AbstractIncomingMessage
from aio_pika.exceptions import ChannelClosed

from worker.messages.job import readable_id
from worker.rabbitmq.topology import Topology

log = structlog.get_logger(__name__)


class Control:
    """Listens for cancellations, `{"cancel": "<id>"}`, by a queue of this worker's own on a fan-out exchange.

    A worker that may not listen works all the same: its jobs cannot be cancelled while they run.
    """

    def __init__(
        self, topology: Topology, *, on_cancel: Callable[[str], None], on_listening: Callable[[], None]
    ) -> None:
        self._topology = topology
        self._on_cancel = on_cancel
        self._on_listening = on_listening

    async def listen(self, connection: AbstractConnection) -> None:
        """Listen for as long as the connection lives.

        Raises:
            CONNECTION_EXCEPTIONS: the connection is lost, as with everything on it.
        """
        # A channel of its own: a refusal closes it.
        channel = await connection.channel(publisher_confirms=False)
        try:
            if self._topology.declare:
                await self._topology.control.declare(channel, passive=False)
            # The server names it: amq.gen-…; it goes with the connection.
            queue = await channel.declare_queue(exclusive=True)
            await queue.bind(self._topology.control.name)
            await queue.consume(self._receive, no_ack=True)
        except ChannelClosed as error:
            log.warning(
                "cancellation_forbidden",
                exchange=self._topology.control.name,
                reason=str(error.args[-1]) if error.args else "",
                advice="create this fan-out exchange, and permit reading it and queues ^amq\\.gen-.*$",
            )
            return
        self._on_listening()

    async def _receive(self, message: AbstractIncomingMessage) -> None:
        job_id = _cancelled_id(message.body)
        if job_id is None:
            log.warning("control_message_ignored", what='it is not {"cancel": "<id>"}')
            return
        log.info("job_cancelled", job_id=job_id)
        self._on_cancel(job_id)


def _cancelled_id(body: bytes) -> str | None:
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return readable_id(said["cancel"]) if isinstance(said, dict) and said.keys() == {"cancel"} else None
