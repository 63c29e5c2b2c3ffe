"""Encode AMQP messages, and read them as the consumer does."""

import asyncio
import struct
from typing import Any

import aio_pika
import pamqp.frame
from aiormq.abc import DeliveredMessage
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from worker.jobs.delivery import Delivery
from worker.rabbitmq.deliveries import to_delivery


def short(content: bytes) -> bytes:
    return bytes([len(content)]) + content


def table(content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + content


def header_frame(raw: dict[str, bytes]) -> bytes:
    """Return a content header frame with these properties and, last, the app id "the end"."""
    ordered = {name: raw[name] for name in Basic.Properties.flags if name in raw} | {
        "app_id": short(b"the end")
    }
    flags = sum(Basic.Properties.flags[name] for name in ordered)
    payload = struct.pack(">HHQH", 60, 0, 0, flags) + b"".join(ordered.values())
    return struct.pack(">BHI", 2, 1, len(payload)) + payload + b"\xce"


def received(raw: dict[str, bytes]) -> ContentHeader:
    frame = header_frame(raw)
    consumed, channel, header = pamqp.frame.unmarshal(frame)
    assert (consumed, channel) == (len(frame), 1)
    assert isinstance(header, ContentHeader)
    return header


def delivered(raw: dict[str, bytes], *, redelivered: bool = False) -> Delivery:
    """Return the consumer's delivery for a message with these properties."""
    deliver = Basic.Deliver("tag", 1, redelivered, "", "jobs")
    message: Any = DeliveredMessage(delivery=deliver, header=received(raw), body=b"{}", channel=None)  # type: ignore[arg-type]
    return to_delivery(
        aio_pika.IncomingMessage(message),
        can_ack=lambda: True,
        wait_until_requeue_is_safe=lambda: asyncio.sleep(0),
    )
