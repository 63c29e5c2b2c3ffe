import os
import re
import ssl
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError

from docs import generate
from worker.settings import Price, Settings, SettingsError, broker_ssl_context, variable
from worker.settings import load_settings as read_settings
from worker.settings.urls import fallback_key_variable

ROOT = Path(__file__).parents[2]
CONTRACT = ROOT / "../shared/contract.md"
DEEPINFRA = "https://api.deepinfra.com/v1/openai"
OPENAI = "https://api.openai.com/v1"
ELSEWHERE = "https://models.example/v1"
REQUIRED = {"VQA_ALLOWED_BUCKETS": "photos", "VQA_MODEL_API_KEY": "sk-test"}

# Created for these tests with OpenSSL.
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBfzCCASWgAwIBAgIUCSqERJBrNDDF+S2RUbk3I0qfITwwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJdGVzdCBvbmx5MCAXDTI2MTEyMjE1NDE0MloYDzIxMjYxMDI5
MTU0MTQyWjAUMRIwEAYDVQQDDAl0ZXN0IG9ubHkwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAASRlyI3zwWofCr7St3K7WZvZsFwD+RgFqqJS+UZ1gRCGSLVymJcRQQL
KXjjOxxldznuhVLUrZGzCotU/9MU2Hiyo1MwUTAdBgNVHQ4EFgQUzFm7Lp6J0JeG
nh/qmGb1V2AvL0QwHwYDVR0jBBgwFoAUzFm7Lp6J0JeGnh/qmGb1V2AvL0QwDwYD
VR0TAQH/BAUwAwEB/zAKBggqhkjOPQQDAgNIADBFAiBUdC+/SlqRY2zY/nPaHR7H
HSfe+h4/7ZlVVWN+z6v53wIhANWAFdPXuqbl7I+SQ8ZYcUgdiqVsxzrjac6MEWFK
Fd0b
-----END CERTIFICATE-----
"""
KEY = """\
-----BEGIN EC PRIVATE KEY-----
MHcCAQEEILugrt6O3ofKr0tbBOqiYX4Tw2doDAPi6f1WawKdImEDoAoGCCqGSM49
AwEHoUQDQgAEkZciN88FqHwq+0rdyu1mb2bBcA/kYBaqiUvlGdYEQhki1cpiXEUE
Cyl44zscZXc57oVS1K2RswqLVP/TFNh4sg==
-----END EC PRIVATE KEY-----
"""
KEY_OF_ANOTHER = """\
-----BEGIN EC PRIVATE KEY-----
MHcCAQEEIPZVS8P5TNRZ4iQekq+J3lNjYSUFJVbfcIENqWpMyKwVoAoGCCqGSM49
AwEHoUQDQgAE5NfQx302F5cJexhrn4ck5fjoiI7jcVGa0T83Fdu+yzRKLPbLLi1l
03DHrM3gmPpYj+Wr1Xw2wAMNMspmOxGp7Q==
-----END EC PRIVATE KEY-----
"""
ENCRYPTED_KEY = """\
-----BEGIN EC PRIVATE KEY-----
Proc-Type: 4,ENCRYPTED
DEK-Info: AES-128-CBC,5F2C1BC1E2C17540BC91BE138E169B2B

tF31cUqknKskfIMejn/+4mIOUdX8/Q/6TGoHvYdozH8DFkHlj97EWoXYpqSMPZYr
4bpVqo1Jja3h4imFIlu3bSSu5XQMe53ABz0JHe/JLAsB/IVfi4KJjI0A6Dit+gSt
p/xK3O26J373Rxt3GVTWSsuZyri/UQcRuLnwcBh2M58=
-----END EC PRIVATE KEY-----
"""


@pytest.fixture(autouse=True)
def empty_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def load_settings(environ: dict[str, str], *, env_file: Path | None = Path(".env")) -> Settings:
    """Load the settings from this environment."""
    with patch.dict(os.environ, environ, clear=True):
        return read_settings(env_file=env_file)


def load(**given: str) -> Settings:
    """Load settings from the required variables and these, without their prefix."""
    return load_settings(REQUIRED | {variable(name): value for name, value in given.items()})


def faults_of(environ: dict[str, str]) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load_settings(environ)
    return caught.value.faults


def fault(**given: str) -> str:
    """Return the only error in these settings."""
    faults = faults_of(REQUIRED | {variable(name): value for name, value in given.items()})
    assert len(faults) == 1, faults
    assert "\n" not in faults[0]
    return faults[0]


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


# Defaults and the contract


def test_the_required_settings_are_sufficient() -> None:
    settings = load()
    assert settings.rabbitmq_url.get_secret_value() == "amqp://guest:guest@localhost:5672/"
    assert settings.jobs_queue == "vqa.jobs"
    assert settings.dead_letter_queue == "vqa.jobs.dead"
    assert settings.allowed_reply_to == (
        "vqa.results",
        "vqa.results.*",
        "amq.rabbitmq.reply-to.*",
        "amq.gen-*",
    )
    assert settings.retry_delays == (1, 5, 30, 120)
    assert settings.allowed_models == ("meta-llama/Llama-3.2-90B-Vision-Instruct",)
    assert settings.allowed_link_hosts == ("*",)
    assert settings.log_format is None
    assert settings.warnings() == []


@pytest.mark.parametrize(("maximum", "initial"), [("200", 32), ("64", 32), ("5", 5)])
def test_the_initial_concurrency_is_32_or_the_lower_maximum(maximum: str, initial: int) -> None:
    assert load(max_concurrency=maximum).initial_concurrency == initial


def test_large_results_and_the_result_store_have_different_prefixes() -> None:
    store = "s3://bucket/answers"
    line = fault(result_store=store, large_results=f"{store}/")
    assert line == "VQA_LARGE_RESULTS: is the same as VQA_RESULT_STORE: use another prefix"
    settings = load(result_store=store, large_results="s3://bucket/large/")
    assert settings.large_results == "s3://bucket/large"
    assert settings.max_result_bytes is None


def test_every_missing_required_setting_is_named() -> None:
    faults = faults_of({})
    assert [line.split(":")[0] for line in faults] == ["VQA_ALLOWED_BUCKETS", "VQA_MODEL_API_KEY"]


CONTRACT_IN_WORDS = {
    "the results queue, `vqa.results.*`, `amq.rabbitmq.reply-to.*`, `amq.gen-*`": [
        "the results queue, `vqa.results.*`, `amq.rabbitmq.reply-to.*`, `amq.gen-*`"
    ],
    "the default exchange": ["the default exchange"],
    "none: AWS; `auto` (path for a custom endpoint)": ["none: AWS", "`auto`"],
    "DeepInfra's OpenAI-compatible endpoint; required": [f"`{DEEPINFRA}`", "required"],
    "`meta-llama/Llama-3.2-90B-Vision-Instruct`; the value of `VQA_MODEL`": [
        "`meta-llama/Llama-3.2-90B-Vision-Instruct`",
        "the value of `VQA_MODEL`",
    ],
    "none; the broker's limit": ["none", "the broker's limit"],
    "from the base URL's host; none": ["from the base URL's host", "none"],
    "`info`; `json` on a pipe, `console` on a terminal": [
        "`info`",
        "`json` on a pipe, `console` on a terminal",
    ],
    "none; `200000000`; `100000000`": ["none", "`200000000`", "`100000000`"],
    "CPUs, 4 at most; `150`; `20`": ["CPUs, 4 at most", "`150`", "`20`"],
    "required": ["required"],
    "none": ["none"],
}


def contract_defaults(existing: set[str]) -> dict[str, str]:
    """Return the contract's default of each setting, without rows of settings that do not exist yet."""
    table = CONTRACT.read_text().split("## Settings", 1)[1].split("\n## ", 1)[0]
    defaults: dict[str, str] = {"VQA_RABBITMQ_CERT_FILE": "none", "VQA_RABBITMQ_KEY_FILE": "none"}
    defaults["VQA_RABBITMQ_CA_FILE"] = "none"  # these three are in the last column
    for row in re.findall(r"^\| (`VQA_[^|]*) \| ([^|]*) \|", table, re.MULTILINE):
        names = re.findall(r"VQA_\w+", row[0])
        if existing.isdisjoint(names):
            continue
        texts = CONTRACT_IN_WORDS.get(row[1]) or re.findall(r"`[^`]*`", row[1])
        assert len(names) == len(texts), f"defaults do not match the names: {row}"
        defaults.update(zip(names, texts, strict=True))
    return defaults


