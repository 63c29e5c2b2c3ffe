"""The command `vqa-worker top`."""

import asyncio
import os
import sys
import termios
import time
import tty
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Final

import typer

from worker.cli.shell import CommandError, Screen, broker_of, seconds

if TYPE_CHECKING:
    from worker.cli.top.render import Figures
    from worker.rabbitmq.permission_checks import Found
    from worker.rabbitmq.topology import Topology

# After the first read, a broker that is unreachable must not delay the workers' metrics.
RECONNECT_TIMEOUT_S: Final = 1.0
QUIT_KEYS: Final = frozenset(b"qQ\x03\x04\x1b")


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
    start. Without --worker only queue depths are shown. Press q or Ctrl-C to quit. Without a terminal, the
    figures are printed in each interval.
    """
    from worker.cli.top import render

    async with AsyncExitStack() as stack:
        figures = _figures(screen, worker or [], stack)
        if not (screen.as_json or once) and sys.stdin.isatty() and sys.stdout.isatty():
            await _live(figures, interval)
            return
        async for found in figures:
            if found.has_rates:
                screen.emit(render.in_json(found))
                screen.print(render.text(found))
                if once and not worker:
                    screen.note("Add --worker HOST:PORT for rates, latencies, cost and the state of workers.")
                if once:
                    return
            await asyncio.sleep(interval)


async def _figures(screen: Screen, workers: list[str], stack: AsyncExitStack) -> "AsyncIterator[Figures]":
    """Yield all figures, each time they are asked for.

    Raises:
        BrokerRefusedError, BrokerUnreachableError: at the first time, the broker is not available.
        CommandError: at the first time, the jobs queue does not exist.
    """
    from vqa_worker.rabbitmq.connection import BrokerRefusedError, BrokerUnreachableError
    from worker.cli.top import scraper
    from worker.cli.top.figures import Fleet
    from worker.cli.top.render import Figures
    from worker.rabbitmq.permission_checks import QueueWatch
    from worker.rabbitmq.topology import Topology
    from worker.settings import load_broker_settings

    urls = [scraper.parse_url(text) for text in workers]
    settings = screen.load(load_broker_settings)
    topology = Topology.from_settings(settings)
    watch = QueueWatch(broker_of(settings), topology.queues())
    stack.push_async_callback(watch.close)
    http = await stack.enter_async_context(scraper.open_http())
    fleet = Fleet() if urls else None
    is_first = True
    while True:
        queues, error = None, ""
        async with asyncio.TaskGroup() as group:
            scraping = group.create_task(scraper.scrape(http, urls), name="scrape")
            try:
                found = await watch.read(screen.timeout_s if is_first else RECONNECT_TIMEOUT_S)
                queues = _depths(topology, found)
            except (BrokerRefusedError, BrokerUnreachableError, CommandError) as caught:
                if is_first:
                    raise
                error = str(caught)
        is_first = False
        if fleet:
            fleet.observe(time.monotonic(), scraping.result())
        yield Figures(datetime.now(UTC), topology.jobs, queues, error, fleet)


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


async def _live(figures: "AsyncIterator[Figures]", interval_s: float) -> None:
    """Refresh the tables until a key quits; the last ones stay on the screen."""
    from rich.console import Console
    from rich.live import Live

    from worker.cli.top import render

    quits = asyncio.Event()
    with (
        _quit_keys(quits.set),
        Live(console=Console(highlight=False), auto_refresh=False) as live,
    ):
        async for found in figures:
            live.update(render.view(found, hint="   (q or Ctrl-C to quit)"), refresh=True)
            with suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await quits.wait()
            if quits.is_set():
                return


@contextmanager
def _quit_keys(quit_: Callable[[], None]) -> Iterator[None]:
    """Call `quit_` when `q` is pressed; restore the terminal at the end."""
    descriptor, loop = sys.stdin.fileno(), asyncio.get_running_loop()
    before = termios.tcgetattr(descriptor)

    def on_key() -> None:
        if QUIT_KEYS & set(os.read(descriptor, 64)):
            quit_()

    tty.setcbreak(descriptor)
    loop.add_reader(descriptor, on_key)
    try:
        yield
    finally:
        loop.remove_reader(descriptor)
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
