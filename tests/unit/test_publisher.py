"""Publishing without a broker: errors in the message are raised at once."""

import asyncio
from collections.abc import Callable, Iterator, Mapping

import pytest
from pamqp.common import FieldValue

from tests.unit.fakes import TOPOLOGY
from vqa_worker.rabbitmq.connection import Broker
from vqa_worker.rabbitmq.outgoing import OutgoingMessage
from vqa_worker.rabbitmq.requests import Requests
from worker.rabbitmq.properties import is_encodable
from worker.rabbitmq.publisher import Publisher

BROKER = Broker("amqp://127.0.0.1:1/", None, "test")


class BrokenHeaders(Mapping[str, FieldValue]):
    """Headers that raise: aio-pika treats RuntimeError as a lost connection."""

    def __getitem__(self, name: str) -> FieldValue:
        raise RuntimeError(name)

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[str]:
        raise RuntimeError("broken headers")


def publisher() -> Publisher:
    return Publisher(BROKER, TOPOLOGY)


def requests() -> Requests:
    return Requests(
        BROKER,
        "jobs",
        "queue",
        reply_exchange="",
        expires_s=60,
        on_result=lambda _: None,
        on_loss=lambda: None,
    )


@pytest.mark.parametrize("make", [publisher, requests])
async def test_an_error_in_building_a_message_is_raised_and_not_retried(
    make: Callable[[], Publisher | Requests],
) -> None:
    message = OutgoingMessage(body=b"{}", routing_key="jobs", headers=BrokenHeaders())
    async with asyncio.timeout(60):
        with pytest.raises(RuntimeError, match="broken headers"):
            await make().publish(message)


def test_a_header_too_deeply_nested_to_encode_is_not_retried() -> None:
    value: FieldValue = "innermost"
    for _ in range(10_000):
        value = [value]
    assert not is_encodable("deep", value)