@pytest.mark.skipif(not CONTRACT.is_file(), reason="the contract is kept outside of this repository")
def test_the_names_and_defaults_are_those_of_the_contract() -> None:
    ours = {variable(name): generate.default_text(name) for name in Settings.model_fields}
    # The contract lists the providers' keys in the row of VQA_MODEL_API_KEY.
    ours = {name: default for name, default in ours.items() if name.startswith("VQA_")}
    # The worker may have more settings than the contract; they have defaults, so they are compatible.
    promised = contract_defaults(set(ours))
    assert {name: ours.get(name) for name in promised} == promised
    assert [name for name in ours.keys() - promised.keys() if ours[name] == "required"] == []


def test_the_described_default_is_the_actual_default() -> None:
    settings = load(results_queue="answers", jobs_queue="questions", model="m")
    assert settings.allowed_reply_to[0] == "answers"
    assert settings.dead_letter_queue == "questions.dead"
    assert settings.allowed_models == ("m",)


# Sources of values


def test_the_precedence_is_environment_then_env_file_then_secrets(tmp_path: Path) -> None:
    write(Path(".env"), "VQA_JOBS_QUEUE=from-env-file\nVQA_RESULTS_QUEUE=from-env-file\n")
    write(tmp_path / "VQA_JOBS_QUEUE", "from-secret\n")
    write(tmp_path / "VQA_RESULTS_QUEUE", "from-secret\n")
    write(tmp_path / "VQA_DEAD_LETTER_QUEUE", "from-secret\n")
    settings = load(jobs_queue="from-environment", secrets_dir=str(tmp_path))
    assert settings.jobs_queue == "from-environment"
    assert settings.results_queue == "from-env-file"
    assert settings.dead_letter_queue == "from-secret"


def test_the_env_file_can_name_the_secrets_folder(tmp_path: Path) -> None:
    write(Path(".env"), f"VQA_SECRETS_DIR={tmp_path}\n")
    write(tmp_path / "vqa_model", "of-the-secret")
    assert load().model == "of-the-secret"


def test_no_env_file_is_read_if_its_name_is_none() -> None:
    write(Path(".env"), "VQA_MODEL=m\n")
    assert load_settings(REQUIRED, env_file=None).model != "m"


def test_an_invalid_env_file_is_an_error() -> None:
    Path(".env").write_bytes(b"VQA_MODEL=\xff\xfe\n")
    assert fault() == ".env: cannot be read: it is not UTF-8 text"


@pytest.mark.parametrize("name", ["VQA_MODEL_API_KEY", "vqa_model_api_key", "Vqa_Model_Api_Key"])
def test_the_name_of_a_secret_file_ignores_case(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, "sk-from-file\n")
    settings = load_settings({"VQA_ALLOWED_BUCKETS": "*", "VQA_SECRETS_DIR": str(tmp_path)})
    assert settings.model_api_key.get_secret_value() == "sk-from-file"


def test_a_secret_mounted_by_kubernetes_is_read(tmp_path: Path) -> None:
    version = tmp_path / "..2030_01_01"
    version.mkdir()
    write(version / "VQA_MODEL_API_KEY", "sk-mounted")
    (tmp_path / "..data").symlink_to(version.name)
    (tmp_path / "VQA_MODEL_API_KEY").symlink_to("..data/VQA_MODEL_API_KEY")
    settings = load_settings({"VQA_ALLOWED_BUCKETS": "*", "VQA_SECRETS_DIR": str(tmp_path)})
    assert settings.model_api_key.get_secret_value() == "sk-mounted"


def test_an_unreadable_secret_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "VQA_MODEL").mkdir()
    line = fault(secrets_dir=str(tmp_path))
    assert line.startswith("VQA_SECRETS_DIR: ")
    assert "VQA_MODEL" in line


