"""Checks of RabbitMQ: connection, topology, permissions. They change nothing."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import Final, TypeAlias
from urllib.parse import unquote, urlsplit

from vqa_worker.rabbitmq.addresses import host_and_port
from vqa_worker.rabbitmq.connection import Broker, BrokerRefusedError, BrokerUnreachableError, close, url_of
from vqa_worker.rabbitmq.replies import PRIVATE_PREFIX
from vqa_worker.rabbitmq.session import Session
from worker.cli.check import Finding, failed, ok, skipped, warning
from worker.cli.shell import counted
from worker.rabbitmq.permission_checks import (
    BlockedError,
    NotAllowedError,
    NotFoundError,
    Probes,
    QueueKind,
)
from worker.rabbitmq.single_jobs import stream_fault
from worker.rabbitmq.topology import Part, QueueSpec, Topology
from worker.settings import BrokerSettings

# Names of queues that do not exist: like those of `submit`, and like those that RabbitMQ names.
REPLY_QUEUE: Final = f"{PRIVATE_PREFIX}check"
PRIVATE_QUEUE: Final = "amq.gen-check"
Probe: TypeAlias = Callable[[], Awaitable[None]]
Problem: TypeAlias = Callable[[str, str], Finding]

CREATE: Final = "Run `vqa-worker topology apply`."


async def broker_findings(
    settings: BrokerSettings, broker: Broker, timeout_s: float
) -> AsyncIterator[Finding]:
    """Check the connection, queues, exchanges and permissions."""
    try:
        async with Session(broker, "check").opened(timeout_s) as connection:
            probes, topology = Probes(connection), Topology.from_settings(settings)
            name = unquote(urlsplit(url_of(connection)).username or "")
            user = f", as user {name}" if name else ""
            yield ok("broker", f"{probes.version} at {settings.rabbitmq_address}{user}")
            async for finding in _nodes(broker, probes.cluster, timeout_s):
                yield finding
            parts: list[Part] = [*topology.queues(), topology.control, *topology.exchanges()]
            for part in parts:
                yield await _part(probes, topology, part)
            async for finding in _permissions(probes, topology):
                yield finding
            # Last: RabbitMQ can close the connection.
            if not topology.declare and (kind := await _kind(probes, topology.jobs)):
                yield kind
    except (BrokerRefusedError, BrokerUnreachableError) as error:
        yield failed("broker", f"{settings.rabbitmq_address}: {error}")
    except ConnectionError as error:
        yield failed("broker", f"the connection was lost ({type(error).__name__}). Try again.")


async def _nodes(broker: Broker, cluster: str, timeout_s: float) -> AsyncIterator[Finding]:
    """Check that each of several nodes answers, and that all belong to the same cluster."""
    nodes = broker.nodes()
    if len(nodes) == 1:
        return
    for address, found in zip(
        [host_and_port(node.url) for node in nodes],
        await asyncio.gather(*(_cluster_of(node, timeout_s) for node in nodes), return_exceptions=True),
        strict=True,
    ):
        match found:
            case BrokerRefusedError() | BrokerUnreachableError():
                yield warning(f"node {address}", f"{found}. The worker uses the other nodes.")
            case BaseException():
                raise found
            case str() if found != cluster:
                text = f"belongs to the cluster {found}, another one to {cluster}. List one cluster."
                yield failed(f"node {address}", text)
            case _:
                yield ok(f"node {address}", f"cluster {found}")


async def _cluster_of(node: Broker, timeout_s: float) -> str:
    try:
        async with asyncio.timeout(timeout_s):
            connection = await node.connect()
    except TimeoutError:
        raise BrokerUnreachableError(f"no answer within {timeout_s:g} s") from None
    try:
        return Probes(connection).cluster
    finally:
        await close(connection)


async def _part(probes: Probes, topology: Topology, part: Part) -> Finding:
    """Check that a queue or exchange exists as the worker needs it, or that the worker can create it."""
    check, is_optional = str(part), part == topology.control
    is_declared = topology.declare and not part.may_differ
    state, advice = "", ""
    try:
        found = await probes.find(part)
        if found is None:
            return await _missing(probes, part, is_needed=not is_declared and not is_optional)
        state = f"{found.messages} ready, {counted(found.consumers, 'consumer')}"
        if not isinstance(part, QueueSpec):
            state = "exists"
        elif part.name == topology.jobs and not found.consumers:
            advice = ". Start a worker."
        elif part.name == topology.dead_letters and found.messages:
            advice = ". Run `vqa-worker dlq list`."
        difference = None if part.may_differ else await probes.compare(part)
    except NotAllowedError as error:
        # RabbitMQ 4.3 hides a queue from a user without permissions on it; to declare it, a worker needs one.
        if is_declared and is_optional:
            return warning(check, f"the worker will not receive cancellations: {error}")
        if is_declared:
            return failed(check, f"{error}; or set VQA_DECLARE_TOPOLOGY=false")
        if not state:
            return skipped(check, f"hidden from this user: {error}")
        return ok(check, f"{state}; arguments not checked (this user may not declare it)")
    if difference is not None:
        fix = "Delete it, change it with a policy, or configure another name."
        text = f"arguments differ from the worker's: {difference}. {fix}"
        return failed(check, text) if topology.declare else warning(check, text)
    return (warning if advice else ok)(check, f"{state}{'' if part.may_differ else '; arguments OK'}{advice}")


async def _missing(probes: Probes, part: Part, *, is_needed: bool) -> Finding:
    if is_needed:
        return failed(str(part), f"does not exist. {CREATE}")
    if isinstance(part, QueueSpec):
        try:
            await probes.may_declare(part.name, part.arguments)
        except NotAllowedError as error:
            return failed(str(part), f"does not exist, and the worker cannot create it: {error}. {CREATE}")
    return warning(str(part), f"does not exist yet. Start a worker or run {CREATE[4:]}")


async def _permissions(probes: Probes, topology: Topology) -> AsyncIterator[Finding]:
    """Check the user's permissions without consuming or publishing."""
    jobs, exchange = topology.jobs, topology.reply_exchange
    bind, consume, publish = probes.may_bind, probes.may_consume, probes.may_publish
    listening = [
        partial(probes.may_declare, ""),
        partial(bind, PRIVATE_QUEUE, topology.control.name),
        partial(consume, PRIVATE_QUEUE),
    ]
    reading = [partial(probes.may_declare, REPLY_QUEUE), partial(consume, REPLY_QUEUE)]
    bound = [partial(bind, REPLY_QUEUE, exchange)] if exchange else []
    replying = [partial(publish, exchange, REPLY_QUEUE)]
    # Publishing last: a broker with a resource alarm blocks a connection that publishes.
    checks: list[tuple[Problem, str, Sequence[Probe]]] = [
        (failed, "consume jobs", [partial(consume, jobs)]),
        (warning, "receive cancellations", listening),
        (failed, "publish results", [partial(publish, exchange, topology.results)]),
        (failed, "requeue jobs", [partial(publish, topology.jobs_exchange, jobs)]),
        *([(warning, f"publish to {PRIVATE_PREFIX}*", replying)] if exchange else []),
        (skipped, "submit jobs", [*reading, *bound, partial(publish, "", jobs)]),
    ]
    try:
        for problem, action, needed in checks:
            refusal = await _refusal(needed)
            check = f"permission to {action}"
            yield problem(check, refusal) if refusal else ok(check, "granted")
    except BlockedError as error:
        yield failed("publishing", str(error))


async def _kind(probes: Probes, jobs: str) -> Finding | None:
    """Check whether a worker can use a jobs queue that it did not declare, as far as this user can see."""
    check = f"type of queue {jobs}"
    match await probes.kind(jobs):
        case QueueKind.STREAM:
            return failed(check, stream_fault(jobs))
        case QueueKind.SINGLE_ACTIVE_CONSUMER:
            return warning(check, "single active consumer: only one worker at a time gets jobs")
        case QueueKind.USUAL | None:
            return None


async def _refusal(needed: Sequence[Probe]) -> str:
    """Return the first refusal; an empty string if the user may do all of it."""
    for probe in needed:
        try:
            await probe()
        except NotFoundError:
            continue
        except BlockedError:
            raise
        except NotAllowedError as error:
            return str(error)
    return ""
