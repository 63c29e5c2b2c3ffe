"""A small stand-in for S3, for what a real server cannot be brought to do."""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Self

from aiohttp import web

Answer = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@dataclass
class FakeS3:
    """Gives every GET the answer set for it, and remembers what was asked for."""

    answer: Answer
    url: str = ""
    targets: list[str] = field(default_factory=list)
    """The request targets, byte for byte as they came."""

    @classmethod
    @contextlib.asynccontextmanager
    async def serving(cls, content: bytes) -> AsyncIterator[Self]:
        """One that gives `content` for every key, until told otherwise."""

        async def give(_: web.BaseRequest) -> web.Response:
            return web.Response(body=content)

        fake = cls(give)
        runner = web.ServerRunner(web.Server(fake._handle, handler_cancellation=True), shutdown_timeout=1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield fake
        finally:
            await runner.cleanup()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.targets.append(request.raw_path)
        return await self.answer(request)