def test_a_secret_file_that_is_not_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "VQA_MODEL").write_bytes(b"\xff")
    assert fault(secrets_dir=str(tmp_path)).endswith("cannot be read: it is not UTF-8 text")


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_a_secrets_folder_that_is_not_a_folder_is_an_error(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / kind
    if kind == "file":
        folder.touch()
    assert fault(secrets_dir=str(folder)).startswith("VQA_SECRETS_DIR: ")


def test_text_that_is_not_utf8_is_an_error() -> None:
    assert fault(model=os.fsdecode(b"x\xe9")) == "VQA_MODEL: must be printable text"


@pytest.mark.parametrize("name", ["rabbitmq_url", "model_api_key", "model_headers"])
def test_a_secret_that_is_not_utf8_is_an_error_that_does_not_show_it(name: str) -> None:
    text = {"model_headers": '{"X-A": "s3cret-\udce9"}', "rabbitmq_url": "amqp://u:s3cret-\udce9@h/"}
    assert "s3cret" not in fault(**{name: text.get(name, "s3cret-\udce9")})


def test_a_secret_of_another_type_is_an_error_that_does_not_show_it() -> None:
    for text in ('"s3cret"', '["s3cret"]', '{"X-A": ["s3cret"]}', '{"X-A": {"b": "s3cret"}}'):
        assert "s3cret" not in fault(model_headers=text)


EMPTY_IS_A_VALUE = {"allowed_reply_to", "allowed_link_hosts"}


@pytest.mark.parametrize("blank", ["", "  ", "\r\n"])
@pytest.mark.parametrize(
    "name", sorted(set(Settings.model_fields) - EMPTY_IS_A_VALUE - {"allowed_buckets", "model_api_key"})
)
def test_an_empty_setting_is_the_same_as_a_missing_one(name: str, blank: str) -> None:
    assert load(**{name: blank}) == load()


@pytest.mark.parametrize("name", sorted(EMPTY_IS_A_VALUE))
def test_an_empty_allow_list_allows_nothing(name: str) -> None:
    assert getattr(load(**{name: ""}), name) == ()


def test_an_empty_variable_does_not_hide_the_env_file() -> None:
    write(Path(".env"), "VQA_MODEL=of-the-file\n")
    assert load(model="").model == "of-the-file"


def test_surrounding_white_space_is_stripped() -> None:
    settings = load(jobs_queue=" jobs \r", max_concurrency="8\r")
    assert (settings.jobs_queue, settings.max_concurrency) == ("jobs", 8)


def test_the_constructor_validates_too() -> None:
    given: dict[str, Any] = {"allowed_buckets": (), "model_headers": 1, "retry_delays": (1.5,)}
    with pytest.raises(ValidationError) as caught:
        Settings(model_api_key="k", **given)
    faulty = [error["loc"][0] for error in caught.value.errors()]
    assert sorted(map(str, faulty)) == sorted(given)


def test_settings_are_immutable() -> None:
    with pytest.raises(ValidationError):
        load().model = "another"  # type: ignore[misc]  # which is the point


# Secrets


def test_no_representation_of_the_settings_contains_secrets() -> None:
    settings = load(
        rabbitmq_url="amqp://user:br0ker-pw@host/,amqp://user:br0ker-pw@other/",
        model_api_key="sk-very-secret",
        model_headers='{"X-Token": "h3ader-value"}',
    )
    for shown in (repr(settings), str(settings), f"{settings.model_dump()}", settings.model_dump_json()):
        assert not re.search("br0ker-pw|sk-very-secret|h3ader-value", shown)


def test_errors_and_their_tracebacks_contain_no_secrets() -> None:
    environ = {
        "VQA_RABBITMQ_URL": "amqp://user:s3cret@other/,amqp://user:s3cret/word@host/",
        "VQA_MODEL_API_KEY": "s3cret word",
        "VQA_MODEL_HEADERS": '{"Content-Length": "s3cret word"}',
        "VQA_MODEL_BASE_URL": "https://user:s3cret@host/",
        "VQA_S3_ENDPOINT_URL": "https://host/?key=s3cret",
        "VQA_ALLOWED_BUCKETS": "*",
    }
    with pytest.raises(SettingsError) as caught:
        load_settings(environ)
    assert len(caught.value.faults) == 5
    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value.faults)
    assert "s3cret" not in shown


def test_secret_values_are_listed_encoded_and_decoded() -> None:
    settings = load(
        rabbitmq_url="amqp://user:p%40ss-word@host/",
        model_api_key="sk-key",
        model_headers='{"X-A": "value-a", "X-B": ""}',
    )
    assert settings.secret_values() == ("p%40ss-word", "p@ss-word", "sk-key", "value-a")
    urls = "amqp://user:p%40ss-1@host/,amqp://user:p,ss-2@other/"
    assert load(rabbitmq_url=urls).secret_values() == ("p%40ss-1", "p,ss-2", "p@ss-1", "p,ss-2", "sk-test")


def test_the_default_password_of_rabbitmq_is_not_a_secret() -> None:
    assert load().secret_values() == ("sk-test",)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("amqp://user:pass@rabbit/", "amqp://rabbit:5672/"),
        ("amqps://user:p%40ss@Rabbit.Example/vhost", "amqps://rabbit.example:5671/vhost"),
        ("amqp://rabbit:5673", "amqp://rabbit:5673/"),
        ("amqp://u:p@[::1]:5672/%2F?heartbeat=30", "amqp://[::1]:5672/%2F"),
        (
            "amqps://u:p,w@b/v , amqps://u:p,w@[::1]/v,amqps://u:p,w@b/v",
            "amqps://[::1]:5671/v,amqps://b:5671/v",
        ),
    ],
)
def test_the_address_of_the_broker_has_no_credentials(url: str, address: str) -> None:
    assert load(rabbitmq_url=url).rabbitmq_address == address


# The API key


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (DEEPINFRA, "DEEPINFRA_TOKEN"),
        ("https://API.DeepInfra.com/v1", "DEEPINFRA_TOKEN"),
        ("https://deepinfra.com/v1", "DEEPINFRA_TOKEN"),
        ("https://eu.api.deepinfra.com:443/v1", "DEEPINFRA_TOKEN"),
        (OPENAI, "OPENAI_API_KEY"),
        ("https://eu.api.openai.com/v1", "OPENAI_API_KEY"),
        ("https://api.deepinfra.com.evil.org/v1", None),
        ("https://deepinfra.com.evil.org/v1", None),
        ("https://evildeepinfra.com/v1", None),
        ("https://api.deepinfra.com@evil.org/v1", None),
        ("https://evil.org/api.deepinfra.com", None),
        ("https://evil.org?api.deepinfra.com", None),
        ("https://evil.org#.deepinfra.com", None),
        ("https://evilapi.openai.com/v1", None),
        ("https://openai.com/v1", None),
        ("https://[::1/", None),
        ("", None),
    ],
)
def test_a_provider_s_common_variable_is_used_for_that_provider_only(url: str, expected: str | None) -> None:
    assert fallback_key_variable(url) == expected


