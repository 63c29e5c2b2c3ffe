"""Validate the choice of a provider's profile.

Validators raise ValueError with the rest of a sentence that begins with the variable's name.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, FilePath, ValidationInfo

from worker.providers import ProfileError, load_profile, provider_names, provider_of
from worker.settings.urls import host_of
from worker.settings.values import AnyCase


def provider_name(above: Mapping[str, Any]) -> str:
    """Return the name of the profile: that of `VQA_PROVIDER`, or by the host of `VQA_MODEL_BASE_URL`."""
    return above.get("provider") or provider_of(host_of(above.get("model_base_url", "")))


def _known(name: str | None) -> str | None:
    if name is not None and name not in provider_names():
        raise ValueError(f"must be one of {', '.join(provider_names())}")
    return name


def _valid_profile(path: Path | None, info: ValidationInfo) -> Path | None:
    try:
        load_profile(provider_name(info.data), path)
    except ProfileError as error:
        raise ValueError(f"{path}: {error}") from None
    return path


Provider: TypeAlias = Annotated[str | None, AnyCase, AfterValidator(_known)]
ProfileFile: TypeAlias = Annotated[FilePath | None, AfterValidator(_valid_profile)]
