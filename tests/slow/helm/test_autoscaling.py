"""Replicas by KEDA, by a HorizontalPodAutoscaler or fixed, within the provider's limit."""

import json
from typing import Any

import pytest

from tests.slow.helm.rendering import (
    CRDS,
    Object,
    ci_values,
    decoded,
    error_of,
    keda,
    merged,
    minimal,
    render,
)

SCALER = CRDS / "keda-scaler-rabbitmq.json"
PASSWORD = "keda/pass:word@1"


def _trigger(changes: dict[str, Any] | None = None) -> Object:
    (trigger,) = render(keda(changes)).one("ScaledObject")["spec"]["triggers"]
    found: Object = trigger
    return found


def test_keda_reads_ready_and_unacknowledged_messages_from_the_management_api() -> None:
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
def test_the_trigger_s_metadata_are_strings(name: str) -> None:
    (trigger,) = render(ci_values(name)).one("ScaledObject")["spec"]["triggers"]
    assert {type(value) for value in trigger["metadata"].values()} == {str}


@pytest.mark.skipif(not SCALER.is_file(), reason="the list of the scaler's fields is not available")
@pytest.mark.parametrize("name", ["keda", "full", "airgapped"])
def test_the_scaler_supports_every_key(name: str) -> None:
    """The CRD does not check this: unknown keys of the metadata are ignored."""
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


def test_the_messages_per_pod_default_to_the_concurrency() -> None:
    assert _trigger({"settings": {"maxConcurrency": 20}})["metadata"]["value"] == "20"
    assert _trigger({"autoscaling": {"value": 100}})["metadata"]["value"] == "100"


def test_large_numbers_have_no_exponent() -> None:
    changes = {"autoscaling": {"value": 2_000_000, "keda": {"activationValue": 3_000_000}}}
    metadata = _trigger(changes)["metadata"]
    assert (metadata["value"], metadata["activationValue"]) == ("2000000", "3000000")


@pytest.mark.parametrize(
    "host", ["http://rabbitmq:15672", "http://rabbitmq:15672/", "https://rabbitmq.example/a/path"]
)
def test_the_url_ends_with_a_slash_because_keda_parses_a_path_as_a_virtual_host(host: str) -> None:
    assert _trigger({"autoscaling": {"keda": {"host": host}}})["metadata"]["host"] == f"{host.rstrip('/')}/"


def test_credentials_are_in_a_secret_and_not_in_the_url() -> None:
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


def test_credentials_can_come_from_an_existing_secret() -> None:
    rendered = render(
        keda({"autoscaling": {"keda": {"username": "", "password": "", "existingSecret": "own"}}})
    )
    references = rendered.one("TriggerAuthentication")["spec"]["secretTargetRef"]
    assert {reference["name"] for reference in references} == {"own"}
    assert "demo-vqa-worker-keda" not in [secret["metadata"]["name"] for secret in rendered.all("Secret")]


def test_an_existing_secret_enables_tls() -> None:
    rendered = render(ci_values("airgapped"))
    references = rendered.one("TriggerAuthentication")["spec"]["secretTargetRef"]
    assert [(it["parameter"], it["name"], it["key"]) for it in references[2:]] == [
        ("tls", "demo-vqa-worker-keda", "tls"),
        ("ca", "internal-authority", "ca.crt"),
        ("cert", "internal-authority", "tls.crt"),
        ("key", "internal-authority", "tls.key"),
    ]
    assert decoded(rendered.one("Secret", "demo-vqa-worker-keda")) == {"tls": "enable"}


def test_the_scaled_object_has_the_configured_values() -> None:
    spec = render(ci_values("full")).one("ScaledObject")["spec"]
    values = ci_values("full")["autoscaling"]
    assert spec["minReplicaCount"] == values["minReplicas"]
    assert spec["pollingInterval"] == values["keda"]["pollingInterval"]
    assert spec["cooldownPeriod"] == values["keda"]["cooldownPeriod"]
    assert spec["fallback"] == values["keda"]["fallback"]
    behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behavior["scaleUp"] == values["behavior"]["scaleUp"]
    # Other fields keep the chart's defaults.
    assert behavior["scaleDown"] == {"selectPolicy": "Max", **values["behavior"]["scaleDown"]}


def test_the_scale_target_is_the_deployment_without_replicas() -> None:
    for values in (keda(), ci_values("hpa")):
        rendered = render(values)
        deployment = rendered.one("Deployment")
        assert "replicas" not in deployment["spec"]
        (scaler,) = rendered.all("ScaledObject") or rendered.all("HorizontalPodAutoscaler")
        assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]


def test_without_autoscaling_the_deployment_has_fixed_replicas() -> None:
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
        # At least one pod.
        (50, 64, None, 1),
        (1_000_000, 1, None, 1_000_000),
    ],
)
def test_the_maximum_of_replicas_respects_the_provider_s_limit(
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


def test_an_hpa_scales_on_the_queue_depth_metric() -> None:
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


def test_an_hpa_selects_the_jobs_queue_and_has_a_minimum_of_one() -> None:
    changes = {"autoscaling": {"mode": "hpa"}, "settings": {"jobsQueue": "other.jobs"}}
    spec = render(minimal(changes)).one("HorizontalPodAutoscaler")["spec"]
    assert spec["metrics"][0]["external"]["metric"]["selector"] == {"matchLabels": {"queue": "other.jobs"}}
    assert spec["minReplicas"] == 1


@pytest.mark.parametrize(
    ("changes", "expected"),
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
def test_invalid_values_for_keda_are_rejected(changes: dict[str, Any], expected: str) -> None:
    error = error_of(keda({"autoscaling": changes}))
    assert expected in error
    assert "secret@" not in error


def test_without_a_provider_limit_the_maximum_of_replicas_is_required() -> None:
    error = error_of(keda({"provider": {"maxConcurrentRequests": None}}))
    assert "autoscaling.maxReplicas is required if provider.maxConcurrentRequests sets no limit" in error
