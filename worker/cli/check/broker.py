"""What is looked at on the broker. Nothing is changed there."""

from collections.abc import AsyncIterator, Awaitable, Collection, Mapping
from typing import Final
from urllib.parse import unquote, urlsplit

from worker.cli.check.finding import Finding, failed, ok, skipped, warning
from worker.cli.shell import counted
from worker.rabbitmq.connection import Broker, BrokerRefusedError, BrokerUnreachableError
from worker.rabbitmq.permission_checks import BlockedError, Found, NotAllowedError, Probes
from worker.rabbitmq.session import Session
from worker.rabbitmq.topology import Part, QueueSpec, Topology
from worker.settings import BrokerSettings

DEFAULT: Final = "the default exchange"


async def broker_findings(
    settings: BrokerSettings, broker: Broker, patience_s: float
) -> AsyncIterator[Finding]:
    """The connection, then all that is behind it."""
    try:
        async with Session(broker, "check").opened(patience_s) as connection:
            probes = Probes(connection)
            yield ok("broker", f"{probes.version} at {settings.rabbitmq_address}{_user(settings)}")
            async for finding in _behind(probes, Topology.from_settings(settings)):
                yield finding
    except (BrokerRefusedError, BrokerUnreachableError) as error:
        yield failed("broker", f"{settings.rabbitmq_address}: {error}")
    except ConnectionError as error:
        yield failed("broker", f"it went away during the check ({type(error).__name__}): try again")


def _user(settings: BrokerSettings) -> str:
    name = urlsplit(settings.rabbitmq_url.get_secret_value()).username
    return f", as user {unquote(name)}" if name else ""


async def _behind(probes: Probes, topology: Topology) -> AsyncIterator[Finding]:
    queues: dict[str, Found] = {}
    exchanges: set[str] = set()
    unseen: set[str] = set()
    parts: list[Part] = [*topology.queues(), topology.control, *topology.exchanges()]
    for part in parts:
        try:
            found = await probes.find(part)
        except NotAllowedError as error:
            # What may be done with it shows without seeing it.
            unseen.add(part.name)
            yield _unseen(topology, part, str(error))
            continue
        if found is not None and isinstance(part, QueueSpec):
            queues[part.name] = found
        elif found is not None:
            exchanges.add(part.name)
        yield await _part(probes, topology, part, found)
    for finding in _life(topology, queues):
        yield finding
    async for finding in _rights(probes, topology, {*queues, *exchanges, *unseen}):
        yield finding


async def _part(probes: Probes, topology: Topology, part: Part, found: Found | None) -> Finding:
    check = str(part)
    if found is None:
        return _missing(topology, part)
    told = "is there"
    if isinstance(part, QueueSpec):
        told = f"{found.messages} waiting, {counted(found.consumers, 'consumer')}"
    if part.may_differ:
        return ok(check, told)
    try:
        difference = await probes.compare(part)
    except NotAllowedError as error:
        if topology.declare and part == topology.control:
            # It does without.
            return warning(check, f"cancellations would not be heard: {error}")
        if topology.declare:
            return failed(check, f"{error}; or set VQA_DECLARE_TOPOLOGY=false")
        return ok(check, f"{told} (its arguments were not compared: this user may not declare it)")
    if difference is None:
        return ok(check, f"{told}; as the worker needs it")
    text = f"other arguments than the worker's: {difference}"
    return (failed if topology.declare else warning)(
        check, f"{text}; delete it, change it by a policy, or name another"
    )


def _unseen(topology: Topology, part: Part, reason: str) -> Finding:
    """RabbitMQ 4.3 shows nothing to a user without any right to it; one that declares it has one."""
    if topology.declare and not part.may_differ and part != topology.control:
        return failed(str(part), f"{reason}; or set VQA_DECLARE_TOPOLOGY=false")
    return skipped(str(part), f"this user may not look for it: {reason}")


def _missing(topology: Topology, part: Part) -> Finding:
    if part.may_differ:
        return failed(str(part), "does not exist: create it (`vqa-worker topology apply` does)")
    if not topology.declare and part != topology.control:
        return failed(str(part), "does not exist: `vqa-worker topology apply` makes it")
    return warning(
        str(part), "does not exist yet: a worker makes it at its start, or `vqa-worker topology apply`"
    )


def _life(topology: Topology, found: Mapping[str, Found]) -> list[Finding]:
    """What the figures say."""
    findings = []
    jobs, dead = found.get(topology.jobs), found.get(topology.dead_letters)
    if jobs is not None and not jobs.consumers:
        findings.append(warning("workers", f"none takes jobs from {topology.jobs} at the moment"))
    if dead is not None and dead.messages:
        text = f"{counted(dead.messages, 'letter')} on {topology.dead_letters}: `vqa-worker dlq list`"
        findings.append(warning("dead letters", text))
    return findings


async def _rights(probes: Probes, topology: Topology, there: Collection[str]) -> AsyncIterator[Finding]:
    """What the user may do, as far as it shows without doing it."""
    if topology.jobs in there:
        yield await _right("right to take jobs", probes.may_consume(topology.jobs))
    if topology.control.name in there:
        try:
            await probes.may_listen(topology.control)
        except NotAllowedError as error:
            yield warning("cancellations", f"would not be heard: {error}")
        else:
            yield ok("cancellations", "can be heard")
    # Last, because a broker that takes no messages says nothing more to whoever has sent one.
    try:
        for what, exchange, queue in (
            ("results", topology.reply_exchange, topology.results),
            ("jobs back", topology.jobs_exchange, topology.jobs),
        ):
            if not exchange or exchange in there:
                by = f"by exchange {exchange}" if exchange else f"by {DEFAULT}"
                yield await _right(f"right to publish {what}", probes.may_publish(exchange, queue), by)
        if topology.reply_exchange and topology.jobs_exchange:
            yield await _direct_replies(probes)
    except BlockedError as error:
        yield failed("publishing", str(error))


async def _direct_replies(probes: Probes) -> Finding:
    try:
        await probes.may_publish("", "amq.rabbitmq.reply-to")
    except BlockedError:
        raise
    except NotAllowedError:
        return skipped("direct reply-to", f"goes by {DEFAULT}, which this user may not write to")
    return ok("direct reply-to", f"granted by {DEFAULT}")


async def _right(check: str, probe: Awaitable[None], how: str = "") -> Finding:
    try:
        await probe
    except BlockedError:
        raise
    except NotAllowedError as error:
        return failed(check, str(error))
    return ok(check, f"granted {how}".rstrip())
