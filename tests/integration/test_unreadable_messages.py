"""Invalid jobs and malformed messages are reported, dead-lettered, and never block other jobs."""

import contextlib
import json
import socket
import struct
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import BinaryIO, Self
from urllib.parse import unquote, urlsplit

import aio_pika
import pamqp.frame
import pytest
from aio_pika.abc import AbstractIncomingMessage
from aiormq.abc import DeliveredMessage
from aiormq.channel import Channel
from pamqp import commands
from pamqp.base import Frame
from pamqp.header import ContentHeader

from deploy.local.stack import Stack
from tests.running import Client, Reply, Worker, calls_with, until
from worker.rabbitmq.properties import install_tolerant_decoders

MAX_JOB_BYTES = 5000

# AMQP 0-9-1 §4.2.6.1, and the order of the properties of class basic (§1.8 of its reference).
FLAGS = {
    "content_type": 15,
    "content_encoding": 14,
    "headers": 13,
    "delivery_mode": 12,
    "priority": 11,
    "correlation_id": 10,
    "reply_to": 9,
    "expiration": 8,
    "message_id": 7,
    "timestamp": 6,
    "type": 5,
    "user_id": 4,
    "app_id": 3,
    "cluster_id": 2,
}
CLASS_BASIC, CHANNEL = 60, 1


def short(text: str | bytes) -> bytes:
    """Encode an AMQP short string; its bytes may be invalid UTF-8."""
    raw = text.encode() if isinstance(text, str) else text
    return bytes([len(raw)]) + raw


def long(raw: bytes) -> bytes:
    """Encode a long string, a table or an array: its length, then its bytes."""
    return struct.pack(">I", len(raw)) + raw


def table(*fields: tuple[str | bytes, bytes]) -> bytes:
    """Encode an AMQP table; each value starts with its type code."""
    return long(b"".join(short(name) + value for name, value in fields))


def nested(depth: int) -> bytes:
    """Encode nested tables."""
    value = b"t\x01"
    for _ in range(depth):
        value = b"F" + table(("x", value))
    return value


class RawPublisher:
    """Publishes raw bytes as properties, which no client library would send."""

    def __init__(self, connection: socket.socket, stream: BinaryIO) -> None:
        self._connection = connection
        self._stream = stream

    @classmethod
    @contextlib.contextmanager
    def to(cls, url: str) -> Iterator[Self]:
        """Connect to the broker."""
        parts = urlsplit(url)
        address = parts.hostname or "", parts.port or 5672
        with socket.create_connection(address, timeout=30) as connection, connection.makefile("rb") as stream:
            publisher = cls(connection, stream)
            credentials = f"\0{unquote(parts.username or '')}\0{unquote(parts.password or '')}"
            publisher._open(credentials, unquote(parts.path[1:]) or "/")
            yield publisher

    def publish(self, body: bytes, key: str | bytes, exchange: str = "", /, **properties: bytes) -> None:
        """Publish and wait for the confirm; `properties` are encoded bytes."""
        method = struct.pack(">HHH", CLASS_BASIC, 40, 0) + short(exchange) + short(key) + b"\0"
        flags = sum(1 << FLAGS[name] for name in properties)
        values = b"".join(properties[name] for name in FLAGS if name in properties)
        header = struct.pack(">HHQH", CLASS_BASIC, 0, len(body), flags) + values
        self._send(1, method)
        self._send(2, header)
        for start in range(0, len(body), 100_000):
            self._send(3, body[start : start + 100_000])
        self._expect(commands.Basic.Ack)

    def _open(self, credentials: str, vhost: str) -> None:
        self._connection.sendall(b"AMQP\0\0\x09\x01")
        self._expect(commands.Connection.Start)
        self._call(commands.Connection.StartOk(response=credentials), channel=0)
        self._expect(commands.Connection.Tune)
        self._call(commands.Connection.TuneOk(channel_max=CHANNEL, frame_max=131_072), channel=0)
        self._call(commands.Connection.Open(vhost), channel=0)
        self._expect(commands.Connection.OpenOk)
        self._call(commands.Channel.Open())
        self._expect(commands.Channel.OpenOk)
        self._call(commands.Confirm.Select())
        self._expect(commands.Confirm.SelectOk)

    def _call(self, method: Frame, channel: int = CHANNEL) -> None:
        self._connection.sendall(pamqp.frame.marshal(method, channel))

    def _send(self, kind: int, payload: bytes) -> None:
        self._connection.sendall(struct.pack(">BHI", kind, CHANNEL, len(payload)) + payload + b"\xce")

    def _expect(self, kind: type[Frame]) -> None:
        head = self._stream.read(7)
        rest = self._stream.read(struct.unpack(">I", head[3:])[0] + 1)
        _, _, frame = pamqp.frame.unmarshal(head + rest)
        assert isinstance(frame, kind), f"the broker answered {frame!r}"


