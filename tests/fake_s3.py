"""A fake S3 server, for responses that a real server does not give."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Self
from xml.sax.saxutils import escape

from aiohttp import web

Answer = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Asked:
    """A request: its raw target, and its headers by lower-case name."""

    method: str
    target: str
    headers: Mapping[str, str]

    @property
    def signed_by(self) -> tuple[str, str]:
        """The access key and the region of the signature."""
        scope = self.headers["authorization"].split("Credential=")[1].split(",")[0].split("/")
        return scope[0], scope[2]


@dataclass
class FakeS3:
    """Respond to every request with `answer`, and record the requests."""

    answer: Answer
    url: str = ""
    targets: list[str] = field(default_factory=list)
    """The raw request targets."""
    asked: list[Asked] = field(default_factory=list)
    at_once: int = 0
    """The number of open requests."""
    most_at_once: int = 0

    @classmethod
    @contextlib.asynccontextmanager
    async def serving(cls, content: bytes, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[Self]:
        """Run a server that returns `content` for every key until `answer` is changed."""
        fake = cls(give(content))
        runner = web.ServerRunner(web.Server(fake._handle, handler_cancellation=True), shutdown_timeout=1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
        await site.start()
        fake.url = f"{'https' if tls else 'http'}://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield fake
        finally:
            await runner.cleanup()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.targets.append(request.raw_path)
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.asked.append(Asked(request.method, request.raw_path, headers))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return await self.answer(request)
        finally:
            self.at_once -= 1


def give(content: bytes, status: int = 200, /, **headers: str) -> Answer:
    """Respond with these bytes."""

    async def answer(_: web.BaseRequest) -> web.Response:
        usual = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.Response(body=content, status=status, headers=usual)

    return answer


def refuse(status: int, code: str, more: str = "", message: str = "no", **headers: str) -> Answer:
    """Respond with an S3 error."""
    body = (
        f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{escape(message)}</Message>{more}</Error>"
    )
    return give(body.encode(), status, Content_Type="application/xml", **headers)


_SESSION = (
    '<?xml version="1.0"?><CreateSessionResult><Credentials><SessionToken>the-session</SessionToken>'
    "<SecretAccessKey>s</SecretAccessKey><AccessKeyId>AKIDSESSION</AccessKeyId>"
    "<Expiration>2999-01-01T00:00:00Z</Expiration></Credentials></CreateSessionResult>"
)


def with_sessions(answer: Answer) -> Answer:
    """Respond as `answer`, but first to CreateSession, which the SDK sends for a directory bucket."""

    async def respond(request: web.BaseRequest) -> web.StreamResponse:
        is_session = "session" in request.query
        session = give(_SESSION.encode(), Content_Type="application/xml")
        return await (session if is_session else answer)(request)

    return respond


def say(*pieces: bytes, pause_s: float = 0.0, closes: bool = True) -> Answer:
    """Send raw bytes with pauses between them; then close the connection, or leave it open."""

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        for piece in pieces:
            assert request.transport is not None
            request.transport.write(piece)
            await asyncio.sleep(pause_s)
        if closes and request.transport is not None:
            request.transport.close()
        # Cancelled when the connection is closed.
        await asyncio.Event().wait()
        raise AssertionError

    return answer


def head(length: int | None, *more: str) -> bytes:
    """Return the head of a response with this Content-Length."""
    lines = ["HTTP/1.1 200 OK", *more, *([] if length is None else [f"Content-Length: {length}"]), "", ""]
    return "\r\n".join(lines).encode()
