"""Profiles of model APIs: built-in data, one TOML file each, which a file of the user can override."""

import re
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from worker.providers.profile import Category, Profile, Rule

__all__ = [
    "GENERIC",
    "Category",
    "Profile",
    "ProfileError",
    "Rule",
    "load_profile",
    "provider_names",
    "provider_of",
]

GENERIC: Final = "generic"
_SUFFIX: Final = ".toml"


class ProfileError(Exception):
    """A profile's file is invalid; the message says where and why."""


@cache
def provider_names() -> tuple[str, ...]:
    """Return the names of the built-in profiles, `generic` first."""
    names = (entry.name for entry in resources.files(__name__).iterdir())
    found = sorted(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX))
    return (GENERIC, *(name for name in found if name != GENERIC))


def provider_of(host: str) -> str:
    """Return the name of the profile for an API's host; `generic` if none has it."""
    labels = f".{host.lower()}"
    return next((name for domain, name in _domains().items() if labels.endswith(f".{domain}")), GENERIC)


@cache
def _domains() -> Mapping[str, str]:
    return {domain: name for name in provider_names() for domain in _built_in(name).get("hosts", ())}


@cache
def load_profile(name: str, override: Path | None = None) -> Profile:
    """Return a built-in profile, overridden by the values of a TOML file.

    The file's rules come before the built-in ones.

    Raises:
        ProfileError: the file cannot be read, or is not a profile.
    """
    built_in = _built_in(name) if name == GENERIC else _merged(_built_in(GENERIC), _built_in(name))
    if override is None:
        return Profile.model_validate({**built_in, "name": name})
    try:
        merged = _merged(built_in, tomllib.loads(override.read_text(encoding="utf-8")))
        profile = Profile.model_validate({"name": name, **merged})
        for rule in profile.rules:
            rule.compile()
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise ProfileError(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None
    except re.error as error:
        raise ProfileError(f"{str(error.pattern)!r} is not a regular expression: {error.msg}") from None
    except OSError as error:
        raise ProfileError(f"cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ProfileError(f"is not TOML: {error}") from None
    return profile


@cache
def _built_in(name: str) -> Mapping[str, Any]:
    return tomllib.loads(resources.files(__name__).joinpath(name + _SUFFIX).read_text(encoding="utf-8"))


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return two profiles as one: tables are merged, rules of `above` come first, other values replace."""
    merged = {**below, **above}
    for name in below.keys() & above.keys():
        if name == "rules":
            merged[name] = [*above[name], *below[name]]
        elif isinstance(below[name], dict) and isinstance(above[name], dict):
            merged[name] = {**below[name], **above[name]}
    return merged
