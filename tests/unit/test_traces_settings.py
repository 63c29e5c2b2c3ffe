"""OpenTelemetry's variables enable traces; errors in them are reported."""

import sys

import pytest

from worker.settings import SettingsError, load_settings, trace_secrets, wants_traces
from worker.settings.traces import trace_faults

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
OF_TRACES = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
URL = "http://collector:4318"


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, False),
        ({ENDPOINT: URL}, True),
        ({OF_TRACES: f"{URL}/v1/traces"}, True),
        ({ENDPOINT: " "}, False),
        ({ENDPOINT: URL, "OTEL_SDK_DISABLED": "TRUE"}, False),
        ({ENDPOINT: URL, "OTEL_SDK_DISABLED": "false"}, True),
        ({ENDPOINT: URL, "OTEL_TRACES_EXPORTER": "none"}, False),
        ({ENDPOINT: URL, "OTEL_TRACES_EXPORTER": "None "}, False),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": URL}, False),
        ({"OTEL_SERVICE_NAME": "pictures"}, False),
    ],
)
def test_an_endpoint_or_an_exporter_enables_traces_unless_they_are_disabled(
    environment: dict[str, str], wanted: bool
) -> None:
    assert wants_traces(environment) is wanted
    assert list(trace_faults(environment)) == []


@pytest.mark.parametrize(
    ("environment", "variable", "said"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER", "'zipkin'"),
        ({"OTEL_TRACES_EXPORTER": "otlp,console"}, "OTEL_TRACES_EXPORTER", "'otlp,console'"),
        ({ENDPOINT: URL, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL", "4318"),
        (
            {
                ENDPOINT: URL,
                "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
                "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/json",
            },
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
            "'http/json'",
        ),
        ({ENDPOINT: "collector:4318"}, ENDPOINT, "http://"),
        ({ENDPOINT: URL, OF_TRACES: "collector"}, OF_TRACES, "http://"),
    ],
)
def test_an_unsupported_value_is_reported_with_the_variable_s_name(
    environment: dict[str, str], variable: str, said: str
) -> None:
    (fault,) = trace_faults(environment)
    assert fault.startswith(f"{variable}: ")
    assert said in fault


@pytest.mark.parametrize("missing", ["opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"])
def test_a_missing_library_is_reported_with_the_install_command(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert list(trace_faults({})) == []
    for environment in ({ENDPOINT: URL}, {"OTEL_TRACES_EXPORTER": "otlp"}):
        (fault,) = trace_faults(environment)
        assert fault.startswith(f"{next(iter(environment))}: ")
        assert "install vqa-worker with its extra `tracing`" in fault
        assert "OTEL_TRACES_EXPORTER=none" in fault


def test_it_is_reported_together_with_invalid_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VQA_MODEL_API_KEY", "any")
    monkeypatch.setenv("VQA_ALLOWED_BUCKETS", "*")
    monkeypatch.setenv(ENDPOINT, "collector:4318")
    with pytest.raises(SettingsError) as alone:
        load_settings(env_file=None)
    monkeypatch.setenv("VQA_MAX_ATTEMPTS", "many")
    with pytest.raises(SettingsError) as together:
        load_settings(env_file=None)
    assert [fault.split(":")[0] for fault in alone.value.faults] == [ENDPOINT]
    assert [fault.split(":")[0] for fault in together.value.faults] == ["VQA_MAX_ATTEMPTS", ENDPOINT]


def test_the_values_of_the_exporter_s_headers_are_secrets() -> None:
    environment = {
        "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20abc, x-team = team-key,empty=,none",
        "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "key=a=b",
    }
    assert set(trace_secrets(environment)) == {"Bearer%20abc", "Bearer abc", "team-key", "none", "a=b"}
    assert list(trace_secrets({})) == []
