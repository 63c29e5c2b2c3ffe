"""Checks of RabbitMQ: connection, topology, permissions. They change nothing."""

from collections.abc import AsyncIterator, Awaitable, Collection, Mapping
from typing import Final
from urllib.parse import unquote, urlsplit

from vqa_worker.rabbitmq.connection import Broker, BrokerRefusedError, BrokerUnreachableError
from vqa_worker.rabbitmq.session import Session
from worker.cli.check.finding import Finding, failed, ok, skipped, warning
from worker.cli.shell import counted
from worker.rabbitmq.permission_checks import BlockedError, Found, NotAllowedError, Probes
from worker.rabbitmq.topology import Part, QueueSpec, Topology
from worker.settings import BrokerSettings

DEFAULT: Final = "the default exchange"


async def broker_findings(
    settings: BrokerSettings, broker: Broker, timeout_s: float
) -> AsyncIterator[Finding]:
    """Check the connection, queues, exchanges and permissions."""
    try:
        async with Session(broker, "check").opened(timeout_s) as connection:
            probes = Probes(connection)
            yield ok("broker", f"{probes.version} at {settings.rabbitmq_address}{_user(settings)}")
            async for finding in _topology_findings(probes, Topology.from_settings(settings)):
                yield finding
    except (BrokerRefusedError, BrokerUnreachableError) as error:
        yield failed("broker", f"{settings.rabbitmq_address}: {error}")
    except ConnectionError as error:
        yield failed(
            "broker", f"the connection was lost during the check ({type(error).__name__}). Try again."
        )


def _user(settings: BrokerSettings) -> str:
    name = urlsplit(settings.rabbitmq_url.get_secret_value()).username
    return f", as user {unquote(name)}" if name else ""


async def _topology_findings(probes: Probes, topology: Topology) -> AsyncIterator[Finding]:
    queues: dict[str, Found] = {}
    exchanges: set[str] = set()
    hidden: set[str] = set()
    parts: list[Part] = [*topology.queues(), topology.control, *topology.exchanges()]
    for part in parts:
        try:
            found = await probes.find(part)
        except NotAllowedError as error:
            # Permissions can be checked without seeing it.
            hidden.add(part.name)
            yield _hidden_part(topology, part, str(error))
            continue
        if found is not None and isinstance(part, QueueSpec):
            queues[part.name] = found
        elif found is not None:
            exchanges.add(part.name)
        yield await _part(probes, topology, part, found)
    for finding in _activity(topology, queues):
        yield finding
    async for finding in _permissions(probes, topology, {*queues, *exchanges, *hidden}):
        yield finding


async def _part(probes: Probes, topology: Topology, part: Part, found: Found | None) -> Finding:
    check = str(part)
    if found is None:
        return _missing(topology, part)
    state = "exists"
    if isinstance(part, QueueSpec):
        state = f"{found.messages} ready, {counted(found.consumers, 'consumer')}"
    if part.may_differ:
        return ok(check, state)
    try:
        difference = await probes.compare(part)
    except NotAllowedError as error:
        if topology.declare and part == topology.control:
            # A worker runs without it.
            return warning(check, f"the worker will not receive cancellations: {error}")
        if topology.declare:
            return failed(check, f"{error}; or set VQA_DECLARE_TOPOLOGY=false")
        return ok(check, f"{state}; arguments not checked (the user has no permission to declare it)")
    if difference is None:
        return ok(check, f"{state}; arguments OK")
    text = f"arguments differ from the worker's: {difference}"
    return (failed if topology.declare else warning)(
        check, f"{text}. Delete it, change it with a policy, or configure another name."
    )


def _hidden_part(topology: Topology, part: Part, reason: str) -> Finding:
    """RabbitMQ 4.3 hides a queue from a user without permissions on it; a user that declares it has one."""
    if topology.declare and not part.may_differ and part != topology.control:
        return failed(str(part), f"{reason}; or set VQA_DECLARE_TOPOLOGY=false")
    return skipped(str(part), f"hidden from this user: {reason}")


def _missing(topology: Topology, part: Part) -> Finding:
    if part.may_differ:
        return failed(str(part), "does not exist. Run `vqa-worker topology apply`.")
    if not topology.declare and part != topology.control:
        return failed(str(part), "does not exist. Run `vqa-worker topology apply`.")
    return warning(str(part), "does not exist yet. Start a worker or run `vqa-worker topology apply`.")


def _activity(topology: Topology, found: Mapping[str, Found]) -> list[Finding]:
    """Check for consumers and dead letters."""
    findings = []
    jobs, dead = found.get(topology.jobs), found.get(topology.dead_letters)
    if jobs is not None and not jobs.consumers:
        findings.append(warning("workers", f"no consumers on {topology.jobs}"))
    if dead is not None and dead.messages:
        text = f"{counted(dead.messages, 'message')} on {topology.dead_letters}. Run `vqa-worker dlq list`."
        findings.append(warning("dead letters", text))
    return findings


async def _permissions(
    probes: Probes, topology: Topology, existing: Collection[str]
) -> AsyncIterator[Finding]:
    """Check the user's permissions without consuming or publishing."""
    if topology.jobs in existing:
        yield await _permission("permission to consume jobs", probes.may_consume(topology.jobs))
    if topology.control.name in existing:
        try:
            await probes.may_listen(topology.control)
        except NotAllowedError as error:
            yield warning("cancellations", f"the worker will not receive them: {error}")
        else:
            yield ok("cancellations", "permission granted")
    # Last, because a broker with a resource alarm blocks a connection that publishes.
    try:
        for what, exchange, queue in (
            ("results", topology.reply_exchange, topology.results),
            ("requeued jobs", topology.jobs_exchange, topology.jobs),
        ):
            if not exchange or exchange in existing:
                by = f"on exchange {exchange}" if exchange else f"on {DEFAULT}"
                yield await _permission(
                    f"permission to publish {what}", probes.may_publish(exchange, queue), by
                )
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
        return skipped("direct reply-to", f"no write permission on {DEFAULT}")
    return ok("direct reply-to", f"granted on {DEFAULT}")


async def _permission(check: str, probe: Awaitable[None], how: str = "") -> Finding:
    try:
        await probe
    except BlockedError:
        raise
    except NotAllowedError as error:
        return failed(check, str(error))
    return ok(check, f"granted {how}".rstrip())
