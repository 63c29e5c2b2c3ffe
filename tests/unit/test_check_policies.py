"""What policies do to the worker's queues, from the descriptions of the management API."""

from typing import Any

import pytest

from tests.unit.fakes import TOPOLOGY
from worker.cli.check.policies import effects

DROP = {"max-length": 1000, "overflow": "drop-head"}
QUEUES = {spec.name: spec for spec in TOPOLOGY.queues()}
JOBS, RETRY = TOPOLOGY.jobs, TOPOLOGY.retry(TOPOLOGY.retry_delays_s[0])
EXPIRES = "RabbitMQ deletes the queue with its messages after 0.5 s without a consumer"
DROPS = "the oldest messages over 1,000 messages (overflow: drop-head)"
DELIVERIES = "RabbitMQ dead-letters a job after 3 lost deliveries"
LOSES = "without overflow reject-publish, RabbitMQ loses what queue {} cannot take"


def found(queue: str, policy: Any, arguments: dict[str, Any] | None = None) -> list[str]:
    """Return the effects of a policy on a queue with the worker's arguments, or with others."""
    spec = QUEUES[queue]
    shown = {
        "arguments": spec.arguments if arguments is None else arguments,
        "effective_policy_definition": policy,
    }
    return list(effects(spec, shown, jobs=JOBS, most_deliveries=20))


@pytest.mark.parametrize(
    ("queue", "policy", "expected"),
    [
        (RETRY, {"expires": 500}, [f"{EXPIRES}, and a retry queue never has one"]),
        (JOBS, {"expires": 500}, [EXPIRES]),
        (
            JOBS,
            {"message-ttl": 5000},
            ["RabbitMQ dead-letters messages after 5 s in the queue, without a result"],
        ),
        (TOPOLOGY.results, {"message-ttl": 5000}, ["RabbitMQ deletes messages after 5 s in the queue"]),
        (TOPOLOGY.results, DROP, [f"RabbitMQ deletes {DROPS}"]),
        (TOPOLOGY.dead_letters, {"max-length": 1000}, [f"RabbitMQ deletes {DROPS}"]),
        (JOBS, DROP, [f"RabbitMQ dead-letters {DROPS}", LOSES.format(TOPOLOGY.dead_letters)]),
        (RETRY, {"overflow": "drop-head"}, [LOSES.format(JOBS)]),
        (
            JOBS,
            {"delivery-limit": 3},
            [f"{DELIVERIES}, without a result: VQA_DELIVERY_LIMIT (20) has no effect"],
        ),
    ],
    ids=str,
)
def test_a_policy_that_removes_messages_is_explained(
    queue: str, policy: dict[str, Any], expected: list[str]
) -> None:
    assert found(queue, policy) == expected


@pytest.mark.parametrize(
    ("queue", "policy"),
    [
        *((name, None) for name in QUEUES),
        *((name, []) for name in QUEUES),
        (JOBS, {"max-length": 5, "dead-letter-exchange": "elsewhere", "delivery-limit": 50}),
        (JOBS, {"delivery-limit": 20}),
        (RETRY, {"message-ttl": 100, "max-length-bytes": 1}),
        (TOPOLOGY.results, {"max-length": 1, "overflow": "reject-publish"}),
    ],
    ids=str,
)
def test_a_policy_that_removes_nothing_is_not_reported(queue: str, policy: Any) -> None:
    assert found(queue, policy) == []


def test_arguments_of_a_queue_that_others_declared_count_too() -> None:
    assert found(JOBS, {"expires": 900}, {"x-expires": 500}) == [EXPIRES]
    assert found(JOBS, {"expires": 500}, {"x-expires": 900}) == [EXPIRES]
    assert found(JOBS, {}, {"x-max-length": 1000}) == [f"RabbitMQ deletes {DROPS}"]