@dataclass(frozen=True)
class Post:
    """A worker seen from outside: its jobs queue, results and dead letters."""

    stack: Stack
    worker: Worker
    client: Client
    raw: RawPublisher
    dead_letters: list[AbstractIncomingMessage]

    def send(self, body: bytes, **properties: bytes) -> None:
        """Publish with exactly these properties; without `message_id` the message has none."""
        self.raw.publish(body, self.worker.jobs_queue, **properties)

    async def result_to(self, correlation_id: str) -> Reply:
        """Wait for the result with this correlation id."""

        def find() -> list[Reply]:
            replies = (reply for replies in self.client.replies.values() for reply in replies)
            return [reply for reply in replies if reply.message.correlation_id == correlation_id]

        found: list[Reply] = await until(find, f"a result for {correlation_id}")
        return found[0]

    async def dead_letter_of(self, body: bytes) -> AbstractIncomingMessage:
        """Wait for the dead letter with this body."""
        found: list[AbstractIncomingMessage] = await until(
            lambda: [dead_letter for dead_letter in self.dead_letters if dead_letter.body == body],
            f"the dead letter of {body!r}",
        )
        return found[0]

    async def nothing_is_left(self) -> None:
        """Wait until every earlier message is settled: a new job is answered."""
        assert (await self.client.ask(question="Still there?", images=["https://example.com/"])).body[
            "status"
        ] == "succeeded"
        await until(lambda: self.worker.metric("vqa_jobs_in_flight") == 0, "no job is in flight")


@pytest.fixture(scope="module")
async def post(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Post]:
    async with (
        Worker.running(
            stack, tmp_path_factory.mktemp("post"), VQA_MAX_JOB_BYTES=str(MAX_JOB_BYTES)
        ) as worker,
        Client.of(stack, worker) as client,
        client.reading(worker.dead_letter_queue) as dead_letters,
    ):
        with RawPublisher.to(stack.rabbitmq.url) as raw:
            yield Post(stack, worker, client, raw, dead_letters)
            await post_is_clean(worker, client)


async def post_is_clean(worker: Worker, client: Client) -> None:
    """Check at the end that the worker holds no message and never lost its connection."""
    await until(lambda: worker.metric("vqa_jobs_in_flight") == 0, "no job is in flight")
    assert await client.depth(worker.jobs_queue) == 0
    reported = [line for line in worker.log() if line["level"] != "info" and line["event"] != "job_finished"]
    assert reported == []


def _with_id(job_id: str, rest: str) -> bytes:
    return b'{"id":"%s",%s}' % (job_id.encode(), rest.encode())


# Invalid bodies. If the id can be read the publisher gets a result and nothing is dead-lettered.

