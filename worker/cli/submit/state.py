"""What `vqa-worker submit` does with what it was told: plan, ask, upload, send, and gather the results."""

import asyncio
import hashlib
import json
import uuid
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from worker.cli import state_dir
from worker.cli.outputs import Output
from worker.cli.progress import Bar, shown
from worker.cli.shell import EXIT_FAILURE, EXIT_OK, Screen, UsageError, broker_of, counted
from worker.cli.submit.collect import Harvest
from worker.cli.submit.estimate import Assumptions, Estimate, dollars
from worker.cli.submit.inputs import Source
from worker.cli.submit.manifest import Manifest
from worker.cli.submit.plan import Additions, Planner
from worker.cli.submit.progress_of_results import Gathering
from worker.cli.submit.submission import Submission, missing
from worker.rabbitmq.replies import PRIVATE_PREFIX, QueueMissingError, ReplyQueue, prepare
from worker.rabbitmq.session import Session
from worker.rabbitmq.topology import Topology
from worker.settings import CommandSettings, Price

# More than these is not submitted by a slip of the hand.
ASKS_ABOVE_JOBS: Final = 1000
ASKS_ABOVE_USD: Final = 10.0
SECONDS_PER_DAY: Final = 86_400


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is to be submitted, and how.

    Attributes:
        additions: what is said of all jobs.
        price: in USD per million tokens, for every model, instead of the settings'.
        name, manifest: of the submission and its file; by default they follow from what is submitted.
        exchange: where jobs are published; empty: by the default one, to the queue.
        reply_to: a queue that others read; None: one of the submission's own.
        keeps_invalid: lines that are no jobs become failed results.
        asks: whether a person is asked before much is submitted.
        waits: whether the results are gathered at once.
    """

    source: Source
    additions: Additions
    assumptions: Assumptions
    price: Price | None = None
    name: str | None = None
    manifest: Path | None = None
    exchange: str = ""
    reply_to: str | None = None
    keep_days: int = 7
    max_queue: int = 0
    keeps_invalid: bool = False
    asks: bool = True
    waits: bool = False
    output: Output = field(default_factory=Output)
    patience_s: float = 15.0

    @property
    def is_passing(self) -> bool:
        """Whether nobody will want to come back to it: a question that was asked by hand."""
        return self.source.is_ad_hoc and self.name is None and self.manifest is None

    def digest(self, settings: CommandSettings) -> str:
        """What tells this submission from others: the same jobs for another broker are another one."""
        if self.is_passing:
            return uuid.uuid4().hex
        parts = [
            self.source.digest(),
            self.additions.digest(),
            settings.rabbitmq_address,
            settings.jobs_queue,
            self.reply_to,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


async def estimate(order: Order, settings: CommandSettings, screen: Screen) -> int:
    """`--dry-run`: say what would be submitted, and what it is likely to cost."""
    manifest = Manifest.temporary()
    planned = await _plan(order, settings, manifest, "dry-run")
    screen.emit(planned.as_json())
    screen.say(*planned.lines(), "nothing was submitted (--dry-run)")
    return EXIT_OK


async def carry_out(order: Order, settings: CommandSettings, screen: Screen) -> int:
    """Submit, and gather the results if they are waited for; returns the exit code."""
    digest = order.digest(settings)
    name = order.name or f"{state_dir.fit_for_name(order.source.title)}-{digest[:10]}"
    path = order.manifest or state_dir.path_of(name)
    manifest = Manifest.open(path) if path.is_file() else _begun(order, settings, path, name, digest)
    with ExitStack() as stack:
        stack.callback(manifest.close)
        stack.enter_context(manifest.locked("submitting"))
        head = manifest.head()
        if head.get("digest") != digest:
            text = f"{path}: belongs to another submission ({head.get('source')}); choose another --name"
            raise UsageError(text)
        if not await _is_agreed(order, settings, manifest, screen):
            return EXIT_FAILURE
        errand = _Errand(order, settings, manifest, screen)
        try:
            return await errand.run()
        except asyncio.CancelledError:
            screen.note(f"broken off; {_how_to_go_on(order, errand.name)}")
            raise


def _how_to_go_on(order: Order, name: str) -> str:
    if order.is_passing:
        return f"`vqa-worker results {name}` gathers what was asked"
    return f"the same command goes on with {name}, and sends nothing twice"


def _begun(order: Order, settings: CommandSettings, path: Path, name: str, digest: str) -> Manifest:
    head = {
        "name": name,
        "digest": digest,
        "source": order.source.title,
        "form": order.source.form or "",
        "broker": settings.rabbitmq_address,
        "jobs_queue": settings.jobs_queue,
        # The same jobs submitted by somebody else, or from elsewhere, have results of their own.
        "reply_to": order.reply_to or f"{PRIVATE_PREFIX}{name}-{uuid.uuid4().hex[:8]}",
        "is_private": "" if order.reply_to else "1",
    }
    return Manifest.make(path, head)


async def _is_agreed(order: Order, settings: CommandSettings, manifest: Manifest, screen: Screen) -> bool:
    """Put down the jobs, unless that was done; ask a person about many."""
    head = manifest.head()
    usd = float(head["usd"]) if head.get("usd") else None
    is_new = "planned" not in head
    if is_new or order.source.may_grow:
        try:
            planned = await _plan(order, settings, manifest, head["name"])
        except BaseException:
            if is_new:
                manifest.delete()
            raise
        usd = planned.usd()
        if order.asks and screen.may_ask and not _is_small(planned.jobs, usd):
            screen.note(*planned.lines())
    counts = manifest.counts()
    to_send = counts.total - counts.confirmed
    if not order.asks or not screen.may_ask or _is_small(to_send, usd):
        return True
    price = f", about {dollars(usd)}" if usd is not None else ""
    if screen.confirm(f"Submit {counted(to_send, 'job')}{price}?"):
        return True
    if not counts.sent + counts.confirmed:
        manifest.delete()
    screen.note("nothing was submitted")
    return False


def _is_small(jobs: int, usd: float | None) -> bool:
    return jobs <= ASKS_ABOVE_JOBS and (usd or 0.0) <= ASKS_ABOVE_USD


async def _plan(order: Order, settings: CommandSettings, manifest: Manifest, name: str) -> Estimate:
    planned = Estimate(order.assumptions, settings.model, settings.prices, order.price)
    planner = Planner(
        manifest,
        name,
        order.additions.resolved(),
        planned,
        max_job_bytes=settings.max_job_bytes,
        keeps_invalid=order.keeps_invalid,
    )
    with manifest.transaction():
        await planner.plan(order.source)
        if planner.fault_count and not order.keeps_invalid:
            raise UsageError(*_told(planner))
        if not manifest.counts().total:
            raise UsageError(f"{order.source.title}: there are no jobs in it")
        usd = planned.usd()
        manifest.set_head({"planned": "1", "usd": "" if usd is None else str(usd)})
    return planned


def _told(planner: Planner) -> list[str]:
    more = planner.fault_count - len(planner.faults)
    return [
        *planner.faults,
        *([f"and {more:,} more"] if more else []),
        "nothing was submitted; --skip-invalid submits the rest, and tells of these as failed results",
    ]


class _Errand:
    """One run of one submission, from its manifest."""

    def __init__(self, order: Order, settings: CommandSettings, manifest: Manifest, screen: Screen) -> None:
        self._order = order
        self._settings = settings
        self._manifest = manifest
        self._screen = screen
        self._head = manifest.head()
        self._broker = broker_of(settings)
        self._topology = Topology.from_settings(settings)
        self.name = self._head["name"]

    async def run(self) -> int:
        """Upload, send and gather what is still to be; returns the exit code."""
        counts = self._manifest.counts()
        to_send = counts.total - counts.confirmed
        if to_send:
            await self._upload()
            await self._knock()
        else:
            self._screen.note(f"{self.name} was submitted before, all of its {counted(counts.total, 'job')}")
        if counts.sent:
            await self._clear_up(counts.sent)
        if not self._order.waits:
            await self._send()
            return self._tell_submitted(to_send)
        with self._manifest.locked("gathering"):
            harvest = Harvest(
                self._manifest,
                self._broker,
                self._screen,
                self._order.output,
                patience_s=self._order.patience_s,
                is_passing=self._order.is_passing,
            )
            return await harvest.bring_in(self._submission() if to_send else None)

    async def _upload(self) -> None:
        if not self._manifest.uploads_to_do():
            return
        from worker.cli.storage import Uploads, open_s3

        async with open_s3(self._settings) as s3:
            uploads = Uploads(self._manifest, s3)
            async with shown(self._screen, [Bar("uploaded", uploads.progress)]):
                await uploads.run()

    async def _knock(self) -> None:
        """See that the broker and the queue are there, and make the one for results."""
        replies = ReplyQueue(
            self._head["reply_to"],
            self._settings.reply_exchange,
            expires_s=self._order.keep_days * SECONDS_PER_DAY,
        )

        prepare_all = partial(
            prepare,
            # Who publishes by an exchange need not be allowed to look at the queue.
            jobs_queue=None if self._order.exchange else self._topology.jobs,
            replies=replies if self._head["is_private"] else None,
        )
        try:
            await Session.once(self._broker, self._order.patience_s, prepare_all)
        except QueueMissingError:
            raise missing(self._topology.jobs) from None
        self._manifest.set_head({"is_tidy": ""})

    async def _clear_up(self, in_doubt: int) -> None:
        """Of the jobs that may have been sent, those whose results are there were."""
        if self._head["is_private"]:
            with self._manifest.locked("gathering"):
                await Gathering(self._manifest, self._broker, self._head["reply_to"]).until_quiet()
        left = self._manifest.counts().sent
        self._screen.note(
            f"jobs that were on their way when this was broken off, and may have arrived: {in_doubt:,};"
            f" answered: {in_doubt - left:,}, sent again under the same ids: {left:,}"
        )

    def _submission(self) -> Submission:
        return Submission(
            self._manifest,
            self._broker,
            self._topology,
            exchange=self._order.exchange,
            reply_to=self._head["reply_to"],
            max_queue=self._order.max_queue,
        )

    async def _send(self) -> None:
        submission = self._submission()
        async with shown(self._screen, [Bar("submitted", submission.progress)]):
            await submission.run()

    def _tell_submitted(self, sent: int) -> int:
        total = self._manifest.counts().total
        self._screen.emit(
            {
                "name": self.name,
                "manifest": str(self._manifest.path),
                "jobs": total,
                "submitted": sent,
                "queue": self._topology.jobs,
                "reply_to": self._head["reply_to"],
            }
        )
        self._screen.say(f"{counted(sent, 'job')} submitted as {self.name}")
        if self._head["is_private"]:
            given = self.name if self._order.manifest is None else self._order.manifest
            self._screen.say(f"their results: vqa-worker results {given}")
        else:
            self._screen.say(f"their results come to {self._head['reply_to']}")
        return EXIT_OK
