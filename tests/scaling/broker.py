"""The broker's side of a run: its queues, and the endpoint that KEDA's rabbitmq scaler asks (protocol http)."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final
from urllib.parse import quote_plus, urlsplit

import aio_pika
import aiohttp
from yarl import URL

from deploy.local.stack import Stack
from tests.running import Worker, until
from tests.scaling.scaled_object import Numbers
from worker.rabbit.topology import Topology, establish

Look = Callable[[], Awaitable[int]]

RETRY_DELAY_S: Final = 1
# A run that goes faster than a cluster needs the broker's figures faster than each 5 s, as they usually come.
# They are taken in whole seconds.
REPORT_S: Final = 0.5
SAMPLING_S: Final = 1

_SAMPLES: Final = f"[{{global, [{{605, {SAMPLING_S}}}]}}, {{basic, [{{605, {SAMPLING_S}}}]}}, {{detailed, [{{605, {SAMPLING_S}}}]}}]"
# The statistics are kept by processes that read these variables when they start.
_HASTEN: Final = f"""
application:set_env(rabbit, quorum_tick_interval, {int(REPORT_S * 1000)}),
application:set_env(rabbitmq_management, sample_retention_policies, {_SAMPLES}),
application:set_env(rabbitmq_management_agent, sample_retention_policies, {_SAMPLES}),
[application:stop(It) || It <- [rabbitmq_management, rabbitmq_management_agent]],
[application:start(It) || It <- [rabbitmq_management_agent, rabbitmq_management]].
"""


async def prepare(stack: Stack, worker: Worker) -> None:
    """Fast figures, and the worker's queues, before there is any worker: as a hook does it in a cluster."""
    await asyncio.to_thread(stack.rabbitmq.ctl, "eval", _HASTEN)
    topology = Topology(
        jobs=worker.jobs_queue,
        results=worker.results_queue,
        dead_letters=worker.dead_letter_queue,
        retry_delays_s=[RETRY_DELAY_S],
        reply_exchange="",
        declare=True,
    )
    connection = await aio_pika.connect(stack.rabbitmq.url)
    async with connection:
        await establish(connection, topology)


@contextlib.asynccontextmanager
async def looking(stack: Stack, numbers: Numbers) -> AsyncIterator[Look]:
    """Ask for the length of the queue as `getQueueInfoViaHTTP` of rabbitmq_scaler.go does."""
    broker = urlsplit(stack.rabbitmq.url)
    vhost, queue = quote_plus(numbers.vhost), quote_plus(numbers.queue)
    url = URL(f"{stack.rabbitmq.management_url}/api/queues/{vhost}/{queue}", encoded=True)
    login = aiohttp.BasicAuth(broker.username or "", broker.password or "")

    async def look() -> int:
        async with session.get(url, raise_for_status=True) as response:
            # Ready and unacknowledged.
            return int((await response.json())["messages"])

    async def is_known() -> bool:
        async with session.get(url) as response:
            return "messages" in await response.json()

    async with aiohttp.ClientSession(auth=login) as session:
        await until(is_known, "the broker has figures of the queue")
        yield look