READABLE_ID = {
    "NaN": ('"question":"?","images":["x"],"metadata":{"x":NaN}', "strict JSON"),
    "Infinity": ('"question":"?","images":["x"],"metadata":{"x":Infinity}', "strict JSON"),
    "-Infinity": ('"question":"?","images":["x"],"params":{"seed":-Infinity}', "strict JSON"),
    "1e999": ('"question":"?","images":["x"],"metadata":{"x":[1e999]}', "too large"),
    "long integer": (f'"question":"?","images":["x"],"metadata":{{"x":{"9" * 300}}}', "too large"),
    "huge integer": (f'"question":"?","images":["x"],"metadata":{{"x":{"9" * 4400}}}', "strict JSON"),
    "-1e999": ('"question":"?","images":["x"],"params":{"x":-1e999}', "too large"),
    "lone surrogate": (r'"question":"\ud83d?","images":["x"]', "strict JSON"),
    "lone low surrogate": (r'"question":"?","images":["x"],"metadata":{"\udc00":1}', "strict JSON"),
    "neither form": ('"metadata":{}', "question and images"),
    "both forms": ('"question":"?","images":["x"],"messages":[{"role":"user","content":"?"}]', "short form"),
    "unknown field": ('"question":"?","images":["x"],"imagse":[]', "imagse: unknown field"),
    "wrong type": ('"question":7,"images":["x"]', "question: "),
    "two wrong types": ('"question":7,"images":"x"', "; images: "),
}


@pytest.mark.parametrize("kind", READABLE_ID)
async def test_with_an_id_in_the_body_the_publisher_gets_a_result_and_nothing_is_dead_lettered(
    post: Post, kind: str
) -> None:
    rest, says = READABLE_ID[kind]
    job_id = uuid.uuid4().hex
    body = _with_id(job_id, rest)
    post.send(body)
    reply = await post.client.result(job_id)
    await post.nothing_is_left()

    _is_invalid(reply, says)
    assert reply.body["metadata"] == {}
    assert reply.message.correlation_id == job_id
    assert [dead_letter for dead_letter in post.dead_letters if dead_letter.body == body] == []


NO_READABLE_ID = {
    "empty": b"",
    "blank": b" \n",
    "text": b"What is in this image?",
    "cut": b'{"id":"cut","question":"?","images":["x"]',
    "two objects": b'{"id":"two"}{"id":"objects"}',
    "trailing comma": b'{"id":"comma","question":"?","images":["x"],}',
    "single quotes": b"{'id':'quotes'}",
    "comment": b'{"id":"comment"} // yes',
    "number": b"7",
    "string": b'"id"',
    "null": b"null",
    "array": b'[{"id":"array","question":"?","images":["x"]}]',
    "byte order mark only": b"\xef\xbb\xbf",
    "encoded twice": json.dumps('{"id":"2","question":"?","images":["https://example.com/"]}').encode(),
    "UTF-16": '{"id":"u","question":"?","images":["https://example.com/"]}'.encode("utf-16"),
    "UTF-16 bare": '{"id":"u","question":"?","images":["https://example.com/"]}'.encode("utf-16-le"),
    "zeros": bytes(100),
    "noise": bytes(range(256)),
    "gzip without content encoding": b"\x1f\x8b\x08\0\0\0\0\0\0\x03\xabV\xcaLQ\xb2RJL*V\xaa\x05\0",
    "id is a number": b'{"id":7,"question":"?","images":["https://example.com/"]}',
    "id is empty": b'{"id":"","question":"?","images":["https://example.com/"]}',
    "id is too long": b'{"id":"%s","question":"?","images":["https://example.com/"]}' % (b"x" * 257),
    "id has controls": rb'{"id":"a\nb","question":"?","images":["https://example.com/"]}',
    "id is a list": b'{"id":["x"],"question":"?","images":["https://example.com/"]}',
    "id has a lone surrogate": rb'{"id":"\ud800","question":"?","images":["https://example.com/"]}',
    "deeply nested arrays": b"[" * 4000,
    "deeply nested objects": b'{"x":' * 900,
    "nested and closed": b'{"id":"deep","question":"?","images":["x"],"metadata":{"x":%s}}'
    % (b"[" * 2000 + b"]" * 2000),
    "too long": b'{"question":"%s","images":["https://example.com/"]}' % (b"?" * MAX_JOB_BYTES),
    "no id": b'{"question":"?","images":["https://example.com/"]}',
}


