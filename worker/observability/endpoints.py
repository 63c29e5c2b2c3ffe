"""`/livez`, `/readyz` and `/metrics`, served by the event loop whose life they tell of."""

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
# A loop that misses its beat for so long does not do its work either.
STUCK_AFTER_S = 15.0


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether the worker takes jobs, or pauses on purpose, and why (not)."""

    is_ready: bool
    status: str
    reasons: tuple[str, ...] = ()


class Heartbeat:
    """Beats as long as the event loop turns."""

    def __init__(self) -> None:
        self._beat = time.monotonic()

    async def run(self) -> None:
        """Beat until cancelled."""
        while True:
            self._beat = time.monotonic()
            await asyncio.sleep(HEARTBEAT_S)
            metrics.LOOP_LAG.observe(max(0.0, self.age_s() - HEARTBEAT_S))

    def age_s(self) -> float:
        """Seconds since the last beat."""
        return time.monotonic() - self._beat


def application(heartbeat: Heartbeat, readiness: Callable[[], Readiness]) -> "web.Application":
    """The three endpoints."""
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
    """Serve until the context ends; yields the port, which the system chooses for 0.

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