TOKENS = {"DEEPINFRA_TOKEN": "di-token", "OPENAI_API_KEY": "oa-key"}


@pytest.mark.parametrize(("url", "key"), [(DEEPINFRA, "di-token"), (OPENAI, "oa-key"), ("", "di-token")])
def test_without_vqa_model_api_key_the_provider_s_common_variable_is_used(url: str, key: str) -> None:
    settings = load_settings({"VQA_ALLOWED_BUCKETS": "*", "VQA_MODEL_BASE_URL": url} | TOKENS)
    assert settings.model_api_key.get_secret_value() == key


def test_vqa_model_api_key_takes_precedence() -> None:
    assert load_settings(REQUIRED | TOKENS).model_api_key.get_secret_value() == "sk-test"


def test_vqa_model_api_key_in_a_file_takes_precedence_over_a_common_variable(tmp_path: Path) -> None:
    write(tmp_path / "VQA_MODEL_API_KEY", "sk-of-the-file")
    environ = {"VQA_ALLOWED_BUCKETS": "*", "VQA_SECRETS_DIR": str(tmp_path), "VQA_MODEL_API_KEY": ""}
    assert load_settings(environ | TOKENS).model_api_key.get_secret_value() == "sk-of-the-file"


def test_a_common_key_may_be_in_the_env_file_or_in_a_secret(tmp_path: Path) -> None:
    write(tmp_path / "deepinfra_token", "from-secret\n")
    environ = {"VQA_ALLOWED_BUCKETS": "*", "VQA_SECRETS_DIR": str(tmp_path)}
    assert load_settings(environ).model_api_key.get_secret_value() == "from-secret"
    write(Path(".env"), "DEEPINFRA_TOKEN=from-env-file\n")
    assert load_settings(environ).model_api_key.get_secret_value() == "from-env-file"


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        (DEEPINFRA, "or set DEEPINFRA_TOKEN"),
        (OPENAI, "or set OPENAI_API_KEY"),
        (ELSEWHERE, "models.example (any value if it requires none"),
        ("https://api.deepinfra.com.evil.org/v1", "for their own hosts only"),
    ],
)
def test_a_missing_key_is_an_error_that_names_the_variables(url: str, hint: str) -> None:
    other = {"DEEPINFRA_TOKEN": "OPENAI_API_KEY"}.get(fallback_key_variable(url) or "", "DEEPINFRA_TOKEN")
    (line,) = faults_of({"VQA_ALLOWED_BUCKETS": "*", "VQA_MODEL_BASE_URL": url, other: "the-wrong-one"})
    assert line.startswith("VQA_MODEL_API_KEY: ")
    assert hint in line


@pytest.mark.parametrize(
    "url", ["https://api.deepinfra.com\\@evil.org", "https://api.deepinfra.com\t.evil.org"]
)
def test_a_url_that_parsers_read_differently_gets_no_key(url: str) -> None:
    lines = faults_of({"VQA_ALLOWED_BUCKETS": "*", "VQA_MODEL_BASE_URL": url} | TOKENS)
    assert lines[0].startswith("VQA_MODEL_BASE_URL: ")


@pytest.mark.parametrize("key", ["two words", "tab\there", "line\nbreak", "schlüssel", "sk\u200bkey"])
def test_a_key_that_is_not_a_valid_header_value_is_an_error(key: str) -> None:
    line = fault(model_api_key=key)
    assert line.startswith("VQA_MODEL_API_KEY: ")
    assert key not in line


def test_an_invalid_common_key_is_named_too() -> None:
    (line,) = faults_of({"VQA_ALLOWED_BUCKETS": "*", "DEEPINFRA_TOKEN": "two words"})
    assert line.startswith("VQA_MODEL_API_KEY: (or DEEPINFRA_TOKEN) contains spaces")


# Single values


GOOD: list[tuple[str, str, Any]] = [
    ("retry_delays", "1, 5,86400,", (1, 5, 86_400)),
    ("retry_delays", "007", (7,)),
    ("allowed_models", "a , meta-llama/Llama-3.2-90B-Vision-Instruct",
     ("a", "meta-llama/Llama-3.2-90B-Vision-Instruct")),
    ("allowed_link_hosts", "CDN.Example, *.b", ("cdn.example", "*.b")),
    ("allowed_buckets", "*", ("*",)),
    ("allowed_buckets", "photos-*, arn:aws:s3:eu-central-1:123456789012:accesspoint/*",
     ("photos-*", "arn:aws:s3:eu-central-1:123456789012:accesspoint/*")),
    ("s3_unsigned", "public-*,open", ("public-*", "open")),
    ("s3_requester_pays", "true", True),
    ("declare_topology", "no", False),
    ("send_image_detail", "1", True),
    ("image_delivery", "LINK", "link"),
    ("log_level", "Warning", "warning"),
    ("log_format", "JSON", "json"),
    ("s3_addressing_style", "Path", "path"),
    ("http_port", "0", 0),
    ("initial_concurrency", "64", 64),
    ("shutdown_grace", "0", 0),
    ("model_timeout", "0.5", 0.5),
    ("job_timeout", "1739.9", 1739.9),
    ("delivery_limit", "99", 99),
    ("schema_repairs", "0", 0),
    ("schema_repairs", "Off", None),
    ("reply_exchange", "amq.direct", "amq.direct"),
    ("s3_endpoint_url", "http://minio:9000/", "http://minio:9000"),
    ("s3_endpoint_url", "http://my_minio:9000", "http://my_minio:9000"),
    ("model_base_url", "https://[::1]:8000/v1/", "https://[::1]:8000/v1"),
    ("model_base_url", "https://host/v1/chat/completions", "https://host/v1"),
    ("model_base_url", "https://host/v1/chat/completions/", "https://host/v1"),
    ("model_base_url", "https://host", "https://host"),
    # The path of a known provider, if there is none.
    ("model_base_url", "https://api.openai.com/", "https://api.openai.com/v1"),
    ("model_base_url", "https://api.deepinfra.com/chat/completions", "https://api.deepinfra.com/v1/openai"),
    ("model_base_url", "https://a.openai.azure.com", "https://a.openai.azure.com/openai/v1"),
    ("model_base_url", "https://a.openai.azure.com/openai/deployments/d/chat/completions?api-version=2024-10-21",
     "https://a.openai.azure.com/openai/deployments/d?api-version=2024-10-21"),
    ("provider", "OpenRouter", "openrouter"),
    ("prices", '{"m": [0.35, 1]}', {"m": Price(prompt=0.35, completion=1)}),
    ("prices", '{"m": {"prompt": 0, "completion": 2.5}}', {"m": Price(prompt=0, completion=2.5)}),
    ("prices", '{"m": {"prompt": 1, "completion": 2, "cached_prompt": 0.5}}', {"m": Price(1, 2, 0.5)}),
    ("prices", '{"m": [1, 2, 0.5]}', {"m": Price(1, 2, 0.5)}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "value"), GOOD)
