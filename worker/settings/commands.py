"""The settings that the command line uses in addition to the broker's: a part of those in `Settings`."""

from typing import Annotated, Literal

from worker.settings.broker import BrokerSettings
from worker.settings.model import AllowedModels, Price, Settings
from worker.settings.urls import HttpUrl
from worker.settings.values import AnyCase, CommaList, Count, JsonObject, Printable

_DEFAULTS = {name: field.default for name, field in Settings.model_fields.items()}


class CommandSettings(BrokerSettings):
    """Settings for submitting jobs; the API key and other settings of a worker may be missing."""

    s3_endpoint_url: HttpUrl | None = _DEFAULTS["s3_endpoint_url"]
    s3_addressing_style: Annotated[Literal["auto", "path", "virtual"], AnyCase] = _DEFAULTS[
        "s3_addressing_style"
    ]
    allowed_buckets: CommaList = ()
    model: Printable = _DEFAULTS["model"]
    allowed_models: AllowedModels = _DEFAULTS["allowed_models"]
    prices: Annotated[dict[str, Price], JsonObject] = _DEFAULTS["prices"]
    max_job_bytes: Count = _DEFAULTS["max_job_bytes"]
