"""The command itself."""

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Final

import typer

from worker.cli.shell import (
    DEFAULT_PATIENCE_S,
    CommandError,
    Json,
    Patience,
    Screen,
    add,
    broker_of,
    read,
)
from worker.cli.top.workers import WorkerUrl

if TYPE_CHECKING:
    from worker.cli.top.render import Figures, QueueFigures
    from worker.cli.top.sources import Scraper
    from worker.rabbitmq.permission_checks import Found, QueueWatch
    from worker.rabbitmq.topology import Topology

SHORTEST_S: Final = 0.2
# A broker that goes away meanwhile must not hold up the workers' figures.
LATER_PATIENCE_S: Final = 1.0
KEYS_THAT_END: Final = frozenset(b"qQ\x03\x04\x1b")


def register(app: typer.Typer) -> None:
    """Add `top`."""
    add(app, "top", top)


async def top(
    worker: Annotated[
        list[WorkerUrl] | None,
        typer.Option(
            metavar="URL",
            parser=WorkerUrl.parse,
            help="Where workers tell their metrics, http://host:port; a name may stand for many.",
        ),
    ] = None,
    interval: Annotated[
        float, typer.Option(metavar="SECONDS", min=SHORTEST_S, help="Refresh interval in seconds.")
    ] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Tell the figures of one interval, and end.")] = False,
    as_json: Json = False,
    patience: Patience = DEFAULT_PATIENCE_S,
) -> None:
    """Watch a running fleet: what waits, how fast it goes, how long jobs take, what it costs.

    - `vqa-worker top --worker localhost:8080`
    - `vqa-worker top --worker workers.prod.svc:8080` (a worker for each address of the name)
    - `vqa-worker top --once --json | jq .queues.jobs`

    What waits is the broker's word; rates, latencies and tokens are of the last 30 seconds, and the cost is
    since the workers were started. Without `--worker` only the broker is asked. `q` or Ctrl-C ends it; where
    there is no terminal, it prints a line each time.
    """
    screen = Screen(as_json=as_json)
    async with _watch(screen, worker or (), patience) as watch:
        if as_json or once or not (sys.stdin.isatty() and sys.stdout.isatty()):
            await _lines(screen, watch, interval, once=once)
            return
        ended = asyncio.Event()
        with _keys(ended):
            await _live(watch, interval, ended)


class _Watch:
    """Looks once at everything each time it is asked."""

    def __init__(
        self, topology: "Topology", queues: "QueueWatch", scraper: "Scraper | None", patience_s: float
    ) -> None:
        from worker.cli.top.figures import Fleet

        self._topology = topology
        self._queues = queues
        self._scraper = scraper
        self._patience_s = patience_s
        self._is_first = True
        self._fleet = Fleet()

    async def look(self) -> "Figures":
        """All the figures.

        Raises:
            BrokerRefusedError, BrokerUnreachableError, CommandError: the first time, the broker or the queue
                is not there.
        """
        from worker.cli.top.render import Figures

        (queues, trouble), _ = await asyncio.gather(self._look_at_queues(), self._look_at_workers())
        self._is_first = False
        fleet = self._fleet.figures() if self._scraper else None
        return Figures(self._topology.jobs, queues, trouble, fleet)

    async def _look_at_workers(self) -> None:
        if self._scraper is not None:
            found = await self._scraper.scrape()
            self._fleet.observe(time.monotonic(), found.samples, found.silent)

    async def _look_at_queues(self) -> "tuple[QueueFigures | None, str]":
        from worker.rabbitmq.connection import BrokerRefusedError, BrokerUnreachableError

        try:
            found = await self._queues.read(self._patience_s if self._is_first else LATER_PATIENCE_S)
            return _queue_figures(self._topology, found), ""
        except (BrokerRefusedError, BrokerUnreachableError) as error:
            if self._is_first:
                raise
            return None, str(error)
        except CommandError as error:
            if self._is_first:
                raise
            return None, str(error)


def _queue_figures(topology: "Topology", found: "Mapping[str, Found | None]") -> "QueueFigures":
    from worker.cli.top.render import QueueFigures

    jobs = found[topology.jobs]
    if jobs is None:
        text = "does not exist, or not for this user: is VQA_JOBS_QUEUE the workers' own?"
        raise CommandError(f"the queue {topology.jobs} {text}")
    count = {name: it.messages if it else None for name, it in found.items()}
    delayed = [count[topology.retry(delay_s)] for delay_s in topology.retry_delays_s]
    seen = [it for it in delayed if it is not None]
    return QueueFigures(
        jobs=jobs.messages,
        retries=sum(seen) if seen else None,
        results=count[topology.results],
        dead=count[topology.dead_letters],
        consumers=jobs.consumers,
    )


@asynccontextmanager
async def _watch(screen: Screen, workers: Sequence[WorkerUrl], patience_s: float) -> AsyncIterator[_Watch]:
    from worker.settings import load_broker_settings

    settings = read(load_broker_settings, screen)
    from worker.cli.top.sources import Scraper
    from worker.rabbitmq.permission_checks import QueueWatch
    from worker.rabbitmq.topology import Topology

    topology = Topology.from_settings(settings)
    async with AsyncExitStack() as stack:
        queues = QueueWatch(broker_of(settings), topology.queues())
        stack.push_async_callback(queues.close)
        scraper = Scraper(workers) if workers else None
        if scraper is not None:
            stack.push_async_callback(scraper.close)
        yield _Watch(topology, queues, scraper, patience_s)


async def _lines(screen: Screen, watch: _Watch, every_s: float, *, once: bool) -> None:
    """A line or an object for each interval."""
    from worker.cli.top import render

    figures = await watch.look()
    while True:
        if figures.has_rates:
            now = datetime.now(UTC)
            screen.emit(render.in_json(figures, now))
            screen.say(render.line(figures, now))
            if once:
                return
        await asyncio.sleep(every_s)
        figures = await watch.look()


async def _live(watch: _Watch, every_s: float, ended: asyncio.Event) -> None:
    """A picture that changes, until `ended`; the last one stays on the screen."""
    from rich.console import Console
    from rich.live import Live

    from worker.cli.top import render

    with Live(console=Console(highlight=False), auto_refresh=False) as live:
        while not ended.is_set():
            live.update(render.table(await watch.look(), datetime.now(UTC)), refresh=True)
            with suppress(TimeoutError):
                async with asyncio.timeout(every_s):
                    await ended.wait()


@contextmanager
def _keys(ended: asyncio.Event) -> Iterator[None]:
    """Set `ended` when a person presses `q`; the terminal is as it was in the end."""
    try:
        import termios
        import tty
    except ImportError:  # there are none on Windows
        yield
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    loop = asyncio.get_running_loop()

    def on_key() -> None:
        if KEYS_THAT_END & set(os.read(descriptor, 64)):
            ended.set()

    tty.setcbreak(descriptor)
    loop.add_reader(descriptor, on_key)
    try:
        yield
    finally:
        loop.remove_reader(descriptor)
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