def test_a_valid_value_is_accepted(name: str, text: str, value: Any) -> None:
    assert getattr(load(**{name: text}), name) == value


BAD = [
    ("rabbitmq_url", "amqp://a/,amqp://u:p@/v", "URL 2 of 2 must have a host"),
    ("rabbitmq_url", "amqp://a:amqp/,amqp://b/", "URL 1 of 2 is not a URL: host or port cannot be read"),
    ("rabbitmq_url", "amqp://a/,amqp://u:p#w@b/", "URL 2 of 2 is not a URL: host or port"),
    ("rabbitmq_url", "amqp://a/,amqps://b/", "all must have the same scheme"),
    ("rabbitmq_url", "amqp://a/v,amqp://b/", "different virtual hosts: all must be nodes of one cluster"),
    ("rabbitmq_url", "amqp://u:p@a,b/", "has several hosts: give a whole URL for each"),
    ("rabbitmq_url", "amqp://u:p@a:5672,b:5672/", "has several hosts: give a whole URL for each"),
    ("rabbitmq_url", "http://host/", "must begin with amqp:// or amqps://"),
    ("rabbitmq_url", "amqp://", "must have a host"),
    ("rabbitmq_url", "amqp://user:pw@/vhost", "must have a host"),
    ("rabbitmq_url", "localhost:5672", "must begin with"),
    ("rabbitmq_url", "amqp://host:65536/", "port cannot be read"),
    ("rabbitmq_url", "amqp://host:amqp/", "port cannot be read"),
    ("rabbitmq_url", "amqp://[::1/", "cannot be read"),
    ("rabbitmq_url", "amqp://[1.2.3.4]/", "cannot be read"),
    ("rabbitmq_url", "amqp://[v1.a:b]/", "must have a host"),
    ("rabbitmq_url", "amqp://u:p@ho%73t/", "must have a host"),
    ("rabbitmq_url", "amqp://user:pa#ss@host/", "percent-encoded"),
    ("rabbitmq_url", "amqp://host/#frag", "percent-encoded"),
    ("rabbitmq_url", "amqp://user:pa ss@host/", "percent-encode"),
    ("rabbitmq_url", "amqp://user:paß@host/", "percent-encode"),
    ("jobs_queue", "amq.jobs", "must not begin with 'amq.'"),
    ("jobs_queue", "j" * 256, "longer than 255 bytes"),
    ("jobs_queue", "ü" * 128, "longer than 255 bytes"),
    ("jobs_queue", "a\x07b", "printable"),
    ("reply_exchange", "e" * 256, "longer than 255 bytes"),
    ("results_queue", "vqa.jobs", "the same queue as VQA_JOBS_QUEUE"),
    ("results_queue", "vqa.jobs.dead", "the same queue as VQA_RESULTS_QUEUE"),
    ("dead_letter_queue", "vqa.results", "the same queue as VQA_RESULTS_QUEUE"),
    ("dead_letter_queue", "vqa.jobs", "the same queue as VQA_JOBS_QUEUE"),
    ("dead_letter_queue", "vqa.jobs.retry.30s", "a retry queue with the same name as VQA_DEAD_LETTER_QUEUE"),
    ("results_queue", "vqa.jobs.retry.1s", "a retry queue with the same name as VQA_RESULTS_QUEUE"),
    ("retry_delays", ",", "must be a comma-separated list"),
    ("retry_delays", "1,0.5", "'item 2' must be a whole number"),
    ("retry_delays", "0", "'item 1' must be at least 1"),
    ("retry_delays", "1,-1", "'item 2' must be at least 1"),
    ("retry_delays", "86401", "must be at most 86400"),
    ("retry_delays", "٣", "must be a whole number"),
    ("retry_delays", "9" * 5000, "is too large"),
    ("delivery_limit", "100", "must be less than 100, not '100'"),
    ("delivery_limit", "0", "must be at least 1"),
    ("max_attempts", "many", "must be a whole number, not 'many'"),
    ("schema_repairs", "many", "must be a whole number, or off"),
    ("schema_repairs", "-1", "must be at least 0"),
    ("max_attempts", "1.5", "must be a whole number"),
    ("initial_concurrency", "65", "is more than VQA_MAX_CONCURRENCY (64): lower it, or raise that one"),
    ("initial_concurrency", "0", "must be at least 1"),
    ("max_concurrency", "0", "must be at least 1"),
    ("max_concurrency", "65536", "must be at most 65535"),
    ("max_concurrency", "9" * 5000, "is too large"),
    ("max_image_bytes", "-1", "must be at least 1"),
    ("max_images_per_job", "0", "must be at least 1"),
    ("max_job_bytes", "0", "must be at least 1"),
    ("declare_topology", "perhaps", "must be true or false, not 'perhaps'"),
    ("s3_endpoint_url", "minio:9000", "must begin with https:// or http://"),
    ("s3_endpoint_url", "https://", "must have a host"),
    ("s3_endpoint_url", "https://user@host", "must not carry a user name"),
    ("model_base_url", "https://host/v1?x=1", "must not have a query, except ?api-version=… (Azure)"),
    ("model_base_url", "https://host/v1?api-version=1&key=x", "must not have a query, except"),
    ("model_base_url", "https://host/v1#x", "must not have a fragment"),
    ("model_base_url", "https://user@host/v1", "must not carry a user name"),
    ("model_base_url", "https://a.openai.azure.com/openai/deployments/d",
     "for example https://a.openai.azure.com/openai/deployments/d?api-version=2024-10-21"),
    ("provider", "somebody", "must be one of generic, azure, dashscope, deepinfra, "),
    ("provider_profile", "/nowhere/profile.toml", "must be an existing file"),
    ("model_base_url", "https://ho st/v1", "without spaces"),
    ("model_base_url", "https://höst/v1", "non-ASCII"),
    ("model_base_url", "ftp://host/", "must begin with https:// or http://"),
    ("s3_addressing_style", "subdomain", "must be 'auto', 'path' or 'virtual', not 'subdomain'"),
    ("image_delivery", "carrier", "must be 'inline' or 'link'"),
    ("allowed_buckets", "s3://photos", "is not a bucket's name"),
    ("allowed_buckets", "photos scans", "is not a bucket's name"),
    ("allowed_buckets", ",", "is not set"),
    ("allowed_buckets", "photos/2030", "is not a bucket's name"),
    ("s3_unsigned", "s3://photos", "is not a bucket's name"),
    ("s3_requester_pays", "maybe", "must be true or false"),
    ("allowed_link_hosts", "https://cdn.example", "is not a host"),
    ("allowed_models", "another/model", "does not include 'meta-llama/Llama-3.2-90B-Vision-Instruct'"),
    ("allowed_models", ",", "does not include 'meta-llama/Llama-3.2-90B-Vision-Instruct'"),
    ("model_timeout", "0", "must be more than 0"),
    ("model_timeout", "nan", "must be"),
    ("model_timeout", "inf", "must be a finite number"),
    ("job_timeout", "1740", "must be less than 1740"),
    ("shutdown_grace", "-1", "must be at least 0"),
    ("http_port", "65536", "must be at most 65535"),
    ("http_port", "tcp://10.0.0.1:80", "not 'tcp://10.0.0.1:80'"),
    ("secrets_dir", "/no/such/folder", "must be an existing folder, not '/no/such/folder'"),
    ("log_level", "loud", "must be 'debug', 'info', 'warning' or 'error', not 'loud'"),
    ("log_format", "xml", "must be 'json' or 'console'"),
    ("result_store", "https://bucket/answers", "must be s3://bucket/prefix"),
    ("result_store", "s3://", "must be s3://bucket/prefix"),
    ("result_store", "s3://bucket/my answers", "must be s3://bucket/prefix, without spaces"),
    ("large_results", "large", "must be s3://bucket/prefix"),
    ("max_result_bytes", "0", "must be at least 1"),
    ("max_result_bytes", "16 MiB", "must be a whole number"),
    ("model_headers", "X-A: 1", "must be a JSON object"),
    ("model_headers", '["X-A"]', "must be a JSON object"),
    ("model_headers", "[" * 100_000, "must be a JSON object"),
    ("model_headers", '{"X A": "1"}', "'X A' is not a valid header name"),
    ("model_headers", '{"": "1"}', "is not a valid header name"),
    ("model_headers", '{"Content-Length": "1"}', "is set by the HTTP client"),
    ("model_headers", '{"X-A": 1}', "'X-A' must be text"),
    ("model_headers", '{"X-A": "a\\r\\nX-B: b"}', "'X-A' must be printable ASCII"),
    ("model_headers", '{"X-A": "ü"}', "'X-A' must be printable ASCII"),
    ("model_headers", '{"X-A": " a"}', "without leading or trailing spaces"),
    ("prices", "0.5", "must be a JSON object"),
    ("prices", '{"m": [1, -2]}', "'m/item 2' must be at least 0"),
    ("prices", '{"m": {"prompt": 1}}', "'m/completion' is missing"),
    ("prices", '{"m": {"prompt": 1, "completion": 2, "input": 3}}', "'m/input' is not a known field"),
    ("prices", '{"m": {"prompt": "x", "completion": 2}}', "'m/prompt' must be a number"),
    ("prices", '{"m": 1}', "'m' must be a JSON object or a list"),
    ("prices", '{"m": [1, 2, 3, 4]}', "'m' must not have more than 3 items"),
    ("prices", '{"m": [NaN, 1]}', "'m/item 1' must be"),
    ("prices", '{"m": [1e999, 1]}', "'m/item 1' must be a finite number"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "message"), BAD)