async def test_without_an_id_and_reply_to_a_message_is_dead_lettered_without_a_result(post: Post) -> None:
    sent = int(time.time()) - 100
    await post.nothing_is_left()
    reported = sum(map(len, post.client.replies.values()))
    for body in NO_READABLE_ID.values():
        post.send(body, timestamp=struct.pack(">Q", sent), content_type=short("text/x"))
    for kind, body in NO_READABLE_ID.items():
        dead_letter = await post.dead_letter_of(body)
        post.dead_letters.remove(dead_letter)
        assert dead_letter.headers["vqa-error-code"] == "invalid_job", kind
        assert dead_letter.headers["vqa-error-message"], kind
        assert dead_letter.headers["vqa-attempts"] == 0, kind
        assert datetime.fromisoformat(str(dead_letter.headers["vqa-died-at"])) <= datetime.now(UTC), kind
        assert dead_letter.timestamp == datetime.fromtimestamp(sent, UTC), kind
        assert dead_letter.content_type == "text/x", kind
        assert (dead_letter.correlation_id, dead_letter.reply_to) == (None, None), kind
    await post.nothing_is_left()
    assert sum(map(len, post.client.replies.values())) == reported + 1  # the job of `nothing_is_left`


async def test_with_a_message_id_the_publisher_gets_a_result_too(post: Post) -> None:
    messages = {uuid.uuid4().hex: kind for kind in NO_READABLE_ID if kind != "no id"}
    for message_id, kind in messages.items():
        post.send(NO_READABLE_ID[kind], message_id=short(message_id))
    for message_id, kind in messages.items():
        reply = await post.client.result(message_id)
        dead_letter = await post.dead_letter_of(NO_READABLE_ID[kind])
        post.dead_letters.remove(dead_letter)
        _is_invalid(reply, "")
        assert reply.message.correlation_id == message_id
        assert dead_letter.message_id == message_id, kind
        assert dead_letter.headers["vqa-error-message"] == reply.body["error"]["message"], kind


async def test_with_a_correlation_id_only_the_result_names_no_job(post: Post) -> None:
    body, correlation_id = uuid.uuid4().bytes, uuid.uuid4().hex
    post.send(body, correlation_id=short(correlation_id))
    reply = await post.result_to(correlation_id)
    dead_letter = await post.dead_letter_of(body)

    _is_invalid(reply, "strict JSON")
    assert reply.body["id"] is None
    assert dead_letter.correlation_id == correlation_id


async def test_with_a_reply_to_only_the_result_goes_there(post: Post) -> None:
    body, queue = uuid.uuid4().bytes, await post.client.reply_queue()
    post.send(body, reply_to=short(queue))

    def find() -> list[Reply]:
        return [reply for reply in post.client.replies.get(None, []) if reply.message.routing_key == queue]

    (reply,) = await until(find, "the result")
    _is_invalid(reply, "strict JSON")
    assert reply.body["id"] is None
    assert reply.message.correlation_id is None
    assert (await post.dead_letter_of(body)).reply_to == queue


async def test_an_invalid_message_id_gets_a_result_too(post: Post) -> None:
    body, correlation_id = b'{"question":"?","images":["x"]}   ', uuid.uuid4().hex
    post.send(body, message_id=short("two\nlines"), correlation_id=short(correlation_id))
    reply = await post.result_to(correlation_id)

    _is_invalid(reply, "id: ")
    assert reply.body["id"] is None
    assert (await post.dead_letter_of(body)).message_id == "two\nlines"


async def test_a_replayed_dead_letter_without_an_id_is_still_unreadable(post: Post) -> None:
    """The message_id that the worker generated must not become the job's id."""
    marker = uuid.uuid4().hex
    body = b'{"question":"%s","images":["https://example.com/"]}' % marker.encode()
    post.send(body)
    dead_letter = await post.dead_letter_of(body)
    post.dead_letters.remove(dead_letter)
    await post.client.publish(body, message_id=dead_letter.message_id, headers=dead_letter.headers)
    again = await post.dead_letter_of(body)

    assert again.headers["vqa-error-code"] == "invalid_job"
    assert dead_letter.message_id not in post.client.replies
    assert calls_with(post.stack, marker) == []


