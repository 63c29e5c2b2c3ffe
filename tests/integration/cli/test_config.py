"""`vqa-worker config show`: values, sources and masked secrets, without any connection."""

from pathlib import Path
from typing import Any

import pytest

from tests.integration.cli.running import Cli
from worker.settings import Settings, variable

# No broker listens there.
URL = "amqp://worker:b-r-o-k-e-r@127.0.0.1:1/vqa"
SECRETS = ("b-r-o-k-e-r", "k-e-y", "h-e-a-d-e-r")


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "vqa_model_api_key").write_text("k-e-y-1234\n")
    (secrets / "VQA_MODEL").write_text("from-the-folder")
    (tmp_path / "worker.env").write_text("VQA_MODEL=from-the-file\nVQA_ALLOWED_BUCKETS=in-the-file\n")
    return Cli(
        tmp_path,
        {
            "VQA_RABBITMQ_URL": URL,
            "VQA_SECRETS_DIR": str(secrets),
            "VQA_ALLOWED_BUCKETS": "photos,scans",
            "VQA_MODEL_HEADERS": '{"X-Key": "h-e-a-d-e-r-1"}',
            "VQA_ALLOWED_LINK_HOSTS": "",
            "VQA_MODEL_TIMEOUT": "",
        },
    )


def by_name(rows: list[dict[str, Any]]) -> dict[str, tuple[str | None, str]]:
    return {row["name"]: (row["value"], row["source"]) for row in rows}


async def test_each_setting_has_its_value_and_its_source(cli: Cli) -> None:
    rows = by_name(await cli.run_json("config", "show", "--env-file", "worker.env"))
    assert list(rows) == [variable(field) for field in Settings.model_fields]
    folder = str(cli.folder / "secrets")
    for name, expected in {
        "VQA_ALLOWED_BUCKETS": ("photos,scans", "environment"),
        "VQA_MODEL": ("from-the-file", "worker.env"),
        "VQA_MODEL_API_KEY": ("[redacted]", folder),
        "VQA_MODEL_HEADERS": ('{"X-Key": "[redacted]"}', "environment"),
        "VQA_RABBITMQ_URL": ("amqp://[redacted]@127.0.0.1:1/vqa", "environment"),
        # Set to nothing, which means that none is allowed, and not set.
        "VQA_ALLOWED_LINK_HOSTS": ("", "environment"),
        "VQA_MODEL_TIMEOUT": ("120", "default"),
        # Derived from other settings.
        "VQA_DEAD_LETTER_QUEUE": ("vqa.jobs.dead", "default"),
        "VQA_RESULT_STORE": (None, "default"),
    }.items():
        assert rows[name] == expected
    rows = by_name(await cli.run_json("config", "show", "--url", "amqp://other/"))
    assert rows["VQA_RABBITMQ_URL"] == ("amqp://other/", "--url")
    assert rows["VQA_MODEL"] == ("from-the-folder", folder)
    urls = "amqp://u:s3cr3t,@a/?heartbeat=3 , amqp://v:s3cr3t,@b/"
    rows = by_name(await cli.run_json("config", "show", "--url", urls))
    assert rows["VQA_RABBITMQ_URL"] == (
        "amqp://[redacted]@a/?[redacted],amqp://[redacted]@b/",
        "--url",
    )


async def test_the_text_has_a_line_for_each_setting_and_warns_about_unknown_variables(cli: Cli) -> None:
    ended = await cli.run("config", "show", VQA_PRICE="1", DEEPINFRA_TOKEN="k-e-y-2", VQA_SECRETS_DIR="")
    assert ended.code == 0
    assert ended.err_lines == [
        "Warning: VQA_PRICE: in the environment, is not a setting and is ignored; did you mean VQA_PRICES?"
    ]
    assert len(ended.lines) == len(Settings.model_fields)
    assert "environment      VQA_ALLOWED_BUCKETS=photos,scans" in ended.lines
    assert "DEEPINFRA_TOKEN  VQA_MODEL_API_KEY=[redacted]" in ended.lines
    assert not any(secret in ended.out for secret in SECRETS)


async def test_wrong_settings_are_shown_as_they_are_given_without_secrets(cli: Cli) -> None:
    ended = await cli.run("config", "show", VQA_MAX_ATTEMPTS="many", VQA_RABBITMQ_URL="amqp:/b-r-o-k-e-r")
    assert ended.code == 78
    assert "environment  VQA_MAX_ATTEMPTS=many" in [
        " ".join(it.split(maxsplit=1)).replace(" ", "  ", 1) for it in ended.lines
    ]
    assert [line.split(":")[:2] for line in ended.err_lines] == [
        ["Error", " VQA_RABBITMQ_URL"],
        ["Error", " VQA_MAX_ATTEMPTS"],
    ]
    assert not any(secret in ended.out + ended.err for secret in SECRETS)
