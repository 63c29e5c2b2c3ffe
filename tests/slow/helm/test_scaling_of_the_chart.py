"""How many pods: by KEDA, by a HorizontalPodAutoscaler, or fixed; never more than the API has room for."""

import json
from typing import Any

import pytest

from tests.slow.helm.rendering import CRDS, Object, ci_values, decoded, keda, merged, minimal, refusal, render

SCALER = CRDS / "keda-scaler-rabbitmq.json"
PASSWORD = "keda/pass:word@1"


def _trigger(changes: dict[str, Any] | None = None) -> Object:
    (trigger,) = render(keda(changes)).one("ScaledObject")["spec"]["triggers"]
    found: Object = trigger
    return found


def test_keda_counts_waiting_and_running_jobs_by_the_management_api() -> None:
    trigger = _trigger()
    assert trigger["type"] == "rabbitmq"
    assert trigger["metadata"] == {
        "protocol": "http",
        "host": "http://rabbitmq.rabbitmq:15672/",
        "vhostName": "/",
        "queueName": "vqa.jobs",
        "mode": "QueueLength",
        "value": "64",
        "activationValue": "0",
        "excludeUnacknowledged": "false",
    }


@pytest.mark.parametrize("name", ["keda", "full", "airgapped"])
def test_keda_takes_strings_only(name: str) -> None:
    (trigger,) = render(ci_values(name)).one("ScaledObject")["spec"]["triggers"]
    assert {type(value) for value in trigger["metadata"].values()} == {str}


@pytest.mark.skipif(
    not SCALER.is_file(), reason="the table of the scaler's own fields is not next to this copy"
)
@pytest.mark.parametrize("name", ["keda", "full", "airgapped"])
def test_the_scaler_knows_every_key_that_it_is_given(name: str) -> None:
    """No schema does: the trigger's metadata is a free map, and a misspelt key is silently nothing."""
    fields = json.loads(SCALER.read_text())["parameters"]
    rendered = render(ci_values(name))
    (trigger,) = rendered.one("ScaledObject")["spec"]["triggers"]
    in_metadata = {field["name"] for field in fields if field.get("metadataVariableReadable")}
    assert trigger["metadata"].keys() <= in_metadata
    by_authentication = {
        field["name"] for field in fields if field.get("triggerAuthenticationVariableReadable")
    }
    references = rendered.one("TriggerAuthentication")["spec"]["secretTargetRef"]
    parameters = {reference["parameter"] for reference in references}
    assert parameters <= by_authentication
    required = {field["name"] for field in fields if not field.get("optional") and "default" not in field}
    assert required <= {*trigger["metadata"], *parameters}


def test_a_pod_is_for_as_many_messages_as_it_works_on_at_once_unless_said_otherwise() -> None:
    assert _trigger({"settings": {"maxConcurrency": 20}})["metadata"]["value"] == "20"
    assert _trigger({"autoscaling": {"value": 100}})["metadata"]["value"] == "100"


def test_large_numbers_are_written_in_full() -> None:
    changes = {"autoscaling": {"value": 2_000_000, "keda": {"activationValue": 3_000_000}}}
    metadata = _trigger(changes)["metadata"]
    assert (metadata["value"], metadata["activationValue"]) == ("2000000", "3000000")


@pytest.mark.parametrize(
    "host", ["http://rabbitmq:15672", "http://rabbitmq:15672/", "https://rabbitmq.example/a/path"]
)
def test_the_url_ends_with_a_slash_since_keda_takes_what_follows_for_a_virtual_host(host: str) -> None:
    assert _trigger({"autoscaling": {"keda": {"host": host}}})["metadata"]["host"] == f"{host.rstrip('/')}/"


def test_credentials_are_given_apart_from_the_url_and_as_they_are() -> None:
    rendered = render(keda())
    assert PASSWORD not in json.dumps(rendered.one("ScaledObject"))
    references = rendered.one("TriggerAuthentication")["spec"]["secretTargetRef"]
    secret = decoded(rendered.one("Secret", "demo-vqa-worker-keda"))
    assert secret == {"username": "keda", "password": PASSWORD}
    assert references == [
        {"parameter": key, "name": "demo-vqa-worker-keda", "key": key} for key in ("username", "password")
    ]
    trigger = rendered.one("ScaledObject")["spec"]["triggers"][0]
    assert trigger["authenticationRef"]["name"] == rendered.one("TriggerAuthentication")["metadata"]["name"]


def test_credentials_can_come_from_a_secret_that_exists() -> None:
    rendered = render(
        keda({"autoscaling": {"keda": {"username": "", "password": "", "existingSecret": "own"}}})
    )
    references = rendered.one("TriggerAuthentication")["spec"]["secretTargetRef"]
    assert {reference["name"] for reference in references} == {"own"}
    assert "demo-vqa-worker-keda" not in [secret["metadata"]["name"] for secret in rendered.all("Secret")]


def test_tls_of_ones_own_is_switched_on_by_a_secret() -> None:
    rendered = render(ci_values("airgapped"))
    references = rendered.one("TriggerAuthentication")["spec"]["secretTargetRef"]
    assert [(it["parameter"], it["name"], it["key"]) for it in references[2:]] == [
        ("tls", "demo-vqa-worker-keda", "tls"),
        ("ca", "internal-authority", "ca.crt"),
        ("cert", "internal-authority", "tls.crt"),
        ("key", "internal-authority", "tls.key"),
    ]
    assert decoded(rendered.one("Secret", "demo-vqa-worker-keda")) == {"tls": "enable"}


