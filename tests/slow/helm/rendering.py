"""Render the chart with Helm, and validate the objects by their schemas."""

import base64
import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from typing import Any, Final

import jsonschema
import pytest
import yaml
from referencing import Registry, Resource

from tests.running import ROOT

helm = pytest.importorskip(
    "helm_python",
    reason="helm-python-sdk is not available for this machine",
    exc_type=ImportError,
)

CHART: Final = ROOT / "helm" / "vqa-worker"
CI_FILES: Final = sorted((CHART / "ci").glob("*-values.yaml"))
CRDS: Final = ROOT.parent / "shared" / "crds"
# The oldest version that Chart.yaml allows, and the newest with schemas.
KUBERNETES_VERSIONS: Final = ("1.29", "1.37")
CUSTOM_KINDS: Final = {
    "ScaledObject": "keda.sh_scaledobjects.yaml",
    "TriggerAuthentication": "keda.sh_triggerauthentications.yaml",
    "PodMonitor": "monitoring.coreos.com_podmonitors.yaml",
    "PrometheusRule": "monitoring.coreos.com_prometheusrules.yaml",
}

Values = dict[str, Any]
Object = dict[str, Any]


@dataclass(frozen=True)
class Rendered:
    """The chart rendered with certain values."""

    texts: Mapping[str, str]
    """By template name: `deployment.yaml`, `NOTES.txt`, …"""

    @property
    def notes(self) -> str:
        return self.texts["NOTES.txt"]

    @cached_property
    def objects(self) -> list[Object]:
        """All objects, including hooks."""
        return [
            found for name, text in self.texts.items() if name != "NOTES.txt" for found in objects_in(text)
        ]

    def all(self, kind: str) -> list[Object]:
        return [found for found in self.objects if found["kind"] == kind]

    def one(self, kind: str, name: str | None = None) -> Object:
        """Return the only object of a kind, or the one with this name."""
        (found,) = (it for it in self.all(kind) if name in (None, it["metadata"]["name"]))
        return found

    @property
    def pod(self) -> Object:
        """The pod template of the workers."""
        pod: Object = self.one("Deployment")["spec"]["template"]
        return pod

    @property
    def container(self) -> Object:
        (container,) = self.pod["spec"]["containers"]
        found: Object = container
        return found

    @property
    def settings(self) -> dict[str, str]:
        """The variables of the pod's ConfigMap."""
        name = self.container["envFrom"][0]["configMapRef"]["name"]
        data: dict[str, str] = self.one("ConfigMap", name)["data"]
        return data

    @property
    def secrets(self) -> dict[str, str]:
        """The variables of the Secret created by the chart; empty with an existing Secret."""
        name = self.one("Deployment")["metadata"]["name"]
        found = [it for it in self.all("Secret") if it["metadata"]["name"] == name]
        return decoded(found[0]) if found else {}


def objects_in(text: str) -> Iterator[Object]:
    for document in yaml.load_all(text, Loader=_NoDuplicates):
        if document:
            yield document


class _NoDuplicates(yaml.CSafeLoader):
    """A YAML loader that rejects duplicate keys, as Kubernetes does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        assert not twice, f"duplicate keys: {twice} {node.start_mark}"
        return super().construct_mapping(node, deep)


def decoded(secret: Object) -> dict[str, str]:
    return {name: base64.b64decode(data).decode() for name, data in secret["data"].items()}


@cache
def chart() -> Any:
    return helm.Chart.load(CHART)


def render(values: Values, *, name: str = "demo", namespace: str = "vision") -> Rendered:
    """Render the chart.

    Raises:
        HelmValuesError: The values do not match the schema.
        HelmRenderError: The combination of values is invalid.
    """
    texts = chart().render(values, name=name, namespace=namespace)
    return Rendered(
        {path.removeprefix("vqa-worker/templates/"): text for path, text in sorted(texts.items())}
    )


def error_of(values: Values) -> str:
    """Return Helm's error message for invalid values."""
    with pytest.raises(helm.HelmError) as error:
        render(values)
    return str(error.value)


def ci_values(name: str) -> Values:
    """Return the values of a `ci/` file: minimal, full, …"""
    return copy.deepcopy(_ci_values(name))


@cache
def _ci_values(name: str) -> Values:
    values: Values = yaml.safe_load((CHART / "ci" / f"{name}-values.yaml").read_text())
    return values


def minimal(changes: Values | None = None) -> Values:
    """Return the values of `ci/minimal-values.yaml` with changes."""
    return merged(ci_values("minimal"), changes or {})


def keda(changes: Values | None = None) -> Values:
    """Return the values of `ci/keda-values.yaml` with changes."""
    return merged(ci_values("keda"), changes or {})


def merged(values: Values, changes: Values) -> Values:
    """Merge values as `helm install --values one --values other` does."""
    result = copy.deepcopy(values)
    for key, change in changes.items():
        old = result.get(key)
        result[key] = merged(old, change) if isinstance(old, dict) and isinstance(change, dict) else change
    return result


def faults(found: Object) -> list[str]:
    """Return the differences between an object and the strict schemas of its kind."""
    where = f"{found['kind']} {found['metadata']['name']}"
    if found["kind"] in CUSTOM_KINDS:
        validators: Iterable[tuple[str, Any]] = (
            [("", _custom_validator(found["kind"]))] if CRDS.is_dir() else []
        )
    else:
        validators = [
            (version, _native_validator(version, found["kind"], found["apiVersion"]))
            for version in KUBERNETES_VERSIONS
        ]
    return [
        f"{where} {version} {error.json_path}: {error.message}"
        for version, validator in validators
        for error in validator.iter_errors(found)
    ]


@cache
def _native_validator(version: str, kind: str, api_version: str) -> Any:
    group, _, of_group = api_version.rpartition("/")
    name = "-".join([kind.lower(), *([group.split(".")[0]] if group else []), of_group])
    return jsonschema.Draft202012Validator(_native_schema(version, name), registry=_definitions(version))


@cache
def _definitions(version: str) -> Registry[Any]:
    return Resource.from_contents(_native_schema(version, "_definitions")) @ Registry()


@cache
def _native_schema(version: str, name: str) -> Any:
    folder = files("kubernetes_validate") / "kubernetes-json-schema" / f"v{version}.0-local-strict"
    return json.loads((folder / f"{name}.json").read_text())


@cache
def _custom_validator(kind: str) -> Any:
    definition = yaml.safe_load((CRDS / CUSTOM_KINDS[kind]).read_text())
    (version,) = definition["spec"]["versions"]
    return jsonschema.Draft202012Validator(_strict(version["schema"]["openAPIV3Schema"], is_root=True))


def _strict(schema: Any, *, is_root: bool = False) -> Any:
    """Return a schema that rejects unknown fields, except in `metadata`."""
    if not isinstance(schema, dict):
        return schema
    result = {key: _strict_part(key, part) for key, part in schema.items()}
    if "properties" in schema and "additionalProperties" not in schema:
        result["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    if is_root:
        result["properties"]["metadata"] = {"type": "object"}
    return result


def _strict_part(key: str, part: Any) -> Any:
    if key == "properties":
        return {name: _strict(inner) for name, inner in part.items()}
    if isinstance(part, list):
        return [_strict(inner) for inner in part]
    return _strict(part)
