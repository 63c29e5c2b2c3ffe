"""A simulated model API with minimal overhead: `python -m tests.bench.simulator --port N`.

It buffers no image. It searches the request body for `;base64,` while it arrives, computes a
running CRC-32 of the text up to the closing quote, and keeps only the text between the
images. Its answer has the length and the checksum of each image, so it depends on every
byte; for a link it has the path. Further endpoints:

- `GET /bench/set?latency=S`: set the seconds from the request's last byte to the answer;
- `GET /bench/stats`: counters as JSON; `max_concurrent` and `cpu_s` count since the previous call;
- all other requests, such as `POST /v1/traces`, are discarded.
"""

import argparse
import asyncio
import json
import re
import resource
import socket
import ssl
from dataclasses import dataclass
from typing import Any, Final, cast
from urllib.parse import parse_qs, urlsplit

import uvloop
from isal import isal_zlib

MARKER: Final = b";base64,"
# A pattern searches a memoryview without a copy; `bytes.find` cannot.
_QUOTE: Final = re.compile(b'"')
_HEAD_ENDS: Final = b"\r\n\r\n"
_LINE_ENDS: Final = b"\r\n"
# The limit of request heads and of the text between images.
_MAX_TEXT_BYTES: Final = 1_000_000
# Fits into the cache of a core.
_READ_BYTES: Final = 256 * 1024


class InvalidRequestError(Exception):
    """The request is invalid; the message has the reason."""


class ImageChecksums:
    """Parse a request's JSON incrementally: compute checksums of images, keep the rest in `text`."""

    def __init__(self) -> None:
        self.text = bytearray()
        self.checksums: list[tuple[int, int]] = []
        """Length and CRC-32 of the base64 text of each image."""
        self._searched = 0
        self._length = 0
        self._crc: int | None = None

    def feed(self, data: memoryview) -> None:
        """Parse the next bytes of the body."""
        while data:
            data = self._feed_text(data) if self._crc is None else self._feed_image(data, self._crc)

    def _feed_image(self, data: memoryview, crc: int) -> memoryview:
        quote = _QUOTE.search(data)
        image = data[: quote.start()] if quote else data
        self._crc = isal_zlib.crc32(image, crc)
        self._length += len(image)
        if quote:
            self.checksums.append((self._length, self._crc))
            self._crc = None
        return data[len(image) :]

    def _feed_text(self, data: memoryview) -> memoryview:
        before = len(self.text)
        self.text += data[: _MAX_TEXT_BYTES + 1]
        found = self.text.find(MARKER, max(0, self._searched - len(MARKER) + 1))
        if found < 0:
            self._searched = len(self.text)
            if self._searched > _MAX_TEXT_BYTES:
                raise InvalidRequestError("too much text between the images")
            return data[:0]
        image = found + len(MARKER)
        del self.text[image:]
        self._searched = image
        self._crc = self._length = 0
        return data[image - before :]

    def answer(self) -> str:
        """Return the answer, in the order of the images."""
        images = iter(self.checksums)
        described = []
        for url in _image_urls(json.loads(self.text)):
            if url.encode().endswith(MARKER):
                described.append(describe_image(*next(images)))
            else:
                described.append(describe_link(url))
        return " ".join(described)


def describe_image(base64_length: int, crc: int) -> str:
    """Return the answer for an image."""
    return f"{base64_length}:{crc:08x}"


def describe_link(url: str) -> str:
    """Return the answer for a link."""
    return urlsplit(url).path


def _image_urls(request: dict[str, Any]) -> list[str]:
    return [
        part["image_url"]["url"]
        for message in request["messages"]
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] == "image_url"
    ]


