"""Read the settings: the environment, then `.env`, then a folder of files, with pydantic-settings."""

import difflib
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from dotenv import dotenv_values
from pydantic import ValidationError

from worker.settings.broker import BrokerSettings
from worker.settings.commands import CommandSettings
from worker.settings.faults import PREFIX, SettingsError, fault_lines, variable
from worker.settings.model import Settings
from worker.settings.traces import trace_faults

Kind = TypeVar("Kind", bound=BrokerSettings)

KNOWN_VARIABLES: Final = frozenset(variable(field) for field in Settings.model_fields)

# Variables that Kubernetes sets in every pod for each Service, here for one whose name begins with "vqa".
_SERVICE_LINK: Final = re.compile(r"_SERVICE_(HOST|PORT)|_PORT_\d+_(TCP|UDP|SCTP)")


def load_settings(*, env_file: Path | None = Path(".env")) -> Settings:
    """Read the settings.

    Args:
        env_file: a file of `NAME=value` lines, which may be missing; None to read no file.

    Raises:
        SettingsError: a setting is invalid; lists every problem.
    """
    return _load(Settings, env_file)


def load_broker_settings(*, env_file: Path | None = Path(".env")) -> BrokerSettings:
    """Read only the settings for RabbitMQ; the others may be invalid or missing.

    Args and Raises: as `load_settings`.
    """
    return _load(BrokerSettings, env_file)


def load_command_settings(*, env_file: Path | None = Path(".env")) -> CommandSettings:
    """Read only the settings that the command line uses.

    Args and Raises: as `load_settings`.
    """
    return _load(CommandSettings, env_file)


class Source(NamedTuple):
    """Where a setting comes from: `environment`, the env file or the folder of secrets; and its text."""

    name: str
    text: str


def setting_sources(*, env_file: Path = Path(".env")) -> Mapping[str, Source]:
    """Return the source of each field of `Settings` that is set, in the precedence of `load_settings`.

    Raises:
        SettingsError: the env file cannot be read.
    """
    written = _written(env_file)
    named = os.environ.get(variable("secrets_dir")) or written.get(variable("secrets_dir")) or ""
    places: list[tuple[str, Mapping[str, str | None]]] = [
        ("environment", os.environ),
        (str(env_file), written),
    ]
    folder = Path(named.strip())
    if named.strip() and folder.is_dir():
        files = [it for it in folder.iterdir() if it.name.upper() in KNOWN_VARIABLES and it.is_file()]
        places.append((str(folder), {it.name: it.read_text(errors="replace") for it in files}))
    found: dict[str, Source] = {}
    for place, texts in places:
        given = {name.upper(): text for name, text in texts.items()}
        for field in Settings.model_fields:
            text = given.get(variable(field))
            if text is not None and (text.strip() or field in Settings.MAY_BE_EMPTY):
                found.setdefault(field, Source(place, text.strip()))
    return found


def _written(env_file: Path | None) -> Mapping[str, str | None]:
    try:
        return dotenv_values(env_file) if env_file else {}
    except (OSError, ValueError) as error:
        raise SettingsError([f"{env_file}: cannot be read: {_reason(error)}"]) from None


def _load(kind: type[Kind], env_file: Path | None) -> Kind:
    written = _written(env_file)
    unknown = [
        *_unknown_variables("the environment", os.environ),
        *_unknown_variables(str(env_file), written),
    ]
    named = os.environ.get(variable("secrets_dir")) or written.get(variable("secrets_dir")) or ""
    folder = named.strip() or None
    try:
        with warnings.catch_warnings(record=True) as doubts:
            warnings.simplefilter("always", UserWarning)
            settings = kind(_env_file=env_file, _secrets_dir=folder)
    except ValidationError as error:
        # The original is not chained: a traceback would show the values that it holds.
        # A setting that is missing may be misspelt.
        raise SettingsError([*fault_lines(error), *trace_faults(os.environ), *unknown]) from None
    except (OSError, ValueError) as error:
        raise SettingsError([f"VQA_SECRETS_DIR: {folder!r} cannot be read: {_reason(error)}"]) from None
    if doubts:
        # The library only warns, for example about a folder in place of a file.
        raise SettingsError([f"{variable('secrets_dir')}: {doubt.message}" for doubt in doubts])
    if faults := list(trace_faults(os.environ)):
        raise SettingsError(faults)
    settings.unknown_variables.extend(unknown)
    return settings


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or "it is not UTF-8 text"


def _unknown_variables(place: str, texts: Mapping[str, str | None]) -> Iterator[str]:
    """Yield a line for every name with the settings' prefix that is not a setting."""
    for name, text in sorted((name.upper(), text) for name, text in texts.items() if text is not None):
        is_link = _SERVICE_LINK.search(name) or (name.endswith("_PORT") and "://" in text)
        if not name.startswith(PREFIX) or name in KNOWN_VARIABLES or is_link:
            continue
        close = difflib.get_close_matches(name, KNOWN_VARIABLES, n=1, cutoff=0.75)
        hint = f"; did you mean {close[0]}?" if close else ""
        yield f"{name}: in {place}, is not a setting and is ignored{hint}"
