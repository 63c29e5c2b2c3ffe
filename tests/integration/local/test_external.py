import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.local.external import (
    IncompleteConfigurationError,
    external_model,
    external_rabbitmq,
    external_s3,
)
from deploy.local.service import ExternalServiceError
from deploy.local.stack import Stack

ROOT = Path(__file__).parents[3]
PATIENCE_S = 60.0


@pytest.fixture
def no_aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Remove AWS credentials from the environment."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))


def test_an_empty_environment_names_no_external_service() -> None:
    empty = {"VQA_RABBITMQ_URL": "", "OPENAI_API_KEY": ""}
    assert external_rabbitmq(empty) is None
    assert external_s3(empty) is None
    assert external_model(empty) is None


def test_an_external_broker_is_never_stopped() -> None:
    broker = external_rabbitmq({"VQA_RABBITMQ_URL": "amqp://u:secret@broker.example/"})
    assert broker is not None
    assert broker.running
    with pytest.raises(ExternalServiceError):
        broker.restart()
    assert "secret" not in repr(broker)


@pytest.mark.parametrize(
    ("environment", "url", "key"),
    [
        ({"DEEPINFRA_TOKEN": "d"}, "https://api.deepinfra.com/v1/openai", "d"),
        ({"OPENAI_API_KEY": "o"}, "https://api.openai.com/v1", "o"),
        ({"DEEPINFRA_TOKEN": "d", "OPENAI_API_KEY": "o"}, "https://api.deepinfra.com/v1/openai", "d"),
        ({"VQA_MODEL_API_KEY": "k"}, "https://api.deepinfra.com/v1/openai", "k"),
        (
            {"VQA_MODEL_BASE_URL": "http://m.example/v1", "VQA_MODEL_API_KEY": "k", "OPENAI_API_KEY": "o"},
            "http://m.example/v1",
            "k",
        ),
        (
            {
                "VQA_MODEL_BASE_URL": "https://api.deepinfra.com/v1/openai",
                "DEEPINFRA_TOKEN": "d",
                "OPENAI_API_KEY": "o",
            },
            "https://api.deepinfra.com/v1/openai",
            "d",
        ),
        (
            {
                "VQA_MODEL_BASE_URL": "https://api.openai.com/v1",
                "VQA_MODEL_API_KEY": "",
                "DEEPINFRA_TOKEN": "d",
                "OPENAI_API_KEY": "o",
            },
            "https://api.openai.com/v1",
            "o",
        ),
        (
            {
                "VQA_MODEL_BASE_URL": "https://api.openai.com/v1",
                "VQA_MODEL_API_KEY": "k",
                "OPENAI_API_KEY": "o",
            },
            "https://api.openai.com/v1",
            "k",
        ),
    ],
)
def test_a_key_goes_to_its_own_provider(environment: dict[str, str], url: str, key: str) -> None:
    model = external_model(environment)
    assert model is not None
    assert (model.base_url, model.api_key, model.is_simulated) == (url, key, False)
    assert key not in repr(model).split()


@pytest.mark.parametrize(
    ("url", "other", "wanted"),
    [
        ("http://m.example/v1", "OPENAI_API_KEY", "set VQA_MODEL_API_KEY,"),
        (
            "https://api.deepinfra.com/v1/openai",
            "OPENAI_API_KEY",
            "set DEEPINFRA_TOKEN or VQA_MODEL_API_KEY,",
        ),
        ("https://api.openai.com/v1", "DEEPINFRA_TOKEN", "set OPENAI_API_KEY or VQA_MODEL_API_KEY,"),
    ],
)
def test_a_url_without_its_key_is_never_used_with_another_provider_s_key(
    url: str, other: str, wanted: str
) -> None:
    with pytest.raises(IncompleteConfigurationError, match=wanted):
        external_model({"VQA_MODEL_BASE_URL": url, other: "key-of-another"})


@pytest.mark.usefixtures("no_aws")
@pytest.mark.parametrize("half", [{}, {"AWS_ACCESS_KEY_ID": "only-this"}, {"AWS_PROFILE": "not-there"}])
def test_an_s3_server_without_usable_credentials_is_an_error(
    half: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in half.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(IncompleteConfigurationError, match="VQA_S3_ENDPOINT_URL"):
        external_s3({"VQA_S3_ENDPOINT_URL": "http://s3.example"})


@pytest.mark.parametrize(
    "environment",
    [
        {"VQA_MODEL_BASE_URL": "https://api.openai.com/v1", "DEEPINFRA_TOKEN": "d"},
        {"VQA_S3_ENDPOINT_URL": "http://s3.example"},
    ],
)
@pytest.mark.usefixtures("no_aws")
def test_the_demo_names_a_missing_setting(
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("VQA_S3_ENDPOINT_URL", "VQA_MODEL_BASE_URL", "VQA_MODEL_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    ran = subprocess.run(
        [sys.executable, "-m", "deploy.local.demo"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    output = ran.stdout + ran.stderr
    assert ran.returncode == 1, output
    assert f"{next(iter(environment))} is set without" in output
    assert "Traceback" not in output


def test_the_demo_ends_with_the_answers_the_cost_and_what_to_do_next(stack: Stack) -> None:
    names = ("VQA_", "AWS_", "DEEPINFRA_TOKEN", "OPENAI_API_KEY")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    ran = subprocess.run(
        [sys.executable, "-m", "deploy.local.demo"],
        env={**inherited, **stack.environment(), "COLUMNS": "100"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    answers, _, rest = ran.stdout.partition("jobs succeeded, 1 failed (its image is missing). ")
    assert "image_not_found" in answers
    assert re.match(r"\d+ tokens, 0\.\d*[1-9]\d* USD\.\n", rest)
    assert "make stack" in rest
    assert len(rest.splitlines()) < 8


def test_the_model_is_one_of_the_providers() -> None:
    openai = external_model({"OPENAI_API_KEY": "o"})
    chosen = external_model({"OPENAI_API_KEY": "o", "VQA_MODEL": "mine"})
    by_url = external_model({"OPENAI_API_KEY": "o", "VQA_MODEL_BASE_URL": "https://api.openai.com/v1"})
    assert openai is not None
    assert by_url is not None
    assert vars(by_url) == vars(openai)
    assert chosen is not None
    assert "llama" not in openai.models[0].lower()
    assert chosen.models == ("mine",)


def test_a_stack_uses_external_services_and_starts_only_the_rest(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("VQA_RABBITMQ_URL", "VQA_S3_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, stack.environment()[name])
    for name in ("VQA_MODEL_BASE_URL", "VQA_MODEL_API_KEY", "DEEPINFRA_TOKEN", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with Stack.start(os.environ) as second:
        assert second.rabbitmq.url == stack.rabbitmq.url
        assert stack.s3.bucket in [bucket["Name"] for bucket in second.s3.client().list_buckets()["Buckets"]]
        assert second.rabbitmq.pids == second.s3.pids == []
        assert second.model.base_url != stack.model.base_url
    assert stack.rabbitmq.running
    assert stack.s3.running
