"""The RabbitMQ users, the permissions of each, and the reason for each permission.

A permission is a regular expression over the names of queues and exchanges; the default exchange is named
`amq.default`. Which permissions the worker needs depends on its settings: with its own exchanges for jobs and
for replies it needs no write permission on the default exchange, which reaches every queue of its virtual
host.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vqa_worker.rabbitmq.replies import PRIVATE_PREFIX
from worker.rabbitmq.topology import Topology

NOTHING = "^$"
DEFAULT_EXCHANGE = r"amq\.default"
# Queues whose names RabbitMQ generates.
NAMED_BY_SERVER = r"amq\.gen-.*"
# Queues that the Python client and `vqa-worker submit` declare for their own results.
OWN_RESULTS = rf"{re.escape(PRIVATE_PREFIX)}.+"

WORKER, PUBLISHER, KEDA, OPERATOR = "vqa-worker", "vqa-publisher", "vqa-keda", "vqa-operator"


@dataclass(frozen=True)
class Right:
    """A pattern of names, and why a user needs the permission on them."""

    pattern: str
    why: str


@dataclass(frozen=True)
class TopicRights:
    """The routing keys with which a user may publish to a topic exchange, and bind queues to it."""

    exchange: str
    write: Sequence[Right] = ()
    read: Sequence[Right] = ()


@dataclass(frozen=True)
class User:
    """A RabbitMQ user; `tags` are for the management API."""

    name: str
    purpose: str
    configure: Sequence[Right] = ()
    write: Sequence[Right] = ()
    read: Sequence[Right] = ()
    topics: Sequence[TopicRights] = ()
    tags: Sequence[str] = ()


def regex(rights: Sequence[Right]) -> str:
    """Return the regular expression that RabbitMQ takes."""
    patterns = list(dict.fromkeys(right.pattern for right in rights))
    if not patterns:
        return NOTHING
    return f"^{patterns[0]}$" if len(patterns) == 1 else f"^({'|'.join(patterns)})$"


def intake(topology: Topology) -> str:
    """Return the name of the fanout exchange through which publishers reach only the jobs queue."""
    return f"{topology.jobs}.intake"


def users(topology: Topology) -> list[User]:
    """Return all users."""
    return [_worker(topology), _publisher(topology), _keda(), _operator(topology)]


def _worker(topology: Topology) -> User:
    results = "publish results" if topology.reply_exchange else "publish results and direct replies"
    return User(
        WORKER,
        "`vqa-worker run` with `VQA_DECLARE_TOPOLOGY=false`",
        configure=[Right(NAMED_BY_SERVER, "declare its queue for cancellations")],
        write=[
            Right(_exchange(topology.jobs_exchange), "publish retries, requeued jobs and dead letters"),
            Right(_exchange(topology.reply_exchange), results),
            Right(NAMED_BY_SERVER, "bind its queue for cancellations"),
            Right(re.escape(topology.control.name), "ask other workers about redelivered jobs"),
        ],
        read=[
            Right(re.escape(topology.jobs), "consume jobs"),
            Right(re.escape(topology.control.name), "bind its queue to this exchange"),
            Right(NAMED_BY_SERVER, "consume cancellations"),
        ],
        topics=_replies(
            topology,
            write=[
                Right(re.escape(topology.results), "publish results"),
                Right(OWN_RESULTS, "publish results to the queues of `submit` and clients"),
                Right(NAMED_BY_SERVER, "publish results to exclusive queues"),
            ],
        ),
    )


def _publisher(topology: Topology) -> User:
    own = [
        Right(OWN_RESULTS, "the result queues of `vqa-worker submit` and the Python client"),
        Right(NAMED_BY_SERVER, "exclusive reply queues"),
    ]
    reply_exchange = topology.reply_exchange
    to_bind = [Right(right.pattern, f"bind {right.why}") for right in own] if reply_exchange else []
    to_bind_to = [Right(re.escape(reply_exchange), "bind reply queues to this exchange")]
    return User(
        PUBLISHER,
        "publishes jobs, consumes results, cancels jobs: `vqa-worker submit`, the Python client",
        configure=[Right(right.pattern, f"declare and delete {right.why}") for right in own],
        write=[
            Right(re.escape(intake(topology)), "publish jobs"),
            Right(re.escape(topology.control.name), "cancel jobs"),
            *to_bind,
        ],
        read=[
            Right(re.escape(topology.results), "consume results"),
            *(Right(right.pattern, f"consume from {right.why}") for right in own),
            *(to_bind_to if reply_exchange else []),
        ],
        topics=_replies(topology, read=[Right(right.pattern, f"bind {right.why}") for right in own]),
    )


def _keda() -> User:
    return User(KEDA, "reads the length of the jobs queue, for autoscaling", tags=["management"])


def _operator(topology: Topology) -> User:
    own = own_names(topology)
    return User(
        OPERATOR,
        "`vqa-worker topology apply`, and the commands for dead letters",
        configure=[Right(pattern, "declare and delete queues and exchanges") for pattern in own],
        write=[
            *(Right(pattern, "bind queues, publish") for pattern in own),
            Right(DEFAULT_EXCHANGE, "declare queues that dead-letter to the default exchange"),
        ],
        read=[Right(pattern, "bind to exchanges, consume from queues") for pattern in own],
    )


def own_names(topology: Topology) -> list[str]:
    """Return patterns of all names that belong to the worker, and of the names below the main queues."""
    main = [topology.jobs, topology.results]
    others = [topology.dead_letters, topology.jobs_exchange, topology.reply_exchange]
    further = [name for name in others if name and not any(f"{name}.".startswith(f"{it}.") for it in main)]
    return [*(rf"{re.escape(name)}(\..*)?" for name in main), *map(re.escape, further)]


def _exchange(name: str) -> str:
    return re.escape(name) if name else DEFAULT_EXCHANGE


def _replies(
    topology: Topology, *, write: Sequence[Right] = (), read: Sequence[Right] = ()
) -> Sequence[TopicRights]:
    return [TopicRights(topology.reply_exchange, write, read)] if topology.reply_exchange else []
