"""The files of deploy/rabbitmq/ match each other and the settings."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.rabbitmq import __main__ as command
from deploy.rabbitmq.__main__ import HERE, STRICT, main, topology_with
from deploy.rabbitmq.files import Place, files
from deploy.rabbitmq.rights import Right, regex, users
from worker.rabbitmq.topology import Topology

FOLDERS = {"plain": (HERE, topology_with({})), "strict": (HERE / "strict", topology_with(STRICT))}
REFERENCE = "rabbitmqClusterReference"
# Kinds of rabbitmq.com/v1beta1 (messaging-topology-operator, config/crd/bases): the fields of `spec` that are
# used here, those that the resource must have first.
FIELDS: dict[str, tuple[set[str], set[str]]] = {
    "Vhost": ({"name", REFERENCE}, set()),
    "Queue": ({"name", REFERENCE}, {"vhost", "type", "durable", "arguments"}),
    "Exchange": ({"name", REFERENCE}, {"vhost", "type", "durable"}),
    "Binding": ({REFERENCE}, {"vhost", "source", "destination", "destinationType", "routingKey"}),
    "Policy": ({"name", "pattern", "definition", REFERENCE}, {"vhost", "applyTo"}),
    "User": ({REFERENCE}, {"tags", "importCredentialsSecret"}),
    "Permission": ({"permissions", "vhost", REFERENCE}, {"userReference"}),
    "TopicPermission": ({"permissions", "vhost", REFERENCE}, {"userReference"}),
}
Resources = list[dict[str, Any]]


@pytest.fixture(params=FOLDERS)
def variant(request: pytest.FixtureRequest) -> tuple[Path, Topology]:
    return FOLDERS[request.param]


@pytest.fixture
def server(variant: tuple[Path, Topology]) -> dict[str, Any]:
    """Return the server's definitions without the virtual host of each entry."""
    found: dict[str, Any] = json.loads((variant[0] / "definitions.json").read_text())
    for kind, entries in found.items():
        if kind != "vhosts":
            assert {entry.pop("vhost") for entry in entries} <= {"vqa"}
    return found


@pytest.fixture
def resources(variant: tuple[Path, Topology]) -> Resources:
    return list(yaml.safe_load_all((variant[0] / "topology-operator.yaml").read_text()))


def specs(resources: Resources, kind: str) -> list[dict[str, Any]]:
    return [it["spec"] for it in resources if it["kind"] == kind]


def test_the_files_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0, capsys.readouterr().err


def test_a_file_that_was_edited_is_reported_and_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "HERE", tmp_path)
    assert main(["--check"]) == 1
    assert main([]) == 0
    assert main(["--check"]) == 0
    by_hand = tmp_path / "strict" / "definitions.json"
    by_hand.write_text(by_hand.read_text().replace("amq", "xyz"))
    capsys.readouterr()
    assert main(["--check"]) == 1
    assert str(by_hand) in capsys.readouterr().err
    assert main([]) == 0
    assert "xyz" not in by_hand.read_text()


def test_the_definitions_have_the_topology_and_an_exchange_for_publishers(
    variant: tuple[Path, Topology], server: dict[str, Any]
) -> None:
    meant = variant[1].definitions()
    assert server["queues"] == meant["queues"]
    intake = "vqa.jobs.intake"
    assert [it for it in server["bindings"] if it["source"] != intake] == meant["bindings"]
    assert [it["destination"] for it in server["bindings"] if it["source"] == intake] == ["vqa.jobs"]
    kinds = {it["name"]: it["type"] for it in server["exchanges"]}
    assert kinds.pop(intake) == "fanout"
    assert kinds.pop("vqa.replies", "topic") == "topic"
    assert kinds.items() <= {it["name"]: it["type"] for it in meant["exchanges"]}.items()


def test_the_kubernetes_resources_match_the_definitions(server: dict[str, Any], resources: Resources) -> None:
    assert [it["name"] for it in specs(resources, "Vhost")] == [it["name"] for it in server["vhosts"]]
    assert [
        (it["name"], {"x-queue-type": it["type"], **it["arguments"]}) for it in specs(resources, "Queue")
    ] == [(it["name"], it["arguments"]) for it in server["queues"]]
    assert [(it["name"], it["type"]) for it in specs(resources, "Exchange")] == [
        (it["name"], it["type"]) for it in server["exchanges"]
    ]
    assert [
        (it["source"], it["destination"], it["destinationType"], it["routingKey"])
        for it in specs(resources, "Binding")
    ] == [
        (it["source"], it["destination"], it["destination_type"], it["routing_key"])
        for it in server["bindings"]
    ]
    assert [
        (it["name"], it["pattern"], it["applyTo"], it["definition"]) for it in specs(resources, "Policy")
    ] == [(it["name"], it["pattern"], it["apply-to"], it["definition"]) for it in server["policies"]]
    for kind, entries in (("Permission", "permissions"), ("TopicPermission", "topic_permissions")):
        given = [{"user": it["userReference"]["name"], **it["permissions"]} for it in specs(resources, kind)]
        assert given == server[entries]


