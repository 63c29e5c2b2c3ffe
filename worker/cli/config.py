"""`vqa-worker config show`: the effective settings and their sources."""

import json
from pathlib import Path
from typing import Any, Final

from worker.cli.shell import Screen

DEFAULT: Final = "default"
MAX_CHARS: Final = 100_000


def show(screen: Screen) -> None:
    """Print the effective settings and where each comes from.

        vqa-worker config show
        vqa-worker config show --env-file worker.env --json
        vqa-worker config show | grep -v ^default

    Sources: the environment, the env file, the folder VQA_SECRETS_DIR, or the default. Secrets are masked.
    Variables that are not settings are reported on stderr. Does not connect to anything. If a setting is
    wrong, the values are printed as they are given, and the exit code is 78.
    """
    from worker.observability.redaction import Redactor
    from worker.settings import Settings, SettingsError, load_settings, setting_sources, variable
    from worker.settings.urls import fallback_key_variable, split_broker_urls

    sources = setting_sources(env_file=screen.options.env_file or Path(".env"))
    names = {field: source.name for field, source in sources.items()}
    if screen.options.url is not None:
        names["rabbitmq_url"] = "--url"
    try:
        settings, error = screen.load(load_settings), None
    except SettingsError as caught:
        settings, error = None, caught
    if settings and settings.model_api_key.get_secret_value():
        names.setdefault("model_api_key", fallback_key_variable(settings.model_base_url) or DEFAULT)
    redact = Redactor(settings.secret_values() if settings else (), limit=MAX_CHARS)
    width = max(map(len, (DEFAULT, *names.values())))
    for field, info in Settings.model_fields.items():
        given = sources[field].text if field in sources else info.default
        text = _as_text(
            getattr(settings, field) if settings else given, is_secret="SecretStr" in str(info.annotation)
        )
        # URLs of a list one by one: the redaction of a query would extend over the next URL.
        value = None if text is None else ",".join(map(redact, split_broker_urls(text)))
        source = names.get(field, DEFAULT)
        line = f"{source:{width}}  {variable(field)}={value or ''}"
        screen.emit({"name": variable(field), "value": value, "source": source}, line)
    if error is not None:
        raise error


def _as_text(value: Any, *, is_secret: bool) -> str | None:
    """Return a value as a variable has it; None if it is not set. Secrets are masked, except in URLs."""
    from pydantic import SecretStr

    from worker.observability.redaction import MARK

    match value:
        case SecretStr():
            secret = value.get_secret_value()
            return secret if "://" in secret else MARK if secret else None
        case str() if is_secret:
            # One of the settings is invalid, so that this one is not parsed.
            return MARK
        case float():
            return f"{value:g}"
        case bool() | dict():
            return json.dumps(value, default=lambda _: MARK)
        case tuple() | list():
            return ",".join(map(str, value))
    return None if value is None else str(value)