def test_the_numbers_of_the_loop_are_the_values() -> None:
    spec = render(ci_values("full")).one("ScaledObject")["spec"]
    values = ci_values("full")["autoscaling"]
    assert spec["minReplicaCount"] == values["minReplicas"]
    assert spec["pollingInterval"] == values["keda"]["pollingInterval"]
    assert spec["cooldownPeriod"] == values["keda"]["cooldownPeriod"]
    assert spec["fallback"] == values["keda"]["fallback"]
    behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behavior["scaleUp"] == values["behavior"]["scaleUp"]
    # What is not said is the chart's.
    assert behavior["scaleDown"] == {"selectPolicy": "Max", **values["behavior"]["scaleDown"]}


def test_the_scale_target_is_the_deployment_which_leaves_the_number_of_pods_alone() -> None:
    for values in (keda(), ci_values("hpa")):
        rendered = render(values)
        deployment = rendered.one("Deployment")
        assert "replicas" not in deployment["spec"]
        (scaler,) = rendered.all("ScaledObject") or rendered.all("HorizontalPodAutoscaler")
        assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]


def test_without_autoscaling_the_deployment_says_how_many() -> None:
    rendered = render(minimal({"replicas": 4}))
    assert rendered.one("Deployment")["spec"]["replicas"] == 4
    assert rendered.all("ScaledObject") == rendered.all("HorizontalPodAutoscaler") == []


@pytest.mark.parametrize(
    ("limit", "concurrency", "asked", "most"),
    [
        (200, 64, None, 3),
        (200, 64, 2, 2),
        (200, 64, 3, 3),
        (200, 64, 10, 3),
        (192, 64, None, 3),
        (191, 64, None, 2),
        (1000, 20, 30, 30),
        (1000, 20, None, 50),
        (None, 64, 10, 10),
        # The pod that one needs at least holds itself back.
        (50, 64, None, 1),
        (1_000_000, 1, None, 1_000_000),
    ],
)
def test_there_are_no_more_pods_than_the_api_has_requests_for(
    limit: int | None, concurrency: int, asked: int | None, most: int
) -> None:
    changes = {
        "provider": {"maxConcurrentRequests": limit},
        "settings": {"maxConcurrency": concurrency},
        "autoscaling": {"maxReplicas": asked},
    }
    assert render(keda(changes)).one("ScaledObject")["spec"]["maxReplicaCount"] == most
    hpa = merged(keda(changes), {"autoscaling": {"mode": "hpa"}})
    assert render(hpa).one("HorizontalPodAutoscaler")["spec"]["maxReplicas"] == most


def test_an_hpa_scales_by_the_same_figure_from_a_metric() -> None:
    spec = render(ci_values("hpa")).one("HorizontalPodAutoscaler")["spec"]
    (metric,) = spec["metrics"]
    assert metric["external"] == {
        "metric": {
            "name": "rabbitmq_detailed_queue_messages",
            "selector": {"matchLabels": {"queue": "vqa.jobs", "vhost": "vision"}},
        },
        "target": {"type": "AverageValue", "averageValue": "20"},
    }
    assert (spec["minReplicas"], spec["maxReplicas"]) == (2, 20)
    assert spec["behavior"].keys() == {"scaleUp", "scaleDown"}


def test_an_hpa_asks_for_the_jobs_queue_and_never_goes_to_zero() -> None:
    changes = {"autoscaling": {"mode": "hpa"}, "settings": {"jobsQueue": "other.jobs"}}
    spec = render(minimal(changes)).one("HorizontalPodAutoscaler")["spec"]
    assert spec["metrics"][0]["external"]["metric"]["selector"] == {"matchLabels": {"queue": "other.jobs"}}
    assert spec["minReplicas"] == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"minReplicas": 4}, "autoscaling.minReplicas (4) is more than the maximum number of replicas (3)"),
        ({"keda": {"host": ""}}, "autoscaling.keda.host is empty: KEDA requires the URL"),
        ({"keda": {"password": ""}}, "autoscaling.keda.username and autoscaling.keda.password are required"),
        (
            {"keda": {"existingSecret": "own"}},
            "autoscaling.keda.existingSecret and autoscaling.keda.username",
        ),
        ({"keda": {"host": "http://keda:secret@rabbitmq:15672/"}}, "keda.host must not contain user"),
        ({"keda": {"tls": {"existingSecret": "own"}}}, "autoscaling.keda.host must begin with https://"),
        ({"keda": {"tls": {"certKey": "tls.crt"}}}, "autoscaling.keda.tls.keyKey belong together"),
    ],
)
def test_what_keda_cannot_work_with_is_refused_in_a_sentence(changes: dict[str, Any], said: str) -> None:
    refused = refusal(keda({"autoscaling": changes}))
    assert said in refused
    assert "secret@" not in refused


def test_without_a_limit_of_the_provider_the_most_pods_must_be_said() -> None:
    refused = refusal(keda({"provider": {"maxConcurrentRequests": None}}))
    assert "autoscaling.maxReplicas is required if provider.maxConcurrentRequests sets no limit" in refused
