"""The files: definitions for a server, and resources for RabbitMQ's Messaging Topology Operator."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from deploy.rabbitmq.rights import User, intake, own_names, regex, users
from worker.cli.topology import definitions
from worker.rabbitmq.topology import Topology

API_VERSION = "rabbitmq.com/v1beta1"
# Leaders of queues that are declared from then on are spread over the nodes of a cluster.
POLICY = {"queue-leader-locator": "balanced"}
ABOUT_USERS = """\
# Made by `python -m deploy.rabbitmq`: change deploy/rabbitmq/rights.py, and run it again.
#
# For RabbitMQ's Messaging Topology Operator. `rabbitmqClusterReference` names the RabbitmqCluster, in the
# same namespace as this. Each user's name and password come from a Secret that has to be there before. How to
# make those, and what each user may do and why: docs/permissions.md.
"""


@dataclass(frozen=True)
class Place:
    """Where it all goes: a virtual host, and on Kubernetes the name of the RabbitmqCluster."""

    vhost: str
    cluster: str


def files(topology: Topology, place: Place) -> Mapping[str, str]:
    """All files for one choice of names and exchanges."""
    return {
        # Apart from the rest: whoever imports users sets their passwords, here to none, with which nobody
        # can log in.
        "users.json": _json({"users": [_user(user) for user in users(topology)]}),
        "definitions.json": _json(server_definitions(topology, place.vhost)),
        "topology-operator.yaml": ABOUT_USERS + _yaml(list(resources(topology, place))),
    }


def server_definitions(topology: Topology, vhost: str) -> dict[str, Any]:
    """What `rabbitmqctl import_definitions` takes: all but the users, and it may be imported again."""
    parts = _parts(topology)
    return {
        "vhosts": [{"name": vhost}],
        "permissions": [
            {
                "user": user.name,
                "vhost": vhost,
                "configure": regex(user.configure),
                "write": regex(user.write),
                "read": regex(user.read),
            }
            for user in users(topology)
        ],
        "topic_permissions": [
            {
                "user": user.name,
                "vhost": vhost,
                "exchange": topic.exchange,
                "write": regex(topic.write),
                "read": regex(topic.read),
            }
            for user in users(topology)
            for topic in user.topics
        ],
        "policies": [
            {
                "name": "vqa",
                "vhost": vhost,
                "pattern": f"^({'|'.join(own_names(topology))})$",
                "apply-to": "queues",
                "definition": POLICY,
                "priority": 0,
            }
        ],
        **{kind: [{**entry, "vhost": vhost} for entry in entries] for kind, entries in parts.items()},
    }


def resources(topology: Topology, place: Place) -> Iterator[dict[str, Any]]:
    """The same as Kubernetes resources, and the users."""
    said = server_definitions(topology, place.vhost)
    yield _resource(place, "Vhost", place.vhost, {"name": place.vhost})
    for queue in said["queues"]:
        yield _resource(
            place,
            "Queue",
            queue["name"],
            {
                "name": queue["name"],
                "vhost": place.vhost,
                "type": queue["arguments"]["x-queue-type"],
                "durable": True,
                "arguments": {k: v for k, v in queue["arguments"].items() if k != "x-queue-type"},
            },
        )
    for exchange in said["exchanges"]:
        spec = {"name": exchange["name"], "vhost": place.vhost, "type": exchange["type"], "durable": True}
        yield _resource(place, "Exchange", exchange["name"], spec)
    for binding in said["bindings"]:
        yield _resource(
            place,
            "Binding",
            f"{binding['source']} {binding['destination']}",
            {
                "vhost": place.vhost,
                "source": binding["source"],
                "destination": binding["destination"],
                "destinationType": binding["destination_type"],
                "routingKey": binding["routing_key"],
            },
        )
    for policy in said["policies"]:
        yield _resource(
            place,
            "Policy",
            policy["name"],
            {
                "name": policy["name"],
                "vhost": place.vhost,
                "pattern": policy["pattern"],
                "applyTo": policy["apply-to"],
                "definition": policy["definition"],
            },
        )
    yield from _resources_of_users(topology, place)


def _resources_of_users(topology: Topology, place: Place) -> Iterator[dict[str, Any]]:
    for user in users(topology):
        secret = {"importCredentialsSecret": {"name": f"{user.name}-credentials"}}
        tags = {"tags": list(user.tags)} if user.tags else {}
        yield _resource(place, "User", user.name, {**tags, **secret})
        rights = {name: regex(getattr(user, name)) for name in ("configure", "write", "read")}
        whose = {"vhost": place.vhost, "userReference": {"name": user.name}}
        yield _resource(place, "Permission", user.name, {**whose, "permissions": rights})
        for topic in user.topics:
            on = {"exchange": topic.exchange, "write": regex(topic.write), "read": regex(topic.read)}
            name = f"{user.name} {topic.exchange}"
            yield _resource(place, "TopicPermission", name, {**whose, "permissions": on})


def _parts(topology: Topology) -> dict[str, list[dict[str, Any]]]:
    """Queues, exchanges and bindings; with a topic exchange for replies, and the publishers' own one."""
    parts = definitions(topology)
    for exchange in parts["exchanges"]:
        if exchange["name"] == topology.reply_exchange:
            # Only with a topic exchange can it be said which routing keys who may use.
            exchange["type"] = "topic"
    parts["exchanges"].append({**parts["exchanges"][0], "name": intake(topology), "type": "fanout"})
    parts["bindings"].append(
        {
            "source": intake(topology),
            "destination": topology.jobs,
            "destination_type": "queue",
            "routing_key": "",
            "arguments": {},
        }
    )
    return parts


def _user(user: User) -> dict[str, Any]:
    return {
        "name": user.name,
        "password_hash": "",
        "hashing_algorithm": "rabbit_password_hashing_sha256",
        "tags": list(user.tags),
    }


def _resource(place: Place, kind: str, name: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": API_VERSION,
        "kind": kind,
        "metadata": {"name": re.sub("[^a-z0-9]+", "-", name.lower()).strip("-") or "default"},
        "spec": {**spec, "rabbitmqClusterReference": {"name": place.cluster}},
    }


def _json(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"


class _Indented(yaml.SafeDumper):
    """Lists stand further in than what they belong to."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:  # noqa: ARG002
        super().increase_indent(flow, indentless=False)


def _yaml(objects: list[dict[str, Any]]) -> str:
    text = yaml.dump_all(
        objects, Dumper=_Indented, sort_keys=False, explicit_start=True, width=1000, allow_unicode=True
    )
    return str(text)
