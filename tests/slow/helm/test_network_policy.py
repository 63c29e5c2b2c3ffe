"""The NetworkPolicy allows only the required connections."""

from typing import Any

import pytest

from tests.slow.helm.rendering import Object, ci_values, minimal, render


def _policy(changes: dict[str, Any]) -> Object:
    values = minimal({"networkPolicy": {"enabled": True}, "topology": {"hook": {"enabled": False}}})
    return _spec({**values, **{key: {**values.get(key, {}), **change} for key, change in changes.items()}})


def _spec(values: dict[str, Any], name: str = "demo-vqa-worker") -> Object:
    spec: Object = render(values).one("NetworkPolicy", name)["spec"]
    return spec


def _ports(rules: list[Object]) -> list[list[int]]:
    return [[port["port"] for port in rule["ports"]] for rule in rules]


def test_the_policy_is_disabled_by_default() -> None:
    assert render(minimal()).all("NetworkPolicy") == []


def test_egress_has_the_ports_of_all_nodes_of_a_cluster() -> None:
    urls = "amqp://u:p,w@a,amqp://u:p,w@b:5673/v , amqp://u:p@c/v"
    assert _ports(_policy({"secrets": {"rabbitmqUrl": urls}})["egress"])[1] == [5672, 5673]


def test_egress_is_dns_broker_s3_and_model_api_and_ingress_is_metrics() -> None:
    spec = _policy({})
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert _ports(spec["egress"]) == [[53, 53], [5672], [443], [443]]
    assert spec["egress"][0]["ports"] == [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]
    assert spec["ingress"] == [{"ports": [{"protocol": "TCP", "port": "http"}]}]


@pytest.mark.parametrize(
    ("url", "port"),
    [
        ("amqp://user:1234@rabbitmq/", 5672),
        ("amqps://user:pass@rabbitmq/vhost", 5671),
        ("amqps://user:pass@rabbitmq:30671/vhost?heartbeat=10", 30671),
        ("amqp://user:p%3A4@[fd00::1]:5673", 5673),
        ("amqp://[fd00::1234]/", 5672),
    ],
)
def test_the_broker_s_port_is_taken_from_its_url(url: str, port: int) -> None:
    assert _ports(_policy({"secrets": {"rabbitmqUrl": url}})["egress"])[1] == [port]


def test_both_default_ports_are_allowed_if_the_url_is_in_an_existing_secret() -> None:
    secrets = {"rabbitmqUrl": "", "modelApiKey": "", "existingSecret": "own"}
    assert _ports(_policy({"secrets": secrets})["egress"])[1] == [5671, 5672]


def test_the_ports_of_s3_and_the_model_api_are_taken_from_their_urls() -> None:
    urls = {"s3EndpointUrl": "http://minio:9000", "modelBaseUrl": "http://vllm/v1"}
    assert _ports(_policy({"settings": {**minimal()["settings"], **urls}})["egress"])[2:] == [[9000], [80]]


def test_ports_can_be_set() -> None:
    spec = _spec(ci_values("full"), "questions")
    assert _ports(spec["egress"]) == [[53, 53], [5671], [9000], [443, 8443], [80]]


def test_each_rule_can_be_restricted_to_peers() -> None:
    values = ci_values("airgapped")["networkPolicy"]
    spec = _spec(ci_values("airgapped"))
    given = [values[key] for key in ("dnsTo", "rabbitmqTo", "s3To", "modelTo")]
    assert [rule["to"] for rule in spec["egress"]] == given
    assert spec["ingress"][0]["from"] == values["metricsFrom"]
