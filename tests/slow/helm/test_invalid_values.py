"""Invalid values are rejected before the installation, with the key and the reason."""

from typing import Any

import pytest

from tests.slow.helm.rendering import ci_values, error_of, keda, merged, minimal, render


def _nested(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    assert isinstance(value, dict)
    return value


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("replicaCount", 3, "at '': additional properties 'replicaCount' not allowed"),
        ("autoscaling.values", 3, "at '/autoscaling': additional properties 'values' not allowed"),
        ("autoscaling.keda.queueName", "x", "at '/autoscaling/keda': additional properties 'queueName'"),
        ("settings.maxConcurency", 3, "at '/settings': additional properties 'maxConcurency' not allowed"),
        ("secrets.rabbitmqURL", "x", "at '/secrets': additional properties 'rabbitmqURL' not allowed"),
        ("autoscaling.behavior.scaleDown.policy", [], "additional properties 'policy' not allowed"),
    ],
)
def test_an_unknown_key_is_reported(path: str, value: Any, expected: str) -> None:
    assert expected in error_of(keda(_nested(path, value)))


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("autoscaling.value", "64", "at '/autoscaling/value': got string, want null or integer"),
        ("autoscaling.value", 6.5, "at '/autoscaling/value': got number, want null or integer"),
        ("autoscaling.value", 0, "at '/autoscaling/value': minimum: got 0, want 1"),
        (
            "autoscaling.keda.activationValue",
            "0",
            "at '/autoscaling/keda/activationValue': got string, want integer",
        ),
        ("autoscaling.mode", "KEDA", "at '/autoscaling/mode': value must be one of 'none', 'keda', 'hpa'"),
        ("autoscaling.keda.cooldownPeriod", "5m", "got string, want integer"),
        (
            "autoscaling.keda.host",
            "amqp://rabbitmq",
            "at '/autoscaling/keda/host': 'amqp://rabbitmq' does not match",
        ),
        ("settings.allowedBuckets", "photos", "at '/settings/allowedBuckets': got string, want array"),
        ("settings.allowedBuckets", ["a,b"], "at '/settings/allowedBuckets/0': 'a,b' does not match pattern"),
        ("settings.retryDelays", ["5s"], "at '/settings/retryDelays/0': got string, want integer"),
        ("settings.httpPort", 80, "at '/settings/httpPort': minimum: got 80, want 1,024"),
        ("settings.modelTimeout", None, "at '/settings': missing property 'modelTimeout'"),
        ("settings.jobTimeout", 1740, "at '/settings/jobTimeout': exclusiveMaximum: got 1,740, want 1,740"),
        ("settings.prices", {"model": 3}, "at '/settings/prices/model'"),
        ("image.digest", "sha256:abc", "at '/image/digest': 'sha256:abc' does not match pattern"),
        ("podLabels", {"tier": 1}, "at '/podLabels/tier': got number, want string"),
        ("podDisruptionBudget.maxUnavailable", "half", "'half' does not match pattern"),
        ("extraEnv", [{"value": "x"}], "at '/extraEnv/0': missing property 'name'"),
        ("fullnameOverride", "Questions", "at '/fullnameOverride': 'Questions' does not match pattern"),
    ],
)
def test_an_invalid_value_is_reported(path: str, value: Any, expected: str) -> None:
    assert expected in error_of(keda(_nested(path, value)))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"settings": {"allowedBuckets": []}}, "settings.allowedBuckets is empty: list the buckets"),
        ({"secrets": {"rabbitmqUrl": ""}}, "secrets.rabbitmqUrl is empty: set amqp:"),
        ({"secrets": {"modelApiKey": ""}}, "secrets.modelApiKey is empty: set the API key"),
        (
            {"secrets": {"rabbitmqUrl": "rabbitmq:5672"}},
            "secrets.rabbitmqUrl must begin with amqp:// or amqps://",
        ),
        (
            {"topology": {"hook": {"rabbitmqUrl": "http://rabbitmq"}}},
            "topology.hook.rabbitmqUrl must begin with amqp:// or amqps://",
        ),
        (
            {"secrets": {"existingSecret": "own"}},
            "secrets.existingSecret and other values of secrets are mutually exclusive",
        ),
        (
            {"secrets": {"asFiles": True}, "settings": {"secretsDir": "/mnt/secrets"}},
            "secrets.asFiles and settings.secretsDir are mutually exclusive",
        ),
        ({"rabbitmqTls": {"existingSecret": "tls"}}, "rabbitmqTls.existingSecret has no effect without TLS"),
        (
            {
                "rabbitmqTls": {"existingSecret": "tls"},
                "secrets": {"rabbitmqUrl": "amqps://rabbitmq/"},
                "topology": {"hook": {"rabbitmqUrl": "amqp://rabbitmq/"}},
            },
            "rabbitmqTls.existingSecret has no effect without TLS: topology.hook.rabbitmqUrl must begin",
        ),
        (
            {"rabbitmqTls": {"certKey": "tls.crt"}},
            "rabbitmqTls.certKey and rabbitmqTls.keyKey belong",
        ),
        (
            {"topology": {"hook": {"existingSecret": "a", "rabbitmqUrl": "amqp://b/"}}},
            "topology.hook.rabbitmqUrl and topology.hook.existingSecret are mutually exclusive",
        ),
        ({"settings": {"modelTimeout": 150}}, "must be more than settings.modelTimeout (150 s)"),
    ],
)
def test_contradicting_values_are_rejected(changes: dict[str, Any], expected: str) -> None:
    error = error_of(minimal(changes))
    assert "Invalid combination of values:\n- " in error
    assert expected in error


def test_secrets_as_files_need_a_secret() -> None:
    values = minimal({"secrets": {"rabbitmqUrl": "", "modelApiKey": "", "asFiles": True}})
    values = merged(
        values, {"extraEnvFrom": [{"secretRef": {"name": "own"}}], "topology": {"hook": {"enabled": False}}}
    )
    assert "secrets.asFiles is set, but there is no Secret to mount" in error_of(values)


def test_all_problems_are_reported_at_once() -> None:
    error = error_of({})
    for fault in ("settings.allowedBuckets", "secrets.rabbitmqUrl", "secrets.modelApiKey"):
        assert f"\n- {fault} is empty" in error


def test_an_error_message_contains_no_secret() -> None:
    wrong = {"secrets": {"rabbitmqUrl": "worker:top-secret@rabbitmq", "modelApiKey": 5}}
    for changes in (wrong, {"secrets": {"rabbitmqUrl": "worker:top-secret@rabbitmq"}}):
        assert "top-secret" not in error_of(minimal(changes))


def test_a_parent_chart_may_have_global_values() -> None:
    assert render(minimal({"global": {"anything": 1}})).texts == render(ci_values("minimal")).texts