def test_the_kubernetes_resources_have_the_same_users_and_tags(
    variant: tuple[Path, Topology], resources: Resources
) -> None:
    on_server = json.loads((variant[0] / "users.json").read_text())["users"]
    in_kubernetes = [it for it in resources if it["kind"] == "User"]
    assert [(it["metadata"]["name"], it["spec"].get("tags", [])) for it in in_kubernetes] == [
        (it["name"], it["tags"]) for it in on_server
    ]
    for it in in_kubernetes:
        name = it["metadata"]["name"]
        assert it["spec"]["importCredentialsSecret"] == {"name": f"{name}-credentials"}


def test_no_password_is_in_any_file(variant: tuple[Path, Topology], resources: Resources) -> None:
    assert {it["password_hash"] for it in json.loads((variant[0] / "users.json").read_text())["users"]} == {
        ""
    }
    assert {it["kind"] for it in resources} <= FIELDS.keys()


def test_every_resource_has_the_fields_of_its_kind(resources: Resources) -> None:
    names = [(it["kind"], it["metadata"]["name"]) for it in resources]
    assert len(names) == len(set(names))
    for it in resources:
        must, may = FIELDS[it["kind"]]
        assert it.keys() == {"apiVersion", "kind", "metadata", "spec"}
        assert it["apiVersion"] == "rabbitmq.com/v1beta1"
        assert re.fullmatch("[a-z0-9]([-a-z0-9]{0,251}[a-z0-9])?", it["metadata"]["name"]), it
        assert must <= it["spec"].keys() <= must | may, it
        assert it["spec"][REFERENCE] == {"name": "rabbitmq"}
    permissions = [it["permissions"].keys() for it in specs(resources, "Permission")]
    assert all(it == {"configure", "write", "read"} for it in permissions)
    topics = [it["permissions"].keys() for it in specs(resources, "TopicPermission")]
    assert all(it == {"exchange", "write", "read"} for it in topics)


# Custom names


OWN = {
    "VQA_JOBS_QUEUE": "team.a+b",
    "VQA_RESULTS_QUEUE": "answers",
    "VQA_DEAD_LETTER_QUEUE": "dead (old)",
    "VQA_RETRY_DELAYS": "3",
}


def test_files_for_other_names_use_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in OWN.items():
        monkeypatch.setenv(name, value)
    assert main(["--into", str(tmp_path / "new"), "--vhost", "a", "--cluster", "mq"]) == 0
    server = json.loads((tmp_path / "new" / "definitions.json").read_text())
    assert [it["name"] for it in server["queues"]] == [
        "dead (old)",
        "answers",
        "team.a+b",
        "team.a+b.retry.3s",
    ]
    assert {it["vhost"] for it in (*server["queues"], *server["permissions"], *server["bindings"])} == {"a"}
    text = (tmp_path / "new" / "topology-operator.yaml").read_text()
    assert {it["spec"][REFERENCE]["name"] for it in yaml.safe_load_all(text)} == {"mq"}


def test_an_invalid_name_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VQA_JOBS_QUEUE", "amq.mine")
    assert main(["--into", str(tmp_path / "new")]) == 78
    assert capsys.readouterr().err.startswith("VQA_JOBS_QUEUE: ")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("exchanges", [{}, STRICT], ids=["plain", "strict"])
def test_permissions_match_the_exact_names_only(exchanges: dict[str, str]) -> None:
    topology = topology_with({**OWN, **exchanges})
    server = json.loads(files(topology, Place("a", "mq"))["definitions.json"])
    operator = server["permissions"][-1]
    own = {it["name"] for it in (*server["queues"], *server["exchanges"])}
    for right in ("configure", "write", "read"):
        assert all(re.search(operator[right], name) for name in own)
        others = ("team.aab", "teamXa+b", "graves", "answersX", "amq.topic", "xanswers", "vqa.jobs")
        assert not any(re.search(operator[right], name) for name in others)
    worker = server["permissions"][0]
    assert re.search(worker["read"], "team.a+b")
    assert not any(re.search(worker["read"], name) for name in ("answers", "dead (old)", "team.a+b.retry.3s"))
    assert bool(re.search(worker["write"], "amq.default")) == (not exchanges)


def test_without_permissions_the_expression_matches_no_name() -> None:
    assert regex([]) == "^$"
    assert regex([Right("a", ""), Right("a", "")]) == "^a$"
    assert regex([Right("a", ""), Right("b", "")]) == "^(a|b)$"


def test_every_permission_has_a_reason() -> None:
    for _, topology in FOLDERS.values():
        for user in users(topology):
            topics = [right for topic in user.topics for right in (*topic.write, *topic.read)]
            assert user.purpose
            assert all(it.why for it in (*user.configure, *user.write, *user.read, *topics))
