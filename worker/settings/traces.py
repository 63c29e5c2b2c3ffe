"""Decide from OpenTelemetry's standard variables whether traces are enabled."""

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Final
from urllib.parse import unquote

from worker.settings.faults import shown

# The first one that is set applies.
ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
HEADERS: Final = ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "OTEL_EXPORTER_OTLP_HEADERS")
EXPORTER: Final = "OTEL_TRACES_EXPORTER"
DISABLED: Final = "OTEL_SDK_DISABLED"

_PROTOCOL: Final = "http/protobuf"
_NEEDED: Final = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")


def wants_traces(environment: Mapping[str, str]) -> bool:
    """Return whether traces are enabled; `trace_faults` validates the configuration."""
    exporter = _said(environment, EXPORTER).lower()
    if _said(environment, DISABLED).lower() == "true" or exporter == "none":
        return False
    return bool(exporter or _first(environment, ENDPOINTS)[1])


def trace_faults(environment: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for each reason why spans cannot be sent."""
    if not wants_traces(environment):
        return
    exporter = _said(environment, EXPORTER)
    if exporter.lower() not in {"", "otlp"}:
        yield f"{EXPORTER}: must be 'otlp' or 'none', not {shown(exporter)}"
    name, protocol = _first(environment, PROTOCOLS)
    if protocol not in {"", _PROTOCOL}:
        yield (
            f"{name}: must be {_PROTOCOL!r} (port 4318 of a collector), not {shown(protocol)};"
            f" or disable traces: {EXPORTER}=none"
        )
    name, endpoint = _first(environment, ENDPOINTS)
    if endpoint and not endpoint.lower().startswith(("http://", "https://")):
        yield f"{name}: must begin with http:// or https://"
    if not all(map(_is_installed, _NEEDED)):
        wanted = name if endpoint else EXPORTER
        yield (
            f"{wanted}: enables traces, but OpenTelemetry is not installed:"
            f" install vqa-worker with its extra `tracing`; or disable traces: {EXPORTER}=none"
        )


def trace_secrets(environment: Mapping[str, str]) -> Iterator[str]:
    """Yield the values of OTLP headers, which are usually keys; the SDK logs malformed ones."""
    for name in HEADERS:
        for header in _said(environment, name).split(","):
            field, equals, given = header.partition("=")
            value = (given if equals else field).strip()
            yield from filter(None, dict.fromkeys((value, unquote(value))))


def _said(environment: Mapping[str, str], name: str) -> str:
    return environment.get(name, "").strip()


def _first(environment: Mapping[str, str], names: tuple[str, ...]) -> tuple[str, str]:
    """Return the first variable that is set and its value, or the last one."""
    said = [(name, _said(environment, name)) for name in names]
    return next((pair for pair in said if pair[1]), said[-1])


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
