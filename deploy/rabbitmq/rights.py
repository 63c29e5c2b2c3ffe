"""The users of the broker, what each may do there, and why.

A right is a regular expression over the names of queues and exchanges alike; the default exchange goes by the
name `amq.default`. Which of them the worker needs follows from its settings: with exchanges of its own for
jobs and for replies it can do without the default exchange, which reaches every queue of the virtual host.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from worker.rabbitmq.topology import Topology

NOTHING = "^$"
DEFAULT_EXCHANGE = r"amq\.default"
# What RabbitMQ names the queues that it is asked to name.
NAMED_BY_SERVER = r"amq\.gen-.*"

WORKER, PUBLISHER, KEDA, OPERATOR = "vqa-worker", "vqa-publisher", "vqa-keda", "vqa-operator"


@dataclass(frozen=True)
class Right:
    """Names that something may be done with, as a pattern, and what for."""

    pattern: str
    why: str


@dataclass(frozen=True)
class TopicRights:
    """Which routing keys a user may write to a topic exchange with, and bind queues to it with."""

    exchange: str
    write: Sequence[Right] = ()
    read: Sequence[Right] = ()


@dataclass(frozen=True)
class User:
    """A user of the broker; `tags` are for the management interface."""

    name: str
    purpose: str
    configure: Sequence[Right] = ()
    write: Sequence[Right] = ()
    read: Sequence[Right] = ()
    topics: Sequence[TopicRights] = ()
    tags: Sequence[str] = ()


def regex(rights: Sequence[Right]) -> str:
    """The expression that RabbitMQ takes."""
    patterns = list(dict.fromkeys(right.pattern for right in rights))
    if not patterns:
        return NOTHING
    return f"^{patterns[0]}$" if len(patterns) == 1 else f"^({'|'.join(patterns)})$"


def intake(topology: Topology) -> str:
    """A fan-out exchange to the jobs queue, so that who publishes jobs reaches nothing else."""
    return f"{topology.jobs}.intake"


def users(topology: Topology) -> list[User]:
    """All of them."""
    return [_worker(topology), _publisher(topology), _keda(), _operator(topology)]


def _worker(topology: Topology) -> User:
    jobs_go_back = "retries, jobs that are given back, dead letters"
    results = "results" if topology.reply_exchange else "results, direct replies among them"
    return User(
        WORKER,
        "`vqa-worker run` with `VQA_DECLARE_TOPOLOGY=false`",
        configure=[Right(NAMED_BY_SERVER, "make the queue on which it hears of cancellations")],
        write=[
            Right(_exchange(topology.jobs_exchange), jobs_go_back),
            Right(_exchange(topology.reply_exchange), results),
            Right(NAMED_BY_SERVER, "bind its queue"),
        ],
        read=[
            Right(re.escape(topology.jobs), "take jobs"),
            Right(re.escape(topology.control.name), "bind its queue to this exchange"),
            Right(NAMED_BY_SERVER, "hear of cancellations"),
        ],
        topics=_replies(
            topology,
            write=[
                Right(rf"{re.escape(topology.results)}(\..*)?", "results"),
                Right(NAMED_BY_SERVER, "results for private queues"),
            ],
        ),
    )


def _publisher(topology: Topology) -> User:
    own = "private queues for replies"
    reply_exchange = topology.reply_exchange
    to_bind = [Right(NAMED_BY_SERVER, "bind a private queue for replies")] if reply_exchange else []
    to_bind_to = [Right(re.escape(reply_exchange), "bind it to this exchange")] if reply_exchange else []
    return User(
        PUBLISHER,
        "publishes jobs, reads results, cancels",
        configure=[Right(NAMED_BY_SERVER, own)],
        write=[
            Right(re.escape(intake(topology)), "publish jobs"),
            Right(re.escape(topology.control.name), "cancel jobs"),
            *to_bind,
        ],
        read=[
            Right(re.escape(topology.results), "results"),
            Right(NAMED_BY_SERVER, own),
            *to_bind_to,
        ],
        topics=_replies(topology, read=[Right(NAMED_BY_SERVER, "bind no key but a private queue's name")]),
    )


def _keda() -> User:
    return User(KEDA, "reads the length of the jobs queue, to scale by it", tags=["management"])


def _operator(topology: Topology) -> User:
    own = own_names(topology)
    return User(
        OPERATOR,
        "`vqa-worker topology apply`, and whoever puts dead letters back",
        configure=[Right(pattern, "make and delete the queues and exchanges") for pattern in own],
        write=[
            *(Right(pattern, "bind queues, publish") for pattern in own),
            Right(DEFAULT_EXCHANGE, "declare queues that hand on by it"),
        ],
        read=[Right(pattern, "bind to exchanges, read queues") for pattern in own],
    )


def own_names(topology: Topology) -> list[str]:
    """Patterns of all names that belong to the worker, and of those below the main ones."""
    main = [topology.jobs, topology.results]
    others = [topology.dead_letters, topology.jobs_exchange, topology.reply_exchange]
    beside = [name for name in others if name and not any(f"{name}.".startswith(f"{it}.") for it in main)]
    return [*(rf"{re.escape(name)}(\..*)?" for name in main), *map(re.escape, beside)]


def _exchange(name: str) -> str:
    return re.escape(name) if name else DEFAULT_EXCHANGE


def _replies(
    topology: Topology, *, write: Sequence[Right] = (), read: Sequence[Right] = ()
) -> Sequence[TopicRights]:
    return [TopicRights(topology.reply_exchange, write, read)] if topology.reply_exchange else []
