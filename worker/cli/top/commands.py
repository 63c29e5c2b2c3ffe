"""The command `vqa-worker top`."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from worker.cli.shell import CommandError, Screen, broker_of, seconds

if TYPE_CHECKING:
    from worker.rabbitmq.permission_checks import Found
    from worker.rabbitmq.topology import Topology

# After the first read, a broker that is unreachable must not delay the workers' metrics.
RECONNECT_TIMEOUT_S: Final = 1.0


async def top(
    screen: Screen,
    worker: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL",
            help="Metrics URL of a worker (host:port); repeatable. All addresses of a name are read.",
        ),
    ] = None,
    interval: Annotated[
        float, typer.Option(metavar="SECONDS", parser=seconds, help="Refresh interval in seconds.")
    ] = 2,
    once: Annotated[bool, typer.Option("--once", help="Print the figures once and exit.")] = False,
) -> None:
    """Show queue depth, throughput, latency and cost, live.

        vqa-worker top --worker localhost:8080
        vqa-worker top --worker workers.prod.svc:8080
        vqa-worker top --once --json | jq .queues.jobs

    Queue depths come from RabbitMQ, everything else from the workers' metrics: rates, latencies and tokens
    cover the last 30 seconds (with --once the time between two readings), the cost is since the workers'
    start. Without --worker only queue depths are shown. Press Ctrl-C to quit. Without a terminal, the figures
    are printed in each interval.
    """
    from rich.console import Console
    from rich.live import Live

    from worker.cli.top import render

    async with AsyncExitStack() as stack:
        figures = _figures(screen, worker or [], stack)
        live: Live | None = None
        if not (screen.as_json or once) and sys.stdout.isatty():
            live = stack.enter_context(Live(console=Console(highlight=False), auto_refresh=False))
        async for found in figures:
            fleet = found["fleet"]
            if live is not None:
                live.update(render.view(found), refresh=True)
            # Rates need two samples of a worker.
            elif fleet is None or not fleet["up"] or fleet["per_s"] is not None:
                screen.emit(found, render.text(found))
                if once and not worker:
                    screen.note("Add --worker HOST:PORT for rates, latencies, cost and the state of workers.")
                if once:
                    return
            await asyncio.sleep(interval)


async def _figures(
    screen: Screen, workers: list[str], stack: AsyncExitStack
) -> AsyncIterator[dict[str, Any]]:
    """Yield the figures for `--json`, each time they are asked for.

    `queues` is None while the broker is unreachable; `error` says why.

    Raises:
        BrokerRefusedError, BrokerUnreachableError: at the first time, the broker is not available.
        CommandError: at the first time, the jobs queue does not exist.
    """
    from vqa_worker.rabbitmq.connection import BrokerRefusedError, BrokerUnreachableError
    from worker.cli.top.fleet import CONNECT_TIMEOUT_S, READ_TIMEOUT_S, Fleet, parse_url, scrape
    from worker.http.client import open_session
    from worker.rabbitmq.messages import rfc3339
    from worker.rabbitmq.permission_checks import QueueWatch
    from worker.rabbitmq.topology import Topology
    from worker.settings import load_broker_settings

    urls = [parse_url(text) for text in workers]
    settings = screen.load(load_broker_settings)
    topology = Topology.from_settings(settings)
    watch = QueueWatch(broker_of(settings), topology.queues())
    stack.push_async_callback(watch.close)
    http = await stack.enter_async_context(
        open_session(connect_timeout_s=CONNECT_TIMEOUT_S, read_timeout_s=READ_TIMEOUT_S)
    )
    fleet, is_first = Fleet(), True
    while True:
        queues, error = None, None
        async with asyncio.TaskGroup() as group:
            scraping = group.create_task(scrape(http, urls), name="scrape")
            try:
                queues = _depths(
                    topology, await watch.read(screen.timeout_s if is_first else RECONNECT_TIMEOUT_S)
                )
            except (BrokerRefusedError, BrokerUnreachableError, CommandError) as caught:
                if is_first:
                    raise
                error = str(caught)
        is_first = False
        fleet.observe(time.monotonic(), scraping.result())
        yield {
            "at": rfc3339(datetime.now(UTC)),
            "queue": topology.jobs,
            "queues": queues,
            "error": error,
            "fleet": fleet.total() if urls else None,
            "workers": fleet.workers() if urls else None,
            "models": fleet.models() if urls else None,
        }


def _depths(topology: "Topology", found: "Mapping[str, Found | None]") -> dict[str, int | None]:
    jobs = found[topology.jobs]
    if jobs is None:
        raise CommandError(
            f"the queue {topology.jobs} does not exist, or the user has no permission to see it. Start a"
            " worker, or check VQA_JOBS_QUEUE."
        )
    count = {name: it.messages for name, it in found.items() if it}
    retries = [count[it] for delay_s in topology.retry_delays_s if (it := topology.retry(delay_s)) in count]
    return {
        "jobs": jobs.messages,
        "retries": sum(retries) if retries else None,
        "results": count.get(topology.results),
        "dead_letters": count.get(topology.dead_letters),
        "consumers": jobs.consumers,
    }