async def test_a_body_of_exactly_the_allowed_size_is_a_job(post: Post) -> None:
    job_id = uuid.uuid4().hex
    body = _with_id(job_id, '"question":"?","images":["https://example.com/"]')
    post.send(body.ljust(MAX_JOB_BYTES))
    assert (await post.client.result(job_id)).body["status"] == "succeeded"
    post.client.replies.clear()
    post.send(body.ljust(MAX_JOB_BYTES + 1))
    _is_invalid(await post.client.result(job_id), f"VQA_MAX_JOB_BYTES allows {MAX_JOB_BYTES}")


async def test_very_large_messages_are_rejected(post: Post) -> None:
    body, message_id = b"x" * 10_000_000, uuid.uuid4().hex
    post.send(body, message_id=short(message_id))
    _is_invalid(await post.client.result(message_id), "10000000 bytes")
    assert (await post.dead_letter_of(body)).message_id == message_id


# Properties that no client library would send, with a valid job.

FINE = {
    "priority 255": {"priority": b"\xff"},
    "timestamp 0": {"timestamp": bytes(8)},
    "timestamp in milliseconds": {"timestamp": struct.pack(">Q", 1_900_000_000_000)},
    "timestamp in microseconds": {"timestamp": struct.pack(">Q", 1_900_000_000_000_000)},
    "timestamp 2**63": {"timestamp": struct.pack(">Q", 2**63)},
    "timestamp 2**64-1": {"timestamp": b"\xff" * 8},
    "content type not UTF-8": {"content_type": short(b"\xff\xfe")},
    "content encoding": {"content_encoding": short("gzip")},
    "content encoding not UTF-8": {"content_encoding": short(b"\xc3\x28")},
    "correlation id not UTF-8": {"correlation_id": short(b"\x80" * 255)},
    "correlation id empty": {"correlation_id": short("")},
    "reply to not UTF-8": {"reply_to": short(b"\xed\xa0\x80")},
    "reply to with controls": {"reply_to": short("vqa.results.\0\n")},
    "message id not UTF-8": {"message_id": short(b"id-\xe9")},
    "type not UTF-8": {"type": short(b"\xf8\x88\x80\x80\x80")},
    "app id not UTF-8": {"app_id": short(b"\xff")},
    "cluster id": {"cluster_id": short(b"\xff")},
    "everything not UTF-8": {
        name: short(b"\xff" + name.encode())
        for name in ("content_type", "content_encoding", "correlation_id", "message_id", "type", "app_id")
    },
    "no headers": {"headers": table()},
    "key not UTF-8": {"headers": table((b"\xff\xfe", b"t\x01"))},
    "key empty": {"headers": table(("", b"t\x01"))},
    "key of 255 bytes": {"headers": table(("k" * 255, b"t\x01"))},
    "keys twice": {"headers": table(("k", b"t\x01"), ("k", b"t\x00"))},
    "value not UTF-8": {"headers": table(("traceparent", b"S" + long(b"\xff" * 40)))},
    "all types": {
        "headers": table(
            ("bool", b"t\x01"),
            ("byte", b"b\xff"),
            ("unsigned byte", b"B\xff"),
            ("short", b"s" + struct.pack(">h", -2)),
            ("unsigned short", b"u" + struct.pack(">H", 65535)),
            ("int", b"I" + struct.pack(">i", -2)),
            ("unsigned int", b"i" + struct.pack(">I", 2**32 - 1)),
            ("long", b"l" + struct.pack(">q", -(2**63))),
            ("float", b"f" + struct.pack(">f", 1.5)),
            ("double", b"d" + struct.pack(">d", -0.0)),
            ("decimal", b"D\xff" + b"\xff" * 4),
            ("string", b"S" + long("ü".encode())),
            ("array", b"A" + long(b"V" + b"t\x01" + b"A" + long(b""))),
            ("timestamp", b"T" + struct.pack(">Q", 2**63)),
            ("table", nested(3)),
            ("void", b"V"),
            ("bytes", b"x" + long(b"\0\xff")),
        )
    },
    "timestamp in a header": {"headers": table(("timestamp_in_ms", b"T" + struct.pack(">Q", 2**62)))},
    "time in the queue is negative": {"headers": table(("timestamp_in_ms", b"l" + struct.pack(">q", -5)))},
    "time in the queue is text": {"headers": table(("timestamp_in_ms", b"S" + long(b"now")))},
    "time in the queue is far off": {
        "headers": table(("timestamp_in_ms", b"l" + struct.pack(">q", 2**63 - 1)))
    },
    "nested tables": {"headers": table(("deep", nested(300)))},
    "deeply nested tables": {"headers": table(("deep", nested(5000)))},
    "malformed x-death": {
        "headers": table(
            ("x-death", b"S" + long(b"no")),
            ("x-delivery-count", b"S" + long(b"99")),
            ("vqa-deliveries", b"S" + long(b"99")),
            ("vqa-copy", b"t\x01"),
        )
    },
    "malformed attempts": {"headers": table((b"\xff", b"t\x01"), ("vqa-attempts", b"T" + b"\xff" * 8))},
}