def test_an_invalid_value_is_one_error_that_describes_the_problem(name: str, text: str, message: str) -> None:
    line = fault(**{name: text})
    assert message in line
    assert len(line) < 260
    # Not pydantic's words.
    assert not re.search(r"should|valid (int|num|str|bool)|unable|parse|field required|tuple", line)


BLAMED_ON_ANOTHER = {
    "vqa.jobs.dead": "VQA_DEAD_LETTER_QUEUE",
    "vqa.jobs.retry.30s": "VQA_RETRY_DELAYS",
    "vqa.jobs.retry.1s": "VQA_RETRY_DELAYS",
}


@pytest.mark.parametrize(("name", "text"), [case[:2] for case in BAD])
def test_an_error_begins_with_the_variable_s_name(name: str, text: str) -> None:
    assert fault(**{name: text}).startswith(f"{BLAMED_ON_ANOTHER.get(text, variable(name))}: ")


def test_all_errors_are_reported_at_once() -> None:
    """An invalid value hides no other error of one or of two settings."""
    wrong = {name: text for name, text, _ in BAD if text not in BLAMED_ON_ANOTHER}
    wrong |= {"dead_letter_queue": "vqa.results", "jobs_queue": "amq.x", "model_api_key": "a b"}
    wrong |= {"secrets_dir": "missing", "results_queue": "vqa.results", "allowed_models": "other"}
    lines = faults_of({variable(name): text for name, text in wrong.items()})
    faulty = {line.split(":")[0] for line in lines}
    assert faulty == {variable(name) for name in wrong} - {"VQA_RESULTS_QUEUE"}
    assert len(lines) == len(faulty)


def test_the_length_of_a_retry_queue_s_name_is_checked() -> None:
    name = "j" * 247
    line = fault(jobs_queue=name, dead_letter_queue="dead", retry_delays="1,10")
    assert line.startswith("VQA_RETRY_DELAYS: ")
    assert "shorten VQA_JOBS_QUEUE" in line
    assert load(jobs_queue=name[:-8], retry_delays="1,10").dead_letter_queue.endswith(".dead")


def test_the_exception_s_text_has_one_line_per_error() -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings({})
    assert str(caught.value).splitlines() == caught.value.faults


ITEM = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters=","), min_size=1, max_size=20)


@given(items=st.lists(ITEM, min_size=1, max_size=8), blank=st.sampled_from(["", " ", "\t"]))
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_comma_separated_lists_are_split(items: list[str], blank: str) -> None:
    text = f"{blank},{blank}".join(items) + ","
    assert load(model=items[0], allowed_models=text).allowed_models == tuple(items)


