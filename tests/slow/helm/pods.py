"""The environment and the mounted Secrets of a pod, as far as the chart uses them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.slow.helm.rendering import Object, Rendered, decoded

Secrets = Mapping[str, Mapping[str, str]]


def secrets_of(rendered: Rendered, given: Secrets) -> Secrets:
    """Return the data of the chart's Secrets and of existing ones."""
    return {**given, **{it["metadata"]["name"]: decoded(it) for it in rendered.all("Secret")}}


def environment_in(
    folder: Path, rendered: Rendered, pod: Object, given: Secrets | None = None
) -> dict[str, str]:
    """Return the environment of a pod's container, with its mounts below a local folder."""
    secrets = secrets_of(rendered, given or {})
    config_maps = {it["metadata"]["name"]: it.get("data", {}) for it in rendered.all("ConfigMap")}
    (container,) = pod["spec"]["containers"]
    environment: dict[str, str] = {}
    for source in container.get("envFrom", []):
        if "configMapRef" in source:
            environment.update(config_maps[source["configMapRef"]["name"]])
        else:
            environment.update(secrets[source["secretRef"]["name"]])
    for variable in container.get("env", []):
        environment[variable["name"]] = _value_of(variable, secrets)
    mounts = _mount_secrets(folder, pod, secrets)
    return {name: _moved(value, mounts) for name, value in environment.items()}


def _value_of(variable: Object, secrets: Secrets) -> str:
    if "value" in variable:
        return str(variable["value"])
    reference: dict[str, str] = variable["valueFrom"]["secretKeyRef"]
    return secrets[reference["name"]][reference["key"]]


def _mount_secrets(folder: Path, pod: Object, secrets: Secrets) -> dict[str, Path]:
    """Write the pod's Secrets as files with two symbolic links, as the kubelet does."""
    (container,) = pod["spec"]["containers"]
    volumes: dict[str, Any] = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    mounts = {}
    for mount in container["volumeMounts"]:
        source = volumes[mount["name"]].get("secret")
        if source is None:
            continue
        place = folder / mount["name"]
        content = place / "..2030_01_31"
        content.mkdir(parents=True)
        (place / "..data").symlink_to(content.name)
        for key, text in secrets[source["secretName"]].items():
            (content / key).write_text(text)
            (place / key).symlink_to(f"..data/{key}")
        mounts[mount["mountPath"]] = place
    return mounts


def _moved(value: str, mounts: Mapping[str, Path]) -> str:
    for path, place in mounts.items():
        if value == path or value.startswith(f"{path}/"):
            return f"{place}{value.removeprefix(path)}"
    return value
