"""The chart's values cover exactly the settings of the worker."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml

from tests.authority import Authority
from tests.slow.helm.pods import Secrets, environment_in
from tests.slow.helm.rendering import (
    CHART,
    CI_FILES,
    Object,
    Rendered,
    ci_values,
    decoded,
    error_of,
    minimal,
    render,
)
from worker.settings import BrokerSettings, Price, Settings, load_broker_settings, load_settings
from worker.settings.sources import KNOWN_VARIABLES

NAMES = [path.name.removesuffix("-values.yaml") for path in CI_FILES]
every_ci_file = pytest.mark.parametrize("name", NAMES)

SECRET = {"VQA_RABBITMQ_URL", "VQA_MODEL_API_KEY", "VQA_MODEL_HEADERS", "DEEPINFRA_TOKEN", "OPENAI_API_KEY"}
# Set by values outside `settings`.
OF_TLS = {"VQA_RABBITMQ_CA_FILE", "VQA_RABBITMQ_CERT_FILE", "VQA_RABBITMQ_KEY_FILE"}
# Settings in which the hook differs from the workers.
OF_THE_HOOK_ALONE = {"rabbitmq_url", "declare_topology"}


def defaults() -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
    return values


def variable_of(name: str) -> str:
    """Convert `s3EndpointUrl` to `VQA_S3_ENDPOINT_URL`, independently of the chart."""
    return "VQA_" + "".join(f"_{it}" if it.isupper() else it for it in name).upper()


def test_the_full_values_set_every_setting() -> None:
    rendered = render(ci_values("full"))
    assert {*rendered.settings, *rendered.secrets} == KNOWN_VARIABLES


@every_ci_file
def test_all_variables_are_known_to_the_worker(name: str) -> None:
    rendered = render(ci_values(name))
    assert {*rendered.settings, *rendered.secrets} <= KNOWN_VARIABLES
    hooks = [job["spec"]["template"]["spec"]["containers"][0]["env"] for job in rendered.all("Job")]
    assert {entry["name"] for env in hooks for entry in env} <= KNOWN_VARIABLES


def test_the_only_other_variable_is_the_region() -> None:
    added = [entry["name"] for entry in render(ci_values("full")).container["env"]]
    assert added == ["AWS_REGION", "HTTPS_PROXY"]
    assert "env" not in render(minimal()).container


def test_values_have_the_names_of_the_settings() -> None:
    named = {variable_of(name) for name in defaults()["settings"]}
    assert named == KNOWN_VARIABLES - SECRET - OF_TLS


def _load(environment: Mapping[str, str]) -> Settings:
    with patch.dict(os.environ, environment, clear=True):
        return load_settings(env_file=None)


def test_the_defaults_are_the_worker_s_defaults(tmp_path: Path) -> None:
    rendered = render(minimal())
    by_the_chart = _load(environment_in(tmp_path, rendered, rendered.pod)).model_dump()
    required = {"VQA_ALLOWED_BUCKETS": "photos", **rendered.secrets}
    by_the_worker = _load(required).model_dump()
    # The hook declares the queues. JSON is also the worker's default without a terminal.
    differences = {"declare_topology": False, "log_format": "json"}
    assert by_the_chart == {**by_the_worker, **differences}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Secrets:
    """The existing Secrets that the `ci/` files refer to."""
    authority = Authority.made_in(tmp_path_factory.mktemp("tls") / "authority")
    ca, certificate, key = (
        (authority.folder / name).read_text() for name in ("ca.pem", "server.pem", "server.key")
    )
    return {
        "vqa-worker-secrets": {
            "VQA_RABBITMQ_URL": "amqps://worker:secret@rabbitmq.internal/vision",
            "VQA_MODEL_API_KEY": "any",
        },
        "s3-credentials": {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "key"},
        "internal-authority": {"ca.crt": ca},
        "vqa-worker-rabbitmq-tls": {"ca.crt": ca, "tls.crt": certificate, "tls.key": key},
        "rabbitmq-tls": {"authority.pem": ca, "worker.pem": certificate, "worker.key": key},
        "provider-profile": {"profile.toml": '[request]\ntoken_limit = "max_tokens"\n'},
        "rabbitmq-operator": {"VQA_RABBITMQ_URL": "amqps://operator:secret@rabbitmq.internal/vision"},
    }


def _in_the_cluster(name: str) -> Rendered:
    """Render a `ci/` file without references to other Secrets."""
    values = ci_values(name)
    values.pop("extraEnvFrom", None)
    return render(values)


@every_ci_file
def test_the_worker_accepts_the_environment_of_its_pod(name: str, given: Secrets, tmp_path: Path) -> None:
    rendered = _in_the_cluster(name)
    settings = _load(environment_in(tmp_path, rendered, rendered.pod, given))
    assert settings.unknown_variables == []
    assert settings.warnings() == []
    asked = ci_values(name)["settings"]
    assert {key: _as_loaded(settings, key) for key in asked} == asked


def _as_loaded(settings: Settings, name: str) -> Any:
    """Return a setting in the format of the values."""
    loaded = getattr(settings, variable_of(name).removeprefix("VQA_").lower())
    if isinstance(loaded, Path):  # below a local folder
        return f"/etc/vqa-worker/provider/{loaded.name}"
    if name == "prices":
        prices: Mapping[str, Price] = loaded
        written = ci_values("full")["settings"]["prices"]
        return {
            model: [it for it in price if it is not None]
            if isinstance(written[model], list)
            else {name: it for name, it in price._asdict().items() if it is not None}
            for model, price in prices.items()
        }
    return list(loaded) if isinstance(loaded, tuple) else loaded


def test_the_worker_reads_secrets_from_files_or_the_environment(tmp_path: Path) -> None:
    secrets = {"deepinfraToken": "a-token", "modelApiKey": "", "modelHeaders": {"X-Project": 'a "b" c'}}
    loaded = []
    for as_files in (True, False):
        rendered = render(minimal({"secrets": {**secrets, "asFiles": as_files}}))
        environment = environment_in(tmp_path / str(as_files), rendered, rendered.pod)
        assert ("DEEPINFRA_TOKEN" in environment) != as_files
        loaded.append(_load(environment))
    for settings in loaded:
        assert settings.model_api_key.get_secret_value() == "a-token"
        assert settings.model_headers["X-Project"].get_secret_value() == 'a "b" c'
        assert (
            settings.rabbitmq_url.get_secret_value()
            == "amqp://worker:worker-password@rabbitmq.rabbitmq:5672/"
        )


@every_ci_file
def test_the_hook_accepts_its_environment(name: str, given: Secrets, tmp_path: Path) -> None:
    rendered = _in_the_cluster(name)
    for job in rendered.all("Job"):
        environment = environment_in(tmp_path, rendered, job["spec"]["template"], given)
        with patch.dict(os.environ, environment, clear=True):
            of_hook = load_broker_settings(env_file=None)
        assert of_hook.unknown_variables == []
        workers = _load(environment_in(tmp_path / "worker", rendered, rendered.pod, given))
        for field in set(BrokerSettings.model_fields) - OF_THE_HOOK_ALONE:
            ours, theirs = str(getattr(of_hook, field)), str(getattr(workers, field))
            assert ours.removeprefix(str(tmp_path)) == theirs.removeprefix(str(tmp_path / "worker"))


def test_secret_values_are_only_in_secrets() -> None:
    values = ci_values("full")
    rendered = render(values)
    keda = values["autoscaling"]["keda"]
    secrets = [
        *(value for value in values["secrets"].values() if isinstance(value, str)),
        *values["secrets"]["modelHeaders"].values(),
        values["topology"]["hook"]["rabbitmqUrl"],
        keda["password"],
    ]
    assert len(secrets) == 7
    in_secrets = "".join(text for found in rendered.all("Secret") for text in _decoded_values(found))
    elsewhere = (
        json.dumps([found for found in rendered.objects if found["kind"] != "Secret"]) + rendered.notes
    )
    for secret in secrets:
        assert secret in in_secrets
        assert secret not in elsewhere
    assert SECRET.isdisjoint(rendered.settings)


def _decoded_values(secret: Object) -> Iterator[str]:
    yield from decoded(secret).values()


def test_large_numbers_have_no_exponent() -> None:
    """Go formats large numbers from YAML as 3.2e+07."""
    settings = render(minimal({"settings": {"maxJobBytes": 32_000_000, "jobTimeout": 300.5}})).settings
    assert settings["VQA_MAX_JOB_BYTES"] == "32000000"
    assert settings["VQA_JOB_TIMEOUT"] == "300.5"


def test_an_empty_list_means_none_and_null_means_the_default() -> None:
    settings = render(minimal({"settings": {"allowedReplyTo": [], "allowedLinkHosts": None}})).settings
    assert settings["VQA_ALLOWED_REPLY_TO"] == ""
    assert "VQA_ALLOWED_LINK_HOSTS" not in settings


def test_the_workers_declare_the_queues_if_the_hook_is_disabled() -> None:
    assert render(minimal()).settings["VQA_DECLARE_TOPOLOGY"] == "false"
    without = {"topology": {"hook": {"enabled": False}}}
    assert render(minimal(without)).settings["VQA_DECLARE_TOPOLOGY"] == "true"
    by_hand = {**without, "settings": {"declareTopology": False}}
    assert render(minimal(by_hand)).settings["VQA_DECLARE_TOPOLOGY"] == "false"


def test_secrets_can_come_from_an_existing_secret() -> None:
    rendered = render(ci_values("hpa"))
    assert rendered.all("Secret") == []
    assert {"secretRef": {"name": "vqa-worker-secrets"}} in rendered.container["envFrom"]


def test_secrets_can_come_from_extra_variables() -> None:
    by_reference = [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": "elsewhere", "key": name}}}
        for name in ("VQA_RABBITMQ_URL", "VQA_MODEL_API_KEY")
    ]
    nothing = {"rabbitmqUrl": "", "modelApiKey": ""}
    values = minimal({"secrets": nothing, "extraEnv": by_reference, "topology": {"hook": {"enabled": False}}})
    assert render(values).container["env"] == by_reference
    assert "secrets.rabbitmqUrl is empty" in error_of({**values, "extraEnv": by_reference[1:]})