@dataclass
class Counters:
    """The server's counters."""

    requests: int = 0
    concurrent: int = 0
    max_concurrent: int = 0
    body_bytes: int = 0
    cpu_reported_s: float = 0.0
    latency_s: float = 0.0

    def request_started(self) -> None:
        """Count a request at the end of its head."""
        self.requests += 1
        self.concurrent += 1
        self.max_concurrent = max(self.max_concurrent, self.concurrent)

    def counters(self) -> dict[str, float]:
        """Return all counters, and reset those that count since the previous call."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        cpu_s = usage.ru_utime + usage.ru_stime
        looked = {
            "requests": self.requests,
            "body_bytes": self.body_bytes,
            "max_concurrent": self.max_concurrent,
            "cpu_s": cpu_s - self.cpu_reported_s,
        }
        self.cpu_reported_s = cpu_s
        self.max_concurrent = self.concurrent
        return looked


class Connection(asyncio.BufferedProtocol):
    """A client's connection: HTTP/1.1 with keep-alive, without pipelining."""

    # Shared by all connections: the data is consumed before the next read.
    _buffer = bytearray(_READ_BYTES)
    _view = memoryview(_buffer)

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._transport: asyncio.Transport | None = None
        self._head = bytearray()
        self._target = ""
        self._body: ImageChecksums | None = None
        # Remaining bytes of the body or chunk; None before a chunk size.
        self._left: int | None = 0
        self._chunked = False
        self._size_line = bytearray()
        self._answering: asyncio.TimerHandle | None = None
        self._counted = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not subclasses.
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        if self._answering is not None:
            self._answering.cancel()
        if self._counted:
            self._counters.concurrent -= 1
        self._transport = None

    def get_buffer(self, sizehint: int) -> bytearray:
        del sizehint
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        data = self._view[:nbytes]
        try:
            while data:
                data = self._take_head(data) if self._body is None else self._take_body(data, self._body)
        except (InvalidRequestError, ValueError, KeyError, StopIteration) as error:
            self._send(400, {"error": {"message": f"{type(error).__name__}: {error}"}})
            if self._transport is not None:
                self._transport.close()

    def _take_head(self, data: memoryview) -> memoryview:
        before = len(self._head)
        self._head += data
        ends = self._head.find(_HEAD_ENDS, max(0, before - len(_HEAD_ENDS) + 1))
        if ends < 0:
            if len(self._head) > _MAX_TEXT_BYTES:
                raise InvalidRequestError("the head is too long")
            return data[:0]
        rest = data[ends + len(_HEAD_ENDS) - before :]
        lines = bytes(self._head[:ends]).decode("latin-1").split("\r\n")
        self._head.clear()
        self._begin(lines)
        return rest

    def _begin(self, lines: list[str]) -> None:
        self._target = lines[0].split(" ")[1]
        headers = {name.lower(): value.strip() for name, _, value in (it.partition(":") for it in lines[1:])}
        self._chunked = headers.get("transfer-encoding", "").lower() == "chunked"
        self._left = None if self._chunked else int(headers.get("content-length", "0"))
        self._body = ImageChecksums()
        if self._target.endswith("/chat/completions"):
            self._counted = True
            self._counters.request_started()
        if self._left == 0:
            self._ended(self._body)

    def _take_body(self, data: memoryview, body: ImageChecksums) -> memoryview:
        if self._left is None:
            return self._take_chunk_size(data, body)
        part = data[: self._left]
        # The chunk includes the line end that closes it, the body does not.
        inside = part
        if self._chunked:
            inside = part[: max(0, self._left - len(_LINE_ENDS))]
        body.feed(inside)
        self._counters.body_bytes += len(inside)
        self._left -= len(part)
        if self._left == 0:
            if self._chunked:
                self._left = None
            else:
                self._ended(body)
        return data[len(part) :]

    def _take_chunk_size(self, data: memoryview, body: ImageChecksums) -> memoryview:
        """Read the line with the size of the next chunk (RFC 9112, 7.1)."""
        before = len(self._size_line)
        self._size_line += data[:64]
        ends = self._size_line.find(_LINE_ENDS)
        if ends < 0:
            return data[64:]
        size = int(bytes(self._size_line[:ends]).split(b";")[0], 16)
        if size == 0:
            # The clients send no trailers.
            whole = ends + 2 * len(_LINE_ENDS)
            if len(self._size_line) < whole:
                return data[64:]
            self._size_line.clear()
            self._ended(body)
            return data[whole - before :]
        self._size_line.clear()
        self._left = size + len(_LINE_ENDS)
        return data[ends + len(_LINE_ENDS) - before :]

    def _ended(self, body: ImageChecksums) -> None:
        self._body = None
        if not self._counted:
            self._send(200, self._control())
            return
        answer = _completion(body.answer())
        if self._counters.latency_s:
            loop = asyncio.get_running_loop()
            self._answering = loop.call_later(self._counters.latency_s, self._send, 200, answer)
        else:
            self._send(200, answer)

    def _control(self) -> dict[str, float]:
        url = urlsplit(self._target)
        if not url.path.startswith("/bench/"):
            # Spans of the worker; they must not reset the counters.
            return {}
        if url.path == "/bench/set":
            self._counters.latency_s = float(parse_qs(url.query)["latency"][0])
        return self._counters.counters()

    def _send(self, status: int, body: dict[str, Any]) -> None:
        self._answering = None
        if self._counted:
            self._counted = False
            self._counters.concurrent -= 1
        if self._transport is None:
            return
        content = json.dumps(body).encode()
        head = (
            f"HTTP/1.1 {status} .\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        )
        self._transport.write(head.encode() + content)


def _completion(content: str) -> dict[str, Any]:
    return {
        "id": "chatcmpl-bench",
        "object": "chat.completion",
        "created": 1,
        "model": "bench",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
        ],
        "usage": {"prompt_tokens": 1000, "completion_tokens": 10, "total_tokens": 1010},
    }


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--tls-port", type=int)
    parser.add_argument("--certificate")
    parser.add_argument("--key")
    uvloop.run(_serve(parser.parse_args()))


async def _serve(arguments: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    counters = Counters()
    servers = [await loop.create_server(lambda: Connection(counters), sock=_listening(arguments.port))]
    if arguments.tls_port:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(arguments.certificate, arguments.key)
        listening = _listening(arguments.tls_port)
        servers.append(await loop.create_server(lambda: Connection(counters), sock=listening, ssl=context))
    await asyncio.gather(*(server.serve_forever() for server in servers))


def _listening(port: int) -> socket.socket:
    listener = socket.create_server(("127.0.0.1", port), backlog=1024)
    listener.settimeout(0)
    return listener


if __name__ == "__main__":
    main()
