"""Helpers of tests that inject faults: batches of jobs, waiting for states, users of the broker."""

import asyncio
import base64
import json
import re
import urllib.request
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import quote, urlsplit

from deploy.local.model_simulator.calls import Call
from deploy.local.stack import Stack
from tests.conftest import picture
from tests.running import PATIENCE_S, Client, Reply, Worker, calls_with, until

PICTURE = f"data:image/png;base64,{base64.b64encode(picture()).decode()}"


def job(question: str = "What is it?", image: str = PICTURE, **fields: Any) -> dict[str, Any]:
    """Return a job with a new id."""
    return {"id": uuid.uuid4().hex, "question": question, "images": [image], **fields}


async def publish(client: Client, count: int, question: str, **fields: Any) -> list[str]:
    """Publish `count` jobs with this question followed by the job id; return the ids."""
    jobs = [job(question, **fields) for _ in range(count)]
    for it in jobs:
        it["question"] = f"{question} {it['id']}"
    await asyncio.gather(*(client.publish(it) for it in jobs))
    return [it["id"] for it in jobs]


async def results(client: Client, ids: Iterable[str], patience_s: float = PATIENCE_S) -> list[Reply]:
    """Wait for the first result of each job."""
    wanted = list(ids)
    await until(
        lambda: all(client.replies.get(it) for it in wanted),
        f"{len(wanted)} results, of which there are "
        f"{Counter(bool(client.replies.get(it)) for it in wanted)[True]} at the start",
        patience_s,
    )
    return [client.replies[it][0] for it in wanted]


def statuses(replies: Iterable[Reply]) -> Counter[str]:
    """Count the results by error code, or by status where there is no error."""
    return Counter((reply.body["error"] or {}).get("code", reply.body["status"]) for reply in replies)


async def calls_begun(stack: Stack, marker: str, count: int) -> list[Call]:
    """Wait until `count` calls with this marker have reached the model; return them."""

    def begun() -> list[Call]:
        calls = calls_with(stack, marker)
        return calls if len(calls) >= count else []

    calls: list[Call] = await until(begun, f"{count} calls")
    return calls


async def model_answered(stack: Stack, marker: str) -> None:
    """Wait until every call about these jobs has completed."""
    await until(lambda: all(call.ended for call in calls_with(stack, marker)), "the model's answers")


async def said(worker: Worker, status: str) -> tuple[int, list[str]]:
    """Wait until `/readyz` reports this status; return the HTTP status and the reasons."""

    def answer() -> tuple[int, list[str]] | None:
        code, body = worker.ready()
        return (code, body["reasons"]) if body.get("status") == status else None

    found: tuple[int, list[str]] = await until(answer, f"the worker is {status}")
    return found


def hasty(worker: Worker) -> Worker:
    """Shorten the probe intervals of a worker before its start."""
    worker.patch = (
        "from worker.resilience import consumer_controller as controller\n"
        "controller.FIRST_PROBE_DELAY_S, controller.MAX_PROBE_INTERVAL_S = 0.05, 0.1"
    )
    return worker


def events(worker: Worker, event: str) -> list[dict[str, Any]]:
    """Return the worker's log lines with this event."""
    return [line for line in worker.log() if line.get("event") == event]


@dataclass(frozen=True)
class BrokerUser:
    """A broker user, to distinguish a worker's connections from a test's."""

    stack: Stack
    name: str
    password: str = "it's-a-secret"
    vhost: str = "/"

    @classmethod
    @contextmanager
    def of(cls, stack: Stack, *, configure: str = ".*", vhost: str = "/") -> Iterator[Self]:
        user = cls(stack, f"u{uuid.uuid4().hex[:10]}", vhost=vhost)
        user.set_password(user.password)
        user.permit(configure=configure)
        yield user

    @property
    def url(self) -> str:
        return url_as(self.stack, self.name, self.password, "" if self.vhost == "/" else self.vhost)

    def set_password(self, password: str) -> None:
        """Change the password for new connections."""
        administer(self.stack, "PUT", f"/api/users/{self.name}", {"password": password, "tags": ""})

    def permit(self, *, configure: str = ".*", write: str = ".*", read: str = ".*") -> None:
        """Set the user's permissions."""
        rights = {"configure": configure, "write": write, "read": read}
        administer(self.stack, "PUT", f"/api/permissions/{quote(self.vhost, safe='')}/{self.name}", rights)

    def close_connections(self) -> None:
        """Close the user's connections from the broker's side."""
        administer(self.stack, "DELETE", f"/api/connections/username/{self.name}")


async def held_by_broker(stack: Stack, queue: str) -> tuple[int, int]:
    """Return how many messages a queue has and how many are ready, as `rabbitmqctl list_queues` shows it."""
    listed = await asyncio.to_thread(stack.rabbitmq.ctl, "list_queues", "name", "messages", "messages_ready")
    (line,) = [line.split() for line in listed.splitlines() if line.split()[:1] == [queue]]
    return int(line[1]), int(line[2])


def broker_version(stack: Stack) -> tuple[int, ...]:
    """Return the version of RabbitMQ: (4, 3, 6)."""
    return tuple(map(int, stack.rabbitmq.ctl("version").strip().split(".")))


@contextmanager
def own_vhost(stack: Stack) -> Iterator[str]:
    """Create a virtual host in which `guest` has all permissions; delete it at the end."""
    vhost = uuid.uuid4().hex
    administer(stack, "PUT", f"/api/vhosts/{vhost}")
    everything = {"configure": ".*", "write": ".*", "read": ".*"}
    administer(stack, "PUT", f"/api/permissions/{vhost}/guest", everything)
    try:
        yield vhost
    finally:
        administer(stack, "DELETE", f"/api/vhosts/{vhost}")


@contextmanager
def policy(
    stack: Stack, queue: str, definition: Mapping[str, object], *, vhost: str = "/", kind: str = "policies"
) -> Iterator[None]:
    """Apply a policy to a queue, or with `kind` `operator-policies` an operator's; remove it at the end."""
    path = f"/api/{kind}/{quote(vhost, safe='')}/{uuid.uuid4().hex}"
    body = {"pattern": f"^{re.escape(queue)}$", "definition": definition, "apply-to": "queues"}
    administer(stack, "PUT", path, body)
    try:
        yield
    finally:
        administer(stack, "DELETE", path)


def administer(
    stack: Stack, method: str, path: str, body: object = None, *, user: str = "guest:guest"
) -> Any:
    """Call the management API of the broker; return the response, if any."""
    credentials = base64.b64encode(user.encode()).decode()
    request = urllib.request.Request(  # noqa: S310 - our own http:// URL
        f"{stack.rabbitmq.management_url}{path}",
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Authorization": f"Basic {credentials}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=10) as response:  # noqa: S310
        answer = response.read()
    return json.loads(answer) if answer else None


def url_as(stack: Stack, user: str, password: str, vhost: str = "") -> str:
    """Return the broker's URL with other credentials."""
    parts = urlsplit(stack.rabbitmq.url)
    return f"amqp://{user}:{password}@{parts.hostname}:{parts.port}/{vhost}"
