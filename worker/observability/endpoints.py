"""`/livez`, `/readyz` and `/metrics`, served by the worker's event loop."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from worker.observability import metrics

if TYPE_CHECKING:
    from aiohttp import web

HEARTBEAT_S = 1.0
# An event loop that is blocked for this long processes no jobs.
STUCK_AFTER_S = 15.0


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether the worker is ready (consuming, or paused during an outage), and the reasons."""

    is_ready: bool
    status: str
    reasons: tuple[str, ...] = ()


class Heartbeat:
    """Measures whether the event loop runs."""

    def __init__(self) -> None:
        self._beat = time.monotonic()

    async def run(self) -> None:
        """Record a heartbeat every second until cancelled."""
        while True:
            self._beat = time.monotonic()
            await asyncio.sleep(HEARTBEAT_S)
            metrics.LOOP_LAG.observe(max(0.0, self.age_s() - HEARTBEAT_S))

    def age_s(self) -> float:
        """Return the seconds since the last heartbeat."""
        return time.monotonic() - self._beat


def application(heartbeat: Heartbeat, readiness: Callable[[], Readiness]) -> "web.Application":
    """Return the HTTP application with the three endpoints."""
    from aiohttp import web

    async def livez(_: web.Request) -> web.Response:
        age_s = heartbeat.age_s()
        alive = age_s < STUCK_AFTER_S
        body = {"status": "alive" if alive else "stuck", "heartbeat_age_s": round(age_s, 3)}
        return web.json_response(body, status=200 if alive else 503)

    async def readyz(_: web.Request) -> web.Response:
        now = readiness()
        body = {"status": now.status, "reasons": list(now.reasons)}
        return web.json_response(body, status=200 if now.is_ready else 503)

    async def exposition(_: web.Request) -> web.Response:
        body, content_type = metrics.exposition()
        return web.Response(body=body, headers={"Content-Type": content_type})

    app = web.Application()
    app.router.add_get("/livez", livez)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", exposition)
    return app


@asynccontextmanager
async def serve(app: "web.Application", host: str, port: int) -> AsyncIterator[int]:
    """Serve until the context ends; yield the port, which the system chooses for 0.

    Raises:
        OSError: the address cannot be bound.
    """
    from aiohttp import web

    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        await site.start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()
