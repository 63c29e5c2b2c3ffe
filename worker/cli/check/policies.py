"""Check what the broker's policies do to the worker's queues, which AMQP does not show."""

from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, Final
from urllib.parse import quote, unquote, urlsplit

import aiohttp
from yarl import URL

from vqa_worker.rabbitmq.connection import Broker
from worker.cli.check import Finding, failed, ok, skipped, warning
from worker.rabbitmq.topology import QueueSpec, Topology
from worker.settings import BrokerSettings, Settings

CHECK: Final = "policies"
LENGTHS: Final = {"max-length": "messages", "max-length-bytes": "bytes"}


async def policy_findings(
    settings: BrokerSettings, broker: Broker, management_url: str, timeout_s: float
) -> AsyncIterator[Finding]:
    """Read each queue's effective policy from the management API, and report limits that remove messages."""
    topology, is_harmless = Topology.from_settings(settings), True
    most_deliveries = settings.delivery_limit if isinstance(settings, Settings) else None
    try:
        for spec in topology.queues():
            found = await _queue(broker, management_url, spec.name, timeout_s)
            for text in effects(spec, found, jobs=topology.jobs, most_deliveries=most_deliveries):
                is_harmless = False
                yield warning(f"{CHECK} of {spec}", f"{_names(found)}{text}")
    except PermissionError:
        advice = "give it the tag `management` and a permission in the virtual host"
        yield skipped(CHECK, f"this user may not use the management API: {advice}")
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        text = (
            f"{management_url} does not answer as RabbitMQ's management API ({type(error).__name__}: {error})"
        )
        yield failed(CHECK, f"{text}. Check --management-url.")
    else:
        if is_harmless:
            yield ok(CHECK, "no policy removes messages")


async def _queue(broker: Broker, management_url: str, name: str, timeout_s: float) -> Mapping[str, Any]:
    """Return a queue as the management API describes it; nothing if it does not exist.

    Raises:
        PermissionError: the user may not use the API.
        ClientError, TimeoutError, ValueError: it is not the management API.
    """
    # The nodes of a cluster have the same users and virtual hosts.
    login = urlsplit(broker.nodes()[0].url)
    vhost = quote(unquote(login.path[1:]) or "/", safe="")
    url = URL(f"{management_url.rstrip('/')}/api/queues/{vhost}/{quote(name, safe='')}", encoded=True)
    user, password = unquote(login.username or ""), unquote(login.password or "")
    headers = {"Authorization": aiohttp.encode_basic_auth(user, password, "utf-8")}
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with (
        aiohttp.ClientSession(headers=headers, timeout=timeout, trust_env=True) as session,
        session.get(url, ssl=broker.ssl_context or True) as response,
    ):
        if response.status in (401, 403):
            raise PermissionError
        found = await response.json()
        if response.status == 404:  # noqa: PLR2004 - HTTP
            return {}
        response.raise_for_status()
        return {**found}


def _names(found: Mapping[str, Any]) -> str:
    names = [str(found[kind]) for kind in ("policy", "operator_policy") if found.get(kind)]
    return f"{' and '.join(names)}: " if names else ""


def effects(
    spec: QueueSpec, found: Mapping[str, Any], *, jobs: str, most_deliveries: int | None
) -> Iterator[str]:
    """Yield a sentence for each limit that removes messages; `found` as from the management API."""
    limits = _limits(found)
    is_jobs, is_retry = spec.name == jobs, "x-message-ttl" in spec.arguments
    removes = "dead-letters" if "dead-letter-exchange" in limits else "deletes"
    without_result = ", without a result" if is_jobs else ""
    if (expires := limits.get("expires")) is not None:
        text = f"RabbitMQ deletes the queue with its messages after {expires / 1000:g} s without a consumer"
        yield f"{text}, and a retry queue never has one" if is_retry else text
    if (ttl := limits.get("message-ttl")) is not None and not is_retry:
        yield f"RabbitMQ {removes} messages after {ttl / 1000:g} s in the queue{without_result}"
    if limits.get("overflow") != "reject-publish":
        lengths = [f"{limits[it]:,} {unit}" for it, unit in LENGTHS.items() if it in limits]
        if lengths:
            yield f"RabbitMQ {removes} the oldest messages over {' or '.join(lengths)} (overflow: drop-head)"
        if limits.get("dead-letter-strategy") == "at-least-once":
            target = limits.get("dead-letter-routing-key")
            yield f"without overflow reject-publish, RabbitMQ loses what queue {target} cannot take"
    limit = limits.get("delivery-limit")
    if is_jobs and limit is not None and most_deliveries is not None and 0 <= limit < most_deliveries:
        yield (
            f"RabbitMQ {removes} a job after {limit} lost deliveries{without_result}: VQA_DELIVERY_LIMIT"
            f" ({most_deliveries}) has no effect"
        )


def _limits(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the limits in force: the queue's arguments and its policy.

    Of two numbers the lower one holds. The overflow of a policy precedes the argument, all else does not
    (quorum queues of 3.10.8, 4.0.5 and 4.3.6).
    """
    own = {name.removeprefix("x-"): value for name, value in found.get("arguments", {}).items()}
    policy = found.get("effective_policy_definition") or {}
    both = [it for it in own.keys() & policy.keys() if isinstance(own[it], int)]
    overflow = {it: policy[it] for it in policy.keys() & {"overflow"}}
    return {**policy, **own, **{it: min(own[it], policy[it]) for it in both}, **overflow}