@given(delays=st.lists(st.integers(1, 86_400), min_size=1, max_size=8))
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_retry_delays_are_split(delays: list[int]) -> None:
    assert load(retry_delays=", ".join(map(str, delays))).retry_delays == tuple(delays)


@given(
    text=st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=60),
    name=st.sampled_from(sorted(Settings.model_fields)),
)
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_every_value_is_accepted_or_an_error_of_one_line(name: str, text: str) -> None:
    try:
        load(**{name: text})
    except SettingsError as error:
        assert all(len(line.splitlines()) == 1 for line in error.faults)  # noqa: PT017  # either way is right


# TLS to the broker


@pytest.fixture
def pem(tmp_path: Path) -> Callable[[str, str], str]:
    return lambda name, text: write(tmp_path / name, text)


TLS_URL = "amqps://user:pw@host/"


def test_without_tls_there_is_no_context() -> None:
    assert broker_ssl_context(load()) is None


def test_tls_without_files_uses_the_system_s_ca_certificates() -> None:
    context = broker_ssl_context(load(rabbitmq_url=TLS_URL))
    assert context is not None
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname


def test_tls_uses_its_three_files(pem: Callable[[str, str], str]) -> None:
    settings = load(
        rabbitmq_url=TLS_URL,
        rabbitmq_ca_file=pem("ca", CERTIFICATE),
        rabbitmq_cert_file=pem("cert", CERTIFICATE),
        rabbitmq_key_file=pem("key", KEY),
    )
    context = broker_ssl_context(settings)
    assert context is not None
    assert context.cert_store_stats()["x509_ca"] == 1


@pytest.mark.parametrize("text", ["", "not PEM", KEY, CERTIFICATE.replace("M", "-", 1), "\x00\xff"])
def test_an_invalid_ca_file_is_an_error(pem: Callable[[str, str], str], text: str) -> None:
    line = fault(rabbitmq_url=TLS_URL, rabbitmq_ca_file=pem("ca", text))
    assert line.startswith("VQA_RABBITMQ_CA_FILE: ")
    assert "PEM" in line


@pytest.mark.parametrize("key", ["", "not PEM", CERTIFICATE, KEY_OF_ANOTHER, ENCRYPTED_KEY])
def test_a_certificate_and_a_key_that_cannot_be_loaded_are_an_error(
    pem: Callable[[str, str], str], key: str
) -> None:
    line = fault(
        rabbitmq_url=TLS_URL,
        rabbitmq_cert_file=pem("cert", CERTIFICATE),
        rabbitmq_key_file=pem("key", key),
    )
    assert line.startswith("VQA_RABBITMQ_KEY_FILE: and VQA_RABBITMQ_CERT_FILE cannot be loaded")


@pytest.mark.parametrize("name", ["rabbitmq_cert_file", "rabbitmq_key_file"])
def test_a_certificate_and_its_key_require_each_other(pem: Callable[[str, str], str], name: str) -> None:
    line = fault(rabbitmq_url=TLS_URL, **{name: pem("file", CERTIFICATE)})
    assert line == "VQA_RABBITMQ_KEY_FILE: and VQA_RABBITMQ_CERT_FILE go together: give both or neither"


@pytest.mark.parametrize("name", ["rabbitmq_ca_file", "rabbitmq_cert_file", "rabbitmq_key_file"])
def test_a_missing_tls_file_is_an_error(name: str) -> None:
    lines = faults_of(REQUIRED | {"VQA_RABBITMQ_URL": TLS_URL, variable(name): "/nowhere/file.pem"})
    assert f"{variable(name)}: must be an existing file, not '/nowhere/file.pem'" in lines


@pytest.mark.parametrize("name", ["rabbitmq_ca_file", "rabbitmq_cert_file", "rabbitmq_key_file"])
def test_tls_files_without_tls_are_an_error(pem: Callable[[str, str], str], name: str) -> None:
    lines = faults_of(REQUIRED | {variable(name): pem("file", CERTIFICATE)})
    assert any(line.startswith(variable(name)) and "amqps://" in line for line in lines)


# Warnings


def the_warning(settings: Settings) -> str:
    (line,) = settings.warnings()
    assert "\n" not in line
    return line


def test_a_grace_period_shorter_than_a_call_is_a_warning() -> None:
    line = the_warning(load(shutdown_grace="100"))
    assert line.startswith("VQA_SHUTDOWN_GRACE: 100 s are less than VQA_MODEL_TIMEOUT (120 s)")


def test_a_job_timeout_shorter_than_a_call_is_a_warning() -> None:
    assert the_warning(load(job_timeout="60")).startswith("VQA_JOB_TIMEOUT: 60 s")


@pytest.mark.parametrize(("job_timeout", "is_warned"), [("600", True), ("660", False)])
def test_a_job_timeout_shorter_than_the_tier_flex_is_a_warning(job_timeout: str, *, is_warned: bool) -> None:
    settings = load(provider="deepinfra", flex_fallback="true", job_timeout=job_timeout)
    assert load(provider="deepinfra", job_timeout=job_timeout).warnings() == []
    if not is_warned:
        assert settings.warnings() == []
        return
    line = the_warning(settings)
    assert line.startswith("VQA_JOB_TIMEOUT: 600 s are less than a request in the tier `flex` may take at ")
    assert "(660 s)" in line


def test_checking_presigned_urls_without_link_delivery_is_a_warning() -> None:
    assert the_warning(load(check_linked_images="true")).startswith("VQA_CHECK_LINKED_IMAGES: ")
    assert "VQA_IMAGE_DELIVERY=link" in the_warning(load(check_linked_images="true"))
    assert load(check_linked_images="true", image_delivery="link").warnings() == []


def test_a_buffer_that_is_too_small_for_one_job_is_a_warning() -> None:
    enough = 16 * 768 * 1024
    assert load(image_buffer_bytes=str(enough)).warnings() == []
    line = the_warning(load(image_buffer_bytes=str(enough - 1)))
    assert line.startswith("VQA_IMAGE_BUFFER_BYTES: ")
    assert "VQA_MAX_IMAGES_PER_JOB" in line
    assert str(enough) in line
    assert load(image_buffer_bytes=str(enough - 1), max_images_per_job="15").warnings() == []
    assert the_warning(load(max_images_per_job="1000")).startswith("VQA_IMAGE_BUFFER_BYTES: ")


