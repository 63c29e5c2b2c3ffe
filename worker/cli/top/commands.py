"""The command `vqa-worker top`."""

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Final

import typer

from worker.cli.shell import CommandError, Screen, add, broker_of, seconds
from worker.cli.top.workers import WorkerUrl

if TYPE_CHECKING:
    from worker.cli.top.render import Figures, QueueFigures
    from worker.cli.top.scraper import Scraper
    from worker.rabbitmq.permission_checks import Found, QueueWatch
    from worker.rabbitmq.topology import Topology

# After the first read, a broker that is unreachable must not delay the workers' metrics.
RECONNECT_TIMEOUT_S: Final = 1.0
QUIT_KEYS: Final = frozenset(b"qQ\x03\x04\x1b")


def register(app: typer.Typer) -> None:
    """Add `top`."""
    add(app, "top", top)


async def top(
    screen: Screen,
    worker: Annotated[
        list[WorkerUrl] | None,
        typer.Option(
            metavar="URL",
            parser=WorkerUrl.parse,
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
    cover the last 30 seconds, the cost is since the workers' start. Without --worker only queue depths are
    shown. Press q or Ctrl-C to quit. Without a terminal, the figures are printed in each interval.
    """
    async with _watching(screen, worker or ()) as watch:
        if screen.as_json or once or not (sys.stdin.isatty() and sys.stdout.isatty()):
            await _print(screen, watch, interval, once=once)
            return
        quits = asyncio.Event()
        with _quit_keys(quits):
            await _live(watch, interval, quits)


class _Watch:
    """Read the figures of the queues and of the workers."""

    def __init__(
        self, topology: "Topology", queues: "QueueWatch", scraper: "Scraper | None", timeout_s: float
    ) -> None:
        from worker.cli.top.figures import Fleet

        self._topology = topology
        self._queues = queues
        self._scraper = scraper
        self._timeout_s = timeout_s
        self._is_first = True
        self._fleet = Fleet()

    async def read(self) -> "Figures":
        """Return all figures.

        Raises:
            BrokerRefusedError, BrokerUnreachableError: at the first call, the broker is not available.
            CommandError: at the first call, the jobs queue does not exist.
        """
        from worker.cli.top.render import Figures

        (queues, error), _ = await asyncio.gather(self._read_queues(), self._read_workers())
        self._is_first = False
        fleet = self._fleet.figures() if self._scraper else None
        return Figures(self._topology.jobs, queues, error, fleet)

    async def _read_workers(self) -> None:
        if self._scraper is not None:
            found = await self._scraper.scrape()
            self._fleet.observe(time.monotonic(), found.samples, found.unreachable)

    async def _read_queues(self) -> "tuple[QueueFigures | None, str]":
        from vqa_worker.rabbitmq.connection import BrokerRefusedError, BrokerUnreachableError

        try:
            found = await self._queues.read(self._timeout_s if self._is_first else RECONNECT_TIMEOUT_S)
            return _queue_figures(self._topology, found), ""
        except (BrokerRefusedError, BrokerUnreachableError, CommandError) as error:
            if self._is_first:
                raise
            return None, str(error)


def _queue_figures(topology: "Topology", found: "Mapping[str, Found | None]") -> "QueueFigures":
    from worker.cli.top.render import QueueFigures

    jobs = found[topology.jobs]
    if jobs is None:
        text = "does not exist, or the user has no permission to see it. Check VQA_JOBS_QUEUE."
        raise CommandError(f"the queue {topology.jobs} {text}")
    count = {name: it.messages if it else None for name, it in found.items()}
    retry_counts = [count[topology.retry(delay_s)] for delay_s in topology.retry_delays_s]
    known = [it for it in retry_counts if it is not None]
    return QueueFigures(
        jobs=jobs.messages,
        retries=sum(known) if known else None,
        results=count[topology.results],
        dead_letters=count[topology.dead_letters],
        consumers=jobs.consumers,
    )


@asynccontextmanager
async def _watching(screen: Screen, workers: Sequence[WorkerUrl]) -> AsyncIterator[_Watch]:
    from worker.settings import load_broker_settings

    settings = screen.load(load_broker_settings)
    from worker.cli.top.scraper import Scraper
    from worker.rabbitmq.permission_checks import QueueWatch
    from worker.rabbitmq.topology import Topology

    topology = Topology.from_settings(settings)
    async with AsyncExitStack() as stack:
        queues = QueueWatch(broker_of(settings), topology.queues())
        stack.push_async_callback(queues.close)
        scraper = Scraper(workers) if workers else None
        if scraper is not None:
            stack.push_async_callback(scraper.close)
        yield _Watch(topology, queues, scraper, screen.timeout_s)


async def _print(screen: Screen, watch: _Watch, interval_s: float, *, once: bool) -> None:
    """Print the tables or a JSON object in each interval."""
    from worker.cli.top import render

    figures = await watch.read()
    while True:
        if figures.has_rates:
            now = datetime.now(UTC)
            screen.emit(render.in_json(figures, now))
            screen.print(render.text(figures, now))
            if once:
                return
        await asyncio.sleep(interval_s)
        figures = await watch.read()


async def _live(watch: _Watch, interval_s: float, quits: asyncio.Event) -> None:
    """Refresh the tables until `quits` is set; the last ones stay on the screen."""
    from rich.console import Console
    from rich.live import Live

    from worker.cli.top import render

    with Live(console=Console(highlight=False), auto_refresh=False) as live:
        while not quits.is_set():
            figures = await watch.read()
            view = render.view(figures, datetime.now(UTC), hint="   (q or Ctrl-C to quit)")
            live.update(view, refresh=True)
            with suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await quits.wait()


@contextmanager
def _quit_keys(quits: asyncio.Event) -> Iterator[None]:
    """Set `quits` when `q` is pressed; restore the terminal at the end."""
    try:
        import termios
        import tty
    except ImportError:  # not available on Windows
        yield
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    loop = asyncio.get_running_loop()

    def on_key() -> None:
        if QUIT_KEYS & set(os.read(descriptor, 64)):
            quits.set()

    tty.setcbreak(descriptor)
    loop.add_reader(descriptor, on_key)
    try:
        yield
    finally:
        loop.remove_reader(descriptor)
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