@pytest.mark.parametrize("kind", FINE)
async def test_a_job_with_any_properties_is_answered(post: Post, kind: str) -> None:
    job_id = uuid.uuid4().hex
    post.send(_with_id(job_id, '"question":"?","images":["https://example.com/"]'), **FINE[kind])
    reply = await post.client.result(job_id)
    assert reply.body["status"] == "succeeded", reply.body
    assert reply.body["attempts"] == 1
    queued_s = reply.body["timings"]["queued_s"]
    assert queued_s is None or queued_s >= 0


async def test_a_routing_key_that_is_not_utf8_is_accepted(stack: Stack, post: Post) -> None:
    job_id, exchange = uuid.uuid4().hex, f"to-{post.worker.jobs_queue}"
    async with await aio_pika.connect(stack.rabbitmq.url) as connection:
        channel = await connection.channel()
        fanout = await channel.declare_exchange(exchange, aio_pika.ExchangeType.FANOUT, auto_delete=True)
        queue = await channel.get_queue(post.worker.jobs_queue, ensure=False)
        await queue.bind(fanout)
        body = _with_id(job_id, '"question":"?","images":["https://example.com/"]')
        post.raw.publish(body, b"\xff\xfe", exchange)
    assert (await post.client.result(job_id)).body["status"] == "succeeded"


@pytest.mark.parametrize("mode", [0, 3, 255])
def test_an_invalid_delivery_mode_is_read_as_not_persistent(mode: int) -> None:
    """RabbitMQ 3 rejects such a message; later versions deliver it."""
    install_tolerant_decoders()
    header = ContentHeader()
    header.unmarshal(struct.pack(">HHQHB", CLASS_BASIC, 0, 0, 1 << FLAGS["delivery_mode"], mode))
    delivered = DeliveredMessage(
        delivery=commands.Basic.Deliver("tag", 1), header=header, body=b"", channel=Channel.__new__(Channel)
    )
    assert aio_pika.IncomingMessage(delivered).delivery_mode is aio_pika.DeliveryMode.NOT_PERSISTENT


async def test_poison_messages_do_not_delay_jobs(post: Post) -> None:
    """All invalid messages are published at once, each next to a valid job."""
    ids = []
    bodies = []
    for properties in FINE.values():
        bodies.append(uuid.uuid4().bytes)
        post.send(bodies[-1], **properties)
        ids.append(uuid.uuid4().hex)
        await post.client.publish({"id": ids[-1], "question": "?", "images": ["https://example.com/"]})
    for job_id in ids:
        assert (await post.client.result(job_id)).body["status"] == "succeeded"
    for body in bodies:
        dead_letter = await post.dead_letter_of(body)
        assert dead_letter.headers["vqa-error-code"] == "invalid_job"
        assert dead_letter.delivery_mode is aio_pika.DeliveryMode.PERSISTENT
    await post.nothing_is_left()


def _is_invalid(reply: Reply, says: str) -> None:
    body = reply.body
    assert body["status"] == "failed"
    assert body["error"]["code"] == "invalid_job"
    assert body["error"]["retryable"] is False
    assert says in body["error"]["message"]
    assert body["error"]["message"]
    assert body["answer"] is None
    assert body["model"] is None
    assert json.loads(reply.message.body)["usage"] is None
