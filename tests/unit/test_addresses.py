"""Lists of broker URLs."""

import pytest

from vqa_worker.rabbitmq.addresses import (
    check_same_cluster,
    host_and_port,
    split_urls,
    virtual_host,
)


@pytest.mark.parametrize(
    ("text", "urls"),
    [
        ("amqp://a/", ["amqp://a/"]),
        ("amqp://a/,amqp://b/", ["amqp://a/", "amqp://b/"]),
        (" amqp://a/ ,\n amqps://b/ ", ["amqp://a/", "amqps://b/"]),
        ("amqp://u:p,w@a/,amqp://u:p,w@b/v,w", ["amqp://u:p,w@a/", "amqp://u:p,w@b/v,w"]),
        ("amqp://a/,b/", ["amqp://a/,b/"]),
        ("amqp://a,http://b", ["amqp://a,http://b"]),
        ("amqp://a/,amqp://b/,amqp://a/", ["amqp://a/", "amqp://b/"]),
        ("amqp://a/?heartbeat=3,AMQP://b/", ["amqp://a/?heartbeat=3", "AMQP://b/"]),
        ("rabbit", ["rabbit"]),
        ("", [""]),
    ],
)
def test_a_list_is_split_only_before_another_url(text: str, urls: list[str]) -> None:
    assert split_urls(text) == urls


def test_the_nodes_of_a_cluster_have_the_same_scheme_and_virtual_host() -> None:
    check_same_cluster(["amqp://u:p@a", "amqp://v:q@b:5673/", "amqp://c/%2F?heartbeat=3"])
    check_same_cluster(["amqps://a/my%2Fhost", "amqps://b/my%2fhost"])
    with pytest.raises(ValueError, match="the same scheme"):
        check_same_cluster(["amqp://a/", "amqps://b/"])
    with pytest.raises(ValueError, match="different virtual hosts"):
        check_same_cluster(["amqp://a/", "amqp://b/vqa"])


def test_the_parts_of_a_url_for_messages() -> None:
    url = "amqps://user:pass@[::1]/my%2Fhost?heartbeat=3"
    assert host_and_port(url) == "[::1]:5671"
    assert virtual_host(url) == "my/host"
    assert host_and_port("amqp://u:p@a:5673") == "a:5673"