def test_a_field_of_the_metadata_names_the_tenant() -> None:
    settings = load(tenant_from="metadata.team", tenants="red, blue")
    assert (settings.tenant_key, settings.tenants) == ("team", ("red", "blue"))
    assert settings.warnings() == []
    # The rest is the field's name, including dots.
    assert load(tenant_from="metadata.billing.team", tenants="red").tenant_key == "billing.team"
    assert load().tenant_key is None


@pytest.mark.parametrize("field", ["team", "metadata", "metadata.", "headers.team", "Metadata.team"])
def test_only_metadata_fields_can_name_the_tenant(field: str) -> None:
    assert "metadata.team" in fault(tenant_from=field)


def test_tenants_without_a_field_and_a_field_without_tenants_are_warnings() -> None:
    assert the_warning(load(tenants="red")).startswith("VQA_TENANTS: ")
    assert the_warning(load(tenant_from="metadata.team")).startswith("VQA_TENANT_FROM: ")


def test_the_host_or_the_setting_selects_the_provider_profile() -> None:
    assert load().profile.name == "deepinfra"
    assert load(model_base_url="https://a.openai.azure.com/openai/v1").profile.name == "azure"
    assert load(model_base_url="http://localhost:8000/v1").profile.name == "generic"
    assert load(model_base_url="https://openrouter.ai.example/v1").profile.name == "generic"
    vllm = load(model_base_url="http://localhost:8000", provider="vllm")
    assert vllm.profile.name == "vllm"
    assert vllm.model_base_url == "http://localhost:8000/v1"


def test_a_file_overrides_values_of_the_profile(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.toml", '[images]\nmax_count = 3\n[[rules]]\nstatus = [418]\ncategory = "job"\n'
    )
    built_in, profile = load().profile, load(provider_profile=path).profile
    assert profile.images.max_count == 3
    assert profile.images.types == built_in.images.types
    assert profile.rules[0].status == (418,)
    assert profile.rules[1:] == built_in.rules


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[images", "is not TOML"),
        ("[images]\nmost = 3", "images.most: "),
        ("[images]\nmax_count = 0", "images.max_count: "),
        ('[[rules]]\ncategory = "perhaps"', "rules.0.category: "),
        ('[[rules]]\nstatus = ["4x"]\ncategory = "job"', "rules.0.status.0"),
        ("[[rules]]\nwords = ['(']\ncategory = \"job\"", "is not a regular expression"),
        ('[request]\ntoken_limit = "tokens"', "request.token_limit: "),
    ],
)
def test_an_invalid_profile_is_an_error_that_names_the_place(tmp_path: Path, text: str, says: str) -> None:
    path = write(tmp_path / "profile.toml", text)
    line = fault(provider_profile=path)
    assert line.startswith(f"VQA_PROVIDER_PROFILE: {path}: ")
    assert says in line


def test_a_base_url_that_is_not_the_provider_s_is_a_warning() -> None:
    line = the_warning(load(model_base_url="https://api.deepinfra.com/v1"))
    assert line == "VQA_MODEL_BASE_URL: the API of DeepInfra is at https://api.deepinfra.com/v1/openai"


@pytest.mark.parametrize("host", ["models.example", "10.0.0.1", "localhost.evil.org", "[2001:db8::1]:80"])
def test_a_key_sent_without_tls_is_a_warning(host: str) -> None:
    assert the_warning(load(model_base_url=f"HTTP://{host}/v1")).startswith("VQA_MODEL_BASE_URL: ")


@pytest.mark.parametrize(
    "url", ["https://models.example", "http://localhost:8000", "http://127.8.9.1", "http://[::1]", "http://a.localhost"]
)  # fmt: skip
def test_a_local_api_or_one_with_tls_is_not_a_warning(url: str) -> None:
    assert load(model_base_url=url).warnings() == []


def test_an_unknown_variable_is_a_warning_with_the_closest_name() -> None:
    line = the_warning(load(max_concurency="3"))
    assert line == (
        "VQA_MAX_CONCURENCY: in the environment, is not a setting and is ignored;"
        " did you mean VQA_MAX_CONCURRENCY?"
    )


def test_a_misspelt_required_variable_is_reported_with_the_missing_one() -> None:
    faults = faults_of({"VQA_ALLOWED_BUCKET": "photos", "VQA_MODEL_API_KEY": "sk-test"})
    assert [line.split(": ")[0] for line in faults] == ["VQA_ALLOWED_BUCKETS", "VQA_ALLOWED_BUCKET"]
    assert faults[1].endswith("did you mean VQA_ALLOWED_BUCKETS?")


def test_an_unknown_variable_without_a_similar_setting_is_a_warning_without_a_name() -> None:
    assert the_warning(load(zzz="3")).endswith("is not a setting and is ignored")


def test_unknown_variables_in_the_env_file_are_reported() -> None:
    write(Path(".env"), "VQA_MODLE=x\nOTHER=1\nVQA_JUST_A_NAME\n")
    assert [line.split(", is not")[0] for line in load().warnings()] == ["VQA_MODLE: in .env"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("VQA_WORKER_SERVICE_HOST", "10.0.0.1"),
        ("VQA_WORKER_SERVICE_PORT", "80"),
        ("VQA_WORKER_SERVICE_PORT_HTTP", "80"),
        ("VQA_WORKER_PORT", "tcp://10.0.0.1:80"),
        ("VQA_WORKER_PORT_80_TCP", "tcp://10.0.0.1:80"),
        ("VQA_WORKER_PORT_80_TCP_PROTO", "tcp"),
        ("VQA_WORKER_PORT_80_TCP_PORT", "80"),
        ("VQA_WORKER_PORT_80_TCP_ADDR", "10.0.0.1"),
        ("VQA_SERVICE_HOST", "10.0.0.1"),
        ("VQA_PORT", "tcp://10.0.0.1:80"),
    ],
)
def test_the_variables_of_a_kubernetes_service_are_not_warnings(name: str, value: str) -> None:
    assert load_settings(REQUIRED | {name: value}).warnings() == []


def test_a_misspelt_port_is_not_mistaken_for_a_service() -> None:
    assert "did you mean VQA_HTTP_PORT?" in the_warning(load(htpp_port="9090"))


def test_the_value_of_an_unknown_variable_is_never_shown() -> None:
    assert "sk-secret" not in the_warning(load(model_apikey="sk-secret"))
