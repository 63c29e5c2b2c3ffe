"""The broker's side of a run: the endpoint that KEDA asks (protocol http)."""

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

Look = Callable[[], Awaitable[int]]

# A run that goes faster than a cluster needs the broker's figures faster than each 5 s, as they usually come.
# Less than a second is not to be had: they are taken in whole ones.
REPORT_S: Final = 0.5
SAMPLING_S: Final = 1

_POLICIES: Final = ", ".join(
    f"{{{kind}, [{{605, {SAMPLING_S}}}]}}" for kind in ("global", "basic", "detailed")
)
# Read by the processes that keep the statistics when they start, and by queues when they are declared.
_HASTEN: Final = f"""
application:set_env(rabbit, quorum_tick_interval, {int(REPORT_S * 1000)}),
Applications = [rabbitmq_management_agent, rabbitmq_management],
[application:stop(It) || It <- lists:reverse(Applications)],
[application:set_env(It, sample_retention_policies, [{_POLICIES}]) || It <- Applications],
[application:start(It) || It <- Applications].
"""


async def hasten(stack: Stack) -> None:
    """Make the figures of queues that are declared from now on as fast as they can be."""
    await asyncio.to_thread(stack.rabbitmq.ctl, "eval", _HASTEN)


@contextlib.asynccontextmanager
async def looking(stack: Stack, release: Release) -> AsyncIterator[Look]:
    """Ask for the length of the queue as `getQueueInfoViaHTTP` of rabbitmq_scaler.go does.

    It is there already. The broker gets a user for KEDA, who may look and nothing else.
    """
    await _add_user(stack, release)
    numbers = release.numbers
    vhost, queue = quote_plus(numbers.vhost), quote_plus(numbers.queue)
    url = URL(f"{numbers.host.rstrip('/')}/api/queues/{vhost}/{queue}", encoded=True)

    async def figures() -> dict[str, Any]:
        async with session.get(url, raise_for_status=True) as response:
            found: dict[str, Any] = await response.json()
            return found

    async def look() -> int:
        # Ready and unacknowledged.
        return int((await figures())["messages"])

    async def has_figures() -> bool:
        return "messages" in await figures()

    async with aiohttp.ClientSession(headers=_login(release.user, release.password)) as session:
        await until(has_figures, "the broker has figures of the queue")
        yield look


async def _add_user(stack: Stack, release: Release) -> None:
    """KEDA's: it may ask the management API, and do nothing with any queue."""
    user, vhost = quote_plus(release.user), quote_plus(release.numbers.vhost)
    nothing = dict.fromkeys(("configure", "write", "read"), "^$")
    async with administrator(stack) as ask:
        await ask(f"users/{user}", {"password": release.password, "tags": "management"})
        await ask(f"permissions/{vhost}/{user}", nothing)


@contextlib.asynccontextmanager
async def administrator(stack: Stack) -> AsyncIterator[Callable[..., Awaitable[Any]]]:
    """The management API as its administrator has it: GET, or PUT with a body."""
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
