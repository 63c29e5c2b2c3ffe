"""Get single messages from a queue of any kind that a worker can use."""

import asyncio
from collections.abc import Callable

from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage
from aio_pika.exceptions import ChannelClosed, ConnectionClosed

from vqa_worker.rabbitmq.connection import TopologyError, broker_reason

# For a message of a queue with a single active consumer; if there is none, the caller asks again.
CONSUME_TIMEOUT_S = 1.0


class SingleJobs:
    """Get messages of one queue one by one, on a separate channel: RabbitMQ closes it if it refuses that.

    A quorum queue with a single active consumer refuses basic.get. A consumer with a prefetch count of 1 then
    receives the message and is cancelled.

    Attributes:
        is_identified: whether RabbitMQ has accepted or refused basic.get, which shows the kind of the queue.
        has_single_active_consumer: whether it refused basic.get for that reason. Classic queues do not.
    """

    def __init__(
        self, connection: AbstractConnection, queue: str, on_late: Callable[[AbstractIncomingMessage], None]
    ) -> None:
        """`on_late` gets a message that arrives after its consumer was cancelled."""
        self._connection = connection
        self._name = queue
        self._on_late = on_late
        self._channel: AbstractChannel | None = None
        self.is_identified = False
        self.has_single_active_consumer = False

    async def get(self) -> AbstractIncomingMessage | None:
        """Return a message; None if there is none, or if another consumer is the active one.

        Raises:
            TopologyError: the queue is a stream; RabbitMQ has closed the connection.
            CONNECTION_EXCEPTIONS: the connection was lost, or, as ChannelClosed, RabbitMQ refuses it.
        """
        message = None if self.has_single_active_consumer else await self.identify()
        return await self._consume_one() if self.has_single_active_consumer else message

    async def identify(self) -> AbstractIncomingMessage | None:
        """Get a message, if there is one, to find out what kind of queue it is.

        Nothing else shows it to a user without the configure permission: a passive declaration compares no
        arguments.

        Raises:
            TopologyError, CONNECTION_EXCEPTIONS: as `get`.
        """
        queue = await (await self._open()).get_queue(self._name, ensure=False)
        try:
            # No timeout: that would close the channel. A dead connection ends it.
            message = await queue.get(fail=False, timeout=None)
        except (ChannelClosed, ConnectionClosed) as error:
            match broker_reason(error).split(" - ")[0]:
                case "RESOURCE_LOCKED":
                    message, self.has_single_active_consumer = None, True
                case "NOT_IMPLEMENTED":
                    raise TopologyError([stream_fault(self._name)]) from None
                case _:
                    raise
        self.is_identified = True
        return message

    async def _consume_one(self) -> AbstractIncomingMessage | None:
        channel = await self._open()
        await channel.set_qos(prefetch_count=1)
        queue = await channel.get_queue(self._name, ensure=False)
        arrived: asyncio.Future[AbstractIncomingMessage] = asyncio.get_running_loop().create_future()

        async def receive(message: AbstractIncomingMessage) -> None:
            if arrived.cancelled():
                self._on_late(message)
            else:
                arrived.set_result(message)

        tag = await queue.consume(receive)
        await asyncio.wait({arrived}, timeout=CONSUME_TIMEOUT_S)
        await queue.cancel(tag)
        return None if arrived.cancel() else arrived.result()

    async def _open(self) -> AbstractChannel:
        if self._channel is None or self._channel.is_closed:
            self._channel = await self._connection.channel(publisher_confirms=False)
        return self._channel


def stream_fault(queue: str) -> str:
    """Explain why a worker cannot use a stream as its jobs queue."""
    return (
        f"queue {queue} is a stream, which keeps the jobs that were processed: use another name"
        " (VQA_JOBS_QUEUE), or delete it and run `vqa-worker topology apply`"
    )
