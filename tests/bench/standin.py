"""A simulator for the model's API that costs next to nothing: `python -m tests.bench.standin --port N`.

It holds no picture. It looks for `;base64,` in the bytes of the request's body as they arrive, keeps a
running CRC-32 of what follows up to the closing quote, and throws that away; of the body only the text around
the pictures remains. Its answer names each picture's length and checksum, so that it depends on every byte
that came; a link is answered with its path. What it does next to the API:

- `GET /bench/set?latency=S`: seconds that every answer waits from here on, from the request's last byte;
- `GET /bench/stats`: its counters as JSON; `max_concurrent` and `cpu_s` count from the previous look.
- anything else, such as `POST /v1/traces`: deleted.
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
# Unlike `bytes.find`, a pattern searches a memoryview without copying it.
_QUOTE: Final = re.compile(b'"')
_HEAD_ENDS: Final = b"\r\n\r\n"
_LINE_ENDS: Final = b"\r\n"
# Text around pictures, and heads: more than this is not a request of this benchmark.
_MOST_TEXT_BYTES: Final = 1_000_000
# Fits into a core's own cache.
_READ_BYTES: Final = 256 * 1024


class NoRequestError(Exception):
    """What arrived is not a request that this server understands; the message says why."""


class Pictures:
    """Reads a request's JSON as it comes: the pictures into checksums, the rest into `text`."""

    def __init__(self) -> None:
        self.text = bytearray()
        self.seen: list[tuple[int, int]] = []
        """Length of the base64 text and its CRC-32, one a picture."""
        self._looked = 0
        self._length = 0
        self._crc: int | None = None

    def feed(self, data: memoryview) -> None:
        """Take the next bytes of the body; nothing of `data` is kept but text around pictures."""
        while data:
            data = self._in_text(data) if self._crc is None else self._in_picture(data, self._crc)

    def _in_picture(self, data: memoryview, crc: int) -> memoryview:
        quote = _QUOTE.search(data)
        picture = data[: quote.start()] if quote else data
        self._crc = isal_zlib.crc32(picture, crc)
        self._length += len(picture)
        if quote:
            self.seen.append((self._length, self._crc))
            self._crc = None
        return data[len(picture) :]

    def _in_text(self, data: memoryview) -> memoryview:
        before = len(self.text)
        self.text += data[: _MOST_TEXT_BYTES + 1]
        found = self.text.find(MARKER, max(0, self._looked - len(MARKER) + 1))
        if found < 0:
            self._looked = len(self.text)
            if self._looked > _MOST_TEXT_BYTES:
                raise NoRequestError("there is too much text around the pictures")
            return data[:0]
        picture = found + len(MARKER)
        del self.text[picture:]
        self._looked = picture
        self._crc = self._length = 0
        return data[picture - before :]

    def answer(self) -> str:
        """What the pictures and links are, in the order of the request."""
        pictures = iter(self.seen)
        described = []
        for url in _image_urls(json.loads(self.text)):
            if url.encode().endswith(MARKER):
                described.append(describe_picture(*next(pictures)))
            else:
                described.append(describe_link(url))
        return " ".join(described)


def describe_picture(base64_length: int, crc: int) -> str:
    """How the answer names a picture whose base64 text has this length and checksum."""
    return f"{base64_length}:{crc:08x}"


def describe_link(url: str) -> str:
    """How the answer names a link."""
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
    """What the server has seen."""

    requests: int = 0
    concurrent: int = 0
    max_concurrent: int = 0
    body_bytes: int = 0
    cpu_looked_at_s: float = 0.0
    latency_s: float = 0.0

    def began(self) -> None:
        """A call's head has arrived."""
        self.requests += 1
        self.concurrent += 1
        self.max_concurrent = max(self.max_concurrent, self.concurrent)

    def look(self) -> dict[str, float]:
        """The figures, those since the last look among them."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        cpu_s = usage.ru_utime + usage.ru_stime
        looked = {
            "requests": self.requests,
            "body_bytes": self.body_bytes,
            "max_concurrent": self.max_concurrent,
            "cpu_s": cpu_s - self.cpu_looked_at_s,
        }
        self.cpu_looked_at_s = cpu_s
        self.max_concurrent = self.concurrent
        return looked


class Connection(asyncio.BufferedProtocol):
    """One client's connection: HTTP/1.1, kept alive, one request after another."""

    # One for all: what was read is used up before anything else is read.
    _buffer = bytearray(_READ_BYTES)
    _view = memoryview(_buffer)

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._transport: asyncio.Transport | None = None
        self._head = bytearray()
        self._target = ""
        self._body: Pictures | None = None
        # Bytes that the body still has to bring; None while a chunk's size is awaited.
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
        except (NoRequestError, ValueError, KeyError, StopIteration) as error:
            self._send(400, {"error": {"message": f"{type(error).__name__}: {error}"}})
            if self._transport is not None:
                self._transport.close()

    def _take_head(self, data: memoryview) -> memoryview:
        before = len(self._head)
        self._head += data
        ends = self._head.find(_HEAD_ENDS, max(0, before - len(_HEAD_ENDS) + 1))
        if ends < 0:
            if len(self._head) > _MOST_TEXT_BYTES:
                raise NoRequestError("the head does not end")
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
        self._body = Pictures()
        if self._target.endswith("/chat/completions"):
            self._counted = True
            self._counters.began()
        if self._left == 0:
            self._ended(self._body)

    def _take_body(self, data: memoryview, body: Pictures) -> memoryview:
        if self._left is None:
            return self._take_chunk_size(data, body)
        part = data[: self._left]
        # The line end that closes a chunk is counted with it, and is not a part of the body.
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

    def _take_chunk_size(self, data: memoryview, body: Pictures) -> memoryview:
        """Read up to the end of the line that says how long the next chunk is (RFC 9112, 7.1)."""
        before = len(self._size_line)
        self._size_line += data[:64]
        ends = self._size_line.find(_LINE_ENDS)
        if ends < 0:
            return data[64:]
        size = int(bytes(self._size_line[:ends]).split(b";")[0], 16)
        if size == 0:
            # No client here sends trailers: the empty line comes right behind.
            whole = ends + 2 * len(_LINE_ENDS)
            if len(self._size_line) < whole:
                return data[64:]
            self._size_line.clear()
            self._ended(body)
            return data[whole - before :]
        self._size_line.clear()
        self._left = size + len(_LINE_ENDS)
        return data[ends + len(_LINE_ENDS) - before :]

    def _ended(self, body: Pictures) -> None:
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
            # Spans of the worker's; a look would reset the counters.
            return {}
        if url.path == "/bench/set":
            self._counters.latency_s = float(parse_qs(url.query)["latency"][0])
        return self._counters.look()

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
