"""Read the queue depth from RabbitMQ's management API, as KEDA does (protocol http)."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final
from urllib.parse import quote_plus, urlsplit

import aiohttp
from yarl import URL

from deploy.local.stack import Stack
from tests.running import until
from tests.scaling.release import Release

QueueDepth = Callable[[], Awaitable[int]]

# A run with scaled time needs RabbitMQ's statistics more often than every 5 s, the default.
# The minimum of the sampling interval is one second.
REPORT_S: Final = 0.5
SAMPLING_S: Final = 1

_POLICIES: Final = ", ".join(
    f"{{{kind}, [{{605, {SAMPLING_S}}}]}}" for kind in ("global", "basic", "detailed")
)
# Statistics processes read this when they start, queues when they are declared.
_SHORTEN_INTERVALS: Final = f"""
application:set_env(rabbit, quorum_tick_interval, {int(REPORT_S * 1000)}),
Applications = [rabbitmq_management_agent, rabbitmq_management],
[application:stop(It) || It <- lists:reverse(Applications)],
[application:set_env(It, sample_retention_policies, [{_POLICIES}]) || It <- Applications],
[application:start(It) || It <- Applications].
"""


async def shorten_statistics_intervals(stack: Stack) -> None:
    """Minimize the age of the statistics of queues declared afterwards."""
    await asyncio.to_thread(stack.rabbitmq.ctl, "eval", _SHORTEN_INTERVALS)


@contextlib.asynccontextmanager
async def queue_depth_reader(stack: Stack, release: Release) -> AsyncIterator[QueueDepth]:
    """Return a function that reads the queue depth as `getQueueInfoViaHTTP` of rabbitmq_scaler.go does.

    The queue must exist. Create a broker user for KEDA that can only read the management API.
    """
    await _add_user(stack, release)
    scaler = release.scaler
    vhost, queue = quote_plus(scaler.vhost), quote_plus(scaler.queue)
    url = URL(f"{scaler.host.rstrip('/')}/api/queues/{vhost}/{queue}", encoded=True)

    async def figures() -> dict[str, Any]:
        async with session.get(url, raise_for_status=True) as response:
            found: dict[str, Any] = await response.json()
            return found

    async def queue_depth() -> int:
        # Ready and unacknowledged messages.
        return int((await figures())["messages"])

    async def has_figures() -> bool:
        return "messages" in await figures()

    async with aiohttp.ClientSession(headers=_login(release.user, release.password)) as session:
        await until(has_figures, "the broker has statistics of the queue")
        yield queue_depth


async def _add_user(stack: Stack, release: Release) -> None:
    """Create KEDA's user, with the tag `management` and without permissions on queues."""
    user, vhost = quote_plus(release.user), quote_plus(release.scaler.vhost)
    nothing = dict.fromkeys(("configure", "write", "read"), "^$")
    async with administrator(stack) as ask:
        await ask(f"users/{user}", {"password": release.password, "tags": "management"})
        await ask(f"permissions/{vhost}/{user}", nothing)


@contextlib.asynccontextmanager
async def administrator(stack: Stack) -> AsyncIterator[Callable[..., Awaitable[Any]]]:
    """Return a function for the management API as administrator: GET, or PUT with a body."""
    login = urlsplit(stack.rabbitmq.url)

    async def ask(path: str, body: object = None) -> Any:
        url = URL(f"{stack.rabbitmq.management_url}/api/{path}", encoded=True)
        async with session.request("GET" if body is None else "PUT", url, json=body) as response:
            return await response.json() if body is None else None

    headers = _login(login.username or "", login.password or "")
    async with aiohttp.ClientSession(headers=headers, raise_for_status=True) as session:
        yield ask


def _login(user: str, password: str) -> dict[str, str]:
    return {"Authorization": aiohttp.encode_basic_auth(user, password)}
